// Package handoff brings records to where they belong: hints to the replicas they were
// kept for, once those are back, no faster than those grant, and whole vnodes to a node
// that becomes a replica of them. It decides when and how fast; where hints are kept is
// package replica's business, who is to hold what is the topology's word, and a replica
// that takes a record joins it like any other.
package handoff

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/mutant"
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
	Fence  *replica.Fence
	Hints  *replica.Hints
	Peers  Peers
	Logger *slog.Logger
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

// errNoCredit ends a delivery until its target is asked again.
var errNoCredit = errors.New("the target takes no more at present")

// Replayer delivers hints. Each target has a goroutine of its own while it gets some;
// they take turns at the bound that holds for all together.
type Replayer struct {
	cfg     Config
	limiter *rate.Limiter
	mu      struct {
		sync.Mutex
		// credits holds the targets with a goroutine, and what each would take.
		credits map[uint64]int64
	}
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
	}
	r.mu.credits = map[uint64]int64{}
	return r
}

// Credits returns how many bytes the targets that get hints now would take in the
// next second, together.
func (r *Replayer) Credits() (sum int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.mu.credits {
		sum += c
	}
	return sum
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
	if _, busy := r.mu.credits[target]; busy {
		return false
	}
	r.mu.credits[target] = 0
	return true
}

func (r *Replayer) release(target uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.mu.credits, target)
}

func (r *Replayer) credit(target uint64, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.credits[target] = bytes
}

// delivery is what is known of a target while it gets hints.
type delivery struct {
	target uint64
	// credit is what the target takes in a second; 0 until its first reply.
	credit int64
	// after is the number of the last hint that was looked at.
	after uint64
	// failing are the vnodes that the target refuses for now. They are passed over, so
	// that the hints of one vnode keep their order and the others do not wait for it.
	failing map[storage.Place]bool
}

// deliver brings a target its hints, oldest first, until none is left or the target
// takes no more. It begins with a single one, whose reply tells the credit.
func (r *Replayer) deliver(ctx context.Context, target uint64) error {
	d := &delivery{target: target, failing: map[storage.Place]bool{}}
	for ctx.Err() == nil {
		t := r.cfg.Fence.Topology()
		if !t.Formed() {
			return nil
		}
		if t.Node(target) != nil && !r.cfg.Peers.Alive(target) {
			return r.expire(t, target)
		}
		hints, err := r.cfg.Hints.Take(target, d.after, roundHints, roundBytes)
		if err != nil || len(hints) == 0 {
			return err
		}
		wanted, err := r.sort(t, hints)
		if err != nil {
			return err
		}
		d.after = hints[len(hints)-1].Seq
		if wanted = d.choose(wanted); len(wanted) == 0 {
			continue
		}
		size, err := r.round(ctx, t, d, wanted)
		if err != nil {
			return err
		}
		r.credit(target, d.credit)
		if d.credit > 0 { // it is for a second, and this round used up its part of one
			pause(ctx, time.Duration(float64(size)/float64(d.credit)*float64(time.Second)))
		}
	}
	return nil
}

// choose returns the hints to send in one round: no more than the credit allows, and
// at least one.
func (d *delivery) choose(hints []storage.Hint) (out []storage.Hint) {
	size := int64(0)
	for _, h := range hints {
		if d.failing[placeOf(h)] {
			continue
		}
		size += h.SizeBytes()
		if len(out) > 0 && size > d.credit {
			d.after = out[len(out)-1].Seq
			break
		}
		out = append(out, h)
	}
	return out
}

func placeOf(h storage.Hint) storage.Place {
	return storage.Place{Namespace: h.Namespace, Vnode: h.Vnode}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// expire discards the hints that a target which is down will not get any more, and
// makes their room free for others.
func (r *Replayer) expire(t *topology.Topology, target uint64) error {
	for few := 1; ; few = roundHints { // mostly the oldest is young enough
		hints, err := r.cfg.Hints.Take(target, 0, few, roundBytes)
		if err != nil {
			return err
		}
		wanted, err := r.sort(t, hints)
		if err != nil || len(wanted) > 0 || len(hints) == 0 {
			return err // they are ordered by age
		}
	}
}

// sort returns the hints that their target still has to have, and discards those that
// are too old or that nobody wants any more.
func (r *Replayer) sort(t *topology.Topology, hints []storage.Hint) (wanted []storage.Hint, _ error) {
	useless := map[replica.HintLoss][]storage.Hint{}
	for _, h := range hints {
		switch ns := t.NamespaceByID(h.Namespace); {
		case ns == nil:
			useless[replica.LossNamespace] = append(useless[replica.LossNamespace], h)
		case !t.Holds(h.Target, h.Vnode, ns) && !mutant.On("hint-to-ex-owner"):
			useless[replica.LossNotOwner] = append(useless[replica.LossNotOwner], h)
		case r.cfg.Hints.Expired(h):
			useless[replica.LossExpired] = append(useless[replica.LossExpired], h)
		default:
			wanted = append(wanted, h)
		}
	}
	for why, hs := range useless {
		if err := r.cfg.Hints.Discard(why, hs); err != nil {
			return nil, err
		}
	}
	return wanted, nil
}
