package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
)

func (a *App) reportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Count, list and sum records on the reporting nodes",
		Long: `Reports of a namespace's records, read on the reporting nodes: what they cost is theirs,
and reads and writes do not feel them. A report is exact: every write that was acknowledged
before it began is in it. Each reporting node answers from one snapshot.

The namespace needs copies for reports (kvctl namespace set NAME --reporting degrade) and the
cluster a reporting node (kvnode --role reporting). Copies that are not in sync refuse, unless
--max-staleness allows them to lack what is newer than that; see kvctl reporting status.

Conditions, each with a --where, all hold:
  'balance >= 100'       == != < <= > >= compare, as numbers if both are
  'name ~ ann'           ~ contains, ^= begins with
  'exists(address.city)' or missing(...)
A field is @key, @value, @size (bytes), @written, @expires (times), or a path into values that
are JSON: balance, address.city, tags.0. Literals with spaces are quoted.

--timeout is for how long a node may say nothing, and for how long copies are waited for that
are not in sync yet, not for the report as a whole.`,
		Example: `  kvctl report count -n orders
  kvctl report scan -n orders --prefix 2026/ --where 'total > 1000' --limit 20
  kvctl report aggregate -n orders --by country --measure count --measure 'sum(total)'`,
	}
	cmd.AddCommand(a.reportCount(), a.reportScan(), a.reportAggregate())
	return cmd
}

// reportFlags are what all reports have.
type reportFlags struct {
	data               dataFlags
	prefix, start, end string
	where              []string
	staleness          time.Duration
}

func (f *reportFlags) add(cmd *cobra.Command) {
	f.data.addNamespace(cmd)
	l := cmd.Flags()
	l.StringVar(&f.prefix, "prefix", "", "only keys that begin so")
	l.StringVar(&f.start, "start", "", "only keys from this one on")
	l.StringVar(&f.end, "end", "", "only keys before this one")
	l.StringArrayVar(&f.where, "where", nil, "condition that records meet, see kvctl report --help; may be repeated")
	f.addStaleness(cmd)
}

func (f *reportFlags) addStaleness(cmd *cobra.Command) {
	cmd.Flags().Var(durationFlag(&f.staleness, 0, 0), "max-staleness", "let copies that are not in sync answer, if they lack nothing older than this: 10s, 5m (default: none)")
}

// report returns what the flags ask for.
func (f *reportFlags) report() client.Report {
	return client.Report{
		Prefix: []byte(f.prefix), Start: []byte(f.start), End: []byte(f.end), Where: f.where, MaxStaleness: f.staleness,
	}
}

// groups runs a report that asks for measures, and shows how far it is.
func (a *App) groups(ctx context.Context, f *reportFlags, by, measures []string) ([]client.Group, client.ReportStats, error) {
	c, err := a.openClient(ctx, a.flags.timeout, client.WithPatience(a.flags.timeout)) // copies may be about to be in sync
	if err != nil {
		return nil, client.ReportStats{}, err
	}
	defer c.Close()
	p := startProgress(a.Stderr, a.ErrTerminal, "reading", 0)
	defer p.end()
	r := f.report()
	r.Progress = func(s client.ReportStats) { p.rows.Store(int64(s.Records)) }
	return c.ReportGroups(ctx, r, by, measures, f.data.options()...)
}

// sayStale says on stderr that an answer is not exact.
func (a *App) sayStale(s client.ReportStats) {
	if !s.InSync {
		a.warn("the answer is not exact: it may lack what was written in the %s before it", durationText(s.Staleness))
	}
}

// statsDoc is what a report rests on.
type statsDoc struct {
	InSync         bool   `json:"in_sync"`
	StalenessMs    int64  `json:"staleness_ms"`
	RecordsScanned uint64 `json:"records_scanned"`
	BytesScanned   uint64 `json:"bytes_scanned"`
	ReportingNodes int    `json:"reporting_nodes"`
}

func statsDocOf(s client.ReportStats) statsDoc {
	return statsDoc{s.InSync, s.Staleness.Milliseconds(), s.Records, s.Bytes, s.Nodes}
}

