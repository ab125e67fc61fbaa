package sim_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// The environment of TestSim and of the processes that it starts, one for each
// seed: a store's pooled channels must not meet those of another bubble.
const (
	envSeeds   = "KVASIR_SIM_SEEDS"   // "12": so many seeds from envFirst on
	envFirst   = "KVASIR_SIM_FIRST"   // first seed
	envMinutes = "KVASIR_SIM_MINUTES" // of load for each seed
	envFaults  = "KVASIR_SIM_FAULTS"  // names of tracks of faults; else all of them
	envSeed    = "KVASIR_SIM_SEED"    // in a process of its own: its seed
	envResult  = "KVASIR_SIM_RESULT"  // and the file for its report
)

// autonomy stands for the tracks of faults with which the control loops are at work. They
// run with every fourth seed, once more, unless others are asked for.
const autonomy = "autonomy"

// reporting stands for those that run beside reporting nodes. They run with every eighth
// seed, once more.
const reporting = "reporting"

// failures is where histories of failed seeds are left, from the module's root.
const failures = "sim-failures"

// TestSim runs the simulation: SEEDS seeds of MINUTES minutes of cluster time each.
func TestSim(t *testing.T) {
	seeds, first, minutes := number(t, envSeeds, 8), number(t, envFirst, 1), number(t, envMinutes, 4)
	if testing.Short() {
		seeds = 2
	}
	total := newTotals()
	began := time.Now()
	type runOf struct {
		seed   uint64
		faults string
	}
	var runs []runOf
	for i := range seeds {
		seed := uint64(first + i)
		runs = append(runs, runOf{seed, os.Getenv(envFaults)})
		if seed%4 == 0 && os.Getenv(envFaults) == "" {
			runs = append(runs, runOf{seed, autonomy})
		}
		if seed%8 == 2 && os.Getenv(envFaults) == "" {
			runs = append(runs, runOf{seed, reporting})
		}
	}
	forEach(len(runs), func(i int) {
		rep := runSeed(runs[i].seed, minutes, runs[i].faults, nil)
		total.add(rep)
		if rep.failed() {
			t.Errorf("%s", rep.explain())
		}
	})
	total.print(t, time.Since(began))
}

// TestSimSeed runs one seed in this process.
func TestSimSeed(t *testing.T) {
	if os.Getenv(envSeed) == "" {
		t.Skip("runs one seed: " + envSeed)
	}
	var report *sim.Report
	var history *sim.History
	cfg := sim.RunConfig{Seed: uint64(number(t, envSeed, 1)), Minutes: float64(number(t, envMinutes, 4))}
	if s := os.Getenv(envFaults); s != "" {
		var err error
		if cfg.Faults, err = sim.ParseFaults(s); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		report, history = sim.Run(t, cfg)
	})
	out := outcome{Report: report}
	if len(report.Violations) > 0 || os.Getenv(envResult) == "" {
		out.History = writeHistory(t, report.Seed, history)
	}
	for _, v := range report.Violations {
		t.Errorf("seed %d: %s", report.Seed, v)
	}
	if path := os.Getenv(envResult); path != "" {
		b, err := json.Marshal(out)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s=%s is not a number", name, s)
	}
	return n
}

func writeHistory(t *testing.T, seed uint64, h *sim.History) string {
	t.Helper()
	dir := filepath.Join("..", "..", failures)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fmt.Sprintf("seed-%d%s%s.txt", seed, os.Getenv(envFaults), os.Getenv("KVASIR_MUTANT")))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := h.Write(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// outcome is what a process says of its seed.
type outcome struct {
	*sim.Report
	History string
	// crashed is how the process ended when it left no report.
	crashed string
	// late: it was ended after seedTimeout, which says nothing of what it would have found.
	late    bool
	seed    uint64
	minutes int
	faults  string
	took    time.Duration
}

func (o *outcome) failed() bool { return o.crashed != "" || len(o.Violations) > 0 }

// explain says what is wrong with a seed, and how to see it again.
func (o *outcome) explain() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d failed", o.seed)
	if o.Report != nil {
		fmt.Fprintf(&b, " (%s)\n", o.Options)
		for i, v := range o.Violations {
			if i == 5 {
				fmt.Fprintf(&b, "  and %d more\n", len(o.Violations)-i)
				break
			}
			fmt.Fprintf(&b, "  %s\n", v)
		}
	}
	if o.crashed != "" {
		fmt.Fprintf(&b, "\n%s\n", o.crashed)
	}
	if o.History != "" {
		fmt.Fprintf(&b, "  history: %s/%s\n", failures, filepath.Base(o.History))
	}
	fmt.Fprintf(&b, "  again: make sim FIRST=%d SEEDS=1 MINUTES=%d", o.seed, o.minutes)
	if o.faults != "" {
		fmt.Fprintf(&b, " FAULTS=%s", o.faults)
	}
	return b.String()
}

