package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// A refresh and the watch take in topologies at once, in any order.
func TestTopologyOnlyGoesForward(t *testing.T) {
	const last = 200
	c := &Client{}
	c.view.Store(&view{topology: &topology.Topology{}})
	var learning sync.WaitGroup
	for epoch := uint64(1); epoch <= last; epoch++ {
		learning.Go(func() {
			c.advance(&topology.Topology{Epoch: epoch}, nil)
			if got := c.view.Load().topology.Epoch; got < epoch {
				t.Errorf("epoch %d after %d was taken in", got, epoch)
			}
		})
		learning.Go(func() { c.advance(nil, map[uint64]bool{1: true}) })
	}
	learning.Wait()
	if v := c.view.Load(); v.topology.Epoch != last || !v.unhealthy[1] {
		t.Errorf("epoch %d, unhealthy %v", v.topology.Epoch, v.unhealthy)
	}
}

// A node that is cut off from the others takes them for unhealthy. A client that it
// still reaches must not avoid those for that.
func TestClientLeavesTheOpinionOfACutOffNode(t *testing.T) {
	health := func(nodes int, unhealthy ...uint64) []*topologyv1.NodeHealth {
		var r []*topologyv1.NodeHealth
		for i := range uint64(nodes) {
			r = append(r, &topologyv1.NodeHealth{Incarnation: i + 1, State: topologyv1.NodeHealth_STATE_HEALTHY})
		}
		for _, u := range unhealthy {
			r[u-1].State = topologyv1.NodeHealth_STATE_UNHEALTHY
		}
		return r
	}
	// #7 to #9 are reporting nodes.
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 1, Vnodes: 16, FoundingNodes: 1, Settings: topology.DefaultSettings().Proto()}
	for i := uint64(1); i < 10; i++ {
		n := &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA}
		if i >= 7 {
			n.Role = topologyv1.Role_ROLE_REPORTING
		}
		pb.Nodes = append(pb.Nodes, n)
	}
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		answer []*topologyv1.NodeHealth
		left   bool
	}{
		{"all is well", health(5), false},
		{"two are gone", health(5, 2, 4), false},
		{"most are gone", health(5, 2, 4, 5), true},
		{"half are gone", health(4, 2, 4), true},
		{"one of two is gone", health(2, 2), false},
		{"the reporting nodes are gone", health(9, 2, 7, 8, 9), false},
		{"all but the reporting nodes are gone", health(9, 2, 3, 4), true},
	} {
		c := &Client{}
		c.view.Store(&view{topology: top, unhealthy: map[uint64]bool{1: true}})
		err := c.learn(top, topology.HealthAfter(nil, tc.answer, top))
		if left := errors.Is(err, errCutOff); left != tc.left || !left && err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if kept := c.view.Load().unhealthy[1]; kept != tc.left {
			t.Errorf("%s: the old opinion was kept: %v", tc.name, kept)
		}
	}
}

// servedTopology sends a difference that does not fit to whoever watches, and the whole,
// or what it is told to, to whoever asks.
type servedTopology struct {
	topologyv1.UnimplementedTopologyServiceServer
	watched *topologyv1.WatchTopologyResponse
	asked   chan *topologyv1.GetTopologyRequest
	answer  *topologyv1.GetTopologyResponse
}

func (s *servedTopology) GetTopology(_ context.Context, r *topologyv1.GetTopologyRequest) (*topologyv1.GetTopologyResponse, error) {
	s.asked <- r
	return s.answer, nil
}

func (s *servedTopology) WatchTopology(_ *topologyv1.WatchTopologyRequest, out grpc.ServerStreamingServer[topologyv1.WatchTopologyResponse]) error {
	return out.Send(s.watched)
}

// A client that cannot make anything of a difference asks for the whole topology.
func TestClientAsksForTheWholeTopology(t *testing.T) {
	of := func(epoch uint64) *topology.Topology {
		top, err := topology.FromProto(&topologyv1.Topology{
			ClusterId: "c", Epoch: epoch, Vnodes: 2, Settings: topology.DefaultSettings().Proto(),
			Nodes: []*topologyv1.Node{{Incarnation: epoch, Name: "n"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return top
	}
	for name, tc := range map[string]struct {
		watched *topologyv1.TopologyDelta
		asks    bool
	}{
		"it fits":     {topology.Diff(of(5), of(7)), false},
		"of another":  {topology.Diff(of(4), of(7)), true},
		"of a future": {topology.Diff(of(6), of(7)), true},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := &servedTopology{
				watched: &topologyv1.WatchTopologyResponse{Delta: tc.watched}, asked: make(chan *topologyv1.GetTopologyRequest, 1),
				answer: &topologyv1.GetTopologyResponse{Topology: of(7).Proto()},
			}
			server := grpc.NewServer()
			topologyv1.RegisterTopologyServiceServer(server, s)
			go server.Serve(l)
			defer server.Stop()
			c := &Client{transport: rpc.Transport{Dial: rpc.NetDialer}}
			c.view.Store(&view{topology: of(5)})
			if err := c.watch(t.Context(), l.Addr().String()); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if got := c.view.Load().topology; got.Epoch != 7 || got.Node(7) == nil || got.Node(5) != nil {
				t.Errorf("the client has %v", got.Proto())
			}
			select {
			case r := <-s.asked:
				if !tc.asks || r.GetKnownEpoch() != 0 || r.GetClusterId() != "c" {
					t.Errorf("it asked for %v", r)
				}
			default:
				if tc.asks {
					t.Error("it did not ask")
				}
			}
			s.answer = &topologyv1.GetTopologyResponse{Delta: topology.Diff(of(5), of(6))}
			if got, err := c.fetchTopology(t.Context(), l.Addr().String(), of(5)); err != nil || got.Epoch != 6 {
				t.Errorf("a refresh leads to %v, %v", got, err)
			}
			if r := <-s.asked; r.GetKnownEpoch() != 5 {
				t.Errorf("a refresh asked for %v", r)
			}
		})
	}
}

// What an endpoint says that is none of the cluster's data nodes hides nothing that these say.
func TestWhatTellsMore(t *testing.T) {
	last := 0
	for _, reason := range []string{rpc.ReasonWrongPeer, rpc.ReasonNotReady, rpc.ReasonNotEnoughReplicas} {
		if now := telling(rpc.Errorf(codes.Unavailable, reason, "no")); now <= last {
			t.Errorf("%s tells no more than what comes before", reason)
		} else {
			last = now
		}
	}
}

// A node that says it does not serve is asked after all others for a while: it refuses at
// once, so it has the fewest calls under way.
func TestNodesThatDoNotServeAreAvoided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for reason, want := range map[string]time.Duration{rpc.ReasonStopping: avoidFor, rpc.ReasonNotReady: avoidFor, rpc.ReasonOverloaded: 50 * time.Millisecond, rpc.ReasonNotEnoughReplicas: 0} {
			c := &Client{}
			e := rpc.Errorf(codes.Unavailable, reason, "no")
			e.RetryAfter = 50 * time.Millisecond
			c.avoid("a:1", e)
			if c.avoids("b:1") {
				t.Errorf("%s: another node is avoided", reason)
			}
			if want > 0 {
				time.Sleep(want - time.Millisecond)
				if !c.avoids("a:1") {
					t.Errorf("%s: it is not avoided for %s", reason, want)
				}
				time.Sleep(2 * time.Millisecond)
			}
			if c.avoids("a:1") {
				t.Errorf("%s: it is avoided longer than %s", reason, want)
			}
		}
	})
}
