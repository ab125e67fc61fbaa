package replica

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// promised refuses what this replica has promised not to take any more: an old
// first-hand write or hint could bring back what others have removed the tombstone
// of. Records that another replica holds are no danger and always join.
// REQUIRES: between BeginApply and End.
func (f *frame) promised(op *replicav1.Apply, oldest hlc.Timestamp) *rpc.Error {
	promise := f.cfg.Store.Collection(op.GetNamespace(), op.GetVnode()).Promise
	if oldest > promise {
		return nil
	}
	f.refused.Add(1)
	return rpc.Errorf(codes.Aborted, rpc.ReasonBelowPromise, "%s takes no writes of vnode %d up to %s any more, this one is of %s",
		f.topology.NodeName(f.cfg.Self), op.GetVnode(), promise, oldest).With("promise", uint64(promise))
}

// RefusedBelowPromise returns how many calls were refused for their promise.
func (r *Replica) RefusedBelowPromise() uint64 { return r.refused.Load() }

// collect serves a step of the collection of a vnode's dead records.
func (f *frame) collect(ctx context.Context, c *replicav1.Call, op *replicav1.Collect) {
	want := toWrite
	if op.GetStep() == replicav1.Collect_STEP_STATE {
		want = toCompare
	}
	if err := f.check(c, op.GetNamespace(), op.GetVnode(), want); err != nil {
		f.fail(c, err)
		return
	}
	ns, vnode, ts := op.GetNamespace(), op.GetVnode(), hlc.Timestamp(op.GetTimestamp())
	if op.GetStep() != replicav1.Collect_STEP_STATE {
		// What this replica lost to bit rot others may still need.
		if err := f.trust(f.cfg.Store.Reading(), ns, vnode); err != nil {
			f.fail(c, err)
			return
		}
	}
	var err error
	switch op.GetStep() {
	case replicav1.Collect_STEP_STATE:
	case replicav1.Collect_STEP_PROMISE:
		// A promise ahead of the clock would refuse writes to come.
		if rerr := f.cfg.Clock.CheckAhead(ts); rerr != nil {
			f.fail(c, rerr)
			return
		}
		err = f.cfg.Store.Promise(ns, vnode, ts)
	case replicav1.Collect_STEP_CERTIFY:
		if rerr := f.checkCertificate(op); rerr != nil {
			f.fail(c, rerr)
			return
		}
		err = f.cfg.Store.Certify(ns, vnode, ts, op.GetEndpoints())
	default:
		f.fail(c, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "unknown step %d", op.GetStep()))
		return
	}
	var res *replicav1.CollectResult
	if err == nil {
		res, err = f.collectionState(ctx, f.topology, ns, vnode)
	}
	if err != nil {
		f.fail(c, storeError(err))
		return
	}
	f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Collect{Collect: res}})
}

// checkCertificate refuses a certificate that is void here: for other endpoints, of a
// vnode that moves, or above what this node has promised.
func (f *frame) checkCertificate(op *replicav1.Collect) *rpc.Error {
	ns := f.topology.NamespaceByID(op.GetNamespace())
	endpoints, stable := f.topology.Endpoints(op.GetVnode(), ns)
	promise := f.cfg.Store.Collection(op.GetNamespace(), op.GetVnode()).Promise
	switch {
	case !stable:
		return f.void("vnode %d is in transition", op.GetVnode())
	case !slices.Equal(endpoints, op.GetEndpoints()):
		return f.void("the endpoints of vnode %d are %v, the certificate is for %v", op.GetVnode(), endpoints, op.GetEndpoints())
	case hlc.Timestamp(op.GetTimestamp()) > promise:
		return f.void("the certificate %s is above the promise %s", hlc.Timestamp(op.GetTimestamp()), promise)
	}
	return nil
}

func (f *frame) void(format string, args ...any) *rpc.Error {
	return rpc.Errorf(codes.FailedPrecondition, "CERTIFICATE_VOID", format, args...)
}

// collectionState is what this node says of a vnode's dead records. A certificate for
// other endpoints than the topology's is none.
func (r *Replica) collectionState(ctx context.Context, t *topology.Topology, namespace, vnode uint32) (*replicav1.CollectResult, error) {
	state := r.cfg.Store.Collection(namespace, vnode)
	if !ValidCertificate(t, namespace, vnode, state.Endpoints) {
		state.Certificate = 0
	}
	dead, err := r.cfg.Store.Dead(ctx, namespace, vnode, state.Certificate)
	if err != nil {
		return nil, err
	}
	return &replicav1.CollectResult{
		Clock: uint64(hlc.At(r.cfg.Clock.Now())), Promise: uint64(state.Promise), Certificate: uint64(state.Certificate),
		LateJoins: r.cfg.Store.LateJoins(namespace, vnode), Run: r.run,
		OldestDead: uint64(dead.Oldest), DeadRecords: dead.Records + dead.Gone,
	}, nil
}

// ValidCertificate reports whether a certificate for endpoints lets dead records of a
// vnode go under a topology: it holds for just those endpoints, and for no move.
func ValidCertificate(t *topology.Topology, namespace, vnode uint32, endpoints []uint64) bool {
	ns := t.NamespaceByID(namespace)
	if ns == nil || int(vnode) >= len(t.Ring) {
		return false
	}
	now, stable := t.Endpoints(vnode, ns)
	return stable && slices.Equal(now, endpoints)
}

// VoidCertificates forgets the certificates that a new topology makes void.
func (r *Replica) VoidCertificates(t *topology.Topology) error {
	if !t.Formed() {
		return nil
	}
	var void []storage.Place
	r.cfg.Store.Collections(func(namespace, vnode uint32, c storage.Collection) bool {
		if c.Certificate != 0 && t.NamespaceByID(namespace) != nil && !ValidCertificate(t, namespace, vnode, c.Endpoints) {
			void = append(void, storage.Place{Namespace: namespace, Vnode: vnode})
		}
		return true
	})
	return r.cfg.Store.VoidCertificates(void...)
}
