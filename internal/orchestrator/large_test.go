package orchestrator

import (
	"fmt"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// A thousand nodes form a ring of 65,536 vnodes, get a wider namespace, and a hundred more
// begin to take slots: each step is decided and applied in seconds.
func TestLargeRing(t *testing.T) {
	if testing.Short() {
		t.Skip("plans 327,680 slots")
	}
	cfg := testConfig(1)
	cfg.Bootstrap.Vnodes, cfg.Bootstrap.FoundingNodes = 1<<16, 1000
	began := time.Now()
	lap := func(what string) {
		t.Logf("%s in %s", what, time.Since(began))
		began = time.Now()
	}
	s, _ := settle(t, nil, &cfg)
	for i := range 1000 {
		s = registerNode(t, s, fmt.Sprint("n", i), fmt.Sprint("z", i%5))
	}
	lap("thousand nodes registered")
	s, _ = settle(t, s, &cfg)
	lap("formed")
	five := 5
	cmd, _, err := createNamespace(s, "wide", topology.NamespaceSettings{N: &five})
	if err != nil {
		t.Fatal(err)
	}
	lap("widening decided")
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	lap("widening applied")
	for i := range 100 {
		s = registerNode(t, s, fmt.Sprint("m", i), fmt.Sprint("z", i%5))
	}
	lap("a hundred more registered")
	op := &topologyv1.Operation{Kind: "apply", Title: "add 100"}
	for v := 0; v < 1<<16; v += 4 {
		op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(v), From: s.Topology.Ring[v].Slots[0].Node, To: uint64(1001 + v/4%100)})
	}
	if s, _, err = s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: op}}}}}); err != nil {
		t.Fatal(err)
	}
	lap(fmt.Sprintf("operation of %d moves begun", len(op.Moves)))
	if cmd = changeRing(s, alive(s)); cmd == nil {
		t.Fatal("no move begins")
	}
	lap("moves begun: decided")
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	moving := 0
	for i := range s.Topology.Ring {
		if s.Topology.Ring[i].Moving() >= 0 {
			moving++
		}
	}
	lap(fmt.Sprintf("moves begun: applied to %d vnodes", moving))
	if moving != 100*topology.MovesPerNode {
		t.Errorf("%d vnodes are moving", moving)
	}
}
