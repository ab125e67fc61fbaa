package sim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func ptr[T any](v T) *T { return &v }

func create(ctl adminv1.ControlServiceClient, name string, set *adminv1.NamespaceSettings) (*adminv1.CreateNamespaceResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return ctl.CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: name, Settings: set})
}

func status(t *testing.T, ctl adminv1.ControlServiceClient) *adminv1.GetClusterStatusResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := ctl.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func agreed(t *testing.T, ctl adminv1.ControlServiceClient) *topology.Topology {
	t.Helper()
	top, err := topology.FromProto(status(t, ctl).GetTopology())
	if err != nil {
		t.Fatal(err)
	}
	return top
}

func wantReason(t *testing.T, err error, code codes.Code, reason string) *rpc.Error {
	t.Helper()
	e := rpc.AsError(err)
	if e == nil || e.Code != code || e.Reason != reason {
		t.Fatalf("error = %v (%+v), want %s %s", err, e, code, reason)
	}
	return e
}

// leader returns the orchestrator that leads.
func leader(t *testing.T, w *sim.World) string {
	t.Helper()
	for _, o := range status(t, w.Control("node1")).GetOrchestrators() {
		if o.GetStatus().GetRaftState() == "leader" {
			return o.GetName()
		}
	}
	t.Fatal("no orchestrator leads")
	return ""
}

func TestRingFormsEvenlyOverZones(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 5, Orchestrators: 3, Zones: 3}, func(t *testing.T, w *sim.World) {
		top := agreed(t, w.Control("node3"))
		if !top.Formed() || len(top.Orchestrators) != 3 || len(top.Nodes) != 5 {
			t.Fatalf("formed %v, %d orchestrators, %d nodes", top.Formed(), len(top.Orchestrators), len(top.Nodes))
		}
		for v := range top.Ring {
			zones := map[string]bool{}
			for _, s := range top.Ring[v].Slots {
				zones[top.Node(s.Node).Zone] = true
			}
			if len(zones) != 3 {
				t.Errorf("vnode %d lies in %d zones", v, len(zones))
			}
		}
		for _, n := range status(t, w.Control("node3")).GetNodes() {
			if n.GetHealth().GetState() != topologyv1.NodeHealth_STATE_HEALTHY || n.GetStatus().GetEpoch() != top.Epoch {
				t.Errorf("node %v", n)
			}
		}
	})
}

