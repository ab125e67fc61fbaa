package node_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// A node says what it holds of each vnode, and its gauges say how much that is in all.
func TestUseIsTold(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	fatal := func(err error) { t.Error(err) }
	a := loopback.Addresses(t, 7)
	o := orchestrator.Defaults()
	o.Name, o.DataDir = "orch1", filepath.Join(t.TempDir(), "orch1")
	o.Peers = []orchestrator.Peer{{Name: "orch1", Address: a[0], AdminAddress: a[1], GossipAddress: a[2], RaftAddress: a[3]}}
	o.Listen, o.AdminListen, o.GossipListen, o.RaftListen = a[0], a[1], a[2], a[3]
	o.Bootstrap.FoundingNodes, o.Bootstrap.Vnodes = 1, 16
	o.ElectionTimeout, o.Logger, o.Fatal = 200*time.Millisecond, logger, fatal
	orch, err := orchestrator.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	defer orch.Stop()
	cfg := node.Defaults()
	cfg.Name, cfg.DataDir, cfg.Orchestrators = "node1", filepath.Join(t.TempDir(), "node1"), []string{a[0]}
	cfg.Listen, cfg.AdminListen, cfg.GossipListen = a[4], a[5], a[6]
	cfg.Logger, cfg.Fatal = logger, fatal
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	n, err := node.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Stop()
	c, err := client.New(ctx, []string{a[4]})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const records = 40
	for i := range records {
		if _, err := c.Put(ctx, fmt.Append(nil, "key", i), make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	cc, err := grpc.NewClient(a[4], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	resp, err := adminv1.NewStatusServiceClient(cc).GetNodeUse(ctx, &adminv1.GetNodeUseRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var sum, bytes uint64
	for _, v := range resp.GetVnodes() {
		sum, bytes = sum+v.GetRecords(), bytes+v.GetBytes()
	}
	if len(resp.GetVnodes()) != 16 || sum != records || bytes < records*1000 || bytes > records*1100 {
		t.Errorf("%d vnodes with %d records, %d bytes", len(resp.GetVnodes()), sum, bytes)
	}
	wantMetrics(t, a[5], "kvasir_node_slots 16", fmt.Sprint("kvasir_node_records ", records), fmt.Sprint("kvasir_node_data_bytes ", bytes),
		"kvasir_node_set_aside 0", "kvasir_hints_limit_bytes 1.073741824e+09", "kvasir_storage_stalled_seconds_total 0", "kvasir_collect_pinned_seconds 0")
	wantMetrics(t, a[1], "kvasir_ring_imbalance_ratio 1", "kvasir_ring_moves_left 0", "kvasir_cluster_degraded_vnodes 0", `kvasir_cluster_unwritable_vnodes{namespace="default"} 0`)
}

// wantMetrics checks what a process tells Prometheus.
func wantMetrics(t *testing.T, address string, want ...string) {
	t.Helper()
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		if !strings.Contains(string(b), "\n"+w+"\n") {
			t.Errorf("no %q at %s", w, address)
		}
	}
}
