package topology

import (
	"slices"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// The kinds of conditions.
const (
	// ConditionFrozen: so many nodes are unhealthy that nothing is decided that could harm.
	ConditionFrozen = "frozen"
	// ConditionThaw: that has just ended, and nodes that are unhealthy still are given time.
	ConditionThaw = "thaw"
	// ConditionRedundancy: vnodes have fewer live replicas than they should.
	ConditionRedundancy = "redundancy"
	// ConditionRecovery: a dead node cannot be replaced.
	ConditionRecovery = "recovery"
	// ConditionCapacity: another number of nodes is recommended, and nobody launches them.
	ConditionCapacity = "capacity"
)

// Condition is something that holds for a while, in words.
type Condition struct {
	Kind, Text string
	// SinceMillis is milliseconds since 1970.
	SinceMillis int64
}

// Condition returns what holds of a kind, or "".
func (s *State) Condition(kind string) string {
	i := slices.IndexFunc(s.Conditions, func(c Condition) bool { return c.Kind == kind })
	if i < 0 {
		return ""
	}
	return s.Conditions[i].Text
}

// ConditionSince returns since when something of a kind holds, in milliseconds since 1970;
// ok is false when nothing does.
func (s *State) ConditionSince(kind string) (millis int64, ok bool) {
	i := slices.IndexFunc(s.Conditions, func(c Condition) bool { return c.Kind == kind })
	if i < 0 {
		return 0, false
	}
	return s.Conditions[i].SinceMillis, true
}

// setCondition notes that something holds, or does no longer. It holds since the first
// text of its kind.
func (d *draft) setCondition(pb *topologyv1.SetCondition, atMillis int64) {
	kind, text := pb.GetKind(), pb.GetText()
	i := slices.IndexFunc(d.Conditions, func(c Condition) bool { return c.Kind == kind })
	switch {
	case text == d.Condition(kind):
		return
	case text == "":
		d.Conditions = slices.Delete(d.Conditions, i, i+1)
	case i < 0:
		d.Conditions = append(d.Conditions, Condition{kind, text, atMillis})
	default:
		d.Conditions[i].Text = text
	}
	d.noted = true
}

// Proto converts a condition to its wire form.
func (c Condition) Proto() *topologyv1.Condition {
	return &topologyv1.Condition{Kind: c.Kind, Text: c.Text, SinceMs: uint64(c.SinceMillis)}
}
