package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// state returns what the node is doing, and why when it does not serve or serves
// reads only.
func (n *Node) state() (adminv1.NodeStatus_State, string) {
	select {
	case <-n.stopping:
		return adminv1.NodeStatus_STATE_STOPPING, "it was told to stop"
	default:
	}
	if reason := n.removed.Load(); reason != nil {
		return adminv1.NodeStatus_STATE_REMOVED, *reason
	}
	t := n.fence.Topology()
	if t.Epoch > 0 && (t.Node(n.id.Incarnation) == nil || t.Lost(n.id.Incarnation)) {
		return adminv1.NodeStatus_STATE_REMOVED, n.removedIn(t)
	}
	if !t.Formed() {
		if t.Epoch == 0 {
			return adminv1.NodeStatus_STATE_STARTING, "waits for an orchestrator"
		}
		return adminv1.NodeStatus_STATE_STARTING, "waits for the ring to form"
	}
	if why := n.stalled.Load(); why != nil {
		return adminv1.NodeStatus_STATE_STALLED, *why
	}
	if reason := n.store.RefusesRecords(); reason != "" {
		return adminv1.NodeStatus_STATE_SERVING, "refuses writes, free space or add nodes: " + reason
	}
	if why := n.topologies.problem.Load(); why != nil {
		return adminv1.NodeStatus_STATE_SERVING, *why
	}
	if s := n.topologies.pendingSeal(); s != nil {
		return adminv1.NodeStatus_STATE_SERVING, fmt.Sprintf("sealed: waits for the orchestrators of generation %d, of recovery %s (kvctl recover goes on with it)", s.GetGeneration(), s.GetRecovery())
	}
	return adminv1.NodeStatus_STATE_SERVING, ""
}

// removedIn says that a topology has no place for this data directory.
func (n *Node) removedIn(t *topology.Topology) string {
	if t.Lost(n.id.Incarnation) {
		return fmt.Sprintf("the cluster gave #%d up for lost in epoch %s, and others hold its records; start it with an empty data directory to join again", n.id.Incarnation, topology.EpochString(t.Node(n.id.Incarnation).LostEpoch))
	}
	return fmt.Sprintf("the cluster removed #%d in epoch %s or before; start it with an empty data directory to join again", n.id.Incarnation, topology.EpochString(t.Epoch))
}

// uptime returns for how long the process runs, by a clock that is never set.
func (n *Node) uptime() time.Duration { return time.Since(n.started) }

// refuse returns why the node must not serve records, or nil. A node without a ring
// serves: its coordinator has nothing to do and says so.
func (n *Node) refuse() *rpc.Error {
	s, reason := n.state()
	switch s {
	case adminv1.NodeStatus_STATE_REMOVED, adminv1.NodeStatus_STATE_STALLED:
		return notServing(rpc.ReasonNotReady, n.cfg.Name, s, reason)
	}
	return nil
}

// refuseClients is refuse for those who can go elsewhere.
func (n *Node) refuseClients() *rpc.Error {
	if n.cfg.role() == topology.Reporting {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "node %s is a reporting node: it answers reports, and no reads or writes; go to a data node", n.cfg.Name)
	}
	if s, reason := n.state(); s == adminv1.NodeStatus_STATE_STOPPING {
		return notServing(rpc.ReasonStopping, n.cfg.Name, s, reason)
	}
	return n.refuse()
}

