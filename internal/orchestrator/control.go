package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/consensus"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// mdForwarded marks a request that a follower passed on; it is passed on once.
const mdForwarded = "kvasir-forwarded"

// maxConflicts bounds how often a change is decided anew because the topology
// changed under it.
const maxConflicts = 10

// propose has a command agreed on and returns what came of it.
func (o *Orchestrator) propose(ctx context.Context, cmd *topologyv1.Command) (applied, error) {
	if cmd.Change != nil {
		cmd.Change.AtMs = uint64(o.cfg.Seams.WallClock())
	}
	b, err := proto.Marshal(cmd)
	if err != nil {
		return applied{}, err
	}
	res, err := o.raft.Propose(ctx, b)
	if err != nil {
		return applied{}, consensusError(err)
	}
	a := res.(applied)
	return a, a.err
}

// consensusError tells a caller what Raft's failure means for its request.
func consensusError(err error) error {
	switch {
	case errors.Is(err, consensus.ErrNotLeader):
		return noLeader()
	case errors.Is(err, consensus.ErrLeadershipLost), errors.Is(err, consensus.ErrTimeout), errors.Is(err, consensus.ErrClosed):
		return outcomeUnknown()
	}
	return err
}

func outcomeUnknown() *rpc.Error {
	return rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown, "the orchestrators' leader changed, stopped or lost its majority: the change may have been made or not")
}

func noLeader() *rpc.Error {
	e := rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "the orchestrators have no leader: fewer than a majority of them are up, or an election is under way")
	e.RetryAfter = 200 * time.Millisecond
	return e
}

// change decides and proposes until no other change comes in between.
func (o *Orchestrator) change(ctx context.Context, decide func(*topology.State) (*topologyv1.Command, error)) (applied, error) {
	if err := o.behind(ctx); err != nil {
		return applied{}, err
	}
	for tries := 0; ; tries++ {
		s := o.machine.state.Load()
		if s == nil {
			return applied{}, noLeader()
		}
		cmd, err := decide(s)
		if err != nil {
			return applied{}, err
		}
		a, err := o.propose(ctx, cmd)
		var r *topology.Refusal
		if tries < maxConflicts && errors.As(err, &r) && r.Reason == "EPOCH_CHANGED" {
			continue
		}
		return a, err
	}
}

// controlService answers on the leader and passes requests on elsewhere.
type controlService struct {
	adminv1.UnimplementedControlServiceServer
	o *Orchestrator
}

// repeat says whether a request that was sent and not answered may be sent again.
type repeat bool

const (
	idempotent repeat = true
	change     repeat = false
)

// onLeader runs a request here if this orchestrator leads, and at the leader
// otherwise.
func onLeader[Q, T any](ctx context.Context, o *Orchestrator, again repeat, r Q, here func(context.Context, Q) (T, error), there func(adminv1.ControlServiceClient, context.Context, Q, ...grpc.CallOption) (T, error)) (T, error) {
	if err := o.superseded(0); err != nil {
		var zero T
		return zero, err
	}
	if o.leads() {
		return here(ctx, r)
	}
	in, _ := metadata.FromIncomingContext(ctx)
	address, ok := o.leaderAddress()
	if !ok || len(in.Get(mdForwarded)) > 0 {
		var zero T
		return zero, noLeader()
	}
	return forward(metadata.AppendToOutgoingContext(ctx, mdForwarded, o.cfg.Name), o.transport, address, again, r, there)
}

// forward sends a request to the leader that is known. Where it does not answer, a
// new one is not elected yet; a change that was sent may have been made.
func forward[Q, T any](ctx context.Context, transport rpc.Transport, address string, again repeat, r Q, there func(adminv1.ControlServiceClient, context.Context, Q, ...grpc.CallOption) (T, error)) (T, error) {
	var zero T
	cc, err := transport.NewConn(address)
	if err != nil {
		return zero, err
	}
	defer cc.Close()
	var sentTo peer.Peer // stays empty when the request never left
	resp, err := there(adminv1.NewControlServiceClient(cc), ctx, r, grpc.Peer(&sentTo))
	if e := rpc.AsError(err); e != nil && (e.Reason == rpc.ReasonLinkBroken || e.Reason == rpc.ReasonDeadline) {
		if again == change && sentTo.Addr != nil {
			return zero, outcomeUnknown()
		}
		return zero, noLeader()
	}
	return resp, err
}

