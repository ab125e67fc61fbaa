package topology_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// five is a cluster of five nodes with N=3 on #1, #2 and #3, whose vnode 1 is moving from
// #2 to #4.
func five(t *testing.T) *cluster {
	c := &cluster{t: t}
	c.must(found(4))
	for i, name := range []string{"node1", "node2", "node3", "node4", "spare"} {
		c.must(register(name, 0, 1, string(rune('a'+i))))
	}
	c.must(setRing(4, 1, 2, 3), create(*topology.FoundingNamespace(3)))
	c.must(setVnode(1, stable(1), moving(2, 4, topology.WriteBothReadOld), stable(3)))
	return c
}

func recovered(t *testing.T, r topology.Recovery) *topology.State {
	t.Helper()
	s, err := r.State()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestARecoveryBeginsAGeneration(t *testing.T) {
	c := five(t)
	old := c.state.Topology
	s := recovered(t, topology.Recovery{
		ID: "r1", Generation: 2, Newest: old, AtMillis: 7, What: "recovered",
		Starts: []topology.Start{{Incarnation: 1, Boot: 5, BootID: "e"}},
	})
	now := s.Topology
	if topology.Generation(now.Epoch) != 2 || now.Recovery != "r1" || topology.EpochString(now.Epoch) != "2.9" {
		t.Errorf("epoch %s of recovery %q", topology.EpochString(now.Epoch), now.Recovery)
	}
	for i := range now.Ring {
		if now.Ring[i].ChangedEpoch != now.Epoch || !slices.Equal(now.Ring[i].Slots, old.Ring[i].Slots) {
			t.Errorf("vnode %d: %+v, was %+v", i, now.Ring[i], old.Ring[i])
		}
		if old.Ring[i].ChangedEpoch == now.Epoch {
			t.Errorf("the old topology was changed")
		}
	}
	if ns := now.Namespaces[0]; ns.ChangedEpoch != now.Epoch || ns.N != 3 {
		t.Errorf("namespace %+v", ns)
	}
	if s.HeldBack(4) || !s.HeldBack(5) {
		t.Error("who was drained is not known any more: spares wait for people, and only they")
	}

	// It is a state as any other, by way of a file.
	b, err := topology.EncodeRecovery(s)
	if err != nil {
		t.Fatal(err)
	}
	read, err := topology.DecodeRecovery(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s.Proto(), read.Proto(), protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if _, err := topology.DecodeRecovery([]byte(strings.Replace(string(b), `"sum": "`, `"sum": "0`, 1))); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged file: %v", err)
	}
	begun := &cluster{t: t}
	begun.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Recover{Recover: &topologyv1.Recover{State: s.Proto()}}})
	if _, err := begun.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Recover{Recover: &topologyv1.Recover{State: s.Proto()}}}); err == nil {
		t.Error("it is recovered twice")
	}
	// Identifiers are not given again.
	if got := begun.must(register("node9", 0, 1, "z")).Incarnation; topology.Generation(got) != 2 {
		t.Errorf("incarnation #%d", got)
	}
	ns := *topology.FoundingNamespace(3)
	ns.Name = "other"
	if got := begun.must(create(ns)).Namespace.ID; got < 1<<16 {
		t.Errorf("namespace %d", got)
	}
	// A directory's last start is known where the node said it.
	if _, err := begun.apply(register("node1", 1, 4, "d")); err == nil || !strings.Contains(err.Error(), "old copy") {
		t.Errorf("an older copy of the directory: %v", err)
	}
	begun.must(register("node1", 1, 6, "f"))
	begun.must(register("node2", 2, 1, "g"))
	// The move goes on.
	begun.must(setVnode(1, stable(1), moving(2, 4, topology.WriteBothReadNew), stable(3)))
}

func TestRecoveriesThatBeginNothing(t *testing.T) {
	old := five(t).state.Topology
	next := recovered(t, topology.Recovery{ID: "r1", Generation: 1, Newest: old}).Topology
	for name, r := range map[string]topology.Recovery{
		"no name":               {Generation: 1, Newest: old},
		"the generation it has": {ID: "r2", Generation: 1, Newest: next},
		"no later generation":   {ID: "r2", Generation: 0, Newest: old},
		"too many":              {ID: "r2", Generation: 1 << 16, Newest: old},
	} {
		if s, err := r.State(); err == nil {
			t.Errorf("%s: epoch %s", name, topology.EpochString(s.Topology.Epoch))
		}
	}
	if d := topology.Diff(old, next); d != nil {
		t.Error("a generation is told by what differs from the one before")
	}
}

// What changes of a namespace were under way go on, by an operation of their own.
func TestARecoveryGoesOnWithANamespace(t *testing.T) {
	for name, begin := range map[string]func(ns topology.Namespace) topology.Namespace{
		"N": func(ns topology.Namespace) topology.Namespace { return ns.StepN(2) },
		"W and R": func(ns topology.Namespace) topology.Namespace {
			one, err := quorum.Parse("1")
			if err != nil {
				t.Fatal(err)
			}
			return ns.StepQuorums(one, ns.R)
		},
	} {
		c := five(t)
		c.must(setVnode(1, stable(1), stable(2), stable(3)))
		c.must(update(begin(*c.state.Topology.NamespaceByID(1))))
		if c.state.Topology.NamespaceByID(1).AlsoN == 0 {
			t.Fatalf("%s: no change is under way", name)
		}
		s := recovered(t, topology.Recovery{ID: "r", Generation: 1, Newest: c.state.Topology})
		op := s.Active()
		if op == nil || op.Reached(s.Topology.NamespaceByID(1)) {
			t.Errorf("%s: operation %+v", name, op)
			continue
		}
		ns := *s.Topology.NamespaceByID(1)
		for range 10 {
			if op.Reached(&ns) {
				break
			}
			ns = op.Step(&ns)
			ns.Since = max(ns.Since, 1)
		}
		if !op.Reached(&ns) {
			t.Errorf("%s: it does not come to an end: %+v", name, ns)
		}
	}
}

