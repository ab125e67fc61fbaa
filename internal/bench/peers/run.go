package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// settle is the rest before idle memory is read, and before each load: what the one before
// has left to do is done, or goes on for as long in every system.
const settle = 3 * time.Second

// opTimeout bounds an operation.
const opTimeout = 5 * time.Second

// result is what came of one run of a workload.
type result struct {
	Round     int     `json:"round"`
	System    string  `json:"system"`
	Workload  string  `json:"workload"`
	PerSecond float64 `json:"operations_per_second"`
	// Operations succeeded; the NotFound of them read nothing.
	Operations int64  `json:"operations"`
	NotFound   int64  `json:"reads_not_found"`
	Errors     int64  `json:"errors"`
	FirstError string `json:"first_error,omitempty"`
	// Kinds are the latencies by kind of operation.
	Kinds map[string]latency `json:"latencies_us"`
	// CPUMicros is what all servers used for an operation, Flushes how many requests to
	// flush the device completed in a second, whoever sent them.
	CPUMicros float64 `json:"server_cpu_us_per_operation"`
	Flushes   float64 `json:"flushes_per_second"`
	// Idle is the memory before any record was stored, Memory that at the end of the run.
	Idle   memory `json:"memory_idle"`
	Memory memory `json:"memory"`
}

// latency is a distribution, in microseconds.
type latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean"`
	P50   int64   `json:"p50"`
	P90   int64   `json:"p90"`
	P99   int64   `json:"p99"`
	P999  int64   `json:"p999"`
	Max   int64   `json:"max"`
}

// harness is a whole benchmark.
type harness struct {
	settings
	kinds    []kind
	versions map[string]string
	disk     disk
	// others are what else the machine did before the first server ran.
	others  activity
	results []result
	// troubles are what a reader must know of, beside the numbers.
	troubles []string
	// leftover is what could not be ended or removed.
	leftover error
}

// benchmark measures, and prints what came of it. When ctx ends, it returns what could not
// be cleaned up, if anything.
func benchmark(ctx context.Context, cfg settings) error {
	h := &harness{settings: cfg, versions: map[string]string{}}
	var err error
	if h.disk, err = diskOf(cfg.dir); err != nil {
		return err
	}
	if err := h.choose(); err != nil {
		return err
	}
	if h.others, err = watch(ctx, h.disk, settle); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if h.others.Busy > 0.1 || h.others.Flushes > 10 {
		h.trouble("the machine was busy with other things before the first server ran: %s", h.others)
	}
	failed := h.rounds(ctx)
	if ctx.Err() != nil {
		return h.leftover
	}
	if len(h.results) == 0 {
		return failed
	}
	h.report(os.Stdout)
	if cfg.json != "" {
		failed = errors.Join(failed, h.writeJSON())
	}
	return failed
}

// choose takes the systems that this machine has.
func (h *harness) choose() error {
	for _, name := range h.systems {
		k, err := find(name)
		if err != nil {
			return err
		}
		if k.missing != nil {
			if err := k.missing(); err != nil {
				h.trouble("%s is skipped: %v", name, err)
				continue
			}
		}
		if h.versions[name], err = k.version(place{bin: h.bin, peers: h.peers}); err != nil {
			return err
		}
		h.kinds = append(h.kinds, k)
	}
	if len(h.kinds) == 0 {
		return errors.New("there is nothing to measure")
	}
	return nil
}

// trouble tells of something at once, and once more at the end.
func (h *harness) trouble(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, text)
	h.troubles = append(h.troubles, text)
}

// rounds measures each system in turn, and again. One that fails does not cost the results
// of the others; its error is returned.
func (h *harness) rounds(ctx context.Context) error {
	failed := map[string]bool{}
	for round := 1; round <= h.settings.rounds; round++ {
		for _, k := range h.kinds {
			err := h.measure(ctx, round, k)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				h.trouble("%s failed in round %d: %v", k.name, round, err)
				failed[k.name] = true
			}
		}
	}
	var incomplete []string
	for _, k := range h.kinds {
		if failed[k.name] {
			incomplete = append(incomplete, k.name)
		}
	}
	if len(incomplete) > 0 {
		return errors.Join(fmt.Errorf("not everything could be measured: %s failed", strings.Join(incomplete, ", ")), h.leftover)
	}
	return h.leftover
}

