package rows_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/kvasirdb/kvasir/internal/cli/rows"
)

func tsv(column int) rows.Layout { return rows.Layout{Format: rows.TSV, KeyColumn: column} }
func csv(column int) rows.Layout { return rows.Layout{Format: rows.CSV, KeyColumn: column} }

var jsonl = rows.Layout{Format: rows.JSONL}

// TestSplit shows what is stored for a row, and that it gives the row back.
func TestSplit(t *testing.T) {
	for _, c := range []struct {
		layout          rows.Layout
		row, key, value string
	}{
		{tsv(1), "k\tv", "k", "v"},
		{tsv(1), "k\ta\tb\tc", "k", "a\tb\tc"},
		{tsv(2), "a\tk\tb\tc", "k", "a\tb\tc"},
		{tsv(3), "a\tb\tk", "k", "a\tb"},
		{tsv(1), "k\t", "k", ""},
		{tsv(1), "k\t\t", "k", "\t"},
		{tsv(1), "k", "k", "\n"},
		{tsv(1), "k\r", "k", "\r\n"},
		{tsv(2), "\tk", "k", ""},
		{tsv(1), "k\tv\r", "k", "v\r"},
		{tsv(2), "v\tk\r", "k", "v\r"},
		{tsv(2), "v\r\tk", "k", "v\r\n"},
		{tsv(2), "v\r\tk\r", "k", "v\r\r"},
		{tsv(1), "\xff\x00\t\xfe\"", "\xff\x00", "\xfe\""},
		{csv(1), "k,v", "k", "v"},
		{csv(1), `"a,b",v`, "a,b", "v"},
		{csv(1), `"say ""hi""",v`, `say "hi"`, "v"},
		{csv(1), "\"two\nlines\",v", "two\nlines", "v"},
		{csv(1), `k,"a,b",c`, "k", `"a,b",c`},
		{csv(1), "k,\"x\ny\"", "k", "\"x\ny\""},
		{csv(2), `"a,b",k,c`, "k", `"a,b",c`},
		{csv(3), "a,b,k\r", "k", "a,b\r"},
		{csv(2), `"a",k` + "\r", "k", `"a"` + "\r\n"},
		{csv(1), `k, spaced ,"` + `"`, "k", ` spaced ,""`},
		{csv(1), `"k","v"`, "k", `"v"`},
		{csv(1), `"k","v","a,b"`, "k", `"v","a,b"`},
		{csv(1), `"k",v`, "k", "v\n"},
		{csv(1), `k,"v"`, "k", "\"v\"\n"},
		{csv(1), `k,"a,b"`, "k", `"a,b"`},
		{csv(1), `"k","a,b"`, "k", "\"a,b\"\n"},
		{csv(1), "k", "k", "\n\n"},
		{csv(1), `"k"`, "k", "\n\n\n"},
		{csv(1), `k"x,v`, `k"x`, "v\n"},
		{csv(2), "v\r,k", "k", "v\r\n\n"},
		{jsonl, `{"key":"k","value":"v"}`, "k", "v"},
		{jsonl, `{"key":"k","value":"a\tb\nc<>&"}`, "k", "a\tb\nc<>&"},
		{jsonl, `{"key_base64":"/w==","value":""}`, "\xff", ""},
		{jsonl, `{"key":"ключ","value_base64":"//4="}`, "ключ", "\xff\xfe"},
	} {
		key, value, err := c.layout.Split([]byte(c.row))
		if err != nil || string(key) != c.key || string(value) != c.value {
			t.Errorf("%s column %d: Split(%q) = %q, %q, %v; want %q, %q", c.layout.Format, c.layout.KeyColumn, c.row, key, value, err, c.key, c.value)
			continue
		}
		row, err := c.layout.Join([]byte("dst"), key, value)
		if err != nil || string(row) != "dst"+c.row {
			t.Errorf("%s column %d: Join(%q, %q) = %q, %v; want %q", c.layout.Format, c.layout.KeyColumn, key, value, row, err, c.row)
		}
	}
}

