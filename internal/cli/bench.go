package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
)

func (a *App) benchCommand() *cobra.Command {
	f := &dataFlags{}
	cfg := bench.Config{}
	var fill bool
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure puts and gets through the client library",
		Long: `Makes load through the client library and prints what was measured: operations per
second and latencies. Each of --callers sends its next operation when the last one has
been answered. Keys are user and 16 digits; the namespace keeps them afterwards.

What an operation rests on is the namespace's: quorums, replicas, and a sync to disk of
each replica that acknowledges.`,
		Example: `  kvctl bench --fill --reads 0 --duration 10s
  kvctl bench --reads 1 -r one --callers 64
  kvctl bench --reads 0.5 --zipfian -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.bench(cmd.Context(), f, cfg, fill)
		},
	}
	f.addNamespace(cmd)
	f.addWrite(cmd)
	f.addRead(cmd)
	fl := cmd.Flags()
	cfg.Callers, cfg.Keys, cfg.ValueBytes = 16, 100_000, 1024
	fl.Var(durationFlag(&cfg.Duration, 10*time.Second, time.Millisecond), "duration", "how long the load lasts")
	fl.Var(countFlag(&cfg.Callers, 1, 100_000), "callers", "operations under way at once (default 16)")
	fl.Var(chanceFlag(&cfg.ReadRatio), "reads", "share of gets among the operations, 0 to 1 (default 0)")
	fl.Var(countFlag(&cfg.Keys, 1, math.MaxInt), "keys", "number of keys (default 100000)")
	fl.Var(countFlag(&cfg.ValueBytes, 0, 16<<20), "value-bytes", "size of a value (default 1024)")
	fl.BoolVar(&cfg.Zipfian, "zipfian", false, "prefer some keys (Zipf, exponent 1.01)")
	fl.BoolVar(&fill, "fill", false, "store every key first, so that gets find something")
	return cmd
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
	PerSecond  float64    `json:"per_second"`
	ElapsedMS  float64    `json:"elapsed_ms"`
	Callers    int        `json:"callers"`
	ValueBytes int        `json:"value_bytes"`
	Keys       int        `json:"keys"`
	Puts       latencyDoc `json:"puts"`
	Gets       latencyDoc `json:"gets"`
	NotFound   int64      `json:"gets_not_found"`
	Errors     int64      `json:"errors"`
}

func latencyDocOf(l bench.Latency) latencyDoc {
	ms := func(us int64) float64 { return float64(us) / 1000 }
	return latencyDoc{l.Count, math.Round(l.Mean) / 1000, ms(l.P50), ms(l.P90), ms(l.P99), ms(l.P999), ms(l.Max)}
}

func (a *App) bench(ctx context.Context, f *dataFlags, cfg bench.Config, fill bool) error {
	c, err := a.openClient(ctx, a.flags.timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	cfg.Clients, cfg.Options, cfg.Timeout = []*client.Client{c}, f.options(), a.flags.timeout
	if fill {
		if err := bench.Fill(ctx, cfg); err != nil {
			return fmt.Errorf("fill: %w", err)
		}
	}
	last := int64(0)
	res, err := bench.Run(ctx, cfg, func(at time.Duration, done int64) {
		if a.ErrTerminal {
			fmt.Fprintf(a.Stderr, "%s%s  %s operations/s", clearLine, durationText(at.Round(time.Second)), countText(done-last))
		}
		last = done
	})
	if a.ErrTerminal {
		fmt.Fprint(a.Stderr, clearLine)
	}
	if err != nil {
		return err
	}
	doc := benchDoc{
		math.Round(res.PerSecond), math.Round(res.Elapsed.Seconds() * 1000), cfg.Callers, cfg.ValueBytes, cfg.Keys,
		latencyDocOf(res.Puts), latencyDocOf(res.Gets), res.NotFoundGets, res.Errors,
	}
	if err := a.print(doc, func(w io.Writer) { writeBench(w, cfg, res) }); err != nil {
		return err
	}
	if res.Errors > 0 {
		return errors.New(countText(res.Errors) + " operations failed; the first: " + res.FirstError)
	}
	return nil
}

func writeBench(w io.Writer, cfg bench.Config, res bench.Result) {
	fmt.Fprintf(w, "%s operations/s over %s, %d callers, %s keys, values of %s\n\n",
		countText(int64(res.PerSecond)), durationText(res.Elapsed), cfg.Callers, countText(int64(cfg.Keys)), sizeText(uint64(cfg.ValueBytes)))
	t := newTable("", ">COUNT", ">MEAN", ">P50", ">P90", ">P99", ">P99.9", ">MAX")
	for _, row := range []struct {
		name string
		l    bench.Latency
	}{{"put", res.Puts}, {"get", res.Gets}} {
		if row.l.Count == 0 {
			continue
		}
		us := func(n int64) string { return durationText(time.Duration(n) * time.Microsecond) }
		t.add(row.name, countText(row.l.Count), us(int64(row.l.Mean)), us(row.l.P50), us(row.l.P90), us(row.l.P99), us(row.l.P999), us(row.l.Max))
	}
	t.write(w)
	if res.NotFoundGets > 0 {
		fmt.Fprintf(w, "\n%s gets found nothing: --fill stores every key first\n", countText(res.NotFoundGets))
	}
}
