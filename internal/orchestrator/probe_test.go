package orchestrator

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/simnet"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// probed is a node as probes see it.
type probed struct {
	adminv1.UnimplementedStatusServiceServer
	incarnation uint64
	late        time.Duration
}

func (p *probed) GetNodeStatus(ctx context.Context, _ *adminv1.GetNodeStatusRequest) (*adminv1.GetNodeStatusResponse, error) {
	select {
	case <-time.After(p.late):
	case <-ctx.Done():
	}
	return &adminv1.GetNodeStatusResponse{Status: &adminv1.NodeStatus{Incarnation: p.incarnation, State: adminv1.NodeStatus_STATE_SERVING}}, nil
}

// A node that answers is asked on the same connection again. What a probe says of one that
// does not is what a new connection says.
func TestProbesKeepTheirLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = 500 * time.Millisecond
		network := simnet.New(1)
		dials := 0
		dial := network.Dialer("orch")
		o := &Orchestrator{machine: newMachine(), transport: rpc.Transport{Dial: func(ctx context.Context, address string) (net.Conn, error) {
			dials++
			return dial(ctx, address)
		}}}
		o.machine.state.Store(&topology.State{Topology: &topology.Topology{}})
		h := newProbes(o)
		h.mu.nodes[7] = &observation{}

		var node *probed
		var server *grpc.Server
		start := func(incarnation uint64) {
			t.Helper()
			listener, err := network.Listen("node:1")
			if err != nil {
				t.Fatal(err)
			}
			node, server = &probed{incarnation: incarnation}, rpc.Transport{}.NewServer()
			adminv1.RegisterStatusServiceServer(server, node)
			go server.Serve(listener)
		}
		var l line
		// probe makes a probe and checks what it says, how many connections it took, and
		// how long.
		probe := func(what string, want answer, connections int, took time.Duration) {
			t.Helper()
			before, began := dials, time.Now()
			r := h.probe(t.Context(), &topology.Node{Incarnation: 7, Address: "node:1"}, timeout, &l)
			synctest.Wait()
			if r.answer != want || dials-before != connections {
				t.Errorf("%s: %+v by %d connections, want %v by %d", what, r, dials-before, want, connections)
			}
			if d := time.Since(began); d < took || d > took+10*time.Millisecond {
				t.Errorf("%s: took %s, want %s", what, d, took)
			}
			time.Sleep(time.Second)
		}
		alone := time.Duration(lineAlone * float64(timeout))

		start(7)
		probe("the first", answered, 1, 0)
		for range 10 {
			probe("the next", answered, 0, 0)
		}
		node.late = timeout - 50*time.Millisecond
		probe("slow, but in time", answered, 1, node.late)
		node.late = 0
		probe("in time again", answered, 0, 0)
		node.late = time.Minute
		probe("too slow", silent, 1, timeout)
		node.late = 0
		probe("after that", answered, 1, 0)
		network.Reset("orch", "node")
		probe("broken", answered, 1, 0)
		network.Freeze("node")
		probe("frozen", unconnected, 1, timeout)
		network.Thaw("node")
		probe("thawed", answered, 1, 0)
		network.Cut("orch", "node")
		probe("cut off", unconnected, 1, timeout)
		network.Heal("orch", "node")
		probe("healed", answered, 1, 0)
		network.Cut("orch", "node")
		healed := time.AfterFunc(alone+timeout/10, func() { network.Heal("orch", "node") })
		probe("cut off for a moment", answered, 1, alone+timeout/10)
		healed.Stop()
		server.Stop()
		probe("killed", refused, 1, 0)
		start(7)
		probe("started", answered, 1, 0)
		server.Stop()
		start(8)
		probe("another one at its address", strange, 1, 0)
		probe("still another one", strange, 1, 0)

		l.close()
		server.Stop()
		time.Sleep(time.Minute)
	})
}
