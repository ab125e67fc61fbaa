package capacity

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"sort"
	"strconv"
	"strings"
	"time"
)

const (
	// LongestCurve bounds how much time a curve spans, and mostPoints how many points it has.
	LongestCurve = 31 * 24 * time.Hour
	mostPoints   = 1 << 20
	// mostLoad bounds loads, so that sums of them are exact enough.
	mostLoad = 1e15
)

// Point is the load that is offered to all nodes together at a time since the start. Loads are in
// any unit, operations a second for instance.
type Point struct {
	At   time.Duration
	Load float64
}

// Curve is how load goes over time: points in order of time, straight lines between them.
type Curve []Point

// At returns the load at a time, before the first point that of the first, and so on.
// REQUIRES: there is a point.
func (c Curve) At(t time.Duration) float64 {
	i := sort.Search(len(c), func(i int) bool { return c[i].At >= t })
	switch {
	case i == 0:
		return c[0].Load
	case i == len(c):
		return c[i-1].Load
	}
	a, b := c[i-1], c[i]
	return a.Load + (b.Load-a.Load)*float64(t-a.At)/float64(b.At-a.At)
}

// Scale returns the curve with all loads multiplied.
func (c Curve) Scale(by float64) Curve {
	out := make(Curve, len(c))
	for i, p := range c {
		out[i] = Point{p.At, p.Load * by}
	}
	return out
}

// check returns what is wrong with the last point of a curve.
func (c Curve) check() error {
	p := c[len(c)-1]
	switch {
	case p.At < 0:
		return fmt.Errorf("time %v is negative: curves start at 0", p.At.Seconds())
	case !(p.Load >= 0 && p.Load <= mostLoad):
		return fmt.Errorf("load %v: want a number from 0 to %v", p.Load, mostLoad)
	case len(c) > 1 && p.At <= c[len(c)-2].At:
		return fmt.Errorf("time %v s is not after %v s, the one before: for a jump write two points a second apart", p.At.Seconds(), c[len(c)-2].At.Seconds())
	case p.At-c[0].At > LongestCurve:
		return fmt.Errorf("time %v s: a curve spans %.0f days at most", p.At.Seconds(), LongestCurve.Hours()/24)
	case len(c) > mostPoints:
		return fmt.Errorf("a curve has %d points at most", mostPoints)
	}
	return nil
}

// Validate returns an error unless points are in order, at least two, and within bounds.
func (c Curve) Validate() error {
	for i := range c {
		if err := c[:i+1].check(); err != nil {
			return fmt.Errorf("point %d: %w", i+1, err)
		}
	}
	return c.enough()
}

func (c Curve) enough() error {
	if len(c) < 2 {
		return fmt.Errorf("%d points: a curve needs two at least", len(c))
	}
	return nil
}

// ParseCurve reads a curve from CSV, a line `seconds,load` for each point, times rising. A first
// line that holds names, empty lines and those that begin with # are passed over. Errors
// name the line.
func ParseCurve(r io.Reader) (Curve, error) {
	var c Curve
	lines := bufio.NewScanner(r)
	line, header := 0, false
	for lines.Scan() {
		line++
		text := strings.TrimSpace(lines.Text())
		if line == 1 {
			text = strings.TrimPrefix(text, "\ufeff")
		}
		if text == "" || text[0] == '#' {
			continue
		}
		p, isNames, err := parsePoint(text)
		if isNames && len(c) == 0 && !header {
			header = true
			continue
		}
		if err == nil {
			c = append(c, p)
			err = c.check()
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("line %d: %w", line+1, err)
	}
	if err := c.enough(); err != nil {
		return nil, err
	}
	return c, nil
}

// parsePoint reads a line, and reports whether it has names in place of numbers.
func parsePoint(text string) (p Point, isNames bool, err error) {
	first, second, ok := strings.Cut(text, ",")
	if !ok || strings.Contains(second, ",") {
		return p, false, fmt.Errorf("%.40q: want seconds,load", text)
	}
	seconds, err := parseNumber(first)
	load, err2 := parseNumber(second)
	switch {
	case err != nil:
		return p, err2 != nil, fmt.Errorf("seconds %w", err)
	case err2 != nil:
		return p, false, fmt.Errorf("load %w", err2)
	case math.Abs(seconds) > 1e9:
		return p, false, fmt.Errorf("time %v s is too far away", seconds)
	}
	return Point{time.Duration(math.Round(seconds * float64(time.Second))), load}, false, nil
}

func parseNumber(s string) (float64, error) {
	f, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0, fmt.Errorf("%.40q: want a number", strings.TrimSpace(s))
	}
	return f, nil
}

// Names are the curves that Named knows.
func Names() []string { return []string{"day", "week", "spike", "step", "ramp", "sawtooth"} }

// Named returns a curve with a greatest load of 1, to be scaled:
//
//   - day: from a fifth at night to all at noon and back, 24 hours;
//   - week: seven such days, of which two have half as much;
//   - spike: ten minutes of all, from and to three tenths;
//   - step: three hours of all, from and to three tenths;
//   - ramp: from a tenth to all in six hours, and two hours of that;
//   - sawtooth: every ten minutes up from three tenths to all and down at once, faster
//     than nodes can follow.
func Named(name string) (Curve, error) {
	at := func(m float64, load float64) Point { return Point{time.Duration(m * float64(time.Minute)), load} }
	switch name {
	case "day":
		return days(1), nil
	case "week":
		return days(1, 1, 1, 1, 1, 0.5, 0.5), nil
	case "spike":
		return Curve{at(0, 0.3), at(60, 0.3), at(61, 1), at(71, 1), at(72, 0.3), at(240, 0.3)}, nil
	case "step":
		return Curve{at(0, 0.3), at(60, 0.3), at(61, 1), at(240, 1), at(241, 0.3), at(420, 0.3)}, nil
	case "ramp":
		return Curve{at(0, 0.1), at(360, 1), at(480, 1)}, nil
	case "sawtooth":
		var c Curve
		for m := 0.0; m < 240; m += 10 {
			c = append(c, at(m, 0.3), at(m+9.5, 1))
		}
		return append(c, at(240, 0.3)), nil
	}
	return nil, fmt.Errorf("there is no curve %q: there are %s", name, strings.Join(Names(), ", "))
}

// days goes from a fifth of each day's part to all of it and back, in steps of five minutes.
func days(parts ...float64) Curve {
	const each = 24 * 12
	var c Curve
	for i := range each*len(parts) + 1 {
		part := parts[min(i/each, len(parts)-1)]
		load := 0.6 - 0.4*math.Cos(2*math.Pi*float64(i%each)/each)
		c = append(c, Point{time.Duration(i) * 5 * time.Minute, part * load})
	}
	return c
}
