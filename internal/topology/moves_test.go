package topology_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func setVnode(vnode uint32, slots ...topology.Slot) *topologyv1.Mutation {
	pb := topology.RingProto([]topology.Vnode{{Slots: slots}})[0]
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetVnodes{SetVnodes: &topologyv1.SetVnodes{
		Vnodes: []*topologyv1.VnodeSlots{{Vnode: vnode, Slots: pb.GetSlots()}},
	}}}
}

func remove(incarnations ...uint64) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_RemoveNodes{RemoveNodes: &topologyv1.RemoveNodes{Incarnations: incarnations}}}
}

func stable(n uint64) topology.Slot { return topology.Slot{Node: n, Phase: topology.Stable} }

func replacing(old, incoming uint64) topology.Slot {
	return topology.Slot{Node: old, Incoming: incoming, Phase: topology.WriteNewReadNone}
}

func moving(old, incoming uint64, phase topology.Phase) topology.Slot {
	return topology.Slot{Node: old, Incoming: incoming, Phase: phase}
}

// wiped registers a new data directory under a node's name.
func wiped(name string, n int) *topologyv1.Mutation {
	m := register(name, 0, 1, "a")
	m.GetRegister().Node.DataId = fmt.Sprint("data-of-", name, "-", n)
	return m
}

func TestReplacingANode(t *testing.T) {
	c := formed(t)
	if got := c.must(wiped("n1", 2)).Incarnation; got != 4 {
		t.Fatalf("incarnation %d", got)
	}
	c.must(setVnode(2, replacing(1, 4), stable(2), stable(3)))
	top := c.state.Topology
	if v := top.Ring[2]; v.ChangedEpoch != top.Epoch || v.Moving() != 0 || top.Ring[1].ChangedEpoch == top.Epoch {
		t.Errorf("vnode 2 is %+v in epoch %d, vnode 1 %+v", v, top.Epoch, top.Ring[1])
	}
	if got := top.Incoming(4); len(got) != 1 || got[2] != 0 {
		t.Errorf("incoming on %v", got)
	}
	if !top.Owns(4, 2, 3) || top.Owns(1, 2, 3) || !top.Owns(1, 1, 3) {
		t.Error("the successor must be an endpoint, and the old node none")
	}
	_, err := c.apply(remove(1))
	wantRefusal(t, err, topology.Precondition, "NODE_HAS_SLOTS")
	_, err = c.apply(remove(4))
	wantRefusal(t, err, topology.Precondition, "NODE_HAS_SLOTS")
	c.must(setVnode(2, stable(4), stable(2), stable(3)))
	for _, v := range []uint32{0, 1, 3} {
		c.must(setVnode(v, replacing(1, 4), stable(2), stable(3)))
		c.must(setVnode(v, stable(4), stable(2), stable(3)))
	}
	c.must(remove(1))
	if top := c.state.Topology; top.Node(1) != nil || top.Resolve("n1").Incarnation != 4 {
		t.Errorf("nodes %+v", top.Nodes)
	}
	_, err = c.apply(register("n1", 1, 5, "z"))
	wantRefusal(t, err, topology.Precondition, "NODE_REMOVED")
	if got := c.must(wiped("n1", 3)).Incarnation; got != 5 {
		t.Errorf("the next incarnation is %d", got)
	}
}

// A move there and back again: what a slot is written and read at, and since when.
// A directory that is about to take the place of another one gets no second slot of a
// vnode that has that one.
func TestASuccessorGetsNoSecondSlot(t *testing.T) {
	c := formed(t)
	c.must(wiped("n1", 2)) // #4
	start := func(vnode, slot uint32, from uint64) error {
		_, err := c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: &topologyv1.Operation{
			Kind: "apply", Title: "test", Moves: []*topologyv1.Move{{Vnode: vnode, Slot: slot, From: from, To: 4}},
		}}}})
		return err
	}
	ring := c.state.Topology.Ring[2].Slots
	i := slices.IndexFunc(ring, func(s topology.Slot) bool { return s.Node != 1 })
	wantRefusal(t, start(2, uint32(i), ring[i].Node), topology.Invalid, "BAD_MOVE")
	i = slices.IndexFunc(ring, func(s topology.Slot) bool { return s.Node == 1 })
	if err := start(2, uint32(i), 1); err != nil {
		t.Errorf("to take the slot itself: %v", err)
	}
}

