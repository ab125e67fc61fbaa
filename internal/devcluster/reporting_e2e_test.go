package devcluster_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/parquet-go/parquet-go"
	"golang.org/x/sys/unix"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// tellers make transfers, each a key of its own, one after the other: a transfer is tried
// until it is acknowledged, and only then the next one is begun. So a report that holds
// transfer n of a teller, and not all before it, misses one, and so does a report that does
// not hold what was acknowledged before it began.
type tellers struct {
	t     *testing.T
	c     *client.Client
	acked []atomic.Int64
	stop  atomic.Bool
	work  sync.WaitGroup
	// slowest is how long a transfer has taken at most.
	mu      sync.Mutex
	slowest time.Duration
	failed  int
	lastErr error
}

func startTellers(t *testing.T, c *client.Client, n int) *tellers {
	l := &tellers{t: t, c: c, acked: make([]atomic.Int64, n)}
	for i := range n {
		l.work.Go(func() {
			for n := 1; !l.stop.Load(); {
				began := time.Now()
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				_, err := c.Put(ctx, []byte(transfer(i, n)), fmt.Appendf(nil, `{"teller": %d, "n": %d, "amount": %d.25}`, i, n, n))
				cancel()
				l.mu.Lock()
				if l.slowest = max(l.slowest, time.Since(began)); err != nil {
					l.failed++
					l.lastErr = err
				}
				l.mu.Unlock()
				if err == nil {
					l.acked[i].Store(int64(n))
					n++
				}
				time.Sleep(scale(20*time.Millisecond, 0)) // a short run is not alone
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

func (l *tellers) end() {
	l.stop.Store(true)
	l.work.Wait()
}

// now returns how many transfers of each teller have been acknowledged.
func (l *tellers) now() []int64 {
	out := make([]int64, len(l.acked))
	for i := range out {
		out[i] = l.acked[i].Load()
	}
	return out
}

func (l *tellers) sum() (n int64) {
	for _, a := range l.now() {
		n += a
	}
	return n
}

// takeSlowest returns how long a transfer has taken at most since the last call.
func (l *tellers) takeSlowest() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.slowest
	l.slowest = 0
	return s
}

// report makes a report of all transfers, and fails the test if it lacks one that had been
// acknowledged in least.
func (l *tellers) report(ctx context.Context, least []int64) error {
	groups, _, err := l.c.ReportGroups(ctx, client.Report{Prefix: []byte("transfer/")}, []string{"teller"}, []string{"count", "max(n)", "sum(amount)"})
	if err != nil {
		return err
	}
	seen := map[int]bool{}
	number := func(v client.FieldValue) float64 {
		f, err := strconv.ParseFloat(v.Text, 64)
		if err != nil {
			l.t.Errorf("%q is not a number", v.Text)
		}
		return f
	}
	for _, g := range groups {
		teller, count, last, sum := int(number(g.Keys[0])), int64(number(g.Measures[0].Value)), int64(number(g.Measures[1].Value)), number(g.Measures[2].Value)
		seen[teller] = true
		if count != last || count < least[teller] {
			l.t.Errorf("a report has %d transfers of teller %d, the last of them number %d; %d had been acknowledged before", count, teller, last, least[teller])
		}
		if want := float64(count*(count+1)/2) + float64(count)/4; sum != want {
			l.t.Errorf("the transfers of teller %d sum up to %f, want %f", teller, sum, want)
		}
	}
	for i, n := range least {
		if n > 0 && !seen[i] {
			l.t.Errorf("a report has no transfer of teller %d, of which %d had been acknowledged", i, n)
		}
	}
	return nil
}

// stale makes a report of copies that no write waits for, and returns why it failed. It
// fails the test if one is lacking that had been acknowledged by when it says to be complete.
func (l *tellers) stale(ctx context.Context, leastAt func(complete time.Time) []int64) error {
	began := time.Now()
	stats := client.ReportStats{}
	r := client.Report{Prefix: []byte("transfer/"), MaxStaleness: time.Hour, Progress: func(s client.ReportStats) { stats = s }}
	have := map[string]bool{}
	for rec, err := range l.c.ReportRows(ctx, r, client.RowOptions{KeysOnly: true}) {
		if err != nil {
			return err
		}
		have[string(rec.Key)] = true
	}
	if stats.InSync {
		return errors.New("it says that it is exact")
	}
	for i, n := range leastAt(began.Add(-stats.Staleness)) {
		for k := range n {
			if key := transfer(i, int(k+1)); !have[key] {
				l.t.Errorf("a report that is %s behind lacks %s, which is older", stats.Staleness, key)
			}
		}
	}
	return nil
}

func transfer(teller, n int) string { return fmt.Sprintf("transfer/%02d/%07d", teller, n) }

// setReporting sets the rules of the namespace default, and returns when all copies are in
// sync, or behind where none is to be.
func (r *rig) setReporting(policy topologyv1.ReportingPolicy) {
	r.t.Helper()
	// In a short run others keep the cores busy for longer than the default.
	copies, timeout := uint32(1), uint64(scale(1500*time.Millisecond, topology.DefaultReportingTimeout).Milliseconds())
	_, err := r.control("orch1").UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: topology.DefaultNamespace, Settings: &adminv1.NamespaceSettings{
		ReportingPolicy: &policy, ReportingCopies: &copies, ReportingTimeoutMs: &timeout,
	}})
	if err != nil {
		r.t.Fatal(err)
	}
	state := topology.InSync
	if policy == topologyv1.ReportingPolicy_REPORTING_POLICY_BEST_EFFORT {
		state = topology.Behind
	}
	r.copiesAre(state)
}

// copiesAre waits until all copies of the namespace default are in a state. One that is let
// go of again and again, where the cores are busy, stays out for longer each time.
func (r *rig) copiesAre(state topology.CopyState) {
	r.t.Helper()
	r.eventually(scale(3*time.Minute, time.Minute), func() string {
		t := r.topology()
		for v := range t.Vnodes {
			copies := t.Copies(v, t.Namespace(topology.DefaultNamespace).ID)
			if len(copies) != 1 || copies[0].State != state {
				return fmt.Sprintf("vnode %d has the copies %v", v, copies)
			}
		}
		return ""
	})
}

// Reports are made again and again while tellers write, and the reporting node is killed and
// stopped. None lacks a write that was acknowledged before it began; and each policy does
// what it promises.
func TestE2EReportsAreExact(t *testing.T) {
	besideOthers(t)
	r := startWith(t, devcluster.Settings{Nodes: 3, Orchestrators: 3, Reporting: 1, Zones: 3, ReplaceAfter: 10 * time.Minute})
	c := r.client(client.WithTimeout(20 * time.Second))
	l := startTellers(t, c, 16)
	ctx := context.Background()
	made, refused := 0, 0
	try := func(within time.Duration) {
		for began := time.Now(); time.Since(began) < within; {
			least := l.now()
			switch err := l.report(ctx, least); {
			case err == nil:
				made++
			case errors.Is(err, client.ErrNotInSync), errors.Is(err, client.ErrUnavailable), errors.Is(err, client.ErrTimeout):
				refused++
				time.Sleep(20 * time.Millisecond)
			default:
				t.Error(err)
				return
			}
		}
	}
	for _, policy := range []topologyv1.ReportingPolicy{topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK, topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE} {
		before, goal := l.sum(), scale[int64](100, 60_000)
		r.setReporting(policy)
		first := scale(int(policy)%2, 0) // a short run has one of the two for each policy
		for round := first; round < first+scale(1, 2) || l.sum()-before < goal; round++ {
			try(scale(time.Second, 5*time.Second))
			l.takeSlowest()
			away := func() {
				time.Sleep(scale(5*time.Second, 3*time.Second)) // what is under way ends, or is let go on
				was := l.sum()
				try(3 * time.Second)
				went := l.sum() - was
				if blocks := policy == topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK; blocks && went > 0 {
					t.Errorf("%s: %d transfers were acknowledged while the reporting node was away", policy, went)
				} else if !blocks && went == 0 {
					t.Errorf("%s: no transfer was acknowledged while the reporting node was away", policy)
				}
			}
			if round%2 == 0 {
				r.kill("report1")
				away()
				r.up("report1")
			} else {
				if err := r.cluster.Pause(ctx, "report1"); err != nil {
					t.Fatal(err)
				}
				away()
				if err := r.cluster.Resume(ctx, "report1"); err != nil {
					t.Fatal(err)
				}
			}
			r.copiesAre(topology.InSync) // by itself
			t.Logf("%s, round %d: %d transfers, the slowest took %s; %d reports, %d refused", policy, round+1, l.sum(), l.takeSlowest().Round(time.Millisecond), made, refused)
		}
		try(time.Second)
	}
	if made < 10 {
		t.Errorf("only %d reports were answered", made)
	}

	// No write waits for these, so no report is exact, and the answer tells by how much.
	r.setReporting(topologyv1.ReportingPolicy_REPORTING_POLICY_BEST_EFFORT)
	if err := l.report(ctx, l.now()); !errors.Is(err, client.ErrNotInSync) {
		t.Errorf("a report of copies that no write waits for: %v", err)
	}
	type sample struct {
		at    time.Time
		acked []int64
	}
	var samples []sample
	for began := time.Now(); time.Since(began) < scale(3*time.Second, 15*time.Second); time.Sleep(10 * time.Millisecond) {
		samples = append(samples, sample{time.Now(), l.now()})
	}
	r.kill("report1")
	l.takeSlowest()
	time.Sleep(time.Second)
	if s := l.takeSlowest(); s > 5*time.Second {
		t.Errorf("best_effort: a transfer took %s without the reporting node", s)
	}
	r.up("report1")
	checked := int64(0)
	r.eventually(time.Minute, func() string {
		err := l.stale(ctx, func(complete time.Time) []int64 {
			for i := len(samples) - 1; i >= 0; i-- {
				if samples[i].at.Before(complete) {
					for _, n := range samples[i].acked {
						checked += n
					}
					return samples[i].acked
				}
			}
			return nil
		})
		if err != nil {
			return err.Error()
		}
		return ""
	})
	if checked == 0 {
		t.Error("the report is older than all that was written before")
	}
	l.end()
	t.Logf("%d transfers, %d failed at first (%v); %d reports, %d refused", l.sum(), l.failed, l.lastErr, made, refused)

	var counted struct {
		Count int64 `json:"count"`
	}
	r.setReporting(topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK)
	if err := json.Unmarshal(r.kvctl("report", "count", "--prefix", "transfer/", "-o", "json"), &counted); err != nil || counted.Count < l.sum() {
		t.Errorf("kvctl counts %d, %v, want at least %d", counted.Count, err, l.sum())
	}
}

// A Parquet file of a namespace, read back, holds what was imported, in order; and kvctl needs
// little memory to write it.
func TestE2EParquetEqualsImport(t *testing.T) {
	besideOthers(t)
	r := startWith(t, devcluster.Settings{Nodes: 3, Orchestrators: 1, Reporting: 1, Zones: 1, ReplaceAfter: 10 * time.Minute})
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	r.setReporting(topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE)
	count, dir := scale(5_000, 1_000_000), t.TempDir()
	tsv, err := os.Create(filepath.Join(dir, "rows.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	row := func(i int) (key, value string) {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		return fmt.Sprintf("key%08d", i), fmt.Sprintf("%x%x%x%x", rng.Uint64(), rng.Uint64(), rng.Uint64(), rng.Uint64())
	}
	w := bufio.NewWriter(tsv)
	for i := range count {
		key, value := row(i)
		fmt.Fprintf(w, "%s\t%s\n", key, value)
	}
	if err := errors.Join(w.Flush(), tsv.Close()); err != nil {
		t.Fatal(err)
	}
	r.kvctl("import", tsv.Name(), "--format", "tsv", "--key-column", "1")
	out, err := os.Create(filepath.Join(dir, "rows.parquet"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	export := exec.Command(filepath.Join(bin, "kvctl"), "--endpoints", strings.Join(r.endpoints(), ","), "export", "--from", "reporting", "--format", "parquet")
	export.Stdout = out
	if err := export.Run(); err != nil {
		t.Fatal(err)
	}
	if most := export.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; most > 256<<10 {
		t.Errorf("kvctl took %d KiB", most)
	} else {
		t.Logf("%d records, kvctl took %d KiB", count, most)
	}
	info, err := out.Stat()
	if err != nil {
		t.Fatal(err)
	}
	file, err := parquet.OpenFile(out, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	type record struct {
		Key   []byte `parquet:"key"`
		Value []byte `parquet:"value"`
	}
	in := parquet.NewGenericReader[record](file)
	defer in.Close()
	n, page := 0, make([]record, 1000)
	for err == nil {
		var got int
		got, err = in.Read(page)
		for _, rec := range page[:got] {
			if key, value := row(n); string(rec.Key) != key || string(rec.Value) != value {
				t.Fatalf("row %d is %s = %s, want %s = %s", n, rec.Key, rec.Value, key, value)
			}
			n++
		}
	}
	if !errors.Is(err, io.EOF) || n != count {
		t.Errorf("%d rows, %v, want %d", n, err, count)
	}
}

// What reports cost those who use the cluster meanwhile, read on a reporting node, and as
// scans on the nodes that serve; and what it costs writes that a copy has to have them: a
// table for docs/performance.md. The reporting node has a core of its own, all else the others.
func TestE2EWhatReportsCost(t *testing.T) {
	if !full {
		t.Skip("measures; in make e2e")
	}
	var table strings.Builder
	fmt.Fprintln(&table, "| | p50 ms | p99 ms | times the p99 without | operations/s |\n|---|---|---|---|---|")
	for _, cores := range []string{"a core of its own", "shared cores"} {
		r := startWith(t, devcluster.Settings{Nodes: 3, Orchestrators: 1, Reporting: 1, Zones: 1, ReplaceAfter: 10 * time.Minute})
		if cores != "shared cores" {
			r.pin()
			defer func() { setCores(t, os.Getpid(), allCores(t)) }()
		}
		data := large{r: r, c: r.client(), keys: 200_000, size: 256}
		data.each(data.keys, data.put)
		l := loadOn(t, data.c, 300)
		made := 0
		idle := func(ctx context.Context) { <-ctx.Done() }
		report := func(ctx context.Context) {
			_, _, err := data.c.ReportGroups(ctx, client.Report{Where: []string{"@value ~ nothing"}}, nil, []string{"count"})
			if err == nil {
				made++
			} else if ctx.Err() == nil {
				t.Error(err)
			}
		}
		scan := func(ctx context.Context) {
			for _, err := range data.c.Scan(ctx, client.Range{}) {
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		}
		type kind struct {
			what   string
			beside func(ctx context.Context)
		}
		// In turn, lest what the machine does besides falls on one of them; each figure is the
		// median of the rounds.
		measure := func(kinds ...kind) {
			var p50, p99, rate = make([][]float64, len(kinds)), make([][]float64, len(kinds)), make([][]float64, len(kinds))
			for range 7 {
				for i, k := range kinds {
					time.Sleep(time.Second)
					ctx, cancel := context.WithCancel(context.Background())
					time.AfterFunc(5*time.Second, cancel)
					l.latencies()
					began := time.Now()
					for ctx.Err() == nil {
						k.beside(ctx)
					}
					took := l.latencies()
					ms := func(q float64) float64 {
						return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1e3
					}
					p50[i], p99[i] = append(p50[i], ms(0.5)), append(p99[i], ms(0.99))
					rate[i] = append(rate[i], float64(len(took))/time.Since(began).Seconds())
				}
			}
			for i, k := range kinds {
				row := fmt.Sprintf("| %s: %s | %.1f | %.1f | %.2f | %.0f |\n", cores, k.what, median(p50[i]), median(p99[i]), median(p99[i])/median(p99[0]), median(rate[i]))
				table.WriteString(row)
				t.Log(row, p99[i])
			}
		}
		measure(kind{"no copies", idle})
		r.setReporting(topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK)
		measure(kind{"writes wait for a copy", idle}, kind{"reports of all records as well", report}, kind{"scans on the nodes instead", scan}, kind{"neither, once more", idle})
		l.end()
		t.Logf("%s: %d reports in 35 s", cores, made)
		if _, err := r.cluster.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("\n" + table.String())
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// pin gives the reporting node the last core, and all other processes, this one too, the
// others.
func (r *rig) pin() {
	last, rest := lastCore(r.t)
	for _, p := range r.status() {
		if p.Role == devcluster.RoleReporting {
			setCores(r.t, p.PID, last)
		} else {
			setCores(r.t, p.PID, rest)
		}
	}
	setCores(r.t, os.Getpid(), rest)
}

// lastCore returns the last core and the others, of two at least.
func lastCore(t *testing.T) (last, rest unix.CPUSet) {
	rest = allCores(t)
	if rest.Count() < 2 {
		t.Skip("it takes two cores")
	}
	for i := range 1024 {
		if rest.IsSet(i) {
			last.Zero()
			last.Set(i)
		}
	}
	for i := range 1024 {
		if last.IsSet(i) {
			rest.Clear(i)
		}
	}
	return last, rest
}

func allCores(t *testing.T) (set unix.CPUSet) {
	if err := unix.SchedGetaffinity(1, &set); err != nil { // this process may be pinned
		t.Fatal(err)
	}
	return set
}

// setCores has all threads of a process run on some cores only.
func setCores(t *testing.T, pid int, set unix.CPUSet) {
	t.Helper()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, th := range threads {
		tid, err := strconv.Atoi(th.Name())
		if err == nil {
			err = unix.SchedSetaffinity(tid, &set)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
	}
}