func (s controlService) RegisterNode(ctx context.Context, r *adminv1.RegisterNodeRequest) (*adminv1.RegisterNodeResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.registerNode, adminv1.ControlServiceClient.RegisterNode)
}

func (s controlService) registerNode(ctx context.Context, r *adminv1.RegisterNodeRequest) (*adminv1.RegisterNodeResponse, error) {
	t := s.o.machine.topology()
	if t == nil {
		return nil, noLeader()
	}
	if id := r.GetClusterId(); id != "" && id != t.ClusterID {
		return nil, rpc.Errorf(codes.FailedPrecondition, "CLUSTER_MISMATCH",
			"the data directory of node %s belongs to cluster %s, this is cluster %s: check its data_dir and orchestrators", r.GetName(), id, t.ClusterID).
			With("cluster_id", t.ClusterID).With("data_cluster_id", id)
	}
	n := &topologyv1.Node{
		Incarnation: r.GetIncarnation(), Name: r.GetName(), Zone: r.GetZone(), Role: r.GetRole(),
		Address: r.GetAddress(), AdminAddress: r.GetAdminAddress(), GossipAddress: r.GetGossipAddress(), DataId: r.GetDataId(),
	}
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		t := state.Topology
		if err := launchedOnce(state, n, s.o.cfg.Seams.WallClock(), s.o.cfg.Provision.LaunchTimeout); err != nil {
			return nil, err
		}
		if err := nameFree(t, n, s.o.health.state); err != nil {
			if inc, perr := strconv.ParseUint(err.Details["incarnation"], 10, 64); perr == nil {
				s.o.health.hurryOne(inc) // what is known of it may be old
			}
			return nil, err
		}
		return &topologyv1.Command{
			ExpectEpoch: t.Epoch,
			Change:      &topologyv1.Change{Subject: "node", Name: r.GetName(), What: registration(t, n)},
			Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
				Node: n, Boot: r.GetBoot(), BootId: r.GetBootId(),
			}}}},
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.RegisterNodeResponse{Incarnation: a.result.Incarnation, Topology: a.state.Topology.Proto()}, nil
}

// registration says what comes of a node's registration.
func registration(t *topology.Topology, n *topologyv1.Node) string {
	what := fmt.Sprintf("registered at %s in zone %s", n.GetAddress(), n.GetZone())
	if i := slices.IndexFunc(t.Nodes, func(o topology.Node) bool { return o.DataID == n.GetDataId() && o.Zone != n.GetZone() }); i >= 0 {
		what += fmt.Sprintf(", before that in zone %s", t.Nodes[i].Zone)
	}
	return what
}