func TestNamespaces(t *testing.T) {
	world(t, sim.Config{Seed: 2, Nodes: 5, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctl := w.Control("node2")
		resp, err := create(ctl, "wide", &adminv1.NamespaceSettings{N: ptr(uint32(5)), WriteQuorum: ptr("40%"), ReadQuorum: ptr("quorum")})
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetNamespace().GetN() != 5 || len(resp.GetWarnings()) != 1 {
			t.Errorf("response %v", resp)
		}
		c := w.Client(client.WithNamespace("wide"))
		defer c.Close()
		if r := put(t, c, "k", "v"); r.N != 5 || r.Needed != 2 {
			t.Errorf("receipt %+v", r)
		}
		time.Sleep(time.Second)
		for i := range 5 {
			want(t, c, "k", "v", client.FromReplica(fmt.Sprint("node", i+1)))
		}
		_, err = create(ctl, "wide", nil)
		wantReason(t, err, codes.AlreadyExists, "NAMESPACE_EXISTS")
		_, err = create(ctl, "six", &adminv1.NamespaceSettings{N: ptr(uint32(6))})
		if e := wantReason(t, err, codes.FailedPrecondition, "N_ABOVE_NODES"); e.Details["n"] != "6" || e.Details["data_nodes"] != "5" {
			t.Errorf("details %v", e.Details)
		}
		set := func(s *adminv1.NamespaceSettings, epoch uint64) (*adminv1.UpdateNamespaceResponse, error) {
			return ctl.UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: "wide", Settings: s, IfChangedEpoch: epoch})
		}
		changed, err := set(&adminv1.NamespaceSettings{WriteQuorum: ptr("quorum"), TtlMs: ptr(uint64(1000))}, resp.GetNamespace().GetChangedEpoch())
		if err != nil || changed.GetNamespace().GetLeastWriteAcks() != 2 {
			t.Fatalf("%v, %v", changed, err)
		}
		_, err = set(&adminv1.NamespaceSettings{TtlMs: ptr(uint64(5))}, resp.GetNamespace().GetChangedEpoch())
		wantReason(t, err, codes.Aborted, "NAMESPACE_CHANGED")
		put(t, c, "short", "v")
		time.Sleep(2 * time.Second)
		want(t, c, "short", "")

		if _, err := ctl.DropNamespace(context.Background(), &adminv1.DropNamespaceRequest{Name: "wide"}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Get(context.Background(), []byte("k")); !errors.Is(err, client.ErrNamespaceNotFound) {
			t.Errorf("error = %v", err)
		}
		// Made again under the same name, it is empty.
		if _, err := create(ctl, "wide", &adminv1.NamespaceSettings{N: ptr(uint32(3))}); err != nil {
			t.Fatal(err)
		}
		want(t, c, "k", "")
		hist, err := ctl.ListChanges(context.Background(), &adminv1.ListChangesRequest{Subject: "namespace", Name: "wide"})
		if err != nil {
			t.Fatal(err)
		}
		var what []string
		for _, h := range hist.GetChanges() {
			if step := strings.SplitN(h.GetWhat(), ":", 2)[0]; !strings.HasPrefix(step, "operation") { // of the other W
				what = append(what, step)
			}
		}
		if got := strings.Join(what, " "); got != "created set dropped created" {
			t.Errorf("history: %s", got)
		}
	})
}

