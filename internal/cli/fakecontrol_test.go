package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// The fake's control services decide with the real rules of package topology.

func (f *fake) led() error {
	if !f.mu.controlled {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "no orchestrator can be reached")
	}
	return nil
}

// decide makes a change of a namespace with the rules of package topology.
func (f *fake) decide(name, what string, s *adminv1.NamespaceSettings, rule func(*topology.Topology, topology.NamespaceSettings) (topology.Namespace, []string, error)) (*topologyv1.Namespace, uint64, []string, error) {
	t, err := topology.FromProto(f.mu.topology)
	if err != nil {
		return nil, 0, nil, err
	}
	ns, warnings, err := rule(t, settingsOf(s))
	if err != nil {
		return nil, 0, nil, err
	}
	f.mu.topology.Epoch++
	ns.ChangedEpoch = f.mu.topology.GetEpoch()
	if ns.ID == 0 {
		ns.ID = uint32(len(t.Namespaces) + 1)
	}
	i := slices.IndexFunc(f.mu.topology.GetNamespaces(), func(o *topologyv1.Namespace) bool { return o.GetName() == name })
	if i < 0 {
		f.mu.topology.Namespaces = append(f.mu.topology.Namespaces, ns.Proto())
	} else {
		f.mu.topology.Namespaces[i] = ns.Proto()
	}
	f.note(name, what)
	return ns.Proto(), f.mu.topology.GetEpoch(), warnings, nil
}

func (f *fake) note(name, what string) {
	f.mu.history = append(f.mu.history, &topologyv1.Change{Number: uint64(len(f.mu.history) + 1), Epoch: f.mu.topology.GetEpoch(), AtMs: 1772366400000, Subject: "namespace", Name: name, What: what})
}

func settingsOf(s *adminv1.NamespaceSettings) (out topology.NamespaceSettings) {
	if s.N != nil {
		out.N = ptr(int(s.GetN()))
	}
	out.W, out.R, out.RepairChance, out.Hints = s.WriteQuorum, s.ReadQuorum, s.RepairChance, s.Hints
	if s.ReadRepair != nil {
		out.ReadRepair = ptr(topology.ReadRepair(s.GetReadRepair()))
	}
	if s.TtlMs != nil {
		out.TTL = ptr(millis(s.GetTtlMs()))
	}
	return out
}

func (n *fakeNode) CreateNamespace(_ context.Context, r *adminv1.CreateNamespaceRequest) (*adminv1.CreateNamespaceResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if err := n.f.led(); err != nil {
		return nil, err
	}
	ns, epoch, warnings, err := n.f.decide(r.GetName(), "created", r.GetSettings(), func(t *topology.Topology, s topology.NamespaceSettings) (topology.Namespace, []string, error) {
		return t.NewNamespace(r.GetName(), s)
	})
	return &adminv1.CreateNamespaceResponse{Namespace: ns, Epoch: epoch, Warnings: warnings}, err
}

func (n *fakeNode) UpdateNamespace(_ context.Context, r *adminv1.UpdateNamespaceRequest) (*adminv1.UpdateNamespaceResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if err := n.f.led(); err != nil {
		return nil, err
	}
	if old, err := n.f.namespace(r.GetName()); err == nil && r.GetIfChangedEpoch() != 0 && r.GetIfChangedEpoch() != old.GetChangedEpoch() {
		return nil, &topology.Refusal{Kind: topology.Conflict, Reason: "EPOCH_CHANGED", Message: "the namespace was changed by somebody else"}
	}
	var before, wanted topology.Namespace
	ns, epoch, warnings, err := n.f.decide(r.GetName(), "set", r.GetSettings(), func(t *topology.Topology, s topology.NamespaceSettings) (topology.Namespace, []string, error) {
		ns, w, warnings, err := t.ChangedNamespace(r.GetName(), s, false)
		if before, wanted = ns, w; w.N == ns.N {
			ns = w // that operation ends at once here
		}
		return ns, warnings, err
	})
	resp := &adminv1.UpdateNamespaceResponse{Namespace: ns, Epoch: epoch, Warnings: warnings}
	switch {
	case err != nil:
	case wanted.N != before.N:
		resp.Operation = &topologyv1.Operation{Id: 1, Kind: "replicas", FromN: ns.GetN(), TargetN: uint32(wanted.N)}
	case wanted.W != before.W || wanted.R != before.R:
		resp.Operation = &topologyv1.Operation{
			Id: 1, Kind: "quorums", FromWriteQuorum: before.W.String(), FromReadQuorum: before.R.String(),
			TargetWriteQuorum: wanted.W.String(), TargetReadQuorum: wanted.R.String(),
		}
	}
	return resp, err
}