// forEach runs f for 0 to n−1, as many at once as there are processors.
func forEach(n int, f func(i int)) {
	var running sync.WaitGroup
	room := make(chan struct{}, runtime.NumCPU())
	for i := range n {
		room <- struct{}{}
		running.Go(func() {
			defer func() { <-room }()
			f(i)
		})
	}
	running.Wait()
}

// seedTimeout is how long a seed may take. One that takes longer hangs: its
// goroutines are shown.
const seedTimeout = 10 * time.Minute

// runSeed runs one seed in a process of its own, with some faults, "" for all that run
// unless others are asked for.
func runSeed(seed uint64, minutes int, faults string, env []string) *outcome {
	dir, err := os.MkdirTemp("", "kvasir-sim")
	if err != nil {
		return &outcome{seed: seed, minutes: minutes, faults: faults, crashed: err.Error()}
	}
	defer os.RemoveAll(dir)
	result := filepath.Join(dir, "report.json")
	ctx, cancel := context.WithTimeout(context.Background(), seedTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestSimSeed$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), fmt.Sprint(envSeed, "=", seed), fmt.Sprint(envMinutes, "=", minutes), envResult+"="+result, envFaults+"="+faults, "GOMAXPROCS=1")
	cmd.Env = append(cmd.Env, env...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	began := time.Now()
	runErr := cmd.Run()
	o := &outcome{}
	b, err := os.ReadFile(result)
	if err == nil {
		err = json.Unmarshal(b, o)
	}
	o.seed, o.minutes, o.faults, o.took = seed, minutes, faults, time.Since(began)
	if err != nil {
		o.crashed = fmt.Sprintf("no report: %v, %v", runErr, err)
		if o.late = ctx.Err() != nil; o.late {
			o.crashed = fmt.Sprintf("no report after %s: it hangs, or had too little of the machine", seedTimeout)
		}
		o.History = saveOutput(fmt.Sprint(seed, faults), said.Bytes())
	}
	return o
}

// saveOutput keeps what a process that crashed said.
func saveOutput(seed string, said []byte) string {
	dir := filepath.Join("..", "..", failures)
	path := filepath.Join(dir, fmt.Sprintf("seed-%s.output.txt", seed))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return ""
	}
	if err := os.WriteFile(path, said, 0o644); err != nil {
		return ""
	}
	return path
}

// totals sums the reports of many seeds.
type totals struct {
	mu                  sync.Mutex
	seeds, failed, five int
	minutes, all        float64
	// steered are the runs in which tracks change the ring, and not control loops.
	steered struct {
		minutes           float64
		completed, faults int
	}
	completed          int
	decided, undecided int
	faults, outcomes   map[string]int
	loops              map[string]int
	hit                map[sim.Hit]int
	slowest            time.Duration
	invariants         map[int]int
}

func newTotals() *totals {
	return &totals{faults: map[string]int{}, outcomes: map[string]int{}, loops: map[string]int{}, hit: map[sim.Hit]int{}, invariants: map[int]int{}}
}

func (s *totals) add(o *outcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seeds++
	s.slowest = max(s.slowest, o.took)
	if o.failed() {
		s.failed++
	}
	if o.Report == nil {
		return
	}
	if o.Nodes == 5 {
		s.five++
	}
	s.minutes += o.Minutes
	if o.faults != autonomy {
		s.steered.minutes += o.Minutes
		s.steered.completed += o.Completed
		for _, n := range o.Faults {
			s.steered.faults += n
		}
	}
	s.all += o.AllMinutes
	s.completed += o.Completed
	s.decided += o.Decided
	s.undecided += o.Undecided
	for k, n := range o.Faults {
		s.faults[k] += n
	}
	for k, n := range o.Loops {
		s.loops[k] += n
	}
	for k, n := range o.Hit {
		s.hit[k] += n
	}
	for k, n := range o.Outcomes {
		s.outcomes[k] += n
	}
	for _, v := range o.Violations {
		s.invariants[v.Invariant]++
	}
}

