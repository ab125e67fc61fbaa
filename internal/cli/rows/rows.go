// Package rows is how records are written as rows of text: tab-separated,
// comma-separated, or a JSON object a line. It splits rows into key and value and
// joins them again, and promises that nothing changes on the way; what cannot keep
// that promise is refused and never guessed. It never opens a file or talks to a
// cluster.
//
// # Tab- and comma-separated rows
//
// One column is the key, without its quotes; the value is the rest of the row as it
// stands: the bytes of the other columns and the separators between them, and the
// carriage return of a row that ends in CRLF. Joining puts the key back as the same
// column, quoted if it must be, or if every other column is quoted and one of them
// had no need of it (some writers quote everything).
//
// A few rows are not what that makes of their key and value: a key with quotes that
// it does not need, a row that is a key and nothing else, a carriage return that
// belongs to the last column but one. As no row ends in a line break, line breaks
// at the end of the value are free to tell them apart. So the value of such a row
// has one, two or three line breaks at its end.
package rows

import (
	"bytes"
	"errors"
	"fmt"
)

// Format is a way to write rows.
type Format uint8

// The formats.
const (
	TSV Format = iota + 1
	CSV
	JSONL
)

// ParseFormat reads tsv, csv or jsonl.
func ParseFormat(s string) (Format, error) {
	for _, f := range []Format{TSV, CSV, JSONL} {
		if s == f.String() {
			return f, nil
		}
	}
	return 0, fmt.Errorf("bad format %q: want tsv, csv or jsonl", s)
}

// String names a format as ParseFormat reads it.
func (f Format) String() string {
	switch f {
	case TSV:
		return "tsv"
	case CSV:
		return "csv"
	case JSONL:
		return "jsonl"
	}
	return fmt.Sprintf("format(%d)", uint8(f))
}

func (f Format) separator() byte {
	if f == CSV {
		return ','
	}
	return '\t'
}

// Layout says where rows have their key. Split and Join are inverse to each other:
// where Join succeeds, Split gives back the same key and value, and where Split
// succeeds, Join makes the same row of its result; in JSONL another spelling of it.
type Layout struct {
	Format Format
	// KeyColumn is the column of the key, from 1. JSONL has none.
	KeyColumn int
}

// Errors of rows.
var (
	// errEmptyKey: a row has nothing where its key should be.
	errEmptyKey = errors.New("the key is empty")
	// errLineBreak: what should be one row is several.
	errLineBreak = errors.New("the row holds a line break")
	// errMalformed: the quotes of a comma-separated row do not add up.
	errMalformed = errors.New("malformed row: a quoted field must end in a quote and then a comma or the end of the row")
)

// Split returns the key and the value of a row, which is without its line break.
// They share no memory with it.
func (l Layout) Split(row []byte) (key, value []byte, err error) {
	if l.Format == JSONL {
		return splitJSON(row)
	}
	key, rest, err := l.dissect(row)
	if err != nil {
		return nil, nil, err
	}
	for breaks, o := range l.oddities() {
		again, ok := l.assemble(make([]byte, 0, len(row)+2), key, rest, o)
		if ok && bytes.Equal(row, again) {
			return key, append(rest, lineBreaks[:breaks]...), nil
		}
	}
	panic(fmt.Sprintf("rows: no value stands for %s row %q with its key in column %d", l.Format, row, l.KeyColumn))
}

// Join appends the row of a key and a value to dst, without a line break. It fails,
// and returns dst as it was, when no row would give them back.
func (l Layout) Join(dst, key, value []byte) ([]byte, error) {
	if l.Format == JSONL {
		return joinJSON(dst, key, value)
	}
	rest := bytes.TrimRight(value, "\n")
	breaks := len(value) - len(rest)
	if all := l.oddities(); breaks < len(all) {
		if out, ok := l.assemble(dst, key, rest, all[breaks]); ok {
			k, v, err := l.Split(out[len(dst):])
			if err == nil && bytes.Equal(k, key) && bytes.Equal(v, value) {
				return out, nil
			}
		}
	}
	return dst, l.refusal(key, rest)
}

// refusal says why a record cannot be written.
func (l Layout) refusal(key, rest []byte) error {
	if columns := len(l.columns(trimCR(rest))) + 1; l.KeyColumn > columns {
		return fmt.Errorf("the value has %d columns, too few to make the key column %d", columns-1, l.KeyColumn)
	}
	if l.Format == TSV && bytes.IndexByte(key, '\t') >= 0 {
		return errors.New("the key holds a tab: write it as csv or jsonl")
	}
	return fmt.Errorf("the record would read back differently from %s: write it as jsonl", l.Format)
}

// Columns returns the names in a header row: its fields, without quotes, and without
// the byte order mark some writers put first.
func (f Format) Columns(header []byte) ([]string, error) {
	if f == JSONL {
		return nil, errors.New("jsonl has no header row")
	}
	header = bytes.TrimPrefix(trimCR(header), []byte("\ufeff"))
	l := Layout{Format: f}
	if err := l.checkWhole(header); err != nil {
		return nil, err
	}
	var names []string
	for _, s := range l.columns(header) {
		names = append(names, string(l.unquote(header[s.start:s.end])))
	}
	return names, nil
}