func TestWhoMustBeSealed(t *testing.T) {
	top := five(t).state.Topology
	among := func(nodes ...uint64) func(uint64) bool {
		return func(n uint64) bool { return slices.Contains(nodes, n) }
	}
	for _, c := range []struct {
		nodes    []uint64
		unsealed int // vnodes
	}{
		{[]uint64{1, 2, 3, 4}, 0}, {[]uint64{1, 2, 3}, 0}, {[]uint64{1, 3}, 0},
		{[]uint64{1, 2, 4}, 0}, {[]uint64{1, 2}, 1}, {[]uint64{1, 4}, 4}, {[]uint64{2, 3}, 1}, {nil, 4},
	} {
		vnodes, _ := topology.SortedVnodes(top.Unsealed(among(c.nodes...)))
		if len(vnodes) != c.unsealed {
			t.Errorf("with %v: %v lack a majority, want %d", c.nodes, vnodes, c.unsealed)
		}
	}
}

// For any N: where no vnode is Unsealed, what is not sealed neither passes a barrier nor
// makes a quorum.
func TestTheUnsealedDecideNothing(t *testing.T) {
	for n := 1; n <= quorum.MaxN; n++ {
		sealed := quorum.Majority.Need(n)
		rest := n - sealed
		if rest >= n-quorum.Majority.Need(n)+1 || rest >= quorum.Majority.Need(n) {
			t.Errorf("N=%d: %d slots are left when %d are sealed", n, rest, sealed)
		}
	}
}

func loss(nodes ...uint64) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_AcceptLoss{AcceptLoss: &topologyv1.AcceptLoss{Incarnations: nodes, SinceMs: 3}}}
}

func TestAcceptingLoss(t *testing.T) {
	c := five(t)
	before := c.state
	for name, m := range map[string]*topologyv1.Mutation{
		"unknown": loss(9), "enough is left": loss(2), "a spare": loss(5), "nobody": loss(),
	} {
		if _, err := c.apply(m); err == nil {
			t.Errorf("%s: it is given up", name)
		}
		if c.state != before {
			t.Fatalf("%s: a refusal changed the state", name)
		}
	}
	c.must(loss(2, 3))
	now := c.state.Topology
	if !now.Lost(2) || !now.Lost(3) || now.Lost(1) || before.Topology.Lost(2) {
		t.Error("others are lost")
	}
	if len(c.state.Losses) != 1 {
		t.Fatalf("losses %+v", c.state.Losses)
	}
	l := c.state.Losses[0]
	if !slices.Equal(l.Vnodes, []uint32{0, 1, 2, 3}) || !slices.Equal(l.Namespaces, []string{"default"}) || !slices.Equal(l.Nodes, []string{"node2", "node3"}) || l.SinceMillis != 3 || l.Epoch != now.Epoch {
		t.Errorf("loss %+v", l)
	}
	for i := range now.Ring {
		if now.Ring[i].ChangedEpoch != now.Epoch {
			t.Errorf("requests of lost nodes are served of vnode %d", i)
		}
	}
	if _, err := c.apply(loss(2, 1)); err == nil {
		t.Error("a node is lost twice")
	}
	if _, err := c.apply(register("node2", 2, 7, "x")); err == nil || !strings.Contains(err.Error(), "given up for lost") {
		t.Errorf("a lost directory comes back: %v", err)
	}
	// A newcomer takes the place.
	got := c.must(wiped("node2", 2)).Incarnation
	c.must(setVnode(0, stable(1), replacing(2, got), stable(3)))
	again, err := topology.StateFromProto(proto.Clone(c.state.Proto()).(*topologyv1.ControlState))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(c.state.Proto(), again.Proto(), protocmp.Transform()); d != "" {
		t.Error(d)
	}
}

// Applying is deterministic, and a topology that was recovered with any nodes lost is valid
// and names every vnode that has too few replicas left.
func TestRandomLosses(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		c := five(t)
		var lost []uint64
		for n := uint64(1); n <= 4; n++ {
			if rng.IntN(2) == 0 {
				lost = append(lost, n)
			}
		}
		left := func(n uint64) bool { return !slices.Contains(lost, n) }
		short, _ := topology.SortedVnodes(c.state.Topology.Short(left))
		r := topology.Recovery{ID: "r", Generation: 1, Newest: c.state.Topology, Lost: lost, AtMillis: 5}
		s, err := r.State()
		if len(short) == 0 && len(lost) > 0 {
			if err == nil {
				t.Fatalf("%v is given up for nothing", lost)
			}
			continue
		}
		if err != nil {
			t.Fatalf("without %v: %v", lost, err)
		}
		if len(lost) > 0 && !slices.Equal(s.Losses[0].Vnodes, short) {
			t.Errorf("without %v: loss %+v, want %v", lost, s.Losses[0], short)
		}
		same := recovered(t, r)
		if d := cmp.Diff(s.Proto(), same.Proto(), protocmp.Transform()); d != "" {
			t.Error(d)
		}
	}
}
