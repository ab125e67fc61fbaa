package node

import (
	"context"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// sweepInterval is how often the node looks at most for what it has handed over: it
// goes through all that it holds, and there can be several epochs a second.
const sweepInterval = time.Second

// sweep removes the records of vnodes that the node has handed over, whenever the
// topology has changed, until ctx ends.
func (n *Node) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for swept := (*topology.Topology)(nil); ; {
		if t := n.fence.Topology(); t != swept && n.sweepUnder(t) {
			swept = t
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// sweepUnder removes what the node holds and is no endpoint of under a topology, and
// reports whether that is done.
func (n *Node) sweepUnder(t *topology.Topology) bool {
	if !t.Formed() || t.Node(n.id.Incarnation) == nil {
		return true
	}
	if n.topologies.taken() < t.Epoch {
		return false // requests under older epochs may still want it, or this node after a crash
	}
	swept, err := n.assignments.Sweep(func(p storage.Place) bool {
		// What a transition may yet go back to, or is to be rebuilt from, stays.
		t, ns := n.fence.Topology(), n.fence.Topology().NamespaceByID(p.Namespace)
		if mutant.On("no-wipe") {
			return true
		}
		if j := t.Ring[p.Vnode].Moving(); j >= 0 && t.Ring[p.Vnode].Slots[j].Node == n.id.Incarnation && mutant.On("early-sender-drop") {
			return false
		}
		return ns == nil || int(p.Vnode) >= len(t.Ring) || t.Ring[p.Vnode].Moving() >= 0 || t.Holds(n.id.Incarnation, p.Vnode, ns)
	})
	if err != nil {
		n.cfg.Logger.Error("cannot delete what the node has handed over", "err", err)
		return false
	}
	if len(swept) > 0 {
		n.cfg.Logger.Info("deleted what the node has handed over", "places", len(swept), "epoch", topology.EpochString(t.Epoch))
	}
	return true
}
