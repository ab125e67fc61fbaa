package sim_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// setN has N of the namespace default changed and waits until that is done.
func setN(t *testing.T, w *sim.World, n uint32) {
	t.Helper()
	ctl := w.Control("node1")
	resp, err := ctl.UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: "default", Settings: &adminv1.NamespaceSettings{N: &n}})
	if err != nil {
		t.Fatal(err)
	}
	awaitOperation(t, w, resp.GetOperation().GetId(), topologyv1.Operation_STATE_DONE)
}

func awaitOperation(t *testing.T, w *sim.World, id uint64, state topologyv1.Operation_State) {
	t.Helper()
	var last *adminv1.ObservedOperation
	for range 120 {
		time.Sleep(time.Second)
		resp, err := w.Control("orch1").ListOperations(context.Background(), &adminv1.ListOperationsRequest{Id: id})
		if err != nil {
			continue
		}
		if last = resp.GetOperations()[0]; last.GetOperation().GetState() == state {
			return
		}
	}
	t.Fatalf("operation %d does not end: %v", id, last)
}

// setQuorums has W and R of the namespace default changed and waits until that is done.
func setQuorums(t *testing.T, w *sim.World, wq, rq string) {
	t.Helper()
	resp, err := w.Control("node1").UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: "default", Settings: &adminv1.NamespaceSettings{WriteQuorum: &wq, ReadQuorum: &rq}})
	if err != nil {
		t.Fatal(err)
	}
	awaitOperation(t, w, resp.GetOperation().GetId(), topologyv1.Operation_STATE_DONE)
}

// W and R of a namespace change under load, and no operation fails. Where reads come to
// ask one replica, it has what others had got alone.
func TestDefaultQuorumsChange(t *testing.T) {
	world(t, sim.Config{Seed: 8, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		off := false
		if _, err := w.Control("node1").UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: "default", Settings: &adminv1.NamespaceSettings{Hints: &off}}); err != nil {
			t.Fatal(err)
		}
		c := w.Client()
		defer c.Close()
		w.Crash("node3", sim.Kill)
		for i := range 100 {
			if _, err := c.Put(context.Background(), fmt.Appendf(nil, "missed/%d", i), []byte("v")); err != nil {
				t.Fatal(err)
			}
		}
		w.Start("node3")
		l := startWriters(t, w)
		for _, q := range [][2]string{{"all", "one"}, {"one", "all"}, {"quorum", "quorum"}} {
			setQuorums(t, w, q[0], q[1])
			for i := range 100 {
				if v, err := c.Get(context.Background(), fmt.Appendf(nil, "missed/%d", i), client.FromReplica("node3")); err != nil || string(v.Value) != "v" {
					t.Errorf("W=%s R=%s: node3 has %q of %d, %v", q[0], q[1], v.Value, i, err)
				}
			}
			time.Sleep(5 * time.Second)
		}
		l.end(t, 3, 0)
	})
}

// N of a namespace goes up by two, down again and below, under load: no operation
// fails, nothing is lost, and in the end those hold the records that are to, and no
// others.
func TestNumberOfReplicasChanges(t *testing.T) {
	world(t, sim.Config{Seed: 7, Nodes: 5, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		l := startWriters(t, w)
		time.Sleep(5 * time.Second)
		for _, n := range []uint32{5, 3, 2, 3} {
			setN(t, w, n)
			time.Sleep(5 * time.Second)
			resp, err := w.Control("orch1").GetClusterStatus(context.Background(), &adminv1.GetClusterStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			top, err := topology.FromProto(resp.GetTopology())
			if err != nil {
				t.Fatal(err)
			}
			if ns := top.Namespace("default"); ns.N != int(n) || ns.AlsoN != 0 || len(top.Ring[0].Slots) != int(n) {
				t.Fatalf("namespace %+v, %d slots", ns, len(top.Ring[0].Slots))
			}
			for i := range writerCount {
				key := fmt.Sprintf("%d/%d", i, 3)
				for _, node := range top.Nodes {
					v, err := l.c.Get(context.Background(), []byte(key), client.FromReplica(node.Name))
					if owner := top.Owns(node.Incarnation, top.VnodeOf([]byte(key)), int(n)); owner != (err == nil) || errors.Is(err, client.ErrNotFound) {
						t.Errorf("N=%d: %s has %q of %s, %v; to have it: %v", n, node.Name, v.Value, key, err, owner)
					}
				}
			}
		}
		l.end(t, 5, 0)
	})
}
