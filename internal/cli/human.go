package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// sizeText writes a number of bytes for people.
func sizeText(n uint64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f := float64(n) / 1024
	for f >= 1023.95 && len(units) > 1 {
		f /= 1024
		units = units[1:]
	}
	if f >= 99.95 {
		return fmt.Sprintf("%.0f %s", f, units[0])
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}

// durationText writes a duration for people, with two parts at most: 90 µs, 1.5 ms,
// 12.0 s, 3 m 5 s, 7 d.
func durationText(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + durationText(-d)
	case d == 0:
		return "0 s"
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 100*time.Millisecond:
		return fmt.Sprintf("%.1f ms", d.Seconds()*1e3)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", d.Seconds()), ".0") + " s"
	}
	for _, u := range []struct {
		big, small         time.Duration
		bigName, smallName string
	}{
		{24 * time.Hour, time.Hour, "d", "h"},
		{time.Hour, time.Minute, "h", "m"},
		{time.Minute, time.Second, "m", "s"},
	} {
		if d < u.big {
			continue
		}
		out := fmt.Sprintf("%d %s", d/u.big, u.bigName)
		if rest := d % u.big / u.small; rest > 0 {
			out += fmt.Sprintf(" %d %s", rest, u.smallName)
		}
		return out
	}
	return d.String()
}

// rateText writes how often something happens in a second.
func rateText(perSecond float64) string {
	switch {
	case perSecond == 0:
		return "0"
	case perSecond < 10:
		return fmt.Sprintf("%.1f", perSecond)
	}
	return countText(int64(perSecond + 0.5))
}

// countText writes a number with its thousands apart.
func countText(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural writes a number with its noun, which takes an s unless it is one.
func plural[T int | int64 | uint64](n T, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return countText(int64(n)) + " " + noun + "s"
}

// quoted writes bytes on one line: as they are where people can read them, else as
// a Go string.
func quoted(b []byte) string {
	s := string(b)
	if !utf8.ValidString(s) || strings.HasPrefix(s, `"`) {
		return strconv.Quote(s)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return strconv.Quote(s)
		}
	}
	return s
}

// shortened is quoted, cut to about limit bytes.
func shortened(b []byte, limit int) string {
	if len(b) <= limit {
		return quoted(b)
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(b[cut]) {
		cut--
	}
	return fmt.Sprintf("%s… (%s)", quoted(b[:cut]), sizeText(uint64(len(b))))
}

// millis is a duration given in milliseconds.
func millis(ms uint64) time.Duration { return time.Duration(ms) * time.Millisecond }
