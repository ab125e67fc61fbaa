package topology

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"time"
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
func DefaultGroup() AutoScalingGroup {
	return AutoScalingGroup{MinCapacity: 3, MaxCapacity: 12, TargetCPU: 0.7, ScaleUpCooldown: 5 * time.Minute, ScaleDownCooldown: 5 * time.Minute}
}

const (
	// maxCapacity bounds the nodes of a group.
	maxCapacity = 1000
	// leastTarget and mostTarget bound targets that are a share: below, all nodes would be
	// idle; above, nothing is left for one that fails.
	leastTarget, mostTarget = 0.01, 0.95
	leastCooldown           = time.Second
	// slotsEach is how many slots each node has at least, for the ring to be even enough.
	slotsEach = 4
)

// validate returns an error that says what is wrong with a group, and what to write instead.
func (g AutoScalingGroup) validate() error {
	at := func(key, format string, args ...any) error {
		return fmt.Errorf(SettingGroup+"."+key+" is "+format, args...)
	}
	switch {
	case g.MinCapacity < 1:
		return at("min_capacity", "%d: write 1 or more", g.MinCapacity)
	case g.MaxCapacity > maxCapacity:
		return at("max_capacity", "%d: write %d or less", g.MaxCapacity, maxCapacity)
	case g.MinCapacity > g.MaxCapacity:
		return at("min_capacity", "%d, above max_capacity, which is %d: write a max_capacity of %d or more, or a lower min_capacity", g.MinCapacity, g.MaxCapacity, g.MinCapacity)
	case g.TargetCPU == 0 && g.TargetDisk == 0 && g.TargetOperations == 0:
		return errors.New(SettingGroup + " has no target, so that nothing would ever scale: write a target_cpu_utilization of 70%, or a target_disk_utilization or target_operations")
	case !(g.TargetOperations >= 0) || math.IsInf(g.TargetOperations, 0):
		return at("target_operations", "%v: write the operations a second of a node, such as 20000, or off", g.TargetOperations)
	}
	for _, t := range []struct {
		key  string
		part float64
	}{{"target_cpu_utilization", g.TargetCPU}, {"target_disk_utilization", g.TargetDisk}} {
		if t.part != 0 && !(t.part >= leastTarget && t.part <= mostTarget) {
			return at(t.key, "%s: write %s to %s, such as 70%%, or off", writePart(t.part), writePart(leastTarget), writePart(mostTarget))
		}
	}
	for _, c := range []struct {
		key string
		d   time.Duration
	}{{"scale_up_cooldown", g.ScaleUpCooldown}, {"scale_down_cooldown", g.ScaleDownCooldown}} {
		if c.d < leastCooldown {
			return at(c.key, "%s: write %s or more, such as 300s", c.d, leastCooldown)
		}
	}
	return nil
}

// validateFor returns an error unless a ring of so many vnodes, with namespaces of at most
// n replicas, can have as few and as many nodes as a group asks for.
// REQUIRES: validate returned nil; vnodes and n are 1 or more.
func (g AutoScalingGroup) validateFor(vnodes uint32, n int) error {
	if g.MinCapacity < n {
		return fmt.Errorf("%s.min_capacity is %d, and there are namespaces with N=%d, which need as many nodes: write %d or more", SettingGroup, g.MinCapacity, n, n)
	}
	if most := int(vnodes) * n / slotsEach; g.MaxCapacity > most {
		needed := (slotsEach*g.MaxCapacity + n - 1) / n
		return fmt.Errorf("%s.max_capacity is %d, but %d vnodes with N=%d can be spread evenly over %d nodes at most: write %d or less, or found a cluster with %d vnodes",
			SettingGroup, g.MaxCapacity, vnodes, n, most, most, 1<<bits.Len(uint(needed-1)))
	}
	return nil
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
	if err := g.validateFor(t.Vnodes, n); err != nil {
		return nil, err
	}
	if !s.JoinsAuto() {
		warnings = append(warnings, "join is manual: nodes that "+SettingGroup+" launches wait for kvctl ring apply")
	}
	if have := t.DataNodes(); t.Formed() && (have < g.MinCapacity || have > g.MaxCapacity) {
		warnings = append(warnings, fmt.Sprintf("there are %d data nodes, %s wants %d to %d", have, SettingGroup, g.MinCapacity, g.MaxCapacity))
	}
	return warnings, nil
}
