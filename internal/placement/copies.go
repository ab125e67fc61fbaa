package placement

import (
	"slices"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// Copies returns which reporting nodes are to have the copies of each vnode of a
// namespace: as many as its rules say, or as there are nodes, spread as by Even, each
// where it is already as far as that allows.
func Copies(t *topology.Topology, ns *topology.Namespace, nodes []Node) (Assignment, error) {
	want := min(ns.Reporting.Copies, len(nodes))
	current := make(Assignment, len(t.Ring))
	if want == 0 {
		return current, nil
	}
	stays := func(node uint64) bool { return slices.ContainsFunc(nodes, func(n Node) bool { return n.ID == node }) }
	for v := range current {
		current[v] = make([]uint64, 0, want)
		// The best first, should there be too many.
		copies := slices.Clone(t.Copies(uint32(v), ns.ID))
		slices.SortStableFunc(copies, func(a, b topology.Copy) int { return worth(b.State) - worth(a.State) })
		for _, c := range copies {
			if len(current[v]) < want && stays(c.Node) {
				current[v] = append(current[v], c.Node)
			}
		}
		current[v] = current[v][:want]
	}
	return Even(current, nodes, []int{want})
}

// worth tells how much of a copy would have to be made again elsewhere.
func worth(s topology.CopyState) int {
	return slices.Index([]topology.CopyState{topology.Filling, topology.Behind, topology.Evicting, topology.Joining, topology.InSync}, s)
}
