package sim_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
)

// attempt puts with a short deadline and reports whether that was acknowledged.
func attempt(c *client.Client, key string, opts ...client.CallOption) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := c.Put(ctx, []byte(key), []byte("v"), opts...)
	return err == nil
}

// A paused node answers nobody, its connections stay, and it gets what it missed.
func TestPause(t *testing.T) {
	world(t, sim.Config{Seed: 31, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "v", client.W("all"))
		w.Pause("node3")
		if attempt(c, "k", client.W("all")) {
			t.Error("a paused node acknowledged a write")
		}
		for i := range 30 {
			put(t, c, fmt.Sprint("k", i), "during")
		}
		if _, err := c.Get(timeout(t, time.Second), []byte("k"), client.FromReplica("node3")); err == nil {
			t.Error("a paused node answers a client")
		}
		w.Resume("node3")
		time.Sleep(10 * time.Second)
		for i := range 30 {
			want(t, c, fmt.Sprint("k", i), "during", client.FromReplica("node3"))
		}
	})
}

// Bytes wait while a process is paused for a moment, and come then.
func TestStall(t *testing.T) {
	world(t, sim.Config{Seed: 32, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "v", client.W("all"))
		w.Pause("node2")
		time.AfterFunc(300*time.Millisecond, func() { w.Resume("node2") })
		began := time.Now()
		put(t, c, "k", "w", client.W("all"))
		if took := time.Since(began); took < 300*time.Millisecond || took > 400*time.Millisecond {
			t.Errorf("a write to all took %s, want a little more than 300ms", took)
		}
	})
}

// A partition keeps the sides apart and nothing else; it heals.
func TestPartition(t *testing.T) {
	world(t, sim.Config{Seed: 33, Nodes: 5, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		side := []string{"node1", "node2", "orch1"}
		w.Partition(side)
		dial := func(from, to, port string) bool {
			conn, err := w.Net.Dial(timeout(t, 100*time.Millisecond), w.Host(from), w.Host(to)+port)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}
		for _, link := range []struct {
			from, to, port string
			passes         bool
		}{
			{"node1", "node3", ":7400", false}, {"node3", "node1", ":7400", false}, {"orch1", "orch2", ":7390", false}, {"orch2", "node2", ":7400", false},
			{"node1", "node2", ":7400", true}, {"node3", "node4", ":7400", true}, {"node2", "orch1", ":7390", true},
		} {
			if dial(link.from, link.to, link.port) != link.passes {
				t.Errorf("%s reaches %s: %v", link.from, link.to, !link.passes)
			}
		}
		time.Sleep(10 * time.Second)
		for i := range 20 {
			put(t, c, fmt.Sprint("k", i), "during", client.W("1"))
		}
		w.Join(side)
		time.Sleep(20 * time.Second)
		for i := range 20 {
			put(t, c, fmt.Sprint("k", i), "after", client.W("all"))
		}
	})
}

// A link that is cut in one direction: the node is not heard, but hears.
func TestOneWayCut(t *testing.T) {
	world(t, sim.Config{Seed: 34, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		heard := func(from, to string) bool {
			l, err := w.Net.ListenPacket(w.Host(to) + ":9")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s, err := w.Net.ListenPacket(w.Host(from) + ":10")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.Send(w.Host(to)+":9", []byte("hello")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-l.Packets():
				return true
			case <-time.After(time.Second):
				return false
			}
		}
		w.Net.Cut(w.Host("node1"), w.Host("node2"))
		if heard("node1", "node2") || !heard("node2", "node1") {
			t.Error("the cut is not one of what node1 sends")
		}
		c := w.Client()
		defer c.Close()
		for i := range 30 {
			put(t, c, fmt.Sprint("k", i), "v")
		}
		w.Net.Heal(w.Host("node1"), w.Host("node2"))
		if !heard("node1", "node2") {
			t.Error("the cut does not heal")
		}
		time.Sleep(10 * time.Second)
		for i := range 30 {
			put(t, c, fmt.Sprint("k", i), "w", client.W("all"))
		}
	})
}

