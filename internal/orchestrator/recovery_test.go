package orchestrator

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// newLeader returns a state as the next leader has it.
func newLeader(t *testing.T, s *topology.State) *topology.State {
	t.Helper()
	restored, err := topology.StateFromProto(s.Proto())
	if err != nil {
		t.Fatal(err)
	}
	return restored
}

// play lets one leader after the other decide until there is nothing more to do, and
// returns what was done. Nodes are up to date, and filled with what they are assigned.
func play(t *testing.T, s *topology.State, cfg *Config, change func(*observed)) (*topology.State, []string) {
	t.Helper()
	var did []string
	for range 1000 {
		s = newLeader(t, s)
		o := everywhere(s)
		for _, n := range s.Topology.Nodes {
			o.fillings[n.Incarnation] = filled(s.Topology, n.Incarnation, true)
		}
		change(&o)
		after, what := next(t, s, cfg, o.view())
		if s = after; what == "" {
			return s, did
		}
		did = append(did, what)
	}
	t.Fatalf("no end: %q", did)
	return nil, nil
}

// happened reports whether something with each of the texts was done, in this order.
func happened(t *testing.T, did []string, texts ...string) {
	t.Helper()
	rest := did
	for _, text := range texts {
		i := slices.IndexFunc(rest, func(what string) bool { return strings.Contains(what, text) })
		if i < 0 {
			t.Fatalf("no %q, in this order, in:\n%s", text, strings.Join(did, "\n"))
		}
		rest = rest[i+1:]
	}
}

func lose(incarnations ...uint64) func(*observed) {
	return func(o *observed) { o.dead, o.lost = incarnations, incarnations }
}

func provisionOf(s *topology.State, kind topology.ProvisionKind) *topology.Provision {
	for i := range s.Provisions {
		if p := &s.Provisions[i]; p.Kind == kind {
			return p
		}
	}
	return nil
}

func TestASpareTakesTheDeadNodesPlace(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n4", "z")
	short := func(o *observed) { o.dead = []uint64{2} }
	if s, did := play(t, s, cfg, short); len(did) != 0 || s.Condition(topology.ConditionRedundancy) != "there are vnodes with 2 of 3 replicas alive" {
		t.Fatalf("a node that is dead for a moment: %q, %q", did, s.Condition(topology.ConditionRedundancy))
	}
	s, did := play(t, s, cfg, func(o *observed) { lose(2)(o); o.provisions = true })
	happened(t, did, "n4 takes the place of n2, which is dead (16 moves)", "n2, #2, has left")
	if s.Topology.Node(2) != nil || s.Topology.SlotCounts(3)[4] != 16 || s.Condition(topology.ConditionRedundancy) != "" {
		t.Errorf("after all: %+v, %q", s.Topology.SlotCounts(3), s.Condition(topology.ConditionRedundancy))
	}
	// Its process is ended once its data is not needed any more, not before.
	if end := provisionOf(s, topology.End); end == nil || end.Node != "n2" || end.Incarnation != 2 || len(s.Provisions) != 1 {
		t.Errorf("provisions %+v", s.Provisions)
	}
}

func TestTheOthersTakeOver(t *testing.T) {
	s, cfg := ringOfVnodes(t, 5, 64)
	s, did := play(t, s, cfg, lose(2))
	happened(t, did, "the other nodes take over from n2", "n2, #2, has left")
	if counts := s.Topology.SlotCounts(3); len(counts) != 4 || counts[1] != 48 || len(s.Provisions) != 0 {
		t.Errorf("slots %v, provisions %+v", counts, s.Provisions)
	}
}

// The vnodes with the fewest live replicas are whole again first.
func TestTheMostEndangeredFirst(t *testing.T) {
	s, _ := ringOfVnodes(t, 7, 64)
	dead := []uint64{2, 3}
	o := everywhere(s, dead...)
	o.lost = dead
	cmd := recoverNodes(s, o.view())
	op := cmd.GetMutations()[0].GetStartOperation().GetOperation()
	live := s.Topology.LiveReplicas(3, o.view().healthy)
	before, worst := 0, 0
	for _, m := range op.GetMoves() {
		if live[m.GetVnode()] < before {
			t.Fatalf("vnode %d with %d live replicas comes after one with %d", m.GetVnode(), live[m.GetVnode()], before)
		}
		before = live[m.GetVnode()]
		if before == 1 {
			worst++
		}
	}
	if worst == 0 || !slices.Equal(op.GetRemove(), dead) {
		t.Errorf("%d moves of vnodes with one replica, %v leave", worst, op.GetRemove())
	}
}

