package placement

import (
	"cmp"
	"slices"
)

// Even returns an assignment to these nodes, which may be others than those of the
// current one: some new, some gone. A 0 in current is a slot without a node. What
// holds of the result for each N in uses, which must not exceed the slots of a vnode:
//
//   - the first N slots of a vnode lie in distinct zones where there are that many
//     zones with a node; otherwise no zone has two more of them than another one with
//     a free node;
//   - nodes have the same number of first N slots within one, within each zone and
//     over all of those whose zones do not force another share: see Share.
//
// Few slots change: those that must, for their node is gone or their zones changed,
// and those that a node with too many hands to one with too few. They can move one
// after the other, with no node in a vnode twice.
//
// Nodes are evened out along shortest cost-reducing paths (Harvey, Ladner, Lovász,
// Tamir, "Semi-matchings for bipartite graphs and load balancing", 2006), from nodes
// above their share to nodes below.
func Even(current Assignment, nodes []Node, uses []int) (Assignment, error) {
	e, err := newEvening(current, nodes, uses)
	if err != nil {
		return nil, err
	}
	for v := range e.slots {
		e.mend(v)
	}
	for g := range e.groups {
		e.balance(g)
	}
	return e.assignment(), nil
}

// Split returns an assignment in which every node without slots takes half of those of
// one that has most, of which zones let it take half; nothing else moves but what must.
// It is the cheapest way to add a node, and leaves three nodes and one as 33/17/33/17%.
// Otherwise it is as Even.
func Split(current Assignment, nodes []Node, uses []int) (Assignment, error) {
	e, err := newEvening(current, nodes, uses)
	if err != nil {
		return nil, err
	}
	for v := range e.slots {
		e.mend(v)
	}
	load := e.groups[len(e.groups)-1].load
	for n := range e.nodes {
		if load[n] > 0 {
			continue
		}
		var best []int // the fullest donors
		most := 0
		for donor := range e.nodes {
			if half := load[donor] / 2; half >= max(most, 1) && len(e.takeable(donor, n)) >= half {
				if half > most {
					best = best[:0]
				}
				most = half
				best = append(best, donor)
			}
		}
		if len(best) == 0 {
			continue // zones give it no half of anything
		}
		donor := best[len(best)/2]
		halves := make([]int, len(e.groups))
		for i, before := 0, 0; i < len(halves); i++ {
			halves[i] = (e.groups[i].load[donor] - before) / 2
			before = e.groups[i].load[donor]
		}
		for i, g := range e.groups {
			for _, p := range e.takeable(donor, n) {
				if halves[i] > 0 && p.slot >= g.first && p.slot < g.n {
					e.set(p, n)
					halves[i]--
				}
			}
		}
	}
	return e.assignment(), nil
}

// takeable returns the places that one node could take from another, from the end of
// the ring on.
func (e *evening) takeable(from, to int) (out []place) {
	for v := len(e.slots) - 1; v >= 0; v-- {
		for s, n := range e.slots[v] {
			if n == from && e.allowed(place{v, s}, to) {
				out = append(out, place{v, s})
			}
		}
	}
	return out
}

// place is a slot of a vnode.
type place struct{ vnode, slot int }

// group is the slots that one of the uses has more than the one before it.
type group struct {
	first, n int // slots first to n-1
	zone     []Bounds
	share    []Share // by zone
	load     []int   // by node, of the first n slots
}

// evening is an assignment that is being evened out. Nodes and zones are indexes; a
// slot without a node has none.
type evening struct {
	*zones
	nodes  []Node
	slots  [][]int
	was    [][]int // slots at first
	moves  []int   // by vnode: how many of its slots have changed
	groups []*group
	// holds are the places of each node, and some that it has handed on.
	holds [][]place
	// swaps is set once nodes may take another slot of a vnode than they had.
	swaps bool
	// widens is set while a slot may exchange nodes with one behind it. While last is, it can
	// only do so with that slot.
	widens bool
	last   int
	// weigh is set where slots are weighed rather than counted.
	weigh *weighing
}

const none = -1

