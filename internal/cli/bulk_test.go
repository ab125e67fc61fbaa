package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// file writes an input file.
func file(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "rows")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// values returns the records of a namespace.
func (f *fake) values(namespace string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string]string{}
	for k, rec := range f.mu.records[namespace] {
		out[k] = string(rec.GetValue())
	}
	return out
}

func (f *fake) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.mu.records)
}

func TestImport(t *testing.T) {
	for name, c := range map[string]struct {
		args    string
		in      string
		code    int
		want    map[string]string
		talk    []string
		summary string
	}{
		"tsv": {
			"--format tsv", "a\t1\t2\nb\t\nc", 0,
			map[string]string{"a": "1\t2", "b": "", "c": "\n"}, nil, "imported 3 rows",
		},
		"third column": {
			"--format tsv --key-column 3", "1\t2\ta\tx\n", 0, map[string]string{"a": "1\t2\tx"}, nil, "1 key stored",
		},
		"csv by name": {
			"--format csv --header --key-column email", "name,email\r\n\"A, B\",a@x\r\n", 0, map[string]string{"a@x": "\"A, B\"\r"}, nil, "1 key stored",
		},
		"csv by number, with header": {
			"--format csv --header --key-column 2", "name,email\nA,a@x\n", 0, map[string]string{"a@x": "A"}, nil, "imported 1 row ",
		},
		"jsonl": {
			"--format jsonl", "{\"key\":\"a\",\"value\":\"1\"}\n{\"key_base64\":\"/w==\",\"value_base64\":\"/g==\"}\n", 0,
			map[string]string{"a": "1", "\xff": "\xfe"}, nil, "2 keys stored",
		},
		"last row wins": {
			"--format tsv", "a\t1\nb\t1\na\t2\na\t3\n", 0, map[string]string{"a": "3", "b": "1"}, nil, "2 keys stored, 2 duplicates, 0 refused",
		},
		"refused": {
			"--format tsv", "a\t1\n\t2\n" + strings.Repeat("k", 5000) + "\t3\nb\t4\nc\t" + strings.Repeat("v", 2<<20) + "\n", 1,
			map[string]string{"a": "1", "b": "4"},
			[]string{"line 2: the key is empty", "line 3: the key has 5000 bytes: the limit is 4096", "line 5: the value has 2097152 bytes: the limit is 1048576"},
			"imported 5 rows in", // and so on
		},
		"refused csv": {
			"--format csv --key-column 2", "1,a\n1\n\"x\"y,b\n2,c\n", 1, map[string]string{"a": "1", "c": "2"},
			[]string{"line 2: the row has 1 columns, and so no column 2", "line 3: malformed row"}, "2 keys stored, 0 duplicates, 2 refused",
		},
		"refused jsonl": {
			"--format jsonl", "nonsense\n{\"key\":\"a\",\"value\":\"1\"}\n", 1, map[string]string{"a": "1"}, []string{"line 1: malformed JSON"}, "1 refused",
		},
		"nothing": {"--format tsv", "", 0, map[string]string{}, nil, "imported 0 rows"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, 3)
			args := strings.Fields(c.args)
			r := f.run(append([]string{"import", file(t, c.in)}, args...)...).want(t, c.code, append(c.talk, c.summary)...)
			if got := f.values("default"); !maps.Equal(got, c.want) {
				t.Errorf("stored %q, want %q", got, c.want)
			}
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
			// Again, from stdin, into the same records.
			f.runWith(func(a *App) { a.Stdin = strings.NewReader(c.in) }, append([]string{"import", "-"}, args...)...).want(t, c.code, c.talk...)
			if got := f.values("default"); !maps.Equal(got, c.want) {
				t.Errorf("run again, stored %q, want %q", got, c.want)
			}
		})
	}
}

