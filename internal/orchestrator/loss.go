package orchestrator

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// unrebuildable returns the unhealthy nodes that stand in the way of rebuilding vnodes of
// which too few voting replicas live, and since when the first of them is unhealthy. vnodes
// limits it to some; none is all.
func unrebuildable(s *topology.State, vnodes []uint32, v view) (nodes []uint64, sinceMillis int64) {
	t := s.Topology
	alive := func(inc uint64) bool { return !v.unhealthy(inc) && !t.Lost(inc) }
	for _, short := range t.Short(alive) {
		if len(vnodes) > 0 && !slices.Contains(vnodes, short.Vnode) {
			continue
		}
		for _, slot := range t.Ring[short.Vnode].Slots {
			for _, inc := range []uint64{slot.Node, slot.Incoming} {
				if t.Node(inc) == nil || alive(inc) || t.Lost(inc) || slices.Contains(nodes, inc) {
					continue
				}
				nodes = append(nodes, inc)
				if f, ok := s.Found(inc); ok && !f.Healthy && (sinceMillis == 0 || f.SinceMillis < sinceMillis) {
					sinceMillis = f.SinceMillis
				}
			}
		}
	}
	slices.Sort(nodes)
	return nodes, sinceMillis
}

func (s controlService) AcceptLoss(ctx context.Context, r *adminv1.AcceptLossRequest) (*adminv1.AcceptLossResponse, error) {
	return onLeader(ctx, s.o, change, r, s.acceptLoss, adminv1.ControlServiceClient.AcceptLoss)
}

func (s controlService) acceptLoss(ctx context.Context, r *adminv1.AcceptLossRequest) (*adminv1.AcceptLossResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	for _, v := range r.GetVnodes() {
		if v >= state.Topology.Vnodes {
			return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "there is no vnode %d: the ring has %d", v, state.Topology.Vnodes).With("vnode", v)
		}
	}
	if !s.o.health.view().knows(state.Topology) {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "the leader does not know yet how all nodes are: try again in some seconds")
	}
	found := func(state *topology.State) (nodes []uint64, since int64, l topology.Loss) {
		nodes, since = unrebuildable(state, r.GetVnodes(), s.o.health.view())
		if len(nodes) > 0 {
			l = state.Topology.LossOf(nodes)
			l.SinceMillis = since
		}
		return nodes, since, l
	}
	nodes, _, l := found(state)
	if r.GetDryRun() || len(nodes) == 0 {
		return &adminv1.AcceptLossResponse{Loss: l.Proto(), Epoch: state.Topology.Epoch}, nil
	}
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		if e := r.GetEpoch(); e != 0 && e != state.Topology.Epoch {
			return nil, rpc.Errorf(codes.Aborted, "EPOCH_CHANGED", "what would be lost was found out in epoch %s, the topology is at epoch %s by now: look again",
				topology.EpochString(e), topology.EpochString(state.Topology.Epoch)).With("epoch", state.Topology.Epoch).With("expected_epoch", e)
		}
		nodes, since, l := found(state)
		return &topologyv1.Command{
			ExpectEpoch: state.Topology.Epoch,
			Change:      &topologyv1.Change{Subject: topology.SubjectLoss, Name: eventName(slices.Clone(l.Nodes)), What: l.Describe()},
			Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_AcceptLoss{AcceptLoss: &topologyv1.AcceptLoss{
				Incarnations: nodes, SinceMs: uint64(since),
			}}}},
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.AcceptLossResponse{Loss: a.state.Losses[len(a.state.Losses)-1].Proto(), Epoch: a.result.Epoch}, nil
}
