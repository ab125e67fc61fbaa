package quorum

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// cluster is five nodes and an orchestrator as processes.
type cluster struct {
	// listening are the nodes' own addresses, advertised those that others use.
	listening, advertised []string
}

// startCluster starts a cluster. With a delay, a node is reached through a proxy, and what
// goes from and to each of the far ones is under way for so long.
func startCluster(ctx context.Context, t *testing.T, bin string, delay time.Duration) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "kvasir-quorum-") // on a disk
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	settings := devcluster.Settings{Nodes: replicas, Orchestrators: 1, Zones: replicas, Port: loopback.Base(t, 10*(1+replicas)) + 10, ReplaceAfter: time.Hour}
	all, err := devcluster.Create(ctx, filepath.Join(dir, "cluster"), settings, devcluster.Options{BinDir: bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // also when ctx has ended
		if _, err := all.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	planned, err := all.Status()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := all.Start(ctx, "orch1"); err != nil {
		t.Fatal(err)
	}
	c := &cluster{}
	for _, p := range planned {
		if p.Role != devcluster.RoleData {
			continue
		}
		advertised := p.ClientAddr
		if delay > 0 {
			advertised = startProxy(t, all, p, delay)
		}
		c.listening, c.advertised = append(c.listening, p.ClientAddr), append(c.advertised, advertised)
		own, err := devcluster.Open(all.Dir(), devcluster.Options{BinDir: bin, NodeArgs: []string{"--advertise", advertised}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := own.Start(ctx, p.Name); err != nil {
			t.Fatal(err)
		}
	}
	if err := all.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

// startProxy puts a proxy before a node and returns its address.
func startProxy(t *testing.T, all *devcluster.Cluster, node devcluster.Status, delay time.Duration) string {
	t.Helper()
	l, err := net.Listen("tcp", devcluster.Host+":0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, target: node.ClientAddr, far: func(conn net.Conn) (time.Duration, error) {
		processes, err := all.Status()
		if err != nil {
			return 0, err
		}
		pids := []int{os.Getpid()}
		for _, s := range processes {
			pids = append(pids, s.PID)
		}
		caller, err := callerOf(conn, pids)
		if err != nil {
			return 0, err
		}
		ends := time.Duration(0) // of the connection that are far
		for _, s := range processes {
			if slices.Contains(far, s.Name) && (s.Name == node.Name || s.PID == caller) {
				ends++
			}
		}
		return ends * delay, nil
	}}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { p.run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return l.Addr().String()
}

// client connects to the cluster; with near, only to nodes that are not far.
func (c *cluster) client(ctx context.Context, t *testing.T, near bool) *client.Client {
	t.Helper()
	endpoints := c.advertised
	var opts []client.Option
	if near {
		endpoints = endpoints[:replicas-len(far)]
		opts = append(opts, client.WithDialer(func(ctx context.Context, address string) (net.Conn, error) {
			if !slices.Contains(endpoints, address) {
				return nil, fmt.Errorf("%s is far", address)
			}
			return rpc.NetDialer(ctx, address)
		}))
	}
	cl, err := client.New(ctx, endpoints, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

// conn returns a connection to a node that no proxy is in.
func (c *cluster) conn(t *testing.T, node int) *grpc.ClientConn {
	t.Helper()
	cc, err := rpc.Transport{Dial: rpc.NetDialer}.NewConn(c.listening[node])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

// namespace makes a namespace with a replica on each node.
func (c *cluster) namespace(ctx context.Context, t *testing.T, name, w, r string) {
	t.Helper()
	n := uint32(replicas)
	_, err := adminv1.NewControlServiceClient(c.conn(t, 0)).CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{
		Name: name, Settings: &adminv1.NamespaceSettings{N: &n, WriteQuorum: &w, ReadQuorum: &r},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// load is a number of callers, who at a rate of 0 send their next operation when the last
// one has been answered, and otherwise so many a second in all, be the last one late or not.
type load struct {
	name    string
	threads int
	rate    float64
}

// measure makes a load for a while and returns the latencies of the one kind of operation.
func measure(ctx context.Context, t *testing.T, l load, cfg bench.Config) bench.Latency {
	t.Helper()
	cfg.Threads, cfg.Target, cfg.Records, cfg.ValueBytes, cfg.Timeout = l.threads, l.rate, records, valueBytes, 10*time.Second
	res, err := bench.Run(ctx, cfg, nil)
	switch {
	case err != nil:
		t.Fatal(err)
	case ctx.Err() != nil:
		t.Fatal("interrupted")
	case res.Errors > 0 || res.NotFound > 0:
		t.Fatalf("%d operations failed, the first with: %s; %d reads found nothing", res.Errors, res.FirstError, res.NotFound)
	}
	return slices.MaxFunc(res.Kinds[:], func(a, b bench.Latency) int { return int(a.Count - b.Count) })
}

// host says what all ran on.
func host() string {
	model := "unknown processor"
	info, _ := os.ReadFile("/proc/cpuinfo") // where there is none, less is said
	cores := 0
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			cores++
		}
	}
	busy, _ := os.ReadFile("/proc/loadavg")
	average, _, _ := strings.Cut(string(busy), " ")
	return fmt.Sprintf("%d cores (%s), load average %s before", cores, model, average)
}