func TestSplitRefuses(t *testing.T) {
	for _, c := range []struct {
		layout    rows.Layout
		row, want string
	}{
		{tsv(1), "", "key is empty"},
		{tsv(1), "\tv", "key is empty"},
		{tsv(2), "a", "no column 2"},
		{tsv(3), "a\tb", "has 2 columns"},
		{tsv(1), "a\nb", "line break"},
		{csv(1), `"",v`, "key is empty"},
		{csv(1), `"k"x,v`, "malformed"},
		{csv(1), `k,"v`, "malformed"},
		{csv(2), "k", "no column 2"},
		{jsonl, "", "malformed JSON"},
		{jsonl, "{", "malformed JSON"},
		{jsonl, "[]", "no JSON object"},
		{jsonl, `"k"`, "no JSON object"},
		{jsonl, `{"key":"k","value":"v"} {}`, "malformed JSON"},
		{jsonl, `{"key":"k"}`, "neither value nor value_base64"},
		{jsonl, `{"value":"v"}`, "neither key nor key_base64"},
		{jsonl, `{"key":"k","value":1}`, `"value" is not a string`},
		{jsonl, `{"key":"k","value":null}`, `"value" is not a string`},
		{jsonl, `{"key":"k","value":"v","value_base64":"dg=="}`, "both value and value_base64"},
		{jsonl, `{"key":"k","key":"l","value":"v"}`, "twice"},
		{jsonl, `{"KEY":"k","value":"v"}`, `unknown field "KEY"`},
		{jsonl, `{"key":"k","value":"v","ttl":"1s"}`, `unknown field "ttl"`},
		{jsonl, `{"key":"","value":"v"}`, "key is empty"},
		{jsonl, `{"key_base64":"*","value":"v"}`, "key_base64"},
		{jsonl, `{"key":"k","value":"\ud800"}`, "surrogate"},
		{jsonl, `{"key":"k","value":"\udc00\ud800"}`, "surrogate"},
		{jsonl, "{\"key\":\"\xff\",\"value\":\"v\"}", "not UTF-8"},
	} {
		_, _, err := c.layout.Split([]byte(c.row))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s column %d: Split(%q) = %v; want an error with %q", c.layout.Format, c.layout.KeyColumn, c.row, err, c.want)
		}
	}
}

func TestSplitJSONEscapes(t *testing.T) {
	key, value, err := jsonl.Split([]byte(` { "value" : "\ud83d\ude00\\ud800" , "key":"A" }` + "\r"))
	if err != nil || string(key) != "A" || string(value) != "😀\\ud800" {
		t.Errorf("got %q, %q, %v", key, value, err)
	}
}