func TestTheProvisionerIsAskedForANode(t *testing.T) {
	s, cfg := ringOf(t, 3)
	world := func(o *observed) { lose(2)(o); o.provisions, o.now = true, time.Hour }
	s, did := play(t, s, cfg, world)
	happened(t, did, "a node is to be launched in zone z: in the place of n2, which is dead")
	launch := provisionOf(s, topology.Launch)
	if launch == nil || launch.Replaces != 2 || launch.State != topology.Wanted || len(s.Provisions) != 1 {
		t.Fatalf("provisions %+v", s.Provisions)
	}
	s = registerNode(t, s, launch.Node, "z")
	s, did = play(t, s, cfg, func(o *observed) { world(o); o.unknown = []uint64{4} })
	if happened(t, did, launch.Node+" has registered"); len(s.Provisions) != 1 {
		t.Fatalf("another is asked for before this one is known to be healthy: %+v", s.Provisions)
	}
	s, did = play(t, s, cfg, world)
	happened(t, did, launch.Node+" takes the place of n2", "n2, #2, has left")
	if end := provisionOf(s, topology.End); end == nil || end.Incarnation != 2 || len(s.Provisions) != 2 {
		t.Errorf("provisions %+v", s.Provisions)
	}
}

// A launched node that dies before it has slots is cleared away. One that people started is
// left to them.
func TestADeadSpareThatWasLaunchedLeaves(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = setSettings(t, s, func(set *topology.Settings) { set.Join = topology.JoinManual })
	launch := askProvision(topology.Provision{Kind: topology.Launch, Zone: "z"})
	s, _, err := s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{launch}})
	if err != nil {
		t.Fatal(err)
	}
	name := provisionOf(s, topology.Launch).Node
	s = registerNode(t, s, name, "z")
	s = registerNode(t, s, "theirs", "z")
	s, did := play(t, s, cfg, func(o *observed) { o.provisions = true })
	happened(t, did, name+" has registered")
	s, did = play(t, s, cfg, func(o *observed) { lose(4)(o); o.provisions, o.now = true, time.Hour })
	happened(t, did, name+", without slots, is dead and leaves", name+", #4, has left")
	if p := provisionOf(s, topology.End); p.Node != name || p.Incarnation != 4 {
		t.Errorf("ended is %+v", p)
	}
	if _, did = play(t, s, cfg, func(o *observed) { lose(5)(o); o.provisions, o.now = true, 2*time.Hour }); len(did) != 0 {
		t.Errorf("of a node that nobody launched: %q", did)
	}
}

// While a node is launched in the place of a dead one, people move the slots of that
// elsewhere. It leaves all the same.
func TestADeadNodeThatWasReplacedLeaves(t *testing.T) {
	s, cfg := ringOf(t, 3)
	world := func(o *observed) { lose(2)(o); o.provisions, o.now = true, time.Hour }
	s, _ = play(t, s, cfg, world)
	s = registerNode(t, s, provisionOf(s, topology.Launch).Node, "z")
	s, _ = play(t, s, cfg, func(o *observed) { world(o); o.unknown = []uint64{4} })
	theirs := topology.Operation{Kind: "apply", Title: "theirs", Moves: placement.Moves(placement.Of(s.Topology), placement.Substitute(placement.Of(s.Topology), 2, 4))}
	s = mustApply(t, s, startOperation(s, theirs, "operation", "", "theirs"), 0)
	s, did := play(t, s, cfg, world)
	happened(t, did, "n2, without slots, is dead and leaves", "n2, #2, has left")
	if end := provisionOf(s, topology.End); end == nil || end.Incarnation != 2 {
		t.Errorf("provisions %+v", s.Provisions)
	}
}

// Slots that have begun to go to another node get there, though the recovery is aborted. The
// dead node, which has none left, leaves all the same.
func TestADeadNodeLeavesAfterAnAbortedRecovery(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n4", "z")
	for _, step := range []func(*topology.State, view) *topologyv1.Command{recoverNodes, beginMoves} {
		o := everywhere(s, 2)
		o.lost = []uint64{2}
		s = mustApply(t, s, step(s, o.view()), 0)
	}
	abort := &topologyv1.SteerOperation{Id: s.Active().ID, State: topologyv1.Operation_STATE_ABORTING}
	s = mustApply(t, s, &topologyv1.Command{
		Change: &topologyv1.Change{Subject: "operation"}, Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: abort}}},
	}, 0)
	s, did := play(t, s, cfg, lose(2))
	happened(t, did, "operation 1 is aborted", "n2, without slots, is dead and leaves", "n2, #2, has left")
	if s.Topology.Node(2) != nil {
		t.Error("the dead node is still there")
	}
}

