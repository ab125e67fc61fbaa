package node

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// toldTopologies is an orchestrator that sends what it is told to.
type toldTopologies struct {
	topologyv1.UnimplementedTopologyServiceServer
	watched chan uint64 // the epoch that a watcher knows
	asked   chan uint64 // the epoch that whoever asks knows
	send    chan *topologyv1.WatchTopologyResponse
	answer  chan *topologyv1.GetTopologyResponse
}

func (f *toldTopologies) GetTopology(ctx context.Context, r *topologyv1.GetTopologyRequest) (*topologyv1.GetTopologyResponse, error) {
	f.asked <- r.GetKnownEpoch()
	return <-f.answer, nil
}

func (f *toldTopologies) WatchTopology(r *topologyv1.WatchTopologyRequest, s grpc.ServerStreamingServer[topologyv1.WatchTopologyResponse]) error {
	f.watched <- r.GetKnownEpoch()
	for {
		select {
		case m := <-f.send:
			if err := s.Send(m); err != nil {
				return err
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

// told starts such an orchestrator and returns a node's topologies that know it. The node
// has epoch 5.
func told(t *testing.T) (*toldTopologies, *topologies) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &toldTopologies{
		watched: make(chan uint64, 1), asked: make(chan uint64, 1),
		send: make(chan *topologyv1.WatchTopologyResponse), answer: make(chan *topologyv1.GetTopologyResponse, 1),
	}
	server := grpc.NewServer()
	topologyv1.RegisterTopologyServiceServer(server, f)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	store, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	fence := replica.NewFence(topologyOf(t, 5))
	ts := newTopologies(store, fence, nil, rpc.Transport{Dial: rpc.NetDialer}, "c", []string{l.Addr().String()}, slog.New(slog.DiscardHandler))
	ts.adopted = func(*topology.Topology) {}
	return f, ts
}

// topologyOf returns a small topology that differs from epoch to epoch.
func topologyOf(t *testing.T, epoch uint64) *topology.Topology {
	t.Helper()
	top, err := topology.FromProto(&topologyv1.Topology{
		ClusterId: "c", Epoch: epoch, Vnodes: 2, Settings: topology.DefaultSettings().Proto(),
		Nodes: []*topologyv1.Node{{Incarnation: epoch, Name: "n"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// A node notices by the checksum of its epoch that it has another topology than was agreed
// on, and has no settings that are right until there is a later epoch.
func TestWrongTopologyIsNoticed(t *testing.T) {
	f, ts := told(t)
	here := ts.current()
	pb := here.Proto()
	pb.Settings.MaxHints = 7
	agreed, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	check := func(d *topologyv1.TopologyDelta, answer *topology.Topology, asks bool) {
		t.Helper()
		f.answer <- &topologyv1.GetTopologyResponse{Topology: answer.Proto()}
		if err := ts.check(t.Context(), ts.seeds[0], d); err != nil {
			t.Fatal(err)
		}
		select {
		case known := <-f.asked:
			if !asks || known != 0 {
				t.Fatalf("the node asks for what differs from epoch %d", known)
			}
		default:
			if <-f.answer; asks {
				t.Fatal("the node does not ask")
			}
		}
	}
	right := here.Settings.Hash()
	for _, d := range []*topologyv1.TopologyDelta{nil, here.Check(), topologyOf(t, 6).Check(), topology.Diff(here, topologyOf(t, 6))} {
		check(d, agreed, false)
	}
	newer := here.Check()
	newer.Sum++ // of software that knows more
	check(newer, here, true)
	check(newer, here, false)
	if ts.settingsHash() != right {
		t.Error("the settings are taken for wrong")
	}
	check(agreed.Check(), agreed, true)
	check(agreed.Check(), agreed, false)
	if ts.current() != here || ts.settingsHash() == right || ts.settingsHash() == agreed.Settings.Hash() {
		t.Errorf("settings %x are in use", ts.settingsHash())
	}
	if err := ts.adopt(topologyOf(t, 6)); err != nil || ts.settingsHash() != right {
		t.Errorf("the settings are still taken for wrong, %v", err)
	}
	pb.Epoch = 8
	later, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	wrong := ts.current().Check()
	wrong.Sum++
	check(wrong, later, true)
	if ts.current().Epoch != 8 || ts.settingsHash() != agreed.Settings.Hash() {
		t.Errorf("epoch %d is in use", ts.current().Epoch)
	}
}

// A node makes each topology of the one that was sent before, whatever it got elsewhere,
// and asks for the whole where that does not fit.
func TestTopologyByDelta(t *testing.T) {
	f, ts := told(t)
	of := func(epoch uint64) *topology.Topology { return topologyOf(t, epoch) }
	has := func(epoch uint64) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for ts.current().Epoch != epoch {
			changed := ts.changed()
			if ts.current().Epoch == epoch {
				break
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("the node is at epoch %d, not %d", ts.current().Epoch, epoch)
			}
		}
		if !proto.Equal(ts.current().Proto(), of(epoch).Proto()) {
			t.Fatalf("epoch %d is %v", epoch, ts.current().Proto())
		}
	}
	delta := func(from, to uint64) *topologyv1.WatchTopologyResponse {
		return &topologyv1.WatchTopologyResponse{Delta: topology.Diff(of(from), of(to))}
	}

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); ts.run(ctx) }()
	if known := <-f.watched; known != 5 {
		t.Fatalf("the node says it knows epoch %d", known)
	}
	f.send <- delta(5, 6)
	has(6)
	if err := ts.adopt(of(7)); err != nil { // from a peer, before the watch brings it
		t.Fatal(err)
	}
	f.send <- delta(6, 8)
	has(8)

	bad := delta(8, 9)
	bad.Delta.Nodes[0].Name = "m"
	f.send <- bad
	if known := <-f.asked; known != 0 {
		t.Fatalf("the node asks for what differs from epoch %d", known)
	}
	f.answer <- &topologyv1.GetTopologyResponse{Topology: of(9).Proto()}
	has(9)
	f.send <- delta(9, 10) // on the same watch
	has(10)

	f.answer <- &topologyv1.GetTopologyResponse{Delta: topology.Diff(of(10), of(12))}
	if err := ts.refresh(ctx, 12); err != nil {
		t.Fatal(err)
	}
	if known := <-f.asked; known != 10 {
		t.Fatalf("the node asks for what differs from epoch %d, not from its own", known)
	}
	has(12)
	cancel()
	<-ended
}
