package sim_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// seen returns a node as the orchestrators' leader sees it.
func seen(t *testing.T, w *sim.World, name string) *adminv1.ObservedNode {
	t.Helper()
	s := status(t, w.Control("node1"))
	for i, n := range s.GetTopology().GetNodes() {
		if n.GetName() == name {
			return s.GetNodes()[i]
		}
	}
	t.Fatalf("%s is not in the topology", name)
	return nil
}

// wantHealth checks a node's health and that its reason says all of some texts; no text
// stands for no reason.
func wantHealth(t *testing.T, w *sim.World, name string, state topologyv1.NodeHealth_State, texts ...string) {
	t.Helper()
	n := seen(t, w, name)
	h := n.GetHealth()
	ok := h.GetState() == state && (len(texts) > 0) == (h.GetReason() != "")
	for _, text := range texts {
		ok = ok && strings.Contains(h.GetReason(), text)
	}
	if !ok {
		t.Errorf("%s is %s because %q, want %s %q; checks %v", name, h.GetState(), h.GetReason(), state, texts, n.GetChecks())
	}
}

const (
	wantHealthy   = topologyv1.NodeHealth_STATE_HEALTHY
	wantUnhealthy = topologyv1.NodeHealth_STATE_UNHEALTHY
)

// operate puts and gets for a while; every operation must succeed within 5 s.
func operate(t *testing.T, c *client.Client, d time.Duration) {
	t.Helper()
	for i, end := 0, time.Now().Add(d); time.Now().Before(end); i++ {
		key := fmt.Append(nil, "operate", i)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		if _, err := c.Put(ctx, key, []byte("v")); err != nil {
			t.Fatalf("put %d: %v", i, err)
		}
		if v, err := c.Get(ctx, key); err != nil || string(v.Value) != "v" {
			t.Fatalf("get %d: %v", i, err)
		}
		cancel()
		time.Sleep(50 * time.Millisecond)
	}
}

