// Package handoff brings hints to the replicas they were kept for, once those are
// back. It decides when and how fast; where hints are kept is package replica's
// business, and a replica that takes one joins it like any other record.
package handoff

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Peers reaches replicas and says which are alive. See rpc.Link.Go for what Go
// promises.
type Peers interface {
	Go(node uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error
	Alive(node uint64) bool
}

// Config holds what a replayer is made of. Fields without a default are required.
type Config struct {
	Fence   *replica.Fence
	Hints   *replica.Hints
	Peers   Peers
	Logger  *slog.Logger
	Metrics prometheus.Registerer
	// Interval is how often targets that are back are looked for. Default 1 s.
	Interval time.Duration
	// BytesPerSecond bounds the replay to all targets together. Default 16 MiB.
	BytesPerSecond int
	// Timeout bounds one round of calls to a target. Default 5 s.
	Timeout time.Duration
}

// Limits of one round to one target.
const (
	roundHints = 256
	roundBytes = 512 << 10
)

// Replayer delivers hints.
type Replayer struct {
	cfg       Config
	limiter   *rate.Limiter
	delivered prometheus.Counter
	discarded *prometheus.CounterVec
	mu        sync.Mutex
	busy      map[uint64]bool // targets with a goroutine
}

// New returns a replayer. Run does the work.
func New(cfg Config) *Replayer {
	if cfg.Interval == 0 {
		cfg.Interval = time.Second
	}
	if cfg.BytesPerSecond == 0 {
		cfg.BytesPerSecond = 16 << 20
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	r := &Replayer{
		cfg: cfg,
		// A burst of one round, so that any round can be waited for.
		limiter: rate.NewLimiter(rate.Limit(cfg.BytesPerSecond), max(cfg.BytesPerSecond, 2*roundBytes+topology.HardMaxValue)),
		busy:    map[uint64]bool{},
		delivered: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "hints", Name: "delivered_total", Help: "Hints that their target has taken.",
		}),
		discarded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "hints", Name: "discarded_total", Help: "Hints given up, by reason.",
		}, []string{"reason"}),
	}
	cfg.Metrics.MustRegister(r.delivered, r.discarded)
	return r
}

// Run delivers hints until ctx ends.
func (r *Replayer) Run(ctx context.Context) error {
	var targets sync.WaitGroup
	defer targets.Wait()
	tick := time.NewTicker(r.cfg.Interval)
	defer tick.Stop()
	for {
		for _, b := range r.cfg.Hints.Backlog() {
			if r.claim(b.Target) {
				targets.Go(func() {
					defer r.release(b.Target)
					if err := r.deliver(ctx, b.Target); err != nil && ctx.Err() == nil {
						r.cfg.Logger.Debug("hints wait", "target", b.Target, "reason", err)
					}
				})
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (r *Replayer) claim(target uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.busy[target] {
		return false
	}
	r.busy[target] = true
	return true
}

func (r *Replayer) release(target uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.busy, target)
}

// deliver brings a target its hints, oldest first, until none is left or the target
// does not take them.
func (r *Replayer) deliver(ctx context.Context, target uint64) error {
	for ctx.Err() == nil {
		t := r.cfg.Fence.Topology()
		if t.Formed() && t.Node(target) != nil && !r.cfg.Peers.Alive(target) {
			return r.expire(t, target)
		}
		hints, err := r.cfg.Hints.Take(target, 0, roundHints, roundBytes)
		if err != nil || len(hints) == 0 {
			return err
		}
		wanted, useless := r.sort(t, hints)
		if err := r.cfg.Hints.Forget(useless); err != nil {
			return err
		}
		if err := r.send(ctx, t, target, wanted); err != nil {
			return err
		}
		if err := r.cfg.Hints.Forget(wanted); err != nil {
			return err
		}
		r.delivered.Add(float64(len(wanted)))
	}
	return nil
}

// expire discards the hints that a target which is down will not get any more, and
// makes their room free for others.
func (r *Replayer) expire(t *topology.Topology, target uint64) error {
	for few := 1; ; few = roundHints { // mostly the oldest is young enough
		hints, err := r.cfg.Hints.Take(target, 0, few, roundBytes)
		if err != nil {
			return err
		}
		wanted, useless := r.sort(t, hints)
		if err := r.cfg.Hints.Forget(useless); err != nil {
			return err
		}
		if len(wanted) > 0 || len(useless) == 0 {
			return nil // they are ordered by age
		}
	}
}

// sort separates hints that their target still has to have from those that are too
// old or that nobody wants any more.
func (r *Replayer) sort(t *topology.Topology, hints []storage.Hint) (wanted, useless []storage.Hint) {
	for _, h := range hints {
		reason := ""
		switch ns := t.NamespaceByID(h.Namespace); {
		case ns == nil:
			reason = "namespace_dropped"
		case r.cfg.Hints.Expired(h, t.Settings.MaxHintAge):
			reason = "expired"
		case !t.Owns(h.Target, h.Vnode, ns.N):
			reason = "not_owner"
		}
		if reason == "" {
			wanted = append(wanted, h)
			continue
		}
		useless = append(useless, h)
		r.discarded.WithLabelValues(reason).Inc()
	}
	return wanted, useless
}

// send sends hints, a call for each vnode, and returns nil when the target has all
// of them on disk.
func (r *Replayer) send(ctx context.Context, t *topology.Topology, target uint64, hints []storage.Hint) error {
	type place struct{ namespace, vnode uint32 }
	calls := map[place]*replicav1.Apply{}
	size := 0
	for _, h := range hints {
		p := place{h.Namespace, h.Vnode}
		if calls[p] == nil {
			calls[p] = &replicav1.Apply{Namespace: h.Namespace, Vnode: h.Vnode, Source: replicav1.Source_SOURCE_HINT}
		}
		calls[p].Entries = append(calls[p].Entries, &replicav1.Entry{Key: h.Key, Record: h.Record})
		size += int(h.SizeBytes())
	}
	if err := r.limiter.WaitN(ctx, min(size, r.limiter.Burst())); err != nil {
		return err
	}
	errs := make(chan error, len(calls))
	for _, a := range calls {
		call := &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Apply{Apply: a}}
		err := r.cfg.Peers.Go(target, call, time.Now().Add(r.cfg.Timeout), func(_ *replicav1.Reply, err error) { errs <- err })
		if err != nil {
			errs <- err
		}
	}
	var failed error
	for range calls {
		failed = errors.Join(failed, <-errs)
	}
	return failed
}
