package orchestrator

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// setQuorums has the operation begin that gives the namespace default other quorums.
func setQuorums(t *testing.T, s *topology.State, w, r string) *topology.State {
	t.Helper()
	cmd, _, err := updateNamespace(s.Topology, "default", topology.NamespaceSettings{W: &w, R: &r}, false)
	if err != nil {
		t.Fatal(err)
	}
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	return s
}

// leveled returns the fillings of a node that holds all vnodes of namespace default.
func leveled(t *topology.Topology) (out []*adminv1.Filling) {
	for v := range t.Ring {
		out = append(out, &adminv1.Filling{Vnode: uint32(v), NamespaceId: t.Namespaces[0].ID, AssignedEpoch: t.Namespaces[0].Since, Complete: true})
	}
	return out
}

// quorumSteps lets the leader decide until it has nothing more to do.
func quorumSteps(t *testing.T, s *topology.State, cfg *Config, o func(*topology.State) observed) (*topology.State, []string) {
	t.Helper()
	var steps []string
	for range 10 {
		after, what := next(t, s, cfg, o(s).view())
		if what == "" {
			break
		}
		s, steps = after, append(steps, what)
	}
	return s, steps
}

func everyone(s *topology.State) observed { return everywhere(s) }

func TestQuorumsChangeByAnOperation(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = setQuorums(t, s, "all", "one")
	s, steps := quorumSteps(t, s, cfg, everyone)
	if len(steps) != 1 || !strings.Contains(steps[0], "W=quorum R=quorum, and writes need W=all too") {
		t.Fatalf("before the slots hold the same: %q", steps)
	}
	op := observeOperation(s, s.Active(), alive(s))
	if n := len(op.GetMoving()); n != maxObserved || op.GetMoving()[0].GetWaitsFor() == "" {
		t.Errorf("%d vnodes wait: %v", n, op)
	}
	s, steps = quorumSteps(t, s, cfg, func(s *topology.State) observed {
		o := everywhere(s)
		for _, n := range s.Topology.Nodes {
			o.fillings[n.Incarnation] = leveled(s.Topology)
		}
		return o
	})
	if len(steps) != 3 || !strings.Contains(steps[0], "W=all R=one, and writes need W=quorum too") || s.Operation(1).State != topology.Done {
		t.Errorf("then %q", steps)
	}
	// Back, which needs no copies: what was written lies on all slots.
	s = setQuorums(t, s, "quorum", "quorum")
	s, steps = quorumSteps(t, s, cfg, everyone)
	if ns := s.Topology.Namespace("default"); len(steps) != 4 || ns.W.String() != "quorum" || ns.LeastWriteAcks != 2 || s.Operation(2).State != topology.Done {
		t.Errorf("back by %q: %+v", steps, ns)
	}
	// What asks for as much is no operation.
	s = setQuorums(t, s, "2", "60%")
	if ns := s.Topology.Namespace("default"); ns.W.String() != "2" || s.Active() != nil {
		t.Errorf("at once: %+v", ns)
	}
}

// Whoever may still go by quorums of one slot is waited for, even if it is taken for
// dead; a majority of the slots is enough where none counts for anything below it.
func TestQuorumsWaitForWhoMayServeTheOld(t *testing.T) {
	s, cfg := ringOf(t, 3)
	late := func(s *topology.State) observed {
		o := everywhere(s, 3)
		for _, n := range s.Topology.Nodes {
			o.fillings[n.Incarnation] = leveled(s.Topology)
		}
		return o
	}
	s = setQuorums(t, s, "all", "one") // from majorities: the third may be dead
	s, steps := quorumSteps(t, s, cfg, late)
	if len(steps) != 4 {
		t.Fatalf("to W=all: %q", steps)
	}
	s = setQuorums(t, s, "quorum", "quorum")
	s, steps = quorumSteps(t, s, cfg, late)
	if len(steps) != 1 {
		t.Fatalf("while a node may serve reads of one slot: %q", steps)
	}
	op := observeOperation(s, s.Active(), late(s).view())
	if why := op.GetMoving()[0].GetWaitsFor(); !strings.Contains(why, "2 replicas of namespace default have taken in") || !strings.Contains(why, "3 must") {
		t.Errorf("it waits for %q", why)
	}
	// It can be aborted meanwhile: no read has gone by the new quorum.
	aborted, steps := quorumSteps(t, steer(t, s, topology.Aborting), cfg, late)
	if ns := aborted.Topology.Namespace("default"); len(steps) != 2 || ns.W.String() != "all" || aborted.Operation(2).State != topology.Aborted {
		t.Errorf("aborted by %q: %+v", steps, ns)
	}
	// Once reads do, it goes back by the same steps: who is late reads two slots at least,
	// of which one is not.
	s, what := next(t, s, cfg, alive(s))
	if !strings.Contains(what, "W=quorum R=quorum, and writes need W=all too") {
		t.Fatalf("then %q", what)
	}
	s, steps = quorumSteps(t, steer(t, s, topology.Aborting), cfg, late)
	if len(steps) != 3 {
		t.Errorf("back by %q", steps)
	}
	if ns := s.Topology.Namespace("default"); ns.W.String() != "all" || ns.AlsoN != 0 || ns.LeastWriteAcks != 3 {
		t.Errorf("in the end %+v", ns)
	}
}

// A zone that a node names at its start is a change like any other, and the way to bring
// vnodes back over all zones is a plan like any other.
func TestANodeChangesItsZone(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n4", "z")
	moves := movesTo(t, s, 1, 2, 3, 4)
	s = start(t, s, "apply", moves)
	s, _ = next(t, s, cfg, alive(s))
	for i, n := range []string{"n4", "n1"} {
		before := s.Topology
		again := &topologyv1.Node{Name: n, Zone: fmt.Sprint("z", i+8), Role: topologyv1.Role_ROLE_DATA, Address: n + ":1", DataId: n + "z"}
		if got, want := registration(before, again), fmt.Sprintf("registered at %s:1 in zone z%d, before that in zone z", n, i+8); got != want {
			t.Errorf("it says %q, want %q", got, want)
		}
		var err error
		s, _, err = s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{Node: again, Boot: 2}}}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Topology.Resolve(n); got.Zone != fmt.Sprint("z", i+8) || s.Topology.Epoch != before.Epoch+1 || got.Incarnation != before.Resolve(n).Incarnation {
			t.Errorf("node %+v in epoch %d, before %d", got, s.Topology.Epoch, before.Epoch)
		}
	}
	s = runOn(t, s, cfg, nil)
	if op := s.Operation(1); op.State != topology.Done || s.Topology.SlotCounts(3)[4] != 12 {
		t.Errorf("the operation that was under way: %+v", op)
	}
}
