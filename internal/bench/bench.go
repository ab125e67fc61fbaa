// Package bench drives a store with load and measures what comes back. It knows the core
// workloads of YCSB. Each thread sends its next operation when the last one has been
// answered, or, at a target rate, when its time has come, be the last one late or not.
package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Config says what load to make. Fields without a default are required.
type Config struct {
	// Stores are used by the threads in turn.
	Stores []Store
	// Threads is how many operations are under way at once. Default 64.
	Threads int
	// Duration and Operations bound the run; the first that is reached ends it. At
	// least one must be set.
	Duration   time.Duration
	Operations int64
	Workload   Workload
	// Target is how many operations are begun a second, in all; 0: as many as are answered.
	// With a target, an operation is measured from when it was to begin, so that those that
	// wait for a slow one count.
	Target float64
	// Records is how many records there are, 2 or more. Default 100,000.
	Records int
	// ValueBytes is the size of values, 0 to 16 MiB.
	ValueBytes int
	// Timeout bounds one operation. Default 2 s.
	Timeout time.Duration
	// Seed makes the sequences of operations repeatable.
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
	// Operations succeeded, PerSecond of them by elapsed time.
	Operations int64
	PerSecond  float64
	// Kinds are the latencies of what succeeded, by kind.
	Kinds      [kinds]Latency
	Errors     int64
	FirstError string
	NotFound   int64
}

// Validate returns an error for what makes no load.
func (c *Config) Validate() error {
	total := 0.0
	for _, s := range c.Workload.Shares {
		total += s
	}
	switch {
	case len(c.Stores) == 0:
		return errors.New("no store")
	case c.Threads < 1:
		return fmt.Errorf("threads is %d: want at least 1", c.Threads)
	case c.Duration <= 0 && c.Operations <= 0:
		return errors.New("neither a duration nor a number of operations is given")
	case total < 0.999 || total > 1.001:
		return fmt.Errorf("the workload's shares add up to %v: want 1", total)
	case c.Target < 0:
		return fmt.Errorf("target is %v: want 0 or more", c.Target)
	case c.Records < 2:
		return fmt.Errorf("records is %d: want at least 2", c.Records)
	case c.ValueBytes < 0 || c.ValueBytes > maxValueBytes:
		return fmt.Errorf("value size is %d: want 0 to %d", c.ValueBytes, maxValueBytes)
	}
	return nil
}

func (c *Config) setDefaults() {
	if c.Threads == 0 {
		c.Threads = 64
	}
	if c.Records == 0 {
		c.Records = 100_000
	}
	if c.Timeout == 0 {
		c.Timeout = 2 * time.Second
	}
}

// Fill stores a value under every key, so that reads find something.
func Fill(ctx context.Context, cfg Config) error {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return err
	}
	const batch = 200
	var next atomic.Int64
	var wg sync.WaitGroup
	v := newValues(cfg)
	errs := make([]error, cfg.Threads)
	for i := range cfg.Threads {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(cfg.Seed, uint64(i)))
			for ctx.Err() == nil && errs[i] == nil {
				from := int(next.Add(batch)) - batch
				if from >= cfg.Records {
					return
				}
				var keys, values [][]byte
				for k := from; k < min(from+batch, cfg.Records); k++ {
					keys, values = append(keys, key(int64(k))), append(values, v.draw(rng))
				}
				errs[i] = cfg.Stores[i%len(cfg.Stores)].Load(ctx, keys, values)
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// key spreads numbers over the key space, as users' keys are.
func key(i int64) []byte { return fmt.Appendf(nil, "user%016x", uint64(i)*0x9e3779b97f4a7c15) }

// maxValueBytes is what the largest value may have.
const maxValueBytes = 16 << 20

// values are windows on random bytes: no two that follow each other are alike, and none
// compresses.
type values struct {
	random []byte
	size   int
}

func newValues(cfg Config) *values {
	v := &values{random: make([]byte, cfg.ValueBytes+1<<20), size: cfg.ValueBytes}
	rng := rand.New(rand.NewPCG(cfg.Seed, 1<<32))
	for i := 0; i+8 <= len(v.random); i += 8 {
		binary.LittleEndian.PutUint64(v.random[i:], rng.Uint64())
	}
	return v
}

func (v *values) draw(rng *rand.Rand) []byte {
	from := rng.IntN(1 << 20)
	return v.random[from : from+v.size : from+v.size]
}

// Progress is how far a run is: how long it has lasted, and what has succeeded and failed.
type Progress struct {
	Elapsed      time.Duration
	Done, Failed int64
}

// run is what the threads of one run share.
type run struct {
	cfg                  Config
	start                time.Time
	values               *values
	common               *common
	done, failed, issued atomic.Int64
	missed               atomic.Int64
	firstErr             atomic.Pointer[string]
}

// Run makes the load and returns what was measured. progress, when not nil, is told how far
// it is once a second.
func Run(ctx context.Context, cfg Config, progress func(Progress)) (Result, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return Result{}, err
	}
	r := &run{cfg: cfg, values: newValues(cfg), common: newCommon(cfg.Workload, int64(cfg.Records))}
	threads := make([]*thread, cfg.Threads)
	for i := range threads {
		threads[i] = r.newThread(i) // before the clock starts: generators take a while
	}
	running := ctx // what is under way in the end is waited for, and counts
	if cfg.Duration > 0 {
		var cancel context.CancelFunc
		running, cancel = context.WithTimeout(ctx, cfg.Duration)
		defer cancel()
	}
	r.start = time.Now()
	var wg sync.WaitGroup
	for _, t := range threads {
		wg.Go(func() { t.loop(running, ctx) })
	}
	stopProgress := r.tell(progress)
	wg.Wait()
	elapsed := time.Since(r.start)
	stopProgress()
	return r.summarize(threads, elapsed), nil
}

