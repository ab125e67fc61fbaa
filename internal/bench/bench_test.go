package bench_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim"
)

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := sim.New(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1})
		defer w.Close()
		c := w.Client()
		defer c.Close()
		cfg := bench.Config{Stores: []bench.Store{bench.Kvasir(c)}, Threads: 4, Operations: 1000, Records: 100, ValueBytes: 20}
		cfg.Workload, _ = bench.Core("a")
		if err := bench.Fill(context.Background(), cfg); err != nil {
			t.Fatal(err)
		}
		res, err := bench.Run(context.Background(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		read, update := res.Kinds[bench.Read], res.Kinds[bench.Update]
		if read.Count+update.Count != 1000 || res.Operations != 1000 || res.Errors != 0 || res.NotFound != 0 || res.PerSecond <= 0 || read.Count < 300 || update.P50 <= 0 || update.P99 < update.P50 {
			t.Errorf("result %+v", res)
		}
		// A duration ends a run too, and progress is told of each second.
		cfg.Operations, cfg.Duration = 0, 3500*time.Millisecond
		told := 0
		if res, err = bench.Run(context.Background(), cfg, func(bench.Progress) { told++ }); err != nil || told != 3 || res.Elapsed < 3500*time.Millisecond || res.Elapsed > 5*time.Second {
			t.Errorf("told %d times, result %+v, %v", told, res, err)
		}
		// The other workloads do what is theirs.
		cfg.Operations, cfg.Duration = 60, 0
		for letter, kinds := range map[string][]bench.Kind{"d": {bench.Read, bench.Insert}, "e": {bench.Scan, bench.Insert}, "f": {bench.Read, bench.ReadModifyWrite}} {
			cfg.Workload, _ = bench.Core(letter)
			res, err = bench.Run(context.Background(), cfg, nil)
			if err != nil || res.Errors != 0 || res.Kinds[kinds[0]].Count == 0 || res.Kinds[kinds[1]].Count == 0 || res.Kinds[kinds[0]].Count+res.Kinds[kinds[1]].Count != 60 {
				t.Errorf("workload %s: %+v, %v", letter, res, err)
			}
		}
		// What fails is counted and named.
		cfg.Operations, cfg.Stores = 20, []bench.Store{bench.Kvasir(c, client.Namespace("nope"))}
		if res, err = bench.Run(context.Background(), cfg, nil); err != nil || res.Errors != 20 || !strings.Contains(res.FirstError, "nope") {
			t.Errorf("result %+v, %v", res, err)
		}
	})
}

// fake is a store that notes what is read.
type fake struct {
	bench.Store
	wait func(int) time.Duration
	mu   struct {
		sync.Mutex
		reads []string
	}
}

func (f *fake) Read(_ context.Context, key []byte) error {
	f.mu.Lock()
	f.mu.reads = append(f.mu.reads, string(key))
	n := len(f.mu.reads)
	f.mu.Unlock()
	time.Sleep(f.wait(n))
	return nil
}

func (f *fake) Write(_ context.Context, _, value []byte) error {
	if bytes.Equal(value, make([]byte, len(value))) {
		return errors.New("the value is all zeros")
	}
	return nil
}

// At a target rate, what waits for a slow operation is as slow as it looks to who asked:
// coordinated omission would show one operation of a second, and the rest of a millisecond.
func TestTargetCountsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{wait: func(n int) time.Duration {
			if n == 100 {
				return time.Second
			}
			return time.Millisecond
		}}
		cfg := bench.Config{Stores: []bench.Store{f}, Threads: 1, Workload: bench.Mix(1, bench.Uniform), Target: 100, Duration: 10 * time.Second, Records: 10}
		res, err := bench.Run(context.Background(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := res.Kinds[bench.Read]
		if res.Operations < 990 || res.Operations > 1001 || got.P50 > 1100 || got.P90 < 10_000 || got.P99 < 800_000 {
			t.Errorf("result %+v", res)
		}
		cfg.Target = 0
		if res, err = bench.Run(context.Background(), cfg, nil); err != nil || res.Kinds[bench.Read].P99 > 1100 {
			t.Errorf("without a target: %+v, %v", res, err)
		}
	})
}

// Each distribution prefers what it says, and all stay among the records.
func TestDistributions(t *testing.T) {
	const records = 1000
	for d, most := range map[bench.Distribution]float64{bench.Uniform: 0.01, bench.Zipfian: 0.2, bench.Latest: 0.25} {
		f := &fake{wait: func(int) time.Duration { return 0 }}
		cfg := bench.Config{Stores: []bench.Store{f}, Threads: 2, Workload: bench.Mix(1, d), Operations: 20_000, Records: records}
		if _, err := bench.Run(context.Background(), cfg, nil); err != nil {
			t.Fatal(err)
		}
		counts := map[string]int{}
		for _, key := range f.mu.reads {
			counts[key]++
		}
		hot := 0
		for _, n := range counts {
			hot = max(hot, n)
		}
		share := float64(hot) / 20_000
		if len(counts) > records || share > most || share < most/20 {
			t.Errorf("%s: %d records, the most popular has %.3f of the reads", d, len(counts), share)
		}
		for i := range records {
			delete(counts, fmt.Sprintf("user%016x", uint64(i)*0x9e3779b97f4a7c15))
		}
		if len(counts) > 0 {
			t.Errorf("%s: %d keys are of no record", d, len(counts))
		}
	}
}

func TestValidate(t *testing.T) {
	good := bench.Config{Stores: make([]bench.Store, 1), Threads: 1, Operations: 1, Records: 2, Workload: bench.Mix(0.5, bench.Uniform)}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func(*bench.Config){
		"no store":   func(c *bench.Config) { c.Stores = nil },
		"threads":    func(c *bench.Config) { c.Threads = 0 },
		"neither":    func(c *bench.Config) { c.Operations = 0 },
		"shares":     func(c *bench.Config) { c.Workload.Shares[bench.Scan] = 1 },
		"target":     func(c *bench.Config) { c.Target = -1 },
		"records":    func(c *bench.Config) { c.Records = 1 },
		"value size": func(c *bench.Config) { c.ValueBytes = -1 },
	} {
		bad := good
		harm(&bad)
		if err := bad.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error = %v, want one with %q", err, name)
		}
	}
	if _, err := bench.Core("g"); err == nil {
		t.Error("there is no workload g")
	}
}
