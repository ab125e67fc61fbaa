// Package placement decides which node holds which slot of which vnode. It is
// pure: it maps nodes and the present assignment to a new one, always the same
// for the same input, and never carries a move out.
package placement

import (
	"errors"
	"fmt"
	"slices"
)

// Node is a node as placement sees it.
type Node struct {
	ID   uint64
	Zone string
}

// Assignment holds the ordered nodes of every vnode's slots.
type Assignment [][]uint64

// ErrTooFewNodes is returned when a vnode would need one node twice.
var ErrTooFewNodes = errors.New("fewer nodes than slots")

func tooFew(slots, nodes int) error {
	return fmt.Errorf("%w: %d slots, %d nodes", ErrTooFewNodes, slots, nodes)
}

// horizon is how many slots are planned ahead: a choice that is even for three
// replicas can make five uneven.
const horizon = 5

// attempts is how often a ring is founded at most. Where zones leave little choice, a plan
// can end with a slot too many in a zone, in about one of two thousand cases.
const attempts = 8

// Widen gives every vnode the slots it lacks up to width and leaves present slots
// as they are. No current assignment founds the ring. What holds of the result:
//
//   - the nodes of a vnode are distinct, and its first N slots lie in distinct
//     zones for every N up to width where there are that many zones; otherwise no
//     zone has two more of them than another one with a free node;
//   - nodes have what Shares says of the first N slots, for every N up to width, as
//     far as present slots allow it.
//
// First every vnode gets a set of nodes; then, from the last slot to the first,
// each vnode chooses which of its nodes stands there; at last, from the first slot
// to the last, what is still uneven is exchanged with nodes further behind, or with
// others. Nodes are evened out as by Even.
func Widen(current Assignment, vnodes int, nodes []Node, width int) (Assignment, error) {
	if width > len(nodes) {
		return nil, tooFew(width, len(nodes))
	}
	for attempt := 0; ; attempt++ {
		out, even, err := widen(current, vnodes, nodes, width, attempt)
		// Present slots can forbid that it is even.
		if err != nil || even || len(current) > 0 || attempt == attempts-1 {
			return out, err
		}
	}
}

// widen makes a plan of Widen, with every attempt another one, and reports whether all
// nodes have their shares.
func widen(current Assignment, vnodes int, nodes []Node, width, attempt int) (out Assignment, even bool, _ error) {
	ahead := min(len(nodes), max(width, horizon))
	out = make(Assignment, vnodes)
	padded := make(Assignment, vnodes)
	for v := range out {
		if v < len(current) {
			out[v] = slices.Clone(current[v])
		}
		padded[v] = make([]uint64, ahead)
		copy(padded[v], out[v])
	}
	e, err := newEvening(padded, nodes, nil)
	if err != nil {
		return nil, false, err
	}
	added := func(p place) bool { return p.slot >= len(out[p.vnode]) }
	set := e.groups[0]
	for s := range ahead {
		for v := range out {
			if p := (place{v, s}); added(p) {
				// Starting the search at another place for every vnode spreads the pairs of nodes
				// that share vnodes, so that many share the work of a lost one.
				e.set(p, e.choose(p, set, v*(s+1)+v/len(nodes)+attempt*(v%7)))
			}
		}
	}
	e.level(set, added)
	for e.last = ahead - 1; e.last > 0; e.last-- {
		e.group([]int{e.last})
		for v := range out {
			if added(place{v, e.last}) {
				e.chooseLast(v, len(out[v]))
			}
		}
		e.level(e.groups[0], func(p place) bool { return p.slot < e.last && added(p) })
	}
	var uses []int
	for n := range ahead {
		uses = append(uses, n+1)
	}
	e.group(uses)
	e.widens, even = true, true
	for n := range width {
		e.level(e.groups[n], func(p place) bool { return p.slot == n && added(p) })
		for v := range out {
			if added(place{v, n}) {
				out[v] = append(out[v], e.nodes[e.slots[v][n]].ID)
			}
		}
		even = even && e.even(e.groups[n])
	}
	return out, even, nil
}

// chooseLast puts the node behind a vnode's first slots, those of the only group, that is
// furthest above its share of them: one of those from a slot on, and in a zone that the
// first slots would have too much of, or can spare.
func (e *evening) chooseLast(v, from int) {
	const spare, needed = 1, 2
	g, slots := e.groups[0], e.slots[v]
	order := func(s int) (zone, above int) {
		z := e.of[slots[s]]
		switch have := e.within(v, g.n+1, z); {
		case have <= g.zone[z].Least:
			zone = needed
		case have <= g.zone[z].Most:
			zone = spare
		}
		above = e.above(g, slots[s])
		if s == g.n {
			above++ // as it would be among the first
		}
		return zone, above
	}
	last := g.n
	zone, above := order(last)
	for s := from; s < g.n; s++ {
		if z, a := order(s); z < zone || z == zone && a > above {
			last, zone, above = s, z, a
		}
	}
	if last != g.n {
		e.give(place{v, last}, slots[g.n])
	}
}