// operations are the kinds of operations that change the ring, as faults count them.
var operations = []string{"apply", "drain", "decommission", "replace", "replicas", "quorums"}

// changes writes how the ring changed, and what was hit in which phase of a move, and
// returns how many operations began.
func (s *totals) changes(b *strings.Builder) (began int) {
	var kinds []string
	for _, k := range operations {
		n := s.faults["operation "+k]
		began += n
		kinds = append(kinds, fmt.Sprintf("%d %s", n, k))
	}
	fmt.Fprintf(b, "%d operations that change the ring began: %s; %d were paused, %d aborted\n", began, strings.Join(kinds, ", "),
		s.faults["operation "+topology.Paused.String()], s.faults["operation "+topology.Aborting.String()])
	phases := []topology.Phase{topology.WriteBothReadOld, topology.WriteBothReadNew, topology.WriteNewReadNone}
	fmt.Fprintf(b, "  %-33s", "ended or stopped while a slot was")
	for _, p := range phases {
		fmt.Fprintf(b, " %22s", p)
	}
	fmt.Fprintln(b)
	for _, what := range []string{sim.HitLeader, sim.HitOld, sim.HitNewcomer, sim.HitOther} {
		fmt.Fprintf(b, "  %-33s", what)
		for _, p := range phases {
			fmt.Fprintf(b, " %22d", s.hit[sim.Hit{What: what, Phase: p.String()}])
		}
		fmt.Fprintln(b)
	}
	return began
}

// print writes the sums.
func (s *totals) print(t *testing.T, took time.Duration) {
	var b strings.Builder
	hours := s.minutes / 60
	fmt.Fprintf(&b, "%d seeds (%d with 5 nodes and 3 orchestrators), %.2f hours of load in %.2f cluster hours, in %s (slowest seed %s)\n",
		s.seeds, s.five, hours, s.all/60, took.Round(time.Second), s.slowest.Round(time.Second))
	faults := 0
	for _, n := range s.faults {
		faults += n
	}
	fmt.Fprintf(&b, "%d operations completed, %.0f an hour; %d faults of %d kinds, %.0f an hour\n",
		s.completed, float64(s.completed)/hours, faults, len(s.faults), float64(faults)/hours)
	fmt.Fprintf(&b, "%d histories of keys, %d undecided; %d seeds failed\n", s.decided+s.undecided, s.undecided, s.failed)
	changes := s.changes(&b)
	if len(s.loops) > 0 {
		table(&b, "of the control loops", s.loops)
	}
	table(&b, "fault", s.faults)
	table(&b, "operation and outcome", s.outcomes)
	t.Logf("\n%s", b.String())
	if n := s.decided + s.undecided; s.failed == 0 && s.undecided*20 > n {
		t.Errorf("%d of %d histories are undecided: at most 5%% may be", s.undecided, n)
	}
	hours = s.steered.minutes / 60
	if s.failed == 0 && hours >= 1 && (float64(s.steered.completed)/hours < 30_000 || float64(s.steered.faults)/hours < 100) {
		t.Errorf("an hour must have 30000 completed operations and 100 faults")
	}
	if s.failed == 0 && hours >= 1 && os.Getenv(envFaults) == "" && float64(changes)/hours < 167 {
		t.Errorf("an hour must have 167 operations that change the ring, 2000 in 12 hours")
	}
}

func table(b *strings.Builder, what string, counts map[string]int) {
	keys := slices.Collect(maps.Keys(counts))
	slices.SortFunc(keys, func(x, y string) int { return cmp.Or(cmp.Compare(counts[y], counts[x]), cmp.Compare(x, y)) })
	fmt.Fprintf(b, "  %-32s %8s\n", what, "count")
	for _, k := range keys {
		fmt.Fprintf(b, "  %-32s %8d\n", k, counts[k])
	}
}