func (r *run) tell(progress func(Progress)) (stop func()) {
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
				progress(Progress{time.Since(r.start), r.done.Load(), r.failed.Load()})
			}
		}
	})
	return func() { close(quit); wg.Wait() }
}

// maxLatency is a minute, in microseconds.
const maxLatency = 60_000_000

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, maxLatency, 3) }

// thread is one of those that send operations.
type thread struct {
	*run
	number  int
	store   Store
	chooser *chooser
	rng     *rand.Rand
	took    [kinds]*hdrhistogram.Histogram // of the kinds it has done
}

func (r *run) newThread(i int) *thread {
	return &thread{
		run: r, number: i, store: r.cfg.Stores[i%len(r.cfg.Stores)],
		chooser: newChooser(r.cfg.Workload, r.common, int64(r.cfg.Seed)<<20+int64(i)),
		rng:     rand.New(rand.NewPCG(r.cfg.Seed, uint64(i)+1)),
	}
}

// loop begins operations until running ends; ctx is that of each.
func (t *thread) loop(running, ctx context.Context) {
	for k := 0; running.Err() == nil && (t.cfg.Operations <= 0 || t.issued.Add(1) <= t.cfg.Operations); k++ {
		begin := time.Now()
		if t.cfg.Target > 0 {
			begin = t.start.Add(time.Duration(float64(k*t.cfg.Threads+t.number) / t.cfg.Target * float64(time.Second)))
			if !sleepUntil(running, begin) {
				return
			}
		}
		kind, err := t.step(ctx)
		switch {
		case errors.Is(err, ErrNotFound):
			t.missed.Add(1)
		case err != nil && ctx.Err() != nil:
			return // it was cancelled
		case err != nil:
			text := err.Error()
			t.firstErr.CompareAndSwap(nil, &text)
			t.failed.Add(1)
			continue
		}
		t.done.Add(1)
		if t.took[kind] == nil {
			t.took[kind] = newHistogram()
		}
		_ = t.took[kind].RecordValue(min(max(time.Since(begin).Microseconds(), 1), maxLatency)) // within range
	}
}

// sleepUntil returns false when ctx ends first.
func sleepUntil(ctx context.Context, at time.Time) bool {
	wait := time.Until(at)
	if wait <= 0 {
		return true
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// step does one operation.
func (t *thread) step(ctx context.Context) (kind Kind, err error) {
	kind, record, limit := t.chooser.draw()
	k := key(record)
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Timeout)
	defer cancel()
	switch kind {
	case Read:
		err = t.store.Read(ctx, k)
	case Scan:
		err = t.store.Scan(ctx, k, limit)
	case ReadModifyWrite:
		if err = t.store.Read(ctx, k); err == nil || errors.Is(err, ErrNotFound) {
			if werr := t.store.Write(ctx, k, t.values.draw(t.rng)); werr != nil {
				err = werr
			}
		}
	default:
		err = t.store.Write(ctx, k, t.values.draw(t.rng))
	}
	if kind == Insert && err == nil {
		t.common.inserted.Add(1)
	}
	return kind, err
}

func (r *run) summarize(threads []*thread, elapsed time.Duration) Result {
	res := Result{
		Elapsed: elapsed, Operations: r.done.Load(), PerSecond: float64(r.done.Load()) / elapsed.Seconds(),
		Errors: r.failed.Load(), NotFound: r.missed.Load(),
	}
	for k := range kinds {
		h := newHistogram()
		for _, t := range threads {
			if t.took[k] != nil {
				h.Merge(t.took[k])
			}
		}
		res.Kinds[k] = latency(h)
	}
	if text := r.firstErr.Load(); text != nil {
		res.FirstError = *text
	}
	return res
}

func latency(h *hdrhistogram.Histogram) Latency {
	return Latency{
		Count: h.TotalCount(), Mean: h.Mean(), P50: h.ValueAtQuantile(50), P90: h.ValueAtQuantile(90),
		P99: h.ValueAtQuantile(99), P999: h.ValueAtQuantile(99.9), Max: h.Max(),
	}
}
