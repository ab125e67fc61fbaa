package node_test

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// lines keeps what is logged.
type lines struct {
	mu struct {
		sync.Mutex
		bytes.Buffer
	}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.Buffer.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.Buffer.String()
}

// keptTopology reads the topology in a data directory that nobody uses, and writes what
// change makes of it.
func keptTopology(t *testing.T, dir string, change func(*topologyv1.Topology)) *topology.Topology {
	t.Helper()
	store, err := storage.Open(storage.Config{FS: vfs.Default, Dir: dir, Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	b, err := store.Meta("topology")
	if err != nil {
		t.Fatal(err)
	}
	var pb topologyv1.Topology
	if err := proto.Unmarshal(b, &pb); err != nil {
		t.Fatal(err)
	}
	change(&pb)
	if b, err = proto.Marshal(&pb); err == nil {
		err = store.SetMeta("topology", b)
	}
	if err != nil {
		t.Fatal(err)
	}
	top, err := topology.FromProto(&pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// Settings reach a node, and are corrected, as is the rest of the topology, when somebody
// changed them on its disk under the epoch that they were agreed on in.
func TestSettingsAreFollowed(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	fatal := func(err error) { t.Error(err) }
	a := loopback.Addresses(t, 7)
	o := orchestrator.Defaults()
	o.Name, o.DataDir = "orch1", filepath.Join(t.TempDir(), "orch1")
	o.Peers = []orchestrator.Peer{{Name: "orch1", Address: a[0], AdminAddress: a[1], GossipAddress: a[2], RaftAddress: a[3]}}
	o.Listen, o.AdminListen, o.GossipListen, o.RaftListen = a[0], a[1], a[2], a[3]
	o.Bootstrap.FoundingNodes, o.Bootstrap.Vnodes = 1, 16
	o.Bootstrap.HealthChecks.Interval, o.Bootstrap.HealthChecks.Timeout = 200*time.Millisecond, 200*time.Millisecond
	o.ElectionTimeout, o.Logger, o.Fatal = 200*time.Millisecond, quiet, fatal
	orch, err := orchestrator.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	defer orch.Stop()
	cc, err := grpc.NewClient(a[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctl := adminv1.NewControlServiceClient(cc)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	log := &lines{}
	dir := filepath.Join(t.TempDir(), "node1")
	start := func() *node.Node {
		t.Helper()
		cfg := node.Defaults()
		cfg.Name, cfg.DataDir, cfg.Orchestrators = "node1", dir, []string{a[0]}
		cfg.Listen, cfg.AdminListen, cfg.GossipListen = a[4], a[5], a[6]
		cfg.Logger, cfg.Fatal = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})), fatal
		n, err := node.Start(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// await waits until the orchestrator sees the node use the settings of an epoch, or a
	// later one, and returns the topology as it is then.
	await := func(epoch uint64) *topology.Topology {
		t.Helper()
		var last *adminv1.GetClusterStatusResponse
		for {
			resp, err := ctl.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
			if ctx.Err() != nil {
				t.Fatalf("epoch %d is not in use: the topology has %d, the node says %v\n%s", epoch, last.GetTopology().GetEpoch(), last.GetNodes(), log)
			}
			if err != nil {
				continue
			}
			last = resp
			if top, err := topology.FromProto(resp.GetTopology()); err == nil && top.Formed() && len(resp.GetNodes()) > 0 {
				if s := resp.GetNodes()[0].GetStatus(); s.GetEpoch() >= epoch && s.GetEpoch() == top.Epoch && s.GetSettingsHash() == top.Settings.Hash() && s.GetProcessSettingsHash() != 0 {
					return top
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	corrections := func() int {
		t.Helper()
		resp, err := ctl.ListChanges(ctx, &adminv1.ListChangesRequest{Subject: "settings", Name: "node1"})
		if err != nil {
			t.Fatal(err)
		}
		return len(resp.GetChanges())
	}
	n := start()
	await(1)
	set, err := ctl.UpdateSettings(ctx, &adminv1.UpdateSettingsRequest{Values: map[string]string{"max_hints": "77"}})
	if err != nil {
		n.Stop()
		t.Fatal(err)
	}
	agreed := await(set.GetAfter().GetEpoch())
	for i, change := range []func(*topologyv1.Topology){
		func(pb *topologyv1.Topology) { pb.Settings.MaxHints = 88 },
		func(pb *topologyv1.Topology) { pb.Namespaces[0].RepairChance = 0.5 }, // settings are not all that can differ
	} {
		n.Stop()
		if kept := keptTopology(t, dir, change); kept.Epoch != agreed.Epoch {
			t.Fatalf("the disk has epoch %d, agreed is %d", kept.Epoch, agreed.Epoch)
		}
		n = start()
		agreed = await(agreed.Epoch + 1)
		if got := corrections(); got != i+1 {
			t.Errorf("%d corrections are noted, want %d", got, i+1)
		}
		if agreed.Settings.Version != set.GetAfter().GetSettings().GetVersion() {
			t.Errorf("the settings are at version %d", agreed.Settings.Version)
		}
	}
	n.Stop()
	if kept := keptTopology(t, dir, func(*topologyv1.Topology) {}); !proto.Equal(kept.Proto(), agreed.Proto()) {
		t.Errorf("the disk has\n%v\nagreed is\n%v", kept.Proto(), agreed.Proto())
	}
	for _, text := range []string{"is not the one that was agreed on", "max_hints 88 → 77"} {
		if !strings.Contains(log.String(), text) {
			t.Errorf("the node does not say %q", text)
		}
	}
}
