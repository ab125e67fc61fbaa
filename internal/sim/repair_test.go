package sim_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// Invariant 4: a replica that missed writes and deletions which nobody kept hints for
// is mended without a read, an operator or an orchestrator.
func TestAntiEntropyMendsWhatHintsMiss(t *testing.T) {
	world(t, sim.Config{Seed: 11, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		off := false
		if _, err := w.Control("node1").CreateNamespace(context.Background(), &adminv1.CreateNamespaceRequest{
			Name: "bare", Settings: &adminv1.NamespaceSettings{Hints: &off},
		}); err != nil {
			t.Fatal(err)
		}
		c := w.Client(client.WithNamespace("bare"))
		defer c.Close()
		const keys = 300
		for i := range keys {
			put(t, c, fmt.Sprint("k", i), "old")
		}
		w.Crash("node3", sim.Kill)
		time.Sleep(3 * time.Second)
		for i := range keys {
			switch i % 3 {
			case 0:
				put(t, c, fmt.Sprint("k", i), "new")
			case 1:
				if _, err := c.Delete(context.Background(), fmt.Append(nil, "k", i)); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.Crash("orch1", sim.Kill)
		w.Start("node3")
		time.Sleep(3 * time.Minute)
		for i := range keys {
			key := fmt.Sprint("k", i)
			for _, name := range []string{"node1", "node2", "node3"} {
				want(t, c, key, [...]string{"new", "", "old"}[i%3], client.FromReplica(name))
			}
		}
		var sent, received uint64
		for _, name := range []string{"node1", "node2", "node3"} {
			s, err := adminv1.NewRepairServiceClient(w.Conn(name)).GetRepairStatus(context.Background(), &adminv1.GetRepairStatusRequest{Vnodes: true})
			if err != nil {
				t.Fatal(err)
			}
			sent += s.GetRecordsSent()
			received += s.GetRecordsReceived()
			if s.GetRounds() == 0 || len(s.GetVnodes()) == 0 {
				t.Errorf("%s: %d rounds, %d vnodes", name, s.GetRounds(), len(s.GetVnodes()))
			}
			for _, v := range s.GetVnodes() {
				if v.GetState() != adminv1.VnodeRepair_STATE_EQUAL && v.GetState() != adminv1.VnodeRepair_STATE_MENDED {
					t.Errorf("%s: vnode %d is %s: %s", name, v.GetVnode(), v.GetState(), v.GetReason())
				}
			}
		}
		if sent+received != keys*2/3 {
			t.Errorf("%d records were sent and %d fetched to mend %d", sent, received, keys*2/3)
		}
	})
}

// A paused repairer does nothing, a started one begins at once.
func TestRepairIsPausedAndStarted(t *testing.T) {
	world(t, sim.Config{Seed: 12, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctx := context.Background()
		services := map[string]adminv1.RepairServiceClient{}
		for _, name := range []string{"node1", "node2", "node3"} {
			services[name] = adminv1.NewRepairServiceClient(w.Conn(name))
			if _, err := services[name].PauseRepair(ctx, &adminv1.PauseRepairRequest{}); err != nil {
				t.Fatal(err)
			}
		}
		rounds := func(name string) uint64 {
			s, err := services[name].GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			return s.GetRounds()
		}
		time.Sleep(time.Second)
		before := rounds("node1")
		time.Sleep(10 * time.Minute)
		if now := rounds("node1"); now != before {
			t.Errorf("%d rounds ended during the pause", now-before)
		}
		if _, err := services["node1"].StartRepair(ctx, &adminv1.StartRepairRequest{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if now := rounds("node1"); now != before+1 {
			t.Errorf("%d rounds ended within 2 s of the start", now-before)
		}
		if now := rounds("node2"); now != 0 && now > before+1 {
			t.Errorf("another node's repair was started too")
		}
		c := w.Client()
		defer c.Close()
		if _, err := c.Get(ctx, []byte("k")); !errors.Is(err, client.ErrNotFound) {
			t.Error(err)
		}
	})
}
