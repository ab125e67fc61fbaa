package topology_test

import (
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// A node takes part in no more moves at a time than it may, and a vnode in one; what waits
// for the one lets others pass.
func TestStages(t *testing.T) {
	var moves []topology.Move
	for v := range uint32(20) {
		moves = append(moves, topology.Move{Vnode: v, From: 1, To: 4}, topology.Move{Vnode: v, Slot: 1, From: 2, To: 5})
	}
	moves = append(moves, topology.Move{Vnode: 30, From: 6, To: 7}, topology.Move{Vnode: 31, From: 1, To: 1, Done: true})
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
	if len(seen) != 41 {
		t.Errorf("%d moves were made", len(seen))
	}
	// 8 of the first slots; then those that are left of them, and 8 of the second.
	if len(stages) != 4 || len(stages[0]) != 9 || len(stages[1]) != 16 || stages[0][8].Vnode != 30 {
		t.Errorf("%d stages: %v", len(stages), stages)
	}
}
