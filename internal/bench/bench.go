// Package bench drives a cluster with load through the client library and measures
// what comes back. It is a closed loop: each caller sends its next operation when
// the last one has been answered.
package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/kvasirdb/kvasir/client"
)

// Config says what load to make. Fields without a default are required.
type Config struct {
	Clients []*client.Client
	// Callers is how many operations are under way at once. Default 16.
	Callers int
	// Duration and Operations bound the run; the first that is reached ends it. At
	// least one must be set.
	Duration   time.Duration
	Operations int64
	// ReadRatio, 0 to 1, is the share of gets among the operations.
	ReadRatio float64
	// Keys is how many keys there are. Default 100,000.
	Keys int
	// ValueBytes is the size of values. Default 1024.
	ValueBytes int
	// Zipfian prefers some keys (exponent 1.01) over others; otherwise all are alike.
	Zipfian bool
	// Timeout bounds one operation. Default 2 s.
	Timeout time.Duration
	Options []client.CallOption
	// Seed makes the sequence of keys repeatable.
	Seed uint64
}

// Latency is a distribution, in microseconds.
type Latency struct {
	Count                    int64
	Mean                     float64
	P50, P90, P99, P999, Max int64
}

// Result is what came of a run.
type Result struct {
	Elapsed time.Duration
	// PerSecond is operations that succeeded, by elapsed time.
	PerSecond    float64
	Gets, Puts   Latency
	Errors       int64
	FirstError   string
	NotFoundGets int64
}

// caller is one of the loops.
type caller struct {
	gets, puts *hdrhistogram.Histogram
	missed     int64
}

// Validate returns an error for what makes no load.
func (c *Config) Validate() error {
	switch {
	case len(c.Clients) == 0:
		return errors.New("no client")
	case c.Callers < 1:
		return fmt.Errorf("callers is %d: want at least 1", c.Callers)
	case c.Duration <= 0 && c.Operations <= 0:
		return errors.New("neither a duration nor a number of operations is given")
	case c.ReadRatio < 0 || c.ReadRatio > 1:
		return fmt.Errorf("read ratio is %v: want 0 to 1", c.ReadRatio)
	case c.Keys < 1:
		return fmt.Errorf("keys is %d: want at least 1", c.Keys)
	case c.ValueBytes < 0:
		return fmt.Errorf("value size is %d: want 0 or more", c.ValueBytes)
	}
	return nil
}

func (c *Config) setDefaults() {
	if c.Callers == 0 {
		c.Callers = 16
	}
	if c.Keys == 0 {
		c.Keys = 100_000
	}
	if c.Timeout == 0 {
		c.Timeout = 2 * time.Second
	}
}

