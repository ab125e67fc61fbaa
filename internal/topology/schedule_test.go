package topology_test

import (
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// A node takes part in no more moves at a time than it may, and a vnode in one; what waits
// for the one lets others pass.
func TestStages(t *testing.T) {
	var moves []topology.Move
	for v := range uint32(2*topology.MovesPerNode + 4) {
		moves = append(moves, topology.Move{Vnode: v, From: 1, To: 4}, topology.Move{Vnode: v, Slot: 1, From: 2, To: 5})
	}
	moves = append(moves, topology.Move{Vnode: 300, From: 6, To: 7}, topology.Move{Vnode: 301, From: 1, To: 1, Done: true})
	stages := topology.Stages(moves)
	seen := map[topology.Move]int{}
	slot := map[uint32]int{}
	for i, stage := range stages {
		busy, vnodes := map[uint64]int{}, map[uint32]bool{}
		for _, m := range stage {
			busy[m.From]++
			busy[m.To]++
			seen[m]++
			if vnodes[m.Vnode] || m.Slot != slot[m.Vnode] {
				t.Errorf("stage %d has two moves of vnode %d, or out of order", i, m.Vnode)
			}
			vnodes[m.Vnode] = true
			slot[m.Vnode]++
		}
		for n, moves := range busy {
			if moves > topology.MovesPerNode {
				t.Errorf("stage %d: node %d takes part in %d moves", i, n, moves)
			}
		}
	}
	if len(seen) != 2*(2*topology.MovesPerNode+4)+1 {
		t.Errorf("%d moves were made", len(seen))
	}
	// So many of the first slots; then of those that are left of them, and of the second.
	const most = topology.MovesPerNode
	if len(stages) != 4 || len(stages[0]) != most+1 || len(stages[1]) != 2*most || stages[0][most].Vnode != 300 {
		t.Errorf("%d stages: %v", len(stages), stages)
	}
}
