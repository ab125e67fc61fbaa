package node

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// kvService serves clients, by streams and by unary calls.
type kvService struct {
	kvv1.UnimplementedKVServiceServer
	*coordinator.Coordinator
	node *Node
}

func (s kvService) Put(ctx context.Context, r *kvv1.PutRequest) (*kvv1.PutResponse, error) {
	return s.Coordinator.Put(ctx, r)
}

func (s kvService) Get(ctx context.Context, r *kvv1.GetRequest) (*kvv1.GetResponse, error) {
	return s.Coordinator.Get(ctx, r)
}

func (s kvService) Delete(ctx context.Context, r *kvv1.DeleteRequest) (*kvv1.DeleteResponse, error) {
	return s.Coordinator.Delete(ctx, r)
}

func (s kvService) Batch(ctx context.Context, r *kvv1.BatchRequest) (*kvv1.BatchResponse, error) {
	return s.Coordinator.Batch(ctx, r)
}

func (s kvService) Scan(ctx context.Context, r *kvv1.ScanRequest) (*kvv1.ScanResponse, error) {
	return s.Coordinator.Scan(ctx, r)
}

func (s kvService) Trace(ctx context.Context, r *kvv1.TraceRequest) (*kvv1.TraceResponse, error) {
	return s.Coordinator.Trace(ctx, r)
}

// Session serves a client's stream. Each call of a frame is served on its own.
func (s kvService) Session(stream grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]) error {
	md := metadata.Pairs(mdIncarnation, strconv.FormatUint(s.node.id.Incarnation, 10), rpc.MDUptime, strconv.FormatInt(s.node.uptime().Milliseconds(), 10))
	return rpc.Serve(rpc.KVServerStream(stream), md, rpc.KV, s.node.pool,
		func(ctx context.Context, received time.Time, calls []*kvv1.SessionCall, reply func(*kvv1.SessionReply)) {
			var wg sync.WaitGroup
			defer wg.Wait()
			if calls = s.thin(received, calls, reply); len(calls) == 0 {
				return
			}
			for _, c := range calls[1:] {
				s.node.pool.GoFor(&wg, func() { reply(s.serve(ctx, received, c)) })
			}
			reply(s.serve(ctx, received, calls[0]))
		})
}

// thin refuses the requests of a frame that would be refused for the node's load, before
// anything is spent on them, and returns the others.
func (s kvService) thin(received time.Time, calls []*kvv1.SessionCall, reply func(*kvv1.SessionReply)) []*kvv1.SessionCall {
	free := s.Coordinator.Free()
	if len(calls) <= free {
		return calls
	}
	kept := calls[:0]
	for _, c := range calls {
		if c.GetPing() != nil || c.GetTrace() != nil || len(kept) < free {
			kept = append(kept, c)
			continue
		}
		reply(&kvv1.SessionReply{Id: c.GetId(), Error: s.Coordinator.Full(time.Since(received)).Proto()})
	}
	return kept
}

func (s kvService) serve(ctx context.Context, received time.Time, c *kvv1.SessionCall) *kvv1.SessionReply {
	s.Coordinator.Waited(time.Since(received))
	if ms := c.GetTimeoutMs(); ms > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, received.Add(time.Duration(ms)*time.Millisecond))
		defer cancel()
	}
	reply := &kvv1.SessionReply{Id: c.GetId()}
	if err := s.tooLate(c); err != nil {
		reply.Error = err.Proto()
		return reply
	}
	var err error
	switch r := c.GetRequest().(type) {
	case *kvv1.SessionCall_Put:
		m := &kvv1.SessionReply_Put{}
		m.Put, err = s.Coordinator.Put(ctx, r.Put)
		reply.Response = m
	case *kvv1.SessionCall_Get:
		m := &kvv1.SessionReply_Get{}
		m.Get, err = s.Coordinator.Get(ctx, r.Get)
		reply.Response = m
	case *kvv1.SessionCall_Delete:
		m := &kvv1.SessionReply_Delete{}
		m.Delete, err = s.Coordinator.Delete(ctx, r.Delete)
		reply.Response = m
	case *kvv1.SessionCall_Batch:
		m := &kvv1.SessionReply_Batch{}
		m.Batch, err = s.Coordinator.Batch(ctx, r.Batch)
		reply.Response = m
	case *kvv1.SessionCall_Scan:
		m := &kvv1.SessionReply_Scan{}
		m.Scan, err = s.Coordinator.Scan(ctx, r.Scan)
		reply.Response = m
	case *kvv1.SessionCall_Trace:
		m := &kvv1.SessionReply_Trace{}
		m.Trace, err = s.Coordinator.Trace(ctx, r.Trace)
		reply.Response = m
	case *kvv1.SessionCall_Ping:
		reply.Response = &kvv1.SessionReply_Ping{Ping: &kvv1.PingResponse{
			WallMs: uint64(s.node.clock.Wall()), Epoch: s.node.fence.Topology().Epoch,
			UptimeMs: uint64(s.node.uptime().Milliseconds()),
		}}
	default:
		err = rpc.Errorf(codes.Unimplemented, "UNKNOWN_OPERATION", "this node does not know the operation: upgrade it")
	}
	if err != nil {
		return &kvv1.SessionReply{Id: c.GetId(), Error: rpc.AsError(err).Proto()}
	}
	return reply
}

