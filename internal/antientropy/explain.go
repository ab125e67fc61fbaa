package antientropy

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// explainTimeout bounds how long an explanation waits for an endpoint.
const explainTimeout = 3 * time.Second

// Explain says what keeps the dead records of a vnode on disk, or the record of one
// key. hints are what this node keeps for others. Errors are *rpc.Error.
func (c *Collector) Explain(ctx context.Context, r *adminv1.ExplainCollectionRequest, hints []replica.HintGroup) (*adminv1.ExplainCollectionResponse, error) {
	t := c.cfg.Fence.Topology()
	name := r.GetNamespace()
	if name == "" {
		name = topology.DefaultNamespace
	}
	ns := t.Namespace(name)
	vnode := r.GetVnode()
	switch {
	case ns == nil:
		return nil, rpc.AsError(topology.ErrNamespaceNotFound(name))
	case r.GetKey() != nil:
		vnode = t.VnodeOf(r.GetKey())
	case int(vnode) >= len(t.Ring):
		return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "there are %d vnodes, from 0 on", len(t.Ring)).
			With("field", "vnode").With("limit", len(t.Ring)-1)
	}
	ctx, cancel := context.WithTimeout(ctx, explainTimeout)
	defer cancel()
	e := explanation{t: t, namespace: ns, response: &adminv1.ExplainCollectionResponse{Vnode: vnode}}
	e.endpoints, e.stable = t.Endpoints(vnode, ns)
	e.states, e.errs = c.ask(ctx, t, ns.ID, vnode, e.endpoints, replicav1.Collect_STEP_STATE, 0)
	if r.GetKey() != nil {
		c.look(ctx, &e, r.GetKey())
	}
	e.describe(c.cfg.Peers.Alive)
	e.pins(slices.DeleteFunc(slices.Clone(hints), func(h replica.HintGroup) bool { return h.Namespace != ns.ID || h.Vnode != vnode }), c.cfg.Self, c.Void(ns.ID, vnode))
	return e.response, nil
}

// explanation is what an answer is made from.
type explanation struct {
	t         *topology.Topology
	namespace *topology.Namespace
	endpoints []uint64
	stable    bool
	states    []*replicav1.CollectResult // nil where errs has why
	errs      []error
	response  *adminv1.ExplainCollectionResponse
}

// look finds the newest record of a key among the endpoints.
func (c *Collector) look(ctx context.Context, e *explanation, key []byte) {
	deadline, _ := ctx.Deadline()
	got := make(chan *replicav1.Reply, len(e.endpoints))
	for _, n := range e.endpoints {
		call := &replicav1.Call{Epoch: e.t.Epoch, Operation: &replicav1.Call_Read{Read: &replicav1.Read{
			Namespace: e.namespace.ID, Vnode: e.response.Vnode, Key: key, HeaderOnly: true,
		}}}
		if err := c.cfg.Peers.Go(n, call, deadline, func(reply *replicav1.Reply, _ error) { got <- reply }); err != nil {
			got <- nil
		}
	}
	var newest record.Record
	for range e.endpoints {
		select {
		case reply := <-got:
			if rec, err := record.Decode(reply.GetRead().GetRecord()); err == nil && (newest.Kind == 0 || record.CompareHeaders(rec, newest) > 0) {
				newest = rec
			}
		case <-ctx.Done():
			return
		}
	}
	e.response.Found = newest.Kind != 0
	from, mortal := storage.DeadAt(newest)
	if e.response.Found && mortal && from <= e.clock() {
		e.response.Dead, e.response.DeadSince = true, uint64(from)
	}
}

// clock returns the least of the endpoints' clocks.
func (e *explanation) clock() hlc.Timestamp {
	least := hlc.Max
	for _, s := range e.states {
		if s != nil {
			least = min(least, hlc.Timestamp(s.GetClock()))
		}
	}
	return least
}

// describe fills in the endpoints.
func (e *explanation) describe(alive func(uint64) bool) {
	for i, n := range e.endpoints {
		r := &adminv1.CollectionReplica{Incarnation: n, Name: e.t.NodeName(n)}
		if s := e.states[i]; s != nil {
			r.Reachable = true
			r.Promise, r.Certificate = s.GetPromise(), s.GetCertificate()
			r.DeadRecords, r.OldestDead = s.GetDeadRecords(), s.GetOldestDead()
		} else {
			r.Reason = rpc.AsError(e.errs[i]).Message
			if !alive(n) {
				r.Reason = "down: " + r.Reason
			}
		}
		e.response.Replicas = append(e.response.Replicas, r)
	}
}

// pins says what is in the way, most important first.
func (e *explanation) pins(hints []replica.HintGroup, self uint64, lastVoid string) {
	res := e.response
	pin := func(format string, args ...any) { res.PinnedBy = append(res.PinnedBy, fmt.Sprintf(format, args...)) }
	dead := uint64(0)
	missing := false
	for _, r := range res.Replicas {
		dead = max(dead, r.GetDeadRecords())
		missing = missing || !r.GetReachable()
	}
	if dead == 0 && !missing || res.Found && !res.Dead {
		return // there is nothing to collect, or the key's record lives
	}
	if !e.stable {
		pin("vnode %d is moving between nodes: nothing is removed until the move has ended", res.GetVnode())
	}
	for _, r := range res.Replicas {
		if !r.GetReachable() {
			pin("%s does not answer (%s): nothing is certified until it is back or removed from the cluster", r.GetName(), r.GetReason())
		}
	}
	for _, h := range hints {
		if slices.Contains(e.endpoints, h.Target) {
			pin("%s keeps %d hints of this vnode for %s", e.t.NodeName(self), h.Count, e.t.NodeName(h.Target))
		}
	}
	if missing {
		return
	}
	e.pinnedByProgress(pin)
	if lastVoid != "" {
		pin("the last round that %s led came to nothing: %s", e.t.NodeName(self), lastVoid)
	}
}

// pinnedByProgress says how far the endpoints have come with what is asked about.
func (e *explanation) pinnedByProgress(pin func(string, ...any)) {
	res := e.response
	since, what := hlc.Timestamp(res.GetDeadSince()), "the record"
	if since == 0 {
		what = "the oldest dead record"
		for _, r := range res.Replicas {
			if old := hlc.Timestamp(r.GetOldestDead()); old != 0 && (since == 0 || old < since) {
				since = old
			}
		}
	}
	if since == 0 {
		pin("certified: removal begins %s after a node has learned of it", collectGrace)
		return
	}
	now := e.clock()
	if age := time.Duration(now.Millis()-since.Millis()) * time.Millisecond; age < collectAge {
		pin("%s is %s old: one is certified %s after it died at the earliest, and removed %s later", what, max(0, age).Round(time.Second), collectAge, collectGrace)
		return
	}
	certified := true
	for _, r := range res.Replicas {
		switch {
		case hlc.Timestamp(r.GetCertificate()) >= since:
		case hlc.Timestamp(r.GetPromise()) < since:
			certified = false
			pin("%s has not promised yet to take no writes up to %s: the vnode's leader asks every %s", r.GetName(), since, collectInterval)
		default:
			certified = false
			pin("%s knows of no certificate yet: the replicas have not been found equal up to %s", r.GetName(), since)
		}
	}
	if certified {
		pin("certified: removal begins %s after a node has learned of it", collectGrace)
	}
}
