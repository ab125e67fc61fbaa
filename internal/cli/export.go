package cli

import (
	"bufio"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/cli/rows"
)

func (a *App) exportCommand() *cobra.Command {
	f := &dataFlags{}
	r := &rowFlags{}
	var prefix string
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write records as rows, in key order",
		Long: `Writes records to stdout as rows, in key order. With the --format and --key-column of
an import, the rows are those that were imported.

A header row is not stored: --header is the row to write first, and --key-column may
then name one of its columns. Records that the format cannot hold are reported, and
the exit code is 1; jsonl holds all. Times to live are not exported. --timeout is for
each request (default 30s).`,
		Example: `  kvctl export --format tsv --key-column 1 > packages.tsv
  kvctl export --format csv --key-column email --header "$(head -1 people.csv)"
  kvctl export --format jsonl -n archive --prefix 2026/ | gzip > archive.jsonl.gz`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkRows(cmd, r); err != nil {
				return err
			}
			var header []byte
			if cmd.Flags().Changed("header") {
				header = []byte(r.header)
			}
			layout, err := r.layout(header)
			if err != nil {
				return err
			}
			return a.export(cmd.Context(), f, layout, header, prefix, a.bulkTimeoutOf(cmd))
		},
	}
	f.addNamespace(cmd)
	f.addRead(cmd)
	r.add(cmd)
	cmd.Flags().StringVar(&r.header, "header", "", "header row of tsv or csv to write first, as it stands")
	cmd.Flags().StringVar(&prefix, "prefix", "", "only keys that begin so")
	return cmd
}

// export writes the records of a namespace to stdout.
func (a *App) export(ctx context.Context, f *dataFlags, layout rows.Layout, header []byte, prefix string, timeout time.Duration) error {
	c, err := a.openClient(ctx, timeout, client.WithPatience(timeout))
	if err != nil {
		return err
	}
	defer c.Close()
	w := bufio.NewWriterSize(a.Stdout, 256<<10)
	if header != nil {
		w.Write(header)
		w.WriteByte('\n')
	}
	p := startProgress(a.Stderr, a.ErrTerminal && !a.Terminal, "exporting", 0)
	refused := int64(0)
	var row []byte
	for rec, rerr := range c.Scan(ctx, client.Range{Prefix: []byte(prefix)}, f.options()...) {
		if err = rerr; err != nil {
			break
		}
		if row, err = layout.Join(row[:0], rec.Key, rec.Value); err != nil {
			p.say(fmt.Sprintf("key %s: %s", quoted(rec.Key), err))
			refused++
			err = nil
			continue
		}
		w.Write(row)
		if err = w.WriteByte('\n'); err != nil { // an earlier failure is returned here
			err = fmt.Errorf("write rows: %w", err)
			break
		}
		p.rows.Add(1)
	}
	if ferr := w.Flush(); ferr != nil && err == nil {
		err = fmt.Errorf("write rows: %w", ferr)
	}
	p.end()
	elapsed := time.Since(p.start)
	n := p.rows.Load()
	fmt.Fprintf(a.Stderr, "exported %s in %s (%s rows/s): %s refused\n", plural(n, "row"), durationText(elapsed), rateText(perSecond(n, elapsed)), countText(refused))
	switch {
	case err != nil:
		return fmt.Errorf("the export stopped before its end: %w", err)
	case refused > 0:
		return exitCodeError(exitError)
	}
	return nil
}
