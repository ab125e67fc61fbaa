package sim_test

import (
	"context"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// rezone restarts a node in another zone and waits until the topology says so.
func rezone(t *testing.T, w *sim.World, name, zone string) {
	t.Helper()
	w.Stop(name)
	w.Rezone(name, zone)
	w.Start(name)
	for range 20 {
		time.Sleep(time.Second)
		if n := clusterTopology(t, w).Resolve(name); n.Zone == zone {
			return
		}
	}
	t.Fatalf("%s is not in zone %s", name, zone)
}

func clusterTopology(t *testing.T, w *sim.World) *topology.Topology {
	t.Helper()
	resp, err := w.Control("orch1").GetClusterStatus(context.Background(), &adminv1.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	top, err := topology.FromProto(resp.GetTopology())
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// inOneZone counts the vnodes that have two of three replicas in one zone.
func inOneZone(top *topology.Topology) (vnodes int) {
	for v := range top.Ring {
		zones := map[string]bool{}
		for _, s := range top.Ring[v].Slots {
			zones[top.Node(s.Node).Zone] = true
		}
		if len(zones) < 3 {
			vnodes++
		}
	}
	return vnodes
}

// evenOut begins the operation that makes the ring even.
func evenOut(t *testing.T, w *sim.World) uint64 {
	t.Helper()
	top := clusterTopology(t, w)
	var current placement.Assignment
	var nodes []placement.Node
	for _, n := range top.Nodes {
		nodes = append(nodes, placement.Node{ID: n.Incarnation, Zone: n.Zone})
	}
	for _, v := range top.Ring {
		var row []uint64
		for _, s := range v.Slots {
			row = append(row, s.Node)
		}
		current = append(current, row)
	}
	next, err := placement.Even(current, nodes, []int{3})
	if err != nil {
		t.Fatal(err)
	}
	op := &topologyv1.Operation{Kind: "apply", Title: "even"}
	for v := range next {
		for s, to := range next[v] {
			if from := current[v][s]; from != to {
				op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(s), From: from, To: to})
			}
		}
	}
	resp, err := w.Control("orch1").StartOperation(context.Background(), &adminv1.StartOperationRequest{Epoch: top.Epoch, Operation: op})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetOperation().GetId()
}

// Two nodes change places, under load: each says its new zone as it starts, the second in
// the middle of the operation that brings replicas into distinct zones again after the
// first. That ends, and one more mends the rest; no record is lost.
func TestNodesChangeZones(t *testing.T) {
	world(t, sim.Config{Seed: 9, Nodes: 6, Orchestrators: 1, Zones: 3}, func(t *testing.T, w *sim.World) {
		l := startWriters(t, w)
		time.Sleep(5 * time.Second)
		if n := inOneZone(clusterTopology(t, w)); n != 0 {
			t.Fatalf("at first %d vnodes have two replicas in a zone", n)
		}
		rezone(t, w, "node1", "z2")
		if n := inOneZone(clusterTopology(t, w)); n == 0 {
			t.Error("no vnode has two replicas in a zone")
		}
		id := evenOut(t, w)
		rezone(t, w, "node2", "z1")
		awaitOperation(t, w, id, topologyv1.Operation_STATE_DONE)
		before := inOneZone(clusterTopology(t, w))
		awaitOperation(t, w, evenOut(t, w), topologyv1.Operation_STATE_DONE)
		if n := inOneZone(clusterTopology(t, w)); n != 0 || before == 0 {
			t.Errorf("in the end %d vnodes have two replicas in a zone, %d before", n, before)
		}
		l.end(t, 6, 100) // those on their way to a node that stops may fail
	})
}
