package topology

import (
	"fmt"
	"time"

	"github.com/kvasirdb/kvasir/internal/capacity"
)

// AutoScalingGroup says how many data nodes there are to be.
type AutoScalingGroup struct {
	MinCapacity, MaxCapacity int
	// TargetCPU and TargetDisk are 0 to 1, TargetOperations is operations a second of one
	// node; one that is 0 is not looked at.
	TargetCPU, TargetDisk, TargetOperations float64
	ScaleUpCooldown, ScaleDownCooldown      time.Duration
}

// On reports whether there is such a group.
func (g AutoScalingGroup) On() bool { return g != AutoScalingGroup{} }

// DefaultGroup returns what a group has that is not said otherwise: 3 to 12 nodes at 70% CPU,
// with cooldowns of five minutes.
func DefaultGroup() AutoScalingGroup { return AutoScalingGroup(capacity.Default()) }

// validate returns an error that says what is wrong with a group, and what to write instead.
func (g AutoScalingGroup) validate() error { return ofGroup(capacity.Rules(g).Validate()) }

func ofGroup(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", SettingGroup, err)
}

// CheckSettings returns an error unless settings that are valid by themselves suit the
// cluster, and otherwise what is to be known about them.
func (t *Topology) CheckSettings(s Settings) (warnings []string, err error) {
	if h := s.HealthChecks; h.Timeout > h.Interval {
		return nil, fmt.Errorf("health_checks.timeout is %s: write health_checks.interval, which is %s, or less", h.Timeout, h.Interval)
	}
	g := s.AutoScalingGroup
	if s.ReplaceAfter == 0 {
		warnings = append(warnings, "replace_after is 0s: nodes that are dead are not replaced")
	}
	if !g.On() {
		return warnings, nil
	}
	n := t.Width()
	if !t.Formed() {
		n = min(3, max(1, t.FoundingNodes)) // as it will be
	}
	if err := capacity.Rules(g).ValidateFor(t.Vnodes, n); err != nil {
		return nil, ofGroup(err)
	}
	if !s.JoinsAuto() {
		warnings = append(warnings, "join is manual: nodes that "+SettingGroup+" launches wait for kvctl ring apply")
	}
	if have := t.DataNodes(); t.Formed() && (have < g.MinCapacity || have > g.MaxCapacity) {
		warnings = append(warnings, fmt.Sprintf("there are %d data nodes, %s wants %d to %d", have, SettingGroup, g.MinCapacity, g.MaxCapacity))
	}
	return warnings, nil
}
