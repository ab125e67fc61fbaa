package topology_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// cluster applies commands to a state and fails the test on a refusal.
type cluster struct {
	t     *testing.T
	state *topology.State
}

func (c *cluster) apply(ms ...*topologyv1.Mutation) (topology.Result, error) {
	next, res, err := c.state.Apply(&topologyv1.Command{
		Mutations: ms,
		Change:    &topologyv1.Change{AtMs: 1, Subject: "test", What: "changed"},
	})
	c.state = next
	return res, err
}

func (c *cluster) must(ms ...*topologyv1.Mutation) topology.Result {
	c.t.Helper()
	res, err := c.apply(ms...)
	if err != nil {
		c.t.Fatal(err)
	}
	return res
}

func found(q uint32) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_Found{Found: &topologyv1.Found{
		ClusterId: "c1", Vnodes: q, FoundingNodes: 3, Settings: topology.DefaultSettings().Proto(),
	}}}
}

func register(name string, incarnation, boot uint64, bootID string) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
		Node: &topologyv1.Node{
			Incarnation: incarnation, Name: name, Zone: "z1", Role: topologyv1.Role_ROLE_DATA,
			Address: name + ":1", DataId: "data-of-" + name,
		},
		Boot: boot, BootId: bootID,
	}}}
}

func setRing(q int, nodes ...uint64) *topologyv1.Mutation {
	var ring []topology.Vnode
	for range q {
		var v topology.Vnode
		for _, n := range nodes {
			v.Slots = append(v.Slots, topology.Slot{Node: n, Phase: topology.Stable})
		}
		ring = append(ring, v)
	}
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetRing{SetRing: &topologyv1.SetRing{Ring: topology.RingProto(ring)}}}
}

func create(ns topology.Namespace) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_CreateNamespace{CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()}}}
}

func update(ns topology.Namespace) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}}
}

func drop(id uint32) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_DropNamespace{DropNamespace: &topologyv1.DropNamespace{Id: id}}}
}

// formed returns a cluster of three nodes with its ring and namespace "default".
func formed(t *testing.T) *cluster {
	c := &cluster{t: t}
	c.must(found(4))
	for _, n := range []string{"n1", "n2", "n3"} {
		c.must(register(n, 0, 1, "a"))
	}
	c.must(setRing(4, 1, 2, 3))
	ns, warnings, err := c.state.Topology.NewNamespace("default", topology.NamespaceSettings{})
	if err != nil || len(warnings) != 0 {
		t.Fatal(err, warnings)
	}
	c.must(create(ns))
	return c
}

func wantRefusal(t *testing.T, err error, kind topology.RefusalKind, reason string) *topology.Refusal {
	t.Helper()
	var r *topology.Refusal
	if !errors.As(err, &r) || r.Kind != kind || r.Reason != reason {
		t.Fatalf("error = %v, want a refusal of kind %d for %s", err, kind, reason)
	}
	return r
}

func TestFormingTheRing(t *testing.T) {
	c := formed(t)
	top := c.state.Topology
	if !top.Formed() || top.DataNodes() != 3 || top.Width() != 3 {
		t.Fatalf("formed %v, %d nodes, width %d", top.Formed(), top.DataNodes(), top.Width())
	}
	ns := top.Namespace("default")
	if ns.N != 3 || ns.W.Need(3) != 2 || ns.R.Need(3) != 2 || ns.LeastWriteAcks != 2 || ns.Strength() != quorum.Strong {
		t.Errorf("namespace default is %+v", ns)
	}
	if got := top.Slots(2, 2); len(got) != 2 || got[1].Read != 2 {
		t.Errorf("first two slots of vnode 2 are %v", got)
	}
	if !top.Owns(3, 0, 3) || top.Owns(3, 0, 2) || top.Owns(3, 99, 3) {
		t.Error("node 3 owns a vnode as its third slot, and only vnodes that exist")
	}
	if top.Resolve("n2") != top.Node(2) || top.Resolve("#2") != top.Node(2) || top.Resolve("n9") != nil || top.Resolve("#x") != nil {
		t.Error("nodes are found by name and by incarnation")
	}
}

