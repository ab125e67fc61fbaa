package antientropy

import (
	"context"
	"errors"
	"fmt"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// Refill joins with enough other replicas the places of this node that a quarantine
// covers: every write that was acknowledged by a majority, this replica perhaps among
// it, is in one of N-q+1 other voting slots, and every acknowledged write in one of N-W+1.
// Replicas that are in quarantine themselves refuse and do not count. An error says which
// place is not complete yet.
func (r *Repairer) Refill(ctx context.Context, covers func(storage.Place) bool) error {
	t := r.cfg.Fence.Topology()
	if !t.Formed() {
		return errors.New("there is no topology yet")
	}
	var errs []error
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		for v := range t.Ring {
			p := storage.Place{Namespace: ns.ID, Vnode: uint32(v)}
			if !covers(p) || !t.Holds(r.cfg.Self, p.Vnode, ns) {
				continue
			}
			if err := r.refill(ctx, p); err != nil {
				errs = append(errs, fmt.Errorf("namespace %s vnode %d: %w", ns.Name, v, err))
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	return errors.Join(errs...)
}

func (r *Repairer) refill(ctx context.Context, p storage.Place) error {
	t := r.cfg.Fence.Topology()
	ns := t.NamespaceByID(p.Namespace)
	if ns == nil {
		return nil // dropped
	}
	slots := map[uint64]int{}
	for _, s := range t.Slots(p.Vnode, ns.N) {
		if s.Read != 0 && s.Read != r.cfg.Self {
			slots[s.Read]++
		}
	}
	needed, joined := ns.N-quorum.Majority.Need(ns.N)+1, 0
	if _, copied := t.Copy(p.Vnode, ns.ID, r.cfg.Self); copied {
		needed = ns.N - ns.LeastWrites() + 1 // it is to have every acknowledged write
	}
	var errs []error
	for peer, n := range slots {
		out, err := r.Sync(ctx, t, p, peer)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		joined += n
		r.cfg.Logger.Info("filled again after bit rot", "namespace", ns.Name, "vnode", p.Vnode, "peer", t.NodeName(peer), "received", out.Received)
	}
	if joined < needed {
		return fmt.Errorf("joined with %d other voting replicas, %d are needed (N=%d): %w", joined, needed, ns.N, errors.Join(errs...))
	}
	return nil
}