func TestImportForPrograms(t *testing.T) {
	f := newFake(t, 3)
	r := f.run("import", file(t, "a\t1\n\t2\na\t3\n"), "--format", "tsv", "-o", "json").want(t, 1)
	if got := decode(t, r.stdout); got["rows"] != 3.0 || got["stored"] != 1.0 || got["duplicates"] != 1.0 || got["refused"] != 1.0 {
		t.Errorf("summary %v", got)
	}
	line, _, _ := strings.Cut(r.stderr, "\n")
	if got := decode(t, line); got["code"] != "InvalidArgument" || got["details"].(map[string]any)["line"] != "2" {
		t.Errorf("refused row: %v", got)
	}
}

func TestImportProblems(t *testing.T) {
	f := newFake(t, 3)
	f.run("import", "/nowhere/rows", "--format", "tsv").want(t, 1, "no such file")
	f.run("import", t.TempDir(), "--format", "tsv").want(t, 1, "is a directory")
	f.run("import", file(t, ""), "--format", "csv", "--header").want(t, 1, "no header row")
	f.run("import", file(t, "a,b\n"), "--format", "csv", "--header", "--key-column", "c").want(t, 2, "--key-column", "a, b")
	f.run("import", file(t, "a,a\n"), "--format", "csv", "--header", "--key-column", "a").want(t, 2, "several columns")
	f.run("import", file(t, "a\tb\n"), "--format", "tsv", "-n", "nope").want(t, 3, "nope", "can be run again")
	f.run("import", file(t, "{\"key\":\"a\",\"value\":\"b\"}"), "--format", "jsonl", "--key-column", "1").want(t, 0, "says nothing for jsonl")
	f.run("import", file(t, "a\tb\n"), "--format", "tsv", "-w", "40%").want(t, 0)
}

// TestImportLimits: what the cluster refuses although kvctl did not is one row's
// problem; what it cannot do now is everybody's.
func TestImportLimits(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.refuse = func(r *kvv1.BatchRequest) error {
		for i, op := range r.GetOperations() {
			if strings.HasPrefix(string(op.GetValue()), "bad") {
				return rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "I do not like it").With("operation", i)
			}
		}
		return nil
	}
	f.mu.Unlock()
	f.run("import", file(t, "a\t1\nb\tbad\nc\t3\nd\tbad\n"), "--format", "tsv").want(t, 1, "line 2: I do not like it", "line 4: I do not like it", "2 keys stored, 0 duplicates, 2 refused")

	f.mu.Lock()
	f.mu.refuse = func(*kvv1.BatchRequest) error {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas, "1 of 3 slots are live")
	}
	f.mu.Unlock()
	f.run("import", file(t, "a\t1\n"), "--format", "tsv", "--timeout", "200ms").want(t, 4, "1 of 3 slots are live", "can be run again", "0 keys stored")
}

// TestImportSmallBatches: a batch is never above the cluster's limit.
func TestImportSmallBatches(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.topology.Settings.MaxValueBytes, f.mu.topology.Settings.MaxBatchBytes = 100, 100
	f.mu.Unlock()
	var in strings.Builder
	for i := range 300 {
		fmt.Fprintf(&in, "%03d\t%s\n", i, strings.Repeat("v", i%90))
	}
	in.WriteString("abcd\t" + strings.Repeat("v", 100) + "\n") // fits as a value, not as a batch
	f.run("import", file(t, in.String()), "--format", "tsv").want(t, 1, "line 301: batch has 104 bytes: the limit is 100", "300 keys stored, 0 duplicates, 1 refused")
}