// UpdateSettings takes the settings over to all nodes that are not deaf.
func (n *fakeNode) UpdateSettings(_ context.Context, r *adminv1.UpdateSettingsRequest) (*adminv1.UpdateSettingsResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.led(); err != nil {
		return nil, err
	}
	t, err := topology.FromProto(f.mu.topology)
	if err != nil {
		return nil, err
	}
	before := f.mu.settings[len(f.mu.settings)-1]
	if v := r.GetIfVersion(); v != 0 && v != t.Settings.Version {
		return nil, &topology.Refusal{Kind: topology.Conflict, Reason: "SETTINGS_CHANGED", Message: "the settings were changed by somebody else"}
	}
	next, err := t.SettingsWith(r.GetValues())
	if v := r.GetRollbackTo(); v != 0 && err == nil {
		if v > uint64(len(f.mu.settings)) {
			return nil, &topology.Refusal{Kind: topology.NotFound, Reason: "SETTINGS_VERSION_NOT_FOUND", Message: "there is no such version of the settings"}
		}
		next = topology.SettingsVersionFromProto(f.mu.settings[v-1]).Settings
	}
	var warnings []string
	if err == nil {
		warnings, err = t.CheckSettings(next)
	}
	if err != nil {
		return nil, &topology.Refusal{Kind: topology.Invalid, Reason: "BAD_SETTINGS", Message: err.Error()}
	}
	changes := topology.DiffSettings(t.Settings, next)
	if len(changes) == 0 {
		return &adminv1.UpdateSettingsResponse{Before: before, After: before}, nil
	}
	next.Version = t.Settings.Version + 1
	after := &topologyv1.SettingsVersion{Settings: next.Proto(), AtMs: before.GetAtMs() + 60_000, What: topology.DescribeChanges(changes)}
	if !r.GetDryRun() {
		f.mu.topology.Epoch++
		f.mu.topology.Settings, after.Epoch = next.Proto(), f.mu.topology.GetEpoch()
		f.mu.settings = append(f.mu.settings, after)
		for inc, s := range f.mu.status {
			if !f.mu.deaf[inc] {
				s.Epoch, s.SettingsHash = after.GetEpoch(), next.Hash()
			}
		}
	}
	return &adminv1.UpdateSettingsResponse{Before: before, After: after, Warnings: warnings}, nil
}

func (n *fakeNode) ListSettings(context.Context, *adminv1.ListSettingsRequest) (*adminv1.ListSettingsResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if err := n.f.led(); err != nil {
		return nil, err
	}
	return &adminv1.ListSettingsResponse{Versions: slices.Clone(n.f.mu.settings)}, nil
}

func (n *fakeNode) DropNamespace(_ context.Context, r *adminv1.DropNamespaceRequest) (*adminv1.DropNamespaceResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	t, err := topology.FromProto(n.f.mu.topology)
	if err != nil {
		return nil, err
	}
	if _, err := t.DroppableNamespace(r.GetName()); err != nil {
		return nil, err
	}
	n.f.mu.topology.Epoch++
	n.f.mu.topology.Namespaces = slices.DeleteFunc(n.f.mu.topology.Namespaces, func(o *topologyv1.Namespace) bool { return o.GetName() == r.GetName() })
	return &adminv1.DropNamespaceResponse{Epoch: n.f.mu.topology.GetEpoch()}, nil
}

// HoldBack drains a node or takes that back. One that is drained has half of its copies when
// it is asked for first.
func (n *fakeNode) HoldBack(_ context.Context, r *adminv1.HoldBackRequest) (*adminv1.HoldBackResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.led(); err != nil {
		return nil, err
	}
	f.mu.heldBack = slices.DeleteFunc(f.mu.heldBack, func(inc uint64) bool { return inc == r.GetIncarnation() })
	if r.GetHeld() {
		f.mu.heldBack = append(f.mu.heldBack, r.GetIncarnation())
	}
	return &adminv1.HoldBackResponse{}, nil
}

