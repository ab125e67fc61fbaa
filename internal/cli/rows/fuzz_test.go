package rows_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/kvasirdb/kvasir/internal/cli/rows"
)

func layout(format uint8, column uint8) rows.Layout {
	return rows.Layout{Format: []rows.Format{rows.TSV, rows.CSV, rows.JSONL}[format%3], KeyColumn: int(column%5) + 1}
}

// FuzzSplit: a row that is taken is given back.
func FuzzSplit(f *testing.F) {
	for _, row := range []string{
		"k\tv", "k", "k\t\t", "v\r\tk", "k,v", `"k","a,b"`, `"k"`, "v\r,k", "k\"x,v\r", `{"key":"k","value":"\u0000\ud83d\ude00"}`, `{"key_base64":"/w==","value":"v"}`,
	} {
		for format := range uint8(3) {
			f.Add([]byte(row), format, uint8(0))
			f.Add([]byte(row), format, uint8(1))
		}
	}
	f.Fuzz(func(t *testing.T, row []byte, format, column uint8) {
		l := layout(format, column)
		key, value, err := l.Split(row)
		if err != nil {
			return
		}
		if len(key) == 0 {
			t.Errorf("Split(%q) gave an empty key", row)
		}
		again, err := l.Join(nil, key, value)
		if err != nil {
			t.Fatalf("Split(%q) gave %q and %q, which cannot be joined: %v", row, key, value, err)
		}
		if l.Format != rows.JSONL && !bytes.Equal(row, again) {
			t.Errorf("row %q came back as %q", row, again)
		}
		k, v, err := l.Split(again)
		if err != nil || !bytes.Equal(k, key) || !bytes.Equal(v, value) {
			t.Errorf("row %q is %q and %q, and then %q and %q, %v", row, key, value, k, v, err)
		}
	})
}

// FuzzJoin: a record that is written is read back.
func FuzzJoin(f *testing.F) {
	for _, r := range [][2]string{{"k", "v"}, {"k", ""}, {"k", "\n"}, {"k", "a\tb\r"}, {"a\tb", "v"}, {"a,b", `"x","y"`}, {"\xff", "\xfe\n\n"}} {
		for format := range uint8(3) {
			f.Add([]byte(r[0]), []byte(r[1]), format, uint8(0))
			f.Add([]byte(r[0]), []byte(r[1]), format, uint8(1))
		}
	}
	f.Fuzz(func(t *testing.T, key, value []byte, format, column uint8) {
		l := layout(format, column)
		row, err := l.Join(nil, key, value)
		if err != nil {
			if l.Format == rows.JSONL && len(key) > 0 {
				t.Errorf("jsonl refuses %q and %q: %v", key, value, err)
			}
			return
		}
		got := all(t, append(row, '\n'), l.Format)
		if len(got) != 1 || got[0].Err != nil || !bytes.Equal(got[0].Bytes, row) {
			t.Fatalf("%q and %q make %q, which reads as %+v", key, value, row, got)
		}
		k, v, err := l.Split(row)
		if err != nil || !bytes.Equal(k, key) || !bytes.Equal(v, value) {
			t.Errorf("%q and %q make %q, which splits into %q and %q, %v", key, value, row, k, v, err)
		}
	})
}

// FuzzReader: rows and line breaks, put together again, are the input; every row
// that is not refused can be looked at.
func FuzzReader(f *testing.F) {
	for _, in := range []string{"a\nb\r\n", "k,\"a\nb\"\nc", "\"a\"b\n\"c", "\n\n", "\"\"\"\n\"\r\n"} {
		for format := range uint8(3) {
			f.Add([]byte(in), format, uint8(0))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, format, column uint8) {
		l := layout(format, column)
		var out []byte
		refused := false
		line := 0
		for _, row := range all(t, in, l.Format) {
			if row.Line <= line {
				t.Errorf("row at line %d follows one at line %d", row.Line, line)
			}
			line = row.Line
			if row.Err != nil {
				refused = true
				continue
			}
			out = append(append(out, row.Bytes...), '\n')
			_, _, _ = l.Split(row.Bytes) // must not panic
		}
		if len(in) > 0 && in[len(in)-1] != '\n' {
			in = append(bytes.Clone(in), '\n')
		}
		if !refused && !bytes.Equal(in, out) {
			t.Errorf("%q was read as %q", in, out)
		}
	})
}

func all(t *testing.T, in []byte, format rows.Format) (out []rows.Row) {
	t.Helper()
	r := rows.NewReader(bytes.NewReader(in), format, 1<<20)
	for {
		row, err := r.Next()
		if errors.Is(err, io.EOF) {
			if r.BytesRead() != int64(len(in)) {
				t.Errorf("read %d bytes of %d", r.BytesRead(), len(in))
			}
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		row.Bytes = bytes.Clone(row.Bytes)
		out = append(out, row)
	}
}