// The leader is killed under namespace changes: a new one leads within 5 s, and
// nothing that was agreed on is lost.
func TestLeaderKilledUnderChanges(t *testing.T) {
	world(t, sim.Config{Seed: 3, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		ctl := w.Control("node1")
		made := map[string]bool{}
		for round := range 3 {
			for i := range 5 {
				name := fmt.Sprintf("ns-%d-%d", round, i)
				if _, err := create(ctl, name, nil); err != nil {
					t.Fatal(err)
				}
				made[name] = true
			}
			old := leader(t, w)
			w.Crash(old, sim.Kill)
			killed := time.Now()
			name := fmt.Sprintf("after-%d", round)
			for {
				_, err := create(ctl, name, nil)
				if err == nil || rpc.AsError(err).Reason == "NAMESPACE_EXISTS" {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			if took := time.Since(killed); took > 5*time.Second {
				t.Errorf("no new leader within 5s: %s", took)
			}
			made[name] = true
			w.Start(old)
			time.Sleep(2 * time.Second)
		}
		top := agreed(t, ctl)
		for name := range made {
			if top.Namespace(name) == nil {
				t.Errorf("namespace %s is lost", name)
			}
		}
		c := w.Client(client.WithNamespace("after-2"))
		defer c.Close()
		put(t, c, "k", "v")
	})
}

// Invariant 12.
func TestMinorityOfOrchestratorsChangesNothing(t *testing.T) {
	world(t, sim.Config{Seed: 4, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		w.Crash("orch1", sim.Kill)
		w.Crash("orch2", sim.Kill)
		time.Sleep(5 * time.Second)
		_, err := create(w.Control("node1"), "x", nil)
		wantReason(t, err, codes.Unavailable, rpc.ReasonNoLeader)
		s := status(t, w.Control("node1"))
		if s.GetControlPlaneAvailable() || s.GetAnsweredBy() != "node1" || len(s.GetNodes()) != 3 || s.GetNodes()[2].GetStatus().GetName() != "node3" {
			t.Errorf("status without a leader: %v", s)
		}
	})
}

func TestUnhealthyNodesAreNoticedAndComeBack(t *testing.T) {
	world(t, sim.Config{Seed: 5, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		state := func() topologyv1.NodeHealth_State {
			for _, n := range status(t, w.Control("node1")).GetNodes() {
				if n.GetHealth().GetIncarnation() == incarnation(t, w, "node3") {
					return n.GetHealth().GetState()
				}
			}
			return 0
		}
		w.Crash("node3", sim.Kill)
		time.Sleep(8 * time.Second)
		if state() != topologyv1.NodeHealth_STATE_UNHEALTHY {
			t.Error("a dead node is not noticed")
		}
		w.Start("node3")
		time.Sleep(8 * time.Second)
		if state() != topologyv1.NodeHealth_STATE_HEALTHY {
			t.Error("a node that came back is not noticed")
		}
	})
}

func incarnation(t *testing.T, w *sim.World, name string) uint64 {
	t.Helper()
	return agreed(t, w.Control("node1")).Resolve(name).Incarnation
}

// A node whose log lost its tail notices it, sets the damaged directory aside and
// comes back as a new incarnation with all the records, without anybody's help. So
// does one whose store cannot be read.
func TestLostTail(t *testing.T) {
	for name, harm := range map[string]func(*testing.T, vfs.FS){
		"lost tail": cutLog,
		"damaged store": func(t *testing.T, fs vfs.FS) {
			names, err := fs.List("data")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range names {
				if strings.HasPrefix(n, "MANIFEST-") {
					overwrite(t, fs, filepath.Join("data", n), []byte("this is no manifest, but it is long enough for one"))
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			world(t, sim.Config{Seed: 6, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
				c := w.Client()
				defer c.Close()
				for i := range 200 {
					put(t, c, fmt.Sprint("k", i), "v", client.W("all"))
				}
				old := incarnation(t, w, "node3")
				w.Stop("node3")
				harm(t, w.Disk("node3"))
				w.Start("node3")
				replaced(t, w, "node3", old, 30*time.Second)
				time.Sleep(time.Second)
				put(t, c, "k", "v", client.W("all"))
				for i := range 200 {
					want(t, c, fmt.Sprint("k", i), "v", client.FromReplica("node3"))
				}
				names, err := w.Disk("node3").List("data")
				if err != nil || strings.Contains(strings.Join(names, " "), "lost-") {
					t.Errorf("what was set aside is still there: %v, %v", names, err)
				}
			})
		})
	}
}

// Where no other copy is left, what was set aside is kept, and the node says what it
// waits for and serves nothing.
func TestLostTailOfASingleCopy(t *testing.T) {
	world(t, sim.Config{Seed: 18, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		for i := range 200 {
			put(t, c, fmt.Sprint("k", i), "v")
		}
		w.Stop("node1")
		cutLog(t, w.Disk("node1"))
		w.Start("node1")
		time.Sleep(20 * time.Second)
		if said := waits(t, w, "node1"); !strings.Contains(said, "namespace default has 0 voting replicas of vnode 0 left, 1 are needed to rebuild another (N=1)") {
			t.Errorf("it waits for %s", said)
		}
		if _, err := c.Get(timeout(t, 2*time.Second), []byte("k1")); !errors.Is(err, client.ErrUnavailable) {
			t.Errorf("a read: %v", err)
		}
		if _, err := c.Put(timeout(t, 2*time.Second), []byte("k1"), []byte("v")); err == nil {
			t.Error("a write was acknowledged")
		}
		names, err := w.Disk("node1").List("data")
		if err != nil || !strings.Contains(strings.Join(names, " "), "lost-") {
			t.Errorf("the only copy is gone: %v, %v", names, err)
		}
	})
}

// overwrite replaces a file's content.
func overwrite(t *testing.T, fs vfs.FS, path string, b []byte) {
	t.Helper()
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// cutLog takes the second half of the newest log away.
func cutLog(t *testing.T, fs vfs.FS) {
	t.Helper()
	names, err := fs.List("data")
	if err != nil {
		t.Fatal(err)
	}
	newest := ""
	for _, n := range names {
		if strings.HasSuffix(n, ".log") && n > newest {
			newest = n
		}
	}
	path := filepath.Join("data", newest)
	f, err := fs.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	b = bytes.TrimRight(b, "\x00")
	out, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	_, err = out.Write(b[:len(b)/2])
	if err := errors.Join(err, out.Sync(), out.Close()); err != nil {
		t.Fatal(err)
	}
}

// Invariant 10: an old copy of a data directory is turned away, and so is the
// directory of another cluster. A wiped one becomes a new incarnation.
func TestDataDirectoriesAndIncarnations(t *testing.T) {
	world(t, sim.Config{Seed: 7, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		before := incarnation(t, w, "node3")
		w.Stop("node3")
		image := w.CopyDisk("node3")
		w.Start("node3")
		w.Stop("node3")
		current := w.CopyDisk("node3")
		w.SetDisk("node3", image)
		if err := w.TryStart("node3"); err == nil || !strings.Contains(err.Error(), "old copy") {
			t.Errorf("an old copy: %v", err)
		}
		w.SetDisk("node3", current)
		if err := w.TryStart("node3"); err != nil {
			t.Errorf("the current directory: %v", err)
		}
		if after := incarnation(t, w, "node3"); after != before {
			t.Errorf("incarnation was %d, is %d", before, after)
		}
		w.Crash("node3", sim.Kill)
		time.Sleep(8 * time.Second)
		w.Wipe("node3")
		w.Start("node3")
		if after := incarnation(t, w, "node3"); after <= before {
			t.Errorf("a wiped directory has incarnation %d, its predecessor had %d", after, before)
		}
	})
}

func TestDataDirectoryOfAnotherCluster(t *testing.T) {
	var foreign *vfs.MemFS
	world(t, sim.Config{Seed: 8, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Stop("node1")
		foreign = w.CopyDisk("node1")
	})
	world(t, sim.Config{Seed: 9, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Stop("node1")
		w.SetDisk("node1", foreign)
		err := w.TryStart("node1")
		if err == nil || !strings.Contains(err.Error(), "belongs to cluster") || !strings.Contains(err.Error(), "node1") {
			t.Errorf("error = %v", err)
		}
	})
}

// A node that joins a formed ring is a spare: it coordinates and holds nothing.
func TestSpare(t *testing.T) {
	world(t, sim.Config{Seed: 10, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.AddNode("node4", "z1")
		w.Start("node4")
		time.Sleep(3 * time.Second)
		top := agreed(t, w.Control("node4"))
		if len(top.Nodes) != 4 || len(top.Members()) != 3 {
			t.Fatalf("%d nodes, %d members", len(top.Nodes), len(top.Members()))
		}
		if _, err := create(w.Control("node4"), "x", &adminv1.NamespaceSettings{N: ptr(uint32(4))}); rpc.AsError(err).Reason != "N_ABOVE_NODES" {
			t.Errorf("a spare counts toward N: %v", err)
		}
		spare, err := client.New(context.Background(), []string{w.Host("node4") + ":7400"}, client.WithDialer(w.Net.Dialer("10.0.2.99")))
		if err != nil {
			t.Fatal(err)
		}
		defer spare.Close()
		put(t, spare, "k", "v")
		want(t, spare, "k", "v")
		w.Crash("node4", sim.Kill)
		w.Wipe("node4")
		w.AddNode("node1-again", "z1")
	})
}

// Two nodes cannot have one name at once.
func TestNameInUse(t *testing.T) {
	world(t, sim.Config{Seed: 11, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		_, err := w.Control("orch1").RegisterNode(context.Background(), &adminv1.RegisterNodeRequest{
			Name: "node1", Zone: "z1", Role: topologyv1.Role_ROLE_DATA, Address: "10.9.9.9:1", DataId: "another", Boot: 1, BootId: "x",
		})
		wantReason(t, err, codes.AlreadyExists, "NAME_IN_USE")
	})
}

// An orchestrator of another cluster that answers does not stop a node.
func TestOrchestratorOfAnotherCluster(t *testing.T) {
	world(t, sim.Config{Seed: 15, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Crash("orch1", sim.Kill)
		w.Crash("node2", sim.Kill)
		w.Start("node2")
		w.Wipe("orch1")
		w.Start("orch1")
		time.Sleep(10 * time.Second)
		s, err := adminv1.NewStatusServiceClient(w.Conn("node2")).GetNodeStatus(context.Background(), &adminv1.GetNodeStatusRequest{})
		if err != nil || s.GetStatus().GetState() != adminv1.NodeStatus_STATE_SERVING {
			t.Errorf("status %v, %v", s, err)
		}
	})
}

// An orchestrator whose data directory is an older copy changes nothing once it
// hears of a node's epoch, and nodes serve on.
func TestOldCopyOfOrchestrator(t *testing.T) {
	world(t, sim.Config{Seed: 16, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "v")
		old := w.CopyDisk("orch1")
		if _, err := create(w.Control("node1"), "a", nil); err != nil {
			t.Fatal(err)
		}
		w.Crash("orch1", sim.Kill)
		w.SetDisk("orch1", old)
		w.Start("orch1")
		time.Sleep(5 * time.Second)
		_, err := create(w.Control("orch1"), "b", nil)
		wantReason(t, err, codes.DataLoss, "EPOCH_REGRESSION")
		_, err = w.Control("orch1").RegisterNode(context.Background(), &adminv1.RegisterNodeRequest{
			Name: "new", Zone: "z1", Role: topologyv1.Role_ROLE_DATA, Address: "10.9.9.9:1", DataId: "new", Boot: 1, BootId: "x",
		})
		wantReason(t, err, codes.DataLoss, "EPOCH_REGRESSION")
		want(t, c, "k", "v")
	})
}

// Nodes leave an orchestrator that is cut off from the others, without any traffic
// to tell them that there is a newer topology; when none has a leader they serve on.
func TestOrchestratorWithoutLeader(t *testing.T) {
	world(t, sim.Config{Seed: 17, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "v")
		cut := func(lone string) {
			for _, other := range []string{"orch1", "orch2", "orch3"} {
				if other != lone {
					w.Net.Cut(w.Host(lone), w.Host(other))
					w.Net.Cut(w.Host(other), w.Host(lone))
				}
			}
		}
		cut("orch1")
		time.Sleep(3 * time.Second)
		made, err := create(w.Control("orch2"), "later", nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		for i := range 3 {
			s, err := adminv1.NewStatusServiceClient(w.Conn(fmt.Sprint("node", i+1))).GetNodeStatus(context.Background(), &adminv1.GetNodeStatusRequest{})
			if err != nil || s.GetStatus().GetEpoch() != made.GetEpoch() {
				t.Errorf("node%d is at epoch %d, want %d; %v", i+1, s.GetStatus().GetEpoch(), made.GetEpoch(), err)
			}
		}
		cut("orch2")
		for range 30 {
			time.Sleep(time.Second)
			want(t, c, "k", "v")
		}
	})
}

// Of two nodes that start together under one name, one is admitted and the other
// waits until it is known whether that one lives.
func TestOneNameAtOnce(t *testing.T) {
	world(t, sim.Config{Seed: 14, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		register := func(orch, dataID string) error {
			_, err := w.Control(orch).RegisterNode(context.Background(), &adminv1.RegisterNodeRequest{
				Name: "twin", Zone: "z1", Role: topologyv1.Role_ROLE_DATA, Address: "10.9.9.9:1", DataId: dataID, Boot: 1, BootId: "x",
			})
			return err
		}
		results := make(chan error)
		go func() { results <- register("orch1", "a") }()
		go func() { results <- register("orch2", "b") }()
		first, second := <-results, <-results
		if (first == nil) == (second == nil) {
			t.Fatalf("the two got %v and %v", first, second)
		}
		wantReason(t, errors.Join(first, second), codes.Unavailable, rpc.ReasonNotReady)
		time.Sleep(5 * time.Second) // nobody answers at its address
		if err := register("orch3", "c"); err != nil {
			t.Errorf("the name of a dead node: %v", err)
		}
	})
}

// A node 10 minutes ahead stops coordinating once three others say so; nothing is
// lost, and its versions reach nobody.
func TestNodeWithAWrongClock(t *testing.T) {
	world(t, sim.Config{Seed: 12, Nodes: 5, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		put(t, c, "k", "before")
		w.SetClock("node2", 10*time.Minute)
		for i := range 200 {
			if _, err := c.Put(timeout(t, 2*time.Second), []byte("k"), fmt.Append(nil, i)); err != nil {
				t.Fatalf("put %d: %v", i, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		v := want(t, c, "k", "199")
		if ahead := time.Until(v.Version.Time()); ahead > time.Second {
			t.Errorf("a version %s ahead got through", ahead)
		}
		for _, n := range status(t, w.Control("node1")).GetNodes() {
			if s := n.GetStatus(); s.GetClockOk() != (s.GetName() != "node2") {
				t.Errorf("%s: clock ok is %v, offset %d ms of %d opinions", s.GetName(), s.GetClockOk(), s.GetClockOffsetMs(), s.GetClockOpinions())
			}
		}
	})
}

// Orchestrators and nodes tell whoever has a topology only what differs from it.
func TestTopologyTravelsAsADelta(t *testing.T) {
	world(t, sim.Config{Seed: 21, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		before := agreed(t, w.Control("orch1"))
		type watch = grpc.ServerStreamingClient[topologyv1.WatchTopologyResponse]
		servers := []string{"orch1", "node2"}
		fromNone, fromKnown := map[string]watch{}, map[string]watch{}
		open := func(s string, known uint64) watch {
			stream, err := topologyv1.NewTopologyServiceClient(w.Conn(s)).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{KnownEpoch: known})
			if err != nil {
				t.Fatal(err)
			}
			return stream
		}
		// newer waits until a watch brings something.
		newer := func(stream watch) *topologyv1.WatchTopologyResponse {
			t.Helper()
			for {
				m, err := stream.Recv()
				if err != nil {
					t.Fatal(err)
				}
				if d := m.GetDelta(); m.GetTopology() != nil || d.GetEpoch() != d.GetBaseEpoch() {
					return m
				}
			}
		}
		for _, s := range servers {
			fromNone[s], fromKnown[s] = open(s, 0), open(s, before.Epoch)
			if m := newer(fromNone[s]); m.GetTopology().GetEpoch() != before.Epoch || m.GetDelta() != nil {
				t.Errorf("%s begins with %v", s, m)
			}
		}
		if _, err := create(w.Control("orch1"), "another", nil); err != nil {
			t.Fatal(err)
		}
		after := agreed(t, w.Control("orch1"))
		for _, s := range servers {
			for name, stream := range map[string]watch{"none": fromNone[s], "the current one": fromKnown[s]} {
				m := newer(stream)
				got, err := topology.Updated(before, m)
				if m.GetDelta() == nil || err != nil || !proto.Equal(got.Proto(), after.Proto()) {
					t.Errorf("%s, to whoever began with %s: %v, %v", s, name, m, err)
				}
			}
			ask := func(known uint64) *topologyv1.GetTopologyResponse {
				m, err := topologyv1.NewTopologyServiceClient(w.Conn(s)).GetTopology(ctx, &topologyv1.GetTopologyRequest{KnownEpoch: known})
				if err != nil {
					t.Fatal(err)
				}
				return m
			}
			if m := ask(before.Epoch); m.GetDelta() == nil || m.GetTopology() != nil {
				t.Errorf("%s is asked for what is new: %v", s, m)
			}
			if m := ask(after.Epoch); m.GetDelta() != nil || m.GetTopology() != nil {
				t.Errorf("%s has nothing new: %v", s, m)
			}
			if m := ask(0); m.GetTopology() == nil {
				t.Errorf("%s is asked for the whole: %v", s, m)
			}
		}
	})
}
