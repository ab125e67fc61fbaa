package coordinator

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// mend brings stale replicas up to what a read found, as its repair mode says.
//
// Blocking: the answer may leave when slotsToHold slots hold the winner, in a transition
// both nodes of every counted slot; any later read of R slots then meets one of
// them, in whatever phase. Mending only the stale among the R lets later reads go
// backwards.
func (c *Coordinator) mend(ctx context.Context, res *result) (epoch, by uint64, _ *rpc.Error) {
	if res.winner.Kind == 0 || res.job.repair == topology.RepairOff {
		return 0, 0, nil
	}
	holders, stale := res.holders()
	for _, n := range stale {
		res.job.trace.add(kvv1.TraceEvent_KIND_STALE, res.topology.NodeName(n), "has not %s", res.winner.Version)
	}
	blocking := res.job.repair == topology.RepairBlocking && res.job.need > 1
	targets := c.repairTargets(res, holders, stale, blocking)
	if len(targets) == 0 {
		return 0, 0, nil
	}
	c.metrics.repairs.Inc()
	tried := targets
	for {
		w, err := c.start(res.repairJob(holders, targets))
		if err != nil {
			if blocking {
				return 0, 0, err
			}
			return 0, 0, nil // the next read will find it
		}
		res.background = true
		if !blocking {
			return 0, 0, nil
		}
		epoch, by, err := w.wait(ctx)
		if err == nil {
			res.repaired += len(targets)
			return 0, 0, nil
		}
		if epoch > 0 {
			return epoch, by, err
		}
		// One that cannot take it, as its disk is full, must not fail a read that the
		// slots beyond R can vouch for.
		holders = w.holdersNow()
		rest := slices.DeleteFunc(endpoints(w.slots), func(n uint64) bool {
			return slices.Contains(holders, n) || slices.Contains(tried, n)
		})
		if len(rest) == 0 || ctx.Err() != nil {
			return 0, 0, rpc.Errorf(codes.Unavailable, rpc.ReasonRepairFailed,
				"replicas are stale and too few could be mended: %s; read again, or with read repair off", err.Message).
				With("needed", w.need()).With("n", w.goals[0].N)
		}
		targets, tried = rest, append(tried, rest...)
	}
}

// repairTargets returns the nodes to send the winner to.
func (c *Coordinator) repairTargets(r *result, holders, stale []uint64, blocking bool) []uint64 {
	targets := slices.Clone(stale)
	if !blocking || mutant.On("repair-only-stale") {
		return targets
	}
	add := func(slot int) {
		for _, n := range r.slots[slot].Write {
			if n != 0 && !slices.Contains(holders, n) && !slices.Contains(targets, n) {
				targets = append(targets, n)
			}
		}
	}
	counted := make([]bool, len(r.slots))
	for _, a := range r.replies {
		counted[a.slot] = true
		add(a.slot)
	}
	if len(targets) == 0 {
		return nil // all that were asked agree
	}
	if r.namespace.AlsoN > 0 {
		// Whoever reads another number of slots must meet it as well.
		for _, n := range endpoints(r.topology.Slots(r.vnode, r.namespace.Wide())) {
			if !slices.Contains(holders, n) && !slices.Contains(targets, n) {
				targets = append(targets, n)
			}
		}
		return targets
	}
	have := len(r.replies)
	for _, live := range []bool{true, false} {
		for slot := range r.slots {
			if have < r.slotsToHold() && !counted[slot] && r.slots[slot].Live(c.cfg.Peers.Alive) == live {
				add(slot)
				have++
			}
		}
	}
	return targets
}

func (r *result) repairJob(holders, targets []uint64) writeJob {
	for _, n := range targets {
		r.job.trace.add(kvv1.TraceEvent_KIND_REPAIR, r.topology.NodeName(n), "is sent %s", r.winner.Version)
	}
	if mutant.On("repair-writes-older") {
		for _, a := range r.replies {
			if a.rec.Kind != 0 && record.CompareHeaders(a.rec, r.winner) < 0 {
				a.rec.Payload = nil
				r.raw = record.Encode(a.rec)
			}
		}
	}
	return writeJob{
		topology: r.topology, namespace: r.namespace, vnode: r.vnode,
		entries: []*replicav1.Entry{{Key: r.job.key, Record: r.raw}},
		source:  replicav1.Source_SOURCE_REPAIR, readAt: r.readAt,
		goals: r.goals(), holders: holders, targets: targets, trace: r.job.trace,
	}
}

// compareRest asks the slots beyond R for their headers, after the answer, and
// mends those that are stale.
func (c *Coordinator) compareRest(res *result, rest []int) {
	if !c.checks.TryAcquire(1) {
		return
	}
	res.background = true
	c.background.Go(func() {
		defer c.checks.Release(1)
		ctx, cancel := context.WithTimeout(context.Background(), c.cfg.RequestTimeout)
		defer cancel()
		other := *res
		other.replies = nil
		g := c.newGather(&other, rest)
		g.fullAsked = true
		g.runAll(ctx) // those that fail cannot be compared
		var stale []uint64
		newer := false
		for _, a := range other.replies {
			switch d := record.CompareHeaders(a.rec, res.winner); {
			case a.rec.Kind == 0 && res.winner.Kind != 0, a.rec.Kind != 0 && d < 0:
				stale = append(stale, a.node)
			case a.rec.Kind != 0 && (d > 0 || res.winner.Kind == 0):
				newer = true
			}
		}
		switch {
		case newer:
			c.mendAll(ctx, res)
		case len(stale) > 0:
			holders, _ := res.holders()
			c.metrics.repairs.Inc()
			if _, err := c.start(res.repairJob(holders, stale)); err == nil {
				return // the write finishes the trace
			}
		}
		res.job.trace.finish()
	})
}

// mendAll reads every slot and mends without anybody waiting.
func (c *Coordinator) mendAll(ctx context.Context, res *result) {
	all := *res
	all.replies, all.job.trace = nil, nil
	all.job.repair = topology.RepairAsync
	g := c.newGather(&all, c.readOrder(all.slots))
	g.runAll(ctx)
	all.decide()
	if g.fetch(ctx) == nil {
		c.mend(ctx, &all)
	}
}