func TestEpochRisesWithEveryChangeOnly(t *testing.T) {
	c := formed(t)
	before := c.state
	c.must(register("n1", 1, 1, "a")) // the same start again
	if c.state.Topology.Epoch != before.Topology.Epoch || len(c.state.History) != len(before.History) {
		t.Error("a repeated registration raised the epoch or left a trace in the history")
	}
	if _, err := c.apply(drop(99)); err == nil || c.state != before && c.state.Topology.Epoch != before.Topology.Epoch {
		t.Error("a refused change must change nothing")
	}
	c.must(register("n1", 1, 2, "b")) // a restart, same addresses
	if c.state.Topology.Epoch != before.Topology.Epoch {
		t.Error("a restart with the same addresses raised the epoch")
	}
	m := register("n1", 1, 2, "b")
	m.GetRegister().Node.Address = "elsewhere:1"
	c.must(m)
	if c.state.Topology.Epoch != before.Topology.Epoch+1 {
		t.Error("a new address did not raise the epoch")
	}
	if got := c.state.Topology.Ring[0].ChangedEpoch; got >= c.state.Topology.Epoch {
		t.Errorf("the ring's slots changed in epoch %d by a new address", got)
	}
}

func TestExpectedEpoch(t *testing.T) {
	c := formed(t)
	_, _, err := c.state.Apply(&topologyv1.Command{ExpectEpoch: c.state.Topology.Epoch - 1, Mutations: []*topologyv1.Mutation{drop(1)}})
	wantRefusal(t, err, topology.Conflict, "EPOCH_CHANGED")
}

// Invariant 10.
func TestRegistration(t *testing.T) {
	c := &cluster{t: t}
	_, err := c.apply(register("n1", 0, 1, "a"))
	wantRefusal(t, err, topology.Precondition, "NOT_FOUNDED")
	c.must(found(4))
	if got := c.must(register("n1", 0, 1, "a")).Incarnation; got != 1 {
		t.Fatalf("first incarnation is %d", got)
	}
	if got := c.must(register("n1", 0, 1, "a")).Incarnation; got != 1 {
		t.Fatalf("the reply was lost, the second try got incarnation %d", got)
	}
	other := register("n1", 0, 1, "x")
	other.GetRegister().Node.DataId = "a fresh directory"
	if got := c.must(other).Incarnation; got != 2 {
		t.Fatalf("a new data directory got incarnation %d", got)
	}
	if c.state.Topology.Resolve("n1").Incarnation != 2 {
		t.Error("a name stands for its newest node")
	}
	c.must(register("n1", 1, 7, "b"))
	_, err = c.apply(register("n1", 1, 6, "c"))
	wantRefusal(t, err, topology.Precondition, "BOOT_REGRESSION")
	_, err = c.apply(register("n1", 1, 7, "c"))
	wantRefusal(t, err, topology.Precondition, "BOOT_REGRESSION")
	_, err = c.apply(register("n1", 2, 8, "c"))
	wantRefusal(t, err, topology.Precondition, "INCARNATION_MISMATCH")
	stranger := register("n5", 55, 1, "a")
	_, err = c.apply(stranger)
	wantRefusal(t, err, topology.Precondition, "NODE_REMOVED")
	reporting := register("n1", 1, 8, "c")
	reporting.GetRegister().Node.Role = topologyv1.Role_ROLE_REPORTING
	_, err = c.apply(reporting)
	wantRefusal(t, err, topology.Precondition, "ROLE_CHANGED")
	_, err = c.apply(register("no spaces", 0, 1, "a"))
	wantRefusal(t, err, topology.Invalid, "BAD_NAME")
	_, err = c.apply(found(4))
	wantRefusal(t, err, topology.Exists, "ALREADY_FOUNDED")
}