// A node that was launched in the place of one that came back is one of many by then. When
// the other one dies again, another is launched.
func TestANodeThatWasLaunchedInVainServes(t *testing.T) {
	s, cfg := ringOf(t, 4)
	s = setSettings(t, s, func(set *topology.Settings) { set.Join = topology.JoinAuto })
	dead := func(o *observed) { lose(2)(o); o.provisions, o.now = true, time.Hour }
	s, _ = play(t, s, cfg, dead)
	name := provisionOf(s, topology.Launch).Node
	s = registerNode(t, s, name, "z")
	s, did := play(t, s, cfg, func(o *observed) { o.provisions, o.now = true, time.Hour })
	happened(t, did, name+" joins")
	s, did = play(t, s, cfg, dead)
	happened(t, did, "a node is to be launched in zone z: in the place of n2, which is dead")
	if n := len(s.Provisions); n != 2 || s.Provisions[1].State != topology.Wanted {
		t.Errorf("provisions %+v", s.Provisions)
	}
}

// A launch that comes to nothing is cleared away, and tried again later; where the other
// nodes can take over, they do instead.
func TestALaunchInVain(t *testing.T) {
	for _, nodes := range []int{3, 4} {
		s, cfg := ringOf(t, nodes)
		at := func(now time.Duration) func(*observed) {
			return func(o *observed) { lose(2)(o); o.provisions, o.now = true, now }
		}
		s, _ = play(t, s, cfg, at(time.Hour))
		name := provisionOf(s, topology.Launch).Node
		s, did := play(t, s, cfg, at(time.Hour+61*time.Second))
		happened(t, did, name+" did not register within 1m0s")
		if end := provisionOf(s, topology.End); end == nil || end.Node != name || end.Incarnation != 0 {
			t.Fatalf("%d nodes: what was launched in vain is not ended: %+v", nodes, s.Provisions)
		}
		if nodes == 4 {
			happened(t, did, "did not register", "the other nodes take over from n2", "n2, #2, has left")
			continue
		}
		if why := s.Condition(topology.ConditionRecovery); !strings.Contains(why, "there is no node to take its place") {
			t.Errorf("nothing says what it waits for, but %q", why)
		}
		s, did = play(t, s, cfg, at(time.Hour+3*time.Minute))
		happened(t, did, "a node is to be launched")
		if n := len(s.Provisions); n != 3 {
			t.Errorf("%d provisions after another launch: %+v", n, s.Provisions)
		}
	}
}

func TestNothingIsReplacedWhileManyAreSuspect(t *testing.T) {
	s, cfg := ringOf(t, 5)
	s = registerNode(t, s, "n6", "z")
	s, did := play(t, s, cfg, func(o *observed) { lose(2, 3)(o); o.provisions = true })
	if why := s.Condition(topology.ConditionFrozen); len(did) != 0 || !strings.Contains(why, "2 of 5 nodes are unhealthy (n2, n3)") || !strings.Contains(why, "while more than 1 are") {
		t.Fatalf("%q, %q", did, why)
	}
	// One is well again. The other may be about to be, and is given the whole time.
	after := s.Topology.Settings.ReplaceAfter
	at := func(now time.Duration, lost ...uint64) func(*observed) {
		return func(o *observed) { lose(lost...)(o); o.provisions, o.now = true, time.Hour+now }
	}
	s, did = play(t, s, cfg, at(0, 2))
	if why := s.Condition(topology.ConditionFrozen); why != "" || len(did) != 0 || !strings.Contains(s.Condition(topology.ConditionThaw), "have another 10m0s") {
		t.Fatalf("%q, frozen %q, thaw %q", did, why, s.Condition(topology.ConditionThaw))
	}
	if s, did = play(t, s, cfg, at(after-time.Second, 2)); len(did) != 0 {
		t.Fatalf("before its time is over: %q", did)
	}
	if well, did := play(t, s, cfg, at(after-time.Second)); len(did) != 0 || len(well.Conditions) != 0 {
		t.Errorf("all are well again: %q, %+v", did, well.Conditions)
	}
	again, did := play(t, s, cfg, at(after-time.Second, 2, 3))
	if again.Condition(topology.ConditionFrozen) == "" || again.Condition(topology.ConditionThaw) != "" || len(did) != 0 {
		t.Errorf("many are unhealthy again: %q, %+v", did, again.Conditions)
	}
	if again, did = play(t, again, cfg, at(2*after-2*time.Second, 2)); len(did) != 0 || again.Condition(topology.ConditionThaw) == "" {
		t.Errorf("after the second time: %q, %+v", did, again.Conditions)
	}
	s, did = play(t, s, cfg, at(after, 2))
	happened(t, did, "n6 takes the place of n2")
	if len(s.Conditions) != 0 {
		t.Errorf("conditions in the end: %+v", s.Conditions)
	}
}

