// Package placement decides which node holds which slot of which vnode. It is
// pure: it maps nodes and the present assignment to a new one, always the same
// for the same input, and never carries a move out.
package placement

import (
	"cmp"
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

// attempts is how many plans are made at most. Where zones hardly leave a choice, a
// plan can end uneven for some number of slots, in about one of ten thousand cases.
const attempts = 8

// Widen gives every vnode the slots it lacks up to width and leaves present slots
// as they are. No current assignment founds the ring. What holds of the result:
//
//   - the nodes of a vnode are distinct, and its first N slots lie in distinct
//     zones for every N up to width where there are that many zones; otherwise no
//     zone has two more of them than another one with a free node;
//   - nodes have the same number of slots within one, and also of the first N slots
//     for every smaller N, as far as zones and present slots allow it.
//
// First every vnode gets a set of nodes; then, from the last slot to the first,
// each vnode chooses which of its nodes stands there; at last, from the first slot
// to the last, what is still uneven is exchanged with nodes further behind. All
// three balance nodes by cost-reducing paths (Harvey, Ladner, Lovász, Tamir,
// "Semi-matchings for bipartite graphs and load balancing", 2006).
func Widen(current Assignment, vnodes int, nodes []Node, width int) (Assignment, error) {
	if width > len(nodes) {
		return nil, tooFew(width, len(nodes))
	}
	sorted := slices.Clone(nodes)
	slices.SortFunc(sorted, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	var p *plan
	for attempt, least := 0, vnodes; attempt < attempts && least > 1; attempt++ {
		q := newPlan(sorted, current, vnodes)
		q.make(width, attempt)
		if s := q.spread(width); s < least || p == nil {
			p, least = q, s
		}
	}
	out := make(Assignment, vnodes)
	for v, slots := range p.slots {
		for _, n := range slots[:max(width, p.fixed[v])] {
			out[v] = append(out[v], sorted[n].ID)
		}
	}
	return out, nil
}

// plan is an assignment in the making. Nodes and zones are indexes.
type plan struct {
	zoneOf   []int
	zoneSize []int
	// slots holds the nodes of each vnode, of which the first fixed stay.
	slots [][]int
	fixed []int
	// load is how many slots each node has, of those under consideration.
	load []int
}

func newPlan(nodes []Node, current Assignment, vnodes int) *plan {
	p := &plan{zoneOf: make([]int, len(nodes)), slots: make([][]int, vnodes), fixed: make([]int, vnodes), load: make([]int, len(nodes))}
	zones := map[string]int{}
	index := make(map[uint64]int, len(nodes))
	for i, n := range nodes {
		z, ok := zones[n.Zone]
		if !ok {
			z = len(zones)
			zones[n.Zone] = z
			p.zoneSize = append(p.zoneSize, 0)
		}
		p.zoneOf[i] = z
		p.zoneSize[z]++
		index[n.ID] = i
	}
	for v := range current {
		for _, id := range current[v] {
			n := index[id]
			p.slots[v] = append(p.slots[v], n)
			p.load[n]++
		}
		p.fixed[v] = len(p.slots[v])
	}
	return p
}

// make fills the vnodes up to width. Every attempt begins otherwise.
func (p *plan) make(width, attempt int) {
	ahead := min(len(p.load), max(width, horizon))
	p.grow(ahead, attempt)
	for n := ahead; n > 1; n-- {
		p.order(n)
	}
	for n := 1; n <= width; n++ {
		p.settle(n)
	}
}

// spread returns by how many slots nodes of one zone differ, at most, in the first n
// slots for any n up to width.
func (p *plan) spread(width int) int {
	worst := 0
	load := make([]int, len(p.load))
	for n := range width {
		for _, slots := range p.slots {
			load[slots[n]]++
		}
		for a, z := range p.zoneOf {
			for b, other := range p.zoneOf {
				if z == other {
					worst = max(worst, load[a]-load[b])
				}
			}
		}
	}
	return worst
}

// grow gives every vnode a set of n nodes, then evens out the nodes' shares by
// exchanging one node of a set for another.
func (p *plan) grow(n, attempt int) {
	for level := range n {
		for v := range p.slots {
			if len(p.slots[v]) != level {
				continue
			}
			candidates := p.eligible(v)
			// Starting the search at another place for every vnode spreads the pairs of
			// nodes that share vnodes, so that many share the work of a lost one.
			start := v*(level+1) + v/len(p.load) + attempt*(v%7)
			best := candidates[start%len(candidates)]
			for i := range candidates {
				if c := candidates[(start+i)%len(candidates)]; p.load[c] < p.load[best] {
					best = c
				}
			}
			p.slots[v] = append(p.slots[v], best)
			p.load[best]++
		}
	}
	p.balance(func(node int, visit func(vnode, other int)) {
		for v, slots := range p.slots {
			i := slices.Index(slots, node)
			if i < p.fixed[v] {
				continue // absent, or it stays
			}
			for other := range p.load {
				if !slices.Contains(slots, other) && p.fairAfter(slots, i, other) {
					visit(v, other)
				}
			}
		}
	}, func(vnode, node, other int) bool {
		slots := p.slots[vnode]
		i := slices.Index(slots, node)
		if !p.fairAfter(slots, i, other) {
			return false
		}
		slots[i] = other
		return true
	})
}

// order chooses for every vnode which of its first n nodes stands last, so that
// the nodes' shares of the slots before it are even.
func (p *plan) order(n int) {
	for i := range p.load {
		p.load[i] = 0
	}
	for v, slots := range p.slots {
		for _, node := range slots[:n] {
			p.load[node]++
		}
		// Begin with the fullest node that may stand last.
		last := n - 1
		for i := p.fixed[v]; i < n; i++ {
			if p.fairWithout(slots[:n], i) && (!p.fairWithout(slots[:n], last) || p.load[slots[i]] > p.load[slots[last]]) {
				last = i
			}
		}
		slots[last], slots[n-1] = slots[n-1], slots[last]
	}
	for _, slots := range p.slots {
		p.load[slots[n-1]]--
	}
	p.balance(func(node int, visit func(vnode, other int)) {
		for v, slots := range p.slots {
			if i := slices.Index(slots[:n-1], node); i >= p.fixed[v] && p.fixed[v] < n && p.fairWithout(slots[:n], i) {
				visit(v, slots[n-1])
			}
		}
	}, func(vnode, node, other int) bool {
		slots := p.slots[vnode]
		i := slices.Index(slots[:n-1], node)
		if i < 0 || slots[n-1] != other || !p.fairWithout(slots[:n], i) {
			return false
		}
		slots[i], slots[n-1] = slots[n-1], slots[i]
		return true
	})
}

// balance takes a slot from a node and gives it to one with at least two slots
// less, through others where there is no direct way, until no node can shed one.
// edges visits the exchanges by which a node can pass one slot on; apply makes
// one, and may refuse when an earlier step of the same path forbids it.
func (p *plan) balance(edges func(node int, visit func(vnode, other int)), apply func(vnode, node, other int) bool) {
	stuck := make([]bool, len(p.load))
	for {
		source := -1
		for n := range p.load {
			if !stuck[n] && (source < 0 || p.load[n] > p.load[source]) {
				source = n
			}
		}
		if source < 0 || p.load[source] <= slices.Min(p.load)+1 {
			return
		}
		if !p.shed(source, edges, apply) {
			stuck[source] = true
			continue
		}
		clear(stuck)
	}
}

// shed searches breadth first for a path by which source loses a slot, and walks
// it from its end.
func (p *plan) shed(source int, edges func(node int, visit func(vnode, other int)), apply func(vnode, node, other int) bool) bool {
	// via is the vnode by which a node was reached, from the node before it.
	via := make([]int, len(p.load))
	from := make([]int, len(p.load))
	for n := range via {
		via[n] = -1
	}
	queue := []int{source}
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		if p.load[n] <= p.load[source]-2 {
			return p.walk(source, n, via, from, apply)
		}
		edges(n, func(vnode, other int) {
			if other != source && via[other] < 0 {
				via[other], from[other] = vnode, n
				queue = append(queue, other)
			}
		})
	}
	return false
}

// walk makes the exchanges of a path from its end to source. Should a step be
// refused, the steps made so far still leave every vnode fair; the node before
// the refused step then has one slot more, unless nothing was moved at all.
func (p *plan) walk(source, end int, via, from []int, apply func(vnode, node, other int) bool) bool {
	for n := end; n != source; n = from[n] {
		if !apply(via[n], from[n], n) {
			return n != end
		}
		p.load[n]++
		p.load[from[n]]--
	}
	return true
}

// settle gives slot n of every vnode to one of the nodes behind it or outside, so
// that the nodes' shares of the first n slots are even. The slots before it stay.
func (p *plan) settle(n int) {
	clear(p.load)
	for _, slots := range p.slots {
		for _, node := range slots[:n] {
			p.load[node]++
		}
	}
	p.balance(func(node int, visit func(vnode, other int)) {
		for v, slots := range p.slots {
			if p.fixed[v] >= n || slots[n-1] != node {
				continue
			}
			for other := range p.load {
				if _, ok := p.exchange(slots, n-1, other); ok {
					visit(v, other)
				}
			}
		}
	}, func(vnode, node, other int) bool {
		slots := p.slots[vnode]
		if slots[n-1] != node {
			return false
		}
		changed, ok := p.exchange(slots, n-1, other)
		copy(slots, changed)
		return ok
	})
}

// exchange returns slots with another node at place i, and the one that was there
// in its place when it has one behind i. It refuses what would not be fair.
func (p *plan) exchange(slots []int, i, other int) ([]int, bool) {
	j := slices.Index(slots, other)
	if j >= 0 && j <= i {
		return nil, false
	}
	changed := slices.Clone(slots)
	changed[i] = other
	until := len(slots)
	if j >= 0 {
		changed[j], until = slots[i], j
	}
	for n := i + 1; n <= until; n++ {
		if !p.fair(p.zones(changed[:n])) {
			return nil, false
		}
	}
	return changed, true
}

// eligible returns the nodes that may join a vnode's set: those it does not have
// yet, in the zones it has least of.
func (p *plan) eligible(v int) []int {
	used := p.zones(p.slots[v])
	least := len(p.load)
	for z, size := range p.zoneSize {
		if used[z] < size {
			least = min(least, used[z])
		}
	}
	var out []int
	for n, z := range p.zoneOf {
		if used[z] == least && !slices.Contains(p.slots[v], n) {
			out = append(out, n)
		}
	}
	return out
}

func (p *plan) zones(slots []int) []int {
	used := make([]int, len(p.zoneSize))
	for _, n := range slots {
		used[p.zoneOf[n]]++
	}
	return used
}

// fair reports whether no zone is used twice more than another with a free node.
func (p *plan) fair(used []int) bool {
	for z, size := range p.zoneSize {
		if used[z] < size && used[z]+1 < slices.Max(used) {
			return false
		}
	}
	return true
}

// fairAfter reports whether slots stay fair with slot i given to another node.
func (p *plan) fairAfter(slots []int, i, other int) bool {
	if p.zoneOf[slots[i]] == p.zoneOf[other] {
		return true
	}
	used := p.zones(slots)
	used[p.zoneOf[slots[i]]]--
	used[p.zoneOf[other]]++
	return p.fair(used)
}

// fairWithout reports whether slots stay fair without slot i.
func (p *plan) fairWithout(slots []int, i int) bool {
	used := p.zones(slots)
	used[p.zoneOf[slots[i]]]--
	return p.fair(used)
}