// Invariant 9.
func TestRingIsValidated(t *testing.T) {
	for name, m := range map[string]*topologyv1.Mutation{
		"too few slots":       setRing(4, 1, 2),
		"a node twice":        setRing(4, 1, 2, 2),
		"an unknown node":     setRing(4, 1, 2, 9),
		"a missing vnode":     setRing(3, 1, 2, 3),
		"a move without aim":  movingRing(topology.Slot{Node: 1, Phase: topology.WriteBothReadOld}),
		"a move to a replica": movingRing(topology.Slot{Node: 1, Incoming: 2, Phase: topology.WriteBothReadOld}),
		"a stable move":       movingRing(topology.Slot{Node: 1, Incoming: 4, Phase: topology.Stable}),
	} {
		t.Run(name, func(t *testing.T) {
			c := formed(t)
			c.must(register("n4", 0, 1, "a"))
			_, err := c.apply(m)
			wantRefusal(t, err, topology.Invalid, "INVALID_TOPOLOGY")
		})
	}
	c := formed(t)
	c.must(register("n4", 0, 1, "a"))
	c.must(movingRing(topology.Slot{Node: 1, Incoming: 4, Phase: topology.WriteBothReadNew, Since: 1}))
	if !c.state.Topology.Owns(4, 0, 3) || !c.state.Topology.Owns(1, 0, 3) {
		t.Error("both endpoints of a moving slot own the vnode")
	}
}

func movingRing(first topology.Slot) *topologyv1.Mutation {
	m := setRing(4, 1, 2, 3)
	for _, v := range m.GetSetRing().Ring {
		v.Slots[0] = &topologyv1.Slot{Node: first.Node, Incoming: first.Incoming, Phase: topologyv1.Phase(first.Phase), Since: first.Since}
	}
	return m
}

func ptr[T any](v T) *T { return &v }

func TestNamespaceSettings(t *testing.T) {
	type set = topology.NamespaceSettings
	for _, tc := range []struct {
		name   string
		set    set
		kind   topology.RefusalKind
		reason string
	}{
		{"0%", set{W: ptr("0%")}, topology.Invalid, "BAD_QUORUM"},
		{"101%", set{R: ptr("101%")}, topology.Invalid, "BAD_QUORUM"},
		{"-1", set{W: ptr("-1")}, topology.Invalid, "BAD_QUORUM"},
		{"abc", set{W: ptr("abc")}, topology.Invalid, "BAD_QUORUM"},
		{"nothing", set{W: ptr("")}, topology.Invalid, "BAD_QUORUM"},
		{"W above N", set{W: ptr("4")}, topology.Invalid, "QUORUM_ABOVE_N"},
		{"W above a given N", set{N: ptr(1), R: ptr("2")}, topology.Invalid, "QUORUM_ABOVE_N"},
		{"N above the nodes", set{N: ptr(4)}, topology.Precondition, "N_ABOVE_NODES"},
		{"N of 0", set{N: ptr(0)}, topology.Invalid, "BAD_N"},
		{"N of 16", set{N: ptr(16)}, topology.Invalid, "BAD_N"},
		{"chance above 1", set{RepairChance: ptr(1.5)}, topology.Invalid, "BAD_REPAIR_CHANCE"},
		{"negative TTL", set{TTL: ptr(-time.Second)}, topology.Invalid, "BAD_TTL"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := formed(t).state.Topology.NewNamespace("x", tc.set)
			wantRefusal(t, err, tc.kind, tc.reason)
		})
	}

	c := formed(t)
	_, _, err := c.state.Topology.NewNamespace("default", set{})
	wantRefusal(t, err, topology.Exists, "NAMESPACE_EXISTS")
	_, _, err = c.state.Topology.NewNamespace("a b", set{})
	wantRefusal(t, err, topology.Invalid, "BAD_NAME")
	_, _, err = changed(c.state.Topology, "x", set{})
	if r := wantRefusal(t, err, topology.NotFound, "NAMESPACE_NOT_FOUND"); r.Details["namespace"] != "x" {
		t.Errorf("details = %v", r.Details)
	}
	_, err = c.state.Topology.DroppableNamespace("default")
	wantRefusal(t, err, topology.Precondition, "DEFAULT_NAMESPACE")

	_, warnings, err := c.state.Topology.NewNamespace("x", set{W: ptr("67%"), R: ptr("one")})
	if err != nil || len(warnings) != 2 || !strings.Contains(warnings[1], "strong while no replica is replaced") {
		t.Fatalf("warnings = %q, error = %v", warnings, err)
	}
	ns, _, err := c.state.Topology.NewNamespace("x", set{W: ptr("2"), R: ptr("one")})
	if err != nil {
		t.Fatal(err)
	}
	c.must(create(ns))
	ns, _, err = changed(c.state.Topology, "x", set{W: ptr("one")})
	if err != nil {
		t.Fatal(err)
	}
	c.must(update(ns)) // eventual before and after
	ns, _, err = changed(c.state.Topology, "x", set{W: ptr("2")})
	if err != nil || ns.LeastWriteAcks != 1 {
		t.Errorf("records written at W=one are still there: LeastWriteAcks = %d, error = %v", ns.LeastWriteAcks, err)
	}
}

