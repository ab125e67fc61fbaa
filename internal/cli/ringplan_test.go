package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// ringOf returns a ring of 256 vnodes on a node in each of some zones, with N=3.
func ringOf(t *testing.T, zones ...string) *topology.Topology {
	t.Helper()
	return ringWith(t, 256, zones...)
}

func ringWith(t *testing.T, vnodes int, zones ...string) *topology.Topology {
	t.Helper()
	top := &topology.Topology{Epoch: 7, Vnodes: uint32(vnodes), Namespaces: []topology.Namespace{{ID: 1, Name: "default", N: 3}}}
	var nodes []placement.Node
	for i, z := range zones {
		top.Nodes = append(top.Nodes, topology.Node{Incarnation: uint64(i + 1), Name: fmt.Sprint("node", i+1), Zone: z, Role: topology.Data})
		nodes = append(nodes, placement.Node{ID: uint64(i + 1), Zone: z})
	}
	a, err := placement.Widen(nil, vnodes, nodes, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, slots := range a {
		var v topology.Vnode
		for _, n := range slots {
			v.Slots = append(v.Slots, topology.Slot{Node: n, Phase: topology.Stable})
		}
		top.Ring = append(top.Ring, v)
	}
	return top
}

func TestPlanRing(t *testing.T) {
	one := []string{"z", "z", "z"}
	for _, tc := range []struct {
		name   string
		zones  []string
		spares int
		r      planRequest
		want   string // each node's slots in the end
		moves  int
		forced string
	}{
		{"even", one, 0, planRequest{add: "1", strategy: "even"}, "node1:192 node2:192 node3:192 new1:192", 192, ""},
		{"split", one, 0, planRequest{add: "1", strategy: "split"}, "node1:256 node2:128 node3:256 new1:128", 128, ""},
		{"three by split", one, 0, planRequest{add: "3", strategy: "split"}, "node1:128 node2:128 node3:128 new1:128 new2:128 new3:128", 384, ""},
		{"a zone of its own", []string{"a", "b", "c"}, 0, planRequest{add: "1", zone: "d", strategy: "even"}, "node1:192 node2:192 node3:192 new1:192", 192, ""},
		{"the zone with the fewest", []string{"a", "b", "c"}, 0, planRequest{add: "1", strategy: "even"}, "node1:128 new1:128 node2:256 node3:256", 128, "b c"},
		{"spares first", one, 1, planRequest{add: "2", strategy: "even"}, "node1:154 node2:154 node3:154 node4:153 new1:153", 306, ""},
		{"a spare by name", one, 2, planRequest{add: "node5", strategy: "even"}, "node1:192 node2:192 node3:192 node5:192", 192, ""},
		{"one for another", one, 1, planRequest{add: "node4", remove: []string{"node2"}, strategy: "even"}, "node1:256 node2:0 node3:256 node4:256", 256, ""},
		{"nothing", one, 1, planRequest{strategy: "even"}, "node1:256 node2:256 node3:256", 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			top := ringOf(t, tc.zones...)
			for i := range tc.spares {
				n := len(tc.zones) + i + 1
				top.Nodes = append(top.Nodes, topology.Node{Incarnation: uint64(n), Name: fmt.Sprint("node", n), Zone: tc.zones[0], Role: topology.Data})
			}
			d, err := planRing(top, tc.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range d.Nodes {
				got = append(got, fmt.Sprint(n.Node, ":", n.After))
			}
			if diff := gocmp.Diff(strings.Fields(tc.want), sortedBy(strings.Fields(tc.want), got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(d.Moves) != tc.moves || strings.Join(d.Forced, " ") != tc.forced {
				t.Errorf("%d moves, forced %v", len(d.Moves), d.Forced)
			}
		})
	}
}

// Plans for a thousand nodes with 65,536 vnodes take seconds.
// While a new directory takes the place of a node's, what that node had is the new one's:
// nothing is planned to go to the old one.
func TestPlanWhileANodeIsRefilled(t *testing.T) {
	top := ringOf(t, "z", "z", "z", "z")
	top.Nodes = append(top.Nodes, topology.Node{Incarnation: 5, Name: "node2", Zone: "z", Role: topology.Data})
	for i := range top.Ring {
		for j := range top.Ring[i].Slots {
			if s := &top.Ring[i].Slots[j]; s.Node == 2 && i%2 == 0 {
				s.Node = 5
			}
		}
	}
	for _, strategy := range []string{"even", "split"} {
		d, err := planRing(top, planRequest{remove: []string{"node4"}, strategy: strategy}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range d.Moves {
			if m.To.Incarnation == 2 {
				t.Fatalf("%s moves a slot to the old directory: %+v", strategy, m)
			}
		}
	}
}

func TestPlanRingScales(t *testing.T) {
	if testing.Short() {
		t.Skip("plans 196,608 slots")
	}
	var zones []string
	for i := range 1000 {
		zones = append(zones, string(rune('a'+i%5)))
	}
	top := ringWith(t, 1<<16, zones...)
	holds := ringUse{}
	for v := range top.Ring {
		for _, slot := range top.Ring[v].Slots {
			if holds[slot.Node] == nil {
				holds[slot.Node] = &nodeUse{}
			}
			holds[slot.Node].vnodes = append(holds[slot.Node].vnodes, &adminv1.VnodeUse{NamespaceId: 1, Vnode: uint32(v), Bytes: 1 << 20})
		}
	}
	for _, r := range []planRequest{
		{add: "1", strategy: "even"}, {add: "1", strategy: "split"}, {add: "100", remove: []string{"node7"}, strategy: "even"},
	} {
		began := time.Now()
		d, err := planRing(top, r, holds)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s by %s: %d moves planned in %s", d.Title, d.Strategy, len(d.Moves), time.Since(began))
		if want := map[string]int{"even": 196, "split": 98}[r.strategy]; r.add == "1" && len(d.Moves) != want {
			t.Errorf("%d moves, want %d", len(d.Moves), want)
		}
	}
	began := time.Now()
	if _, err := widened(top, placement.Of(top), &top.Namespaces[0], 5); err != nil {
		t.Fatal(err)
	}
	t.Logf("N from 3 to 5: planned in %s", time.Since(began))
}

// sortedBy brings what was got into the order of what was wanted.
func sortedBy(want, got []string) (out []string) {
	left := map[string]bool{}
	for _, g := range got {
		left[g] = true
	}
	for _, w := range want {
		if left[w] {
			out = append(out, w)
			delete(left, w)
		}
	}
	for _, g := range got {
		if left[g] {
			out = append(out, g)
		}
	}
	return out
}

// A node that a vnode names for another slot leaves that one before it takes a new one:
// else the control plane would refuse the plan.
func TestPlanOrdersMovesOfAVnode(t *testing.T) {
	top := ringOf(t, "a", "b", "c", "a")
	for v := range top.Ring {
		top.Ring[v].Slots = nil
		for s := range 4 {
			top.Ring[v].Slots = append(top.Ring[v].Slots, topology.Slot{Node: uint64((v+s)%4 + 1), Phase: topology.Stable})
		}
	}
	d, err := planRing(top, planRequest{add: "1", zone: "b", strategy: "even"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	twice := 0
	for _, m := range d.Moves {
		slots := top.Ring[m.Vnode].Slots
		if slices.ContainsFunc(slots, func(s topology.Slot) bool { return s.Node == m.To.Incarnation && m.To.Incarnation != 0 }) {
			t.Errorf("vnode %d: slot %d goes to %s, which has another one of %v", m.Vnode, m.Slot, m.To.Node, slots)
		}
		if slots[m.Slot].Node != m.From.Incarnation {
			t.Errorf("vnode %d: slot %d is not at %s", m.Vnode, m.Slot, m.From.Node)
		}
		if m.To.Incarnation != 0 {
			twice++
		}
		slots[m.Slot].Node = cmp.Or(m.To.Incarnation, 99)
	}
	if twice == 0 {
		t.Error("no node changes slots within a vnode: this tests nothing")
	}
}

// Two nodes change places: their zones have shared replicas until a plan moves little more
// than those.
func TestPlanAfterNodesChangedZones(t *testing.T) {
	top := ringOf(t, "a", "b", "c", "a", "b", "c")
	if n := needlesslySharing(top, 3); n != 0 {
		t.Fatalf("at first %d vnodes share a zone", n)
	}
	top.Nodes[0].Zone, top.Nodes[1].Zone = "b", "a"
	shared := needlesslySharing(top, 3)
	d, err := planRing(top, planRequest{strategy: "even"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("namespace default, N=3: two replicas would share a zone in 0 of 256 vnodes, now in %d", shared); shared == 0 || len(d.Mended) != 1 || d.Mended[0] != want || len(d.Violations) != 0 {
		t.Errorf("better %q, worse %q, want %q", d.Mended, d.Violations, want)
	}
	if n := len(d.Moves); n < shared || n > shared+shared/8 || d.After.MaxOverMean > 1.01 {
		t.Errorf("%d moves where %d vnodes share a zone, max/mean %.2f", n, shared, d.After.MaxOverMean)
	}
	for _, m := range d.Moves {
		top.Ring[m.Vnode].Slots[m.Slot].Node = m.To.Incarnation
	}
	if n := needlesslySharing(top, 3); n != 0 {
		t.Errorf("in the end %d vnodes share a zone", n)
	}
	top.Nodes[2].Zone, top.Nodes[5].Zone = "a", "b"
	if n := needlesslySharing(top, 3); n != 0 {
		t.Errorf("with two zones %d vnodes share one needlessly", n)
	}
}

func TestRingPlan(t *testing.T) {
	f := newFake(t, 4)
	f.run("ring", "plan", "--add", "1").want(t, 0, "bytes and time are not known")
	f.holds()
	golden(t, "ring-plan", f.run("ring", "plan", "--add", "1").want(t, 0).stdout)
	golden(t, "ring-plan-json", f.run("ring", "plan", "--add", "1", "-o", "json").want(t, 0).stdout)
	for _, args := range [][]string{
		{"--strategy", "odd"}, {"--add", "-1"}, {"--add", "5000"}, {"--add", "node1"}, {"--remove", "node1,node2,node3"},
	} {
		f.run(append([]string{"ring", "plan"}, args...)...).want(t, 2)
	}
	f.run("ring", "plan", "--remove", "nobody").want(t, 3)
	f.run("ring", "plan", "--remove", "node2,node3").want(t, 2, "2 nodes would be left with slots")
}

func TestRingPlanOfReplicas(t *testing.T) {
	f := newFake(t, 4)
	f.mu.Lock()
	for _, v := range f.mu.topology.GetRing() {
		v.Slots = v.Slots[:3]
	}
	f.mu.Unlock()
	f.holds()
	golden(t, "ring-plan-replicas", f.run("ring", "plan", "--replicas", "default=4").want(t, 0).stdout)
	d := decode(t, f.run("ring", "plan", "--replicas", "default=4", "-o", "json").want(t, 0).stdout)
	if moves := d["moves"].([]any); d["kind"] != "replicas" || d["from_n"] != 3.0 || d["n"] != 4.0 || len(moves) != 8 || moves[0].(map[string]any)["from"] != nil {
		t.Errorf("document %v", d)
	}
	f.run("ring", "plan", "--replicas", "default=2").want(t, 0, "nothing is copied")
	f.runWith(func(a *App) {
		a.Stdin = strings.NewReader(f.run("ring", "plan", "--replicas", "default=4", "-o", "json").stdout)
	}, "ring", "apply", "-").want(t, 2, "plan")
	for _, args := range [][]string{{"default"}, {"default=x"}, {"default=0"}, {"default=3"}, {"default=4", "--add", "1"}, {"default=4", "--out", "x"}} {
		f.run(append([]string{"ring", "plan", "--replicas"}, args...)...).want(t, 2)
	}
	f.run("ring", "plan", "--replicas", "default=5").want(t, 2, "N=5 needs 5 nodes with slots, there are 4")
	f.run("ring", "plan", "--replicas", "nope=2").want(t, 3, "nope")
}

// TestPlanCost: bytes are those of what is copied, the time that of the busiest node, and
// what gets worse is named.
func TestPlanCost(t *testing.T) {
	top := ringOf(t, "a", "b", "c", "a")
	top.Namespaces = append(top.Namespaces, topology.Namespace{ID: 2, Name: "one", N: 1})
	holds := ringUse{}
	for v := range top.Ring {
		for s, slot := range top.Ring[v].Slots {
			if holds[slot.Node] == nil {
				holds[slot.Node] = &nodeUse{}
			}
			u := holds[slot.Node]
			u.vnodes = append(u.vnodes, &adminv1.VnodeUse{NamespaceId: 1, Vnode: uint32(v), Bytes: 1 << 20})
			if s == 0 {
				u.vnodes = append(u.vnodes, &adminv1.VnodeUse{NamespaceId: 2, Vnode: uint32(v), Bytes: 64 << 20})
			}
		}
	}
	d, err := planRing(top, planRequest{remove: []string{"node2"}, strategy: "even"}, holds)
	if err != nil {
		t.Fatal(err)
	}
	want, in, touched := uint64(0), map[string]uint64{}, map[string]int{}
	for _, m := range d.Moves {
		size := uint64(1 << 20)
		if m.Slot == 0 {
			size += 64 << 20
		}
		want += size
		in[m.To.Node] += size
		touched[m.To.Node]++
		touched[m.From.Node]++
	}
	if d.Bytes == nil || *d.Bytes != want {
		t.Errorf("bytes %v, want %d", d.Bytes, want)
	}
	most := int64(0)
	for n, moves := range touched {
		most = max(most, int64(in[n])*1000/moveBandwidth, int64(moves+topology.MovesPerNode-1)/topology.MovesPerNode*2000)
	}
	if most = (most + 999) / 1000 * 1000; *d.EstimatedMs != most {
		t.Errorf("%d ms, want %d", *d.EstimatedMs, most)
	}
	if len(d.Violations) != 1 || !strings.Contains(d.Violations[0], "namespace default, N=3: two replicas would share a zone in 256 of 256 vnodes, now in 0") {
		t.Errorf("violations %q", d.Violations)
	}
	if len(d.Zones) != 3 || d.Zones[1].NodesBefore != 1 || d.Zones[1].NodesAfter != 0 || d.Zones[1].SlotsAfter != 0 {
		t.Errorf("zones %+v", d.Zones)
	}
}
