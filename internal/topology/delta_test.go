package topology

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// wire encodes a message, always in the same way.
func wire(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

// sent returns a delta as it arrives.
func sent(d *topologyv1.TopologyDelta) *topologyv1.TopologyDelta {
	out := &topologyv1.TopologyDelta{}
	if err := proto.Unmarshal(wire(d), out); err != nil {
		panic(err)
	}
	return out
}

// known converts a topology that must be valid.
func known(t interface{ Fatal(...any) }, pb *topologyv1.Topology) *Topology {
	top, err := FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// wide returns a topology of some nodes and vnodes with three slots each.
func wide(nodes, vnodes int) *topologyv1.Topology {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: uint32(vnodes), FoundingNodes: 3, Settings: DefaultSettings().Proto()}
	for i := range nodes {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{
			Incarnation: uint64(i + 1), Name: fmt.Sprint("node", i+1), Zone: fmt.Sprint("z", i%3), Role: topologyv1.Role_ROLE_DATA,
			Address: fmt.Sprintf("node%d.kvasir.example:7000", i+1), AdminAddress: fmt.Sprintf("node%d.kvasir.example:7001", i+1),
			GossipAddress: fmt.Sprintf("node%d.kvasir.example:7002", i+1), DataId: fmt.Sprintf("%032d", i),
		})
	}
	for i := range vnodes {
		v := &topologyv1.Vnode{ChangedEpoch: 3}
		for j := range 3 {
			v.Slots = append(v.Slots, &topologyv1.Slot{Node: uint64((i+j)%nodes + 1), Phase: topologyv1.Phase_PHASE_STABLE})
		}
		pb.Ring = append(pb.Ring, v)
	}
	ns := FoundingNamespace(3)
	ns.ID = 1
	pb.Namespaces = []*topologyv1.Namespace{ns.Proto()}
	return pb
}

// oneMove returns a topology of the next epoch in which the last slot of a vnode begins
// to move to a node that has none of it.
func oneMove(pb *topologyv1.Topology, vnode int) *topologyv1.Topology {
	next := proto.CloneOf(pb)
	next.Epoch++
	v := next.Ring[vnode]
	v.ChangedEpoch = next.Epoch
	to := v.Slots[2].Node%uint64(len(next.Nodes)) + 1
	v.Slots[2] = &topologyv1.Slot{Node: v.Slots[2].Node, Incoming: to, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Since: next.Epoch}
	return next
}

// dataNodes returns those that may have slots.
func dataNodes(pb *topologyv1.Topology) []*topologyv1.Node {
	return slices.DeleteFunc(slices.Clone(pb.Nodes), func(n *topologyv1.Node) bool { return n.Role != topologyv1.Role_ROLE_DATA })
}

