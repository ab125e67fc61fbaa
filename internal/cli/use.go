package cli

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// nodeUse is what a node says that it holds and does.
type nodeUse struct {
	incarnation    uint64
	vnodes         []*adminv1.VnodeUse
	records, bytes uint64
	// perSecond is how many operations it coordinates in a second.
	perSecond float64
	// available is how many bytes its disk has free, 0 if it does not say.
	available uint64
}

// ringUse is what the nodes hold that said so, by incarnation.
type ringUse map[uint64]*nodeUse

// useTimeout bounds how long is waited for nodes to say what they hold.
const useTimeout = 2 * time.Second

// uses asks all data nodes what they hold. Who does not say it is named in failed.
func (a *App) uses(ctx context.Context, t *topology.Topology) (_ ringUse, failed []string, _ error) {
	var nodes []answered[*nodeUse]
	for i := range t.Nodes {
		if n := &t.Nodes[i]; n.Role == topology.Data {
			nodes = append(nodes, answered[*nodeUse]{Node: n})
		}
	}
	slices.SortStableFunc(nodes, func(a, b answered[*nodeUse]) int { return compareNames(a.Name, b.Name) })
	if err := askAll(ctx, a, nodes, min(a.flags.timeout, useTimeout), askUse); err != nil {
		return nil, nil, err
	}
	out := ringUse{}
	for _, n := range nodes {
		switch {
		case n.err != nil:
			failed = append(failed, fmt.Sprintf("%s does not say what it holds: %s", n.Name, rpc.AsError(n.err).Message))
		case n.answer.incarnation != n.Incarnation:
			failed = append(failed, fmt.Sprintf("%s, #%d, does not say what it holds: #%d is at %s", n.Name, n.Incarnation, n.answer.incarnation, n.Address))
		default:
			out[n.Incarnation] = n.answer
		}
	}
	return out, failed, nil
}

func askUse(ctx context.Context, cc *grpc.ClientConn) (*nodeUse, error) {
	c := adminv1.NewStatusServiceClient(cc)
	resp, err := c.GetNodeUse(ctx, &adminv1.GetNodeUseRequest{})
	if err != nil {
		return nil, err
	}
	status, err := c.GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return nil, err
	}
	u := &nodeUse{incarnation: status.GetStatus().GetIncarnation(), vnodes: resp.GetVnodes(), perSecond: operations(status.GetStatus()), available: status.GetStatus().GetDiskAvailableBytes()}
	for _, v := range u.vnodes {
		u.records += v.GetRecords()
		u.bytes += v.GetBytes()
	}
	return u, nil
}
