package node

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Requests are served by a new topology at once, however slow the disk is; that the
// node has taken it in is said when it is on disk with what follows from it, and no
// request runs under an older one.
func TestTopologyIsInUseBeforeItIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		tops := newTopologies(store, replica.NewFence(&topology.Topology{}), nil, rpc.Transport{}, "c", nil, slog.New(slog.DiscardHandler))
		tops.adopted = func(*topology.Topology) {}
		disk := make(chan error) // gives every write its outcome
		var kept []uint64
		tops.prepare = func(top *topology.Topology) error {
			kept = append(kept, top.Epoch)
			return <-disk
		}
		// After a crash the topology on disk must not be one from before what was forgotten.
		tops.settle = func(top *topology.Topology) error {
			stored, err := loadTopology(store)
			if err == nil && stored.Epoch != top.Epoch {
				t.Errorf("epoch %d is settled while %d is on disk", top.Epoch, stored.Epoch)
			}
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { defer close(ended); tops.follow(ctx) }()
		want := func(when string, use, taken, onDisk uint64) {
			t.Helper()
			synctest.Wait()
			stored, err := loadTopology(store)
			if err != nil {
				t.Fatal(err)
			}
			if tops.current().Epoch != use || tops.taken() != taken || stored.Epoch != onDisk {
				t.Errorf("%s: epoch %d in use, %d taken, %d on disk; want %d, %d, %d", when, tops.current().Epoch, tops.taken(), stored.Epoch, use, taken, onDisk)
			}
		}
		adopt := func(epoch uint64) {
			t.Helper()
			if err := tops.adopt(&topology.Topology{ClusterID: "c", Epoch: epoch, Vnodes: 4, Settings: topology.DefaultSettings()}); err != nil {
				t.Fatal(err)
			}
		}
		adopt(1)
		want("while the disk is slow", 1, 0, 0)
		adopt(2)
		adopt(3)
		want("while it still is", 3, 0, 0)
		disk <- nil
		want("when the first is written", 3, 1, 1)
		disk <- errors.New("disk full")
		want("when the last could not be written", 3, 1, 1)
		time.Sleep(keepRetry)
		disk <- nil
		want("when it could", 3, 3, 3)
		if len(kept) != 3 || kept[0] != 1 || kept[1] != 3 || kept[2] != 3 {
			t.Errorf("the disk followed %v", kept)
		}
		adopt(2)
		want("after an older one", 3, 3, 3)
		if err := tops.adopt(&topology.Topology{ClusterID: "other", Epoch: 9}); err == nil {
			t.Error("the topology of another cluster is in use")
		}
		cancel()
		<-ended
	})
}

// What an orchestrator says of the nodes again wakes nobody; what is new does.
func TestWatchersHearOfNewHealth(t *testing.T) {
	store, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	tops := newTopologies(store, replica.NewFence(&topology.Topology{}), nil, rpc.Transport{}, "c", nil, slog.New(slog.DiscardHandler))
	said := func(states ...topologyv1.NodeHealth_State) map[uint64]*topologyv1.NodeHealth {
		out := map[uint64]*topologyv1.NodeHealth{}
		for i, s := range states {
			out[uint64(i+1)] = &topologyv1.NodeHealth{Incarnation: uint64(i + 1), State: s}
		}
		return out
	}
	const well, ill = topologyv1.NodeHealth_STATE_HEALTHY, topologyv1.NodeHealth_STATE_UNHEALTHY
	for _, step := range []struct {
		what   string
		health map[uint64]*topologyv1.NodeHealth
		heard  bool
	}{
		{"the first word", said(well, well), true},
		{"the same", said(well, well), false},
		{"an ill node", said(well, ill), true},
		{"the same", said(well, ill), false},
		{"another node", said(well, ill, well), true},
		{"no orchestrator", nil, true},
		{"still none", nil, false},
	} {
		changed := tops.changed()
		tops.setHealth(step.health)
		heard := false
		select {
		case <-changed:
			heard = true
		default:
		}
		if heard != step.heard {
			t.Errorf("%s: watchers heard of it: %v", step.what, heard)
		}
		if len(step.health) > 0 && tops.observed(1).GetState() != well {
			t.Errorf("%s: node 1 is %v", step.what, tops.observed(1))
		}
	}
}