// TestImportOrder: batches are in flight at once, and yet the last row of each key
// wins. The cluster gives later batches greater versions and takes its time.
func TestImportOrder(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.slow = time.Millisecond
	f.mu.Unlock()
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	want := map[string]string{}
	var in strings.Builder
	const n = 20_000
	for i := range n {
		key := fmt.Sprintf("key-%d", rng.IntN(3000))
		want[key] = fmt.Sprint(i)
		fmt.Fprintf(&in, "%s\t%d\n", key, i)
	}
	f.run("import", file(t, in.String()), "--format", "tsv").want(t, 0, fmt.Sprintf("%s stored, %s", plural(len(want), "key"), plural(n-len(want), "duplicate")))
	if got := f.values("default"); !maps.Equal(got, want) {
		t.Errorf("seed %d: some key has not its last row", seed)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.mostAtOnce < 2 {
		t.Errorf("at most %d batches were in flight", f.mu.mostAtOnce)
	}
}

// endless is an input that never ends.
type endless struct{ n int }

func (e *endless) Read(p []byte) (int, error) {
	e.n++
	return copy(p, fmt.Sprintf("key-%d\tvalue\n", e.n)), nil
}

func TestImportStopsAtFailure(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.refuse = func(*kvv1.BatchRequest) error {
		if f.mu.batches > 20 {
			return rpc.Errorf(codes.FailedPrecondition, "BROKEN", "the cluster is broken")
		}
		return nil
	}
	f.mu.Unlock()
	f.runWith(func(a *App) { a.Stdin = &endless{} }, "import", "-", "--format", "tsv").want(t, 4, "the cluster is broken") // the outcome of what was under way is unknown
}

// blocked is an input that stops giving after its first rows, as a terminal does.
type blocked struct {
	first io.Reader
	stop  func()
	hold  chan struct{}
}

func (b *blocked) Read(p []byte) (int, error) {
	if n, err := b.first.Read(p); err == nil {
		return n, nil
	}
	b.stop()
	<-b.hold
	return 0, io.EOF
}

// TestImportInterrupted: an interrupt ends an import that waits for input.
func TestImportInterrupted(t *testing.T) {
	f := newFake(t, 3)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	in := &blocked{strings.NewReader("a\t1\nb\t2\n"), cancel, make(chan struct{})}
	defer close(in.hold)
	var out bytes.Buffer
	a := &App{Stdin: in, Stdout: &out, Stderr: &out, Getenv: func(string) string { return f.endpoints() }, ConfigDir: t.TempDir()}
	if code := a.Run(ctx, []string{"import", "-", "--format", "tsv"}); code != 1 || !strings.Contains(out.String(), "can be run again") {
		t.Errorf("exit code %d: %s", code, out.String())
	}
}

func TestExport(t *testing.T) {
	f := newFake(t, 3)
	for _, r := range [][2]string{{"a", "1\t2"}, {"b", "x\ty"}, {"c", "two\nlines"}, {"d", "\xff"}} {
		f.run("put", r[0], r[1]).want(t, 0)
	}
	for _, c := range []struct {
		args, want string
		code       int
		talk       string
	}{
		{"--format tsv", "a\t1\t2\nb\tx\ty\nd\t\xff\n", 1, "key c: the record would read back differently from tsv: write it as jsonl"},
		{"--format tsv --key-column 3", "1\t2\ta\nx\ty\tb\n", 1, "key d: the value has 1 columns, too few to make the key column 3"},
		{"--format tsv --prefix b --header k\tx\ty --key-column x", "k\tx\ty\nx\tb\ty\n", 0, "exported 1 row in"},
		{"--format jsonl", "{\"key\":\"a\",\"value\":\"1\\t2\"}\n{\"key\":\"b\",\"value\":\"x\\ty\"}\n{\"key\":\"c\",\"value\":\"two\\nlines\"}\n{\"key\":\"d\",\"value_base64\":\"/w==\"}\n", 0, "4 rows"},
		{"--format csv --prefix z", "", 0, "exported 0 rows"},
	} {
		r := f.run(append([]string{"export"}, strings.Split(c.args, " ")...)...).want(t, c.code, c.talk)
		if r.stdout != c.want {
			t.Errorf("%s: %q, want %q", c.args, r.stdout, c.want)
		}
	}
	f.run("export", "--format", "tsv", "-n", "nope").want(t, 3, "nope")
	r := f.runWith(func(a *App) { a.Stdout = brokenWriter{} }, "export", "--format", "tsv")
	r.want(t, 1, "write rows: the disk is full")
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("the disk is full") }

// TestExportEqualsImport is the promise of import and export: rows with distinct keys
// come back as they were, up to order.
func TestExportEqualsImport(t *testing.T) {
	f := newFake(t, 3)
	rapid.Check(t, func(rt *rapid.T) {
		f.clear()
		format := rapid.SampledFrom([]string{"tsv", "csv"}).Draw(rt, "format")
		column := rapid.IntRange(1, 3).Draw(rt, "column")
		eol := rapid.SampledFrom([]string{"\n", "\r\n"}).Draw(rt, "line end")
		field := rapid.StringMatching(`[ab"\r ,]{0,4}`)
		if format == "csv" {
			field = rapid.OneOf(rapid.StringMatching(`[ab \r]{0,4}`), rapid.StringMatching(`[ab]"{0,1}[ab]`), rapid.StringMatching(`"([ab,\n\r]|""){0,4}"`))
		}
		sep := map[string]string{"tsv": "\t", "csv": ","}[format]
		var rows []string
		for i := range rapid.IntRange(0, 12).Draw(rt, "rows") {
			columns := rapid.SliceOfN(field, column-1, 4).Draw(rt, "columns")
			key := fmt.Sprintf("k%d", i)
			if format == "csv" && rapid.Bool().Draw(rt, "quoted") {
				key = `"` + key + `"`
			}
			columns = slices.Insert(columns, column-1, key)
			rows = append(rows, strings.Join(columns, sep))
		}
		in := strings.Join(append(rows, ""), eol)
		args := []string{"--format", format, "--key-column", fmt.Sprint(column)}
		if r := f.runWith(func(a *App) { a.Stdin = strings.NewReader(in) }, append([]string{"import", "-"}, args...)...); r.code != 0 {
			rt.Fatalf("import of %q: %s", in, r.stderr)
		}
		r := f.run(append([]string{"export"}, args...)...)
		if r.code != 0 {
			rt.Fatalf("export after %q: %s", in, r.stderr)
		}
		got := strings.Split(r.stdout, eol)
		want := strings.Split(in, eol)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			rt.Errorf("%q came back as %q", in, r.stdout)
		}
	})
}

