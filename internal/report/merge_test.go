package report_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/report"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// drawJSON draws a value that is likely to equal, to nearly equal, or to differ in
// type from others.
func drawJSON() *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.SampledFrom([]string{
			"1", "1.0", "1e0", "-0", "0.1", "0.10", "1e-400", "-1e400", "1e600", "9223372036854775807", "-9223372036854775808", "9223372036854775808",
			`"1"`, `"a"`, `"\u0061"`, `"b"`, `""`, "true", "false", "null", "[1]", "[ 1 ]", `{"x":1}`,
		}),
		rapid.Map(rapid.Int64(), func(n int64) string { return fmt.Sprint(n) }),
		rapid.Map(rapid.Int64Range(-1000, 1000), func(n int64) string { return fmt.Sprintf("%d.%02d", n, n&63) }),
		rapid.Map(rapid.Float64(), func(f float64) string { return fmt.Sprint(f) }),
	)
}

func drawRecord(t *rapid.T) record.Record {
	r := record.Record{
		Version: record.Version{Time: hlc.At(rapid.Int64Range(nowMillis-5, nowMillis).Draw(t, "written")), Incarnation: 1},
		Kind:    record.Value,
	}
	switch rapid.IntRange(0, 9).Draw(t, "kind") {
	case 0:
		r.Kind = record.Tombstone
		return r
	case 1:
		r.ExpiresAt = nowMillis + rapid.Int64Range(-1, 2).Draw(t, "expires")
	}
	r.Payload = fmt.Appendf(nil, `{"a":%s,"b":%s}`, drawJSON().Draw(t, "a"), drawJSON().Draw(t, "b"))
	if rapid.IntRange(0, 9).Draw(t, "cut") == 0 {
		r.Payload = r.Payload[:len(r.Payload)-1]
	}
	return r
}

// wire returns groups as they come out of the other end.
func wire(t *rapid.T, groups []*kvv1.ReportGroup) []*kvv1.ReportGroup {
	b, err := proto.Marshal(&kvv1.ReportPage{Groups: groups})
	if err != nil {
		t.Fatal(err)
	}
	var page kvv1.ReportPage
	if err := proto.Unmarshal(b, &page); err != nil {
		t.Fatal(err)
	}
	return page.GetGroups()
}

// drawQuery draws a query that asks for every measure.
func drawQuery(t *rapid.T) *report.Query {
	groupings := [][]string{nil, {"a"}, {"b", "a"}, {"@written"}}
	in := &kvv1.ReportAggregate{GroupBy: rapid.SampledFrom(groupings).Draw(t, "group by")}
	for _, text := range []string{"count", "count(a)", "sum(a)", "min(a)", "max(a)", "avg(a)", "sum(b)", "max(@expires)"} {
		m, err := report.ParseMeasure(text)
		if err != nil {
			t.Fatal(err)
		}
		in.Measures = append(in.Measures, m)
	}
	q, err := report.Compile(&kvv1.ReportQuery{What: &kvv1.ReportQuery_Aggregate{Aggregate: in}})
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// gather adds random records to one accumulator and to one of the parts each.
func gather(t *rapid.T, one *report.Accumulator, parts []*report.Accumulator) {
	for i := range rapid.IntRange(0, 40).Draw(t, "records") {
		key, rec := fmt.Appendf(nil, "k%d", i), drawRecord(t)
		part := parts[rapid.IntRange(0, len(parts)-1).Draw(t, "part")]
		for _, a := range []*report.Accumulator{one, part} {
			if _, err := a.Add(key, rec, nowMillis); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func merge(t *rapid.T, into, from *report.Accumulator) {
	groups := wire(t, from.Partial())
	slices.Reverse(groups)
	if err := into.Merge(groups); err != nil {
		t.Fatal(err)
	}
}

// Merging the parts of any split of the records, in any order and by way of other
// merges, gives what one accumulator gives.
func TestMergeEqualsOneAccumulator(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := drawQuery(t)
		one, merged, between := q.NewAccumulator(1000), q.NewAccumulator(1000), q.NewAccumulator(1000)
		parts := make([]*report.Accumulator, rapid.IntRange(1, 5).Draw(t, "parts"))
		for i := range parts {
			parts[i] = q.NewAccumulator(1000)
		}
		gather(t, one, parts)
		via := rapid.IntRange(0, len(parts)).Draw(t, "by way of another")
		for i, part := range rapid.Permutation(parts).Draw(t, "order") {
			if i < via {
				merge(t, between, part)
			} else {
				merge(t, merged, part)
			}
		}
		merge(t, merged, between)
		if diff := cmp.Diff(one.Result(), merged.Result()); diff != "" {
			t.Errorf("merged (-one +merged):\n%s", diff)
		}
		if one.Skipped() != merged.Skipped() {
			t.Errorf("skipped %d, merged %d", one.Skipped(), merged.Skipped())
		}
	})
}
