package handoff

import (
	"context"
	"errors"
	"math"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// lot is what one call of a round carries: hints of one vnode, and the answer.
type lot struct {
	hints  []storage.Hint
	apply  *replicav1.Apply
	credit int64
	err    error
}

// lots sorts hints by namespace and vnode, in the order in which they come.
func lots(hints []storage.Hint) (out []*lot, size int64) {
	places := map[storage.Place]*lot{}
	for _, h := range hints {
		p := placeOf(h)
		l := places[p]
		if l == nil {
			l = &lot{apply: &replicav1.Apply{Namespace: h.Namespace, Vnode: h.Vnode, Source: replicav1.Source_SOURCE_HINT}}
			places[p] = l
			out = append(out, l)
		}
		l.hints = append(l.hints, h)
		l.apply.Entries = append(l.apply.Entries, &replicav1.Entry{Key: h.Key, Record: h.Record})
		size += h.SizeBytes()
	}
	return out, size
}

// round sends hints, a call for each vnode, and forgets those of every call that the
// target has on disk, whatever becomes of the others. It returns the size of all. An
// error means that the rest has to wait.
func (r *Replayer) round(ctx context.Context, t *topology.Topology, d *delivery, hints []storage.Hint) (size int64, _ error) {
	all, size := lots(hints)
	if err := r.limiter.WaitN(ctx, min(int(size), r.limiter.Burst())); err != nil {
		return size, err
	}
	r.send(t, d.target, all)
	var failed error
	taken, credit := false, int64(math.MaxInt64)
	for _, l := range all {
		switch why, useless := refused(l.err); {
		case l.err == nil:
			taken, credit = true, min(credit, l.credit)
			if err := r.cfg.Hints.Forget(l.hints); err != nil {
				return size, err
			}
		case useless:
			if err := r.cfg.Hints.Discard(why, l.hints); err != nil {
				return size, err
			}
		case ofVnode(l.err):
			d.failing[placeOf(l.hints[0])] = true
		default:
			failed = l.err
		}
	}
	if taken {
		if d.credit = credit; credit == 0 && failed == nil {
			failed = errNoCredit
		}
	}
	return size, failed
}

// send sends all lots at once and returns when each has its answer.
func (r *Replayer) send(t *topology.Topology, target uint64, all []*lot) {
	answered := make(chan struct{}, len(all))
	for _, l := range all {
		call := &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Apply{Apply: l.apply}}
		err := r.cfg.Peers.Go(target, call, time.Now().Add(r.cfg.Timeout), func(reply *replicav1.Reply, err error) {
			l.credit, l.err = int64(reply.GetApply().GetCreditBytes()), err
			answered <- struct{}{}
		})
		if err != nil {
			l.err = err
			answered <- struct{}{}
		}
	}
	for range all {
		<-answered
	}
}

// refused reports whether a target will never take what it refused with an error, and
// why.
func refused(err error) (replica.HintLoss, bool) {
	var e *rpc.Error
	switch {
	case !errors.As(err, &e):
	case e.Reason == rpc.ReasonBelowPromise:
		return replica.LossBelowPromise, true
	case e.Code == codes.InvalidArgument:
		return replica.LossRefused, true
	}
	return 0, false
}

// ofVnode reports whether an error is about the vnode of a call, so that calls for
// others may do better.
func ofVnode(err error) bool {
	var e *rpc.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Reason {
	case rpc.ReasonStaleEpoch, rpc.ReasonNotOwner, rpc.ReasonCorrupt:
		return true
	}
	return false
}