// nameFree returns nil when a data directory may carry a name: it is the newest of
// that name, or every other one is known to be dead. What it returns holds for the
// epoch of t only, so that of two that start together one sees the other.
//
// A node that was wiped and started again comes before its end has been noticed. It
// has the address of the one before, where only one of the two can answer, so it is
// asked to wait for the probes' word. A node at another address is another machine.
func nameFree(t *topology.Topology, n *topologyv1.Node, state func(uint64) topologyv1.NodeHealth_State) *rpc.Error {
	newest := t.Resolve(n.GetName())
	if newest == nil || newest.DataID == n.GetDataId() {
		return nil
	}
	known := slices.ContainsFunc(t.Nodes, func(o topology.Node) bool { return o.DataID == n.GetDataId() })
	if n.GetIncarnation() != 0 && !known {
		return nil // it was removed, as the registration will tell it
	}
	if known && t.Names(newest.Incarnation) {
		return rpc.Errorf(codes.FailedPrecondition, "NODE_REMOVED",
			"#%d has taken the place of this data directory of node %s: start the node with an empty data directory to join again", newest.Incarnation, n.GetName())
	}
	for _, o := range t.Nodes {
		if o.Name != n.GetName() || o.DataID == n.GetDataId() {
			continue
		}
		s := state(o.Incarnation)
		var e *rpc.Error
		switch {
		case s == topologyv1.NodeHealth_STATE_UNHEALTHY:
			continue
		case s == topologyv1.NodeHealth_STATE_HEALTHY && (known || o.Address != n.GetAddress()):
			e = rpc.Errorf(codes.AlreadyExists, "NAME_IN_USE", "there is a healthy node named %s, #%d at %s: give this one another name", o.Name, o.Incarnation, o.Address)
		default:
			e = rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "there is another node named %s, #%d at %s, and it is not known yet whether it lives", o.Name, o.Incarnation, o.Address)
			e.RetryAfter = 200 * time.Millisecond
		}
		return e.With("incarnation", o.Incarnation)
	}
	return nil
}

// launchedOnce returns nil unless a new data directory comes under the name of a node that
// was launched a while ago and has registered. A provisioner that launched twice would
// otherwise have both admitted, where the first is out of reach for a moment, and never end
// the one that lost: it goes by names. At the address of the first it is that node, wiped.
func launchedOnce(s *topology.State, n *topologyv1.Node, nowMillis int64, within time.Duration) *rpc.Error {
	t := s.Topology
	first := t.Resolve(n.GetName())
	if first == nil || first.Address == n.GetAddress() || slices.ContainsFunc(t.Nodes, func(o topology.Node) bool { return o.DataID == n.GetDataId() }) {
		return nil
	}
	for _, p := range s.Provisions {
		if p.Kind == topology.Launch && p.Node == first.Name && (!p.State.Ended() || nowMillis-p.ChangedMillis < within.Milliseconds()) {
			return rpc.Errorf(codes.AlreadyExists, "NAME_IN_USE",
				"node %s was launched less than %s ago and has registered, #%d at %s: this one is taken for a second launch of it; give it another name", first.Name, within, first.Incarnation, first.Address).
				With("incarnation", first.Incarnation)
		}
	}
	return nil
}

// settings converts what a request wants to set.
func settings(pb *adminv1.NamespaceSettings) topology.NamespaceSettings {
	var out topology.NamespaceSettings
	if pb == nil {
		return out
	}
	if pb.N != nil {
		n := int(pb.GetN())
		out.N = &n
	}
	out.W, out.R, out.RepairChance, out.Hints = pb.WriteQuorum, pb.ReadQuorum, pb.RepairChance, pb.Hints
	if pb.ReadRepair != nil {
		r := topology.ReadRepair(pb.GetReadRepair())
		out.ReadRepair = &r
	}
	if pb.TtlMs != nil {
		ttl := time.Duration(pb.GetTtlMs()) * time.Millisecond
		out.TTL = &ttl
	}
	if pb.ReportingPolicy != nil {
		policy := topology.ReportingPolicy(pb.GetReportingPolicy())
		out.Reporting = &policy
	}
	if pb.ReportingCopies != nil {
		copies := int(pb.GetReportingCopies())
		out.ReportingCopies = &copies
	}
	if pb.ReportingTimeoutMs != nil {
		timeout := time.Duration(pb.GetReportingTimeoutMs()) * time.Millisecond
		out.ReportingTimeout = &timeout
	}
	return out
}

func (s controlService) CreateNamespace(ctx context.Context, r *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	return onLeader(ctx, s.o, change, r, s.createNamespace, adminv1.ControlServiceClient.CreateNamespace)
}

