package orchestrator

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// movesTo plans an even ring over some nodes.
func movesTo(t *testing.T, s *topology.State, nodes ...uint64) []*topologyv1.Move {
	t.Helper()
	var current placement.Assignment
	for _, v := range s.Topology.Ring {
		var slots []uint64
		for _, slot := range v.Slots {
			slots = append(slots, slot.Node)
		}
		current = append(current, slots)
	}
	var places []placement.Node
	for _, n := range nodes {
		places = append(places, placement.Node{ID: n, Zone: "z"})
	}
	next, err := placement.Even(current, places, []int{3})
	if err != nil {
		t.Fatal(err)
	}
	var out []*topologyv1.Move
	for v := range next {
		for j, n := range next[v] {
			if from := current[v][j]; from != n {
				out = append(out, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(j), From: from, To: n})
			}
		}
	}
	return out
}

// start begins an operation.
func start(t *testing.T, s *topology.State, kind string, moves []*topologyv1.Move, remove ...uint64) *topology.State {
	t.Helper()
	s, _, err := s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_StartOperation{
		StartOperation: &topologyv1.StartOperation{Operation: &topologyv1.Operation{Kind: kind, Title: "test", Moves: moves, Remove: remove}},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func steer(t *testing.T, s *topology.State, state topology.OperationState) *topology.State {
	t.Helper()
	s, _, err := s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SteerOperation{
		SteerOperation: &topologyv1.SteerOperation{Id: s.Active().ID, State: topologyv1.Operation_State(state)},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// four returns a ring of three nodes, a spare, and the moves that even it out.
func four(t *testing.T) (*topology.State, *Config, []*topologyv1.Move) {
	s, cfg := ringOfVnodes(t, 3, 64)
	s = registerNode(t, s, "n4", "z")
	return s, cfg, movesTo(t, s, 1, 2, 3, 4)
}

// runOn lets the leader decide until it has nothing more to do, with all nodes up to
// date and all that is assigned filled.
func runOn(t *testing.T, s *topology.State, cfg *Config, change func(*observed)) *topology.State {
	t.Helper()
	for range 1000 {
		o := everywhere(s)
		for _, n := range s.Topology.Nodes {
			o.fillings[n.Incarnation] = filled(s.Topology, n.Incarnation, true)
		}
		if change != nil {
			change(&o)
		}
		after, what := next(t, s, cfg, o.view())
		if what == "" {
			return s
		}
		s = after
	}
	t.Fatal("no end")
	return nil
}

func TestAnOperationFromBeginningToEnd(t *testing.T) {
	s, cfg, moves := four(t)
	if len(moves) != 48 { // of 64 vnodes with 3 slots each, a quarter
		t.Fatalf("%d moves", len(moves))
	}
	s = start(t, s, "apply", moves)
	s, what := next(t, s, cfg, alive(s))
	if want := "operation 1 moves n"; !strings.Contains(what, want) || len(s.Topology.Incoming(4)) != topology.MovesPerNode {
		t.Fatalf("it begins with %q, incoming on %v", what, s.Topology.Incoming(4))
	}
	if _, what := next(t, s, cfg, alive(s)); what != "" {
		t.Fatalf("before anything is filled: %q", what)
	}
	s = runOn(t, s, cfg, nil)
	if counts := s.Topology.SlotCounts(3); counts[1] != 48 || counts[4] != 48 {
		t.Errorf("slots %v", counts)
	}
	if op := s.Operation(1); op.State != topology.Done || op.Left() != 0 || s.Active() != nil {
		t.Errorf("operation %+v", op)
	}
	// And away again, with a node that leaves.
	s = start(t, s, "decommission", movesTo(t, s, 1, 2, 3), 4)
	s = runOn(t, s, cfg, nil)
	if s.Topology.Node(4) != nil || s.Topology.SlotCounts(3)[1] != 64 {
		t.Errorf("nodes %+v, slots %v", s.Topology.Nodes, s.Topology.SlotCounts(3))
	}
}

func TestMovedBytesAreCounted(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	s = runOn(t, s, cfg, func(o *observed) {
		for _, f := range o.fillings[4] {
			f.Records, f.Bytes = 2, 300
		}
	})
	if op := s.Operation(1); op.MovedBytes != 48*300 || op.MovedRecords != 48*2 {
		t.Errorf("operation %+v", op)
	}
}

func TestAPausedOperationBeginsNothing(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	s, _ = next(t, s, cfg, alive(s))
	s = runOn(t, steer(t, s, topology.Paused), cfg, nil)
	if got := s.Topology.SlotCounts(3)[4]; got != topology.MovesPerNode || s.Active().State != topology.Paused {
		t.Fatalf("%d slots moved, operation %+v", got, s.Active())
	}
	if s = runOn(t, steer(t, s, topology.Running), cfg, nil); s.Topology.SlotCounts(3)[4] != 48 {
		t.Errorf("slots %v", s.Topology.SlotCounts(3))
	}
}

// An abort takes back what is in each phase, and leaves what is done.
func TestAnAbortWalksBack(t *testing.T) {
	for steps := range 4 {
		s, cfg, moves := four(t)
		before := slots(s)
		s = start(t, s, "apply", moves)
		for range steps {
			o := everywhere(s)
			o.fillings[4] = filled(s.Topology, 4, true)
			s, _ = next(t, s, cfg, o.view())
		}
		done := len(moves) - s.Active().Left()
		s = steer(t, s, topology.Aborting)
		s = runOn(t, s, cfg, nil)
		if op := s.Operation(1); op.State != topology.Aborted || s.Topology.SlotCounts(3)[4] != done {
			t.Errorf("after %d steps: operation %+v, slots %v", steps, op, s.Topology.SlotCounts(3))
		}
		if done == 0 && !slices.Equal(before, slots(s)) {
			t.Errorf("after %d steps the ring is not what it was", steps)
		}
	}
}

func slots(s *topology.State) (out []uint64) {
	for _, v := range s.Topology.Ring {
		for _, slot := range v.Slots {
			out = append(out, slot.Node)
		}
	}
	return out
}

// What a slot in each phase becomes, by what the leader sees.
func TestNextPhase(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves[:1])
	first, _ := next(t, s, cfg, alive(s))
	o := everywhere(first)
	o.fillings[4] = filled(first.Topology, 4, true)
	second, _ := next(t, first, cfg, o.view())
	m := moves[0]
	slot := func(s *topology.State) topology.Slot { return s.Topology.Ring[m.GetVnode()].Slots[m.GetSlot()] }
	if a, b := slot(first).Phase, slot(second).Phase; a != topology.WriteBothReadOld || b != topology.WriteBothReadNew {
		t.Fatalf("phases %v, %v", a, b)
	}
	old := m.GetFrom()
	var other uint64
	for _, s := range first.Topology.Ring[m.GetVnode()].Slots {
		if s.Node != old {
			other = s.Node
		}
	}
	behind := func(inc uint64) func(*observed) { return func(o *observed) { o.epochs[inc]-- } }
	dead := func(incs ...uint64) func(*observed) { return func(o *observed) { o.dead = append(o.dead, incs...) } }
	unfilled := func(o *observed) { o.fillings[4] = nil }
	aborting := steer(t, first, topology.Aborting)
	abortingLate := steer(t, second, topology.Aborting)
	takenForDead := everywhere(first)
	takenForDead.dead, takenForDead.lost = []uint64{old}, []uint64{old}
	without, _ := next(t, first, cfg, takenForDead.view())
	abortingWithout := steer(t, without, topology.Aborting)
	lateBack, _ := next(t, abortingLate, cfg, alive(abortingLate))
	for _, tc := range []struct {
		name    string
		s       *topology.State
		changes []func(*observed)
		want    topology.Phase
		node    uint64
		waits   string
	}{
		{"filled", first, nil, topology.WriteBothReadNew, old, ""},
		{"not filled", first, []func(*observed){unfilled}, topology.WriteBothReadOld, old, "it is being filled"},
		{"the newcomer is behind", first, []func(*observed){behind(4)}, topology.WriteBothReadOld, old, "n4 has not taken in"},
		{"the old node is behind", first, []func(*observed){behind(old)}, topology.WriteBothReadOld, old, "has not taken in"},
		{"another node is behind", first, []func(*observed){behind(other)}, topology.WriteBothReadOld, old, "has not taken in"},
		{"another replica is suspected, and behind", first, []func(*observed){behind(other), dead(other)}, topology.WriteBothReadNew, old, ""},
		{"the old node restarts, unfilled", first, []func(*observed){dead(old), unfilled}, topology.WriteBothReadOld, old, "it is being filled"},
		{"the old node restarts", first, []func(*observed){dead(old)}, topology.WriteBothReadNew, old, ""},
		{"the old node and another one are suspected, and behind", first, []func(*observed){behind(old), behind(other), dead(old, other)}, topology.WriteBothReadOld, old, "1 replicas of namespace default"},
		{"the old node is lost, unfilled", first, []func(*observed){dead(old), unfilled, func(o *observed) { o.lost = []uint64{old} }}, topology.WriteNewReadNone, old, ""},
		{"the old node is lost", first, []func(*observed){dead(old), func(o *observed) { o.lost = []uint64{old} }}, topology.WriteBothReadNew, old, ""},
		{"aborted", aborting, []func(*observed){unfilled, behind(4)}, topology.Stable, old, ""},
		{"aborted, the old node is lost", aborting, []func(*observed){dead(old), func(o *observed) { o.lost = []uint64{old} }}, topology.WriteBothReadNew, old, ""},
		{"read at the newcomer", second, nil, topology.Stable, 4, ""},
		{"read at the newcomer, another node is behind", second, []func(*observed){behind(other)}, topology.WriteBothReadNew, old, "has not taken in"},
		{"read at the newcomer, the old node is lost", second, []func(*observed){dead(old), behind(old), func(o *observed) { o.lost = []uint64{old} }}, topology.Stable, 4, ""},
		{"read at the newcomer, aborted", abortingLate, []func(*observed){behind(4)}, topology.WriteBothReadOld, old, ""},
		{"taken for dead, and another one is behind", without, []func(*observed){dead(old, other), behind(old), behind(other)}, topology.WriteNewReadNone, old, "1 replicas of namespace default"},
		{"back, while another one is behind", without, []func(*observed){dead(other), behind(other)}, topology.Stable, 4, ""},
		{"back, aborted", abortingWithout, nil, topology.Stable, 4, ""},
		{"back, aborted, the newcomer is lost", abortingWithout, []func(*observed){dead(4), func(o *observed) { o.lost = []uint64{4} }}, topology.WriteNewReadNone, old, ""},
		{"on the way back", lateBack, nil, topology.Stable, old, ""},
		{"on the way back, the newcomer may be read yet", lateBack, []func(*observed){behind(4)}, topology.WriteBothReadOld, old, "n4 has not taken in"},
	} {
		o := everywhere(tc.s)
		o.fillings[4] = filled(tc.s.Topology, 4, true)
		for _, change := range tc.changes {
			change(&o)
		}
		got, waits := nextPhase(tc.s, m.GetVnode(), int(m.GetSlot()), o.view())
		if got.Phase != tc.want || got.Node != tc.node || tc.waits == "" && waits != "" || !strings.Contains(waits, tc.waits) {
			t.Errorf("%s: %+v, waits for %q", tc.name, got, waits)
		}
	}
}

// A dead node's slots go to another one at once where that was asked for, and after a
// while where its move was part of a plan.
func TestADeadNodeIsReplaced(t *testing.T) {
	for kind, atOnce := range map[string]bool{kindReplace: true, "drain": false} {
		s, cfg, _ := four(t)
		var moves []*topologyv1.Move
		for v, vnode := range s.Topology.Ring {
			for j, slot := range vnode.Slots {
				if slot.Node == 2 {
					moves = append(moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(j), From: 2, To: 4})
				}
			}
		}
		s = start(t, s, kind, moves, 2)
		_, what := next(t, s, cfg, alive(s, 2))
		if (what != "") != atOnce {
			t.Errorf("%s: the leader decides on %q", kind, what)
		}
		s = runOn(t, s, cfg, func(o *observed) { o.dead, o.lost = []uint64{2}, []uint64{2} })
		if s.Topology.Node(2) != nil || s.Topology.SlotCounts(3)[4] != 64 || s.Operation(1).State != topology.Done {
			t.Errorf("%s: %+v, slots %v", kind, s.Operation(1), s.Topology.SlotCounts(3))
		}
	}
}

// The newcomer loses its disk in the middle: the data directory that takes its place
// gets the rest, and what was under way begins anew.
func TestANewcomerThatLosesItsDisk(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	for range 2 {
		o := everywhere(s)
		o.fillings[4] = filled(s.Topology, 4, true)
		o.fillings[4] = o.fillings[4][:min(3, len(o.fillings[4]))]
		s, _ = next(t, s, cfg, o.view())
	}
	s = registerNode(t, s, "n4", "again")
	s = runOn(t, s, cfg, func(o *observed) { o.dead = []uint64{4}; o.fillings[4] = nil })
	if op := s.Operation(1); op.State != topology.Done || s.Topology.SlotCounts(3)[5] != 48 || s.Topology.Node(4) != nil {
		t.Errorf("operation %+v, slots %v, nodes %+v", op, s.Topology.SlotCounts(3), s.Topology.Nodes)
	}
}

// The old node of a move that has not begun loses its disk: the data directory that
// takes its place is filled, and gives the slot away then.
func TestADonorThatLosesItsDisk(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	s, _ = next(t, s, cfg, alive(s)) // eight of twelve; the last are of node 3
	last := moves[len(moves)-1].GetFrom()
	s = registerNode(t, s, s.Topology.NodeName(last), "again")
	s = runOn(t, s, cfg, func(o *observed) { o.dead = []uint64{last} })
	if op := s.Operation(1); op.State != topology.Done || s.Topology.SlotCounts(3)[4] != 48 || s.Topology.Node(last) != nil {
		t.Errorf("operation %+v, slots %v", op, s.Topology.SlotCounts(3))
	}
}

// Whatever nodes do, and whenever an operation is paused or aborted: it ends, with
// each slot where it was or where it was to go, and no step is refused.
func TestOperationsEnd(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for range 30 {
		s, cfg, moves := four(t)
		before := slots(s)
		s = start(t, s, "apply", moves)
		epochs, complete := map[uint64]uint64{}, map[uint64]bool{}
		observe := func() observed {
			o := everywhere(s)
			for _, n := range s.Topology.Nodes {
				if inc := n.Incarnation; rng.IntN(3) > 0 {
					epochs[inc] = s.Topology.Epoch
				}
				o.epochs[n.Incarnation] = epochs[n.Incarnation]
			}
			for _, n := range s.Topology.Nodes {
				o.fillings[n.Incarnation] = filled(s.Topology, n.Incarnation, true)
				for _, f := range o.fillings[n.Incarnation] {
					id := f.AssignedEpoch<<16 | uint64(f.Vnode)
					complete[id] = complete[id] || rng.IntN(3) == 0
					f.Complete = complete[id]
				}
			}
			if rng.IntN(4) == 0 {
				o.dead = []uint64{uint64(rng.IntN(4)) + 1}
				if rng.IntN(3) == 0 {
					o.lost = o.dead
				}
			}
			return o
		}
		for i := 0; s.Active() != nil; i++ {
			if i == 5000 {
				t.Fatalf("seed %d: no end: %+v", seed, observeOperation(s, s.Active(), observe().view()))
			}
			switch op := s.Active(); {
			case rng.IntN(150) == 0 && op.State == topology.Running:
				s = steer(t, s, topology.Paused)
			case rng.IntN(10) == 0 && op.State == topology.Paused:
				s = steer(t, s, topology.Running)
			case rng.IntN(400) == 0 && op.State != topology.Aborting:
				s = steer(t, s, topology.Aborting)
			}
			s, _ = next(t, s, cfg, observe().view())
		}
		now := slots(s)
		for i := range now {
			m := slices.IndexFunc(moves, func(m *topologyv1.Move) bool { return int(m.GetVnode())*3+int(m.GetSlot()) == i })
			if now[i] != before[i] && (m < 0 || now[i] != 4) || s.Operation(1).State == topology.Done && m >= 0 && now[i] != 4 {
				t.Fatalf("seed %d: slot %d of the ring was at %d and is at %d: %+v", seed, i, before[i], now[i], s.Operation(1))
			}
		}
	}
}

func TestWhatAnOperationWaitsFor(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	s, _ = next(t, s, cfg, alive(s))
	o := everywhere(s)
	o.fillings[4] = []*adminv1.Filling{{Vnode: moves[0].GetVnode(), AssignedEpoch: s.Topology.Epoch, Records: 7, Bytes: 70, WaitsFor: "n1 is down"}}
	got := observeOperation(s, s.Active(), o.view())
	if len(got.GetMoving()) != topology.MovesPerNode {
		t.Fatalf("%d moves under way", len(got.GetMoving()))
	}
	i := slices.IndexFunc(got.GetMoving(), func(p *adminv1.MoveProgress) bool { return p.GetMove().GetVnode() == moves[0].GetVnode() })
	if p := got.GetMoving()[i]; p.GetRecords() != 7 || p.GetBytes() != 70 || p.GetWaitsFor() != "n1 is down" {
		t.Errorf("progress %v", p)
	}
	if p := got.GetMoving()[(i+1)%topology.MovesPerNode]; p.GetWaitsFor() != "it is being filled" {
		t.Errorf("progress %v", p)
	}
}
