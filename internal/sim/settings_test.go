package sim_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Settings are changed through any node, reach all of them, and are set again by their
// version; a node that comes back with others on its disk, while nobody can tell it, is
// corrected once somebody can.
func TestSettingsReachAllNodes(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		ctl := w.Control("node1")
		update := func(r *adminv1.UpdateSettingsRequest) topology.SettingsVersion {
			t.Helper()
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			resp, err := ctl.UpdateSettings(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			return topology.SettingsVersionFromProto(resp.GetAfter())
		}
		all := func(v topology.SettingsVersion) {
			t.Helper()
			for _, n := range status(t, ctl).GetNodes() {
				if s := n.GetStatus(); s.GetEpoch() < v.Epoch || s.GetSettingsHash() != v.Settings.Hash() {
					t.Errorf("%s has epoch %d and settings %x, want %d and %x", s.GetName(), s.GetEpoch(), s.GetSettingsHash(), v.Epoch, v.Settings.Hash())
				}
			}
		}
		update(&adminv1.UpdateSettingsRequest{Values: map[string]string{"max_hints": "77"}})
		back := update(&adminv1.UpdateSettingsRequest{RollbackTo: 1})
		if back.Settings.Version != 3 || back.Settings.MaxHints != topology.DefaultSettings().MaxHints {
			t.Errorf("back to version 1: %+v", back)
		}
		time.Sleep(time.Second)
		all(back)

		w.Stop("node2")
		for _, o := range []string{"orch1", "orch2", "orch3"} {
			w.Crash(o, sim.Kill)
		}
		store, err := storage.Open(storage.Config{FS: w.Disk("node2"), Dir: "data", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		b, err := store.Meta("topology")
		var pb topologyv1.Topology
		if err == nil {
			err = proto.Unmarshal(b, &pb)
		}
		pb.Settings.MaxValueBytes = 5
		if b, _ := proto.Marshal(&pb); err == nil {
			err = store.SetMeta("topology", b)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		w.Start("node2")
		time.Sleep(5 * time.Second)
		wrong, err := adminv1.NewStatusServiceClient(w.Conn("node2")).GetNodeStatus(context.Background(), &adminv1.GetNodeStatusRequest{})
		if err != nil || wrong.GetStatus().GetSettingsHash() == back.Settings.Hash() {
			t.Fatalf("without orchestrators node2 is %v, %v", wrong, err)
		}
		for _, o := range []string{"orch1", "orch2", "orch3"} {
			w.Start(o)
		}
		time.Sleep(15 * time.Second)
		all(back)
		changes, err := ctl.ListChanges(context.Background(), &adminv1.ListChangesRequest{Subject: "settings", Name: "node2"})
		if err != nil || len(changes.GetChanges()) != 1 {
			t.Errorf("corrections %v, %v", changes, err)
		}
	})
}