// Fill stores a value under every key, so that gets find something.
func Fill(ctx context.Context, cfg Config) error {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return err
	}
	const batch = 200
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, cfg.Callers)
	for i := range cfg.Callers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(cfg.Seed, uint64(i)))
			for ctx.Err() == nil {
				from := int(next.Add(batch)) - batch
				if from >= cfg.Keys {
					return
				}
				var ops []client.Operation
				for k := from; k < min(from+batch, cfg.Keys); k++ {
					ops = append(ops, client.Operation{Key: key(k), Value: value(rng, cfg.ValueBytes)})
				}
				results, err := cfg.Clients[i%len(cfg.Clients)].Batch(ctx, ops, cfg.Options...)
				for _, r := range results {
					err = errors.Join(err, r.Err)
				}
				if err != nil {
					errs[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// key spreads numbers over the key space, as users' keys are.
func key(i int) []byte { return fmt.Appendf(nil, "user%016x", uint64(i)*0x9e3779b97f4a7c15) }

func value(rng *rand.Rand, size int) []byte {
	v := make([]byte, size)
	for i := 0; i+8 <= size; i += 8 {
		binary.LittleEndian.PutUint64(v[i:], rng.Uint64())
	}
	return v
}

// Run makes the load and returns what was measured. progress, when not nil, is told
// the number of operations that succeeded so far, once a second.
func Run(ctx context.Context, cfg Config, progress func(time.Duration, int64)) (Result, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return Result{}, err
	}
	if cfg.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.Duration)
		defer cancel()
	}
	var done, failed, issued atomic.Int64
	var firstErr atomic.Pointer[string]
	callers := make([]caller, cfg.Callers)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		callers[i] = caller{gets: newHistogram(), puts: newHistogram()}
		wg.Go(func() {
			l := newLoop(cfg, uint64(i))
			c := &callers[i]
			for ctx.Err() == nil && (cfg.Operations <= 0 || issued.Add(1) <= cfg.Operations) {
				read, took, err := l.step(ctx)
				switch {
				case errors.Is(err, client.ErrNotFound):
					c.missed++
				case err != nil && ctx.Err() != nil:
					return // the run is over
				case err != nil:
					text := err.Error()
					firstErr.CompareAndSwap(nil, &text)
					failed.Add(1)
					continue
				}
				done.Add(1)
				h := c.puts
				if read {
					h = c.gets
				}
				_ = h.RecordValue(min(max(took.Microseconds(), 1), maxLatency)) // within range
			}
		})
	}
	stopProgress := tellProgress(progress, start, &done)
	wg.Wait()
	elapsed := time.Since(start)
	stopProgress()
	return summarize(callers, elapsed, done.Load(), failed.Load(), firstErr.Load()), nil
}

func tellProgress(progress func(time.Duration, int64), start time.Time, done *atomic.Int64) (stop func()) {
	if progress == nil {
		return func() {}
	}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				progress(time.Since(start), done.Load())
			}
		}
	})
	return func() { close(quit); wg.Wait() }
}

// maxLatency is a minute, in microseconds.
const maxLatency = 60_000_000

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, maxLatency, 3) }

// loop is what one caller does again and again.
type loop struct {
	cfg    Config
	client *client.Client
	rng    *rand.Rand
	zipf   *rand.Zipf
	value  []byte
}

func newLoop(cfg Config, i uint64) *loop {
	l := &loop{cfg: cfg, client: cfg.Clients[int(i)%len(cfg.Clients)], rng: rand.New(rand.NewPCG(cfg.Seed, i+1))}
	if cfg.Zipfian {
		l.zipf = rand.NewZipf(l.rng, 1.01, 1, uint64(cfg.Keys-1))
	}
	l.value = value(l.rng, cfg.ValueBytes)
	return l
}

// step does one operation.
func (l *loop) step(ctx context.Context) (read bool, took time.Duration, err error) {
	n := 0
	if l.zipf != nil {
		n = int(l.zipf.Uint64())
	} else {
		n = l.rng.IntN(l.cfg.Keys)
	}
	read = l.rng.Float64() < l.cfg.ReadRatio
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	start := time.Now()
	if read {
		_, err = l.client.Get(ctx, key(n), l.cfg.Options...)
	} else {
		_, err = l.client.Put(ctx, key(n), l.value, l.cfg.Options...)
	}
	return read, time.Since(start), err
}

func summarize(callers []caller, elapsed time.Duration, done, failed int64, firstErr *string) Result {
	gets, puts := newHistogram(), newHistogram()
	r := Result{Elapsed: elapsed, PerSecond: float64(done) / elapsed.Seconds(), Errors: failed}
	for _, c := range slices.All(callers) {
		gets.Merge(c.gets)
		puts.Merge(c.puts)
		r.NotFoundGets += c.missed
	}
	if firstErr != nil {
		r.FirstError = *firstErr
	}
	r.Gets, r.Puts = latency(gets), latency(puts)
	return r
}

func latency(h *hdrhistogram.Histogram) Latency {
	return Latency{
		Count: h.TotalCount(), Mean: h.Mean(), P50: h.ValueAtQuantile(50), P90: h.ValueAtQuantile(90),
		P99: h.ValueAtQuantile(99), P999: h.ValueAtQuantile(99.9), Max: h.Max(),
	}
}
