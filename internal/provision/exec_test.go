package provision

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// provisioner is what the orchestrators ask for.
type provisioner interface {
	Kind() string
	Launch(context.Context, Node) error
	End(context.Context, Node) error
	List(context.Context) ([]Instance, error)
}

var (
	_ provisioner = (*Exec)(nil)
	_ provisioner = (*Docker)(nil)
)

// hook writes a shell script and returns the provisioner that runs it.
func hook(t *testing.T, script string) *Exec {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return NewExec(execConfig("/bin/sh", path, "first"), []string{"orch1:7390", "orch2:7390"})
}

func TestExecPassesTheRequest(t *testing.T) {
	dir := t.TempDir()
	e := hook(t, fmt.Sprintf(`cat >%[1]s/stdin; echo "$@" >%[1]s/args; env | grep ^KVASIR_ | sort >%[1]s/env`, dir))
	node := Node{Name: "node6", Zone: "z 1", Incarnation: 17}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for action, call := range map[string]func() error{
		"launch": func() error { return e.Launch(t.Context(), node) },
		"end":    func() error { return e.End(t.Context(), node) },
	} {
		if err := call(); err != nil {
			t.Fatal(err)
		}
		if got := read("args"); got != "first "+action+"\n" {
			t.Errorf("arguments %q", got)
		}
		want := "KVASIR_ACTION=" + action + "\nKVASIR_CLUSTER=shop\nKVASIR_INCARNATION=17\nKVASIR_NODE=node6\nKVASIR_ORCHESTRATORS=orch1:7390,orch2:7390\nKVASIR_ZONE=z 1\n"
		if diff := cmp.Diff(want, read("env")); diff != "" {
			t.Errorf("environment (-want +got):\n%s", diff)
		}
		var got map[string]any
		if err := json.Unmarshal([]byte(read("stdin")), &got); err != nil {
			t.Fatal(err)
		}
		input := map[string]any{"action": action, "cluster": "shop", "node": "node6", "zone": "z 1", "incarnation": 17.0, "orchestrators": []any{"orch1:7390", "orch2:7390"}}
		if diff := cmp.Diff(input, got); diff != "" {
			t.Errorf("standard input (-want +got):\n%s", diff)
		}
	}
}

func TestExecOutcomes(t *testing.T) {
	for _, tc := range []struct {
		name, script string
		ok, again    bool
		want         string
	}{
		{"done", "exit 0", true, false, ""},
		{"done, and says much", "yes | head -c 3000000; yes | head -c 3000000 >&2", true, false, ""},
		{"does not read", "exec 0<&-; exit 0", true, false, ""},
		{"leaves something behind", "sleep 100 & echo $! >$0.pid", true, false, ""},
		{"try again", "echo no machine is free >&2; exit 75", false, true, "hook launch: try again later: no machine is free"},
		{"failed", "for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 3", false, false, "hook launch: exit status 3: line 3; line 4; line 5; line 6; line 7"},
		{"failed, and says much", "yes | head -c 3000000 >&2; exit 1", false, false, "hook launch: exit status 1: y; y; y; y; y"},
		{"a line that is long", "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", false, false, "hook launch: exit status 1: " + strings.Repeat("x", saidBytes)},
		{"colours", `printf 'a\033[31mb' >&2; exit 1`, false, false, "hook launch: exit status 1: a [31mb"},
		{"says nothing", "exit 1", false, false, "hook launch: exit status 1"},
		{"killed", "kill -9 $$", false, false, "hook launch: signal: killed"},
	} {
		e := hook(t, tc.script)
		err := e.Launch(t.Context(), Node{Name: "node6"})
		if (err == nil) != tc.ok || errors.Is(err, ErrTryAgain) != tc.again || err != nil && err.Error() != tc.want {
			t.Errorf("%s: %v", tc.name, err)
		}
		killRecorded(e.command[1] + ".pid")
	}
	if err := NewExec(execConfig("/nowhere/hook"), nil).Launch(t.Context(), Node{Name: "node6"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no hook: %v", err)
	}
}

// killRecorded ends the process whose identifier a hook wrote to a file.
func killRecorded(path string) {
	b, _ := os.ReadFile(path)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// A hook that could be asked to remove "" or "../x" would remove something else.
func TestBadNamesAreRefused(t *testing.T) {
	e := hook(t, "exit 0")
	d := newEngine(t).provisioner(t, dockerConfig())
	for _, name := range []string{"", "..", "../x", "a/b", "-rf"} {
		for _, p := range []provisioner{e, d} {
			if p.Launch(t.Context(), Node{Name: name}) == nil || p.End(t.Context(), Node{Name: name}) == nil {
				t.Errorf("%s takes %q", p.Kind(), name)
			}
		}
	}
}

// Everything that a hanging hook has started ends with the call.
func TestExecKillsWhatHangs(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "alive")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// The child holds the writing end: reading ends when it is gone.
	e := hook(t, fmt.Sprintf(`trap '' TERM INT; echo stuck >&2; sh -c 'echo up; exec sleep 1000' >%s & wait`, fifo))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := e.List(ctx)
		done <- err
	}()
	f, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 3)
	if _, err := f.Read(b); err != nil || string(b) != "up\n" {
		t.Fatalf("%q %v", b, err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !strings.HasSuffix(err.Error(), ": stuck") {
		t.Error(err)
	}
	if n, err := f.Read(b); n != 0 || err == nil {
		t.Errorf("the hook's child still has its output open: %d %v", n, err)
	}
	slow := hook(t, "sleep 1000")
	slow.timeout = time.Second
	if err := slow.Launch(t.Context(), node6); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the timeout: %v", err)
	}
}