// changed returns what some random changes make of a topology in a later epoch.
func changed(t *rapid.T, pb *topologyv1.Topology) *topologyv1.Topology {
	pb = proto.CloneOf(pb)
	pb.Epoch += rapid.SampledFrom([]uint64{1, 2, 1 << generationShift}).Draw(t, "epochs")
	inc := func() uint64 {
		return pb.Nodes[rapid.IntRange(0, len(pb.Nodes)-1).Draw(t, "node")].Incarnation
	}
	text := rapid.StringMatching(`[a-z]{1,8}`)
	for range rapid.IntRange(0, 4).Draw(t, "changes") {
		switch rapid.IntRange(0, 10).Draw(t, "change") {
		case 0: // a node comes
			next := pb.Nodes[len(pb.Nodes)-1].Incarnation + rapid.Uint64Range(1, 3).Draw(t, "gap")
			pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: next, Name: text.Draw(t, "name"), Zone: "z9", Role: topologyv1.Role_ROLE_DATA})
		case 1: // one has another address
			pb.Nodes[rapid.IntRange(0, len(pb.Nodes)-1).Draw(t, "moved")].Address = text.Draw(t, "address")
		case 2: // one leaves, if it has no slots
			gone := inc()
			if top := known(t, pb); (len(dataNodes(pb)) > 4 || top.Node(gone).Role == Reporting) && !top.Names(gone) {
				pb.Nodes = slices.DeleteFunc(pb.Nodes, func(n *topologyv1.Node) bool { return n.Incarnation == gone })
			}
		case 3, 4: // a vnode has other slots
			nodes := dataNodes(pb)
			v := &topologyv1.Vnode{ChangedEpoch: pb.Epoch}
			for i := range rapid.IntRange(3, min(4, len(nodes))).Draw(t, "slots") {
				at := rapid.IntRange(i, len(nodes)-1).Draw(t, "at")
				nodes[i], nodes[at] = nodes[at], nodes[i]
				v.Slots = append(v.Slots, &topologyv1.Slot{Node: nodes[i].Incarnation, Phase: topologyv1.Phase_PHASE_STABLE})
			}
			if n := len(v.Slots); n < len(nodes) && rapid.Bool().Draw(t, "moving") {
				s := v.Slots[n-1]
				s.Incoming, s.Since = nodes[n].Incarnation, pb.Epoch
				s.Phase = topologyv1.Phase(rapid.IntRange(2, 4).Draw(t, "phase"))
			}
			pb.Ring[rapid.IntRange(0, len(pb.Ring)-1).Draw(t, "vnode")] = v
		case 5: // a namespace comes
			ns := FoundingNamespace(rapid.IntRange(1, 3).Draw(t, "N"))
			ns.ID, ns.Name, ns.ChangedEpoch = 1, text.Draw(t, "namespace"), pb.Epoch
			if n := len(pb.Namespaces); n > 0 {
				ns.ID = pb.Namespaces[n-1].Id + 1
			}
			pb.Namespaces = append(pb.Namespaces, ns.Proto())
		case 6: // one is set to something else or dropped
			if n := len(pb.Namespaces); n > 0 {
				i := rapid.IntRange(0, n-1).Draw(t, "which")
				if rapid.Bool().Draw(t, "dropped") {
					for _, v := range pb.Ring {
						v.Copies = slices.DeleteFunc(v.Copies, func(c *topologyv1.Copy) bool { return c.Namespace == pb.Namespaces[i].Id })
					}
					pb.Namespaces = slices.Delete(pb.Namespaces, i, i+1)
				} else {
					pb.Namespaces[i].TtlMs, pb.Namespaces[i].ChangedEpoch = rapid.Uint64Range(0, 9).Draw(t, "ttl"), pb.Epoch
				}
			}
		case 9: // a reporting node comes
			next := pb.Nodes[len(pb.Nodes)-1].Incarnation + 1
			pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: next, Name: text.Draw(t, "name"), Role: topologyv1.Role_ROLE_REPORTING})
		case 10: // the last node has a copy, or another one, or none
			last, v := pb.Nodes[len(pb.Nodes)-1], pb.Ring[rapid.IntRange(0, len(pb.Ring)-1).Draw(t, "vnode")]
			v.Copies = nil
			if len(pb.Namespaces) > 0 && last.Role == topologyv1.Role_ROLE_REPORTING {
				v.Copies = []*topologyv1.Copy{{
					Namespace: pb.Namespaces[0].Id, Node: last.Incarnation, Since: pb.Epoch,
					State: topologyv1.CopyState(rapid.IntRange(1, 5).Draw(t, "state")),
				}}
			}
		case 7:
			pb.Settings.MaxHints = rapid.Uint64Range(1, 9).Draw(t, "hints")
		case 8:
			pb.Orchestrators = nil
			for range rapid.IntRange(1, 3).Draw(t, "orchestrators") {
				pb.Orchestrators = append(pb.Orchestrators, &topologyv1.Orchestrator{Name: text.Draw(t, "orchestrator")})
			}
		}
	}
	return pb
}

