package placement

import (
	"cmp"
	"slices"
)

const (
	// slackParts: a ring is let alone while nobody is off by more than one of so many parts
	// of the nodes' mean, or no step is worth as much. Once it is not, steps that are worth
	// one of fineParts follow. What is between them is how much weights may change before
	// anything moves again.
	slackParts, fineParts = 20, 200
	// lightParts: a slot counts as one of so many parts of the slots' mean at least, so that
	// empty vnodes are spread too.
	lightParts = 64
)

// Weighted is Even with what slots hold in place of how many they are: weights[i][v] is
// what vnode v holds of all that has the N of uses[i], on each of its first N slots. With
// the same for all vnodes it is Even. Zones are as strict. With one N in use:
//
//   - no node is off its share by more than what the heaviest vnode weighs and a twentieth of
//     the nodes' mean. Shares follow from zones by the same rule as Even's. In one zone that
//     is so because the fuller of two nodes has a vnode that the other has not, and handing
//     it over would be worth more; with several, tests find nothing worse;
//   - once something had to be evened out, a node exceeds another that could take a slot of
//     it by the lightest of these, and a two hundredth of the mean, at most. So what is left
//     is mostly far less than the heaviest.
//
// It settles: what had to move is placed where it is needed, and apart from that nothing
// moves until a step is worth a twentieth of the nodes' mean to the two nodes that it is
// between. So nothing moves again while weights change by a few percent.
//
// Slots go, one after the other, from nodes above their share to those furthest below, and
// overshoot neither while there are some that do not, so that little more moves than has to.
// Each step lowers the sum of the squares of what nodes are off by, so it ends.
func Weighted(current Assignment, nodes []Node, uses []int, weights [][]uint64) (Assignment, error) {
	if !slices.ContainsFunc(weights, func(w []uint64) bool { return len(slices.Compact(slices.Clone(w))) > 1 }) {
		return Even(current, nodes, uses)
	}
	e, err := newEvening(current, nodes, uses)
	if err != nil {
		return nil, err
	}
	w := newWeighing(e, uses, weights)
	e.weigh = w
	vnodes := make([]int, len(e.slots))
	for v := range vnodes {
		vnodes[v] = v
	}
	slices.SortStableFunc(vnodes, func(a, b int) int { return cmp.Compare(w.slots[b][0], w.slots[a][0]) })
	for _, v := range vnodes {
		e.mend(v)
	}
	mean := w.total / len(nodes)
	e.weighOut(e.moved, max(1, mean/fineParts))
	if e.worthwhile(mean / slackParts) {
		e.weighOut(func(place) bool { return true }, max(1, mean/fineParts))
	}
	return e.assignment(), nil
}

// weighing is what the slots of an evening weigh.
type weighing struct {
	slots [][]int // by vnode and slot
	total int
	// typical is the mean of the slots, lightest the least.
	typical, lightest int
	// held is what each node has, due what it should have, by node.
	held, due []int
}

func newWeighing(e *evening, uses []int, weights [][]uint64) *weighing {
	width := e.groups[len(e.groups)-1].n
	w := &weighing{held: make([]int, len(e.nodes)), due: make([]int, len(e.nodes))}
	// In units that let all weights be summed, and be multiplied by the number of nodes.
	most := 0.0
	for _, of := range weights {
		most += float64(slices.Max(of))
	}
	unit := uint64(most*float64(width*len(e.slots))*float64(len(e.nodes))/(1<<60)) + 1
	for v := range e.slots {
		slots := make([]int, width)
		for s := range slots {
			for i, n := range uses {
				if s < n {
					slots[s] += int(weights[i][v] / unit)
				}
			}
			w.total += slots[s]
		}
		w.slots = append(w.slots, slots)
	}
	w.typical = w.total / (width * len(e.slots))
	w.lightest = max(1, w.typical/lightParts)
	// layer is what each of the first slots up to a group has more than those behind it.
	layer := make([]int, len(e.groups))
	w.total = 0
	for v, slots := range w.slots {
		for s := range slots {
			slots[s] = max(slots[s], w.lightest)
			w.total += slots[s]
			w.moved(place{v, s}, none, e.slots[v][s])
		}
		for i, g := range e.groups {
			layer[i] += slots[g.n-1]
			if g.n < width {
				layer[i] -= slots[g.n]
			}
		}
	}
	least, all := make([]int, len(e.names)), make([]int, len(e.names))
	for i, g := range e.groups {
		for zone, b := range g.zone {
			least[zone] += layer[i] * b.Least
			all[zone] += layer[i] * b.Most
		}
	}
	parts := e.divide(least, all, w.total)
	for n, zone := range e.of {
		w.due[n] = parts[zone].all / parts[zone].among
	}
	return w
}

// moved notes that a slot goes from one node to another; both may be none.
func (w *weighing) moved(p place, from, to int) {
	if w == nil {
		return
	}
	if from != none {
		w.held[from] -= w.slots[p.vnode][p.slot]
	}
	if to != none {
		w.held[to] += w.slots[p.vnode][p.slot]
	}
}

