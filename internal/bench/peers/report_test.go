package main

import (
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.values); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.values, got, c.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for f, want := range map[float64]string{0: "0", 2: "2", 2.34: "2.3", 12.6: "13", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := number(f); got != want {
			t.Errorf("number(%v) = %s, want %s", f, got, want)
		}
	}
}

func TestWorkloadTable(t *testing.T) {
	h := &harness{settings: settings{workloads: []string{"a"}}, kinds: []kind{kvasirKind, etcdKind, redisKind}}
	for round, speed := range []float64{4000, 9000, 6000} {
		for _, s := range []struct {
			name   string
			factor float64
		}{{"kvasir", 1}, {"etcd", 0.25}} {
			h.results = append(h.results, result{
				Round: round + 1, System: s.name, Workload: "a", PerSecond: speed * s.factor, CPUMicros: 51.4, Flushes: 700,
				Kinds:  map[string]latency{"read": {Count: 1, P50: 1500, P99: 20_040}, "update": {Count: 1, P50: 2500, P99: 30_000}},
				Memory: memory{Total: 300 << 20, Replica: 90 << 20}, Idle: memory{Replica: 30 << 20},
			})
		}
	}
	var out strings.Builder
	h.workloadTable("a").write(&out)
	const want = `
|        | operations/s | lowest–highest | kvasir's ratio | read p50 ms | read p99 | write p50 ms | write p99 | server CPU µs/op | memory MiB | of a replica | idle | flushes/s |
|--------|-------------:|---------------:|---------------:|------------:|---------:|-------------:|----------:|-----------------:|-----------:|-------------:|-----:|----------:|
| kvasir |        6,000 |    4,000–9,000 |                |        1.50 |     20.0 |         2.50 |      30.0 |               51 |        300 |           90 |   30 |       700 |
| etcd   |        1,500 |    1,000–2,250 |           4.00 |        1.50 |     20.0 |         2.50 |      30.0 |               51 |        300 |           90 |   30 |       700 |
| redis  |         none |                |                |             |          |              |           |                  |            |              |      |           |
`
	if got := "\n" + out.String(); got != want {
		t.Errorf("got:%s\nwant:%s", got, want)
	}
}

func TestParse(t *testing.T) {
	c, err := parse([]string{"-systems", "Kvasir, etcd", "-workloads", "A,f", "-rounds", "2"})
	if err != nil || strings.Join(c.systems, " ") != "kvasir etcd" || strings.Join(c.workloads, " ") != "a f" || c.rounds != 2 || c.records != 100_000 {
		t.Errorf("%+v, %v", c, err)
	}
	for args, want := range map[string]string{
		"-systems cassandra": "cassandra", "-workloads e": `"e"`, "-workloads g": `"g"`, "-systems ,": "no systems",
		"-rounds 0": "at least", "-duration 1ms": "at least", "now": "now",
	} {
		if _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error = %v, want one with %q", args, err, want)
		}
	}
}
