package coordinator

import (
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// window is how long a latency counts: percentiles are over the last one to two.
const window = 30 * time.Second

// operation is a class of requests.
type operation int

const (
	opGet operation = iota
	opPut
	opScan
	operations
)

func (o operation) String() string { return [...]string{"get", "put", "scan"}[o] }

// Stats keeps the rates and latencies of a coordinator's requests.
type Stats struct {
	classes [operations]classStats
}

type classStats struct {
	mu            sync.Mutex
	total, errors uint64
	// current and previous are histograms of microseconds, in windows.
	current, previous *hdrhistogram.Histogram
	began             time.Time
	previousLen       time.Duration
}

// Snapshot is what Stats says of one class of requests.
type Snapshot struct {
	PerSecond     float64
	P50, P99      time.Duration
	Total, Errors uint64
}

func newStats() *Stats {
	s := &Stats{}
	for i := range s.classes {
		c := &s.classes[i]
		c.current, c.previous = newHistogram(), newHistogram()
		c.began = time.Now()
	}
	return s
}

// newHistogram covers 1 µs to a minute with two digits.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, 60_000_000, 2) }

func (s *Stats) record(op operation, took time.Duration, err error) {
	c := &s.classes[op]
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rotate()
	c.total++
	if err != nil {
		c.errors++
	}
	_ = c.current.RecordValue(min(max(took.Microseconds(), 1), 60_000_000)) // within range
}

// rotate starts a new window when the present one is over.
// REQUIRES: c.mu is held.
func (c *classStats) rotate() {
	now := time.Now()
	if age := now.Sub(c.began); age >= window {
		c.current, c.previous = c.previous, c.current
		c.current.Reset()
		if c.previousLen = age; age >= 2*window {
			c.previous.Reset()
			c.previousLen = 0
		}
		c.began = now
	}
}

func (s *Stats) snapshot(op operation) Snapshot {
	c := &s.classes[op]
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rotate()
	both := newHistogram()
	both.Merge(c.current)
	both.Merge(c.previous)
	out := Snapshot{
		P50:   time.Duration(both.ValueAtQuantile(50)) * time.Microsecond,
		P99:   time.Duration(both.ValueAtQuantile(99)) * time.Microsecond,
		Total: c.total, Errors: c.errors,
	}
	if span := time.Since(c.began) + c.previousLen; span > 0 {
		out.PerSecond = float64(both.TotalCount()) / max(span.Seconds(), 1)
	}
	return out
}

// Gets, Puts and Scans return the figures of one class. Deletes and batches count
// as puts.
func (s *Stats) Gets() Snapshot  { return s.snapshot(opGet) }
func (s *Stats) Puts() Snapshot  { return s.snapshot(opPut) }
func (s *Stats) Scans() Snapshot { return s.snapshot(opScan) }

// metrics are the coordinator's for Prometheus.
type metrics struct {
	requests *prometheus.HistogramVec
	// succeeded are those of requests with code OK, by operation.
	succeeded  [operations]prometheus.Observer
	refused    prometheus.Counter
	notEnough  prometheus.Counter
	unknown    prometheus.Counter
	staleEpoch prometheus.Counter
	// belowPromise counts the writes that got a new version.
	belowPromise prometheus.Counter
	repairs      prometheus.Counter
	hedged       prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvasir", Subsystem: "coordinator", Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "kvasir", Subsystem: "coordinator", Name: "request_duration_seconds",
			Help:    "Time from a client's request to its answer, by operation and result code.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 17),
		}, []string{"operation", "code"}),
		refused:      counter("requests_refused_total", "Requests refused because a bound was reached."),
		notEnough:    counter("not_enough_replicas_total", "Requests refused because too few replicas were live."),
		unknown:      counter("outcome_unknown_total", "Writes with fewer acknowledgements than needed."),
		staleEpoch:   counter("stale_epochs_total", "Attempts that a replica refused for an older epoch."),
		belowPromise: counter("below_promise_total", "Attempts whose version a replica had promised not to take any more."),
		repairs:      counter("read_repairs_total", "Reads that found stale replicas and mended them."),
		hedged:       counter("hedged_reads_total", "Reads for which one more replica was asked because another was late."),
	}
	reg.MustRegister(m.requests)
	for op := range operations {
		m.succeeded[op] = m.requests.WithLabelValues(op.String(), codes.OK.String())
	}
	return m
}

func (m *metrics) observe(op operation, took time.Duration, err error) {
	if err == nil {
		m.succeeded[op].Observe(took.Seconds())
		return
	}
	m.requests.WithLabelValues(op.String(), rpc.AsError(err).Code.String()).Observe(took.Seconds())
}
