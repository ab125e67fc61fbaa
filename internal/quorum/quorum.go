// Package quorum is the arithmetic of quorums: what a setting asks of N
// replicas, what a pair of settings promises, and when enough slots have
// acknowledged. It never talks to a replica.
package quorum

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/kvasirdb/kvasir/internal/mutant"
)

// MaxN bounds the number of replicas of a namespace.
const MaxN = 15

type kind uint8

const (
	unset kind = iota
	count
	percent
	one
	majority
	all
)

// Spec is a quorum as people write it: a count, a percent of N, one, quorum (a
// majority) or all. The zero Spec is unset and stands for a default.
type Spec struct {
	kind  kind
	value uint8
}

// The named quorums.
var (
	One      = Spec{kind: one}
	Majority = Spec{kind: majority}
	All      = Spec{kind: all}
)

// Parse reads "2", "40%", "one", "quorum" or "all". The empty string gives the
// unset Spec. Counts are 1 to MaxN, percents 1 to 100, whole numbers only.
func Parse(s string) (Spec, error) {
	switch s {
	case "":
		return Spec{}, nil
	case "one":
		return One, nil
	case "quorum":
		return Majority, nil
	case "all":
		return All, nil
	}
	digits, isPercent := strings.CutSuffix(s, "%")
	v, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || strings.HasPrefix(digits, "+") {
		return Spec{}, fmt.Errorf("bad quorum %q: want a count (2), a percent (40%%), one, quorum or all", s)
	}
	if isPercent {
		if v < 1 || v > 100 {
			return Spec{}, fmt.Errorf("bad quorum %q: a percent is between 1%% and 100%%", s)
		}
		return Spec{percent, uint8(v)}, nil
	}
	if v < 1 || v > MaxN {
		return Spec{}, fmt.Errorf("bad quorum %q: a count is between 1 and %d", s, MaxN)
	}
	return Spec{count, uint8(v)}, nil
}

// IsZero reports whether s is unset.
func (s Spec) IsZero() bool { return s.kind == unset }

// Or returns s, or def when s is unset.
func (s Spec) Or(def Spec) Spec {
	if s.IsZero() {
		return def
	}
	return s
}

// String writes a quorum as Parse reads it.
func (s Spec) String() string {
	switch s.kind {
	case count:
		return strconv.Itoa(int(s.value))
	case percent:
		return strconv.Itoa(int(s.value)) + "%"
	case one:
		return "one"
	case majority:
		return "quorum"
	case all:
		return "all"
	}
	return ""
}

// Need returns how many of n slots the quorum asks for. A percent p asks for
// ceil(p·n/100), at least one. A count is returned as it is, even above n: see
// Check.
// REQUIRES: n >= 1 and s is set.
func (s Spec) Need(n int) int {
	switch s.kind {
	case count:
		return int(s.value)
	case percent:
		return min(max((int(s.value)*n+99)/100, 1), n)
	case one:
		return 1
	case majority:
		return n/2 + 1
	case all:
		return n
	}
	panic("quorum: Need of an unset quorum")
}

// Check returns an error when n slots can never satisfy the quorum.
func (s Spec) Check(n int) error {
	if s.kind == count && int(s.value) > n {
		return fmt.Errorf("quorum of %d is above N=%d", s.value, n)
	}
	return nil
}

// Warning returns a sentence about a percent that asks for every replica
// although it is below 100, and "" otherwise.
func (s Spec) Warning(n int) string {
	if s.kind == percent && s.value < 100 && n > 1 && s.Need(n) == n {
		return fmt.Sprintf("%s of %d replicas is all of them: one replica down makes it unavailable", s, n)
	}
	return ""
}

// Strength is what a pair of quorums promises about reads.
type Strength uint8

// From weakest to strongest.
const (
	// Eventual: a read may miss acknowledged writes.
	Eventual Strength = iota + 1
	// StrongWhileNotReplaced: R+W>N, but not both are majorities, so a replica that
	// was cut off and replaced still answers itself.
	StrongWhileNotReplaced
	// Strong: R+W>N and both are majorities.
	Strong
)

