package cli

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// ringOf returns a ring of 256 vnodes on a node in each of some zones, with N=3.
func ringOf(t *testing.T, zones ...string) *topology.Topology {
	t.Helper()
	top := &topology.Topology{Epoch: 7, Vnodes: 256, Namespaces: []topology.Namespace{{ID: 1, Name: "default", N: 3}}}
	var nodes []placement.Node
	for i, z := range zones {
		top.Nodes = append(top.Nodes, topology.Node{Incarnation: uint64(i + 1), Name: fmt.Sprint("node", i+1), Zone: z, Role: topology.Data})
		nodes = append(nodes, placement.Node{ID: uint64(i + 1), Zone: z})
	}
	a, err := placement.Widen(nil, 256, nodes, 3)
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
			d, err := planRing(top, tc.r)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range d.Nodes {
				got = append(got, fmt.Sprint(n.Node, ":", n.After))
			}
			if diff := cmp.Diff(strings.Fields(tc.want), sortedBy(strings.Fields(tc.want), got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(d.Moves) != tc.moves || strings.Join(d.Forced, " ") != tc.forced {
				t.Errorf("%d moves, forced %v", len(d.Moves), d.Forced)
			}
		})
	}
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

func TestRingPlan(t *testing.T) {
	f := newFake(t, 4)
	golden(t, "ring-plan", f.run("ring", "plan", "--add", "1").want(t, 0).stdout)
	golden(t, "ring-plan-json", f.run("ring", "plan", "--add", "1", "-o", "json").want(t, 0).stdout)
	for _, args := range [][]string{
		{"--strategy", "odd"}, {"--add", "-1"}, {"--add", "5000"}, {"--add", "node1"}, {"--remove", "node1,node2,node3"},
	} {
		f.run(append([]string{"ring", "plan"}, args...)...).want(t, 2)
	}
	f.run("ring", "plan", "--remove", "nobody").want(t, 3)
}
