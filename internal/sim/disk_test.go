package sim_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
)

// A node whose log cannot be written ends rather than acknowledge, and has all it
// acknowledged when the disk is mended.
func TestBrokenLogEndsTheNode(t *testing.T) {
	world(t, sim.Config{Seed: 21, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		for i := range 50 {
			put(t, c, fmt.Sprint("k", i), "before", client.W("all"))
		}
		w.Break("node2", sim.LogBroken)
		for i := range 50 {
			put(t, c, fmt.Sprint("k", i), "during")
		}
		select {
		case <-w.Died("node2"):
		case <-time.After(10 * time.Second):
			t.Fatal("a node goes on without its log")
		}
		if w.DiskErrors("node2") == 0 {
			t.Fatal("no operation failed")
		}
		w.Crash("node2", sim.Kill)
		w.Break("node2", sim.NoFault)
		w.Start("node2")
		// What it coordinated itself as its log broke has no hint anywhere.
		time.Sleep(2 * time.Minute)
		for i := range 50 {
			want(t, c, fmt.Sprint("k", i), "during", client.FromReplica("node2"))
		}
	})
}

// A node without disk space refuses writes, serves reads, and goes on once there is
// space; or it ends, and starts again with everything. Either way the cluster serves.
func TestFullDisk(t *testing.T) {
	for seed := uint64(22); seed < 26; seed++ {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			world(t, sim.Config{Seed: seed, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
				c := w.Client()
				defer c.Close()
				put(t, c, "k", "before", client.W("all"))
				w.Break("node2", sim.DiskFull)
				time.Sleep(time.Duration(seed-22) * time.Second)
				for i := range 200 {
					put(t, c, fmt.Sprint("k", i), "during")
				}
				want(t, c, "k", "before")
				ended := false
				select {
				case <-w.Died("node2"):
					ended = true
					w.Crash("node2", sim.Kill)
				case <-time.After(5 * time.Second):
					want(t, c, "k", "before", client.FromReplica("node2"))
				}
				w.Break("node2", sim.NoFault)
				if ended {
					w.Start("node2")
				}
				// Hints that were refused are brought once there is space.
				time.Sleep(2 * time.Minute)
				for i := range 200 {
					want(t, c, fmt.Sprint("k", i), "during", client.FromReplica("node2"))
				}
			})
		})
	}
}

// Connections that break in the middle fail no operation, lost datagrams take no node
// for dead.
func TestResetsAndLoss(t *testing.T) {
	world(t, sim.Config{Seed: 26, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Net.SetLoss(0.2)
		for i := range 40 {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			if _, err := c.Put(ctx, fmt.Append(nil, "k", i), []byte("v")); err != nil {
				t.Fatalf("put %d: %v", i, err)
			}
			cancel()
			a, b := fmt.Sprint("node", 1+i%3), fmt.Sprint("node", 1+(i+1)%3)
			w.Net.Reset(w.Host(a), w.Host(b))
			time.Sleep(500 * time.Millisecond)
		}
		w.Net.SetLoss(0)
		time.Sleep(10 * time.Second)
		for i := range 40 {
			if _, err := c.Get(context.Background(), fmt.Append(nil, "k", i), client.R("all")); errors.Is(err, client.ErrNotFound) || err != nil {
				t.Errorf("k%d: %v", i, err)
			}
		}
	})
}
