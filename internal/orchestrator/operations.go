package orchestrator

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// kinds are the kinds of operations that can be asked for.
var kinds = []string{"apply", "drain", "decommission", kindReplace}

func (s controlService) StartOperation(ctx context.Context, r *adminv1.StartOperationRequest) (*adminv1.StartOperationResponse, error) {
	return onLeader(ctx, s.o, change, r, s.startOperation, adminv1.ControlServiceClient.StartOperation)
}

func (s controlService) startOperation(ctx context.Context, r *adminv1.StartOperationRequest) (*adminv1.StartOperationResponse, error) {
	op := r.GetOperation()
	if !slices.Contains(kinds, op.GetKind()) {
		return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "there is no kind of operation %q", op.GetKind())
	}
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		if t := state.Topology; t.Epoch != r.GetEpoch() {
			return nil, rpc.Errorf(codes.Aborted, "EPOCH_CHANGED", "the plan was made for epoch %s, the topology is at epoch %s by now: make the plan again",
				topology.EpochString(r.GetEpoch()), topology.EpochString(t.Epoch)).With("epoch", t.Epoch).With("expected_epoch", r.GetEpoch())
		}
		return &topologyv1.Command{
			ExpectEpoch: r.GetEpoch(),
			Change:      &topologyv1.Change{Subject: "operation", Name: op.GetKind(), What: fmt.Sprintf("begun: %s, %d moves", op.GetTitle(), len(op.GetMoves()))},
			Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: op}}}},
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.StartOperationResponse{Operation: a.result.Operation.Proto()}, nil
}

func (s controlService) SteerOperation(ctx context.Context, r *adminv1.SteerOperationRequest) (*adminv1.SteerOperationResponse, error) {
	return onLeader(ctx, s.o, change, r, s.steerOperation, adminv1.ControlServiceClient.SteerOperation)
}

func (s controlService) steerOperation(ctx context.Context, r *adminv1.SteerOperationRequest) (*adminv1.SteerOperationResponse, error) {
	next := topology.OperationState(r.GetState())
	if next != topology.Running && next != topology.Paused && next != topology.Aborting {
		return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "an operation can be paused, resumed or aborted, not made %s", next)
	}
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		return &topologyv1.Command{
			ExpectEpoch: state.Topology.Epoch,
			Change:      &topologyv1.Change{Subject: "operation", Name: fmt.Sprint(r.GetId()), What: next.String()},
			Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: &topologyv1.SteerOperation{
				Id: r.GetId(), State: r.GetState(),
			}}}},
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.SteerOperationResponse{Operation: a.result.Operation.Proto()}, nil
}

func (s controlService) ListOperations(ctx context.Context, r *adminv1.ListOperationsRequest) (*adminv1.ListOperationsResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.listOperations, adminv1.ControlServiceClient.ListOperations)
}

func (s controlService) listOperations(_ context.Context, r *adminv1.ListOperationsRequest) (*adminv1.ListOperationsResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	resp := &adminv1.ListOperationsResponse{}
	for i := range state.Operations {
		if op := &state.Operations[i]; r.GetId() == 0 || op.ID == r.GetId() {
			resp.Operations = append(resp.Operations, observeOperation(state, op, s.o.health.view()))
		}
	}
	if r.GetId() != 0 && len(resp.Operations) == 0 {
		return nil, rpc.Errorf(codes.NotFound, "OPERATION_NOT_FOUND", "there is no operation %d, or it ended long ago", r.GetId()).With("operation", r.GetId())
	}
	return resp, nil
}
