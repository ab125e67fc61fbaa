package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/cli/parquet"
	"github.com/kvasirdb/kvasir/internal/cli/rows"
)

// exportFlags are those of an export.
type exportFlags struct {
	reportFlags
	rows rowFlags
	// parquet is set for that format, text for columns of text in it.
	parquet, text bool
	// reporting is set where the records come from the reporting nodes.
	reporting bool
}

func (a *App) exportCommand() *cobra.Command {
	f := &exportFlags{}
	var format, from string
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write records as rows, in key order",
		Long: `Writes records to stdout as rows, in key order. With the --format and --key-column of
an import, the rows are those that were imported.

A header row is not stored: --header is the row to write first, and --key-column may
then name one of its columns. Records that the format cannot hold are reported, and
the exit code is 1; jsonl and parquet hold all. Times to live are not exported, but by parquet,
whose columns are key, value, written and expires. --timeout is for each request (default 30s).

--from reporting reads the reporting nodes: the rows of one are of one moment, hold every write
that was acknowledged before, and reads and writes do not feel the export (see kvctl report).`,
		Example: `  kvctl export --format tsv --key-column 1 > packages.tsv
  kvctl export --format csv --key-column email --header "$(head -1 people.csv)"
  kvctl export --format jsonl -n archive --prefix 2026/ | gzip > archive.jsonl.gz
  kvctl export --from reporting --format parquet -n orders > orders.parquet`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.complete(cmd, format, from); err != nil {
				return err
			}
			if f.parquet && a.Terminal {
				return usagef("--format parquet is nothing for a terminal: send it to a file (> records.parquet)")
			}
			out, err := a.exportTo(cmd, f)
			if err != nil {
				return err
			}
			return a.export(cmd.Context(), f, out, a.bulkTimeoutOf(cmd))
		},
	}
	f.data.addNamespace(cmd)
	f.data.addRead(cmd)
	l := cmd.Flags()
	l.StringVar(&format, "format", "", "tsv, csv, jsonl or parquet (required)")
	l.StringVar(&from, "from", "nodes", "nodes, by quorum reads, or reporting")
	f.rows.addKeyColumn(cmd)
	l.StringVar(&f.rows.header, "header", "", "header row of tsv or csv to write first, as it stands")
	l.BoolVar(&f.text, "text", false, "with parquet: columns of text instead of bytes; records that are not UTF-8 are refused")
	l.StringVar(&f.prefix, "prefix", "", "only keys that begin so")
	f.addStaleness(cmd)
	return cmd
}

// complete takes in the flags that are words, and refuses those that contradict each other.
func (f *exportFlags) complete(cmd *cobra.Command, format, from string) error {
	changed := cmd.Flags().Changed
	f.parquet, f.reporting = format == "parquet", from == "reporting"
	switch {
	case from != "nodes" && from != "reporting":
		return usagef("--from %q: want nodes or reporting", from)
	case f.reporting && (changed("r") || changed("read-repair")):
		return usagef("-r and --read-repair say nothing with --from reporting: no quorum is read")
	case !f.reporting && changed("max-staleness"):
		return usagef("--max-staleness is for --from reporting")
	case f.parquet && (changed("header") || changed("key-column")):
		return usagef("--header and --key-column are for tsv and csv")
	case !f.parquet && f.text:
		return usagef("--text is for --format parquet")
	case f.parquet || format == "":
		return nil
	}
	var err error
	if f.rows.format, err = rows.ParseFormat(format); err != nil {
		return usagef("--format %q: want tsv, csv, jsonl or parquet", format)
	}
	return nil
}

// destination takes the records of an export. An error of add that is a refusal leaves the
// record out. What ends before it is whole is no file of its format, if that can tell.
type destination interface {
	add(client.Record) error
	end(whole bool) error
}

// refusal says why a format cannot hold a record.
type refusal struct{ error }

