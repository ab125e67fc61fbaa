package topology_test

import (
	"fmt"
	"math/bits"
	"testing"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// A vnode's slots in two neighbouring epochs. Slot 0 moves from node 1 to node 9;
// slot i of the others stays on node i+1.
const (
	oldNode = 1
	newNode = 9
)

func slotsOf(n int, first topology.Slot) []quorum.Slot {
	slots := []quorum.Slot{first.Quorum()}
	for i := 1; i < n; i++ {
		slots = append(slots, topology.Slot{Node: uint64(i + 1), Phase: topology.Stable}.Quorum())
	}
	return slots
}

// nodeSet is a set of nodes, a bit each.
type nodeSet uint16

func set(nodes ...uint64) nodeSet {
	var s nodeSet
	for _, n := range nodes {
		if n != 0 {
			s |= 1 << n
		}
	}
	return s
}

// subsets calls f with every subset of s.
func subsets(s nodeSet, f func(nodeSet)) {
	for sub := s; ; sub = (sub - 1) & s {
		f(sub)
		if sub == 0 {
			return
		}
	}
}

// slotCount is how the system counts: a slot has acknowledged when all of its
// nodes have.
func slotCount(slots []quorum.Slot, w int, acked nodeSet) bool {
	c := quorum.NewCounter(slots, quorum.Goals{{N: len(slots), Need: w}})
	for n := uint64(1); n <= newNode; n++ {
		if acked&set(n) != 0 {
			c.Ack(n)
		}
	}
	return c.Reached()
}

// flatCount is the tempting wrong way: pending nodes are counted like any other.
func flatCount(_ []quorum.Slot, w int, acked nodeSet) bool {
	return bits.OnesCount16(uint16(acked)) >= w
}

// raisedCount is the other way known: flat, with W raised by the pending nodes.
func raisedCount(slots []quorum.Slot, w int, acked nodeSet) bool {
	for _, s := range slots {
		if s.Write[0] != 0 && s.Write[1] != 0 {
			w++
		}
	}
	return bits.OnesCount16(uint16(acked)) >= w
}

// miss looks for a write of one epoch, acknowledged by so few nodes that it just
// counts, and a read of the other epoch that sees none of them. Dead nodes neither
// acknowledge nor answer.
func miss(write, read []quorum.Slot, w, r int, dead nodeSet, counts func([]quorum.Slot, int, nodeSet) bool) string {
	var writable nodeSet
	for _, s := range write {
		writable |= set(s.Write[0], s.Write[1])
	}
	found := ""
	subsets(writable&^dead, func(acked nodeSet) {
		if found != "" || !counts(write, w, acked) {
			return
		}
		for chosen := range 1 << len(read) {
			if bits.OnesCount(uint(chosen)) != r {
				continue
			}
			var asked nodeSet
			answerable := true
			for i, s := range read {
				if chosen&(1<<i) == 0 {
					continue
				}
				asked |= set(s.Read)
				answerable = answerable && s.Read != 0 && dead&set(s.Read) == 0
			}
			if answerable && asked&acked == 0 {
				found = fmt.Sprintf("a write acknowledged by nodes %010b is missed by a read of nodes %010b", acked, asked)
				return
			}
		}
	})
	return found
}

// histories are the sequences of phases slot 0 goes through. In the second the
// old node is dead throughout; an old node that is only suspected is the business
// of the barrier between phases.
var histories = []struct {
	name   string
	phases []topology.Slot
	dead   nodeSet
}{
	{"move", []topology.Slot{
		{Node: oldNode, Phase: topology.Stable},
		{Node: oldNode, Incoming: newNode, Phase: topology.WriteBothReadOld},
		{Node: oldNode, Incoming: newNode, Phase: topology.WriteBothReadNew},
		{Node: newNode, Phase: topology.Stable},
	}, 0},
	{"aborted move", []topology.Slot{
		{Node: oldNode, Incoming: newNode, Phase: topology.WriteBothReadNew},
		{Node: oldNode, Incoming: newNode, Phase: topology.WriteBothReadOld},
		{Node: oldNode, Phase: topology.Stable},
	}, 0},
	{"dead node replaced", []topology.Slot{
		{Node: oldNode, Phase: topology.Stable},
		{Node: oldNode, Incoming: newNode, Phase: topology.WriteNewReadNone},
		{Node: newNode, Phase: topology.Stable},
	}, set(oldNode)},
}

// Invariant 8, by exhaustion: for N up to 5, every W and R with R+W>N, every phase
// and every pair of epochs that can be in use at once, each write quorum of one
// intersects each read quorum of the other. Streaming is not counted on: the
// record must be where the acknowledgements put it.
func TestSlotQuorumsIntersect(t *testing.T) {
	cases := 0
	for _, h := range histories {
		eachPair(h.phases, func(n, w, r int, write, read []quorum.Slot, at string) {
			cases++
			if m := miss(write, read, w, r, h.dead, slotCount); m != "" {
				t.Errorf("%s, %s, N=%d W=%d R=%d: %s", h.name, at, n, w, r, m)
			}
		})
	}
	t.Logf("%d combinations of setting, phase and epochs", cases)
}

// The check above would notice the mistakes it is there for.
func TestFlatQuorumsMiss(t *testing.T) {
	missed, combinations := 0, 0
	eachPair(histories[0].phases, func(n, w, r int, write, read []quorum.Slot, _ string) {
		combinations++
		if miss(write, read, w, r, 0, flatCount) != "" {
			missed++
		}
	})
	if missed == 0 {
		t.Error("counting pending nodes flat should let reads miss writes")
	}
	t.Logf("flat counting misses in %d of %d combinations", missed, combinations)

	// Raising W by the pending nodes is safe within an epoch, and costs availability:
	// with one of three nodes down a moving slot's vnode takes no majority write.
	moving := slotsOf(3, histories[0].phases[1])
	if !slotCount(moving, 2, set(2, 3)) || raisedCount(moving, 2, set(2, 3)) {
		t.Error("with the moving slot down, slots should be available where a raised W is not")
	}
}

// eachPair calls f for N up to 5, all W and R that overlap, and all pairs of equal
// or neighbouring phases, in both roles.
func eachPair(phases []topology.Slot, f func(n, w, r int, write, read []quorum.Slot, at string)) {
	for n := 1; n <= 5; n++ {
		for w := 1; w <= n; w++ {
			for r := n - w + 1; r <= n; r++ {
				for i, a := range phases {
					for j := max(0, i-1); j <= min(i+1, len(phases)-1); j++ {
						at := fmt.Sprintf("write in %q, read in %q", a.Phase, phases[j].Phase)
						f(n, w, r, slotsOf(n, a), slotsOf(n, phases[j]), at)
					}
				}
			}
		}
	}
}
