package coordinator

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// What requests may wait for within this node, on average, before it takes fewer.
const (
	// processorTarget is for a processor, once they have been read from the network.
	processorTarget = 50 * time.Millisecond
	// commitTarget is for the commit of the node's own copy.
	commitTarget = 250 * time.Millisecond
)

const (
	// leastLimit is what a node always takes: as much waits without harm.
	leastLimit = 64
	// limitWindow is what is judged at once, if it holds limitSamples.
	limitWindow  = 100 * time.Millisecond
	limitSamples = 16
	// forgetAfter is how long a window says something about the present.
	forgetAfter = time.Second
)

// limiter bounds what is under way, so that queues within the node stay short: when
// the mean wait of a window is above the target the bound falls by a fifth, from what
// was under way; when it is not, it rises by a sixteenth (Chiu and Jain, "Analysis of the increase and decrease algorithms", 1989).
// It judges by waits within this node, as Zhou et al. do ("Overload control for
// scaling WeChat microservices", 2018), and not by how long requests take: those wait
// for other nodes, and a slow peer is no reason to refuse what concerns others.
type limiter struct {
	target time.Duration
	most   int64
	limit  atomic.Int64
	busy   atomic.Int64
	mu     struct {
		sync.Mutex
		began   time.Time
		sum     time.Duration
		n, peak int64
		mean    time.Duration // of the last window that was judged
		judged  time.Time
	}
}

func newLimiter(target time.Duration, most int64) *limiter {
	l := &limiter{target: target, most: most}
	l.limit.Store(most)
	return l
}

// enter admits one more, of limit at most, and reports whether it did.
func (l *limiter) enter(limit int64) bool {
	if l.busy.Add(1) > limit {
		l.busy.Add(-1)
		return false
	}
	return true
}

func (l *limiter) leave() { l.busy.Add(-1) }

// observe takes in how long one has waited.
func (l *limiter) observe(now time.Time, waited time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := &l.mu
	age := now.Sub(m.began)
	if age > forgetAfter {
		m.began, m.sum, m.n, m.peak, age = now, 0, 0, 0, 0
	}
	m.sum += waited
	m.n++
	m.peak = max(m.peak, l.busy.Load())
	if age < limitWindow || m.n < limitSamples {
		return
	}
	m.mean, m.judged = m.sum/time.Duration(m.n), now
	limit := l.limit.Load()
	if m.mean > l.target {
		l.limit.Store(max(min(limit, m.peak)*4/5, min(leastLimit, l.most)))
	} else {
		l.limit.Store(min(limit+limit/16+1, l.most))
	}
	m.began, m.sum, m.n, m.peak = now, 0, 0, 0
}

// wait returns the mean wait of late, zero when none is known.
func (l *limiter) wait(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.mu.judged) > forgetAfter {
		return 0
	}
	return l.mu.mean
}

// Waited tells how long a request has waited for a processor, from when it was read
// from the network, before it is served or refused.
func (c *Coordinator) Waited(d time.Duration) { c.load.observe(time.Now(), d) }

// admit lets a request in, or says why not. The caller must call leave.
func (c *Coordinator) admit(ctx context.Context, op operation, now time.Time) (leave func(), _ *rpc.Error) {
	if err := c.inTime(ctx, op, now); err != nil {
		return nil, err
	}
	if limit := c.load.limit.Load(); !c.load.enter(limit) {
		return nil, c.full(now)
	}
	if op != opPut {
		return c.load.leave, nil
	}
	limit, stalled := c.commits.limit.Load(), c.cfg.Stalled()
	if stalled > 0 {
		limit = min(limit, leastLimit)
	}
	switch {
	case c.commits.enter(limit):
	case stalled > 0:
		c.load.leave()
		return nil, overloaded(limit, "%d writes have waited for flushes or compactions for %s: as many as it takes", limit, stalled.Round(time.Millisecond))
	default:
		c.load.leave()
		return nil, overloaded(limit, "it serves %d writes, which take %s to be on its disk: as many as it takes", limit, c.commits.wait(now).Round(time.Millisecond))
	}
	return func() {
		c.commits.leave()
		c.load.leave()
	}, nil
}

// Free returns how many more requests are served now.
func (c *Coordinator) Free() int { return int(max(0, c.load.limit.Load()-c.load.busy.Load())) }

// Full refuses a request that has waited for a processor, because the node serves as many
// as it can.
func (c *Coordinator) Full(waited time.Duration) *rpc.Error {
	now := time.Now()
	c.load.observe(now, waited)
	c.metrics.refused.Inc()
	return c.full(now)
}

func (c *Coordinator) full(now time.Time) *rpc.Error {
	limit := c.load.limit.Load()
	return overloaded(limit, "it serves %d requests, which wait %s for a processor: as many as it takes", limit, c.load.wait(now).Round(time.Millisecond))
}

// inTime refuses a request that has less time left than half of what requests wait for
// now: nobody would be there for its answer.
func (c *Coordinator) inTime(ctx context.Context, op operation, now time.Time) *rpc.Error {
	deadline, ok := ctx.Deadline()
	if !ok {
		return nil
	}
	wait := c.load.wait(now)
	if op == opPut {
		wait += c.commits.wait(now)
	}
	if left := deadline.Sub(now); left < wait/2 {
		return rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonTooShort, "the deadline is in %s, and requests wait %s at this node: nothing was begun",
			left.Round(time.Microsecond), wait.Round(time.Microsecond))
	}
	return nil
}

// overloaded refuses for the time being, because limit is reached.
func overloaded(limit int64, format string, args ...any) *rpc.Error {
	e := rpc.Errorf(codes.ResourceExhausted, rpc.ReasonOverloaded, "the node is overloaded: "+format, args...).With("limit", limit)
	e.RetryAfter = 50 * time.Millisecond
	return e
}

// describeLimits registers the limiters' metrics.
func (c *Coordinator) describeLimits(reg prometheus.Registerer) {
	for of, l := range map[string]*limiter{"requests": c.load, "writes": c.commits} {
		gauge := func(name, help string, f func() float64) {
			reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Namespace: "kvasir", Subsystem: "coordinator", Name: name, Help: help, ConstLabels: prometheus.Labels{"of": of},
			}, f))
		}
		gauge("limit", "Requests, or writes among them, that are served at once at most: it falls while they wait too long within the node.",
			func() float64 { return float64(l.limit.Load()) })
		gauge("wait_seconds", "Mean time of late that requests have waited for a processor, or writes for the commit of the node's own copy.",
			func() float64 { return l.wait(time.Now()).Seconds() })
	}
}
