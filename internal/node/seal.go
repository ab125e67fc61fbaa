package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// metaSeal is where a store keeps the last seal.
const metaSeal = "seal"

// loadSeal returns the seal that the node keeps on disk, or nil.
func loadSeal(s *storage.Store) (*adminv1.Seal, error) {
	b, err := s.Meta(metaSeal)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pb := &adminv1.Seal{}
	if err := proto.Unmarshal(b, pb); err != nil {
		return nil, fmt.Errorf("%w: seal: %w", storage.ErrCorrupt, err)
	}
	return pb, nil
}

// admits returns why a topology must not come into use, or nil. Of two recoveries that
// begin one generation a node follows one, and a sealed node follows no orchestrators but
// those of the recovery that it was sealed for, or of a later generation: not those whose
// majority was lost and came back, either.
func (t *topologies) admits(next *topology.Topology) *rpc.Error {
	cur, g := t.current(), topology.Generation(next.Epoch)
	if cur.Epoch != 0 && g == topology.Generation(cur.Epoch) && next.Recovery != cur.Recovery {
		return rpc.Errorf(codes.Unavailable, "OTHER_RECOVERY", "epoch %s is of recovery %q, this node follows %q: two recoveries began generation %d", topology.EpochString(next.Epoch), next.Recovery, cur.Recovery, g)
	}
	s := t.seal.Load()
	if s == nil || mutant.On("seal-ignored") || g > s.GetGeneration() || g == s.GetGeneration() && next.Recovery == s.GetRecovery() {
		return nil
	}
	return rpc.Errorf(codes.Unavailable, "SEALED", "this node waits for generation %d, of recovery %s, and takes in epoch %s no more", s.GetGeneration(), s.GetRecovery(), topology.EpochString(next.Epoch))
}

// pendingSeal returns the seal of the generation that the node waits for, or nil.
func (t *topologies) pendingSeal() *adminv1.Seal {
	if s := t.seal.Load(); s.GetGeneration() > topology.Generation(t.current().Epoch) {
		return s
	}
	return nil
}

// setSeal seals the node, and returns when that is on disk, and the topology in use is: it
// is what a recovery goes by, and must be the same whenever it asks.
func (t *topologies) setSeal(ctx context.Context, s *adminv1.Seal) error {
	if s.GetRecovery() == "" || s.GetGeneration() == 0 {
		return rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "a seal names a recovery and its generation")
	}
	if err := t.writeSeal(s); err != nil {
		return err
	}
	for t.kept.Load() < t.current().Epoch {
		select {
		case <-ctx.Done():
			return rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "the node is sealed, but its topology is not on its disk yet")
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

func (t *topologies) writeSeal(s *adminv1.Seal) error {
	t.adopting <- struct{}{} // nothing is adopted in between
	defer func() { <-t.adopting }()
	if cur := t.current(); topology.Generation(cur.Epoch) >= s.GetGeneration() {
		return rpc.Errorf(codes.Aborted, "GENERATION_BEGUN", "this node is in generation %d already, at epoch %s", topology.Generation(cur.Epoch), topology.EpochString(cur.Epoch))
	}
	have := t.seal.Load()
	switch {
	case have.GetRecovery() == s.GetRecovery() && have.GetGeneration() == s.GetGeneration():
		if slices.Equal(have.GetOrchestrators(), s.GetOrchestrators()) {
			return nil
		}
	case have.GetGeneration() >= s.GetGeneration():
		return rpc.Errorf(codes.Aborted, "SEALED", "this node is sealed for recovery %s, of generation %d, which %s began", have.GetRecovery(), have.GetGeneration(), have.GetBy())
	}
	b, err := proto.Marshal(s)
	if err != nil {
		return err
	}
	if err := t.store.SetMeta(metaSeal, b); err != nil {
		return err
	}
	t.seal.Store(s)
	t.logger.Warn("sealed: this node takes in no topology but of a new generation", "recovery", s.GetRecovery(), "generation", s.GetGeneration(), "epoch", topology.EpochString(t.current().Epoch), "by", s.GetBy())
	return nil
}

// recoveryService takes part in a recovery of the control plane.
type recoveryService struct {
	adminv1.UnimplementedRecoveryServiceServer
	node *Node
}

func (s recoveryService) GetRecoveryState(context.Context, *adminv1.GetRecoveryStateRequest) (*adminv1.GetRecoveryStateResponse, error) {
	state, err := s.node.recoveryState()
	return &adminv1.GetRecoveryStateResponse{State: state}, err
}

func (s recoveryService) Seal(ctx context.Context, r *adminv1.SealRequest) (*adminv1.SealResponse, error) {
	if id := s.node.id.ClusterID; r.GetClusterId() != id {
		return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this is cluster %s, not %s", id, r.GetClusterId())
	}
	if err := s.node.topologies.setSeal(ctx, r.GetSeal()); err != nil {
		return nil, err
	}
	state, err := s.node.recoveryState()
	return &adminv1.SealResponse{State: state}, err
}

func (n *Node) recoveryState() (*adminv1.RecoveryState, error) {
	boots, err := n.store.Boots()
	if err != nil {
		return nil, err
	}
	s := &adminv1.RecoveryState{
		Name: n.cfg.Name, Incarnation: n.id.Incarnation, DataId: n.id.DataID, Boot: boots, BootId: n.registrar.bootID,
		Seal: n.topologies.pendingSeal(), SealedGeneration: n.topologies.seal.Load().GetGeneration(),
	}
	if t := n.topologies.current(); t.Epoch != 0 {
		s.Topology = t.Proto()
	}
	return s, nil
}
