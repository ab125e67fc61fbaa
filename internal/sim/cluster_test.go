package sim_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// world runs a test in a bubble with a cluster of its own.
func world(t *testing.T, cfg sim.Config, test func(t *testing.T, w *sim.World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := sim.New(t, cfg)
		defer w.Close()
		time.Sleep(2 * time.Second) // links and members find each other
		test(t, w)
	})
}

func put(t *testing.T, c *client.Client, key, value string, opts ...client.CallOption) client.Receipt {
	t.Helper()
	r, err := c.Put(context.Background(), []byte(key), []byte(value), opts...)
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	return r
}

func want(t *testing.T, c *client.Client, key, value string, opts ...client.CallOption) client.Receipt {
	t.Helper()
	v, err := c.Get(context.Background(), []byte(key), opts...)
	if value == "" && errors.Is(err, client.ErrNotFound) {
		return v.Receipt
	}
	if err != nil || string(v.Value) != value {
		t.Fatalf("get %s = %q, %v; want %q", key, v.Value, err, value)
	}
	return v.Receipt
}

func TestClusterServes(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		for i := range 50 {
			put(t, c, fmt.Sprint("k", i), fmt.Sprint("v", i))
		}
		for i := range 50 {
			want(t, c, fmt.Sprint("k", i), fmt.Sprint("v", i))
		}
		n := 0
		for _, err := range c.Scan(context.Background(), client.Range{Prefix: []byte("k")}) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n != 50 {
			t.Errorf("scan finds %d records", n)
		}
	})
}

// Every node is killed and restarted in turn under load; no operation fails, and
// the returned node gets what it missed.
func TestNodesKilledInTurn(t *testing.T) {
	world(t, sim.Config{Seed: 2, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		stop := make(chan struct{})
		var done atomic.Int64
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
					key := fmt.Sprintf("%d/%d", i, n%20)
					if _, err := c.Put(ctx, []byte(key), fmt.Append(nil, n)); err != nil {
						t.Errorf("put: %v", err)
					}
					v, err := c.Get(ctx, []byte(key))
					if err != nil || string(v.Value) != fmt.Sprint(n) {
						t.Errorf("get %s = %q, %v; want %d", key, v.Value, err, n)
					}
					cancel()
					done.Add(2)
					time.Sleep(25 * time.Millisecond)
				}
			})
		}
		for _, name := range []string{"node1", "node2", "node3"} {
			time.Sleep(2 * time.Second)
			w.Crash(name, sim.Kill)
			time.Sleep(3 * time.Second)
			w.Start(name)
			time.Sleep(4 * time.Second)
		}
		close(stop)
		wg.Wait()
		t.Logf("%d operations", done.Load())
		time.Sleep(5 * time.Second)
		for i := range 8 {
			for k := range 20 {
				key := fmt.Sprintf("%d/%d", i, k)
				v, err := c.Get(context.Background(), []byte(key))
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range []string{"node1", "node2", "node3"} {
					want(t, c, key, string(v.Value), client.FromReplica(name))
				}
			}
		}
	})
}

// Invariant 11: without orchestrators the data path goes on, new clients connect,
// and nodes restart, also all of them.
func TestWithoutOrchestrators(t *testing.T) {
	world(t, sim.Config{Seed: 3, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "before", "1")
		for i := range 3 {
			w.Crash(fmt.Sprint("orch", i+1), sim.Kill)
		}
		time.Sleep(15 * time.Second)
		put(t, c, "during", "2")
		want(t, c, "before", "1")
		other := w.Client()
		defer other.Close()
		want(t, other, "during", "2")

		w.Crash("node2", sim.Kill)
		time.Sleep(time.Second)
		put(t, other, "during", "3")
		w.Start("node2")
		time.Sleep(3 * time.Second)
		want(t, other, "during", "3", client.FromReplica("node2"))

		for i := range 3 {
			w.Crash(fmt.Sprint("node", i+1), sim.PowerCut)
		}
		for i := range 3 {
			w.Start(fmt.Sprint("node", i+1))
		}
		time.Sleep(3 * time.Second)
		again := w.Client()
		defer again.Close()
		want(t, again, "before", "1")
		want(t, again, "during", "3")
		put(t, again, "after", "4")
	})
}