// A directory whose place another one has taken gets no slot, not even of that one.
func TestNothingMovesToAnOldDirectory(t *testing.T) {
	c := formed(t)
	c.must(wiped("n1", 2)) // #4
	c.must(setVnode(2, replacing(1, 4), stable(2), stable(3)))
	c.must(setVnode(2, stable(4), stable(2), stable(3)))
	for slot, from := range []uint64{4, 2, 3} {
		_, err := c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: &topologyv1.Operation{
			Kind: "drain", Title: "test", Moves: []*topologyv1.Move{{Vnode: 2, Slot: uint32(slot), From: from, To: 1}},
		}}}})
		wantRefusal(t, err, topology.Invalid, "BAD_MOVE")
	}
}

func TestMovingASlot(t *testing.T) {
	c := formed(t)
	c.must(register("n4", 0, 1, "d"))
	set := func(s topology.Slot) topology.Slot {
		c.must(setVnode(1, s, stable(2), stable(3)))
		return c.state.Topology.Ring[1].Slots[0]
	}
	begun := set(moving(1, 4, topology.WriteBothReadOld))
	if q := begun.Quorum(); begun.Since != c.state.Topology.Epoch || q.Read != 1 || q.Write != [2]uint64{1, 4} {
		t.Errorf("at first %+v, %+v in epoch %d", begun, q, c.state.Topology.Epoch)
	}
	if s := set(moving(1, 4, topology.WriteBothReadNew)); s.Since != begun.Since || s.Quorum().Read != 4 {
		t.Errorf("when filled %+v", s)
	}
	if s := set(moving(1, 4, topology.WriteBothReadOld)); s.Since != begun.Since || c.state.Topology.Ring[1].ChangedEpoch == begun.Since {
		t.Errorf("on the way back %+v", s)
	}
	if s := set(stable(1)); s != stable(1) {
		t.Errorf("taken back: %+v", s)
	}
	again := set(moving(1, 4, topology.WriteBothReadOld))
	if again.Since == begun.Since {
		t.Errorf("another assignment of the same node cannot be told from the first: %+v", again)
	}
	if s := set(moving(1, 4, topology.WriteNewReadNone)); s.Since != again.Since || s.Quorum().Read != 0 {
		t.Errorf("when the old node died %+v", s)
	}
	if s := set(moving(1, 1, topology.WriteNewReadNone)); s.Since == again.Since || s.Quorum().Write != [2]uint64{1} {
		t.Errorf("when the old node came back %+v", s)
	}
	set(stable(1))
}

func TestStepsThatAreRefused(t *testing.T) {
	c := formed(t)
	c.must(wiped("n1", 2))
	c.must(wiped("n2", 2))
	c.must(setVnode(1, replacing(1, 4), stable(2), stable(3)))
	for _, tc := range []struct {
		name   string
		m      *topologyv1.Mutation
		kind   topology.RefusalKind
		reason string
	}{
		{"at once", setVnode(0, stable(4), stable(2), stable(3)), topology.Precondition, "BAD_STEP"},
		{"two slots", setVnode(0, replacing(1, 4), replacing(2, 5), stable(3)), topology.Precondition, "BAD_STEP"},
		{"a second slot", setVnode(1, replacing(1, 4), replacing(2, 5), stable(3)), topology.Precondition, "BAD_STEP"},
		{"back to the dead", setVnode(1, stable(1), stable(2), stable(3)), topology.Precondition, "BAD_STEP"},
		{"another old node", setVnode(1, replacing(5, 4), stable(2), stable(3)), topology.Precondition, "BAD_STEP"},
		{"to another than the incoming", setVnode(1, stable(5), stable(2), stable(3)), topology.Precondition, "BAD_STEP"},
		{"fewer slots", setVnode(0, stable(1), stable(2)), topology.Precondition, "BAD_STEP"},
		{"read before it is written", setVnode(0, moving(1, 4, topology.WriteBothReadNew), stable(2), stable(3)), topology.Precondition, "BAD_STEP"},
		{"a slot's own neighbour", setVnode(0, replacing(1, 2), stable(2), stable(3)), topology.Invalid, "INVALID_TOPOLOGY"},
		{"a stranger", setVnode(0, replacing(1, 9), stable(2), stable(3)), topology.Invalid, "INVALID_TOPOLOGY"},
		{"no such vnode", setVnode(4, replacing(1, 4), stable(2), stable(3)), topology.Invalid, "UNKNOWN_VNODE"},
		{"unknown node", remove(9), topology.NotFound, "NODE_NOT_FOUND"},
	} {
		before := c.state
		_, err := c.apply(tc.m)
		t.Run(tc.name, func(t *testing.T) { wantRefusal(t, err, tc.kind, tc.reason) })
		if c.state != before {
			t.Errorf("%s: a refused step changed something", tc.name)
		}
	}
	twice := setVnode(0, replacing(1, 4), stable(2), stable(3))
	twice.GetSetVnodes().Vnodes = append(twice.GetSetVnodes().Vnodes, twice.GetSetVnodes().GetVnodes()[0])
	_, err := c.apply(twice)
	wantRefusal(t, err, topology.Invalid, "VNODE_TWICE")
}

