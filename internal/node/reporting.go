package node

import (
	"context"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// reporting is what a node does for copies in sync: as a reporting node it keeps the lease by
// which it may answer for its own, as a data node it asks for the eviction of those that
// hold its writes up.
type reporting struct {
	node *Node
	mu   struct {
		sync.Mutex
		epoch uint64
		until time.Duration // by the boot-time clock
		why   string        // why there is no lease, if the last try failed
	}
	// laggards are the copies whose eviction is to be asked for.
	laggards chan coordinator.Laggard
}

const (
	// leaseInterval is the pause between two requests for a lease.
	leaseInterval = 500 * time.Millisecond
	// maxLaggards bounds the evictions that wait to be asked for; writes ask again.
	maxLaggards = 64
)

func newReporting(n *Node) *reporting {
	return &reporting{node: n, laggards: make(chan coordinator.Laggard, maxLaggards)}
}

// leased reports whether the node may answer for a copy that holds every acknowledged write:
// it is in sync, and none that would have evicted it can have been agreed on and waited for.
//
// Invariant 13: the lease is of an epoch. What was agreed on before that epoch the node has to
// know; of what is agreed on after it, the leader waits for the end of the lease.
func (r *reporting) leased(t *topology.Topology, c topology.Copy) bool {
	if c.State != topology.InSync {
		return mutant.On("stale-as-in-sync") && c.State >= topology.Behind
	}
	return r.left(t) > 0 || mutant.On("lease-ignored")
}

// left returns for how long what a topology has in sync may be answered for.
func (r *reporting) left(t *topology.Topology) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.Epoch < r.mu.epoch || topology.Generation(t.Epoch) != topology.Generation(r.mu.epoch) {
		return 0
	}
	return max(0, r.mu.until-r.node.cfg.Seams.BootClock())
}

// keepLease asks for the lease again and again while the node has copies, until ctx ends.
func (r *reporting) keepLease(ctx context.Context) {
	n := r.node
	for {
		if t := n.fence.Topology(); t.Formed() && t.Names(n.id.Incarnation) {
			r.renew(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(leaseInterval):
		}
	}
}

// renew asks for the lease once.
func (r *reporting) renew(ctx context.Context) {
	asked := r.node.cfg.Seams.BootClock() // the leader counts from later on
	resp, err := forward(ctx, r.node, idempotent, &adminv1.GrantLeaseRequest{ClusterId: r.node.id.ClusterID, Incarnation: r.node.id.Incarnation}, adminv1.ControlServiceClient.GrantLease)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.mu.why = rpc.AsError(err).Message
		return
	}
	r.mu.why = ""
	r.mu.epoch, r.mu.until = resp.GetEpoch(), max(r.mu.until, asked+time.Duration(resp.GetDurationMs())*time.Millisecond)
}

// problem returns why there is no lease, if the last try for one failed.
func (r *reporting) problem() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.why
}

// evict has the eviction of a copy asked for, and does not wait.
func (r *reporting) evict(l coordinator.Laggard) {
	select {
	case r.laggards <- l:
	default:
	}
}

// evictLaggards asks for evictions until ctx ends. All copies of a namespace on a node are
// evicted together, so that one that is asked for stands for many that wait.
func (r *reporting) evictLaggards(ctx context.Context) {
	for {
		var l coordinator.Laggard
		select {
		case <-ctx.Done():
			return
		case l = <-r.laggards:
		}
		n := r.node
		t := n.fence.Topology()
		ns := t.NamespaceByID(l.Namespace)
		if c, ok := t.Copy(l.Vnode, l.Namespace, l.Node); ns == nil || !ok || c.State != topology.InSync && c.State != topology.Joining {
			continue // it was asked for already
		}
		resp, err := forward(ctx, n, idempotent, &adminv1.EvictCopiesRequest{
			ClusterId: n.id.ClusterID, NamespaceId: l.Namespace, Incarnation: l.Node, HeldUp: n.id.Incarnation,
		}, adminv1.ControlServiceClient.EvictCopies)
		if err == nil {
			err = n.topologies.refresh(ctx, resp.GetEpoch())
		}
		if err != nil && ctx.Err() == nil {
			n.cfg.Logger.Warn("a reporting replica that holds writes up cannot be evicted", "namespace", ns.Name, "node", t.NodeName(l.Node), "err", err)
		}
	}
}