// exportTo returns where the records go.
func (a *App) exportTo(cmd *cobra.Command, f *exportFlags) (destination, error) {
	w := bufio.NewWriterSize(a.Stdout, 256<<10)
	if f.parquet {
		return &parquetFile{parquet.NewWriter(w, parquet.Config{KeyText: f.text, ValueText: f.text}), w}, nil
	}
	if f.rows.format == 0 {
		return nil, usagef("--format is missing: want tsv, csv, jsonl or parquet")
	}
	if err := a.checkRows(cmd, &f.rows); err != nil {
		return nil, err
	}
	var header []byte
	if cmd.Flags().Changed("header") {
		header = []byte(f.rows.header)
	}
	layout, err := f.rows.layout(header)
	if err != nil {
		return nil, err
	}
	if header != nil {
		w.Write(header)
		w.WriteByte('\n') // a failure is returned when it ends
	}
	return &rowsFile{layout: layout, w: w}, nil
}

// rowsFile writes records as rows.
type rowsFile struct {
	layout rows.Layout
	w      *bufio.Writer
	row    []byte
}

func (r *rowsFile) add(rec client.Record) (err error) {
	if r.row, err = r.layout.Join(r.row[:0], rec.Key, rec.Value); err != nil {
		return refusal{err}
	}
	r.w.Write(r.row)
	return r.w.WriteByte('\n') // an earlier failure is returned here
}

func (r *rowsFile) end(bool) error { return r.w.Flush() }

// parquetFile writes records as Parquet.
type parquetFile struct {
	p *parquet.Writer
	w *bufio.Writer
}

func (f *parquetFile) add(rec client.Record) error {
	row := parquet.Row{Key: rec.Key, Value: rec.Value, WrittenMillis: rec.Version.Time().UnixMilli()}
	if !rec.ExpiresAt.IsZero() {
		row.ExpiresMillis = rec.ExpiresAt.UnixMilli()
	}
	err := f.p.Write(row)
	if errors.Is(err, parquet.ErrNotText) {
		return refusal{err}
	}
	return err
}

func (f *parquetFile) end(whole bool) error {
	if !whole {
		return nil
	}
	return errors.Join(f.p.Close(), f.w.Flush())
}

// export writes the records of a namespace.
func (a *App) export(ctx context.Context, f *exportFlags, out destination, timeout time.Duration) error {
	c, err := a.openClient(ctx, timeout, client.WithPatience(timeout))
	if err != nil {
		return err
	}
	defer c.Close()
	var records iter.Seq2[client.Record, error]
	stats := client.ReportStats{InSync: true}
	if f.reporting {
		r := f.report()
		r.Progress = func(s client.ReportStats) { stats = s }
		records = c.ReportRows(ctx, r, client.RowOptions{}, f.data.options()...)
	} else {
		records = c.Scan(ctx, client.Range{Prefix: []byte(f.prefix)}, f.data.options()...)
	}
	p := startProgress(a.Stderr, a.ErrTerminal && !a.Terminal, "exporting", 0)
	refused := int64(0)
	for rec, rerr := range records {
		if err = rerr; err != nil {
			break
		}
		var no refusal
		if err = out.add(rec); errors.As(err, &no) {
			p.say(fmt.Sprintf("key %s: %s", quoted(rec.Key), no.error))
			refused++
			err = nil
			continue
		}
		if err != nil {
			err = fmt.Errorf("write rows: %w", err)
			break
		}
		p.rows.Add(1)
	}
	if werr := out.end(err == nil); werr != nil && err == nil {
		err = fmt.Errorf("write rows: %w", werr)
	}
	p.end()
	a.sayExported(p, refused)
	a.sayStale(stats)
	switch {
	case err != nil:
		return fmt.Errorf("the export stopped before its end: %w", err)
	case refused > 0:
		return exitCodeError(exitError)
	}
	return nil
}

// sayExported says on stderr what came of an export.
func (a *App) sayExported(p *progress, refused int64) {
	elapsed, n := time.Since(p.start), p.rows.Load()
	fmt.Fprintf(a.Stderr, "exported %s in %s (%s rows/s): %s refused\n", plural(n, "row"), durationText(elapsed), rateText(perSecond(n, elapsed)), countText(refused))
}
