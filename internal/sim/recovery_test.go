package sim_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/cli/recovery"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// operator is a person who recovers the control plane.
func operator(w *sim.World, change func(*recovery.Options)) recovery.Options {
	o := recovery.Options{
		Transport: rpc.Transport{Dial: w.Net.Dialer("10.0.3.1")}, Endpoints: w.Endpoints()[:1], Timeout: 2 * time.Second,
		By: "somebody", Now: time.Now().UnixMilli(),
	}
	if change != nil {
		change(&o)
	}
	return o
}

func look(t *testing.T, o recovery.Options) *recovery.View {
	t.Helper()
	v, err := recovery.Look(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// recover seals the nodes and returns the state of the new generation.
func recoverState(t *testing.T, o recovery.Options) *topology.State {
	t.Helper()
	s, err := look(t, o).Recover(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// loseOrchestrators ends all orchestrators, and their disks.
func loseOrchestrators(w *sim.World, n int) {
	for i := range n {
		w.Crash(fmt.Sprint("orch", i+1), sim.Kill)
		w.Wipe(fmt.Sprint("orch", i+1))
	}
}

// began waits until the nodes named follow a generation.
func began(t *testing.T, w *sim.World, generation uint64, nodes ...string) {
	t.Helper()
	for _, name := range nodes {
		for i := 0; ; i++ {
			if g := topology.Generation(nodeEpoch(t, w, name)); g == generation {
				break
			} else if i == 300 {
				t.Fatalf("%s is in generation %d, not %d", name, g, generation)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

func nodeEpoch(t *testing.T, w *sim.World, name string) uint64 {
	t.Helper()
	resp, err := adminv1.NewStatusServiceClient(w.Conn(name)).GetNodeStatus(timeout(t, 2*time.Second), &adminv1.GetNodeStatusRequest{})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return resp.GetStatus().GetEpoch()
}

// grow gives a new node slots by an operation, and waits for its end.
func grow(t *testing.T, w *sim.World, name string) {
	t.Helper()
	w.AddNode(name, "z1")
	w.Start(name)
	time.Sleep(5 * time.Second)
	ctl := w.Control("node1")
	top := agreed(t, ctl)
	newcomer := top.Resolve(name).Incarnation
	if topology.Generation(newcomer) != topology.Generation(top.Epoch) {
		t.Errorf("%s is #%d in epoch %s (invariant 10)", name, newcomer, topology.EpochString(top.Epoch))
	}
	var moves []*topologyv1.Move
	for v := range top.Ring {
		if v%4 == 0 {
			moves = append(moves, &topologyv1.Move{Vnode: uint32(v), Slot: 0, From: top.Ring[v].Slots[0].Node, To: newcomer})
		}
	}
	_, err := ctl.StartOperation(timeout(t, 5*time.Second), &adminv1.StartOperationRequest{Epoch: top.Epoch, Operation: &topologyv1.Operation{Kind: "apply", Title: "test", Moves: moves}})
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		if now := agreed(t, ctl); now.SlotCounts(3)[newcomer] == len(moves) && len(now.Incoming(newcomer)) == 0 {
			return
		}
		if i == 300 {
			t.Fatalf("%s has not got its slots; %s", name, waits(t, w, name))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// All orchestrators are lost with their disks: the nodes serve on, the control plane begins
// anew, and what was written is there; the ring can be changed again.
func TestControlPlaneIsRecovered(t *testing.T) {
	for _, orchestrators := range []int{1, 3} {
		t.Run(fmt.Sprint(orchestrators), func(t *testing.T) {
			world(t, sim.Config{Seed: 90, Nodes: 4, Orchestrators: orchestrators}, func(t *testing.T, w *sim.World) {
				if _, err := create(w.Control("node1"), "other", &adminv1.NamespaceSettings{N: ptr(uint32(3))}); err != nil {
					t.Fatal(err)
				}
				l := startWriters(t, w)
				time.Sleep(3 * time.Second)
				v := look(t, operator(w, nil))
				if e := v.Refusal(); e == nil || e.Reason != "ORCHESTRATORS_ANSWER" {
					t.Errorf("while the orchestrators live: %v", e)
				}
				if _, err := v.Recover(context.Background()); err == nil {
					t.Error("it is recovered all the same")
				}
				loseOrchestrators(w, orchestrators)
				time.Sleep(3 * time.Second)
				before := nodeEpoch(t, w, "node1")
				s := recoverState(t, operator(w, nil))
				if s.Topology.Epoch>>48 != 1 || s.Topology.Namespace("other") == nil || nodeEpoch(t, w, "node1") != before {
					t.Errorf("epoch %s, nodes at %s", topology.EpochString(s.Topology.Epoch), topology.EpochString(nodeEpoch(t, w, "node1")))
				}
				time.Sleep(3 * time.Second) // sealed nodes serve
				again := recoverState(t, operator(w, nil))
				if again.Topology.Recovery != s.Topology.Recovery || again.Topology.Epoch != s.Topology.Epoch {
					t.Errorf("run again it is another recovery: %s, %s", s.Topology.Recovery, again.Topology.Recovery)
				}
				for i := range orchestrators {
					w.Recover(fmt.Sprint("orch", i+1), again)
					w.Start(fmt.Sprint("orch", i+1))
				}
				began(t, w, 1, "node1", "node2", "node3", "node4")
				time.Sleep(5 * time.Second)
				if e := look(t, operator(w, nil)).Refusal(); e == nil || e.Reason != "ORCHESTRATORS_ANSWER" {
					t.Errorf("when all is well again: %v", e)
				}
				if _, err := create(w.Control("node2"), "third", nil); err != nil {
					t.Error(err)
				}
				grow(t, w, "node5")
				// Restarted, an orchestrator needs no file.
				w.Recover("orch1", nil)
				w.Crash("orch1", sim.Kill)
				w.Start("orch1")
				time.Sleep(3 * time.Second)
				if _, err := create(w.Control("node2"), "fourth", nil); err != nil {
					t.Error(err)
				}
				l.end(t, 5, 0)
				hist, err := w.Control("node1").ListChanges(context.Background(), &adminv1.ListChangesRequest{Subject: "cluster"})
				if err != nil || len(hist.GetChanges()) == 0 || !strings.Contains(hist.GetChanges()[0].GetWhat(), "recovered by somebody as generation 1") {
					t.Errorf("history %v, %v", hist, err)
				}
			})
		})
	}
}

// The orchestrators were not lost after all: their majority comes back while the nodes are
// sealed, and when they follow others. Nobody follows it, and it says why (invariants 8, 12).
func TestOldOrchestratorsComeBack(t *testing.T) {
	world(t, sim.Config{Seed: 91, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		l := startWriters(t, w)
		time.Sleep(3 * time.Second)
		orchs := []string{"orch1", "orch2", "orch3"}
		for _, o := range orchs {
			w.Crash(o, sim.Kill)
		}
		time.Sleep(3 * time.Second)
		before := nodeEpoch(t, w, "node1")
		w.AddOrchestrator("fresh")
		s := recoverState(t, operator(w, func(o *recovery.Options) { o.Orchestrators = []string{w.Host("fresh") + ":7390"} }))
		for _, o := range orchs {
			w.Start(o)
		}
		time.Sleep(5 * time.Second)
		// They agree on what they like, and no node takes it in, a restarted one either.
		if _, err := create(w.Control("orch1"), "stray", nil); err != nil {
			t.Fatalf("the old majority agrees on nothing: %v", err)
		}
		w.Crash("node2", sim.Kill)
		w.Start("node2")
		time.Sleep(10 * time.Second)
		for _, n := range []string{"node1", "node2", "node3"} {
			if e := nodeEpoch(t, w, n); e != before {
				t.Errorf("sealed %s went from epoch %s to %s", n, topology.EpochString(before), topology.EpochString(e))
			}
		}

		w.Recover("fresh", s)
		w.Start("fresh")
		began(t, w, 1, "node1", "node2", "node3")
		time.Sleep(10 * time.Second)
		_, err := create(w.Control("orch2"), "stray2", nil)
		if e := wantReason(t, err, codes.Unavailable, rpc.ReasonNoLeader); !strings.Contains(e.Message, "generation 1") {
			t.Errorf("an old orchestrator says %q", e.Message)
		}
		_, err = topologyv1.NewTopologyServiceClient(w.Conn("orch3")).GetTopology(timeout(t, time.Second), &topologyv1.GetTopologyRequest{})
		wantReason(t, err, codes.Unavailable, rpc.ReasonNoLeader)
		// Changes through nodes reach those that lead now.
		if _, err := create(w.Control("node1"), "third", nil); err != nil {
			t.Error(err)
		}
		top := agreed(t, w.Control("node3"))
		if top.Namespace("stray") != nil || top.Namespace("third") == nil || len(top.Orchestrators) != 1 {
			t.Errorf("namespaces %+v, orchestrators %+v", top.Namespaces, top.Orchestrators)
		}
		grow(t, w, "node4")
		w.Crash("node3", sim.Kill)
		w.Start("node3")
		time.Sleep(5 * time.Second)
		began(t, w, 1, "node1", "node2", "node3", "node4")
		l.end(t, 4, 0)
	})
}

// Some of the new orchestrators are where old ones were, and one of those is started with
// the disk it had: it leads nobody.
func TestOldOrchestratorAtANewOnesAddress(t *testing.T) {
	world(t, sim.Config{Seed: 92, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		for range 3 { // its term grows
			old := leader(t, w)
			w.Crash(old, sim.Kill)
			time.Sleep(3 * time.Second)
			w.Start(old)
			time.Sleep(2 * time.Second)
		}
		old := w.CopyDisk("orch3")
		loseOrchestrators(w, 3)
		s := recoverState(t, operator(w, nil))
		w.SetDisk("orch3", old)
		for _, o := range []string{"orch1", "orch2"} {
			w.Recover(o, s)
			w.Start(o)
		}
		w.Start("orch3")
		began(t, w, 1, "node1", "node2", "node3")
		time.Sleep(20 * time.Second)
		if _, err := create(w.Control("node1"), "x", nil); err != nil {
			t.Fatal(err)
		}
		w.Crash("orch3", sim.Kill)
		w.Recover("orch3", s)
		if err := w.TryStart("orch3"); err == nil || !strings.Contains(err.Error(), "another generation") {
			t.Errorf("the old directory is started with the file: %v", err)
		}
		w.Wipe("orch3")
		w.Start("orch3")
		w.Crash("orch2", sim.Kill)
		time.Sleep(5 * time.Second)
		if _, err := create(w.Control("node1"), "y", nil); err != nil {
			t.Fatal(err)
		}
	})
}

// A node that was down is waited for, or left behind; then it joins the new generation when
// it comes back.
func TestNodeIsLeftBehind(t *testing.T) {
	world(t, sim.Config{Seed: 93, Nodes: 4, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		l := startWriters(t, w)
		time.Sleep(3 * time.Second)
		loseOrchestrators(w, 1)
		w.Crash("node4", sim.Kill)
		time.Sleep(3 * time.Second)
		e := look(t, operator(w, nil)).Refusal()
		if e == nil || e.Reason != "NODES_MISSING" || !strings.Contains(e.Message, "--without node4") {
			t.Fatalf("with a node missing: %v", e)
		}
		without := func(names ...string) func(*recovery.Options) {
			return func(o *recovery.Options) { o.Without = names }
		}
		if e := look(t, operator(w, without("node4", "node1"))).Refusal(); e == nil || e.Reason != "NODE_ANSWERS" {
			t.Errorf("without a node that answers: %v", e)
		}
		if _, err := recovery.Look(context.Background(), operator(w, without("node9"))); rpc.AsError(err).Reason != "NODE_NOT_FOUND" {
			t.Errorf("without a node that there is not: %v", err)
		}
		s := recoverState(t, operator(w, without("node4")))
		// With other nodes it would be another recovery of the same generation.
		if e := look(t, operator(w, without())).Refusal(); e == nil || e.Reason != "NODES_MISSING" {
			t.Errorf("while it is down: %v", e)
		}
		w.Recover("orch1", s)
		w.Start("orch1")
		began(t, w, 1, "node1", "node2", "node3")
		w.Start("node4")
		began(t, w, 1, "node4")
		time.Sleep(5 * time.Second)
		l.end(t, 4, l.done.Load())
	})
}

// Two people recover at once: one of them goes on, or both hear of it, and what was made
// useless stays so. A second loss begins a second generation.
func TestTwoRecoveriesAtOnce(t *testing.T) {
	world(t, sim.Config{Seed: 94, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		loseOrchestrators(w, 1)
		time.Sleep(time.Second)
		a, b := look(t, operator(w, nil)), look(t, operator(w, nil))
		first, err := a.Recover(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Recover(context.Background())
		wantReason(t, err, codes.Aborted, "RECOVERY_BEGUN")
		second := recoverState(t, operator(w, func(o *recovery.Options) { o.TakeOver = true }))
		if topology.Generation(second.Topology.Epoch) <= topology.Generation(first.Topology.Epoch) {
			t.Errorf("a recovery took over with generation %d", topology.Generation(second.Topology.Epoch))
		}
		w.Recover("orch1", first)
		w.Start("orch1")
		time.Sleep(10 * time.Second)
		if e := nodeEpoch(t, w, "node1"); topology.Generation(e) != 0 {
			t.Errorf("a recovery that was taken over is followed, to epoch %s", topology.EpochString(e))
		}
		w.Crash("orch1", sim.Kill)
		w.Wipe("orch1")
		w.Recover("orch1", second)
		w.Start("orch1")
		began(t, w, 2, "node1", "node2", "node3")
		loseOrchestrators(w, 1)
		time.Sleep(time.Second)
		w.Recover("orch1", recoverState(t, operator(w, nil)))
		w.Start("orch1")
		began(t, w, 3, "node1", "node2", "node3")
	})
}

// One of two operators meets nodes that the other has sealed already, and the other way
// round: both stop, and one takes over.
func TestMixedSeals(t *testing.T) {
	world(t, sim.Config{Seed: 95, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		loseOrchestrators(w, 1)
		time.Sleep(time.Second)
		for i, name := range []string{"node1", "node2"} {
			v := look(t, operator(w, nil))
			seal := v.Seal
			if i == 1 {
				seal = &adminv1.Seal{Recovery: "other", Generation: 1, By: "another"}
			}
			if _, err := adminv1.NewRecoveryServiceClient(w.Conn(name)).Seal(timeout(t, 2*time.Second), &adminv1.SealRequest{ClusterId: v.Newest.ClusterID, Seal: seal}); err != nil {
				t.Fatal(err)
			}
		}
		e := look(t, operator(w, nil)).Refusal()
		if e == nil || e.Reason != "RECOVERY_BEGUN" || !strings.Contains(e.Message, "another") || !strings.Contains(e.Message, "--take-over") {
			t.Fatalf("with two recoveries begun: %v", e)
		}
		w.Recover("orch1", recoverState(t, operator(w, func(o *recovery.Options) { o.TakeOver = true })))
		w.Start("orch1")
		began(t, w, 2, "node1", "node2", "node3")
	})
}

// Moves that were under way go on in the new generation.
func TestMovesGoOnInANewGeneration(t *testing.T) {
	world(t, sim.Config{Seed: 96, Nodes: 3, Orchestrators: 1, Vnodes: 64}, func(t *testing.T, w *sim.World) {
		l := startWriters(t, w)
		time.Sleep(3 * time.Second)
		old := incarnation(t, w, "node3")
		w.Crash("node3", sim.Kill)
		w.Wipe("node3")
		w.Start("node3")
		moment(t, w, "node3", begun, old)
		loseOrchestrators(w, 1)
		time.Sleep(time.Second)
		// The directory that was wiped is there no more.
		o := operator(w, func(o *recovery.Options) { o.Without = []string{fmt.Sprint("#", old)} })
		v := look(t, o)
		if len(v.Newest.Incoming(v.Newest.Resolve("node3").Incarnation)) == 0 {
			t.Fatal("no move is under way")
		}
		w.Recover("orch1", recoverState(t, o))
		w.Start("orch1")
		began(t, w, 1, "node1", "node2", "node3")
		replaced(t, w, "node3", old, time.Minute)
		time.Sleep(3 * time.Second)
		l.end(t, 3, l.done.Load())
	})
}