// tooLate refuses a write whose client may have gone elsewhere with it by now.
func (s kvService) tooLate(c *kvv1.SessionCall) *rpc.Error {
	by := time.Duration(c.GetStartByMs()) * time.Millisecond
	if by == 0 || s.node.uptime() <= by {
		return nil
	}
	switch c.GetRequest().(type) {
	case *kvv1.SessionCall_Put, *kvv1.SessionCall_Delete, *kvv1.SessionCall_Batch:
		return rpc.Errorf(codes.Unavailable, rpc.ReasonTooLate, "the write arrived %s after the time by which it had to begin", (s.node.uptime() - by).Round(time.Millisecond))
	}
	return nil
}

// replicaService serves other nodes.
type replicaService struct {
	replicav1.UnimplementedReplicaServiceServer
	node *Node
}

func (s replicaService) Link(stream grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]) error {
	in, _ := metadata.FromIncomingContext(stream.Context())
	if err := s.node.peers.greet(in); err != nil {
		return err
	}
	s.node.peers.heard(in)
	address := first(in, mdAddress)
	md := metadata.Pairs(mdIncarnation, strconv.FormatUint(s.node.id.Incarnation, 10))
	return rpc.Serve(rpc.ReplicaServerStream(stream), md, rpc.Replica, s.node.pool,
		func(ctx context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
			s.node.replica.Handle(ctx, address, calls, reply)
		})
}

// topologyService hands out what the node keeps.
type topologyService struct {
	topologyv1.UnimplementedTopologyServiceServer
	node *Node
}

// watchInterval is how often a watcher hears something at least.
const watchInterval = 2 * time.Second

func (s topologyService) check(clusterID string) error {
	t := s.node.fence.Topology()
	if t.Epoch == 0 {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "this node has no topology yet: it waits for an orchestrator")
	}
	if clusterID != "" && clusterID != t.ClusterID {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this is cluster %s, not %s", t.ClusterID, clusterID)
	}
	return nil
}

func (s topologyService) GetTopology(_ context.Context, r *topologyv1.GetTopologyRequest) (*topologyv1.GetTopologyResponse, error) {
	if err := s.check(r.GetClusterId()); err != nil {
		return nil, err
	}
	resp := &topologyv1.GetTopologyResponse{}
	resp.Topology, resp.Delta = s.node.topologies.recent.Update(r.GetKnownEpoch(), s.node.fence.Topology())
	return resp, nil
}

func (s topologyService) WatchTopology(r *topologyv1.WatchTopologyRequest, stream grpc.ServerStreamingServer[topologyv1.WatchTopologyResponse]) error {
	if err := s.check(r.GetClusterId()); err != nil {
		return err
	}
	known, told := r.GetKnownEpoch(), map[uint64]*topologyv1.NodeHealth{}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		changed := s.node.topologies.changed()
		t := s.node.fence.Topology()
		resp := &topologyv1.WatchTopologyResponse{Health: topology.HealthNews(told, s.node.healthOf(t)), WallMs: uint64(s.node.clock.Wall())}
		resp.Topology, resp.Delta = s.node.topologies.recent.Update(known, t)
		known = max(known, t.Epoch)
		if err := stream.Send(resp); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-s.node.stopping:
			return rpc.Errorf(codes.Unavailable, rpc.ReasonStopping, "the node is stopping")
		case <-changed:
		case <-s.node.healthChanged():
		case <-tick.C:
		}
	}
}

// controlService passes requests on to the orchestrators, and describes the cluster
// itself when none answers.
type controlService struct {
	adminv1.UnimplementedControlServiceServer
	node *Node
}

func forward[Q, T any](ctx context.Context, n *Node, again repeat, r Q, call func(adminv1.ControlServiceClient, context.Context, Q, ...grpc.CallOption) (T, error)) (T, error) {
	return anyOrchestrator(ctx, n.transport, n.topologies.orchestrators(), again, func(ctx context.Context, c adminv1.ControlServiceClient, opts ...grpc.CallOption) (T, error) {
		return call(c, ctx, r, opts...)
	})
}

func (s controlService) CreateNamespace(ctx context.Context, r *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	resp, err := forward(ctx, s.node, change, r, adminv1.ControlServiceClient.CreateNamespace)
	s.follow(ctx, resp.GetEpoch())
	return resp, err
}

func (s controlService) UpdateNamespace(ctx context.Context, r *adminv1.UpdateNamespaceRequest) (*adminv1.UpdateNamespaceResponse, error) {
	resp, err := forward(ctx, s.node, change, r, adminv1.ControlServiceClient.UpdateNamespace)
	s.follow(ctx, resp.GetEpoch())
	return resp, err
}

