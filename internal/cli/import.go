package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/cli/rows"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// bulkTimeout bounds one request of an import or export, which had better wait for a
// node to come back than begin anew.
const bulkTimeout = 30 * time.Second

// rowFlags say how rows are written.
type rowFlags struct {
	format    rows.Format
	keyColumn string
	// header is the header row that an export writes.
	header string
}

func (f *rowFlags) add(cmd *cobra.Command) {
	cmd.Flags().Var(&value[rows.Format]{&f.format, "format", "", rows.ParseFormat}, "format", "tsv, csv or jsonl (required)")
	f.addKeyColumn(cmd)
}

func (f *rowFlags) addKeyColumn(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.keyColumn, "key-column", "1", "column of the key in tsv and csv, from 1; with --header, also a column's name")
}

// layout returns how rows are written. header is the header row, if there is one.
func (f *rowFlags) layout(header []byte) (rows.Layout, error) {
	l := rows.Layout{Format: f.format, KeyColumn: 1}
	if f.format == rows.JSONL {
		return l, nil
	}
	if header != nil {
		names, err := f.format.Columns(header)
		if err != nil {
			return l, fmt.Errorf("header row: %w", err)
		}
		if i := slices.Index(names, f.keyColumn); i >= 0 {
			if slices.Contains(names[i+1:], f.keyColumn) {
				return l, usagef("--key-column: several columns are named %q: give the column's number", f.keyColumn)
			}
			l.KeyColumn = i + 1
			return l, nil
		}
		if n, err := strconv.Atoi(f.keyColumn); err != nil || n < 1 || n > len(names) {
			return l, usagef("--key-column: there is no column %q: want 1 to %d or one of %s", f.keyColumn, len(names), strings.Join(names, ", "))
		}
	}
	n, err := strconv.Atoi(f.keyColumn)
	if err != nil || n < 1 {
		return l, usagef("--key-column %q: want a column's number, from 1, or its name together with --header", f.keyColumn)
	}
	l.KeyColumn = n
	return l, nil
}

// checkRows refuses flags that contradict each other.
func (a *App) checkRows(cmd *cobra.Command, f *rowFlags) error {
	switch {
	case f.format == 0:
		return usagef("--format is missing: want tsv, csv or jsonl")
	case f.format == rows.JSONL && cmd.Flags().Changed("header"):
		return usagef("--header: rows of jsonl have no header")
	case f.format == rows.JSONL && cmd.Flags().Changed("key-column"):
		a.warn("--key-column says nothing for jsonl, whose rows name their key")
	}
	return nil
}

// bulkTimeoutOf returns --timeout, or what suits long commands.
func (a *App) bulkTimeoutOf(cmd *cobra.Command) time.Duration {
	if cmd.Flags().Changed("timeout") {
		return a.flags.timeout
	}
	return bulkTimeout
}

func (a *App) importCommand() *cobra.Command {
	f := &dataFlags{}
	r := &rowFlags{}
	var header bool
	cmd := &cobra.Command{
		Use:   "import FILE|-",
		Short: "Store the rows of a file",
		Long: `Stores the rows of a file, or of stdin (-).

tsv, csv: one column is the key, and the value is the rest of the row as it stands,
so that kvctl export with the same --key-column gives the same rows back. In csv the
key is stored without its quotes. A carriage return at the end of a row is kept.
jsonl: each row is an object with key (or key_base64) and value (or value_base64).

Of rows with the same key the last one wins. A row that cannot be stored is reported
with its line number, the others are stored all the same, and the exit code is 1.
An import that was interrupted can be run again. --timeout is for each request
(default 30s).`,
		Example: `  kvctl import packages.tsv --format tsv --key-column 1
  kvctl import people.csv --format csv --key-column email --header
  zcat records.jsonl.gz | kvctl import - --format jsonl -n archive`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkRows(cmd, r); err != nil {
				return err
			}
			if _, err := r.layout(nil); err != nil && !header {
				return err
			}
			return a.importFile(cmd.Context(), args[0], f, r, header, a.bulkTimeoutOf(cmd))
		},
	}
	f.addNamespace(cmd)
	f.addWrite(cmd)
	r.add(cmd)
	cmd.Flags().BoolVar(&header, "header", false, "the first row of tsv or csv names the columns and is not stored")
	return cmd
}