// TestJoinRefuses: what was put by other means and has no row is not bent into one.
func TestJoinRefuses(t *testing.T) {
	for _, c := range []struct {
		layout           rows.Layout
		key, value, want string
	}{
		{tsv(1), "a\tb", "v", "holds a tab"},
		{tsv(1), "a\nb", "v", "jsonl"},
		{tsv(1), "a", "two\nlines", "jsonl"},
		{tsv(1), "a", "line\n", "jsonl"},
		{tsv(3), "a", "v", "1 columns, too few to make the key column 3"},
		{csv(1), "a", "two\nlines", "jsonl"},
		{csv(1), "a", `"open`, "jsonl"},
		{csv(1), "a", "v\n\n\n\n", "jsonl"},
		{csv(2), "a\r", "v", ""},
		{tsv(2), "a\r", "v", "jsonl"},
	} {
		got, err := c.layout.Join([]byte("dst"), []byte(c.key), []byte(c.value))
		if c.want == "" {
			if err != nil {
				t.Errorf("Join(%q, %q) = %v", c.key, c.value, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || string(got) != "dst" {
			t.Errorf("%s column %d: Join(%q, %q) = %q, %v; want an error with %q", c.layout.Format, c.layout.KeyColumn, c.key, c.value, got, err, c.want)
		}
	}
}

func TestColumns(t *testing.T) {
	for _, c := range []struct {
		format rows.Format
		header string
		want   []string
	}{
		{rows.TSV, "id\tname\r", []string{"id", "name"}},
		{rows.TSV, "\ufeffid\t\"name\"", []string{"id", `"name"`}},
		{rows.CSV, "\ufeff\"id\",\"full, name\"\r", []string{"id", "full, name"}},
	} {
		got, err := c.format.Columns([]byte(c.header))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s.Columns(%q) = %q, %v; want %q", c.format, c.header, got, err, c.want)
		}
	}
}

// read returns all rows of an input; refused ones are written as the line and a
// part of the reason.
func read(t *testing.T, in io.Reader, format rows.Format, limit int) (out []rows.Row) {
	t.Helper()
	r := rows.NewReader(in, format, limit)
	for {
		row, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("Next: %v", err)
		}
		row.Bytes = bytes.Clone(row.Bytes)
		out = append(out, row)
	}
}

func TestReader(t *testing.T) {
	type want struct {
		line       int
		row, error string
	}
	for name, c := range map[string]struct {
		format rows.Format
		in     string
		want   []want
	}{
		"nothing":             {rows.TSV, "", nil},
		"no last line break":  {rows.TSV, "a\nb", []want{{1, "a", ""}, {2, "b", ""}}},
		"last line break":     {rows.TSV, "a\nb\n", []want{{1, "a", ""}, {2, "b", ""}}},
		"empty rows":          {rows.TSV, "\n\na\n", []want{{1, "", ""}, {2, "", ""}, {3, "a", ""}}},
		"CRLF":                {rows.CSV, "a,\"b\"\r\nc\r\n", []want{{1, "a,\"b\"\r", ""}, {2, "c\r", ""}}},
		"quotes in tsv":       {rows.TSV, "\"a\nb\"\n", []want{{1, "\"a", ""}, {2, "b\"", ""}}},
		"quoted lines":        {rows.CSV, "k,\"a\n\nb\"\nl\n", []want{{1, "k,\"a\n\nb\"", ""}, {4, "l", ""}}},
		"malformed":           {rows.CSV, "k,\"a\"x\nl\n", []want{{1, "", "malformed"}, {2, "l", ""}}},
		"malformed, lines":    {rows.CSV, "k,\"a\nb\"x,1\nl\n", []want{{1, "", "malformed"}, {3, "l", ""}}},
		"open quote":          {rows.CSV, "a\nk,\"b\nc\nd", []want{{1, "a", ""}, {2, "", "up to line 4 is refused"}}},
		"open quote, at end":  {rows.CSV, "a\n\"b", []want{{1, "a", ""}, {2, "", "malformed"}}},
		"too long":            {rows.TSV, "0123456789012345678\n01234567890123456789\na", []want{{1, "0123456789012345678", ""}, {2, "", "21 bytes"}, {3, "a", ""}}},
		"too long, in quotes": {rows.CSV, "\"0123456789\n0123456789\"\na", []want{{1, "", "24 bytes"}, {3, "a", ""}}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, in := range []io.Reader{strings.NewReader(c.in), iotest.OneByteReader(strings.NewReader(c.in))} {
				got := read(t, in, c.format, 20)
				if len(got) != len(c.want) {
					t.Fatalf("got %d rows %+v, want %d", len(got), got, len(c.want))
				}
				for i, w := range c.want {
					g := got[i]
					if g.Line != w.line || string(g.Bytes) != w.row || (g.Err == nil) != (w.error == "") || g.Err != nil && !strings.Contains(g.Err.Error(), w.error) {
						t.Errorf("row %d: got line %d %q %v, want %+v", i, g.Line, g.Bytes, g.Err, w)
					}
				}
			}
		})
	}
}

// TestReaderLongRows: rows longer than the reader's buffer.
func TestReaderLongRows(t *testing.T) {
	long := strings.Repeat("x", 300<<10)
	in := "k," + long + "\nl,\"" + long + "\n" + long + "\"\nm\n"
	got := read(t, strings.NewReader(in), rows.CSV, 1<<20)
	if len(got) != 3 || len(got[0].Bytes) != len(long)+2 || len(got[1].Bytes) != 2*len(long)+5 || got[2].Line != 4 {
		t.Errorf("got %d rows", len(got))
	}
	got = read(t, strings.NewReader(in), rows.CSV, 100)
	if len(got) != 3 || got[0].Err == nil || got[1].Err == nil || string(got[2].Bytes) != "m" {
		t.Errorf("got %d rows, want two refused and m", len(got))
	}
}

func TestReaderFails(t *testing.T) {
	r := rows.NewReader(io.MultiReader(strings.NewReader("a\nb"), iotest.ErrReader(errors.New("disk gone"))), rows.TSV, 100)
	if row, err := r.Next(); err != nil || string(row.Bytes) != "a" {
		t.Fatalf("got %q, %v", row.Bytes, err)
	}
	if _, err := r.Next(); err == nil || !strings.Contains(err.Error(), "line 2: disk gone") {
		t.Errorf("got %v", err)
	}
}