// copiesGo takes half of their copies from drained nodes, or the last one.
func (f *fake) copiesGo() {
	for _, inc := range f.mu.heldBack {
		var with []*topologyv1.Vnode
		for _, v := range f.mu.topology.GetRing() {
			if slices.ContainsFunc(v.GetCopies(), func(c *topologyv1.Copy) bool { return c.GetNode() == inc }) {
				with = append(with, v)
			}
		}
		for _, v := range with[:(len(with)+1)/2] {
			v.Copies = slices.DeleteFunc(v.GetCopies(), func(c *topologyv1.Copy) bool { return c.GetNode() == inc })
		}
	}
}

func (n *fakeNode) ListChanges(_ context.Context, r *adminv1.ListChangesRequest) (*adminv1.ListChangesResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if err := n.f.led(); err != nil {
		return nil, err
	}
	resp := &adminv1.ListChangesResponse{}
	for _, c := range n.f.mu.history {
		if c.GetNumber() > r.GetAfter() && (r.GetName() == "" || c.GetName() == r.GetName()) && (r.GetSubject() == "" || c.GetSubject() == r.GetSubject()) {
			resp.Changes = append(resp.Changes, c)
		}
	}
	return resp, nil
}

func (n *fakeNode) GetCapacity(context.Context, *adminv1.GetCapacityRequest) (*adminv1.GetCapacityResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if err := n.f.led(); err != nil {
		return nil, err
	}
	return n.f.mu.capacity, nil
}

// StartOperation takes an operation that was made for the present epoch. It ends when
// it is asked for the second time.
func (n *fakeNode) StartOperation(_ context.Context, r *adminv1.StartOperationRequest) (*adminv1.StartOperationResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.led(); err != nil {
		return nil, err
	}
	if f.mu.overtaken > 0 {
		f.mu.overtaken--
		f.mu.topology.Epoch++
	}
	if r.GetEpoch() != f.mu.topology.GetEpoch() {
		return nil, rpc.Errorf(codes.Aborted, "EPOCH_CHANGED", "the plan was made for epoch %d, the topology is at epoch %d by now: make the plan again", r.GetEpoch(), f.mu.topology.GetEpoch())
	}
	op := proto.CloneOf(r.GetOperation())
	op.Id, op.State, op.StartedMs = uint64(len(f.mu.operations)+1), topologyv1.Operation_STATE_RUNNING, 1772366400000
	f.mu.operations = append(f.mu.operations, &adminv1.ObservedOperation{Operation: op})
	return &adminv1.StartOperationResponse{Operation: proto.CloneOf(op)}, nil
}

func (n *fakeNode) SteerOperation(_ context.Context, r *adminv1.SteerOperationRequest) (*adminv1.SteerOperationResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.mu.operations {
		if op := o.GetOperation(); op.GetId() == r.GetId() {
			op.State = r.GetState()
			return &adminv1.SteerOperationResponse{Operation: proto.CloneOf(op)}, nil
		}
	}
	return nil, rpc.Errorf(codes.NotFound, "OPERATION_NOT_FOUND", "there is no operation %d", r.GetId())
}

func (n *fakeNode) ListOperations(_ context.Context, r *adminv1.ListOperationsRequest) (*adminv1.ListOperationsResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &adminv1.ListOperationsResponse{}
	for _, o := range f.mu.operations {
		if r.GetId() != 0 && o.GetOperation().GetId() != r.GetId() {
			continue
		}
		resp.Operations = append(resp.Operations, proto.CloneOf(o))
		switch op := o.GetOperation(); {
		case r.GetId() == 0:
		case op.GetState() == topologyv1.Operation_STATE_RUNNING:
			op.State, op.EndedMs, op.MovedBytes, op.MovedRecords = topologyv1.Operation_STATE_DONE, op.GetStartedMs()+61_000, 5<<20, 1234
			for _, m := range op.GetMoves() {
				m.Done = true
			}
		case op.GetState() == topologyv1.Operation_STATE_ABORTING:
			op.State, op.EndedMs = topologyv1.Operation_STATE_ABORTED, op.GetStartedMs()+2000
		}
	}
	if r.GetId() != 0 && len(resp.Operations) == 0 {
		return nil, rpc.Errorf(codes.NotFound, "OPERATION_NOT_FOUND", "there is no operation %d, or it ended long ago", r.GetId())
	}
	return resp, nil
}