func (s controlService) createNamespace(ctx context.Context, r *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	var warnings []string
	a, err := s.o.change(ctx, func(state *topology.State) (cmd *topologyv1.Command, err error) {
		cmd, warnings, err = createNamespace(state, r.GetName(), settings(r.GetSettings()))
		return cmd, err
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.CreateNamespaceResponse{Namespace: a.result.Namespace.Proto(), Epoch: a.result.Epoch, Warnings: warnings}, nil
}

func (s controlService) UpdateNamespace(ctx context.Context, r *adminv1.UpdateNamespaceRequest) (*adminv1.UpdateNamespaceResponse, error) {
	return onLeader(ctx, s.o, change, r, s.updateNamespace, adminv1.ControlServiceClient.UpdateNamespace)
}

func (s controlService) updateNamespace(ctx context.Context, r *adminv1.UpdateNamespaceRequest) (*adminv1.UpdateNamespaceResponse, error) {
	var warnings []string
	a, err := s.o.change(ctx, func(state *topology.State) (cmd *topologyv1.Command, err error) {
		t := state.Topology
		if ns := t.Namespace(r.GetName()); ns != nil && r.GetIfChangedEpoch() != 0 && r.GetIfChangedEpoch() != ns.ChangedEpoch {
			return nil, rpc.Errorf(codes.Aborted, "NAMESPACE_CHANGED", "namespace %s was changed in epoch %s by somebody else", ns.Name, topology.EpochString(ns.ChangedEpoch)).
				With("namespace", ns.Name).With("changed_epoch", ns.ChangedEpoch)
		}
		cmd, warnings, err = updateNamespace(t, r.GetName(), settings(r.GetSettings()), r.GetAllowEventual())
		return cmd, err
	})
	if err != nil {
		return nil, err
	}
	resp := &adminv1.UpdateNamespaceResponse{Namespace: a.result.Namespace.Proto(), Epoch: a.result.Epoch, Warnings: warnings}
	if a.result.Operation != nil {
		resp.Operation = a.result.Operation.Proto()
	}
	return resp, nil
}

func (s controlService) DropNamespace(ctx context.Context, r *adminv1.DropNamespaceRequest) (*adminv1.DropNamespaceResponse, error) {
	return onLeader(ctx, s.o, change, r, s.dropNamespace, adminv1.ControlServiceClient.DropNamespace)
}

func (s controlService) dropNamespace(ctx context.Context, r *adminv1.DropNamespaceRequest) (*adminv1.DropNamespaceResponse, error) {
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		return dropNamespace(state.Topology, r.GetName())
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.DropNamespaceResponse{Epoch: a.result.Epoch}, nil
}

func (s controlService) ListChanges(ctx context.Context, r *adminv1.ListChangesRequest) (*adminv1.ListChangesResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.listChanges, adminv1.ControlServiceClient.ListChanges)
}

// maxChangesWait bounds how long a question for changes waits for one.
const maxChangesWait = 30 * time.Second

func (s controlService) listChanges(ctx context.Context, r *adminv1.ListChangesRequest) (*adminv1.ListChangesResponse, error) {
	wait := time.NewTimer(min(time.Duration(r.GetWaitMs())*time.Millisecond, maxChangesWait))
	defer wait.Stop()
	for {
		changed := s.o.machine.changed()
		state := s.o.machine.state.Load()
		if state == nil {
			return nil, noLeader()
		}
		resp := &adminv1.ListChangesResponse{}
		for _, c := range state.History {
			if c.Number > r.GetAfter() && (r.GetSubject() == "" || c.Subject == r.GetSubject()) && (r.GetName() == "" || c.Name == r.GetName()) {
				resp.Changes = append(resp.Changes, c.Proto())
			}
		}
		if n := int(r.GetLimit()); n > 0 && len(resp.Changes) > n {
			resp.Changes = resp.Changes[len(resp.Changes)-n:]
		}
		if len(resp.Changes) > 0 {
			return resp, nil
		}
		select {
		case <-changed:
		case <-wait.C:
			return resp, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.o.stopping:
			return resp, nil
		}
	}
}

func (s controlService) HoldBack(ctx context.Context, r *adminv1.HoldBackRequest) (*adminv1.HoldBackResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.holdBack, adminv1.ControlServiceClient.HoldBack)
}

