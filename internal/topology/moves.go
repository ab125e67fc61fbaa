package topology

import (
	"fmt"
	"slices"

	"github.com/kvasirdb/kvasir/internal/mutant"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Moving returns the index of the slot that is in transition, or -1.
func (v *Vnode) Moving() int {
	return slices.IndexFunc(v.Slots, func(s Slot) bool { return s.Phase != Stable })
}

// Incoming returns the vnodes that a node is being filled with, in ring order, each
// with the index of its slot.
func (t *Topology) Incoming(incarnation uint64) map[uint32]int {
	out := map[uint32]int{}
	for i := range t.Ring {
		for j, s := range t.Ring[i].Slots {
			if s.Incoming == incarnation && incarnation != 0 {
				out[uint32(i)] = j
			}
		}
	}
	return out
}

// setVnodes replaces the slots of some vnodes, each by one step of a transition.
func (d *draft) setVnodes(m *topologyv1.SetVnodes) error {
	seen := map[uint32]bool{}
	for _, pb := range m.GetVnodes() {
		i := pb.GetVnode()
		if int(i) >= len(d.Topology.Ring) {
			return refuse(Invalid, "UNKNOWN_VNODE", fmt.Sprintf("there is no vnode %d: the ring has %d", i, len(d.Topology.Ring)), "vnode", i)
		}
		if seen[i] {
			return refuse(Invalid, "VNODE_TWICE", fmt.Sprintf("vnode %d is given twice", i), "vnode", i)
		}
		seen[i] = true
		next := vnodeFromProto(&topologyv1.Vnode{Slots: pb.GetSlots()})
		old := &d.Topology.Ring[i]
		if len(old.Slots) == len(next.Slots) {
			setSince(old, &next, d.Topology.Epoch)
		}
		if slices.Equal(old.Slots, next.Slots) {
			continue
		}
		if err := checkStep(old, &next); err != nil {
			return refuse(Precondition, "BAD_STEP", fmt.Sprintf("vnode %d: %s", i, err), "vnode", i)
		}
		next.ChangedEpoch, next.Copies = d.Topology.Epoch, old.Copies
		d.noteStep(i, old, &next, pb)
		d.Topology.Ring[i] = next
		d.changed = true
	}
	return nil
}

// setSince fills in since when the incoming nodes are.
func setSince(old, next *Vnode, epoch uint64) {
	for j := range next.Slots {
		a, b := old.Slots[j], &next.Slots[j]
		switch {
		case b.Incoming == 0:
			b.Since = 0
		case b.Incoming == a.Incoming:
			b.Since = a.Since
		default:
			b.Since = epoch
		}
	}
}

// checkStep returns why one vnode must not follow the other.
//
// Invariant 8: with the barrier between its steps, each of these keeps every write
// quorum of one epoch in touch with every read quorum of the next.
func checkStep(old, next *Vnode) error {
	if len(old.Slots) != len(next.Slots) {
		return fmt.Errorf("it has %d slots, not %d", len(old.Slots), len(next.Slots))
	}
	moving := 0
	for j := range next.Slots {
		a, b := old.Slots[j], next.Slots[j]
		if b.Phase != Stable {
			moving++
		}
		if a != b && !stepAllowed(a, b) {
			return fmt.Errorf("slot %d cannot go from %q, #%d to #%d, to %q, #%d to #%d", j, a.Phase, a.Node, a.Incoming, b.Phase, b.Node, b.Incoming)
		}
	}
	if moving > 1 && !mutant.On("two-transitions") {
		return fmt.Errorf("%d of its slots would be in transition, one may be", moving)
	}
	return nil
}

// step is a pair of phases.
type step struct{ from, to Phase }

// stepAllowed reports whether a slot may change so.
func stepAllowed(a, b Slot) bool {
	same := a.Incoming == b.Incoming
	switch (step{a.Phase, b.Phase}) {
	case step{Stable, WriteBothReadOld}, step{Stable, WriteNewReadNone}: // a move begins
		return a.Node == b.Node
	case step{WriteBothReadOld, WriteBothReadNew}, // the newcomer is complete
		step{WriteBothReadNew, WriteBothReadOld}, // on the way back
		step{WriteBothReadOld, WriteNewReadNone}: // the old node died before
		return a.Node == b.Node && same
	case step{WriteNewReadNone, WriteNewReadNone}:
		// The newcomer is lost too, with what only it had; or it is given up, and the old
		// node comes back, empty.
		return b.Node == a.Incoming && !same || b.Node == a.Node && b.Incoming == a.Node
	case step{WriteBothReadNew, Stable}, step{WriteNewReadNone, Stable}: // it is done
		return b.Node == a.Incoming
	case step{WriteBothReadOld, Stable}: // it is taken back
		return b.Node == a.Node
	}
	return false
}

// removeNodes takes data directories out of the cluster. Their incarnations are
// never given out again (invariant 10).
func (d *draft) removeNodes(m *topologyv1.RemoveNodes) error {
	for _, inc := range m.GetIncarnations() {
		i := slices.IndexFunc(d.Topology.Nodes, func(n Node) bool { return n.Incarnation == inc })
		if i < 0 {
			return refuse(NotFound, "NODE_NOT_FOUND", fmt.Sprintf("there is no node #%d", inc), "incarnation", inc)
		}
		if op := d.needs(inc); op != 0 {
			return refuse(Precondition, "NODE_IN_OPERATION", fmt.Sprintf("node %s, #%d, is to get slots by operation %d", d.Topology.Nodes[i].Name, inc, op), "incarnation", inc)
		}
		if d.Topology.Names(inc) {
			return refuse(Precondition, "NODE_HAS_SLOTS",
				fmt.Sprintf("node %s, #%d, has slots: they must go elsewhere first", d.Topology.Nodes[i].Name, inc), "incarnation", inc)
		}
		d.Topology.Nodes = slices.Delete(d.Topology.Nodes, i, i+1)
		delete(d.boots, inc)
		d.heldBack = slices.DeleteFunc(d.heldBack, func(held uint64) bool { return held == inc })
		d.Health = slices.DeleteFunc(d.Health, func(h FoundHealth) bool { return h.Incarnation == inc })
		d.changed = true
	}
	return nil
}