// String writes a strength as it is shown to people.
func (s Strength) String() string {
	switch s {
	case Eventual:
		return "eventual"
	case StrongWhileNotReplaced:
		return "strong while no replica is replaced"
	case Strong:
		return "strong"
	}
	return fmt.Sprintf("strength(%d)", uint8(s))
}

// StrengthOf judges reads of r slots against writes to w slots, of n.
func StrengthOf(n, w, r int) Strength {
	switch m := n/2 + 1; {
	case r+w <= n:
		return Eventual
	case r >= m && w >= m:
		return Strong
	}
	return StrongWhileNotReplaced
}

// Slot is one replica position as requests see it: the nodes that must all have
// a write before the slot acknowledges it, and the node that answers reads for
// it. Nodes are incarnations; 0 means none.
type Slot struct {
	Write [2]uint64
	Read  uint64
}

// Live reports whether every node that must have a write is alive.
func (s Slot) Live(alive func(node uint64) bool) bool {
	for _, n := range s.Write {
		if n != 0 && !alive(n) {
			return false
		}
	}
	return s.Write[0] != 0
}

// LiveSlots counts the slots that could acknowledge a write now.
func LiveSlots(slots []Slot, alive func(node uint64) bool) int {
	n := 0
	for _, s := range slots {
		if s.Live(alive) {
			n++
		}
	}
	return n
}

// Goal asks for Need of the first N slots. With N=0 it asks for nothing.
type Goal struct{ N, Need int }

// Goals are two goals, of which the second is empty unless N is changing.
type Goals [2]Goal

// Met reports whether slots that have says have what is asked for are enough.
// REQUIRES: no goal's N is above the number of slots.
func (g Goals) Met(slots []Slot, have func(slot int) bool) bool {
	for _, goal := range g {
		n := 0
		for i := range slots[:goal.N] {
			if have(i) {
				n++
			}
		}
		if n < goal.Need {
			return false
		}
	}
	return true
}

// Counter counts the slots whose nodes have all acknowledged. Counting slots and
// not nodes is what makes quorums of neighbouring epochs intersect while a slot
// moves.
type Counter struct {
	slots []Slot
	// acked has a bit for each of a slot's Write nodes.
	acked [MaxN]uint8
	full  [MaxN]bool
	goals Goals
}

// NewCounter returns a counter over slots that is reached when both goals are. It
// keeps the slice and does not change it.
// REQUIRES: len(slots) <= MaxN, and no goal's N is above it.
func NewCounter(slots []Slot, goals Goals) Counter {
	return Counter{slots: slots, goals: goals}
}

// Ack notes that a node has acknowledged, for every slot it belongs to.
// Repetitions and strangers change nothing. It reports whether this
// acknowledgement reached the quorum.
func (c *Counter) Ack(node uint64) (reached bool) {
	before := c.Reached()
	for i, s := range c.slots {
		want := uint8(0)
		got := c.acked[i]
		for j, n := range s.Write {
			if n == 0 {
				continue
			}
			want |= 1 << j
			if n == node {
				got |= 1 << j
			}
		}
		c.acked[i] = got
		c.full[i] = got == want && want != 0
	}
	return !before && c.Reached()
}

// Acked returns how many slots of the first goal have acknowledged.
func (c *Counter) Acked() int {
	n := 0
	for _, full := range c.full[:c.goals[0].N] {
		if full {
			n++
		}
	}
	return n
}

// Reached reports whether the quorums are reached.
func (c *Counter) Reached() bool {
	if mutant.On("flat-pending-counts") {
		acked := 0
		for _, nodes := range c.acked[:c.goals[0].N] {
			acked += bits.OnesCount8(nodes)
		}
		return acked >= c.goals[0].Need
	}
	return c.goals.Met(c.slots, func(slot int) bool { return c.full[slot] })
}
