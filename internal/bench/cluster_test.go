package bench_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

// cluster starts an orchestrator and three nodes in this process, on real disks and
// sockets, and returns a client: one profile then shows both sides of every call.
func cluster(b *testing.B) *client.Client {
	b.Helper()
	// Each log that is being synced holds a processor of Go's: as three processes would,
	// the stores need some beside the machine's cores.
	was := runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 4)
	dir := b.TempDir() // removed after all has ended
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	b.Cleanup(func() {
		cancel()
		running.Wait()
		runtime.GOMAXPROCS(was)
	})
	quiet := slog.New(slog.DiscardHandler)
	o := orchestrator.Defaults()
	o.Name, o.DataDir, o.Logger, o.Fatal = "orch1", filepath.Join(dir, "orch1"), quiet, func(err error) { panic(err) }
	addresses := loopback.Addresses(b, 4+3*3)
	free := func() string {
		a := addresses[0]
		addresses = addresses[1:]
		return a
	}
	o.Listen, o.AdminListen, o.GossipListen, o.RaftListen = free(), free(), free(), free()
	o.Peers = []orchestrator.Peer{{Name: o.Name, Address: o.Listen, AdminAddress: o.AdminListen, GossipAddress: o.GossipListen, RaftAddress: o.RaftListen}}
	running.Go(func() {
		if err := orchestrator.Run(ctx, o); err != nil {
			panic(err)
		}
	})
	var endpoints []string
	for i := range 3 {
		n := node.Defaults()
		n.Name, n.Logger, n.Fatal = fmt.Sprint("node", i+1), quiet, func(err error) { panic(err) }
		n.DataDir = filepath.Join(dir, n.Name)
		n.Listen, n.AdminListen, n.GossipListen = free(), free(), free()
		n.Orchestrators = []string{o.Listen}
		n.Complete()
		endpoints = append(endpoints, n.Listen)
		running.Go(func() {
			if err := node.Run(ctx, n); err != nil {
				panic(err)
			}
		})
	}
	for {
		c, err := client.New(ctx, endpoints)
		if err == nil {
			if _, err = c.Put(ctx, []byte("ready"), nil); err == nil {
				b.Cleanup(func() { _ = c.Close() })
				return c
			}
			_ = c.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// cpu returns how much of it this process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkCluster measures operations of 64 threads and of one, with R and W of 2 of 3,
// values of 1 KiB, and a sync of each acknowledgement.
func BenchmarkCluster(b *testing.B) {
	c := cluster(b)
	cfg := bench.Config{Stores: []bench.Store{bench.Kvasir(c)}, Threads: 64, Operations: 1, Records: 20_000, ValueBytes: 1024, Workload: bench.Mix(1, bench.Zipfian), Timeout: 10 * time.Second}
	if err := bench.Fill(context.Background(), cfg); err != nil {
		b.Fatal(err)
	}
	for _, kind := range []struct {
		name  string
		reads float64
	}{{"get", 1}, {"put", 0}} {
		for _, threads := range []int{64, 1} {
			b.Run(fmt.Sprintf("%s/threads=%d", kind.name, threads), func(b *testing.B) {
				b.ReportAllocs()
				cfg := cfg
				cfg.Threads, cfg.Operations, cfg.Workload = threads, int64(b.N), bench.Mix(kind.reads, bench.Zipfian)
				before := cpu(b)
				res, err := bench.Run(context.Background(), cfg, nil)
				if err != nil || res.Errors > 0 {
					b.Fatalf("%s, %v", res.FirstError, err)
				}
				b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
				for _, l := range res.Kinds {
					if l.Count > 0 {
						b.ReportMetric(float64(l.P50), "p50-µs")
						b.ReportMetric(float64(l.P99), "p99-µs")
					}
				}
			})
		}
	}
}
