package orchestrator

import (
	"context"
	"net"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/consensus"
	"github.com/kvasirdb/kvasir/internal/rpc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// dyingLeader breaks the connection under a request.
type dyingLeader struct {
	adminv1.UnimplementedControlServiceServer
	server *grpc.Server
}

func (d *dyingLeader) CreateNamespace(ctx context.Context, _ *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	go d.server.Stop()
	<-ctx.Done()
	return nil, ctx.Err()
}

// A leader that dies may have made the change it was sent.
func TestForwardToDyingLeader(t *testing.T) {
	for _, tc := range []struct {
		name   string
		serves bool
		again  repeat
		want   string
	}{
		{"change, sent", true, change, rpc.ReasonOutcomeUnknown},
		{"idempotent, sent", true, idempotent, rpc.ReasonNoLeader},
		{"change, not sent", false, change, rpc.ReasonNoLeader},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			leader := &dyingLeader{server: grpc.NewServer()}
			adminv1.RegisterControlServiceServer(leader.server, leader)
			defer leader.server.Stop()
			if tc.serves {
				go leader.server.Serve(l)
			} else {
				l.Close()
			}
			_, err = forward(context.Background(), rpc.Transport{Dial: rpc.NetDialer}, l.Addr().String(), tc.again,
				&adminv1.CreateNamespaceRequest{}, adminv1.ControlServiceClient.CreateNamespace)
			if e := rpc.AsError(err); e == nil || e.Reason != tc.want {
				t.Errorf("error %v, want %s", e, tc.want)
			}
		})
	}
}

func TestConsensusErrors(t *testing.T) {
	for err, want := range map[error]string{
		consensus.ErrNotLeader:      rpc.ReasonNoLeader,
		consensus.ErrLeadershipLost: rpc.ReasonOutcomeUnknown,
		consensus.ErrTimeout:        rpc.ReasonOutcomeUnknown,
		consensus.ErrClosed:         rpc.ReasonOutcomeUnknown,
	} {
		if e := rpc.AsError(consensusError(err)); e.Reason != want {
			t.Errorf("%v becomes %s, want %s", err, e.Reason, want)
		}
	}
}

// leadingAlone returns an orchestrator that leads itself.
func leadingAlone(t *testing.T) *Orchestrator {
	t.Helper()
	streams, err := consensus.NewTCPStreamLayer("127.0.0.1:0", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	servers := []consensus.Server{{Name: "a", Address: streams.Addr().String()}}
	o := &Orchestrator{machine: newMachine()}
	if o.raft, err = consensus.Open(consensus.Config{Name: "a", Servers: servers, FS: vfs.NewMem(), Dir: "raft", Streams: streams}, newMachine()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.raft.Close() })
	<-o.raft.LeaderChanges()
	o.leading.Store(o.raft.Status().Term)
	return o
}

// What was known in an earlier term does not count: leadership may have been lost
// and won again.
func TestLeadsInOneTerm(t *testing.T) {
	o := leadingAlone(t)
	term := o.raft.Status().Term
	for known, want := range map[uint64]bool{0: false, term - 1: false, term: true} {
		if o.leading.Store(known); o.leads() != want {
			t.Errorf("in term %d with a barrier in term %d: leads %v", term, known, !want)
		}
	}
}
