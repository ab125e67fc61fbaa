package parquet_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	library "github.com/parquet-go/parquet-go"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/cli/parquet"
)

// stored is a row as another program would read it.
type stored struct {
	Key     []byte `parquet:"key"`
	Value   []byte `parquet:"value"`
	Written int64  `parquet:"written,timestamp(millisecond)"`
	Expires *int64 `parquet:"expires,timestamp(millisecond)"`
}

func write(t rapid.TB, cfg parquet.Config, rows []parquet.Row) []byte {
	t.Helper()
	var b bytes.Buffer
	w := parquet.NewWriter(&b, cfg)
	for _, r := range rows {
		r.Key, r.Value = bytes.Clone(r.Key), bytes.Clone(r.Value)
		if err := w.Write(r); err != nil {
			t.Fatal(err)
		}
		clear(r.Key)
		clear(r.Value)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func read(t rapid.TB, file []byte) (rows []parquet.Row, groups int, schema string) {
	t.Helper()
	f, err := library.OpenFile(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	all, err := library.Read[stored](bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		r := parquet.Row{Key: s.Key, Value: s.Value, WrittenMillis: s.Written}
		if s.Expires != nil {
			r.ExpiresMillis = *s.Expires
		}
		rows = append(rows, r)
	}
	return rows, len(f.RowGroups()), f.Schema().String()
}

func TestWhatIsWrittenIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bytesOf := rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 200), func(b []byte) []byte { return append([]byte{}, b...) })
		var rows []parquet.Row
		for range rapid.IntRange(0, 60).Draw(t, "rows") {
			r := parquet.Row{Key: bytesOf.Draw(t, "key"), Value: bytesOf.Draw(t, "value"), WrittenMillis: rapid.Int64Range(0, 1<<48).Draw(t, "written")}
			if rapid.Bool().Draw(t, "expires") {
				r.ExpiresMillis = rapid.Int64Min(1).Draw(t, "at")
			}
			rows = append(rows, r)
		}
		got, groups, _ := read(t, write(t, parquet.Config{RowGroupBytes: 2000}, rows))
		if diff := cmp.Diff(rows, got); diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
		if groups > len(rows) {
			t.Errorf("%d row groups of %d rows", groups, len(rows))
		}
	})
}

func TestRowGroupsAreBounded(t *testing.T) {
	rows := make([]parquet.Row, 100)
	for i := range rows {
		rows[i] = parquet.Row{Key: fmt.Appendf(nil, "key%03d", i), Value: make([]byte, 978)} // 1000 bytes each
	}
	if _, groups, _ := read(t, write(t, parquet.Config{RowGroupBytes: 10_000}, rows)); groups != 10 {
		t.Errorf("%d row groups, want 10", groups)
	}
	if _, groups, _ := read(t, write(t, parquet.Config{}, rows)); groups != 1 {
		t.Errorf("%d row groups, want 1", groups)
	}
}

func TestColumnsOfText(t *testing.T) {
	_, _, schema := read(t, write(t, parquet.Config{}, nil))
	if strings.Contains(schema, "STRING") || !strings.Contains(schema, "TIMESTAMP") {
		t.Errorf("schema of bytes:\n%s", schema)
	}
	rows := []parquet.Row{{Key: []byte("é"), Value: []byte("v")}}
	file := write(t, parquet.Config{KeyText: true, ValueText: true}, rows)
	got, _, schema := read(t, file)
	if diff := cmp.Diff(rows, got); diff != "" || strings.Count(schema, "STRING") != 2 {
		t.Errorf("schema of text:\n%s\nread back (-want +got):\n%s", schema, diff)
	}
	w := parquet.NewWriter(io.Discard, parquet.Config{KeyText: true, ValueText: true})
	for _, r := range []parquet.Row{{Key: []byte{0xff}}, {Key: []byte("k"), Value: []byte{0xff}}} {
		if err := w.Write(r); !errors.Is(err, parquet.ErrNotText) {
			t.Errorf("row %q: error %v", r.Key, err)
		}
	}
	if err := w.Write(rows[0]); err != nil {
		t.Error(err)
	}
}

type failing struct{ left int }

func (f *failing) Write(b []byte) (int, error) {
	if f.left -= len(b); f.left < 0 {
		return 0, io.ErrShortWrite
	}
	return len(b), nil
}

func TestAFailureToWriteIsReturned(t *testing.T) {
	w := parquet.NewWriter(&failing{left: 100_000}, parquet.Config{RowGroupBytes: 10_000})
	random := rand.NewChaCha8([32]byte{})
	value := make([]byte, 1000)
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		random.Read(value)
		err = w.Write(parquet.Row{Key: []byte("k"), Value: value})
	}
	if !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("error %v", err)
	}
}

// values are of 1 KiB, half of them random, so that zstd has something to do and
// something to hold.
type values struct {
	random *rand.ChaCha8
	buf    [1024]byte
}

func (v *values) next() []byte {
	v.random.Read(v.buf[:512])
	return v.buf[:]
}

func BenchmarkWrite(b *testing.B) {
	v := &values{random: rand.NewChaCha8([32]byte{})}
	w := parquet.NewWriter(io.Discard, parquet.Config{})
	b.SetBytes(1024)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := w.Write(parquet.Row{Key: fmt.Appendf(nil, "user/%012d", i), Value: v.next(), WrittenMillis: int64(i)}); err != nil {
			b.Fatal(err)
		}
	}
}

// TestMemory exports a million records of 1 KiB within 256 MB. It needs a process of
// its own: KVASIR_PARQUET_MEMORY=1 go test -run '^TestMemory$' ./internal/cli/parquet
func TestMemory(t *testing.T) {
	if os.Getenv("KVASIR_PARQUET_MEMORY") == "" {
		t.Skip("KVASIR_PARQUET_MEMORY is not set")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "export.parquet"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := peakBytes(t)
	w := parquet.NewWriter(f, parquet.Config{})
	v := &values{random: rand.NewChaCha8([32]byte{})}
	for i := range 1_000_000 {
		if err := w.Write(parquet.Row{Key: fmt.Appendf(nil, "user/%012d", i), Value: v.next(), WrittenMillis: 1767225600000 + int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	size, _ := f.Seek(0, io.SeekCurrent)
	peak := peakBytes(t)
	t.Logf("file of %d MB; peak memory %d MB, %d MB of them before", size/1e6, peak/1e6, before/1e6)
	if peak >= 256e6 {
		t.Errorf("peak memory %d MB, want less than 256", peak/1e6)
	}
}

// peakBytes returns the most memory that the process has had resident.
func peakBytes(t *testing.T) int {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Skip("no VmHWM")
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}
