package quorum

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// result is what was measured of a cell of a table, by round.
type result struct {
	Part   string  `json:"part"`
	Row    string  `json:"row"`
	Series string  `json:"series"`
	Load   string  `json:"load"`
	Count  []int64 `json:"count"`
	P50    []int64 `json:"p50_us"`
	P99    []int64 `json:"p99_us"`
	// Mended is how many gets, of all rounds, mended replicas before they answered.
	Mended int64 `json:"mended,omitempty"`
}

// results are what was measured, in the order in which it was first.
type results struct {
	On string `json:"host"`
	plan
	Results []*result `json:"results"`
}

func (rs *results) add(in *part, row, series string, l load, took bench.Latency) *result {
	r := rs.find(in, row, series, l)
	if r == nil {
		r = &result{Part: in.title, Row: row, Series: series, Load: l.name}
		rs.Results = append(rs.Results, r)
	}
	r.Count, r.P50, r.P99 = append(r.Count, took.Count), append(r.P50, took.P50), append(r.P99, took.P99)
	return r
}

// find returns nil where nothing was measured.
func (rs *results) find(in *part, row, series string, l load) *result {
	for _, r := range rs.Results {
		if r.Part == in.title && r.Row == row && r.Series == series && r.Load == l.name {
			return r
		}
	}
	return nil
}

// rows are those of a part.
func (rs *results) rows(in *part) (out []string) {
	for _, r := range rs.Results {
		if r.Part == in.title && !slices.Contains(out, r.Row) {
			out = append(out, r.Row)
		}
	}
	return out
}

// median returns that of microseconds, in ms.
func median(us []int64) float64 {
	return float64(slices.Sorted(slices.Values(us))[len(us)/2]) / 1000
}

// milliseconds writes few digits.
func milliseconds(ms float64) string {
	switch {
	case ms < 10:
		return fmt.Sprintf("%.2f", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f", ms)
	}
	return fmt.Sprintf("%.0f", ms)
}

// report prints tables and pictures in Markdown.
func (rs *results) report(w io.Writer) {
	fmt.Fprintf(w, "\n%s. Medians of %d rounds of %v each, in ms; %v from and to nodes that are far.\n", rs.On, rs.Rounds, rs.Duration, rs.Delay)
	rs.table(w, farNear)
	rs.ratios(w)
	rs.table(w, farAny)
	fmt.Fprintf(w, "\n![%s; %s](pictures/%s)\n", farNear.title, farAny.title, farPicture)
	rs.table(w, noneFar)
	fmt.Fprintf(w, "\n![Settings for reads and for writes; %s; %s](pictures/%s)\n", noneFar.title, farNear.title, settingsPicture)
	rs.table(w, staleGets)
	fmt.Fprintf(w, "\nOf the gets with blocking repair ")
	for i, row := range rs.rows(staleGets) {
		var gets, mended int64
		for _, l := range loads {
			r := rs.find(staleGets, row, "blocking", l)
			mended += r.Mended
			for _, n := range r.Count {
				gets += n
			}
		}
		fmt.Fprintf(w, "%s%.1f%% (%s stale)", []string{"", ", "}[min(i, 1)], 100*float64(mended)/float64(gets), row)
	}
	fmt.Fprintf(w, " mended some.\n\n![%s](pictures/%s)\n", staleGets.title, stalePicture)
}

func (rs *results) table(w io.Writer, in *part) {
	fmt.Fprintf(w, "\n%s:\n\n| | callers |", in.title)
	for _, s := range in.series {
		fmt.Fprintf(w, " %s p50 | p99 |", s)
	}
	fmt.Fprintf(w, "\n|---|---|%s\n", strings.Repeat("---|", 2*len(in.series)))
	for _, row := range rs.rows(in) {
		for _, l := range loads {
			fmt.Fprintf(w, "| %s | %s |", row, l.name)
			for _, s := range in.series {
				r := rs.find(in, row, s, l)
				fmt.Fprintf(w, " %s | %s |", milliseconds(median(r.P50)), milliseconds(median(r.P99)))
			}
			fmt.Fprintln(w)
		}
	}
}

// ratios says how many times longer one waits for all replicas than for 40% of them.
func (rs *results) ratios(w io.Writer) {
	fmt.Fprintf(w, "\n| all over 40%% | callers | p50 | p99 | aim |\n|---|---|---|---|---|\n")
	for _, o := range operations {
		for _, l := range loads {
			all, some := rs.find(farNear, every.name, o, l), rs.find(farNear, percent.name, o, l)
			fmt.Fprintf(w, "| %s | %s | %.1f | %.1f | ≥ 3 |\n", o, l.name, median(all.P50)/median(some.P50), median(all.P99)/median(some.P99))
		}
	}
}

func (rs *results) save(file string) error {
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}
