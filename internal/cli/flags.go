package cli

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// value is a flag's value that is checked when it is set, so that what is wrong with
// it is said together with the flag's name.
type value[T any] struct {
	target *T
	kind   string
	text   string
	parse  func(string) (T, error)
}

func (v *value[T]) String() string { return v.text }
func (v *value[T]) Type() string   { return v.kind }
func (v *value[T]) Set(s string) error {
	parsed, err := v.parse(s)
	if err != nil {
		return err
	}
	*v.target, v.text = parsed, s
	return nil
}

var _ pflag.Value = (*value[int])(nil)

// quorumFlag is a count, a percent, one, quorum or all.
func quorumFlag(target *string) pflag.Value {
	return &value[string]{target, "quorum", "", func(s string) (string, error) {
		spec, err := quorum.Parse(s)
		if err == nil && spec.IsZero() {
			err = errors.New("want a count (2), a percent (40%), one, quorum or all")
		}
		return s, err
	}}
}

// durationFlag is a duration of whole milliseconds, at least least.
func durationFlag(target *time.Duration, initial, least time.Duration) pflag.Value {
	*target = initial
	text := ""
	if initial > 0 {
		text = initial.String()
	}
	return &value[time.Duration]{target, "duration", text, func(s string) (time.Duration, error) {
		d, err := parseDuration(s)
		if err == nil && d < least {
			err = fmt.Errorf("want %s or more", least)
		}
		return d, err
	}}
}

// parseDuration reads what time.ParseDuration does, and whole days: 7d.
func parseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0, errors.New("want a duration such as 500ms, 10s, 15m, 12h or 7d")
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errors.New("want a duration such as 500ms, 10s, 15m, 12h or 7d")
	}
	if d%time.Millisecond != 0 {
		return 0, errors.New("want whole milliseconds")
	}
	return d, nil
}

// timeFlag is a moment.
func timeFlag(target *time.Time) pflag.Value {
	return &value[time.Time]{target, "time", "", func(s string) (time.Time, error) {
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return t, errors.New("want a time such as 2026-11-20T09:30:00Z")
		}
		return t, nil
	}}
}

// onOffFlag is on or off.
func onOffFlag(target *bool) pflag.Value {
	return &value[bool]{target, "on|off", "", func(s string) (bool, error) {
		if s != "on" && s != "off" {
			return false, errors.New("want on or off")
		}
		return s == "on", nil
	}}
}

// repairFlag is a setting of read repair. The client's numbers are the topology's.
func repairFlag[T client.ReadRepair | topology.ReadRepair](target *T) pflag.Value {
	return &value[T]{target, "mode", "", func(s string) (T, error) {
		r, err := topology.ParseReadRepair(s)
		return T(r), err
	}}
}

// reportingFlag is a policy for reporting replicas.
func reportingFlag(target *topology.ReportingPolicy) pflag.Value {
	return &value[topology.ReportingPolicy]{target, "policy", "", topology.ParseReportingPolicy}
}

// chanceFlag is a number from 0 to 1.
func chanceFlag(target *float64) pflag.Value {
	return &value[float64]{target, "chance", "", func(s string) (float64, error) {
		p, err := strconv.ParseFloat(s, 64)
		if err != nil || math.IsNaN(p) || p < 0 || p > 1 {
			return 0, errors.New("want a number from 0 to 1")
		}
		return p, nil
	}}
}

// countFlag is a whole number within bounds.
func countFlag(target *int, least, most int) pflag.Value {
	return &value[int]{target, "count", "", func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		switch {
		case err != nil && most < math.MaxInt:
			return 0, fmt.Errorf("want a whole number from %d to %d", least, most)
		case err != nil || n < least && most == math.MaxInt:
			return 0, fmt.Errorf("want a whole number, %d or more", least)
		case n < least || n > most:
			return 0, fmt.Errorf("want %d to %d", least, most)
		}
		return n, nil
	}}
}

// nameFlag is the name of a namespace.
func nameFlag(target *string, initial string) pflag.Value {
	*target = initial
	return &value[string]{target, "name", initial, func(s string) (string, error) {
		return s, topology.CheckName("namespace", s)
	}}
}
