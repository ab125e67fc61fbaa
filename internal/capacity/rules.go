package capacity

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

const (
	// MostNodes bounds MaxCapacity.
	MostNodes = 1000
	// LeastTarget and MostTarget bound targets that are a part of something: below, a group
	// would be all idle nodes; above, nothing is left for a node that fails.
	LeastTarget, MostTarget = 0.01, 0.95
	// LeastCooldown bounds cooldowns.
	LeastCooldown = time.Second
	// slotsEach is how many slots each node has at least, that the ring can be evened out:
	// with four, nodes differ by a quarter at most.
	slotsEach = 4
)

// Rules are the auto_scaling_group that a person asked for.
type Rules struct {
	// MinCapacity and MaxCapacity bound the number of data nodes, spares included.
	MinCapacity, MaxCapacity int
	// TargetCPU and TargetDisk are parts of what a node has, 0 to 1. At 0 a target is not
	// used: it never asks for nodes.
	TargetCPU, TargetDisk float64
	// TargetOperations is in operations a second and node; 0 is not used.
	TargetOperations float64
	// ScaleUpCooldown is the least time from one scale-up to the next; ScaleDownCooldown is
	// that from any scaling to a scale-down.
	ScaleUpCooldown, ScaleDownCooldown time.Duration
}

// Default returns 3 to 12 nodes at 70% CPU, with cooldowns of five minutes.
func Default() Rules {
	return Rules{MinCapacity: 3, MaxCapacity: 12, TargetCPU: 0.7, ScaleUpCooldown: 5 * time.Minute, ScaleDownCooldown: 5 * time.Minute}
}

// Validate returns an error that says what is wrong with the first rule that is, and what
// to write instead.
func (r Rules) Validate() error {
	switch {
	case r.MinCapacity < 1:
		return fmt.Errorf("min_capacity is %d: write 1 or more", r.MinCapacity)
	case r.MaxCapacity > MostNodes:
		return fmt.Errorf("max_capacity is %d: write %d or less", r.MaxCapacity, MostNodes)
	case r.MinCapacity > r.MaxCapacity:
		return fmt.Errorf("min_capacity is %d, above max_capacity, which is %d: write a max_capacity of %d or more, or a lower min_capacity", r.MinCapacity, r.MaxCapacity, r.MinCapacity)
	case r.TargetCPU == 0 && r.TargetDisk == 0 && r.TargetOperations == 0:
		return fmt.Errorf("no target is set, so nothing would ever scale: write target_cpu_utilization: 70%%, or a target_disk_utilization or target_operations")
	case r.TargetOperations < 0 || math.IsNaN(r.TargetOperations) || math.IsInf(r.TargetOperations, 0):
		return fmt.Errorf("target_operations is %v: write the operations a second that a node should do, as 20000, or 0 not to use it", r.TargetOperations)
	}
	for _, t := range []struct {
		key  string
		part float64
	}{{"target_cpu_utilization", r.TargetCPU}, {"target_disk_utilization", r.TargetDisk}} {
		if err := checkTarget(t.part); t.part != 0 && err != nil {
			return fmt.Errorf("%s is %s: %w", t.key, percent(t.part), err)
		}
	}
	for _, c := range []struct {
		key string
		d   time.Duration
	}{{"scale_up_cooldown", r.ScaleUpCooldown}, {"scale_down_cooldown", r.ScaleDownCooldown}} {
		if c.d < LeastCooldown {
			return fmt.Errorf("%s is %v: write %v or more, as 300s", c.key, c.d, LeastCooldown)
		}
	}
	return nil
}

// ValidateFor is Validate, and that a ring of so many vnodes whose largest N is n can have
// as few and as many nodes as that.
// REQUIRES: vnodes and n are 1 or more.
func (r Rules) ValidateFor(vnodes uint32, n int) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if r.MinCapacity < n {
		return fmt.Errorf("min_capacity is %d, and there are namespaces with N=%d, which need as many nodes: write a min_capacity of %d or more", r.MinCapacity, n, n)
	}
	if most := int(vnodes) * n / slotsEach; r.MaxCapacity > most {
		needed := (slotsEach*r.MaxCapacity + n - 1) / n
		return fmt.Errorf("max_capacity is %d, but %d vnodes with N=%d can be spread evenly over %d nodes at most: write a max_capacity of %d or less, or found a cluster with %d vnodes",
			r.MaxCapacity, vnodes, n, most, most, 1<<bits.Len(uint(needed-1)))
	}
	return nil
}

// String writes rules for people.
func (r Rules) String() string {
	var targets []string
	if r.TargetCPU > 0 {
		targets = append(targets, "cpu "+percent(r.TargetCPU))
	}
	if r.TargetDisk > 0 {
		targets = append(targets, "disk "+percent(r.TargetDisk))
	}
	if r.TargetOperations > 0 {
		targets = append(targets, number(r.TargetOperations)+" operations/s a node")
	}
	return fmt.Sprintf("%d to %d nodes at %s; cooldowns %s up, %s down", r.MinCapacity, r.MaxCapacity, strings.Join(targets, ", "), span(r.ScaleUpCooldown), span(r.ScaleDownCooldown))
}

// checkTarget returns what to write instead of a part that is no target.
func checkTarget(part float64) error {
	switch {
	case part >= LeastTarget && part <= MostTarget:
		return nil
	case part > MostTarget:
		return fmt.Errorf("write %s at most: nodes need some room for when one of them fails", percent(MostTarget))
	}
	return fmt.Errorf("write %s to %s, or leave it out", percent(LeastTarget), percent(MostTarget))
}

// decimal writes a number with one digit after the point, if there is one.
func decimal(f float64) string { return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") }

// percent writes a part of 1.
func percent(part float64) string { return decimal(100*part) + "%" }

// number writes a number with its thousands apart.
func number(f float64) string {
	if math.Abs(f) < 10 {
		return decimal(f)
	}
	s := strconv.FormatFloat(f, 'f', 0, 64)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// span writes a duration: in seconds up to ten minutes, as cooldowns are written.
func span(d time.Duration) string {
	switch {
	case d <= 10*time.Minute:
		return decimal(math.Ceil(10*d.Seconds())/10) + " s"
	case d <= 2*time.Hour:
		return decimal(d.Minutes()) + " min"
	case d <= 48*time.Hour:
		return decimal(d.Hours()) + " h"
	}
	return decimal(d.Hours()/24) + " days"
}

// count writes a number with its noun, and what is said of them: "1 node is", "2 nodes are".
func count(n int, noun, one, many string) string {
	if n == 1 {
		return "1 " + noun + one
	}
	return number(float64(n)) + " " + noun + "s" + many
}

func nodes(n int) string { return count(n, "node", "", "") }