func TestJSONLEqualsImport(t *testing.T) {
	f := newFake(t, 3)
	var in bytes.Buffer
	enc := json.NewEncoder(&in)
	enc.SetEscapeHTML(false)
	for i := range 500 {
		if err := enc.Encode(struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		}{fmt.Sprintf("key-%03d <&>", i), strings.Repeat("\"\\\n\u2028é", i%7)}); err != nil {
			t.Fatal(err)
		}
	}
	f.runWith(func(a *App) { a.Stdin = bytes.NewReader(in.Bytes()) }, "import", "-", "--format", "jsonl").want(t, 0, "500 keys stored")
	if r := f.run("export", "--format", "jsonl").want(t, 0); r.stdout != in.String() {
		t.Errorf("came back as %q", r.stdout)
	}
}

func TestProgress(t *testing.T) {
	var out bytes.Buffer
	p := startProgress(&out, true, "importing", 1000)
	p.rows.Store(1234)
	p.bytes.Store(500)
	if got, want := p.status(2*time.Second), "importing  ████████████░░░░░░░░░░░░  50%  1,234 rows  617 rows/s"; got != want {
		t.Errorf("bar %q, want %q", got, want)
	}
	p.say("line 7: no")
	p.end()
	p.say("too late")
	if got := out.String(); !strings.Contains(got, clearLine+"line 7: no\n") || !strings.HasSuffix(got, clearLine) || strings.Contains(got, "too late") {
		t.Errorf("wrote %q", got)
	}
	p = startProgress(&out, false, "exporting", 0)
	p.end()
	if got, want := p.status(0), "exporting  0 rows  0 rows/s"; got != want {
		t.Errorf("bar %q, want %q", got, want)
	}
}