// above is by how much a node exceeds its share.
func (w *weighing) above(n int) int { return w.held[n] - w.due[n] }

// worthwhile reports whether a node is off by more than slack, and a step that it is one
// end of is worth that much.
func (e *evening) worthwhile(slack int) bool {
	for n := range e.nodes {
		if off := e.weigh.above(n); max(off, -off) > slack {
			if _, _, ok := e.step(n, func(place) bool { return true }, slack+1); ok {
				return true
			}
		}
	}
	return false
}

// weighOut makes steps with slots that may move until none is worth enough.
func (e *evening) weighOut(may func(place) bool, worth int) {
	order := make([]int, len(e.nodes))
	for n := range order {
		order[n] = n
	}
	for again := true; again; {
		again = false
		slices.SortStableFunc(order, func(a, b int) int {
			return cmp.Compare(max(e.weigh.above(b), -e.weigh.above(b)), max(e.weigh.above(a), -e.weigh.above(a)))
		})
		for _, n := range order {
			for {
				p, to, ok := e.step(n, may, worth)
				if !ok {
					break
				}
				e.hand(p, to)
				again = true
			}
		}
	}
}

// step returns the slot that a node should hand to another one, or take from it, if that
// is worth enough: what a step is worth is by how much it brings the worse of the two
// nearer to the other.
func (e *evening) step(n int, may func(place) bool, worth int) (_ place, to int, ok bool) {
	w := e.weigh
	gives := w.above(n) > 0
	apart := func(m int) int {
		if gives {
			return w.above(n) - w.above(m)
		}
		return w.above(m) - w.above(n)
	}
	tried := make([]bool, len(e.nodes))
	tried[n] = true
	for {
		other := none
		for m := range e.nodes {
			if !tried[m] && (other == none || apart(m) > apart(other)) {
				other = m
			}
		}
		if other == none || apart(other)-w.lightest < worth {
			return place{}, none, false
		}
		tried[other] = true
		from, to := other, n
		if gives {
			from, to = n, other
		}
		if p, ok := e.pick(from, to, may, apart(other)-worth); ok {
			return p, to, true
		}
	}
}

// pick returns the slot of a node that another should take, of those that weigh so much at
// most: one that brings neither past its share, or not by more than a typical slot; else
// the lightest. Of the former it is the one that is nearest to bringing their numbers of
// slots together as fast as their weights, for what is done with keys follows their number.
func (e *evening) pick(from, to int, may func(place) bool, most int) (best place, ok bool) {
	w := e.weigh
	fits := min(most, max(w.typical, min(w.above(from), -w.above(to))))
	ideal := fits
	if more := e.more(from) - e.more(to); more > 0 {
		ideal = min(fits, (w.above(from)-w.above(to))/more)
	}
	best = place{none, none}
	e.holds[from] = slices.DeleteFunc(e.holds[from], func(p place) bool { return e.slots[p.vnode][p.slot] != from })
	least := 0 // by how much the best is off
	for _, p := range e.holds[from] {
		is := w.slots[p.vnode][p.slot]
		if is > most || !may(p) {
			continue
		}
		off := max(is-ideal, ideal-is)
		if is > fits {
			off = fits + is // after all that fit
		}
		if best.vnode != none && cmp.Or(cmp.Compare(off, least), cmp.Compare(e.moves[p.vnode], e.moves[best.vnode])) >= 0 {
			continue
		}
		if e.takes(p, to) {
			best, least = p, off
		}
	}
	return best, best.vnode != none
}

// more is how many slots a node has more than its share of them.
func (e *evening) more(n int) int {
	g := e.groups[len(e.groups)-1]
	return g.load[n] - g.share[e.of[n]].Most
}

// takes reports whether a node may be given a slot.
func (e *evening) takes(p place, to int) bool {
	if slices.Contains(e.slots[p.vnode], to) || !e.fits(p, e.of[to], len(e.slots[p.vnode])) {
		return false
	}
	if !slices.Contains(e.was[p.vnode], to) {
		return true
	}
	after := slices.Clone(e.slots[p.vnode])
	home := e.home(p, to)
	after[p.slot], after[home.slot] = after[home.slot], to
	return e.inOrder(p.vnode, after)
}

// home is the slot that a node should have when it is given one: its former slot of the
// vnode, if that counts as much. Who has that one now takes the other.
func (e *evening) home(p place, to int) place {
	of := func(slot int) int {
		return slices.IndexFunc(e.groups, func(g *group) bool { return slot < g.n })
	}
	if at := slices.Index(e.was[p.vnode], to); at >= 0 && of(at) == of(p.slot) {
		return place{p.vnode, at}
	}
	return p
}

// hand gives a slot to a node that takes it.
func (e *evening) hand(p place, to int) {
	if home := e.home(p, to); home != p {
		there := e.slots[p.vnode][home.slot]
		e.set(home, to)
		to = there
	}
	e.set(p, to)
}