// What differs between two topologies makes the later one of the earlier one, from any
// epoch to any later one, and again from what was made.
func TestPatchMakesTheNewTopology(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pb := wide(rapid.IntRange(3, 6).Draw(t, "nodes"), 8)
		all := []*Topology{known(t, pb)}
		made := []*Topology{all[0]}
		for range rapid.IntRange(1, 5).Draw(t, "epochs") {
			pb = changed(t, pb)
			next := known(t, pb)
			for from, old := range made {
				d := Diff(all[from], next)
				if d == nil {
					t.Fatalf("there is no difference from epoch %d to %d", all[from].Epoch, next.Epoch)
				}
				got, err := Patch(old, sent(d))
				if err != nil {
					t.Fatal(err)
				}
				if want := wire(next.Proto()); !bytes.Equal(wire(got.Proto()), want) || got.sum() != next.sum() {
					t.Fatalf("%v makes\n%v, want\n%v", d, got.Proto(), next.Proto())
				}
				sameLookups(t, got, next)
				if from == len(made)-1 {
					made = append(made, got)
				}
			}
			all = append(all, next)
		}
		for i, top := range made {
			if !bytes.Equal(wire(top.Proto()), wire(all[i].Proto())) {
				t.Fatalf("the topology of epoch %d changed when another one was made of it", top.Epoch)
			}
		}
	})
}

// sameLookups checks what a topology's indexes say.
func sameLookups(t *rapid.T, got, want *Topology) {
	for _, n := range want.Nodes {
		if g := got.Node(n.Incarnation); g == nil || *g != n {
			t.Fatalf("node %v is %v", n, g)
		}
	}
	for _, ns := range want.Namespaces {
		if g := got.NamespaceByID(ns.ID); g == nil || *g != ns || got.Namespace(ns.Name) == nil {
			t.Fatalf("namespace %v is %v", ns, g)
		}
	}
	if len(got.byIncarnation) != len(want.byIncarnation) || len(got.byName) != len(want.byName) || len(got.byID) != len(want.byID) {
		t.Fatal("what was removed is still found")
	}
	for i := range want.Ring {
		if !slices.Equal(got.Ring[i].quorum, want.Ring[i].quorum) {
			t.Fatalf("vnode %d has slots %v, want %v", i, got.Ring[i].quorum, want.Ring[i].quorum)
		}
	}
}

// A delta that does not fit is refused, so that the whole is asked for.
func TestPatchRefusesWhatDoesNotFit(t *testing.T) {
	pb := wide(5, 8)
	old, next := known(t, pb), known(t, oneMove(pb, 6))
	other := proto.CloneOf(pb) // of the same epoch, as software that knows less may have it
	other.Namespaces[0].TtlMs = 5
	for name, tc := range map[string]struct {
		base   *Topology
		change func(*topologyv1.TopologyDelta)
	}{
		"an older base":           {old, func(d *topologyv1.TopologyDelta) { d.BaseEpoch-- }},
		"a newer base":            {old, func(d *topologyv1.TopologyDelta) { d.BaseEpoch++; d.Epoch++ }},
		"another generation":      {old, func(d *topologyv1.TopologyDelta) { d.BaseEpoch |= 1 << generationShift; d.Epoch = d.BaseEpoch + 1 }},
		"backwards":               {old, func(d *topologyv1.TopologyDelta) { d.Epoch = d.BaseEpoch }},
		"another cluster":         {old, func(d *topologyv1.TopologyDelta) { d.ClusterId = "d" }},
		"another base's content":  {known(t, other), func(*topologyv1.TopologyDelta) {}},
		"a change is missing":     {old, func(d *topologyv1.TopologyDelta) { d.Vnodes = nil }},
		"a change of another one": {old, func(d *topologyv1.TopologyDelta) { d.Vnodes[0].Index = 5 }},
		"another slot":            {old, func(d *topologyv1.TopologyDelta) { d.Vnodes[0].Vnode.Slots[0].Node = 4 }},
		"another setting":         {old, func(d *topologyv1.TopologyDelta) { d.Settings = DefaultSettings().Proto(); d.Settings.MaxHints = 3 }},
		"no ring here":            {known(t, &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: 8, Settings: pb.Settings}), func(*topologyv1.TopologyDelta) {}},
	} {
		before := wire(tc.base.Proto())
		d := Diff(old, next)
		tc.change(d)
		if got, err := Patch(tc.base, d); !errors.Is(err, ErrOtherBase) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if !bytes.Equal(before, wire(tc.base.Proto())) {
			t.Errorf("%s: the base was changed", name)
		}
	}
}

