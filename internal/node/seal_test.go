package node

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// A sealed node, restarted too, follows nobody but its recovery and later generations.
func TestASealedNodeFollowsOneRecovery(t *testing.T) {
	store, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	top := func(epoch uint64, recovery string) *topology.Topology {
		return &topology.Topology{ClusterID: "c", Epoch: epoch, Vnodes: 4, Settings: topology.DefaultSettings(), Recovery: recovery}
	}
	start := func() *topologies {
		seal, err := loadSeal(store)
		if err != nil {
			t.Fatal(err)
		}
		known, err := loadTopology(store)
		if err != nil {
			t.Fatal(err)
		}
		tops := newTopologies(store, replica.NewFence(known), seal, rpc.Transport{}, "c", nil, slog.New(slog.DiscardHandler))
		nothing := func(*topology.Topology) error { return nil }
		tops.adopted, tops.prepare, tops.settle = func(*topology.Topology) {}, nothing, nothing
		tops.kept.Store(known.Epoch)
		return tops
	}
	tops := start()
	adopt := func(want bool, epoch uint64, recovery string) {
		t.Helper()
		err := tops.adopt(top(epoch, recovery))
		if (err == nil) != want || (tops.current().Epoch == epoch) != want {
			t.Errorf("epoch %s of %q: %v, in use is %s", topology.EpochString(epoch), recovery, err, topology.EpochString(tops.current().Epoch))
		}
		if want {
			if err := tops.write(tops.current()); err != nil {
				t.Fatal(err)
			}
		}
	}
	seal := func(recovery string, generation uint64, reason string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err := tops.setSeal(ctx, &adminv1.Seal{Recovery: recovery, Generation: generation})
		if got := rpc.AsError(err); (got == nil) != (reason == "") || got != nil && got.Reason != reason {
			t.Errorf("seal for %s, %d: %v, want %q", recovery, generation, err, reason)
		}
	}
	const first, second, third = 1 << 48, 2 << 48, 3 << 48
	adopt(true, 5, "")
	if tops.pendingSeal() != nil {
		t.Error("sealed without a seal")
	}
	seal("", 1, rpc.ReasonBadRequest)
	seal("a", 1, "")
	seal("a", 1, "") // again
	seal("b", 1, "SEALED")
	adopt(false, 6, "")
	tops = start()
	adopt(false, 6, "")
	adopt(false, first|6, "b")
	if tops.pendingSeal().GetRecovery() != "a" {
		t.Error("the seal is forgotten")
	}
	adopt(true, first|6, "a")
	adopt(true, first|7, "a")
	if tops.pendingSeal() != nil {
		t.Error("the recovery is through and still waited for")
	}
	seal("c", 1, "GENERATION_BEGUN")
	seal("c", 2, "")
	seal("d", 3, "") // a later one takes over
	seal("c", 2, "SEALED")
	adopt(false, first|8, "a")
	adopt(false, second|8, "c")
	tops = start()
	adopt(false, second|8, "c")
	adopt(true, third|8, "d")

	// One that is not sealed follows one recovery of a generation, too.
	tops = newTopologies(store, replica.NewFence(top(first|3, "a")), nil, rpc.Transport{}, "c", nil, slog.New(slog.DiscardHandler))
	tops.adopted = func(*topology.Topology) {}
	if err := tops.adopt(top(first|4, "b")); rpc.AsError(err) == nil || tops.current().Epoch != first|3 {
		t.Errorf("another recovery of the generation: %v", err)
	}
}
