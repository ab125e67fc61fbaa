package node

import (
	"context"

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