// measure starts a system anew, stores the records, runs each workload, and removes what
// the system has left.
func (h *harness) measure(ctx context.Context, round int, k kind) error {
	dir, err := os.MkdirTemp(h.dir, "kvasir-bench-peers-"+k.name+"-")
	if err != nil {
		return err
	}
	s := k.create(place{bin: h.bin, peers: h.peers, dir: dir, threads: h.threads})
	defer h.clean(s, k.name, dir)
	fmt.Fprintf(os.Stderr, "round %d of %d, %s: starting ...", round, h.settings.rounds, k.name)
	if err := s.start(ctx); err != nil {
		fmt.Fprintln(os.Stderr)
		return fmt.Errorf("start: %w", err)
	}
	if err := rest(ctx, settle); err != nil {
		return err
	}
	idle, err := memoryOf(s.servers())
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, " storing records ...")
	load := bench.Config{
		Stores: s.stores(), Threads: h.threads, Duration: h.duration, Records: h.records,
		ValueBytes: h.valueBytes, Timeout: opTimeout, Seed: uint64(round),
	}
	load.Workload, _ = bench.Core("c") // to be valid: it is not looked at
	if err := bench.Fill(ctx, load); err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n") // each thread has one
		return errors.Join(s.check(), fmt.Errorf("store the records: %s", first))
	}
	for _, letter := range h.workloads {
		if load.Workload, err = bench.Core(letter); err != nil {
			return err
		}
		if err := rest(ctx, settle); err != nil {
			return err
		}
		res, err := h.runOne(ctx, s, load)
		if err != nil {
			return errors.Join(s.check(), err)
		}
		res.Round, res.System, res.Workload, res.Idle = round, k.name, letter, idle
		h.take(res)
	}
	return nil
}

// clean ends the servers and removes their data, or notes what it could not.
func (h *harness) clean(s system, name, dir string) {
	err := s.stop()
	if err != nil {
		err = fmt.Errorf("stop %s, whose data stay in %s: %w", name, dir, err)
	} else {
		err = os.RemoveAll(dir)
	}
	h.leftover = errors.Join(h.leftover, err)
	syscall.Sync() // lest the next one pay for what this one has left to write
}

// runOne runs one workload, and watches what it costs the servers and the disk.
func (h *harness) runOne(ctx context.Context, s system, load bench.Config) (result, error) {
	cpu, err := cpuTime(s.servers())
	if err != nil {
		return result{}, err
	}
	flushes, err := h.disk.flushes()
	if err != nil {
		return result{}, err
	}
	res, err := bench.Run(ctx, load, nil)
	if err != nil {
		return result{}, err
	}
	if ctx.Err() != nil {
		return result{}, ctx.Err()
	}
	flushesAfter, err := h.disk.flushes()
	if err != nil {
		return result{}, err
	}
	cpuAfter, err := cpuTime(s.servers())
	if err != nil {
		return result{}, err
	}
	mem, err := memoryOf(s.servers())
	if err != nil {
		return result{}, err
	}
	out := result{
		PerSecond: res.PerSecond, Operations: res.Operations, NotFound: res.NotFound,
		Errors: res.Errors, FirstError: res.FirstError, Kinds: map[string]latency{}, Memory: mem,
		CPUMicros: float64((cpuAfter - cpu).Microseconds()) / float64(max(res.Operations, 1)),
		Flushes:   float64(flushesAfter-flushes) / res.Elapsed.Seconds(),
	}
	for k, l := range res.Kinds {
		if l.Count > 0 {
			out.Kinds[bench.Kind(k).String()] = latency(l)
		}
	}
	return out, s.check()
}

func (h *harness) take(r result) {
	h.results = append(h.results, r)
	fmt.Fprintf(os.Stderr, "  workload %s: %s operations/s\n", r.Workload, number(r.PerSecond))
	where := fmt.Sprintf("%s, workload %s, round %d", r.System, r.Workload, r.Round)
	if r.Errors > 0 {
		h.trouble("%s: %d operations failed; the first: %s", where, r.Errors, r.FirstError)
	}
	if r.NotFound > 0 {
		why := ""
		if r.Kinds[bench.Insert.String()].Count > 0 {
			why = ", as the newest records may be read before they are there"
		}
		h.trouble("%s: %d reads found nothing%s", where, r.NotFound, why)
	}
}

func (h *harness) writeJSON() error {
	type measured struct {
		Version string `json:"version"`
		guarantees
	}
	systems := map[string]measured{}
	for _, k := range h.kinds {
		systems[k.name] = measured{h.versions[k.name], k.guarantees}
	}
	b, err := json.MarshalIndent(map[string]any{
		"systems": systems, "machine_before": h.others, "results": h.results, "troubles": h.troubles,
		"records": h.records, "value_bytes": h.valueBytes, "threads": h.threads, "duration_s": h.duration.Seconds(),
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(h.json, append(b, '\n'), 0o644)
}