// status describes the node. It is what probes ask for, so it waits neither for the disk
// nor behind requests: a node that is busy, or whose disk hangs, can still say so.
func (n *Node) status() *adminv1.NodeStatus {
	epoch := n.topologies.taken() // before the state, which must not be of an older one
	state, reason := n.state()
	offset, opinions := n.clock.Offset()
	stats := n.coordinator.Stats()
	disk := n.disk.Load()
	s := &adminv1.NodeStatus{
		Incarnation: n.id.Incarnation, Name: n.cfg.Name, State: state, Reason: reason, Epoch: epoch,
		CpuUtilization: n.process.cpu(), MemoryBytes: memory(), DiskUsedBytes: disk.used, DiskAvailableBytes: disk.available,
		Get: operationStats(stats.Gets()), Put: operationStats(stats.Puts()), Scan: operationStats(stats.Scans()),
		ClockOffsetMs: offset.Milliseconds(), ClockOpinions: uint32(opinions), ClockOk: n.clock.MayCoordinate() == nil,
		ClockLeadMs: n.clock.Lead(), ClockProblem: n.clock.Problem(),
		UptimeMs: uint64(n.uptime().Milliseconds()), Software: n.cfg.Software,
		Unreachable: n.peers.unreachable(), SampledAtMs: uint64(n.clock.Wall()),
		Queues: n.queues(), Corruptions: n.store.Corruptions(),
		SettingsHash: n.topologies.settingsHash(), ProcessSettingsHash: n.processHash,
		OldestSyncMs: uint64(n.store.OldestSync().Milliseconds()),
	}
	for _, b := range n.hints.Backlog() {
		s.Hints = append(s.Hints, &adminv1.HintBacklog{Target: b.Target, Count: b.Count, Bytes: uint64(b.Bytes), OldestMs: uint64(b.OldestMillis)})
		s.WriteBacklog += uint32(b.Count)
	}
	for _, f := range n.assignments.Fillings() {
		s.Fillings = append(s.Fillings, &adminv1.Filling{
			Vnode: f.Vnode, NamespaceId: f.Namespace, AssignedEpoch: f.Epoch, Complete: f.Complete, Records: f.Records, Bytes: f.Bytes, WaitsFor: f.WaitsFor,
		})
	}
	for _, p := range n.joiner.Progress() {
		out := &adminv1.CopyProgress{Vnode: p.Vnode, NamespaceId: p.Namespace, SinceEpoch: p.Since, Joined: p.Joined, WaitsFor: p.WaitsFor}
		if p.Known {
			out.CompleteAtMs = uint64(n.clock.Wall() - p.Behind.Milliseconds())
		}
		s.Copies = append(s.Copies, out)
	}
	s.LeaseMs = uint64(n.reporting.left(n.fence.Topology()).Milliseconds())
	s.RequestsInFlight = uint32(n.coordinator.InFlight().Requests)
	return s
}

func (n *Node) queues() []*adminv1.QueueDepth {
	f := n.coordinator.InFlight()
	return []*adminv1.QueueDepth{
		{Name: "requests", Depth: uint64(f.Requests), Capacity: uint64(f.Limit)},
		{Name: "write_bytes", Depth: uint64(f.WriteBytes), Capacity: uint64(f.MaxWriteBytes)},
		{Name: "replica_calls", Depth: uint64(n.peers.pending())},
		{Name: "hints_to_write", Depth: uint64(n.hints.Queued())},
	}
}

func operationStats(s coordinator.Snapshot) *adminv1.OperationStats {
	return &adminv1.OperationStats{
		PerSecond: s.PerSecond, P50Us: uint64(s.P50.Microseconds()), P99Us: uint64(s.P99.Microseconds()), Total: s.Total, Errors: s.Errors,
	}
}

// healthOf returns the health of a topology's nodes as this node sees it.
func (n *Node) healthOf(t *topology.Topology) []*topologyv1.NodeHealth {
	out := make([]*topologyv1.NodeHealth, 0, len(t.Nodes))
	for i := range t.Nodes {
		h := &topologyv1.NodeHealth{Incarnation: t.Nodes[i].Incarnation, State: topologyv1.NodeHealth_STATE_HEALTHY}
		if why := n.peers.why(t.Nodes[i].Incarnation); why != "" {
			h.State, h.Reason = topologyv1.NodeHealth_STATE_UNHEALTHY, why
		}
		if s, reason := n.state(); t.Nodes[i].Incarnation == n.id.Incarnation && s != adminv1.NodeStatus_STATE_SERVING {
			h.State, h.Reason = topologyv1.NodeHealth_STATE_UNHEALTHY, stateName(s)+": "+reason
		}
		out = append(out, h)
	}
	return out
}

// statusTimeout bounds one question to one peer.
const statusTimeout = time.Second

// clusterStatus describes the cluster without an orchestrator.
func (n *Node) clusterStatus(ctx context.Context) *adminv1.GetClusterStatusResponse {
	t := n.fence.Topology()
	resp := &adminv1.GetClusterStatusResponse{Topology: t.Proto(), AnsweredBy: n.cfg.Name}
	resp.Nodes = make([]*adminv1.ObservedNode, len(t.Nodes))
	var wg sync.WaitGroup
	for i, h := range n.healthOf(t) {
		o := &adminv1.ObservedNode{Health: h, Gossip: n.peers.word(h.GetIncarnation())}
		resp.Nodes[i] = o
		if h.GetIncarnation() == n.id.Incarnation {
			o.Status = n.status()
			continue
		}
		l := n.peers.link(h.GetIncarnation())
		if l == nil || !l.Up() || l.Conn() == nil {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, statusTimeout)
			defer cancel()
			if s, err := adminv1.NewStatusServiceClient(l.Conn()).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{}); err == nil {
				o.Status = s.GetStatus()
			}
		})
	}
	wg.Wait()
	for _, o := range t.Orchestrators {
		resp.Orchestrators = append(resp.Orchestrators, &adminv1.ObservedOrchestrator{Name: o.Name})
	}
	return resp
}
