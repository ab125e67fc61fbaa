package devcluster_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// timed keeps how long each operation took and when it ended.
type timed struct {
	bench.Store
	mu    sync.Mutex
	began time.Time
	took  [][]time.Duration // by tenths of a second
}

func (s *timed) Read(ctx context.Context, key []byte) error {
	began := time.Now()
	err := s.Store.Read(ctx, key)
	s.note(began, err)
	return err
}

func (s *timed) Write(ctx context.Context, key, value []byte) error {
	began := time.Now()
	err := s.Store.Write(ctx, key, value)
	s.note(began, err)
	return err
}

func (s *timed) note(began time.Time, err error) {
	if err != nil && !errors.Is(err, bench.ErrNotFound) {
		return // bench counts it
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	i := int(now.Sub(s.began) / (100 * time.Millisecond))
	for len(s.took) <= i {
		s.took = append(s.took, nil)
	}
	s.took[i] = append(s.took[i], now.Sub(began))
}

// p99 returns that of some seconds, which end a tenth after the other.
func (s *timed) p99(from, to time.Duration) (out []time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := int(from/(100*time.Millisecond)) + 10; i <= min(int(to/(100*time.Millisecond)), len(s.took)); i++ {
		second := slices.Concat(s.took[i-10 : i]...)
		slices.Sort(second)
		if len(second) > 0 {
			out = append(out, second[len(second)*99/100])
		}
	}
	return out
}

// With one of three nodes killed under load nothing fails, and latencies are disturbed for
// a moment only: a line for docs/performance.md.
func TestE2EKilledUnderLoad(t *testing.T) {
	if !full {
		t.Skip("measures; in make e2e")
	}
	r := start(t, 3, 1)
	workload, err := bench.Core("a")
	if err != nil {
		t.Fatal(err)
	}
	s := &timed{Store: bench.Kvasir(r.client())}
	cfg := bench.Config{Stores: []bench.Store{s}, Threads: 16, Duration: 40 * time.Second, Workload: workload, Records: 20_000, ValueBytes: 1024, Timeout: 5 * time.Second}
	if err := bench.Fill(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	s.began = time.Now()
	var killed time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(20 * time.Second)
		killed = time.Since(s.began)
		r.kill("node2")
	}()
	res, err := bench.Run(context.Background(), cfg, nil)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	before, after := s.p99(2*time.Second, killed), s.p99(killed, 40*time.Second)
	worst := slices.Max(before)
	disturbed := 0
	for _, p := range after {
		if p > 2*worst {
			disturbed++
		}
	}
	t.Logf("%.0f operations/s, %d failed (%s); p99 of a second: median %s and at most %s before the kill; median %s and at most %s after it; above twice the worst of before in %.1f s",
		res.PerSecond, res.Errors, res.FirstError, at(before, 0.5), worst, at(after, 0.5), slices.Max(after), float64(disturbed)/10)
	if res.Errors > 0 {
		t.Errorf("%d operations failed: %s", res.Errors, res.FirstError)
	}
}

func at(all []time.Duration, q float64) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[int(q*float64(len(all)-1))]
}