// A new leader that has not looked at all nodes yet takes nothing for over.
func TestANewLeaderKeepsConditions(t *testing.T) {
	s, cfg := ringOf(t, 5)
	s, _ = play(t, s, cfg, lose(2, 3))
	s, did := play(t, s, cfg, func(o *observed) { lose(2)(o); o.unknown = []uint64{3, 4} })
	if len(did) != 0 {
		t.Errorf("it does not know yet how many are suspect, and does %q", did)
	}
	if s.Condition(topology.ConditionFrozen) == "" || s.Condition(topology.ConditionRedundancy) == "" {
		t.Errorf("conditions %+v", s.Conditions)
	}
}

func TestTheNodeComesBackInTheMiddle(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n4", "z")
	o := everywhere(s)
	lose(2)(&o)
	s, what := next(t, s, cfg, o.view())
	if !strings.Contains(what, "n4 takes the place of n2") {
		t.Fatal(what)
	}
	s, what = next(t, s, cfg, o.view()) // moves begin, and cannot be taken back
	s, did := play(t, s, cfg, func(*observed) {})
	happened(t, did, "is aborted: the node that was taken for dead is back")
	if s.Active() != nil || s.Topology.Node(2) == nil || len(s.Provisions) != 0 {
		t.Errorf("after %q and %q: %+v", what, did, s.Operations)
	}
	for v := range s.Topology.Ring {
		if s.Topology.Ring[v].Moving() >= 0 {
			t.Fatalf("vnode %d is still in transition", v)
		}
	}
}

func TestAnOperationToADeadNodeIsAborted(t *testing.T) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves)
	s, _ = next(t, s, cfg, alive(s))
	s, did := play(t, s, cfg, lose(4))
	happened(t, did, "is aborted: n4 is dead, and slots were to move to it", "operation 1 is aborted")
	if s.Active() != nil || s.Topology.SlotCounts(3)[4] != 0 {
		t.Errorf("%+v, slots %v", s.Active(), s.Topology.SlotCounts(3))
	}
}

func TestSparesJoin(t *testing.T) {
	s, cfg := ringOfVnodes(t, 3, 64)
	s = registerNode(t, s, "n4", "z")
	quiet := func(*observed) {}
	if _, did := play(t, s, cfg, quiet); len(did) != 0 {
		t.Fatalf("with manual joins: %q", did)
	}
	s = setSettings(t, s, func(set *topology.Settings) { set.Join = topology.JoinAuto })
	s, did := play(t, s, cfg, quiet)
	happened(t, did, "n4 joins (48 moves)")
	if s.Topology.SlotCounts(3)[4] != 48 {
		t.Errorf("slots %v", s.Topology.SlotCounts(3))
	}
	// People drained it: they say when it is to have slots again.
	s = start(t, s, "drain", movesTo(t, s, 1, 2, 3))
	s, did = play(t, s, cfg, quiet)
	if slices.ContainsFunc(did, func(what string) bool { return strings.Contains(what, "join") }) || s.Topology.SlotCounts(3)[4] != 0 {
		t.Errorf("a drained node joins: %q", did)
	}
	// Several that are launched join together.
	world := func(o *observed) { o.provisions, o.now = true, time.Hour }
	for range 2 {
		s = mustApply(t, s, askLaunch(s, topology.Provision{Zone: "z", Why: "test", AtMillis: time.Hour.Milliseconds()}, "capacity"), time.Hour)
	}
	s = registerNode(t, s, "node1", "z")
	s, did = play(t, s, cfg, world)
	happened(t, did, "node1 has registered")
	if len(did) != 1 {
		t.Errorf("one of two that are launched: %q", did)
	}
	s = registerNode(t, s, "node2", "z")
	s, did = play(t, s, cfg, world)
	happened(t, did, "node1, node2 join (")
	if counts := s.Topology.SlotCounts(3); len(counts) != 5 {
		t.Errorf("slots %v", counts)
	}
}

func mustApply(t *testing.T, s *topology.State, cmd *topologyv1.Command, at time.Duration) *topology.State {
	t.Helper()
	cmd.Change.AtMs = uint64(at.Milliseconds())
	s, _, err := s.Apply(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func setSettings(t *testing.T, s *topology.State, change func(*topology.Settings)) *topology.State {
	t.Helper()
	set := s.Topology.Settings
	change(&set)
	return mustApply(t, s, &topologyv1.Command{Change: &topologyv1.Change{}, Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetSettings{
		SetSettings: &topologyv1.SetSettings{Settings: set.Proto()},
	}}}}, 0)
}
