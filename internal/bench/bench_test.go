package bench_test

import (
	"context"
	"strings"
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
		cfg := bench.Config{Clients: []*client.Client{c}, Callers: 4, Operations: 1000, ReadRatio: 0.5, Keys: 100, ValueBytes: 20, Zipfian: true}
		if err := bench.Fill(context.Background(), cfg); err != nil {
			t.Fatal(err)
		}
		res, err := bench.Run(context.Background(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.Gets.Count+res.Puts.Count != 1000 || res.Errors != 0 || res.NotFoundGets != 0 || res.PerSecond <= 0 || res.Gets.Count < 300 || res.Puts.P50 <= 0 || res.Puts.P99 < res.Puts.P50 {
			t.Errorf("result %+v", res)
		}
		// A duration ends a run too, and progress is told of each second.
		cfg.Operations, cfg.Duration, cfg.Zipfian = 0, 3500*time.Millisecond, false
		told := 0
		if res, err = bench.Run(context.Background(), cfg, func(time.Duration, int64) { told++ }); err != nil || told != 3 || res.Elapsed < 3500*time.Millisecond || res.Elapsed > 5*time.Second {
			t.Errorf("told %d times, result %+v, %v", told, res, err)
		}
		// What fails is counted and named.
		cfg.Duration, cfg.Operations, cfg.Options = 0, 20, []client.CallOption{client.Namespace("nope")}
		if res, err = bench.Run(context.Background(), cfg, nil); err != nil || res.Errors != 20 || !strings.Contains(res.FirstError, "nope") {
			t.Errorf("result %+v, %v", res, err)
		}
	})
}

func TestValidate(t *testing.T) {
	good := bench.Config{Clients: make([]*client.Client, 1), Callers: 1, Operations: 1, Keys: 1}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func(*bench.Config){
		"no client":  func(c *bench.Config) { c.Clients = nil },
		"callers":    func(c *bench.Config) { c.Callers = 0 },
		"neither":    func(c *bench.Config) { c.Operations = 0 },
		"read ratio": func(c *bench.Config) { c.ReadRatio = 1.1 },
		"keys":       func(c *bench.Config) { c.Keys = 0 },
		"value size": func(c *bench.Config) { c.ValueBytes = -1 },
	} {
		bad := good
		harm(&bad)
		if err := bad.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error = %v, want one with %q", err, name)
		}
	}
}