// Invariants 8, 9 and 10 over random sequences of commands: what is accepted is a
// valid topology whose quorums meet those of the epoch before, and no incarnation is
// given out twice.
func TestRandomReplacements(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 30 {
		c := formed(t)
		given := map[uint64]bool{1: true, 2: true, 3: true}
		accepted := 0
		for i := range 200 {
			before := c.state.Topology
			nodes := before.Nodes
			any := func() uint64 { return nodes[rng.IntN(len(nodes))].Incarnation }
			var m *topologyv1.Mutation
			switch v := uint32(rng.IntN(4)); rng.IntN(8) {
			case 0:
				m = wiped(fmt.Sprint("n", rng.IntN(3)+1), i+10)
			case 1:
				m = remove(any())
			default:
				slots := slices.Clone(before.Ring[v].Slots)
				s := &slots[rng.IntN(len(slots))]
				switch rng.IntN(6) {
				case 4:
					*s = moving(s.Node, any(), topology.WriteBothReadOld+topology.Phase(rng.IntN(3)))
				case 5:
					if s.Incoming != 0 {
						*s = moving(s.Node, s.Incoming, topology.WriteBothReadOld+topology.Phase(rng.IntN(3)))
					}
				case 0:
					*s = stable(any())
				case 1:
					*s = replacing(s.Node, any())
				case 2:
					if s.Incoming != 0 {
						*s = stable(s.Incoming)
					}
				case 3:
					*s = replacing(any(), any())
				}
				m = setVnode(v, slots...)
			}
			res, err := c.apply(m)
			if err != nil {
				continue
			}
			accepted++
			if inc := res.Incarnation; inc != 0 {
				if given[inc] {
					t.Fatalf("seed %d: incarnation %d was given out twice (invariant 10)", seed, inc)
				}
				given[inc] = true
			}
			after := c.state.Topology
			if _, err := topology.FromProto(after.Proto()); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			for v := range after.Ring {
				checkNeighbours(t, seed, before.Ring[v], after.Ring[v])
			}
		}
		if accepted < 20 {
			t.Fatalf("seed %d: only %d commands were accepted: the test shows nothing", seed, accepted)
		}
	}
}

// checkNeighbours checks that reads of the later epoch meet the writes of the one
// before, given that an incoming node that becomes a voter has been filled, and that
// only the nodes of one slot change.
func checkNeighbours(t *testing.T, seed uint64, before, after topology.Vnode) {
	t.Helper()
	changed := 0
	for j := range after.Slots {
		a, b := before.Slots[j], after.Slots[j]
		if a == b {
			continue
		}
		changed++
		if b.Phase == topology.Stable && b.Node == a.Incoming && a.Phase == topology.WriteBothReadOld {
			t.Fatalf("seed %d: a newcomer became the only writer before it was read: %+v, %+v", seed, a, b)
		}
		if (b.Since != 0) != (b.Incoming != 0) || b.Incoming == a.Incoming && b.Since != a.Since {
			t.Fatalf("seed %d: since is wrong: %+v, %+v", seed, a, b)
		}
		old := a.Phase != topology.WriteNewReadNone && b.Quorum().Read == a.Node
		if r := b.Quorum().Read; r != 0 && r != a.Incoming && !old {
			t.Fatalf("seed %d: #%d became a voter and was not incoming before (invariant 8): %+v, %+v", seed, r, a, b)
		}
	}
	if changed > 1 {
		t.Fatalf("seed %d: %d slots changed at once: %+v, %+v", seed, changed, before, after)
	}
	if after.Moving() >= 0 && slices.IndexFunc(after.Slots[after.Moving()+1:], func(s topology.Slot) bool { return s.Phase != topology.Stable }) >= 0 {
		t.Fatalf("seed %d: two slots in transition: %+v", seed, after)
	}
}
