package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/storage"
)

const (
	// firstScrub is how long after the start of a process the first scrub begins.
	firstScrub = time.Hour
	// retryRefill is how long a quarantine waits that could not be cut out, or filled.
	retryRefill = 5 * time.Second
	// scrubBurst is what a scrub may read at once.
	scrubBurst = 4 << 20
)

// scrubber looks for bit rot on a slow cycle, and sees to it that what was lost is
// filled in from other nodes.
type scrubber struct {
	node *Node
	wake chan struct{}
	// rounds counts the scrubs that have ended, bytes what was read.
	rounds, bytes atomic.Uint64
	// progress is how far the present scrub is.
	progress struct {
		sync.Mutex
		done, total uint64
	}
}

func newScrubber(n *Node) *scrubber { return &scrubber{node: n, wake: make(chan struct{}, 1)} }

// start begins a scrub at once, if none is running.
func (s *scrubber) start() { signal(s.wake) }

// run scrubs, cycle after cycle, until ctx ends.
func (s *scrubber) run(ctx context.Context) {
	for wait := min(firstScrub, s.node.cfg.ScrubCycle); ; wait = s.node.cfg.ScrubCycle {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-s.wake:
			timer.Stop()
		}
		if err := s.scrub(ctx); err != nil && ctx.Err() == nil {
			s.node.cfg.Logger.Error("scrubbing ended early", "err", err)
		}
	}
}

func (s *scrubber) scrub(ctx context.Context) error {
	total := s.node.store.Metrics().DiskSpaceUsage()
	s.setProgress(0, total)
	defer s.setProgress(0, 0)
	perSecond := max(float64(s.node.cfg.ScrubBytesPerSecond), float64(total)/s.node.cfg.ScrubCycle.Seconds())
	limiter := rate.NewLimiter(rate.Limit(perSecond), max(scrubBurst, int(perSecond)))
	read := uint64(0)
	_, err := s.node.store.Scrub(ctx, func(ctx context.Context, n int) error {
		s.bytes.Add(uint64(n))
		read += uint64(n)
		s.setProgress(read, total)
		return limiter.WaitN(ctx, min(n, limiter.Burst()))
	}, s.check)
	if err != nil {
		return err
	}
	s.rounds.Add(1)
	return nil
}

func (s *scrubber) setProgress(done, total uint64) {
	s.progress.Lock()
	s.progress.done, s.progress.total = done, total
	s.progress.Unlock()
}

// fraction returns how far the present scrub is, 0 when none is running.
func (s *scrubber) fraction() float64 {
	s.progress.Lock()
	defer s.progress.Unlock()
	if s.progress.total == 0 {
		return 0
	}
	return min(1, float64(s.progress.done)/float64(s.progress.total))
}

// check rejects records that lie in a vnode which is not their key's.
func (s *scrubber) check(p storage.Place, key []byte) error {
	t := s.node.fence.Topology()
	if !t.Formed() {
		return nil
	}
	if v := t.VnodeOf(key); v != p.Vnode {
		return fmt.Errorf("lies in vnode %d, its key is of vnode %d", p.Vnode, v)
	}
	return nil
}

// mend cuts out what bit rot took and fills it in again, until ctx ends. A store that is
// damaged beyond that is given up at once, whatever the others wait for.
func (s *scrubber) mend(ctx context.Context) {
	store := s.node.store
	var loops sync.WaitGroup
	defer loops.Wait()
	fill := make(chan struct{}, 1)
	loops.Go(func() {
		s.again(ctx, store.Attention(), "what bit rot took cannot be cut out yet", func() error {
			err := errors.Join(store.Inspect(ctx, s.check), store.Cut(ctx))
			signal(fill) // with what was cut out, whatever was not
			return err
		})
	})
	loops.Go(func() {
		s.again(ctx, fill, "vnodes that lost records to bit rot cannot be filled yet", func() error { return s.refill(ctx) })
	})
	select {
	case <-ctx.Done():
	case <-store.Damaged():
		s.giveUp()
	}
}

// again has work done whenever it is called for, and after a while again where it failed,
// until ctx ends.
func (s *scrubber) again(ctx context.Context, call <-chan struct{}, failing string, work func() error) {
	var retry <-chan time.Time
	for said := ""; ; {
		select {
		case <-ctx.Done():
			return
		case <-call:
		case <-retry:
		}
		retry = nil
		err := work()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			said = ""
			continue
		case err.Error() != said:
			said = err.Error()
			s.node.cfg.Logger.Error(failing, "err", err)
		}
		retry = time.After(retryRefill)
	}
}

// refill has the vnodes filled that a quarantine covers, and lifts it.
func (s *scrubber) refill(ctx context.Context) error {
	store := s.node.store
	for _, q := range store.Quarantines() {
		if err := s.node.repairer.Refill(ctx, q.Covers); err != nil {
			return err
		}
		if err := store.Lift(q.ID); err != nil {
			return err
		}
		s.node.cfg.Logger.Info("records that bit rot had taken are filled in again", "stretch", q.String())
	}
	return nil
}

// giveUp ends the process: the store is not served again, and what it held is filled
// into another.
func (s *scrubber) giveUp() {
	err := fmt.Errorf("data directory %s is damaged beyond its records: %s", s.node.cfg.DataDir, s.node.store.Damage())
	if gerr := s.node.store.GiveUp(); gerr != nil {
		err = fmt.Errorf("%w (and cannot be marked so: %w)", err, gerr)
	}
	s.node.cfg.Fatal(err)
}

func (s *scrubber) describe(reg prometheus.Registerer) {
	counter := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "kvasir", Subsystem: "scrub", Name: name, Help: help}, f))
	}
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvasir", Subsystem: "scrub", Name: name, Help: help}, f))
	}
	counter("rounds_total", "Scrubs that have ended.", func() float64 { return float64(s.rounds.Load()) })
	counter("read_bytes_total", "Bytes read from disk to find bit rot.", func() float64 { return float64(s.bytes.Load()) })
	counter("corruptions_total", "Times that damaged bytes were met.", func() float64 { return float64(s.node.store.Corruptions()) })
	gauge("quarantines", "Stretches of keys that are refused to readers until they are filled again.", func() float64 { return float64(s.node.store.QuarantineCount()) })
	gauge("progress_ratio", "How far the present scrub is, 0 when none is running.", s.fraction)
}

// signal leaves a token where there is none.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
