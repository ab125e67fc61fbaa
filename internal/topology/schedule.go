package topology

import "github.com/kvasirdb/kvasir/internal/mutant"

// MovesPerNode bounds the moves into and out of one node that are under way.
const MovesPerNode = 32

// Begin says which of the moves that are not done begin next: in their order, the first of
// each vnode, while neither of its nodes is busy with MovesPerNode of them. busy counts
// those under way, by node. first returns what a slot becomes when its move begins, or that
// it has to wait; begin gets the index of each that begins.
func Begin(moves []Move, busy map[uint64]int, first func(Move) (Slot, bool), begin func(i int, next Slot)) {
	passed := map[uint32]bool{} // vnodes that have a move to wait for
	for i, m := range moves {
		if m.Done || passed[m.Vnode] && !mutant.On("two-transitions") {
			continue
		}
		passed[m.Vnode] = true
		next, ok := first(m)
		if !ok || busy[next.Node] >= MovesPerNode || busy[next.Incoming] >= MovesPerNode {
			continue
		}
		busy[next.Node]++
		busy[next.Incoming]++
		begin(i, next)
	}
}

// Stages returns the moves as an operation makes them when all nodes are up and those that
// begin together end together. In fact each makes room for another as it ends.
func Stages(moves []Move) (out [][]Move) {
	left := append([]Move(nil), moves...)
	for {
		var stage []int
		Begin(left, map[uint64]int{}, func(m Move) (Slot, bool) {
			return Slot{Node: m.From, Incoming: m.To}, true
		}, func(i int, _ Slot) { stage = append(stage, i) })
		if len(stage) == 0 {
			return out
		}
		var made []Move
		for _, i := range stage {
			left[i].Done = true
			made = append(made, moves[i])
		}
		out = append(out, made)
	}
}
