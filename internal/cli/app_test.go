package cli

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
)

// TestHelp: every command says what it does and shows how.
func TestHelp(t *testing.T) {
	a := &App{}
	builtIn := func(cmd *cobra.Command) bool {
		return strings.HasPrefix(cmd.CommandPath(), "kvctl completion") || strings.HasPrefix(cmd.CommandPath(), "kvctl help")
	}
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if builtIn(cmd) {
			return
		}
		if cmd.Short == "" || cmd.Example == "" {
			t.Errorf("%s: Short is %q, Example is %q", cmd.CommandPath(), cmd.Short, cmd.Example)
		}
		if !strings.HasPrefix(strings.TrimSpace(cmd.Example), "kvctl") && !strings.HasPrefix(strings.TrimSpace(cmd.Example), "zcat") {
			t.Errorf("%s: the example is no command: %s", cmd.CommandPath(), cmd.Example)
		}
		for line := range strings.Lines(cmd.Long + "\n" + cmd.Example) {
			if len([]rune(line)) > 101 {
				t.Errorf("%s: a long line in the help text: %s", cmd.CommandPath(), line)
			}
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s is not explained", cmd.CommandPath(), f.Name)
			}
		})
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(a.root())
	for _, args := range []string{"", "--help", "namespace", "import --help"} {
		runKvctl(t, func(*App) {}, strings.Fields(args)...).want(t, 0, "Usage:")
	}
	runKvctl(t, func(*App) {}, "clustr").want(t, 2, `did you mean "cluster"?`)
	runKvctl(t, func(*App) {}, "pt").want(t, 2, `did you mean "gc", "get" or "put"?`)
	if got := alternatives([]string{"a", "b", "c"}); got != `"a", "b" or "c"` {
		t.Errorf("alternatives are written %s", got)
	}
	runKvctl(t, func(*App) {}, "node", "stats").want(t, 2, `did you mean "status"?`)
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), 1},
		{usagef("x"), 2},
		{fmt.Errorf("x: %w", client.ErrInvalidArgument), 2},
		{&client.Error{Code: "InvalidArgument"}, 2},
		{missingError{"key", "k", nil}, 3},
		{client.ErrNotFound, 3},
		{&client.Error{Code: "NotFound"}, 3},
		{rpc.Errorf(codes.Unavailable, "X", "x"), 4},
		{rpc.Errorf(codes.DeadlineExceeded, "X", "x"), 4},
		{fmt.Errorf("x: %w", &client.Error{Code: "ResourceExhausted"}), 4},
		{noClusterError{nil, nil}, 4},
		{client.ErrOutcomeUnknown, 4},
		{rpc.Errorf(codes.Aborted, "X", "x"), 5},
		{rpc.Errorf(codes.FailedPrecondition, "X", "x"), 1},
		{rpc.Errorf(codes.AlreadyExists, "X", "x"), 1},
		{rpc.AsError(errors.New("x")), 1},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%T %v: exit code %d, want %d", c.err, c.err, got, c.want)
		}
	}
}

func TestOutputOf(t *testing.T) {
	for args, want := range map[string]string{
		"get k": "table", "get -o json": "json", "-ojson get": "json", "-o=yaml": "yaml", "--output json": "json", "--output=json": "json",
		"put k -- -o json": "table", "get -o": "",
	} {
		if got := outputOf(strings.Fields(args)); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}

func TestHumanUnits(t *testing.T) {
	for want, got := range map[string]string{
		"0 B": sizeText(0), "1023 B": sizeText(1023), "1.0 KiB": sizeText(1024), "1.5 KiB": sizeText(1536), "100 KiB": sizeText(102_400),
		"1.0 MiB": sizeText(1<<20 - 1), "16.0 EiB": sizeText(1<<64 - 1), "40.0 GiB": sizeText(40 << 30),
		"0 s": durationText(0), "90 µs": durationText(90 * time.Microsecond), "1.5 ms": durationText(1500 * time.Microsecond),
		"250 ms": durationText(250 * time.Millisecond), "12.5 s": durationText(12_500 * time.Millisecond), "12 s": durationText(12 * time.Second),
		"3 m 5 s": durationText(185 * time.Second), "2 h": durationText(2 * time.Hour), "1 h 1 m": durationText(61 * time.Minute),
		"7 d": durationText(7 * 24 * time.Hour), "1 d 6 h": durationText(30 * time.Hour), "-2 s": durationText(-2 * time.Second),
		"0": rateText(0), "9.5": rateText(9.5), "1,235": rateText(1234.6),
		"-1,234,567": countText(-1234567), "999": countText(999), "1 row": plural(1, "row"), "2,000 rows": plural(2000, "row"),
		"plain text": quoted([]byte("plain text")), `"\xff"`: quoted([]byte{0xff}), `"a\nb"`: quoted([]byte("a\nb")), `"\"x\""`: quoted([]byte(`"x"`)),
		"éé… (8 B)": shortened([]byte("éééé"), 5),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestParseDuration(t *testing.T) {
	for in, want := range map[string]time.Duration{"7d": 7 * 24 * time.Hour, "1h30m": 90 * time.Minute, "1ms": time.Millisecond, "0s": 0, "-1s": -time.Second} {
		if got, err := parseDuration(in); err != nil || got != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "5", "1.5d", "-1d", "d", "1us", "99999999d", "1e9h"} {
		if got, err := parseDuration(in); err == nil {
			t.Errorf("%q was read as %s", in, got)
		}
	}
}

// TestYAML: a document is the same in YAML as in JSON, whatever its texts look like.
func TestYAML(t *testing.T) {
	type doc struct {
		Texts []string       `json:"texts" yaml:"texts"`
		Size  uint64         `json:"size_bytes" yaml:"size_bytes"`
		Share float64        `json:"share" yaml:"share"`
		None  *int           `json:"none" yaml:"none"`
		Yes   bool           `json:"yes" yaml:"yes"`
		Empty []int          `json:"empty" yaml:"empty"`
		Inner map[string]int `json:"inner" yaml:"inner"`
	}
	want := doc{
		Texts: []string{"", "true", "12", "0x1f", "null", "~", "a: b", "- a", "#17", "é\u2028", "two\nlines\n", " x", "\x7f\x00", "<&>", "2026-03-01", "1e3"},
		Size:  1 << 63, Share: 0.25, Yes: true, Empty: []int{}, Inner: map[string]int{"b": 1, "a": 2},
	}
	var out strings.Builder
	if err := writeYAML(&out, want); err != nil {
		t.Fatal(err)
	}
	var got doc
	if err := yaml.Unmarshal([]byte(out.String()), &got); err != nil {
		t.Fatalf("%v in\n%s", err, out.String())
	}
	if a, b := fmt.Sprintf("%#v", want), fmt.Sprintf("%#v", got); a != b {
		t.Errorf("%s\ncame back as\n%s\nfrom\n%s", a, b, out.String())
	}
}
