package sim_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/cli/recovery"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// loseTwo writes keys that all nodes have, and one that node1 has not; then node2 and node3
// lose their disks.
func loseTwo(t *testing.T, w *sim.World) {
	c := w.Client()
	defer c.Close()
	for i := range 40 {
		put(t, c, fmt.Sprint("all", i), "v")
	}
	time.Sleep(time.Second)
	w.Crash("node1", sim.Kill)
	time.Sleep(4 * time.Second)
	put(t, c, "two", "v")
	for _, n := range []string{"node2", "node3"} {
		w.Crash(n, sim.Kill)
		w.Wipe(n)
	}
	w.Start("node1")
	time.Sleep(8 * time.Second)
}

// whole waits until every node has all keys that were left.
func whole(t *testing.T, w *sim.World, nodes ...string) {
	t.Helper()
	began := time.Now()
	for {
		top := agreed(t, w.Control("node1"))
		ok := true
		for _, n := range nodes {
			inc := top.Resolve(n).Incarnation
			ok = ok && top.SlotCounts(3)[inc] > 0 && len(top.Incoming(inc)) == 0
		}
		for i := range top.Ring {
			ok = ok && top.Ring[i].Moving() < 0
		}
		for _, n := range top.Nodes {
			ok = ok && n.LostEpoch == 0 // it has left
		}
		if ok {
			break
		}
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("not whole again: %+v; %s", top.Nodes, waits(t, w, nodes[0]))
		}
		time.Sleep(500 * time.Millisecond)
	}
	time.Sleep(2 * time.Second)
	c := w.Client()
	defer c.Close()
	for i := range 40 {
		want(t, c, fmt.Sprint("all", i), "v")
	}
	if _, err := c.Get(context.Background(), []byte("two")); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("what only the lost nodes had: %v", err)
	}
	put(t, c, "after", "v")
	want(t, c, "after", "v")
}

// Two of three copies are lost. Nothing is given up by itself; when people say so, the
// newcomers take in what is left, and what may be lost is told.
func TestLossIsAccepted(t *testing.T) {
	world(t, sim.Config{Seed: 97, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctl := func() adminv1.ControlServiceClient { return w.Control("node1") }
		none, err := ctl().AcceptLoss(timeout(t, 5*time.Second), &adminv1.AcceptLossRequest{})
		if err != nil || len(none.GetLoss().GetNodes()) != 0 {
			t.Fatalf("while all is well: %v, %v", none, err)
		}
		loseTwo(t, w)
		if _, err := ctl().AcceptLoss(timeout(t, 5*time.Second), &adminv1.AcceptLossRequest{Vnodes: []uint32{99}}); rpc.AsError(err).Code != codes.InvalidArgument {
			t.Errorf("of a vnode that there is not: %v", err)
		}
		w.Start("node2")
		w.Start("node3")
		time.Sleep(60 * time.Second)
		before := agreed(t, ctl())
		for i := range before.Ring {
			if n := before.Ring[i].Slots; before.Node(n[0].Node) == nil && before.Node(n[1].Node) == nil {
				t.Fatalf("vnode %d was given up by itself: %+v", i, n)
			}
		}
		if said := waits(t, w, "node2") + waits(t, w, "node3"); !strings.Contains(said, "kvctl recover --accept-loss") {
			t.Errorf("newcomers that cannot be filled say %s", said)
		}
		found, err := ctl().AcceptLoss(timeout(t, 5*time.Second), &adminv1.AcceptLossRequest{DryRun: true})
		if err != nil || len(found.GetLoss().GetNodes()) != 2 || len(found.GetLoss().GetVnodes()) != 16 || agreed(t, ctl()).Epoch != before.Epoch {
			t.Fatalf("dry run: %v, %v", found, err)
		}
		_, err = ctl().AcceptLoss(timeout(t, 5*time.Second), &adminv1.AcceptLossRequest{Epoch: before.Epoch - 1})
		wantReason(t, err, codes.Aborted, "EPOCH_CHANGED")
		if _, err := ctl().AcceptLoss(timeout(t, 5*time.Second), &adminv1.AcceptLossRequest{Epoch: found.GetEpoch()}); err != nil {
			t.Fatal(err)
		}
		whole(t, w, "node2", "node3")
		s := status(t, ctl())
		if l := s.GetLosses(); len(l) != 1 || len(l[0].GetVnodes()) != 16 || l[0].GetNamespaces()[0] != "default" || l[0].GetSinceMs() == 0 || l[0].GetAtMs() < l[0].GetSinceMs() {
			t.Errorf("losses %v", l)
		}
		hist, err := ctl().ListChanges(timeout(t, 5*time.Second), &adminv1.ListChangesRequest{Subject: "loss"})
		if err != nil || len(hist.GetChanges()) != 1 || !strings.Contains(hist.GetChanges()[0].GetWhat(), "16 vnodes may have lost acknowledged writes of default") {
			t.Errorf("history %v, %v", hist, err)
		}
	})
}

// The orchestrators are lost with two of three copies.
func TestControlPlaneIsRecoveredWithLoss(t *testing.T) {
	world(t, sim.Config{Seed: 98, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		loseTwo(t, w)
		loseOrchestrators(w, 1)
		time.Sleep(time.Second)
		o := operator(w, func(o *recovery.Options) { o.Without = []string{"node2", "node3"} })
		e := look(t, o).Refusal()
		if e == nil || e.Reason != "TOO_FEW_NODES" || !strings.Contains(e.Message, "--accept-loss") {
			t.Fatalf("without a majority of the copies: %v", e)
		}
		o.AcceptLoss = true
		s := recoverState(t, o)
		if len(s.Losses) != 1 || len(s.Losses[0].Nodes) != 2 {
			t.Errorf("losses %+v", s.Losses)
		}
		w.Recover("orch1", s)
		w.Start("orch1")
		began(t, w, 1, "node1")
		w.Start("node2")
		w.Start("node3")
		whole(t, w, "node2", "node3")
	})
}
