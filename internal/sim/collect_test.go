package sim_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/storage"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// onDisk stops a node and returns the records on its disk, dead ones included.
func onDisk(t *testing.T, w *sim.World, name string) map[string]record.Record {
	t.Helper()
	w.Stop(name)
	s, err := storage.Open(storage.Config{
		FS: w.Disk(name), Dir: "data", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler),
		Fatal: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out := map[string]record.Record{}
	for v := range uint32(16) {
		err := s.Scan(1, []uint32{v}, nil, nil, func(_ uint32, key, b []byte) bool {
			rec, err := record.Decode(b)
			if err != nil {
				t.Error(err)
			}
			out[string(key)] = rec.Header()
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// Deleted and expired records leave every disk, within minutes and without an
// operator; what lives stays.
func TestDeadRecordsLeaveAllDisks(t *testing.T) {
	world(t, sim.Config{Seed: 21, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		for i := range 120 {
			key := fmt.Sprint("k", i)
			switch put(t, c, key, "v"); i % 3 {
			case 0:
				if _, err := c.Delete(context.Background(), []byte(key)); err != nil {
					t.Fatal(err)
				}
			case 1:
				put(t, c, key, "w", client.TTL(20*time.Second))
			}
		}
		time.Sleep(4 * time.Minute)
		for i := range 120 {
			want(t, c, fmt.Sprint("k", i), [...]string{"", "", "v"}[i%3])
		}
		for _, name := range []string{"node1", "node2", "node3"} {
			left := onDisk(t, w, name)
			for key, rec := range left {
				if rec.Kind != record.Value || rec.ExpiresAt != 0 {
					t.Errorf("%s has %s as %+v", name, key, rec)
				}
			}
			if len(left) != 40 {
				t.Errorf("%s has %d records, want the 40 that live", name, len(left))
			}
		}
	})
}

// Invariant 5: while a replica is down nothing is collected, and an explanation names
// it; it returns with old values and brings none of them back.
func TestAReplicaReturnsAfterDeletions(t *testing.T) {
	world(t, sim.Config{Seed: 22, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctx := context.Background()
		c := w.Client()
		defer c.Close()
		for i := range 60 {
			put(t, c, fmt.Sprint("k", i), "v", client.W("all"))
		}
		w.Crash("node3", sim.PowerCut)
		time.Sleep(5 * time.Second)
		for i := range 60 {
			if _, err := c.Delete(ctx, fmt.Append(nil, "k", i)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Minute)
		explain := func(name string) *adminv1.ExplainCollectionResponse {
			t.Helper()
			r, err := adminv1.NewRepairServiceClient(w.Conn(name)).ExplainCollection(ctx, &adminv1.ExplainCollectionRequest{
				Target: &adminv1.ExplainCollectionRequest_Key{Key: []byte("k7")},
			})
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		if r := explain("node1"); !r.GetDead() || len(r.GetPinnedBy()) == 0 || !strings.Contains(r.GetPinnedBy()[0], "node3") {
			t.Errorf("explained as %v", r)
		}
		w.Start("node3")
		time.Sleep(5 * time.Minute)
		if r := explain("node1"); r.GetFound() || len(r.GetPinnedBy()) > 0 {
			t.Errorf("explained as %v", r)
		}
		for i := range 60 {
			want(t, c, fmt.Sprint("k", i), "", client.R("all"))
		}
		for _, name := range []string{"node1", "node2", "node3"} {
			if left := onDisk(t, w, name); len(left) > 0 {
				t.Errorf("%s has %d records: %v", name, len(left), left)
			}
		}
	})
}