// changed is ChangedNamespace without another N.
func changed(t *topology.Topology, name string, set topology.NamespaceSettings) (topology.Namespace, []string, error) {
	ns, _, warnings, err := t.ChangedNamespace(name, set, false)
	return ns, warnings, err
}

func TestDroppedNamespaceIsNotReused(t *testing.T) {
	c := formed(t)
	make := func() uint32 {
		ns, _, err := c.state.Topology.NewNamespace("x", topology.NamespaceSettings{})
		if err != nil {
			t.Fatal(err)
		}
		return c.must(create(ns)).Namespace.ID
	}
	first := make()
	c.must(drop(first))
	if c.state.Topology.Namespace("x") != nil {
		t.Fatal("the namespace is still there")
	}
	if second := make(); second == first {
		t.Errorf("identifier %d is used again", second)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	c := formed(t)
	ns := *c.state.Topology.Namespace("default")
	for i := range 1200 {
		ns.TTL = time.Duration(i+1) * time.Second
		c.must(update(ns))
	}
	h := c.state.History
	if len(h) != 1000 || h[len(h)-1].Epoch != c.state.Topology.Epoch || h[0].Epoch != c.state.Topology.Epoch-999 {
		t.Errorf("%d entries, from epoch %d to %d", len(h), h[0].Epoch, h[len(h)-1].Epoch)
	}
}

func TestStateSurvivesItsEncoding(t *testing.T) {
	c := formed(t)
	b, err := proto.Marshal(c.state.Proto())
	if err != nil {
		t.Fatal(err)
	}
	var pb topologyv1.ControlState
	if err := proto.Unmarshal(b, &pb); err != nil {
		t.Fatal(err)
	}
	back, err := topology.StateFromProto(&pb)
	if err != nil {
		t.Fatal(err)
	}
	opts := cmp.Options{
		cmp.AllowUnexported(quorum.Spec{}),
		cmpopts.IgnoreUnexported(topology.State{}, topology.Topology{}, topology.Vnode{}),
	}
	if diff := cmp.Diff(c.state, back, opts); diff != "" {
		t.Errorf("state differs (-want +got):\n%s", diff)
	}
	// The counters survive too: the next node gets the next number.
	d := &cluster{t: t, state: back}
	if got := d.must(register("n4", 0, 1, "a")).Incarnation; got != 4 {
		t.Errorf("next incarnation is %d, want 4", got)
	}
	_, err = d.apply(register("n1", 1, 1, "other start"))
	wantRefusal(t, err, topology.Precondition, "BOOT_REGRESSION")
}

func TestEpochString(t *testing.T) {
	for e, want := range map[uint64]string{7: "7", 1<<48 | 3: "1.3"} {
		if got := topology.EpochString(e); got != want {
			t.Errorf("epoch %d is written %s, want %s", e, got, want)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, good := range []string{"a", "node1", "eu-west.1", "A_b", strings.Repeat("x", 63)} {
		if err := topology.CheckName("node", good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "-a", ".a", "a b", "a/b", "ä", strings.Repeat("x", 64)} {
		if topology.CheckName("node", bad) == nil {
			t.Errorf("%q passed", bad)
		}
	}
}

// Whatever decodes is valid, and survives another round.
func FuzzTopology(f *testing.F) {
	c := formed(&testing.T{})
	b, err := proto.Marshal(c.state.Topology.Proto())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var pb topologyv1.Topology
		if proto.Unmarshal(b, &pb) != nil {
			return
		}
		top, err := topology.FromProto(&pb)
		if err != nil {
			return
		}
		again, err := topology.FromProto(top.Proto())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(top.Ring, again.Ring, func(a, b topology.Vnode) bool { return slices.Equal(a.Slots, b.Slots) }) {
			t.Fatal("the ring differs after another round")
		}
		_ = fmt.Sprint(top.SlotCounts(3))
	})
}