// An acknowledged write survives the power cut of all nodes at once.
func TestPowerCutOfAll(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			world(t, sim.Config{Seed: seed, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
				c := w.Client()
				acked := map[string]string{}
				for i := range 300 {
					key := fmt.Sprint("k", i%40)
					put(t, c, key, fmt.Sprint(i))
					acked[key] = fmt.Sprint(i)
				}
				c.Close()
				for i := range 3 {
					w.Crash(fmt.Sprint("node", i+1), sim.PowerCut)
				}
				for i := range 3 {
					w.Start(fmt.Sprint("node", i+1))
				}
				time.Sleep(3 * time.Second)
				c = w.Client()
				defer c.Close()
				for k, v := range acked {
					want(t, c, k, v)
				}
			})
		})
	}
}

// A node that is cut off leaves routing and comes back by itself.
func TestIsolatedNode(t *testing.T) {
	world(t, sim.Config{Seed: 4, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Isolate("node3")
		for i := range 100 {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			if _, err := c.Put(ctx, fmt.Append(nil, "k", i), []byte("v")); err != nil {
				t.Fatalf("put %d: %v", i, err)
			}
			cancel()
			time.Sleep(20 * time.Millisecond)
		}
		w.Reconnect("node3")
		time.Sleep(8 * time.Second)
		for i := range 100 {
			want(t, c, fmt.Sprint("k", i), "v", client.FromReplica("node3"))
		}
	})
}

// A client that gives a node up goes elsewhere with its write. Whatever the first
// node still had on the way must not begin there later: it would undo younger writes.
func TestLateWritesDoNotBegin(t *testing.T) {
	world(t, sim.Config{Seed: 5, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		stream, err := kvv1.NewKVServiceClient(w.Conn("node1")).Session(ctx)
		if err != nil {
			t.Fatal(err)
		}
		md, err := stream.Header()
		if err != nil {
			t.Fatal(err)
		}
		uptime, err := strconv.ParseUint(md.Get(rpc.MDUptime)[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "younger")
		for late, ok := range map[uint64]bool{uptime + 500: false, uptime + 60_000: true, 0: true} {
			call := &kvv1.SessionCall{Id: 1, StartByMs: late, Request: &kvv1.SessionCall_Put{Put: &kvv1.PutRequest{Key: []byte("k"), Value: []byte("late")}}}
			if err := stream.Send(&kvv1.SessionRequest{Calls: []*kvv1.SessionCall{call}}); err != nil {
				t.Fatal(err)
			}
			resp, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			e := rpc.ErrorFromProto(resp.GetReplies()[0].GetError())
			if (e == nil) != ok || e != nil && (e.Reason != rpc.ReasonTooLate || !e.NothingDone()) {
				t.Errorf("a write to begin by %d at uptime %d: %+v", late, uptime+1000, e)
			}
			if !ok {
				want(t, c, "k", "younger")
			}
			put(t, c, "k", "younger")
		}
	})
}

// The client says by when its writes must begin.
func TestClientLimitsItsWrites(t *testing.T) {
	world(t, sim.Config{Seed: 5, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "before")
		// From now on each direction takes longer than a write may take to begin.
		w.Net.SetLatency(func(string, string) (time.Duration, time.Duration) { return 700 * time.Millisecond, 0 })
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := c.Put(ctx, []byte("k"), []byte("late")); err == nil {
			t.Error("a late write was acknowledged")
		}
		w.Net.SetLatency(func(string, string) (time.Duration, time.Duration) { return 0, 0 })
		want(t, c, "k", "before")
	})
}
