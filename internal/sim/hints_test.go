package sim_test

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/storage"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// A node that is told to stop keeps, on disk, the hints of writes that were still on
// their way to a replica that does not answer: their writing ends after the last of
// those has been given up.
func TestStopKeepsHintsOnTheirWay(t *testing.T) {
	world(t, sim.Config{Seed: 30, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Isolate("node3") // which nobody has noticed yet
		kv := kvv1.NewKVServiceClient(w.Conn("node1"))
		for i := range 20 {
			if _, err := kv.Put(timeout(t, time.Second), &kvv1.PutRequest{Key: fmt.Append(nil, i), Value: []byte("v")}); err != nil {
				t.Fatal(err)
			}
		}
		w.Stop("node1")
		s, err := storage.Open(storage.Config{FS: w.Disk("node1"), Dir: "data", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { panic(err) }})
		if err != nil {
			t.Fatal(err)
		}
		kept := map[string]bool{}
		if err := s.AllHints(func(h storage.Hint) bool { kept[string(h.Key)] = h.Target == 3; return true }); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if len(kept) != 20 {
			t.Errorf("%d of 20 hints are on disk", len(kept))
		}
	})
}

// Hints that find no room leave their vnodes to repair, and it hears of it though those
// who noticed lose their power before the replica is back.
func TestHintsWithoutRoomAreLeftToRepair(t *testing.T) {
	world(t, sim.Config{Seed: 31, Nodes: 3, Orchestrators: 1, MaxHints: 10}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Crash("node3", sim.Kill)
		time.Sleep(3 * time.Second)
		for i := range 200 {
			put(t, c, fmt.Sprint("k", i), "v")
		}
		var kept, dropped, dirty uint64
		for _, name := range []string{"node1", "node2"} {
			repair := adminv1.NewRepairServiceClient(w.Conn(name))
			h, err := repair.ListHints(timeout(t, time.Second), &adminv1.ListHintsRequest{Target: 3})
			if err != nil {
				t.Fatal(err)
			}
			if h.GetCount() > 10 || h.GetMaxCount() != 10 {
				t.Errorf("%s keeps %d of %d hints", name, h.GetCount(), h.GetMaxCount())
			}
			r, err := repair.GetRepairStatus(timeout(t, time.Second), &adminv1.GetRepairStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			kept, dropped, dirty = kept+h.GetCount(), dropped+h.GetDropped(), dirty+r.GetDirtyVnodes()
		}
		if kept == 0 || kept+dropped != 200 || dirty < 10 {
			t.Errorf("%d hints are kept, %d found no room, %d vnodes are dirty", kept, dropped, dirty)
		}
		for _, name := range []string{"node1", "node2"} {
			w.Crash(name, sim.PowerCut)
		}
		for _, name := range []string{"node1", "node2", "node3"} {
			w.Start(name)
		}
		time.Sleep(30 * time.Second) // half of what a round over all vnodes takes
		for i := range 200 {
			want(t, c, fmt.Sprint("k", i), "v", client.FromReplica("node3"))
		}
		for _, name := range []string{"node1", "node2"} {
			r, err := adminv1.NewRepairServiceClient(w.Conn(name)).GetRepairStatus(timeout(t, time.Second), &adminv1.GetRepairStatusRequest{})
			if err != nil || r.GetDirtyVnodes() != 0 {
				t.Errorf("%s: %d vnodes are dirty still, %v", name, r.GetDirtyVnodes(), err)
			}
		}
	})
}
