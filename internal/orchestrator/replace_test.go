package orchestrator

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// observed is what a test says of the nodes.
type observed struct {
	dead, unknown []uint64
	// lost are those of the dead that have been so for longer than anybody waits.
	lost []uint64
	now  time.Duration // since 1970
	// provisions says that there is a provisioner.
	provisions bool
	held       holdings
	cpu        float64 // of every node
	epochs     map[uint64]uint64
	fillings   map[uint64][]*adminv1.Filling
}

func (o observed) view() view {
	return view{
		state: func(inc uint64) topologyv1.NodeHealth_State {
			switch {
			case slices.Contains(o.dead, inc):
				return topologyv1.NodeHealth_STATE_UNHEALTHY
			case slices.Contains(o.unknown, inc):
				return topologyv1.NodeHealth_STATE_UNSPECIFIED
			}
			return topologyv1.NodeHealth_STATE_HEALTHY
		},
		status: func(inc uint64) *adminv1.NodeStatus {
			return &adminv1.NodeStatus{Incarnation: inc, Epoch: o.epochs[inc], Fillings: o.fillings[inc], CpuUtilization: o.cpu}
		},
		reason: func(inc uint64) string {
			if slices.Contains(o.dead, inc) {
				return "it does not answer"
			}
			return ""
		},
		down: func(inc uint64) time.Duration {
			switch {
			case slices.Contains(o.lost, inc):
				return time.Hour
			case slices.Contains(o.dead, inc):
				return time.Second
			}
			return 0
		},
		fresh:     func(inc uint64) bool { return !slices.Contains(o.dead, inc) },
		held:      func() holdings { return o.held },
		nowMillis: o.now.Milliseconds(), provisions: o.provisions, launchTimeout: time.Minute,
	}
}

// alive returns a view in which all nodes but the dead ones are healthy and have the
// present epoch.
func alive(s *topology.State, dead ...uint64) view {
	return everywhere(s, dead...).view()
}

func everywhere(s *topology.State, dead ...uint64) observed {
	o := observed{dead: dead, epochs: map[uint64]uint64{}, fillings: map[uint64][]*adminv1.Filling{}}
	if s == nil {
		return o
	}
	for _, n := range s.Topology.Nodes {
		if !slices.Contains(dead, n.Incarnation) {
			o.epochs[n.Incarnation] = s.Topology.Epoch
		}
	}
	return o
}

// filled returns fillings of all vnodes that a node is incoming on, all complete or
// none.
func filled(t *topology.Topology, incarnation uint64, complete bool) []*adminv1.Filling {
	var out []*adminv1.Filling
	for v := range t.Incoming(incarnation) {
		out = append(out, &adminv1.Filling{Vnode: v, AssignedEpoch: t.Ring[v].Slots[t.Ring[v].Moving()].Since, Complete: complete})
	}
	return out
}

// ringOf returns a formed cluster of nodes n1, n2, ….
func ringOf(t *testing.T, nodes int) (*topology.State, *Config) {
	t.Helper()
	return ringOfVnodes(t, nodes, 16)
}

func ringOfVnodes(t *testing.T, nodes, vnodes int) (*topology.State, *Config) {
	t.Helper()
	cfg := testConfig(1)
	cfg.Bootstrap.FoundingNodes, cfg.Bootstrap.Vnodes = nodes, vnodes
	s, _ := settle(t, nil, &cfg)
	for i := range nodes {
		s = registerNode(t, s, fmt.Sprint("n", i+1), "z")
	}
	s, _ = settle(t, s, &cfg)
	if !s.Topology.Formed() {
		t.Fatal("the ring did not form")
	}
	return s, &cfg
}

// next applies what is decided next, and before that all that is only noted.
func next(t *testing.T, s *topology.State, cfg *Config, v view) (*topology.State, string) {
	t.Helper()
	for {
		cmd, err := decide(s, cfg, v, "x")
		if err != nil {
			t.Fatal(err)
		}
		if cmd == nil {
			return s, ""
		}
		if cmd.Change != nil {
			cmd.Change.AtMs = uint64(v.nowMillis)
		}
		if s, _, err = s.Apply(cmd); err != nil {
			t.Fatal(err)
		}
		if m := cmd.GetMutations(); len(m) == 0 || m[0].GetFindHealth() == nil && m[0].GetSetCondition() == nil {
			return s, cmd.GetChange().GetWhat()
		}
	}
}

