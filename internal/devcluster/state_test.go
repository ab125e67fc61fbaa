package devcluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

func testState() *state {
	st := &state{
		Format: stateFormat, Created: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC),
		Settings: Settings{Nodes: 2, Orchestrators: 1, Zones: 2, Port: 7400},
	}
	for _, m := range st.Settings.members() {
		st.Processes = append(st.Processes, process{member: m})
	}
	st.Processes[1].PID, st.Processes[1].StartTicks, st.Processes[1].Executable = 1234, 1<<63+1, "/opt/kvnode"
	return st
}

func TestStateRoundTrip(t *testing.T) {
	dir := t.TempDir()
	want := testState()
	if err := want.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := loadState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(process{})); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v, want the state file alone", entries, err)
	}
}

func TestLoadStateRefuses(t *testing.T) {
	for _, test := range []struct{ name, content, want string }{
		{"not JSON", "{", "is damaged"},
		{"newer format", `{"format": 2}`, "has format 2"},
		{"no settings", `{"format": 1}`, "is damaged"},
		{"no processes", `{"format":1,"settings":{"nodes":1,"orchestrators":1,"zones":1,"port":7400}}`, "is damaged"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, stateFile)
			if err := os.WriteFile(path, []byte(test.content), 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := loadState(dir)
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got error %v, want %q and the path", err, test.want)
			}
		})
	}
	if _, err := loadState(t.TempDir()); !errors.Is(err, ErrNoCluster) {
		t.Errorf("got error %v, want ErrNoCluster", err)
	}
}

func TestPick(t *testing.T) {
	st := testState()
	for _, test := range []struct {
		names []string
		want  string
	}{
		{nil, "orch1 node1 node2"},
		{[]string{"node2", "orch1", "node2"}, "orch1 node2"},
	} {
		picked, err := st.pick(test.names)
		if got := strings.Join(namesOf(picked), " "); err != nil || got != test.want {
			t.Errorf("%v: got %s, %v, want %s", test.names, got, err, test.want)
		}
	}
	_, err := st.pick([]string{"node1", "node7", "node8", "node7"})
	var unknown *UnknownNameError
	if !errors.As(err, &unknown) {
		t.Fatalf("got error %v, want an UnknownNameError", err)
	}
	want := "no process is named node7, node8: there are orch1, node1, node2"
	if err.Error() != want {
		t.Errorf("got error %q, want %q", err, want)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*lockRetry)
	defer cancel()
	if _, err := lock(ctx, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v from a lock that is taken", err)
	}
	unlock()
	again, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatalf("a lock that is free: %v", err)
	}
	again()
}

func TestConfigFiles(t *testing.T) {
	st := testState()
	for name, want := range map[string]string{
		"node2": `name: node2
zone: z2
data_dir: /d/node2
orchestrators:
    - 127.0.0.1:7390
listen: 127.0.0.1:7410
admin_listen: 127.0.0.1:7411
gossip_listen: 127.0.0.1:7412
`,
		"orch1": `name: orch1
data_dir: /d/orch1
listen: 127.0.0.1:7390
admin_listen: 127.0.0.1:7391
gossip_listen: 127.0.0.1:7392
raft_listen: 127.0.0.1:7393
peers:
    - name: orch1
      address: 127.0.0.1:7390
      admin_address: 127.0.0.1:7391
      gossip_address: 127.0.0.1:7392
      raft_address: 127.0.0.1:7393
bootstrap:
    founding_nodes: 2
    health_checks:
        interval: 1s
        timeout: 500ms
        healthy_threshold: 2
        unhealthy_threshold: 3
    replace_after: 20s
election_timeout: 500ms
`,
	} {
		picked, err := st.pick([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		got, err := yaml.Marshal(st.configFor("/d", "/opt", picked[0].member))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("configuration of %s (-want +got):\n%s", name, diff)
		}
	}
}

func TestCheckEmpty(t *testing.T) {
	dir := t.TempDir()
	if err := checkEmpty(filepath.Join(dir, "new")); err != nil {
		t.Errorf("a directory that does not exist: %v", err)
	}
	write := func(name string) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(lockFile)
	if err := checkEmpty(dir); err != nil {
		t.Errorf("a lock alone: %v", err)
	}
	write("thesis.tex")
	if err := checkEmpty(dir); err == nil || !strings.Contains(err.Error(), "is not empty and holds no cluster") {
		t.Errorf("got error %v for somebody's directory", err)
	}
	write(stateFile)
	if err := checkEmpty(dir); err == nil || !strings.Contains(err.Error(), "holds a cluster already") {
		t.Errorf("got error %v for a cluster", err)
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	long := strings.Repeat("x", 1000)
	content := "of an earlier run\n" + strings.Repeat(long+"\n", 20) + "last\n"
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		offset int64
		want   []string
	}{
		{"lines that fit", int64(len(content) - len("last\n") - len(long) - 1), []string{long, "last"}},
		{"cut at a line", 0, []string{long, long, long, long, long, long, long, long, "last"}},
		{"nothing", int64(len(content)), []string{"(it wrote nothing)"}},
	} {
		if diff := cmp.Diff(test.want, tail(path, test.offset)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("short\n", 100)), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := tail(path, 0); len(got) != tailLines {
		t.Errorf("got %d lines, want %d", len(got), tailLines)
	}
}

func TestOpenLogSetsALongOneAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, offset, err := openLog(path)
	if err != nil || offset != 0 {
		t.Fatalf("a new log: offset %d, %v", offset, err)
	}
	if err := errors.Join(f.Truncate(maxLogBytes), f.Close()); err != nil {
		t.Fatal(err)
	}
	if f, offset, err = openLog(path); err != nil || offset != maxLogBytes {
		t.Fatalf("a full log: offset %d, %v", offset, err)
	}
	if err := errors.Join(f.Truncate(maxLogBytes+1), f.Close()); err != nil {
		t.Fatal(err)
	}
	if f, offset, err = openLog(path); err != nil || offset != 0 {
		t.Fatalf("a log that was too long: offset %d, %v", offset, err)
	}
	f.Close()
	if info, err := os.Stat(path + ".old"); err != nil || info.Size() != maxLogBytes+1 {
		t.Errorf("the earlier log: %v", err)
	}
}
