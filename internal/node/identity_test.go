package node

import (
	"context"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// fakeControl is an orchestrator that answers with an error, or breaks the
// connection when it has none.
type fakeControl struct {
	adminv1.UnimplementedControlServiceServer
	err    error
	server *grpc.Server
	calls  atomic.Int32
}

func (f *fakeControl) CreateNamespace(ctx context.Context, _ *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	f.calls.Add(1)
	if f.err == nil {
		go f.server.Stop()
		<-ctx.Done()
	}
	return nil, f.err
}

func (f *fakeControl) serve(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.server = grpc.NewServer()
	adminv1.RegisterControlServiceServer(f.server, f)
	go f.server.Serve(l)
	t.Cleanup(f.server.Stop)
	return l.Addr().String()
}

// A change goes to another orchestrator only when the one before certainly did
// nothing; what can be repeated always does.
func TestUnansweredChange(t *testing.T) {
	for _, tc := range []struct {
		name   string
		first  error
		again  repeat
		reason string
		asked  int32
	}{
		{"change, outcome unknown", rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown, "x"), change, rpc.ReasonOutcomeUnknown, 0},
		{"change, broken connection", nil, change, rpc.ReasonOutcomeUnknown, 0},
		{"change, no leader", rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "x"), change, rpc.ReasonNoLeader, 1},
		{"change, refused", rpc.Errorf(codes.AlreadyExists, "NAMESPACE_EXISTS", "x"), change, "NAMESPACE_EXISTS", 0},
		{"idempotent, outcome unknown", rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown, "x"), idempotent, rpc.ReasonNoLeader, 1},
		{"idempotent, broken connection", nil, idempotent, rpc.ReasonNoLeader, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			gone, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			gone.Close()
			first, second := &fakeControl{err: tc.first}, &fakeControl{err: rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "no leader")}
			// Nobody listens at the first address, so nothing is ever sent there.
			addresses := []string{gone.Addr().String(), first.serve(t), second.serve(t)}
			_, err = anyOrchestrator(context.Background(), rpc.Transport{Dial: rpc.NetDialer}, addresses, tc.again,
				func(ctx context.Context, c adminv1.ControlServiceClient, opts ...grpc.CallOption) (*adminv1.CreateNamespaceResponse, error) {
					return c.CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{}, opts...)
				})
			if e := rpc.AsError(err); e == nil || e.Reason != tc.reason || first.calls.Load() != 1 || second.calls.Load() != tc.asked {
				t.Errorf("error %v, asked %d and %d times; want %s, 1 and %d", e, first.calls.Load(), second.calls.Load(), tc.reason, tc.asked)
			}
		})
	}
}

// Orchestrators that accept connections and say nothing, as paused ones do, are not
// waited for one by one.
func TestSilentOrchestrators(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	answers := &fakeControl{err: rpc.Errorf(codes.AlreadyExists, "NAMESPACE_EXISTS", "x")}
	addresses := []string{silent.Addr().String(), silent.Addr().String(), silent.Addr().String(), answers.serve(t)}
	began := time.Now()
	_, err = anyOrchestrator(context.Background(), rpc.Transport{Dial: rpc.NetDialer}, addresses, idempotent,
		func(ctx context.Context, c adminv1.ControlServiceClient, opts ...grpc.CallOption) (*adminv1.CreateNamespaceResponse, error) {
			return c.CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{}, opts...)
		})
	if rpc.AsError(err).Reason != "NAMESPACE_EXISTS" || time.Since(began) > orchestratorTimeout {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

func TestOrchestratorsAreListedOnce(t *testing.T) {
	known := &topology.Topology{Orchestrators: []topology.Orchestrator{{Address: "b:1"}, {Address: "c:1"}}}
	if got := orchestrators([]string{"a:1", "b:1", "a:1"}, known); !slices.Equal(got, []string{"a:1", "b:1", "c:1"}) {
		t.Errorf("addresses %v", got)
	}
}
