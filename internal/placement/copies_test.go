package placement_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// withCopies returns a topology of a data node, reporting nodes 2 to 9, and copies.
func withCopies(t *rapid.T, vnodes, copies int, at placement.Assignment) *topology.Topology {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 5, Vnodes: uint32(vnodes), Settings: topology.DefaultSettings().Proto()}
	pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: 1, Name: "n1", Role: topologyv1.Role_ROLE_DATA})
	for id := uint64(2); id < 10; id++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: id, Name: fmt.Sprint("r", id), Role: topologyv1.Role_ROLE_REPORTING})
	}
	ns := topology.FoundingNamespace(1)
	ns.ID, ns.Reporting = 1, topology.ReportingRules{Policy: topology.ReportingBlock, Copies: copies, Timeout: topology.DefaultReportingTimeout}
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	for v := range vnodes {
		vnode := &topologyv1.Vnode{Slots: []*topologyv1.Slot{{Node: 1, Phase: topologyv1.Phase_PHASE_STABLE}}}
		if v < len(at) {
			for _, n := range slices.Sorted(slices.Values(at[v])) {
				vnode.Copies = append(vnode.Copies, topology.Copy{Namespace: 1, Node: n, State: topology.InSync, Since: 3}.Proto())
			}
		}
		pb.Ring = append(pb.Ring, vnode)
	}
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// However reporting nodes come and go and rules change, every vnode has its copies on
// distinct nodes, nodes have the same number within one, and what is so stays so.
func TestCopiesAreSpread(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vnodes := 1 << rapid.IntRange(0, 6).Draw(t, "vnodes")
		var at placement.Assignment
		for range 4 {
			copies := rapid.IntRange(1, topology.MaxReportingCopies).Draw(t, "copies")
			var nodes []placement.Node
			for id := uint64(2); id < 10; id++ {
				if rapid.Bool().Draw(t, "there") {
					nodes = append(nodes, placement.Node{ID: id})
				}
			}
			top := withCopies(t, vnodes, copies, at)
			next, err := placement.Copies(top, &top.Namespaces[0], nodes)
			if err != nil {
				t.Fatal(err)
			}
			held := map[uint64]int{}
			for v := range next {
				if len(next[v]) != min(copies, len(nodes)) {
					t.Fatalf("vnode %d has copies on %v, want %d of %d nodes", v, next[v], copies, len(nodes))
				}
				for i, n := range next[v] {
					if slices.Contains(next[v][:i], n) || !slices.Contains(nodes, placement.Node{ID: n}) {
						t.Fatalf("vnode %d has copies on %v", v, next[v])
					}
					held[n]++
				}
			}
			least, most := vnodes, 0
			for _, n := range nodes {
				least, most = min(least, held[n.ID]), max(most, held[n.ID])
			}
			if len(nodes) > 0 && most-least > 1 {
				t.Fatalf("nodes have %v copies", held)
			}
			if again, err := placement.Copies(withCopies(t, vnodes, copies, next), &top.Namespaces[0], nodes); err != nil {
				t.Fatal(err)
			} else {
				for v := range again {
					if !slices.Equal(slices.Sorted(slices.Values(again[v])), slices.Sorted(slices.Values(next[v]))) {
						t.Fatalf("vnode %d: copies on %v go to %v for nothing", v, next[v], again[v])
					}
				}
			}
			at = next
		}
	})
}

// One node more takes its share and nothing else moves; so does what a node leaves behind.
func TestCopiesMoveNoMoreThanNeeded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const vnodes = 64
		n := rapid.IntRange(2, 7).Draw(t, "nodes")
		copies := rapid.IntRange(1, min(n, topology.MaxReportingCopies)).Draw(t, "copies")
		var nodes []placement.Node
		for id := range uint64(n) {
			nodes = append(nodes, placement.Node{ID: id + 2})
		}
		place := func(at placement.Assignment, nodes []placement.Node) placement.Assignment {
			top := withCopies(t, vnodes, copies, at)
			next, err := placement.Copies(top, &top.Namespaces[0], nodes)
			if err != nil {
				t.Fatal(err)
			}
			return next
		}
		differing := func(a, b placement.Assignment) (count int) {
			for v := range a {
				for _, n := range b[v] {
					if !slices.Contains(a[v], n) {
						count++
					}
				}
			}
			return count
		}
		at := place(nil, nodes)
		more := place(at, append(slices.Clone(nodes), placement.Node{ID: uint64(n) + 2}))
		if got, most := differing(at, more), (vnodes*copies+n)/(n+1); got > most {
			t.Fatalf("a node more has %d copies move, want at most %d", got, most)
		}
		if back := place(more, nodes); differing(more, back) != differing(at, more) {
			t.Fatalf("%d copies move as the node leaves, %d as it came", differing(more, back), differing(at, more))
		}
	})
}