// importFile stores the rows of a file.
func (a *App) importFile(ctx context.Context, file string, f *dataFlags, r *rowFlags, header bool, timeout time.Duration) error {
	in, size, err := a.openInput(file)
	if err != nil {
		return err
	}
	defer in.Close()
	reader := rows.NewReader(in, r.format, r.format.MaxRowBytes(topology.MaxKeyBytes, topology.HardMaxValue))
	layout, err := readLayout(reader, r, header)
	if err != nil {
		return err
	}
	t, err := a.topology(ctx)
	if err != nil {
		return err
	}
	c, err := a.openClient(ctx, timeout, client.WithPatience(timeout))
	if err != nil {
		return err
	}
	defer c.Close()
	im := &importer{
		client: c, options: f.options(), timeout: timeout, layout: layout,
		maxValue: t.Settings.MaxValueBytes, maxBatch: min(batchBytes, t.Settings.MaxBatchBytes),
		progress: startProgress(a.Stderr, a.ErrTerminal, "importing", size),
		refusal:  a.refusalLine,
	}
	err = im.run(ctx, reader)
	im.progress.end()
	sum := im.summary(time.Since(im.progress.start))
	if a.flags.output != outputTable {
		if perr := a.print(sum, nil); perr != nil {
			return errors.Join(err, perr)
		}
	}
	fmt.Fprintf(a.Stderr, "imported %s in %s (%s rows/s): %s stored, %s, %s refused\n",
		plural(sum.Rows, "row"), durationText(time.Since(im.progress.start)), rateText(sum.RowsPerSecond),
		plural(sum.Stored, "key"), plural(sum.Duplicates, "duplicate"), countText(sum.Refused))
	switch {
	case err != nil:
		return fmt.Errorf("the import stopped before its end and can be run again: %w", err)
	case sum.Refused > 0:
		return exitCodeError(exitError)
	}
	return nil
}

// openInput opens a file, or stdin, and returns its size if it has one.
func (a *App) openInput(file string) (io.ReadCloser, int64, error) {
	if file == "-" {
		return io.NopCloser(a.Stdin), 0, nil
	}
	in, err := os.Open(file)
	if err != nil {
		return nil, 0, fmt.Errorf("import: %w", err)
	}
	info, err := in.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory", file)
	}
	if err != nil {
		in.Close()
		return nil, 0, fmt.Errorf("import: %w", err)
	}
	if !info.Mode().IsRegular() {
		return in, 0, nil
	}
	return in, info.Size(), nil
}

// readLayout reads the header row, if there is one, and finds the key's column.
func readLayout(reader *rows.Reader, r *rowFlags, header bool) (rows.Layout, error) {
	if !header {
		return r.layout(nil)
	}
	row, err := reader.Next()
	if errors.Is(err, io.EOF) {
		return rows.Layout{}, errors.New("the input is empty and has no header row")
	}
	if err = errors.Join(err, row.Err); err != nil {
		return rows.Layout{}, fmt.Errorf("header row: %w", err)
	}
	return r.layout(row.Bytes)
}

// refusalLine reports a refused row, for people or for programs.
func (a *App) refusalLine(line int, why error) string {
	text := fmt.Sprintf("line %d: %s", line, why)
	if a.flags.output == outputTable {
		return text
	}
	f := describe(why)
	f.Code, f.Message = "InvalidArgument", text
	f.Details["line"] = strconv.Itoa(line)
	b, err := json.Marshal(f)
	if err != nil {
		return text
	}
	return string(b)
}