func newEvening(current Assignment, nodes []Node, uses []int) (*evening, error) {
	sorted := slices.Clone(nodes)
	slices.SortFunc(sorted, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	e := &evening{zones: newZones(sorted), nodes: sorted, slots: make([][]int, len(current)), holds: make([][]place, len(nodes))}
	index := make(map[uint64]int, len(nodes))
	for i, n := range sorted {
		index[n.ID] = i
	}
	width := 0
	for v, ids := range current {
		e.slots[v] = make([]int, len(ids))
		width = max(width, len(ids))
		for s, id := range ids {
			e.slots[v][s] = none
			if n, ok := index[id]; ok {
				e.slots[v][s] = n
				e.holds[n] = append(e.holds[n], place{v, s})
			}
		}
	}
	if width > len(nodes) {
		return nil, tooFew(width, len(nodes))
	}
	e.moves = make([]int, len(e.slots))
	for _, slots := range e.slots {
		e.was = append(e.was, slices.Clone(slots))
	}
	e.group(append(slices.Clone(uses), width)) // what nobody uses yet must have nodes too
	return e, nil
}

// group divides the slots by their uses.
func (e *evening) group(uses []int) {
	slices.Sort(uses)
	e.groups = nil
	first := 0
	for _, n := range slices.Compact(uses) {
		g := &group{first: first, n: n, zone: e.bounds(n), share: e.shares(len(e.slots), n), load: make([]int, len(e.nodes))}
		for _, slots := range e.slots {
			for _, node := range slots[:n] {
				if node != none {
					g.load[node]++
				}
			}
		}
		e.groups = append(e.groups, g)
		first = n
	}
}

func (e *evening) assignment() Assignment {
	out := make(Assignment, len(e.slots))
	for v, slots := range e.slots {
		for _, n := range slots {
			out[v] = append(out[v], e.nodes[n].ID)
		}
	}
	return out
}

// set gives a slot another node, or none.
func (e *evening) set(p place, node int) {
	old := e.slots[p.vnode][p.slot]
	was := e.moved(p)
	e.slots[p.vnode][p.slot] = node
	switch now := e.moved(p); {
	case now && !was:
		e.moves[p.vnode]++
	case was && !now:
		e.moves[p.vnode]--
	}
	if node != none {
		e.holds[node] = append(e.holds[node], p)
	}
	e.weigh.moved(p, old, node)
	for _, g := range e.groups {
		if p.slot >= g.n {
			continue
		}
		if old != none {
			g.load[old]--
		}
		if node != none {
			g.load[node]++
		}
	}
}

// give gives a slot another node. Where a slot behind it has that one, they exchange.
func (e *evening) give(p place, node int) {
	if at := slices.Index(e.slots[p.vnode], node); at >= 0 {
		e.set(place{p.vnode, at}, e.slots[p.vnode][p.slot])
	}
	e.set(p, node)
}

// moved reports whether a slot has another node than at first.
func (e *evening) moved(p place) bool {
	return e.slots[p.vnode][p.slot] != e.was[p.vnode][p.slot]
}

// within counts how many of a vnode's first n slots lie in a zone.
func (e *evening) within(vnode, n, zone int) (count int) {
	for _, node := range e.slots[vnode][:n] {
		if node != none && e.of[node] == zone {
			count++
		}
	}
	return count
}

// mend gives nodes to the slots of a vnode that have none, and others to those that
// its zones have too many of. Two nodes of a vnode cannot change slots, so one slot more
// may have to move to get the zones right.
func (e *evening) mend(v int) {
	e.fill(v)
	for s := len(e.was[v]) - 1; s >= 0 && !e.fair(v); s-- {
		for i, n := range e.was[v] {
			e.set(place{v, i}, n)
		}
		e.set(place{v, s}, none)
		e.fill(v)
	}
}

// fair reports whether a vnode's slots lie in the zones that they should.
func (e *evening) fair(v int) bool {
	for _, g := range e.groups {
		for zone, b := range g.zone {
			if have := e.within(v, g.n, zone); have < b.Least || have > b.Most {
				return false
			}
		}
	}
	return true
}

// fill is mend as far as it goes with as few moves as can be.
func (e *evening) fill(v int) {
	for _, g := range e.groups {
		for zone, b := range g.zone {
			for e.within(v, g.n, zone) > b.Most && e.drop(v, g, func(z int) bool { return z == zone }) {
			}
		}
		lacks := 0
		for zone, b := range g.zone {
			lacks += max(0, b.Least-e.within(v, g.n, zone))
		}
		for _, node := range e.slots[v][g.first:g.n] {
			if node == none {
				lacks--
			}
		}
		for lacks > 0 && e.drop(v, g, func(z int) bool { return e.within(v, g.n, z) > g.zone[z].Least }) {
			lacks--
		}
		for s := g.first; s < g.n; s++ {
			if e.slots[v][s] != none {
				continue
			}
			n := e.choose(place{v, s}, g, v)
			if behind := slices.Index(e.slots[v], n); behind >= 0 {
				e.set(place{v, behind}, none)
			}
			e.set(place{v, s}, n)
		}
	}
}

// drop takes a slot of a group from the fullest node in one of some zones.
func (e *evening) drop(v int, g *group, from func(zone int) bool) bool {
	drop := none
	for s := g.first; s < g.n; s++ {
		if n := e.slots[v][s]; n != none && from(e.of[n]) && (drop == none || e.load(g, n) > e.load(g, e.slots[v][drop])) {
			drop = s
		}
	}
	if drop == none {
		return false
	}
	e.set(place{v, drop}, none)
	return true
}

// choose returns the node to get a slot of a group: one that the vnode does not name,
// in a zone that it needs, else in one that it may use, else in any; of these the one
// that is furthest below its share, and of equals the first from start on. Where only slots
// behind the group have nodes of such zones, one is taken from there.
func (e *evening) choose(p place, g *group, start int) int {
	const usable, full = 1, 2
	state := make([]int, len(e.names))
	for zone, b := range g.zone {
		switch have := e.within(p.vnode, g.n, zone); {
		case have < b.Least:
		case have < b.Most:
			state[zone] = usable
		default:
			state[zone] = full
		}
	}
	best, rank := none, 0
	for i := range e.nodes {
		n := (i + start) % len(e.nodes)
		r := 2 * state[e.of[n]]
		better := func() bool {
			return best == none || r < rank || r == rank && e.above(g, n) < e.above(g, best)
		}
		named := r == 0 && e.named(p, n)
		if !named && !better() {
			continue
		}
		if named || e.named(p, n) {
			switch at := slices.Index(e.slots[p.vnode], n); {
			case at < 0 && r == 0 && !e.others(p, e.of[n]) && e.inTurn(p, n):
				r-- // before another slot is in its way
			case at < g.n || state[e.of[n]] == full:
				continue
			default:
				r++
			}
		}
		if better() {
			best, rank = n, r
		}
	}
	return best
}

// load is what a node has of the first slots up to a group, or in all where slots are
// weighed.
func (e *evening) load(g *group, n int) int {
	if e.weigh != nil {
		return e.weigh.held[n]
	}
	return g.load[n]
}

// above is by how much a node exceeds its share.
func (e *evening) above(g *group, n int) int {
	if e.weigh != nil {
		return e.weigh.above(n)
	}
	return g.load[n] - g.share[e.of[n]].Most
}

// named reports whether a vnode names a node already, or did so at first for another
// slot: it would move for nothing.
func (e *evening) named(p place, node int) bool {
	at := slices.Index(e.was[p.vnode], node)
	return at >= 0 && at != p.slot || slices.Contains(e.slots[p.vnode], node)
}

// others reports whether a zone has nodes that a vnode does not name.
func (e *evening) others(p place, zone int) bool {
	for n, z := range e.of {
		if z == zone && !e.named(p, n) {
			return true
		}
	}
	return false
}

// inTurn reports whether the slots of a vnode can move one after the other without a
// node being there twice, when one of them goes to a node.
func (e *evening) inTurn(p place, node int) bool {
	to := slices.Clone(e.slots[p.vnode])
	to[p.slot] = node
	return e.inOrder(p.vnode, to)
}

// inOrder is inTurn for all that a vnode's slots are to be.
func (e *evening) inOrder(vnode int, to []int) bool {
	from := slices.Clone(e.was[vnode])
	for s, n := range to {
		if n == none {
			from[s] = none // it will be a node's that is not there
		}
	}
	_, all := turns(from, to)
	return all
}

// Turns returns the slots of a vnode that get another node, in an order in which each can
// move with no node there twice. Plans have one; where there is none, those that cannot
// move come last.
func Turns(from, to []uint64) []int {
	at := slices.Clone(from)
	order, _ := turns(at, to)
	for s, n := range to {
		if at[s] != n {
			order = append(order, s)
		}
	}
	return order
}

// turns is Turns, and reports whether all slots can move. It changes from.
func turns[N comparable](from, to []N) (order []int, all bool) {
	for left := len(to); ; {
		before := left
		left = 0
		for s, n := range to {
			switch {
			case from[s] == n:
			case slices.Contains(from, n):
				left++
			default:
				from[s] = n
				order = append(order, s)
			}
		}
		if left == 0 || left == before {
			return order, left == 0
		}
	}
}

// allowed reports whether a slot may go to another node.
func (e *evening) allowed(p place, to int) bool {
	slots := e.slots[p.vnode]
	until := len(slots)
	if at := slices.Index(slots, to); at > p.slot && (e.widens || e.last > 0) {
		until = at // they exchange: the first slots up to there have the same nodes then
	} else if e.named(p, to) && !(e.swaps && !slices.Contains(slots, to) && e.inTurn(p, to)) {
		return false
	}
	return e.fits(p, e.of[to], until)
}

// fits reports whether a slot may go to a node of a zone: no group that ends at a slot or
// before it then has too few of one zone or too many of the other.
func (e *evening) fits(p place, zone, until int) bool {
	old := e.of[e.slots[p.vnode][p.slot]]
	if old == zone {
		return true
	}
	for _, g := range e.groups {
		if p.slot < g.n && g.n <= until && (e.within(p.vnode, g.n, old) <= g.zone[old].Least || e.within(p.vnode, g.n, zone) >= g.zone[zone].Most) {
			return false
		}
	}
	return true
}

// balance brings every node's load of a group to its share, as far as there is a way:
// by slots that move anyway, else by others of the group, else by those before it too,
// at last by nodes that change slots within a vnode.
func (e *evening) balance(group int) {
	g := e.groups[group]
	ofGroup := func(p place) bool { return p.slot >= g.first && p.slot < g.n }
	within := func(p place) bool { return p.slot < g.n }
	for pass, may := range []func(place) bool{func(p place) bool { return ofGroup(p) && e.moved(p) }, ofGroup, within, within} {
		e.swaps = pass == 3
		e.level(g, may)
	}
}

// level brings every node's load of a group to its share, as far as there is a way by
// slots that may move.
func (e *evening) level(g *group, may func(place) bool) {
	least := func(n int) int { return g.share[e.of[n]].Least }
	most := func(n int) int { return g.share[e.of[n]].Most }
	below := func(n int) bool { return g.load[n] < least(n) }
	nodes := make([]int, len(e.nodes))
	for n := range nodes {
		nodes[n] = n
		for g.load[n] > most(n) && (e.shed(may, []int{n}, below) || e.shed(may, []int{n}, func(n int) bool { return g.load[n] < most(n) })) {
		}
	}
	above := func() []int {
		return slices.DeleteFunc(slices.Clone(nodes), func(n int) bool { return g.load[n] <= least(n) })
	}
	for slices.ContainsFunc(nodes, below) && e.shed(may, above(), below) {
	}
}

// even reports whether every node has its share of a group.
func (e *evening) even(g *group) bool {
	for n, load := range g.load {
		if s := g.share[e.of[n]]; load < s.Least || load > s.Most {
			return false
		}
	}
	return true
}

// shed searches breadth first for the shortest way by which one of some nodes hands a
// slot to a node that takes it, if need be through others, and goes it. Slots are those
// that may move.
func (e *evening) shed(may func(place) bool, from []int, takes func(node int) bool) bool {
	type step struct {
		from int
		by   place
	}
	came := make([]*step, len(e.nodes))
	var queue []int
	unseen := make([][]int, len(e.names)) // by zone
	starts := make([]bool, len(e.nodes))
	for _, n := range from {
		starts[n] = true
	}
	// Nodes that take one come first in each zone.
	for _, wanted := range []bool{true, false} {
		for n, zone := range e.of {
			if !starts[n] && takes(n) == wanted {
				unseen[zone] = append(unseen[zone], n)
			}
		}
	}
	// used reports whether a vnode is on the way to a node: one that changed would not
	// be what the search saw.
	used := func(n, vnode int) bool {
		for s := came[n]; s != nil; s = came[s.from] {
			if s.by.vnode == vnode {
				return true
			}
		}
		return false
	}
	// reach notes the way to a node, and goes it where that takes a slot.
	reach := func(n int, p place, to int) bool {
		came[to] = &step{n, p}
		queue = append(queue, to)
		if !takes(to) {
			return false
		}
		for s := came[to]; s != nil; to, s = s.from, came[s.from] {
			e.give(s.by, to)
		}
		return true
	}
	queue = append(queue, from...)
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		e.holds[n] = slices.DeleteFunc(e.holds[n], func(p place) bool { return e.slots[p.vnode][p.slot] != n })
		// One move in each of two vnodes is done sooner than two in one of them.
		slices.SortStableFunc(e.holds[n], func(a, b place) int { return cmp.Compare(e.moves[a.vnode], e.moves[b.vnode]) })
		for _, p := range e.holds[n] {
			if !may(p) || used(n, p.vnode) {
				continue
			}
			if e.last > 0 {
				if to := e.slots[p.vnode][e.last]; !starts[to] && came[to] == nil && e.allowed(p, to) && reach(n, p, to) {
					return true
				}
				continue
			}
			for zone := range unseen {
				if !e.widens && !e.fits(p, zone, len(e.slots[p.vnode])) {
					continue // not one of its nodes
				}
				left := unseen[zone][:0]
				for _, to := range unseen[zone] {
					if !e.allowed(p, to) {
						left = append(left, to)
						continue
					}
					if reach(n, p, to) {
						return true
					}
				}
				unseen[zone] = left
			}
		}
	}
	return false
}