func TestReplacementFromBeginningToEnd(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n1", "z-again")
	if s, what := next(t, s, cfg, alive(s)); what != "" {
		t.Fatalf("while the old node is healthy: %q, %+v", what, s.Topology)
	}
	half := everywhere(s)
	half.unknown = []uint64{1}
	if _, what := next(t, s, cfg, half.view()); what != "" {
		t.Fatalf("while it is not known whether the old node lives: %q", what)
	}
	if _, what := next(t, s, cfg, alive(s, 1, 4)); what != "" {
		t.Fatalf("with a dead successor: %q", what)
	}
	s, what := next(t, s, cfg, alive(s, 1))
	if !strings.Contains(what, "#4 takes the place of #1 on 16 vnodes") || len(s.Topology.Incoming(4)) != 16 {
		t.Fatalf("it began with %q, incoming on %v", what, s.Topology.Incoming(4))
	}
	if _, what := next(t, s, cfg, alive(s, 1)); what != "" {
		t.Fatalf("before anything is filled: %q", what)
	}
	o := everywhere(s, 1)
	o.fillings[4] = filled(s.Topology, 4, true)[:5]
	s, what = next(t, s, cfg, o.view())
	if !strings.Contains(what, "#4 has been filled and votes on 5 vnodes") || len(s.Topology.Incoming(4)) != 11 {
		t.Fatalf("after 5 vnodes: %q, incoming on %v", what, s.Topology.Incoming(4))
	}
	o = everywhere(s, 1)
	o.fillings[4] = filled(s.Topology, 4, true)
	if s, what = next(t, s, cfg, o.view()); !strings.Contains(what, "11 vnodes") || s.Topology.Names(1) {
		t.Fatalf("after all vnodes: %q", what)
	}
	if s, what = next(t, s, cfg, alive(s, 1)); what != "removed #1: #4 has taken its place" || s.Topology.Node(1) != nil {
		t.Fatalf("at the end: %q", what)
	}
	if s, what = next(t, s, cfg, alive(s)); what != "" {
		t.Fatalf("and then: %q, %+v", what, s.Topology)
	}
}

// The barrier, of five nodes: N=3, so 2 of the other slots must have the epoch.
func TestBarrier(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n1", "z-again")
	s, _ = next(t, s, cfg, alive(s, 1))
	s = registerNode(t, s, "spare", "z")
	changed := s.Topology.Ring[0].ChangedEpoch
	for _, tc := range []struct {
		name   string
		change func(*observed)
		want   string
	}{
		{"all is well", func(*observed) {}, ""},
		{"the newcomer is behind", func(o *observed) { o.epochs[4] = changed - 1 }, "n1 has not taken in"},
		{"a live replica is behind", func(o *observed) { o.epochs[2] = changed - 1 }, "n2 has not taken in"},
		{"a spare is behind", func(o *observed) { o.epochs[5] = changed - 1 }, "spare has not taken in"},
		{"a dead spare is behind", func(o *observed) { o.epochs[5] = 0; o.dead = append(o.dead, 5) }, ""},
		{"a spare never answered", func(o *observed) { delete(o.epochs, 5); o.unknown = []uint64{5} }, "spare has not taken in"},
		{"a suspected replica is behind", func(o *observed) { o.epochs[3] = changed - 1; o.dead = append(o.dead, 3) }, "1 replicas of namespace default"},
		{"a suspected replica is not behind", func(o *observed) { o.dead = append(o.dead, 3) }, ""},
		{"not filled", func(o *observed) { o.fillings[4] = filled(s.Topology, 4, false) }, "it is being filled"},
		{"filled under a later assignment", func(o *observed) {
			for _, f := range o.fillings[4] {
				f.AssignedEpoch++
			}
		}, "it is being filled"},
		{"never heard of", func(o *observed) { o.fillings[4] = nil }, "it is being filled"},
	} {
		o := everywhere(s, 1)
		o.fillings[4] = filled(s.Topology, 4, true)
		tc.change(&o)
		_, got := nextPhase(s, 0, s.Topology.Ring[0].Moving(), o.view())
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
		if _, what := next(t, s, cfg, o.view()); (what != "") != (tc.want == "") {
			t.Errorf("%s: the leader decides on %q", tc.name, what)
		}
	}
}

