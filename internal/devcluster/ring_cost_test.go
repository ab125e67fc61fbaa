package devcluster_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// What a move costs those who use the cluster meanwhile, when it gives way to commits,
// when it may take little bandwidth, and when neither: a table for docs/performance.md.
func TestE2EWhatAMoveCosts(t *testing.T) {
	if !full {
		t.Skip("measures; in make e2e")
	}
	var table strings.Builder
	fmt.Fprintln(&table, "| | p50 ms | p99 ms | slowest ms | operations/s | moved | in |\n|---|---|---|---|---|---|---|")
	for _, pace := range []struct{ name, delay, bytes string }{
		{"without pacing", "0s", "68719476736"},
		{"the defaults", "2ms", "67108864"},
		{"4 MiB a second", "0s", "4194304"},
	} {
		t.Run(pace.name, func(t *testing.T) {
			r := startIn(t, 3, 1, 1, "--move_commit_delay", pace.delay, "--move_bytes_per_second", pace.bytes)
			data := large{r: r, c: r.client(), keys: 60_000, size: 4 << 10}
			data.each(data.keys, data.put)
			names := append([]string{"node1", "node2", "node3"}, r.addNodes(1)...)
			l := loadOn(t, data.c, 800)
			time.Sleep(3 * time.Second)
			row := func(what string, began time.Time, bytes uint64) {
				took, all := time.Since(began), l.latencies()
				ms := func(q float64) float64 {
					return float64(all[int(q*float64(len(all)-1))].Microseconds()) / 1e3
				}
				fmt.Fprintf(&table, "| %s | %.1f | %.1f | %.0f | %.0f | %d MB | %.0f s |\n", what, ms(0.5), ms(0.99), ms(1), float64(len(all))/took.Seconds(), bytes/1e6, took.Seconds())
			}
			l.latencies()
			began := time.Now()
			time.Sleep(10 * time.Second)
			row(pace.name+": nothing moves", began, 0)
			began = time.Now()
			op := r.done(r.begin("apply", names).GetId(), 10*time.Minute, nil)
			row(pace.name+": a fourth node is filled", began, op.GetMovedBytes())
			began = time.Now()
			op = r.done(r.begin("decommission", slices.Clone(names[:3]), names[3]).GetId(), 10*time.Minute, nil)
			row(pace.name+": it leaves again", began, op.GetMovedBytes())
			l.end()
		})
	}
	t.Log("\n" + table.String())
}
