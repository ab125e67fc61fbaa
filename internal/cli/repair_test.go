package cli

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/rpc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// A fake node's repair is paused once it was told so; node1 has something to say.
func (n *fakeNode) GetRepairStatus(_ context.Context, r *adminv1.GetRepairStatusRequest) (*adminv1.GetRepairStatusResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	resp := &adminv1.GetRepairStatusResponse{Paused: n.f.mu.repairPaused[n.incarnation]}
	if n.incarnation != 1 || n.f.mu.rolling.leader != "" {
		return resp, nil
	}
	resp.Rounds, resp.LastRoundAgeMs, resp.LastRoundTookMs = 12, 8_000, 61_000
	resp.BytesRead, resp.RecordsSent, resp.RecordsReceived, resp.DirtyVnodes = 3<<20, 1600, 12, 1
	if r.GetVnodes() {
		resp.Vnodes = []*adminv1.VnodeRepair{
			{Namespace: "default", Vnode: 0, State: adminv1.VnodeRepair_STATE_EQUAL, AgeMs: 9_000, Records: 4200, Certificate: uint64(hlc.At(1772366400000))},
			{Namespace: "default", Vnode: 3, State: adminv1.VnodeRepair_STATE_FAILED, AgeMs: 70_000, Records: 4100, Differences: 12, Reason: "node3 is down", Dirty: true},
			{Namespace: "default", Vnode: 6, State: adminv1.VnodeRepair_STATE_WAITING},
		}
	}
	return resp, nil
}

func (n *fakeNode) StartRepair(context.Context, *adminv1.StartRepairRequest) (*adminv1.StartRepairResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	delete(n.f.mu.repairPaused, n.incarnation)
	return &adminv1.StartRepairResponse{}, nil
}

func (n *fakeNode) PauseRepair(context.Context, *adminv1.PauseRepairRequest) (*adminv1.PauseRepairResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if n.incarnation == 3 {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonStopping, "node3 is stopping")
	}
	n.f.mu.repairPaused[n.incarnation] = true
	return &adminv1.PauseRepairResponse{}, nil
}

func TestRepair(t *testing.T) {
	f := newFake(t, 3)
	golden(t, "repair-status", f.run("repair", "status", "--vnodes").want(t, 0).stdout)
	golden(t, "repair-status-json", f.run("repair", "status", "node1", "--vnodes", "-o", "json").want(t, 0).stdout)
	// A node that does not do as it is told is named; the others do.
	f.run("repair", "pause").want(t, 0, "node1 pauses", "node2 pauses", "kvctl: node3: node3 is stopping")
	f.run("repair", "status", "node2").want(t, 0, "paused")
	f.run("repair", "start", "#2").want(t, 0, "node2 begins a round")
	f.run("repair", "status", "node2").want(t, 0, "runs")
	f.run("repair", "status", "node1").want(t, 0, "paused")
	f.run("repair", "pause", "node3").want(t, 4, "node3")
	f.run("repair", "status", "nobody").want(t, 3, "nobody")
	f.run("repair", "stats").want(t, 2, "status")
}
