// Command bench-peers measures Kvasir and what people would use instead, in one run, with
// the same workloads, value sizes and load generator: each with three replicas on this
// machine, through its own client library. It starts every server itself, one system at a
// time, and leaves neither a process nor a file behind.
//
// It is a module of its own, so that Kvasir depends on none of the peers. It never changes
// how Kvasir or a peer works: what is not their default is in the file of each system.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/kvasirdb/kvasir/internal/bench"
)

func main() {
	// Servers die with the thread that started them (see fleet): this one lasts.
	runtime.LockOSThread()
	ctx, release := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer release()
	cfg, err := parse(os.Args[1:])
	if err == nil {
		err = benchmark(ctx, cfg)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case ctx.Err() != nil && err == nil:
		fmt.Fprintln(os.Stderr, "\nbench-peers: interrupted; every server has been ended, and its data removed")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench-peers:", err)
		os.Exit(1)
	}
}

// settings are what the flags say.
type settings struct {
	systems, workloads       []string
	rounds, records, threads int
	valueBytes               int
	duration                 time.Duration
	// bin has kvctl, kvnode and kvorch, peers the servers of the others. Data go to dir,
	// results, unless it is empty, to json.
	bin, peers, dir, json string
}

func parse(args []string) (settings, error) {
	exe, err := os.Executable()
	if err != nil {
		return settings{}, fmt.Errorf("find the servers: %w", err)
	}
	beside := filepath.Dir(exe)
	var c settings
	var systems, workloads string
	f := flag.NewFlagSet("bench-peers", flag.ContinueOnError)
	f.StringVar(&systems, "systems", strings.Join(names(), ","), "what is measured, with commas")
	f.StringVar(&workloads, "workloads", "a,c", "YCSB's workloads, with commas: a, b, c, d and f (e scans, which not all systems can)")
	f.IntVar(&c.rounds, "rounds", 3, "how often each system is measured; the medians count")
	f.IntVar(&c.records, "records", 100_000, "number of records, at least 2")
	f.IntVar(&c.valueBytes, "value-bytes", 1024, "size of values")
	f.IntVar(&c.threads, "threads", 64, "operations under way at once")
	f.DurationVar(&c.duration, "duration", 20*time.Second, "length of one run of one workload")
	f.StringVar(&c.bin, "bin", filepath.Dir(beside), "directory of kvctl, kvnode and kvorch")
	f.StringVar(&c.peers, "peers", beside, "directory of the peers' servers")
	f.StringVar(&c.dir, "dir", "/var/tmp", "directory for temporary data, on a disk")
	f.StringVar(&c.json, "json", "", "file that gets the result of every run")
	if err := f.Parse(args); err != nil {
		return c, flag.ErrHelp // it has been printed
	}
	c.systems, c.workloads = split(systems), split(workloads)
	return c, c.validate(f.Args())
}

func split(list string) []string {
	return strings.FieldsFunc(strings.ToLower(list), func(r rune) bool { return r == ',' || r == ' ' })
}

func (c *settings) validate(rest []string) error {
	for _, name := range c.systems {
		if _, err := find(name); err != nil {
			return err
		}
	}
	for _, letter := range c.workloads {
		if w, err := bench.Core(letter); err != nil || w.Shares[bench.Scan] > 0 {
			return fmt.Errorf("workload %q: want a, b, c, d or f", letter)
		}
	}
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q", rest[0])
	case len(c.systems) == 0 || len(c.workloads) == 0:
		return errors.New("no systems or no workloads are given")
	case c.rounds < 1 || c.records < 2 || c.threads < 1 || c.valueBytes < 1 || c.duration < time.Second:
		return errors.New("rounds, threads and value-bytes must be at least 1, records 2, duration 1s")
	}
	return nil
}