func TestHungProcessIsUnhealthy(t *testing.T) {
	world(t, sim.Config{Seed: 51, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Pause("node3")
		operate(t, c, 10*time.Second)
		wantHealth(t, w, "node3", wantUnhealthy, "no connection to it comes about", "2 of 2 nodes cannot reach it either", "gossip has it dead")
		n := seen(t, w, "node3")
		if checks := n.GetChecks(); n.GetGossip() != "dead" || len(checks) < 6 || checks[len(checks)-1].GetPassed() || n.GetHealth().GetSinceMs() == 0 {
			t.Errorf("shown %v", n)
		}
		w.Resume("node3")
		operate(t, c, 15*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
		if checks := seen(t, w, "node3").GetChecks(); len(checks) != 10 || checks[9].GetAgeMs() > 1500 {
			t.Errorf("the newest 10 checks are %v", checks)
		}
	})
}

func TestKilledProcessIsUnhealthy(t *testing.T) {
	world(t, sim.Config{Seed: 52, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Crash("node3", sim.Kill)
		operate(t, c, 10*time.Second)
		wantHealth(t, w, "node3", wantUnhealthy, "nobody listens at its address", "2 of 2 nodes cannot reach it either", "gossip has it dead")
	})
}

// An orchestrator that is not heard by a node believes the other nodes.
func TestOneWayCutFromTheOrchestrator(t *testing.T) {
	world(t, sim.Config{Seed: 53, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Net.Cut(w.Host("orch1"), w.Host("node3"))
		for range 20 {
			operate(t, c, time.Second)
			if h := seen(t, w, "node3").GetHealth(); h.GetState() != wantHealthy {
				t.Fatalf("it is unhealthy: %s", h.GetReason())
			}
		}
		wantHealth(t, w, "node3", wantHealthy, "orch1 cannot reach it, 2 of 2 nodes can")
		for _, name := range []string{"node1", "node2"} {
			wantHealth(t, w, name, wantHealthy)
		}
		w.Net.Heal(w.Host("orch1"), w.Host("node3"))
		operate(t, c, 5*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
	})
}

// saysUnreachable returns the nodes that a node says it cannot reach.
func saysUnreachable(t *testing.T, w *sim.World, name string) []uint64 {
	t.Helper()
	s, err := adminv1.NewStatusServiceClient(w.Conn(name)).GetNodeStatus(timeout(t, time.Second), &adminv1.GetNodeStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return s.GetStatus().GetUnreachable()
}

// What only one of two nodes sends the other is lost: both say so within seconds, and both
// go on.
func TestOneWayCutBetweenTwoNodes(t *testing.T) {
	world(t, sim.Config{Seed: 54, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Net.Cut(w.Host("node1"), w.Host("node2"))
		operate(t, c, 3*time.Second)
		for name, other := range map[string]uint64{"node1": 2, "node2": 1} {
			if got := saysUnreachable(t, w, name); !slices.Equal(got, []uint64{other}) {
				t.Errorf("%s says it cannot reach %v", name, got)
			}
		}
		for range 15 {
			operate(t, c, time.Second)
			for _, name := range []string{"node1", "node2", "node3"} {
				wantHealth(t, w, name, wantHealthy)
			}
		}
		w.Net.Heal(w.Host("node1"), w.Host("node2"))
		operate(t, c, 5*time.Second)
		if got := saysUnreachable(t, w, "node1"); len(got) != 0 {
			t.Errorf("node1 still cannot reach %v", got)
		}
	})
}

// A node that only the orchestrators reach is of no use to the others.
func TestNodeThatItsPeersCannotReach(t *testing.T) {
	world(t, sim.Config{Seed: 55, Nodes: 4, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		others := []string{"node1", "node2", "node4"}
		for _, o := range others {
			w.Net.Cut(w.Host(o), w.Host("node3"))
		}
		operate(t, c, 10*time.Second)
		wantHealth(t, w, "node3", wantUnhealthy, "3 of 3 nodes cannot reach it: node1, node2, node4")
		for _, o := range others {
			wantHealth(t, w, o, wantHealthy)
			w.Net.Heal(w.Host(o), w.Host("node3"))
		}
		operate(t, c, 10*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
	})
}

// A node that answers probes too late is not taken for dead while its peers get answers;
// once they do not either, it is.
func TestSlowNode(t *testing.T) {
	world(t, sim.Config{Seed: 56, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		slow := func(by time.Duration) {
			host := w.Host("node3")
			w.Net.SetLatency(func(from, to string) (base, jitter time.Duration) {
				if from == host || to == host {
					return by, 20 * time.Millisecond
				}
				return 50 * time.Microsecond, 100 * time.Microsecond
			})
		}
		slow(300 * time.Millisecond) // a probe takes two of them, 500 ms are allowed
		operate(t, c, 3*time.Second)
		for range 20 {
			operate(t, c, time.Second)
			wantHealth(t, w, "node3", wantHealthy, "slow: orch1 gets no answer in time, 2 of 2 nodes can")
		}
		slow(6 * time.Second) // no ping is answered until links break
		operate(t, c, 20*time.Second)
		wantHealth(t, w, "node3", wantUnhealthy, "it does not answer in time", "2 of 2 nodes cannot reach it either")
		slow(0)
		operate(t, c, 20*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
	})
}

// A node whose disk does not finish a sync notices it by itself, serves nothing, and goes
// on when the disk does.
func TestHungDisk(t *testing.T) {
	var hung atomic.Bool
	delay := func(name string) time.Duration {
		if name == "node3" && hung.Load() {
			return 40 * time.Second
		}
		return 0
	}
	world(t, sim.Config{Seed: 57, Nodes: 3, Orchestrators: 1, SyncDelay: delay}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		hung.Store(true)
		operate(t, c, 9*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
		operate(t, c, 6*time.Second)
		wantHealth(t, w, "node3", wantUnhealthy, "it does not serve: its disk has not finished a sync for 1")
		if s := seen(t, w, "node3").GetStatus(); s.GetState() != adminv1.NodeStatus_STATE_STALLED || s.GetOldestSyncMs() < 10_000 {
			t.Errorf("it says %v", s)
		}
		if _, err := c.Get(timeout(t, time.Second), []byte("k"), client.FromReplica("node3")); err == nil || !strings.Contains(err.Error(), "has not finished a sync") {
			t.Errorf("a read of it: %v", err)
		}
		hung.Store(false)
		operate(t, c, 45*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
		put(t, c, "after", "v", client.W("all"))
	})
}

// A full disk is no death: writes are refused there, and that is shown.
func TestFullDiskIsShown(t *testing.T) {
	world(t, sim.Config{Seed: 58, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		w.Break("node3", sim.DiskFull)
		operate(t, c, 5*time.Second)
		wantHealth(t, w, "node3", wantHealthy, "refuses writes, free space or add nodes")
		w.Break("node3", sim.NoFault)
		operate(t, c, 10*time.Second)
		wantHealth(t, w, "node3", wantHealthy)
	})
}

// An orchestrator that is cut off from everybody, or that reaches few nodes, makes nobody
// lose any.
func TestCutOffOrchestrator(t *testing.T) {
	world(t, sim.Config{Seed: 59, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		lone := leader(t, w)
		w.Isolate(lone)
		operate(t, c, 15*time.Second)
		for _, name := range []string{"node1", "node2", "node3"} {
			wantHealth(t, w, name, wantHealthy)
		}
		w.Reconnect(lone)
		operate(t, c, 5*time.Second)
		led := leader(t, w)
		for _, name := range []string{"node2", "node3"} {
			w.Net.Cut(w.Host(led), w.Host(name))
		}
		operate(t, c, 15*time.Second)
		wantHealth(t, w, "node1", wantHealthy)
		for _, name := range []string{"node2", "node3"} {
			wantHealth(t, w, name, wantHealthy, led+" cannot reach it, 1 of 1 nodes can")
		}
	})
}
