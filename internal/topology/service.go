package topology

import "github.com/kvasirdb/kvasir/internal/quorum"

// Service is how a namespace can be served with the nodes that are up.
type Service struct {
	// NotWritable and NotReadable count the vnodes that miss the default quorums.
	NotWritable, NotReadable int
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
	}
	return s
}

// Degraded counts the vnodes of which fewer replicas are up than the largest N. One
// that is being filled is none yet.
func (t *Topology) Degraded(up func(node uint64) bool) int {
	n, degraded := 0, 0
	for i := range t.Namespaces {
		n = max(n, t.Namespaces[i].N)
	}
	for v := range t.Ring {
		if reading(t.Slots(uint32(v), n), up) < n {
			degraded++
		}
	}
	return degraded
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