// A flipped bit lands in a table on disk and changes nothing else.
func TestFlipBit(t *testing.T) {
	world(t, sim.Config{Seed: 35, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		rng := rand.New(rand.NewPCG(35, 1))
		value := make([]byte, 8<<10)
		for i := range value {
			value[i] = byte(rng.Uint32())
		}
		for i := range 300 { // more than a memtable
			put(t, c, fmt.Sprint("k", i), string(value))
		}
		c.Close()
		w.Stop("node1")
		before := tables(t, w)
		where, err := w.FlipBit("node1", rng)
		if err != nil {
			t.Fatal(err)
		}
		after := tables(t, w)
		if len(before) == 0 || len(before) != len(after) {
			t.Fatalf("%d tables before, %d after", len(before), len(after))
		}
		bits := 0
		for name := range before {
			for i := range before[name] {
				for x := before[name][i] ^ after[name][i]; x != 0; x &= x - 1 {
					bits++
				}
			}
		}
		if bits != 1 {
			t.Errorf("%d bits differ, want 1: %s", bits, where)
		}
	})
}

func tables(t *testing.T, w *sim.World) map[string][]byte {
	t.Helper()
	disk := w.CopyDisk("node1")
	names, err := disk.List("data")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, n := range names {
		if strings.HasSuffix(n, ".sst") {
			b, err := disk.UnsafeGetFileDataBuffer(filepath.Join("data", n))
			if err != nil {
				t.Fatal(err)
			}
			out[n] = slices.Clone(b)
		}
	}
	return out
}

// A log without its end is noticed at the start.
func TestLoseTail(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			world(t, sim.Config{Seed: seed, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
				c := w.Client()
				defer c.Close()
				for i := range 100 {
					put(t, c, fmt.Sprint("k", i), "v", client.W("all"))
				}
				time.Sleep(3 * time.Second) // a mark is written
				w.Stop("node3")
				how, err := w.LoseTail("node3", rand.New(rand.NewPCG(seed, 7)))
				if err != nil {
					t.Fatal(err)
				}
				w.Start("node3")
				for i := range 100 {
					v, err := c.Get(context.Background(), fmt.Append(nil, "k", i))
					if err != nil || string(v.Value) != "v" {
						t.Errorf("after %s: get k%d = %q, %v", how, i, v.Value, err)
					}
					own, err := c.Get(timeout(t, time.Second), fmt.Append(nil, "k", i), client.FromReplica("node3"))
					if errors.Is(err, client.ErrNotFound) || err == nil && string(own.Value) != "v" {
						t.Fatalf("after %s: node3 serves its k%d = %q, %v", how, i, own.Value, err)
					}
				}
			})
		})
	}
}

func TestRunConfigIsPrinted(t *testing.T) {
	for _, c := range []sim.RunConfig{{Seed: 1, Minutes: 8, Faults: sim.Tracks()}, {Seed: 6, Minutes: 0.5, Faults: []string{"crashes", "lost-disks"}}, {Seed: 4, Faults: []string{}}} {
		got, err := sim.ParseRunConfig(c.String())
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%+v is printed as %q and read as %+v, %v", c, c, got, err)
		}
	}
	if got, want := (sim.RunConfig{Seed: 3, Minutes: 2}).String(), "seed=3 minutes=2 nodes=5 orchestrators=3 faults=crashes,"; !strings.HasPrefix(got, want) {
		t.Errorf("%q does not begin with %q", got, want)
	}
	loops, err := sim.ParseRunConfig("seed=4 minutes=2 faults=autonomy")
	if want := "seed=4 minutes=2 nodes=5 orchestrators=3 faults=more-cuts,"; err != nil || !strings.HasPrefix(loops.String(), want) || !strings.Contains(loops.String(), ",lost-leaders,") {
		t.Errorf("%q does not begin with %q: %v", loops, want, err)
	}
	for _, s := range []string{"seed", "seed=x", "speed=1", "faults=meteors"} {
		if _, err := sim.ParseRunConfig(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