func (s controlService) holdBack(ctx context.Context, r *adminv1.HoldBackRequest) (*adminv1.HoldBackResponse, error) {
	t, err := s.ofCluster(r.GetClusterId())
	if err != nil {
		return nil, err
	}
	subject, what := "node", "drained: it is given nothing until people ask"
	if n := t.Node(r.GetIncarnation()); n != nil && n.Role == topology.Reporting {
		subject = "reporting"
	}
	if !r.GetHeld() {
		what = "drained no more"
	}
	name := t.NodeName(r.GetIncarnation())
	_, err = s.o.change(ctx, func(*topology.State) (*topologyv1.Command, error) {
		return &topologyv1.Command{
			Change:    &topologyv1.Change{Subject: subject, Name: name, What: fmt.Sprintf("%s, #%d, is %s", name, r.GetIncarnation(), what)},
			Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_HoldBack{HoldBack: &topologyv1.HoldBack{Incarnation: r.GetIncarnation(), Held: r.GetHeld()}}}},
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.HoldBackResponse{}, nil
}

func (s controlService) ListProvisions(ctx context.Context, r *adminv1.ListProvisionsRequest) (*adminv1.ListProvisionsResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.listProvisions, adminv1.ControlServiceClient.ListProvisions)
}

func (s controlService) listProvisions(context.Context, *adminv1.ListProvisionsRequest) (*adminv1.ListProvisionsResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	resp := &adminv1.ListProvisionsResponse{}
	for _, p := range state.Provisions {
		resp.Provisions = append(resp.Provisions, p.Proto())
	}
	return resp, nil
}

func (s controlService) GetClusterStatus(ctx context.Context, r *adminv1.GetClusterStatusRequest) (*adminv1.GetClusterStatusResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.clusterStatus, adminv1.ControlServiceClient.GetClusterStatus)
}

// statusTimeout bounds one question to another orchestrator.
const statusTimeout = 500 * time.Millisecond

func (s controlService) clusterStatus(ctx context.Context, _ *adminv1.GetClusterStatusRequest) (*adminv1.GetClusterStatusResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	t := state.Topology
	resp := &adminv1.GetClusterStatusResponse{Topology: t.Proto(), AnsweredBy: s.o.cfg.Name, ControlPlaneAvailable: true, HeldBack: state.DrainedNodes()}
	for _, c := range state.Conditions {
		resp.Conditions = append(resp.Conditions, c.Proto())
	}
	for _, l := range state.Losses {
		resp.Losses = append(resp.Losses, l.Proto())
	}
	for _, h := range state.Health {
		resp.Found = append(resp.Found, h.Proto())
	}
	for _, n := range t.Nodes {
		resp.Nodes = append(resp.Nodes, s.o.health.observed(n.Incarnation))
	}
	resp.Orchestrators = make([]*adminv1.ObservedOrchestrator, len(s.o.cfg.Peers))
	var wg sync.WaitGroup
	for i, p := range s.o.cfg.Peers {
		wg.Go(func() { resp.Orchestrators[i] = s.o.observe(ctx, p) })
	}
	wg.Wait()
	return resp, nil
}