func (s controlService) DropNamespace(ctx context.Context, r *adminv1.DropNamespaceRequest) (*adminv1.DropNamespaceResponse, error) {
	resp, err := forward(ctx, s.node, change, r, adminv1.ControlServiceClient.DropNamespace)
	s.follow(ctx, resp.GetEpoch())
	return resp, err
}

// follow waits a moment for the epoch a change was made in, so that a client that
// goes on at this node finds what it made.
func (s controlService) follow(ctx context.Context, epoch uint64) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = s.node.topologies.refresh(ctx, epoch) // it is only a courtesy
}

func (s controlService) ListChanges(ctx context.Context, r *adminv1.ListChangesRequest) (*adminv1.ListChangesResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.ListChanges)
}

func (s controlService) GetClusterStatus(ctx context.Context, r *adminv1.GetClusterStatusRequest) (*adminv1.GetClusterStatusResponse, error) {
	resp, err := forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.GetClusterStatus)
	var e *rpc.Error
	if errors.As(err, &e) && e.Reason == rpc.ReasonNoLeader {
		return s.node.clusterStatus(ctx), nil
	}
	return resp, err
}

func (s controlService) StartOperation(ctx context.Context, r *adminv1.StartOperationRequest) (*adminv1.StartOperationResponse, error) {
	return forward(ctx, s.node, change, r, adminv1.ControlServiceClient.StartOperation)
}

func (s controlService) SteerOperation(ctx context.Context, r *adminv1.SteerOperationRequest) (*adminv1.SteerOperationResponse, error) {
	return forward(ctx, s.node, change, r, adminv1.ControlServiceClient.SteerOperation)
}

func (s controlService) ListOperations(ctx context.Context, r *adminv1.ListOperationsRequest) (*adminv1.ListOperationsResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.ListOperations)
}

func (s controlService) GetCapacity(ctx context.Context, r *adminv1.GetCapacityRequest) (*adminv1.GetCapacityResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.GetCapacity)
}

func (s controlService) UpdateSettings(ctx context.Context, r *adminv1.UpdateSettingsRequest) (*adminv1.UpdateSettingsResponse, error) {
	resp, err := forward(ctx, s.node, change, r, adminv1.ControlServiceClient.UpdateSettings)
	s.follow(ctx, resp.GetAfter().GetEpoch())
	return resp, err
}

func (s controlService) ListSettings(ctx context.Context, r *adminv1.ListSettingsRequest) (*adminv1.ListSettingsResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.ListSettings)
}

func (s controlService) AcceptLoss(ctx context.Context, r *adminv1.AcceptLossRequest) (*adminv1.AcceptLossResponse, error) {
	return forward(ctx, s.node, change, r, adminv1.ControlServiceClient.AcceptLoss)
}

func (s controlService) HoldBack(ctx context.Context, r *adminv1.HoldBackRequest) (*adminv1.HoldBackResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.HoldBack)
}

func (s controlService) ListProvisions(ctx context.Context, r *adminv1.ListProvisionsRequest) (*adminv1.ListProvisionsResponse, error) {
	return forward(ctx, s.node, idempotent, r, adminv1.ControlServiceClient.ListProvisions)
}

// statusService describes this process.
type statusService struct {
	adminv1.UnimplementedStatusServiceServer
	node *Node
}

func (s statusService) GetNodeStatus(context.Context, *adminv1.GetNodeStatusRequest) (*adminv1.GetNodeStatusResponse, error) {
	return &adminv1.GetNodeStatusResponse{Status: s.node.status()}, nil
}

// hotKeysDefault is how many keys are named where no limit is asked for, hotKeysMost at most.
const (
	hotKeysDefault = 20
	hotKeysMost    = 256
)

func (s statusService) GetHotKeys(_ context.Context, r *adminv1.GetHotKeysRequest) (*adminv1.GetHotKeysResponse, error) {
	limit := min(int(r.GetLimit()), hotKeysMost)
	if limit == 0 {
		limit = hotKeysDefault
	}
	keys, perSecond, window := s.node.coordinator.HotKeys(limit)
	resp := &adminv1.GetHotKeysResponse{PerSecond: perSecond, WindowMs: uint64(window.Milliseconds())}
	for _, k := range keys {
		resp.Keys = append(resp.Keys, &adminv1.HotKey{
			NamespaceId: k.Namespace, Key: k.Key, KeyBytes: uint32(k.Bytes), ReadsPerSecond: k.ReadsPerSecond, WritesPerSecond: k.WritesPerSecond,
		})
	}
	return resp, nil
}

func (s statusService) GetNodeUse(context.Context, *adminv1.GetNodeUseRequest) (*adminv1.GetNodeUseResponse, error) {
	resp := &adminv1.GetNodeUseResponse{}
	s.node.use(func(p storage.Place, u storage.Use) {
		resp.Vnodes = append(resp.Vnodes, &adminv1.VnodeUse{NamespaceId: p.Namespace, Vnode: p.Vnode, Bytes: u.Bytes, Records: u.Records})
	})
	return resp, nil
}