// A newcomer that loses its disk too is succeeded like any other.
func TestNewcomerIsReplaced(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n1", "b")
	s, _ = next(t, s, cfg, alive(s, 1))
	o := everywhere(s, 1)
	o.fillings[4] = filled(s.Topology, 4, true)[:6]
	s, _ = next(t, s, cfg, o.view())
	s = registerNode(t, s, "n1", "c")
	s, what := next(t, s, cfg, alive(s, 1, 4))
	if !strings.Contains(what, "#5 takes the place of #4 on 16 vnodes") || len(s.Topology.Incoming(5)) != 16 || len(s.Topology.Incoming(4)) != 0 {
		t.Fatalf("%q, incoming on %v", what, s.Topology.Incoming(5))
	}
	if s, what = next(t, s, cfg, alive(s, 1, 4)); what != "removed #1: #5 has taken its place" {
		t.Fatalf("%q", what) // it is #4 now that has the slots and is lost
	}
	o = everywhere(s, 4)
	o.fillings[4] = filled(s.Topology, 5, true) // what the dead one said does not count
	if _, what := next(t, s, cfg, o.view()); what != "" {
		t.Fatalf("%q", what)
	}
	o.fillings[5] = filled(s.Topology, 5, true)
	s, _ = next(t, s, cfg, o.view())
	s, what = next(t, s, cfg, alive(s, 4))
	if what != "removed #4: #5 has taken its place" || len(s.Topology.Nodes) != 3 {
		t.Fatalf("%q", what)
	}
}

// Of two dead nodes, the second gets its successor on a vnode only after the first.
func TestOneSlotOfAVnodeAtATime(t *testing.T) {
	s, cfg := ringOf(t, 5)
	s = registerNode(t, s, "n1", "b")
	s = registerNode(t, s, "n2", "b")
	for step := 0; step < 20; step++ {
		o := everywhere(s, 1, 2)
		for _, inc := range []uint64{6, 7} {
			o.fillings[inc] = filled(s.Topology, inc, step%2 == 1)
		}
		var what string
		if s, what = next(t, s, cfg, o.view()); what == "" && step%2 == 1 {
			break
		}
	}
	// Where both were, one replica is left, which is too few to fill another from.
	for i := range s.Topology.Ring {
		v := &s.Topology.Ring[i]
		both := (hasSlot(v, 1) || hasSlot(v, 6)) && (hasSlot(v, 2) || hasSlot(v, 7))
		if stuck := hasSlot(v, 1) || hasSlot(v, 2); stuck != both {
			t.Errorf("vnode %d is %+v", i, v.Slots)
		}
	}
	if counts := s.Topology.SlotCounts(3); counts[6] == 0 || counts[7] == 0 {
		t.Errorf("slots %v", counts)
	}
}

// A directory that was replaced may not come back, whatever the health checks say.
func TestReplacedDirectoryIsTurnedAway(t *testing.T) {
	s, cfg := ringOf(t, 3)
	s = registerNode(t, s, "n1", "b")
	unhealthy := func(uint64) topologyv1.NodeHealth_State { return topologyv1.NodeHealth_STATE_UNHEALTHY }
	old := s.Topology.Node(1).Proto()
	if err := nameFree(s.Topology, old, unhealthy); err != nil {
		t.Fatalf("before its slots went to another: %v", err)
	}
	s, _ = next(t, s, cfg, alive(s, 1))
	if err := nameFree(s.Topology, old, unhealthy); err == nil || err.Reason != "NODE_REMOVED" {
		t.Errorf("error = %v", err)
	}
	// Once it is removed, its registration says so at once, whether its successor at the
	// same address lives or not.
	old.DataId = "long gone"
	healthy := func(uint64) topologyv1.NodeHealth_State { return topologyv1.NodeHealth_STATE_HEALTHY }
	if err := nameFree(s.Topology, old, healthy); err != nil {
		t.Errorf("it is kept waiting: %v", err)
	}
}

// While a node is being replaced no vnode gets wider: the new slots could fall to the
// node that is on its way out.
func TestNoWiderRingDuringAReplacement(t *testing.T) {
	s, cfg := ringOf(t, 5)
	s = registerNode(t, s, "n1", "b")
	s, _ = next(t, s, cfg, alive(s, 1))
	five, three := 5, 3
	if _, _, err := createNamespace(s, "wide", topology.NamespaceSettings{N: &five}); err == nil || !strings.Contains(err.Error(), "ring is changing") {
		t.Errorf("error = %v", err)
	}
	if _, _, err := createNamespace(s, "usual", topology.NamespaceSettings{N: &three}); err != nil {
		t.Error(err)
	}
}
