package topology

import (
	"slices"

	"github.com/kvasirdb/kvasir/internal/quorum"
)

// Service is how a namespace can be served with the nodes that are up.
type Service struct {
	// NotWritable and NotReadable count the vnodes that miss the default quorums.
	NotWritable, NotReadable int
	// HeldUp counts those whose writes fail because a copy for reports is down that they wait
	// for.
	HeldUp int
	// FewestWriting is the least number of the first N slots that could acknowledge a
	// write, over all vnodes.
	FewestWriting int
}

// Service judges a namespace by the nodes that are up.
func (t *Topology) Service(ns *Namespace, up func(node uint64) bool) Service {
	s := Service{FewestWriting: ns.N}
	writes, reads := ns.Writes(quorum.Spec{}), ns.R.Need(ns.N)
	for v := range t.Ring {
		slots := t.Slots(uint32(v), ns.Wide())
		s.FewestWriting = min(s.FewestWriting, quorum.LiveSlots(slots[:ns.N], up))
		if !writes.Met(slots, func(slot int) bool { return slots[slot].Live(up) }) {
			s.NotWritable++
		}
		if reading(slots[:ns.N], up) < reads {
			s.NotReadable++
		}
		if ns.Reporting.Policy == ReportingBlock && slices.ContainsFunc(t.Copies(uint32(v), ns.ID), func(c Copy) bool { return c.State.Awaited() && !up(c.Node) }) {
			s.HeldUp++
		}
	}
	return s
}

// Degraded counts the vnodes of which fewer replicas are up than the largest N. One
// that is being filled is none yet.
func (t *Topology) Degraded(up func(node uint64) bool) int {
	degraded := 0
	for _, live := range t.LiveReplicas(t.LargestN(), up) {
		if live < t.LargestN() {
			degraded++
		}
	}
	return degraded
}

// LargestN returns the greatest N of a namespace.
func (t *Topology) LargestN() (n int) {
	for i := range t.Namespaces {
		n = max(n, t.Namespaces[i].N)
	}
	return n
}

// LiveReplicas returns how many of the first n slots of each vnode could answer a read.
func (t *Topology) LiveReplicas(n int, up func(node uint64) bool) []int {
	live := make([]int, len(t.Ring))
	for v := range live {
		live[v] = reading(t.Slots(uint32(v), n), up)
	}
	return live
}

// reading counts the slots that could answer a read.
func reading(slots []quorum.Slot, up func(node uint64) bool) (n int) {
	for _, s := range slots {
		if s.Read != 0 && up(s.Read) {
			n++
		}
	}
	return n
}