func TestPatchKnowsThePhases(t *testing.T) {
	pb := wide(5, 8)
	old := known(t, pb)
	d := Diff(old, known(t, oneMove(pb, 6)))
	d.Vnodes[0].Vnode.Slots[0].Phase = 9
	if got, err := Patch(old, d); err == nil || !strings.Contains(err.Error(), "vnode 6 slot 0: unknown phase(9)") {
		t.Errorf("%v, %v", got, err)
	}
}

// Where no delta can say what changed, there is none.
func TestDiffOfOthers(t *testing.T) {
	pb := wide(5, 8)
	next := known(t, oneMove(pb, 6))
	unformed := proto.CloneOf(pb)
	unformed.Ring = nil
	foreign := proto.CloneOf(pb)
	foreign.ClusterId = "d"
	led := proto.CloneOf(pb)
	led.Orchestrators = []*topologyv1.Orchestrator{{Name: "o"}}
	for name, old := range map[string]*Topology{
		"none": nil, "empty": {}, "before the ring formed": known(t, unformed), "of another cluster": known(t, foreign),
		"the same": next, "with orchestrators": known(t, led),
	} {
		if d := Diff(old, next); d != nil {
			t.Errorf("%s: %v", name, d)
		}
	}
}

// A topology that breaks a rule is not taken in by way of a delta either.
func TestPatchedTopologiesAreValid(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Topology)
		want   string
	}{
		"a node with slots is gone": {func(t *Topology) { t.Nodes = slices.Delete(slices.Clone(t.Nodes), 4, 5) }, "node #5 is not registered"},
		"a node has another role":   {func(t *Topology) { t.Nodes[2].Role = Reporting }, "node3 is not a data node"},
		"N is above the slots":      {func(t *Topology) { t.Namespaces[0].N = 4 }, "has 3 slots"},
		"a bad namespace":           {func(t *Topology) { t.Namespaces[0].RepairChance = 2 }, "repair chance"},
		"a bad setting":             {func(t *Topology) { t.Settings.MaxHints = -1 }, "max_hints"},
		"a node twice in a vnode":   {func(t *Topology) { t.Ring[3].Slots[1] = t.Ring[3].Slots[0] }, "has two slots"},
		"too few slots":             {func(t *Topology) { t.Ring[3].Slots = t.Ring[3].Slots[:2] }, "has 2 slots"},
		"a copy on a data node":     {func(t *Topology) { t.Ring[3].Copies = []Copy{{1, 5, Behind, 1}} }, "which is no reporting node"},
		"a copy of nothing":         {func(t *Topology) { t.Ring[3].Copies = []Copy{{7, 5, Behind, 1}} }, "namespace #7, which there is not"},
		"a copy in no state":        {func(t *Topology) { t.Ring[3].Copies = []Copy{{1, 5, 9, 1}} }, "copy-state(9)"},
		"a bad reporting timeout":   {func(t *Topology) { t.Namespaces[0].Reporting = ReportingRules{ReportingBlock, 1, 0} }, "reporting timeout"},
	} {
		pb := wide(5, 8)
		old, next := known(t, pb), known(t, pb)
		next.Epoch++
		tc.change(next)
		for i := range next.Ring {
			next.Ring[i].quorum = nil
		}
		next.index()
		if got, err := Patch(old, sent(Diff(old, next))); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// A slot costs what it says, however large the ring, and the rest is shared.
func TestADeltaIsSmall(t *testing.T) {
	pb := wide(200, 4096)
	old, next := known(t, pb), known(t, oneMove(pb, 77))
	d := Diff(old, next)
	if n := len(wire(d)); n > 120 {
		t.Errorf("one slot takes %d bytes: %v", n, d)
	}
	got, err := Patch(old, d)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got.Ring {
		if shared := &got.Ring[i].Slots[0] == &old.Ring[i].Slots[0]; shared == (i == 77) {
			t.Fatalf("vnode %d is shared: %v", i, shared)
		}
	}
	if &got.Nodes[0] != &old.Nodes[0] || &got.Namespaces[0] != &old.Namespaces[0] {
		t.Error("nodes and namespaces were copied")
	}
}

// A server tells the difference from what it remembers, and the whole otherwise.
func TestRecent(t *testing.T) {
	var r Recent
	pb := wide(5, 8)
	var all []*Topology
	for i := range maxRecent + 3 {
		pb = oneMove(pb, i%8)
		all = append(all, known(t, pb))
		r.Add(all[i])
	}
	r.Add(known(t, pb)) // the same epoch again
	newest := all[len(all)-1]
	for i, old := range all {
		whole, d := r.Update(old.Epoch, newest)
		if remembered := i >= 3 && old != newest; (d != nil) != remembered || (whole != nil) != (i < 3) {
			t.Errorf("epoch %d of %d: whole %v, delta %v", old.Epoch, newest.Epoch, whole != nil, d)
		}
		got, err := Updated(old, &topologyv1.GetTopologyResponse{Topology: whole, Delta: d})
		if err != nil || !bytes.Equal(wire(got.Proto()), wire(newest.Proto())) {
			t.Errorf("epoch %d of %d: %v, %v", old.Epoch, newest.Epoch, got, err)
		}
	}
	if whole, d := r.Update(0, newest); whole == nil || d != nil {
		t.Errorf("whoever has none is told %v", d)
	}
	if whole, d := r.Update(newest.Epoch+1, newest); whole != nil || d != nil {
		t.Errorf("whoever is ahead is told %v, %v", whole, d)
	}
	_, first := r.Update(all[9].Epoch, newest)
	if _, again := r.Update(all[9].Epoch, newest); again != first {
		t.Error("the same difference was made twice")
	}
	late := &topologyv1.GetTopologyResponse{Delta: Diff(all[0], all[1])}
	if got, err := Updated(newest, late); got != newest || err != nil {
		t.Errorf("a difference to what is older leads to %v, %v", got, err)
	}
	if got, err := Updated(&Topology{}, late); err == nil {
		t.Errorf("from nothing, a difference leads to %v", got)
	}
}

// BenchmarkOneSlot measures what one changed slot of a large cluster costs from the
// server's topology to the receiver's: by the whole and by the difference.
func BenchmarkOneSlot(b *testing.B) {
	pb := wide(1000, 1<<16)
	old := known(b, pb)
	move := Diff(old, known(b, oneMove(pb, 1<<15)))
	next, err := Patch(old, move) // shares with old, as an orchestrator's topologies do
	if err != nil {
		b.Fatal(err)
	}
	for _, how := range []string{"whole", "delta"} {
		b.Run(how, func(b *testing.B) {
			var r Recent
			if how == "delta" {
				r.Add(old)
			}
			var bytes int
			for b.Loop() {
				out := &topologyv1.WatchTopologyResponse{}
				out.Topology, out.Delta = r.Update(old.Epoch, next)
				m, err := proto.Marshal(out)
				if err != nil {
					b.Fatal(err)
				}
				in := &topologyv1.WatchTopologyResponse{}
				if err := proto.Unmarshal(m, in); err != nil {
					b.Fatal(err)
				}
				if _, err := Updated(old, in); err != nil {
					b.Fatal(err)
				}
				bytes = len(m)
			}
			b.ReportMetric(float64(bytes), "wire-bytes/op")
		})
	}
	b.Run("delta/made", func(b *testing.B) {
		for b.Loop() {
			Diff(old, next)
		}
	})
	b.Run("delta/taken", func(b *testing.B) {
		for b.Loop() {
			if _, err := Patch(old, move); err != nil {
				b.Fatal(err)
			}
		}
	})
}
