package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kvasirdb/kvasir/internal/bench"
)

func (a *App) benchCommand() *cobra.Command {
	f := &dataFlags{}
	cfg := bench.Config{}
	var fill bool
	var reads float64
	var distribution bench.Distribution
	workload := "a"
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure a cluster with YCSB's workloads",
		Long: `Makes load through the client library and prints what was measured: operations per
second and latencies. The core workloads of YCSB:

  a  half reads, half updates             d  95% reads of what is new, 5% inserts
  b  95% reads, 5% updates                e  95% scans of 1 to 100 records, 5% inserts
  c  reads only                           f  half reads, half read-modify-writes

Some records are popular (zipfian; in d the newest), unless --distribution says else.

Each of --threads sends its next operation when the last one has been answered. With
--target, operations begin at that rate, and latencies count from when one was to begin:
what has to wait for a slow one is slow, too.

Keys are user and 16 digits; the namespace keeps them afterwards. What an operation
rests on is the namespace's: quorums, replicas, and a sync to disk of each replica that
acknowledges.`,
		Example: `  kvctl bench --fill                             # workload a, after every record was stored
  kvctl bench --workload c -r one --threads 16
  kvctl bench --workload b --target 2000 --duration 1m
  kvctl bench --reads 0 --distribution uniform -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("reads") {
				cfg.Workload, workload = bench.Mix(reads, bench.Zipfian), ""
			}
			if distribution != "" {
				cfg.Workload.Distribution = distribution
			}
			return a.bench(cmd.Context(), f, cfg, workload, fill)
		},
	}
	f.addNamespace(cmd)
	f.addWrite(cmd)
	f.addRead(cmd)
	fl := cmd.Flags()
	cfg.Threads, cfg.Records, cfg.ValueBytes = 64, 100_000, 1024
	cfg.Workload, _ = bench.Core(workload)
	fl.Var(&value[bench.Workload]{&cfg.Workload, "letter", workload, func(s string) (bench.Workload, error) {
		w, err := bench.Core(s)
		workload = s
		return w, err
	}}, "workload", "a to f")
	fl.Var(chanceFlag(&reads), "reads", "instead of a workload: the share of reads, 0 to 1; the rest is updates")
	cmd.MarkFlagsMutuallyExclusive("workload", "reads")
	fl.Var(&value[bench.Distribution]{&distribution, "name", "", func(s string) (bench.Distribution, error) {
		if d := bench.Distribution(s); slices.Contains(bench.Distributions, d) {
			return d, nil
		}
		return "", errors.New("want uniform, zipfian or latest")
	}}, "distribution", "uniform, zipfian or latest (default the workload's)")
	fl.Var(durationFlag(&cfg.Duration, 10*time.Second, time.Millisecond), "duration", "how long the load lasts")
	fl.Var(countFlag(&cfg.Threads, 1, 100_000), "threads", "operations under way at once (default 64)")
	fl.Var(rateFlag(&cfg.Target), "target", "operations a second (default as many as are answered)")
	fl.Var(countFlag(&cfg.Records, 2, math.MaxInt32), "records", "number of records (default 100000)")
	fl.Var(countFlag(&cfg.ValueBytes, 0, 16<<20), "value-bytes", "size of a value (default 1024)")
	fl.BoolVar(&fill, "fill", false, "store every record first, so that reads find something")
	return cmd
}

// rateFlag is a number above 0.
func rateFlag(target *float64) pflag.Value {
	return &value[float64]{target, "rate", "", func(s string) (float64, error) {
		r, err := strconv.ParseFloat(s, 64)
		if err != nil || !(r > 0) || math.IsInf(r, 0) {
			return 0, errors.New("want a number above 0")
		}
		return r, nil
	}}
}

// latencyDoc is a distribution in a document.
type latencyDoc struct {
	Count  int64   `json:"count"`
	MeanMS float64 `json:"mean_ms"`
	P50MS  float64 `json:"p50_ms"`
	P90MS  float64 `json:"p90_ms"`
	P99MS  float64 `json:"p99_ms"`
	P999MS float64 `json:"p999_ms"`
	MaxMS  float64 `json:"max_ms"`
}

type benchDoc struct {
	Workload     string  `json:"workload,omitempty"`
	Distribution string  `json:"distribution"`
	Threads      int     `json:"threads"`
	Target       float64 `json:"target_per_second,omitempty"`
	ValueBytes   int     `json:"value_bytes"`
	Records      int     `json:"records"`
	ElapsedMS    float64 `json:"elapsed_ms"`
	Operations   int64   `json:"operations"`
	PerSecond    float64 `json:"per_second"`
	// Latencies are those of the kinds of operations that there were.
	Latencies map[string]latencyDoc `json:"latencies"`
	NotFound  int64                 `json:"reads_not_found"`
	Errors    int64                 `json:"errors"`
}

func latencyDocOf(l bench.Latency) latencyDoc {
	ms := func(us int64) float64 { return float64(us) / 1000 }
	return latencyDoc{l.Count, math.Round(l.Mean) / 1000, ms(l.P50), ms(l.P90), ms(l.P99), ms(l.P999), ms(l.Max)}
}

func (a *App) bench(ctx context.Context, f *dataFlags, cfg bench.Config, workload string, fill bool) error {
	c, err := a.openClient(ctx, a.flags.timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	cfg.Stores, cfg.Timeout = []bench.Store{bench.Kvasir(c, f.options()...)}, a.flags.timeout
	if fill {
		if err := bench.Fill(ctx, cfg); err != nil {
			return fmt.Errorf("fill: %w", err)
		}
	}
	last := bench.Progress{}
	res, err := bench.Run(ctx, cfg, func(p bench.Progress) {
		if a.ErrTerminal {
			fmt.Fprintf(a.Stderr, "%s%s  %s operations/s", clearLine, durationText(p.Elapsed.Round(time.Second)), countText(p.Done-last.Done))
			if p.Failed > 0 {
				fmt.Fprintf(a.Stderr, ", %s failed so far", countText(p.Failed))
			}
		}
		last = p
	})
	if a.ErrTerminal {
		fmt.Fprint(a.Stderr, clearLine)
	}
	if err != nil {
		return err
	}
	doc := benchDoc{
		workload, string(cfg.Workload.Distribution), cfg.Threads, cfg.Target, cfg.ValueBytes, cfg.Records,
		math.Round(res.Elapsed.Seconds() * 1000), res.Operations, math.Round(res.PerSecond), map[string]latencyDoc{}, res.NotFound, res.Errors,
	}
	for k, l := range res.Kinds {
		if l.Count > 0 {
			doc.Latencies[bench.Kind(k).String()] = latencyDocOf(l)
		}
	}
	if err := a.print(doc, func(w io.Writer) { writeBench(w, cfg, workload, res) }); err != nil {
		return err
	}
	if res.Errors > 0 {
		return errors.New(countText(res.Errors) + " operations failed; the first: " + res.FirstError)
	}
	return nil
}

func writeBench(w io.Writer, cfg bench.Config, workload string, res bench.Result) {
	if workload != "" {
		fmt.Fprintf(w, "workload %s: ", workload)
	}
	fmt.Fprintf(w, "%s operations/s over %s", countText(int64(res.PerSecond)), durationText(res.Elapsed))
	if cfg.Target > 0 {
		fmt.Fprintf(w, ", of %s wanted", countText(int64(cfg.Target)))
	}
	fmt.Fprintf(w, "; %d threads, %s records, %s, values of %s\n\n", cfg.Threads, countText(int64(cfg.Records)), cfg.Workload.Distribution, sizeText(uint64(cfg.ValueBytes)))
	t := newTable("", ">COUNT", ">MEAN", ">P50", ">P90", ">P99", ">P99.9", ">MAX")
	for k, l := range res.Kinds {
		if l.Count == 0 {
			continue
		}
		us := func(n int64) string { return durationText(time.Duration(n) * time.Microsecond) }
		t.add(bench.Kind(k).String(), countText(l.Count), us(int64(l.Mean)), us(l.P50), us(l.P90), us(l.P99), us(l.P999), us(l.Max))
	}
	t.write(w)
	if res.NotFound > 0 {
		fmt.Fprintf(w, "\n%s reads found nothing: --fill stores every record first\n", countText(res.NotFound))
	}
}
