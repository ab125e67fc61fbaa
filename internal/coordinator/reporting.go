package coordinator

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Reporting replicas get every write, and vote in no quorum. No write is acknowledged that
// one lacks which writes have to wait for, until the topology says otherwise: by then its
// lease is over (invariant 13).

// findCopies finds the reporting replicas that a client's write goes to. It returns why
// the write cannot be acknowledged, where that is known beforehand.
func (w *write) findCopies() *rpc.Error {
	if w.source != replicav1.Source_SOURCE_FIRST_HAND {
		return nil
	}
	w.copies = w.topology.Copies(w.vnode, w.namespace.ID)
	if w.namespace.Reporting.Policy != topology.ReportingBlock {
		return nil
	}
	var down []string
	for _, c := range w.copies {
		if w.awaited(c) && !w.c.cfg.Peers.Alive(c.Node) {
			down = append(down, w.name(c.Node))
		}
	}
	if len(down) == 0 {
		return nil
	}
	w.c.metrics.notEnough.Inc()
	return rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas,
		"writes to namespace %s wait for its reporting replicas, and %s is down: start it, or let writes go on without it by kvctl namespace set %s --reporting degrade",
		w.namespace.Name, strings.Join(down, ", "), w.namespace.Name).
		With("down", strings.Join(down, ",")).With("reporting", true)
}

// isCopy reports whether a node has one of the copies.
func (w *write) isCopy(node uint64) bool {
	return slices.ContainsFunc(w.copies, func(c topology.Copy) bool { return c.Node == node })
}

// awaited reports whether the write must not be acknowledged without a copy: it was to
// wait for it when it began, and still is.
func (w *write) awaited(c topology.Copy) bool {
	if !c.State.Awaited() {
		return false
	}
	now := w.c.cfg.Fence.Topology()
	if now.Epoch <= w.topology.Epoch {
		return true
	}
	if int(w.vnode) >= len(now.Ring) {
		return false
	}
	present, ok := now.Copy(w.vnode, w.namespace.ID, c.Node)
	return ok && present.State.Awaited() && !(present.State == topology.Evicting && mutant.On("ack-before-eviction"))
}

// lacking returns the nodes whose copies the write has to wait for and that have not
// acknowledged it.
// REQUIRES: w.mu is held.
func (w *write) lacking() (nodes []uint64) {
	for _, c := range w.copies {
		if !slices.Contains(w.mu.acked, c.Node) && w.awaited(c) {
			nodes = append(nodes, c.Node)
		}
	}
	return nodes
}

// judgeCopies decides whether a write that enough slots have may be acknowledged.
// REQUIRES: w.mu is held.
func (w *write) judgeCopies() (done bool, stale, by uint64, _ *rpc.Error) {
	lacking := w.lacking()
	failed := len(lacking) > 0 && !slices.ContainsFunc(lacking, func(n uint64) bool { return !slices.Contains(w.mu.failed, n) })
	switch {
	case len(lacking) == 0:
		return true, 0, 0, nil
	case failed && w.mu.stale > 0:
		w.mu.abandoned = true
		return true, w.mu.stale, w.mu.staleBy, w.withoutCopies(lacking, "under this epoch")
	case failed && w.namespace.Reporting.Policy == topology.ReportingBlock:
		return true, 0, 0, w.withoutCopies(lacking, "since it failed")
	}
	return false, 0, 0, nil
}

// inTime is why a write fails whose deadline has passed.
const inTime = "in time"

// withoutCopies is the error of a write that enough slots have, but not all copies.
// REQUIRES: w.mu is held.
func (w *write) withoutCopies(lacking []uint64, why string) *rpc.Error {
	names := make([]string, len(lacking))
	for i, n := range lacking {
		names[i] = w.name(n)
	}
	if why == inTime && w.namespace.Reporting.Policy == topology.ReportingDegrade {
		why += ", nor was its eviction agreed on (kvctl cluster status tells whether the orchestrators have a leader)"
	}
	e := rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown,
		"%d of %d needed replicas acknowledged, but reporting replica %s did not %s: the outcome is unknown, the write may be seen by reads and survive, or not",
		w.mu.counter.Acked(), w.need(), strings.Join(names, ", "), why)
	return e.With("acknowledged", w.mu.counter.Acked()).With("needed", w.need()).With("n", w.goals[0].N).With("reporting", strings.Join(names, ","))
}

// laggards tells when the eviction of the copies that hold a write up is to be called for:
// once it has waited for as long as its namespace says, and again after as long, for there
// may have been no leader to hear it. The channel is nil where nothing is to be called for.
func (w *write) laggards() (timeout <-chan time.Time, stop func()) {
	if len(w.copies) == 0 || w.namespace.Reporting.Policy != topology.ReportingDegrade {
		return nil, func() {}
	}
	ticker := time.NewTicker(w.namespace.Reporting.Timeout)
	return ticker.C, ticker.Stop
}

// evict calls for the eviction of the copies that hold the write up.
func (w *write) evict() {
	if w.c.cfg.Evict == nil {
		return
	}
	w.mu.Lock()
	lacking := w.lacking()
	w.mu.Unlock()
	for _, n := range lacking {
		w.c.cfg.Evict(Laggard{Namespace: w.namespace.ID, Vnode: w.vnode, Node: n})
	}
}

// Laggard is a reporting replica that holds writes up.
type Laggard struct {
	Namespace, Vnode uint32
	Node             uint64
}
