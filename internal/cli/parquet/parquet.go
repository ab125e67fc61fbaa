// Package parquet writes records as a Parquet file, in the order given and within
// bounded memory. It never reads one, and knows nothing of where records come from.
package parquet

import (
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/parquet-go/parquet-go"
)

// Row is a record.
type Row struct {
	Key, Value []byte
	// WrittenMillis is the time of the record's version, in milliseconds since 1970.
	WrittenMillis int64
	// ExpiresMillis is when the record expires, in milliseconds since 1970; 0 means
	// never, which the file holds as null.
	ExpiresMillis int64
}

// ErrNotText marks a row that a column of text cannot hold.
var ErrNotText = errors.New("not UTF-8")

// Config says what the columns hold.
type Config struct {
	// KeyText and ValueText make the column one of text (STRING), which most tools
	// show as such; rows that are not UTF-8 are then refused. The default is bytes.
	KeyText, ValueText bool
	// RowGroupBytes is how many bytes of keys and values make a row group, which the
	// writer holds in memory, compressed. The default is 32 MiB. A file has at most
	// 32767 row groups.
	RowGroupBytes int
}

const (
	defaultRowGroupBytes = 32 << 20
	// Larger pages than parquet-go's default mean fewer of them to remember until the
	// footer is written.
	pageBytes = 1 << 20
	// What a row takes beside its key and value.
	rowOverheadBytes = 16
)

// The columns of a file; the tags are parquet-go's.
type columns struct {
	Key     []byte `parquet:"key,zstd"`
	Value   []byte `parquet:"value,zstd"`
	Written int64  `parquet:"written,timestamp(millisecond),delta,zstd"`
	Expires *int64 `parquet:"expires,timestamp(millisecond),zstd"`
}

const optionalPresent = 1 // the definition level of a value that is not null

func (c Config) schema() *parquet.Schema {
	var options []parquet.SchemaOption
	if c.KeyText {
		options = append(options, parquet.StructTag(`parquet:"key,string,zstd"`, "Key"))
	}
	if c.ValueText {
		options = append(options, parquet.StructTag(`parquet:"value,string,zstd"`, "Value"))
	}
	return parquet.SchemaOf(columns{}, options...)
}

// Writer writes a file. It is not safe for concurrent use.
type Writer struct {
	cfg       Config
	out       *parquet.GenericWriter[columns]
	rows      [1]parquet.Row
	groupSize int // bytes since the last row group ended
}

// NewWriter returns a writer of one file to w. The file is whole after Close.
func NewWriter(w io.Writer, cfg Config) *Writer {
	if cfg.RowGroupBytes <= 0 {
		cfg.RowGroupBytes = defaultRowGroupBytes
	}
	out := parquet.NewGenericWriter[columns](w, cfg.schema(),
		parquet.PageBufferSize(pageBytes),
		parquet.SkipPageBounds("value"),
		parquet.CreatedBy("kvasir", "", ""),
	)
	return &Writer{cfg: cfg, out: out, rows: [1]parquet.Row{make(parquet.Row, 0, 4)}}
}

// Write appends a row. ErrNotText refuses the row and leaves the writer as it was;
// after any other error the file is lost. The row's bytes are copied.
func (w *Writer) Write(r Row) error {
	if err := w.check(r); err != nil {
		return err
	}
	expires := parquet.NullValue().Level(0, 0, 3)
	if r.ExpiresMillis != 0 {
		expires = parquet.Int64Value(r.ExpiresMillis).Level(0, optionalPresent, 3)
	}
	w.rows[0] = append(w.rows[0][:0],
		parquet.ByteArrayValue(r.Key).Level(0, 0, 0),
		parquet.ByteArrayValue(r.Value).Level(0, 0, 1),
		parquet.Int64Value(r.WrittenMillis).Level(0, 0, 2),
		expires,
	)
	if _, err := w.out.WriteRows(w.rows[:]); err != nil {
		return fmt.Errorf("write a parquet row: %w", err)
	}
	if w.groupSize += len(r.Key) + len(r.Value) + rowOverheadBytes; w.groupSize < w.cfg.RowGroupBytes {
		return nil
	}
	w.groupSize = 0
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write a parquet row group: %w", err)
	}
	return nil
}

func (w *Writer) check(r Row) error {
	if w.cfg.KeyText && !utf8.Valid(r.Key) {
		return fmt.Errorf("the key is %w", ErrNotText)
	}
	if w.cfg.ValueText && !utf8.Valid(r.Value) {
		return fmt.Errorf("the value is %w", ErrNotText)
	}
	return nil
}

// Close writes what is left and the footer. It does not close what it writes to.
func (w *Writer) Close() error {
	if err := w.out.Close(); err != nil {
		return fmt.Errorf("end a parquet file: %w", err)
	}
	return nil
}
