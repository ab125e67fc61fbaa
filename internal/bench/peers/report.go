package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// report prints a table for each workload, and what the numbers were had for. Tables are
// Markdown that can be read as it is.
func (h *harness) report(w io.Writer) {
	fmt.Fprintf(w, "\n%d records of %d bytes, %d threads, %v a run; medians of what %d round(s) gave, each on fresh servers.\n",
		h.records, h.valueBytes, h.threads, h.duration, h.settings.rounds)
	var versions []string
	for _, k := range h.kinds {
		versions = append(versions, k.name+" "+h.versions[k.name])
	}
	fmt.Fprintf(w, "%s.\nFlushes are those of %s, whoever asked for them. Before the first server ran, the machine showed %s.\n",
		strings.Join(versions, ", "), h.disk.name, h.others)
	for _, letter := range h.workloads {
		fmt.Fprintf(w, "\nWorkload %s:\n\n", strings.ToUpper(letter))
		h.workloadTable(letter).write(w)
	}
	fmt.Fprintf(w, "\nWhat was given for it:\n\n")
	h.guaranteeTable().write(w)
	if len(h.troubles) > 0 {
		fmt.Fprintf(w, "\nBeside the numbers:\n")
		for _, t := range h.troubles {
			fmt.Fprintf(w, "- %s\n", t)
		}
	}
}

// of returns the runs of a system with a workload.
func (h *harness) of(system, workload string) []result {
	var out []result
	for _, r := range h.results {
		if r.System == system && r.Workload == workload {
			out = append(out, r)
		}
	}
	return out
}

func (h *harness) workloadTable(letter string) *table {
	t := &table{rows: [][]string{{
		"", "operations/s", "lowest–highest", "kvasir's ratio", "read p50 ms", "read p99", "write p50 ms", "write p99",
		"server CPU µs/op", "memory MiB", "of a replica", "idle", "flushes/s",
	}}}
	kvasirs := medianOf(h.of(kvasirKind.name, letter), perSecond)
	for _, k := range h.kinds {
		runs := h.of(k.name, letter)
		if len(runs) == 0 {
			t.rows = append(t.rows, []string{k.name, "none"})
			continue
		}
		median := func(of func(result) float64) float64 { return medianOf(runs, of) }
		ratio := ""
		if own := median(perSecond); k.name != kvasirKind.name && kvasirs > 0 && own > 0 {
			ratio = fmt.Sprintf("%.2f", kvasirs/own)
		}
		slowest := slices.MinFunc(runs, func(a, b result) int { return cmp.Compare(a.PerSecond, b.PerSecond) })
		fastest := slices.MaxFunc(runs, func(a, b result) int { return cmp.Compare(a.PerSecond, b.PerSecond) })
		row := []string{k.name, number(median(perSecond)), number(slowest.PerSecond) + "–" + number(fastest.PerSecond), ratio}
		for _, group := range [][]bench.Kind{{bench.Read}, {bench.Update, bench.Insert, bench.ReadModifyWrite}} {
			row = append(row, latencies(runs, group)...)
		}
		row = append(row,
			number(median(func(r result) float64 { return r.CPUMicros })),
			mebibytes(median(func(r result) float64 { return float64(r.Memory.Total) })),
			mebibytes(median(func(r result) float64 { return float64(r.Memory.Replica) })),
			mebibytes(median(func(r result) float64 { return float64(r.Idle.Replica) })),
			number(median(func(r result) float64 { return r.Flushes })))
		t.rows = append(t.rows, row)
	}
	return t
}

// latencies returns the medians of p50 and p99 of the one kind of a group that was run.
func latencies(runs []result, group []bench.Kind) []string {
	for _, kind := range group {
		name := kind.String()
		if runs[0].Kinds[name].Count > 0 {
			return []string{
				milliseconds(medianOf(runs, func(r result) float64 { return float64(r.Kinds[name].P50) })),
				milliseconds(medianOf(runs, func(r result) float64 { return float64(r.Kinds[name].P99) })),
			}
		}
	}
	return []string{"", ""}
}

// guaranteeTable puts what reached the disk beside what is promised.
func (h *harness) guaranteeTable() *table {
	head := []string{""}
	for _, letter := range h.workloads {
		head = append(head, "flushes/s in "+strings.ToUpper(letter))
	}
	t := &table{rows: [][]string{append(head, "a write is acknowledged when it is", "a read")}, left: 2}
	for _, k := range h.kinds {
		row := []string{k.name}
		for _, letter := range h.workloads {
			text := ""
			if runs := h.of(k.name, letter); len(runs) > 0 {
				text = number(medianOf(runs, func(r result) float64 { return r.Flushes }))
			}
			row = append(row, text)
		}
		t.rows = append(t.rows, append(row, k.Write, k.Read))
	}
	return t
}

func perSecond(r result) float64 { return r.PerSecond }

// medianOf returns the median of a property, 0 without runs.
func medianOf(runs []result, of func(result) float64) float64 {
	values := make([]float64, len(runs))
	for i, r := range runs {
		values[i] = of(r)
	}
	return median(values)
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// number writes a number with few digits, and commas between thousands.
func number(f float64) string {
	if f < 10 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0")
	}
	digits := fmt.Sprintf("%.0f", f)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func milliseconds(micros float64) string {
	if micros < 10_000 {
		return fmt.Sprintf("%.2f", micros/1000)
	}
	return fmt.Sprintf("%.1f", micros/1000)
}

func mebibytes(n float64) string { return number(n / (1 << 20)) }

// table is rows, the first the heads. All columns but the first and the last left ones are
// of numbers.
type table struct {
	rows [][]string
	left int
}

func (t *table) write(w io.Writer) {
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	isText := func(i int) bool { return i == 0 || i >= len(widths)-t.left }
	for n, row := range t.rows {
		for i, width := range widths {
			cell := ""
			if i < len(row) {
				cell = row[i]
			}
			padding := strings.Repeat(" ", width-utf8.RuneCountInString(cell))
			if isText(i) {
				fmt.Fprintf(w, "| %s%s ", cell, padding)
			} else {
				fmt.Fprintf(w, "| %s%s ", padding, cell)
			}
		}
		fmt.Fprintln(w, "|")
		if n > 0 {
			continue
		}
		for i, width := range widths {
			if isText(i) {
				fmt.Fprintf(w, "|%s", strings.Repeat("-", width+2))
			} else {
				fmt.Fprintf(w, "|%s:", strings.Repeat("-", width+1))
			}
		}
		fmt.Fprintln(w, "|")
	}
}