// holds gives the cluster's nodes bytes in every vnode that they have a slot of: 1 MiB
// for a node, and more for a node with a greater incarnation.
func (f *fake) holds() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.holds = true
}

// GetHotKeys says that a key of everybody's has 10 reads a second for each node, and one of
// the node's own 5 writes.
func (n *fakeNode) GetHotKeys(context.Context, *adminv1.GetHotKeysRequest) (*adminv1.GetHotKeysResponse, error) {
	return &adminv1.GetHotKeysResponse{PerSecond: 100, WindowMs: 10_000, Keys: []*adminv1.HotKey{
		{NamespaceId: 1, Key: []byte("front page"), KeyBytes: 10, ReadsPerSecond: 10},
		{NamespaceId: 1, Key: fmt.Append(nil, "counter of #", n.incarnation), KeyBytes: 1000, WritesPerSecond: 5},
	}}, nil
}

func (n *fakeNode) GetNodeUse(context.Context, *adminv1.GetNodeUseRequest) (*adminv1.GetNodeUseResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.mu.holds {
		return nil, rpc.Errorf(codes.Unimplemented, "UNIMPLEMENTED", "unknown method GetNodeUse")
	}
	resp := &adminv1.GetNodeUseResponse{}
	for v, vnode := range f.mu.topology.GetRing() {
		for _, s := range vnode.GetSlots() {
			if s.GetNode() == n.incarnation {
				resp.Vnodes = append(resp.Vnodes, &adminv1.VnodeUse{NamespaceId: 1, Vnode: uint32(v), Bytes: 1<<20 + n.incarnation<<10, Records: 1000 + n.incarnation})
			}
		}
	}
	return resp, nil
}

func (n *fakeNode) GetClusterStatus(context.Context, *adminv1.GetClusterStatusRequest) (*adminv1.GetClusterStatusResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &adminv1.GetClusterStatusResponse{Topology: proto.CloneOf(f.mu.topology), AnsweredBy: "node1", ControlPlaneAvailable: f.mu.controlled, HeldBack: slices.Clone(f.mu.heldBack)}
	f.copiesGo()
	for _, node := range f.mu.topology.GetNodes() {
		on := &adminv1.ObservedNode{
			Health: proto.CloneOf(f.mu.health[node.GetIncarnation()]), Status: proto.CloneOf(f.mu.status[node.GetIncarnation()]), AgeMs: f.mu.ages[node.GetIncarnation()],
		}
		if on.GetHealth().GetState() == topologyv1.NodeHealth_STATE_UNHEALTHY && f.mu.controlled {
			on.Gossip = "dead"
			on.Checks = []*adminv1.HealthCheck{{AgeMs: 61_000, TookMs: 2, Passed: true, What: "slow"}, {AgeMs: 1_000, TookMs: 10_000, What: "no answer"}}
			resp.Found = append(resp.Found, &topologyv1.FoundHealth{Incarnation: node.GetIncarnation(), State: on.GetHealth().GetState(), SinceMs: f.mu.foundMs})
		}
		resp.Nodes = append(resp.Nodes, on)
	}
	if f.mu.controlled {
		resp.Conditions = f.mu.conditions
	}
	if f.mu.rolling.leader != "" {
		resp.Orchestrators = f.observedOrchestrators()
		return resp, nil
	}
	orch := &adminv1.ObservedOrchestrator{Name: "orch1"}
	if f.mu.controlled {
		resp.AnsweredBy, orch.Reachable = "orch1", true
		orch.Status = &adminv1.OrchestratorStatus{Name: "orch1", RaftState: "leader", Leader: "orch1", Term: 2, AppliedIndex: 40, Epoch: f.mu.topology.GetEpoch(), UptimeMs: 61_000, Software: "v0-test"}
	}
	resp.Orchestrators = append(resp.Orchestrators, orch)
	return resp, nil
}

// anonymous replaces the nodes' addresses, which differ from run to run.
func (f *fake) anonymous(out string) string {
	for i, n := range f.nodes {
		out = strings.ReplaceAll(out, n.address, fmt.Sprintf("127.0.0.1:174%d0", i))
	}
	return out
}