func TestExecList(t *testing.T) {
	e := hook(t, `[ -z "$KVASIR_NODE" ] && echo '{"name":"node6","id":"i-1","running":true}' && echo && echo '{"name":"node7","running":false,"more":1}'`)
	got, err := e.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Instance{{"node6", "i-1", true}, {"node7", "", false}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, tc := range []struct{ script, want string }{
		{"echo; echo node6", "hook list: line 2: invalid character"},
		{`echo '{"name":"../x","running":true}'`, "hook list: line 1: bad node name"},
		{`echo '{"name":"node6"}'`, "hook list: line 1: running is missing"},
		{"yes '{}' | head -c 1100000", "hook list printed more than 1048576 bytes"},
		{"echo '{\"name\":\"node6\",\"running\":true}'; exit 1", "hook list: exit status 1"},
	} {
		got, err := hook(t, tc.script).List(t.Context())
		if got != nil || err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("%s: %v %v", tc.script, got, err)
		}
	}
}

func FuzzParseInstances(f *testing.F) {
	f.Add([]byte(`{"name":"node6","id":"i-1","running":true}` + "\n\n{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseInstances(b)
		if err != nil && all != nil {
			t.Errorf("%v and %v", all, err)
		}
		if len(all) > strings.Count(string(b), "\n")+1 {
			t.Errorf("%d instances of %q", len(all), b)
		}
	})
}

// documented returns the example of docs/provisioners.md, whose nodes are kept below
// home, with an executable of the given shell script for kvnode.
func documented(t *testing.T, home, kvnode string) *Exec {
	t.Helper()
	doc, err := os.ReadFile("../../docs/provisioners.md")
	if err != nil {
		t.Fatal(err)
	}
	const first = "#!/bin/sh\n"
	_, rest, _ := strings.Cut(string(doc), "```sh\n"+first)
	script, _, ok := strings.Cut(first+rest, "```")
	if !ok {
		t.Fatal("docs/provisioners.md has no example")
	}
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "kvnode"), []byte(kvnode), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("HOOK_HOME", home)
	e := hook(t, script)
	e.command = e.command[:2]
	e.timeout = time.Hour // it starts many processes, and the machine may be busy
	return e
}

// The hook in the documentation keeps the contract.
func TestDocumentedHook(t *testing.T) {
	home := t.TempDir()
	e := documented(t, home, "#!/bin/sh\ntrap '' TERM\ncd \"$KVNODE_DATA_DIR\"\nenv >part\nmv part env\nexec sleep 1000\n")
	node6, node7 := Node{Name: "node6", Zone: "z1"}, Node{Name: "node7", Zone: "z2"}
	t.Cleanup(func() {
		for _, n := range []Node{node6, node7} {
			if err := e.End(context.Background(), n); err != nil {
				t.Error(err)
			}
		}
	})
	names := func() []string {
		t.Helper()
		all, err := e.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, i := range all {
			out = append(out, fmt.Sprint(i.Name, " ", i.Running && i.ID != ""))
		}
		return out
	}
	together := func(call func(context.Context, Node) error, nodes ...Node) {
		t.Helper()
		var wg sync.WaitGroup
		for _, n := range nodes {
			wg.Go(func() {
				if err := call(t.Context(), n); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	if got := names(); got != nil {
		t.Errorf("at first there are %v", got)
	}
	together(e.Launch, node6, node7, node6)
	together(e.Launch, node6)
	if diff := cmp.Diff([]string{"node6 true", "node7 true"}, names()); diff != "" {
		t.Fatalf("launched (-want +got):\n%s", diff)
	}
	if n := processesWith(t, "KVNODE_DATA_DIR="+home+"/node6"); n != 1 {
		t.Errorf("node6 has %d processes", n)
	}
	env := await(t, filepath.Join(home, "node7", "env"))
	for _, want := range []string{"KVNODE_NAME=node7", "KVNODE_ZONE=z2", "KVNODE_ORCHESTRATORS=orch1:7390,orch2:7390"} {
		if !slices.Contains(strings.Split(env, "\n"), want) {
			t.Errorf("no %s in\n%s", want, env)
		}
	}
	together(e.End, node6, node6)
	if diff := cmp.Diff([]string{"node7 true"}, names()); diff != "" {
		t.Errorf("ended (-want +got):\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(home, "node6")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the data of node6: %v", err)
	}
	together(e.End, node6)
}

// processesWith counts the processes that have a variable set.
func processesWith(t *testing.T, variable string) int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range paths {
		b, _ := os.ReadFile(path) // it may have ended by now
		if slices.Contains(strings.Split(string(b), "\x00"), variable) {
			n++
		}
	}
	return n
}

// await returns the contents of a file once it exists.
func await(t *testing.T, path string) string {
	t.Helper()
	for {
		b, err := os.ReadFile(path)
		if err == nil {
			return string(b)
		}
		if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A node that does not start holds up nobody, and shows as what it is.
func TestDocumentedHookSeesAFailedStart(t *testing.T) {
	e := documented(t, t.TempDir(), "#!/nowhere\n")
	for range 2 {
		// Whether the hook has noticed is a matter of luck.
		if err := e.Launch(t.Context(), node6); err != nil && !strings.Contains(err.Error(), "node6.log") {
			t.Fatal(err)
		}
		for running := true; running; {
			all, err := e.List(t.Context())
			if err != nil || len(all) != 1 || all[0].Name != "node6" {
				t.Fatalf("%v %v", all, err)
			}
			running = all[0].Running
		}
	}
	if err := e.End(t.Context(), node6); err != nil {
		t.Error(err)
	}
	if all, err := e.List(t.Context()); err != nil || all != nil {
		t.Errorf("%v %v", all, err)
	}
}