// observe asks another orchestrator how it is.
func (o *Orchestrator) observe(ctx context.Context, p Peer) *adminv1.ObservedOrchestrator {
	out := &adminv1.ObservedOrchestrator{Name: p.Name}
	if p.Name == o.cfg.Name {
		out.Reachable, out.Status = true, o.status()
		return out
	}
	cc, err := o.transport.NewConn(p.Address)
	if err != nil {
		return out
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(cc).GetOrchestratorStatus(ctx, &adminv1.GetOrchestratorStatusRequest{})
	if err == nil {
		out.Reachable, out.Status = true, resp.GetStatus()
	}
	return out
}

// statusService describes this process.
type statusService struct {
	adminv1.UnimplementedStatusServiceServer
	o *Orchestrator
}

func (s statusService) GetOrchestratorStatus(context.Context, *adminv1.GetOrchestratorStatusRequest) (*adminv1.GetOrchestratorStatusResponse, error) {
	return &adminv1.GetOrchestratorStatusResponse{Status: s.o.status()}, nil
}

func (o *Orchestrator) status() *adminv1.OrchestratorStatus {
	r := o.raft.Status()
	s := &adminv1.OrchestratorStatus{
		Name: o.cfg.Name, RaftState: r.State, Leader: r.Leader, Term: r.Term, AppliedIndex: r.Applied,
		UptimeMs: uint64(time.Since(o.started).Milliseconds()), Software: o.cfg.Software,
	}
	if t := o.machine.topology(); t != nil {
		s.Epoch = t.Epoch
	}
	if !r.LastContact.IsZero() {
		s.LeaderContactMs = uint64(max(0, time.Since(r.LastContact).Milliseconds()))
	}
	return s
}

// topologyService hands out what has been agreed on.
type topologyService struct {
	topologyv1.UnimplementedTopologyServiceServer
	o *Orchestrator
}

const (
	// watchInterval is how often a watcher hears something at least.
	watchInterval = 2 * time.Second
	// watchWithoutLeader is how long a watch goes on without a leader: another
	// orchestrator may have one, and know more. Where none has, nodes go from one to
	// the next at this pace.
	watchWithoutLeader = 5 * time.Second
)

func (s topologyService) check(clusterID string, known uint64) (*topology.Topology, error) {
	t := s.o.machine.topology()
	if t == nil {
		return nil, noLeader()
	}
	if err := s.o.superseded(known); err != nil {
		return nil, err
	}
	if clusterID != "" && clusterID != t.ClusterID {
		return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this is cluster %s, not %s", t.ClusterID, clusterID)
	}
	return t, nil
}

func (s topologyService) GetTopology(_ context.Context, r *topologyv1.GetTopologyRequest) (*topologyv1.GetTopologyResponse, error) {
	t, err := s.check(r.GetClusterId(), r.GetKnownEpoch())
	if err != nil {
		return nil, err
	}
	resp := &topologyv1.GetTopologyResponse{}
	resp.Topology, resp.Delta = s.o.machine.recent.Update(r.GetKnownEpoch(), t)
	return resp, nil
}

func (s topologyService) WatchTopology(r *topologyv1.WatchTopologyRequest, stream grpc.ServerStreamingServer[topologyv1.WatchTopologyResponse]) error {
	known := r.GetKnownEpoch()
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	led := time.Now() // when there was a leader last
	told := map[uint64]*topologyv1.NodeHealth{}
	for {
		if _, ok := s.o.raft.Leader(); ok {
			led = time.Now()
		} else if time.Since(led) > watchWithoutLeader {
			return noLeader()
		}
		changed, health := s.o.machine.changed(), s.o.health.changed()
		t, err := s.check(r.GetClusterId(), known)
		if err != nil {
			return err
		}
		all := make([]*topologyv1.NodeHealth, len(t.Nodes))
		for i := range t.Nodes {
			inc := t.Nodes[i].Incarnation
			all[i] = s.o.health.of(inc).proto(inc)
		}
		resp := &topologyv1.WatchTopologyResponse{Health: topology.HealthNews(told, all), WallMs: uint64(s.o.cfg.Seams.WallClock())}
		resp.Topology, resp.Delta = s.o.machine.recent.Update(known, t)
		if known == t.Epoch {
			resp.Delta = t.Check()
		}
		known = max(known, t.Epoch)
		if err := stream.Send(resp); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-s.o.stopping:
			return rpc.Errorf(codes.Unavailable, rpc.ReasonStopping, "the orchestrator is stopping")
		case <-changed:
		case <-health:
		case <-tick.C:
		}
	}
}