func (a *App) reportCount() *cobra.Command {
	f := &reportFlags{}
	cmd := &cobra.Command{
		Use:   "count",
		Short: "Count records",
		Example: `  kvctl report count -n orders
  kvctl report count -n orders --where 'country == "New Zealand"' -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			groups, stats, err := a.groups(cmd.Context(), f, nil, []string{"count"})
			if err != nil {
				return err
			}
			a.sayStale(stats)
			doc := struct {
				Count uint64 `json:"count"`
				statsDoc
			}{groups[0].Measures[0].Count, statsDocOf(stats)}
			return a.print(doc, func(w io.Writer) { fmt.Fprintln(w, doc.Count) })
		},
	}
	f.add(cmd)
	return cmd
}

func (a *App) reportScan() *cobra.Command {
	f := &reportFlags{}
	var limit int
	var keysOnly bool
	cmd := &cobra.Command{
		Use:   "scan",
		Short: "List records in key order",
		Long: `Lists records in key order, as kvctl scan does: a line with key, tab and value each. All
that one reporting node has is of one moment. To write records to a file, see
kvctl export --from reporting.`,
		Example: `  kvctl report scan -n orders --prefix 2026/
  kvctl report scan -n orders --where 'total > 1000' --limit 20 -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.openClient(cmd.Context(), a.flags.timeout, client.WithPatience(a.flags.timeout))
			if err != nil {
				return err
			}
			defer c.Close()
			r, stats := f.report(), client.ReportStats{InSync: true}
			r.Progress = func(s client.ReportStats) { stats = s }
			err = a.list(c.ReportRows(cmd.Context(), r, client.RowOptions{KeysOnly: keysOnly, Limit: limit}, f.data.options()...), keysOnly)
			a.sayStale(stats)
			return err
		},
	}
	f.add(cmd)
	cmd.Flags().Var(countFlag(&limit, 0, math.MaxInt), "limit", "most records to list, 0 for all (default 0)")
	cmd.Flags().BoolVar(&keysOnly, "keys-only", false, "leave the values out")
	return cmd
}

// aggregateDoc is a group of a report. Values are texts and numbers as they were written; what
// is null or missing is null, and so is a measure of nothing.
type aggregateDoc struct {
	Group    map[string]any `json:"group"`
	Measures map[string]any `json:"measures"`
}

func (a *App) reportAggregate() *cobra.Command {
	f := &reportFlags{}
	var by, measures []string
	cmd := &cobra.Command{
		Use:   "aggregate",
		Short: "Count, sum, and find minima, maxima and averages, by group",
		Long: `Measures records: count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD), avg(FIELD), each with
a --measure. With --by it does so for each group of records that have the same values in the
given fields. Sums are exact, of whole and of decimal numbers. What is not a number is left out
of sums and averages, and counted on stderr. Fields and conditions: see kvctl report --help.`,
		Example: `  kvctl report aggregate -n bank --measure 'sum(balance)'
  kvctl report aggregate -n orders --by country --by year --measure count --measure 'avg(total)'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(measures) == 0 {
				return usagef("--measure is missing: want count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD) or avg(FIELD), or several of them")
			}
			groups, stats, err := a.groups(cmd.Context(), f, by, measures)
			if err != nil {
				return err
			}
			a.sayStale(stats)
			if stats.Skipped > 0 {
				a.warn("%s left out of measures, as they are of the wrong type", plural(stats.Skipped, "value"))
			}
			docs := []aggregateDoc{}
			for _, g := range groups {
				docs = append(docs, aggregateDocOf(g, by, measures))
			}
			return a.print(docs, func(w io.Writer) { writeGroups(w, groups, by, measures) })
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&by, "by", nil, "field whose values make the groups; may be repeated")
	cmd.Flags().StringArrayVar(&measures, "measure", nil, "what to measure of each group; may be repeated (required)")
	return cmd
}

func aggregateDocOf(g client.Group, by, measures []string) aggregateDoc {
	d := aggregateDoc{map[string]any{}, map[string]any{}}
	for i, field := range by {
		d.Group[field] = fieldDoc(g.Keys[i])
	}
	for i, m := range measures {
		d.Measures[m] = fieldDoc(g.Measures[i].Value)
	}
	return d
}

// writeGroups writes a line for each group.
func writeGroups(w io.Writer, groups []client.Group, by, measures []string) {
	titles := append([]string{}, by...)
	for _, m := range measures {
		titles = append(titles, ">"+m)
	}
	t := newTable(titles...)
	for _, g := range groups {
		var cells []any
		for _, k := range g.Keys {
			cells = append(cells, valueText(k))
		}
		for _, m := range g.Measures {
			cells = append(cells, valueText(m.Value))
		}
		t.add(cells...)
	}
	t.write(w)
}

// valueText writes a value of a field on one line.
func valueText(v client.FieldValue) string {
	switch v.Kind {
	case client.MissingValue:
		return "-"
	case client.NullValue:
		return "null"
	case client.TextValue:
		return quoted([]byte(v.Text))
	}
	return v.Text
}

// fieldDoc is a value of a field in a document.
func fieldDoc(v client.FieldValue) any {
	switch v.Kind {
	case client.MissingValue, client.NullValue:
		return nil
	case client.TextValue:
		return v.Text
	}
	return json.RawMessage(v.Text) // it is JSON as it stands
}
