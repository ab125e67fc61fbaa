package devcluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
)

// counted counts what becomes of operations.
type counted struct {
	bench.Store
	overloaded, late, other atomic.Int64
}

func (c *counted) Read(ctx context.Context, key []byte) error {
	return c.count(c.Store.Read(ctx, key))
}

func (c *counted) Write(ctx context.Context, key, value []byte) error {
	return c.count(c.Store.Write(ctx, key, value))
}

func (c *counted) count(err error) error {
	switch {
	case err == nil, errors.Is(err, bench.ErrNotFound):
	case errors.Is(err, client.ErrOverloaded):
		c.overloaded.Add(1)
	case errors.Is(err, client.ErrTimeout), reason(err) == rpc.ReasonTooLate: // by the caller's deadline, or for a write to begin
		c.late.Add(1)
	default:
		c.other.Add(1)
	}
	return err
}

func reason(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}

// What becomes of a cluster of which four times as much is asked as it can do: a table for
// docs/performance.md. The nodes share all cores but the last, which the load has.
func TestE2EOverload(t *testing.T) {
	if !full {
		t.Skip("measures; in make e2e")
	}
	r := start(t, 3, 1)
	last, rest := lastCore(t)
	var nodes []int
	for _, p := range r.status() {
		setCores(t, p.PID, rest)
		if p.Role == devcluster.RoleData {
			nodes = append(nodes, p.PID)
		}
	}
	setCores(t, os.Getpid(), last)
	defer func() { setCores(t, os.Getpid(), allCores(t)) }()
	workload, err := bench.Core("a")
	if err != nil {
		t.Fatal(err)
	}
	run := func(threads int, target float64, d time.Duration) (bench.Result, *counted) {
		t.Helper()
		s := &counted{Store: bench.Kvasir(r.client())}
		cfg := bench.Config{
			Stores: []bench.Store{s}, Threads: threads, Duration: d, Workload: workload, Target: target, Records: 20_000, ValueBytes: 1024, Timeout: time.Second,
		}
		res, err := bench.Run(context.Background(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		return res, s
	}
	fill := bench.Config{Stores: []bench.Store{bench.Kvasir(r.client())}, Threads: 8, Operations: 1, Workload: workload, Records: 20_000, ValueBytes: 1024}
	if err := bench.Fill(context.Background(), fill); err != nil {
		t.Fatal(err)
	}
	var peak bench.Result
	most := 0 // threads
	for _, threads := range []int{64, 256, 64, 256} {
		if res, _ := run(threads, 0, 10*time.Second); res.PerSecond > peak.PerSecond {
			peak, most = res, threads
		}
	}
	before := resident(nodes)

	const factor = 4
	largest := before
	ctx, cancel := context.WithCancel(context.Background())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			largest = max(largest, resident(nodes))
			time.Sleep(500 * time.Millisecond)
		}
	}()
	over, s := run(3000, factor*peak.PerSecond, time.Minute)
	cancel()
	<-watched
	ended := time.Now()
	var after bench.Result
	for after.PerSecond < 0.9*peak.PerSecond || after.Errors > 0 {
		if time.Since(ended) > 30*time.Second {
			t.Fatalf("30 s after the overload %.0f operations/s succeed and %d failed (%s)", after.PerSecond, after.Errors, after.FirstError)
		}
		after, _ = run(most, 0, 3*time.Second)
	}
	asked := float64(over.Operations+over.Errors) / over.Elapsed.Seconds()
	var table strings.Builder
	fmt.Fprintln(&table, "| | operations/s | read p50, p99 | update p50, p99 | refused as overloaded | too late | failed otherwise | largest node |\n|---|---|---|---|---|---|---|---|")
	row := func(what string, res bench.Result, s *counted, bytes int64) {
		ms := func(k bench.Kind) string {
			return fmt.Sprintf("%.0f, %.0f ms", float64(res.Kinds[k].P50)/1e3, float64(res.Kinds[k].P99)/1e3)
		}
		fmt.Fprintf(&table, "| %s | %.0f | %s | %s | %d | %d | %d | %d MiB |\n", what, res.PerSecond, ms(bench.Read), ms(bench.Update), s.overloaded.Load(), s.late.Load(), s.other.Load(), bytes>>20)
	}
	row(fmt.Sprintf("as much as %d threads get done", most), peak, &counted{}, before)
	row(fmt.Sprintf("%.1f times as much asked", asked/peak.PerSecond), over, s, largest)
	row(fmt.Sprintf("as before, %.0f s later", time.Since(ended).Seconds()), after, &counted{}, resident(nodes))
	t.Logf("goodput %.2f of the peak\n%s", over.PerSecond/peak.PerSecond, table.String())
	if s.overloaded.Load() == 0 {
		t.Error("nothing was refused as overloaded")
	}
	if n := s.other.Load(); n > s.overloaded.Load()/100 {
		t.Errorf("%d operations failed for other reasons, the first of all by %s", n, over.FirstError)
	}
	if over.PerSecond < 0.7*peak.PerSecond {
		t.Errorf("%.0f operations/s succeeded, less than 70%% of %.0f", over.PerSecond, peak.PerSecond)
	}
}

// resident returns the memory of the largest of some processes, in bytes.
func resident(pids []int) (most int64) {
	for _, pid := range pids {
		var size, pages int64
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid)); err == nil {
			fmt.Sscan(string(b), &size, &pages)
		}
		most = max(most, pages*int64(os.Getpagesize()))
	}
	return most
}
