package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
)

// terminalValue is how much of a value is shown on a terminal, in bytes.
const terminalValue = 200

func (a *App) scanCommand() *cobra.Command {
	f := &dataFlags{}
	var limit int
	var prefix, start string
	var keysOnly bool
	cmd := &cobra.Command{
		Use:   "scan",
		Short: "List records in key order",
		Long: `Lists records in key order: a line with key, tab and value each. What is not
printable is written as a quoted string; on a terminal long values are cut.

Each key is as one quorum read within the scan; there is no snapshot over keys.
--timeout is for each page, not for the scan as a whole. To move records elsewhere,
see kvctl export.`,
		Example: `  kvctl scan
  kvctl scan --prefix user/ --limit 20
  kvctl scan --start m --keys-only
  kvctl scan --prefix user/ -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.openClient(cmd.Context(), a.flags.timeout)
			if err != nil {
				return err
			}
			defer c.Close()
			r := client.Range{Prefix: []byte(prefix), Start: []byte(start), Limit: limit, KeysOnly: keysOnly}
			return a.list(c.Scan(cmd.Context(), r, f.options()...), keysOnly)
		},
	}
	f.addNamespace(cmd)
	f.addRead(cmd)
	cmd.Flags().StringVar(&prefix, "prefix", "", "only keys that begin so")
	cmd.Flags().StringVar(&start, "start", "", "only keys from this one on")
	cmd.Flags().Var(countFlag(&limit, 0, math.MaxInt), "limit", "most records to list, 0 for all (default 0)")
	cmd.Flags().BoolVar(&keysOnly, "keys-only", false, "leave the values out")
	return cmd
}

// list writes records as they come; no more than a page is kept in memory.
func (a *App) list(records iter.Seq2[client.Record, error], keysOnly bool) error {
	w := bufio.NewWriterSize(a.Stdout, 64<<10)
	put := a.lineOf
	if a.flags.output != outputTable {
		put = a.elementOf
	}
	n := 0
	var err error
	for rec, rerr := range records {
		if err = rerr; err != nil {
			break
		}
		if err = put(w, n, rec, keysOnly); err != nil {
			break
		}
		n++
	}
	switch {
	case a.flags.output == outputTable:
	case n == 0 && err == nil:
		w.WriteString("[]\n")
	case a.flags.output == outputJSON && err == nil:
		w.WriteString("\n]\n")
	}
	if werr := w.Flush(); werr != nil {
		err = errors.Join(err, fmt.Errorf("write records: %w", werr))
	}
	return err
}

// lineOf writes a record for people.
func (a *App) lineOf(w *bufio.Writer, _ int, rec client.Record, keysOnly bool) error {
	w.WriteString(quoted(rec.Key))
	if !keysOnly {
		w.WriteByte('\t')
		if a.Terminal {
			w.WriteString(shortened(rec.Value, terminalValue))
		} else {
			w.WriteString(quoted(rec.Value))
		}
	}
	return w.WriteByte('\n')
}

// elementOf writes a record as an element of one array.
func (a *App) elementOf(w *bufio.Writer, n int, rec client.Record, keysOnly bool) error {
	d := recordDoc{keyDoc: keyDocOf(rec.Key), Version: rec.Version.String(), ExpiresAt: timeDoc(rec.ExpiresAt)}
	if !keysOnly {
		half := halfDocOf(rec.Value)
		d.halfDoc = &half
	}
	if a.flags.output == outputYAML {
		return writeYAML(w, []recordDoc{d})
	}
	before := ",\n  "
	if n == 0 {
		before = "[\n  "
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(d); err != nil {
		return err
	}
	w.WriteString(before)
	_, err := w.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
	return err
}
