package node

import (
	"context"
	"time"

	"github.com/kvasirdb/kvasir/internal/antientropy"
	"github.com/kvasirdb/kvasir/internal/storage"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// repairService shows and steers what keeps this node's replicas equal to others'.
type repairService struct {
	adminv1.UnimplementedRepairServiceServer
	node *Node
}

func (s repairService) ListHints(_ context.Context, r *adminv1.ListHintsRequest) (*adminv1.ListHintsResponse, error) {
	return s.node.listHints(r.GetTarget()), nil
}

func (s repairService) ExplainCollection(ctx context.Context, r *adminv1.ExplainCollectionRequest) (*adminv1.ExplainCollectionResponse, error) {
	return s.node.collector.Explain(ctx, r, s.node.hints.Groups())
}

func (s repairService) StartRepair(_ context.Context, r *adminv1.StartRepairRequest) (*adminv1.StartRepairResponse, error) {
	if r.GetScrub() {
		s.node.scrubber.start()
	}
	s.node.repairer.Start()
	return &adminv1.StartRepairResponse{}, nil
}

func (s repairService) PauseRepair(context.Context, *adminv1.PauseRepairRequest) (*adminv1.PauseRepairResponse, error) {
	s.node.repairer.Pause()
	return &adminv1.PauseRepairResponse{}, nil
}

func (s repairService) GetRepairStatus(_ context.Context, r *adminv1.GetRepairStatusRequest) (*adminv1.GetRepairStatusResponse, error) {
	n := s.node
	st := n.repairer.Status()
	dirty := map[storage.Place]bool{}
	for _, d := range n.store.Dirty() {
		dirty[d.Place] = true
	}
	resp := &adminv1.GetRepairStatusResponse{
		Paused: st.Paused, Rounds: st.Rounds, LastRoundTookMs: uint64(st.Took.Milliseconds()),
		BytesRead: n.store.TreeBytesRead(), RecordsSent: st.Sent, RecordsReceived: st.Received, DirtyVnodes: uint64(len(dirty)),
		ScrubRounds: n.scrubber.rounds.Load(), ScrubBytes: n.scrubber.bytes.Load(), ScrubProgress: n.scrubber.fraction(), Corruptions: n.store.Corruptions(),
	}
	if st.Rounds > 0 {
		resp.LastRoundAgeMs = uint64(time.Since(st.Ended).Milliseconds())
	}
	if !r.GetVnodes() {
		return resp, nil
	}
	t := n.fence.Topology()
	for i := range st.Places {
		p := &st.Places[i]
		ns := t.NamespaceByID(p.Namespace)
		if ns == nil {
			continue
		}
		resp.Vnodes = append(resp.Vnodes, n.vnodeRepair(p, ns.Name, dirty[p.Place]))
	}
	return resp, nil
}

func (n *Node) vnodeRepair(p *antientropy.PlaceStatus, namespace string, dirty bool) *adminv1.VnodeRepair {
	c := n.store.Collection(p.Namespace, p.Vnode)
	v := &adminv1.VnodeRepair{
		Namespace: namespace, Vnode: p.Vnode, State: adminv1.VnodeRepair_State(p.State), Leader: n.id.Incarnation,
		Records: p.Records, Differences: p.Differences, Reason: p.Reason, Dirty: dirty,
		Promise: uint64(c.Promise), Certificate: uint64(c.Certificate),
	}
	if !p.At.IsZero() {
		v.AgeMs = uint64(time.Since(p.At).Milliseconds())
	}
	return v
}
