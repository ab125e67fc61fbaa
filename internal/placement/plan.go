package placement

import (
	"cmp"
	"slices"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// Of returns the nodes of all slots of a ring when the moves under way are done.
func Of(t *topology.Topology) Assignment {
	out := make(Assignment, len(t.Ring))
	for i := range t.Ring {
		for _, s := range t.Ring[i].Slots {
			out[i] = append(out[i], cmp.Or(s.Incoming, s.Node))
		}
	}
	return out
}

// Uses returns the N of each namespace.
func Uses(t *topology.Topology) (uses []int) {
	for i := range t.Namespaces {
		uses = append(uses, t.Namespaces[i].N)
	}
	return uses
}

// Substitute returns an assignment in which one node has the slots of another.
func Substitute(current Assignment, old, next uint64) Assignment {
	out := make(Assignment, len(current))
	for v := range current {
		out[v] = slices.Clone(current[v])
		for s, n := range out[v] {
			if n == old {
				out[v][s] = next
			}
		}
	}
	return out
}

// Moves returns what leads from one assignment to another, in an order in which each can
// be made after those before it.
func Moves(current, next Assignment) (out []topology.Move) {
	for v := range next {
		for _, s := range Turns(current[v], next[v]) {
			out = append(out, topology.Move{Vnode: uint32(v), Slot: s, From: current[v][s], To: next[v][s]})
		}
	}
	return out
}
