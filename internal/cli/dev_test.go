package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/devcluster/fakedaemon"
)

// Called by another name, the test binary is that program.
func init() {
	fakedaemon.Main()
	if filepath.Base(os.Args[0]) != "kvctl" {
		return
	}
	a := &App{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv,
		ConfigDir: os.Getenv("TEST_CONFIG_DIR"), BinDir: filepath.Dir(os.Args[0]),
	}
	os.Exit(a.Run(context.Background(), os.Args[1:]))
}

// devPatience bounds every wait of these tests.
const devPatience = 30 * time.Second

func devEventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(devPatience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", devPatience, what)
		}
	}
}

// devBench is a place to run kvctl dev in, with daemons that only pretend.
type devBench struct {
	t            *testing.T
	config, bin  string
	cache, extra string
	base         int
}

func newDevBench(t *testing.T) *devBench {
	b := &devBench{t: t, config: filepath.Join(t.TempDir(), "config"), bin: fakedaemon.Install(t), cache: t.TempDir(), base: fakedaemon.FreeBase(t)}
	t.Cleanup(func() {
		for _, dir := range []string{b.dir(), b.extra} {
			if cluster, err := devcluster.Open(dir, devcluster.Options{}); err == nil {
				cluster.Kill(context.Background()) // what the test has left running
			}
		}
	})
	return b
}

// dir is the default directory of a cluster.
func (b *devBench) dir() string { return filepath.Join(b.cache, "kvasir-dev") }

// run runs kvctl dev and returns what it said and its exit code.
func (b *devBench) run(args ...string) (stdout, stderr string, code int) {
	var out, talk bytes.Buffer
	a := &App{
		Stdin: strings.NewReader(""), Stdout: &out, Stderr: &talk,
		Getenv:    func(name string) string { return map[string]string{"XDG_CACHE_HOME": b.cache}[name] },
		ConfigDir: b.config, BinDir: b.bin,
	}
	code = a.Run(context.Background(), append([]string{"dev"}, args...))
	return out.String(), talk.String(), code
}

// want runs kvctl dev and expects an exit code, and all the texts in what it said.
func (b *devBench) want(code int, args string, texts ...string) {
	b.t.Helper()
	stdout, stderr, got := b.run(strings.Fields(args)...)
	if got != code {
		b.t.Fatalf("dev %s: exit code %d, want %d\n%s%s", args, got, code, stdout, stderr)
	}
	for _, text := range texts {
		if !strings.Contains(stdout+stderr, text) {
			b.t.Errorf("dev %s: %q is missing in\n%s%s", args, text, stdout, stderr)
		}
	}
}

func (b *devBench) status(args ...string) []devcluster.Status {
	b.t.Helper()
	stdout, stderr, code := b.run(append([]string{"status", "-o", "json"}, args...)...)
	var out []devcluster.Status
	if err := json.Unmarshal([]byte(stdout), &out); err != nil || code != 0 {
		b.t.Fatalf("dev status: exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}
	return out
}

func (b *devBench) states() string {
	b.t.Helper()
	var out []string
	for _, s := range b.status() {
		out = append(out, s.Name+" "+s.State)
	}
	return strings.Join(out, ", ")
}

func (b *devBench) wantStates(want string) {
	b.t.Helper()
	if got := b.states(); got != want {
		b.t.Errorf("states: %s, want %s", got, want)
	}
}

func (b *devBench) wantContext(want ...string) {
	b.t.Helper()
	a := &App{ConfigDir: b.config}
	all, err := a.loadContexts()
	if err != nil {
		b.t.Fatal(err)
	}
	if diff := cmp.Diff(want, all.ByName["dev"].Endpoints); diff != "" || all.Current != "dev" {
		b.t.Errorf("current context %q, endpoints (-want +got):\n%s", all.Current, diff)
	}
}

func (b *devBench) address(offset int) string { return fmt.Sprintf("127.0.0.1:%d", b.base+offset) }

func TestDevDetached(t *testing.T) {
	b := newDevBench(t)
	b.want(3, "status", "no development cluster was started yet", "start one with `kvctl dev`")

	create := fmt.Sprintf("--nodes 4 --orchestrators 3 --port %d --detach", b.base)
	b.want(0, create,
		"starting orch1, orch2, orch3, node1, node2, node3, node4 in "+b.dir(),
		fmt.Sprintf("Kvasir is ready: 4 nodes, 3 orchestrators, 3 zones, port %d.", b.base),
		"http://"+b.address(1), b.address(30), b.address(-30),
		"Data and logs:  "+b.dir(),
		"put greeting hello", "get greeting", "--trace", "dev kill node2 && ", "dev start node2", "dev stop.")
	b.wantStates("node1 running, node2 running, node3 running, node4 running, orch1 running, orch2 running, orch3 running")
	b.wantContext(b.address(0), b.address(10), b.address(20), b.address(30), b.address(-10), b.address(-20), b.address(-30))

	b.want(0, create, "is already running", "node4")
	b.want(0, "kill node2 orch3", "killed node2, orch3")
	b.want(1, "kill node2", "node2 is not running")
	b.want(0, "pause node3", "paused node3")
	b.wantStates("node1 running, node2 stopped, node3 paused, node4 running, orch1 running, orch2 running, orch3 stopped")
	b.want(0, "--detach", "is already running", "dev start node2", "dev resume node3")
	b.want(1, "start node3", "node3 is paused", "kvctl dev resume node3")
	b.want(0, "resume node3", "resumed node3")
	b.want(0, "start node2 node1", "node1 is already running", "started node2")
	b.want(3, "kill nonsense", `no process is named nonsense: there are orch1, orch2, orch3, node1, node2, node3, node4`)
	b.want(0, "add --zone attic", "added node5", "attic", b.address(40))
	b.wantContext(b.address(0), b.address(10), b.address(20), b.address(30), b.address(40), b.address(-10), b.address(-20), b.address(-30))

	b.want(0, "stop", "stopped node1, node2, node3, node4, node5, orch1, orch2; the data is in "+b.dir())
	b.want(0, "stop", "nothing is running")
	b.wantStates("node1 stopped, node2 stopped, node3 stopped, node4 stopped, node5 stopped, orch1 stopped, orch2 stopped, orch3 stopped")
	b.want(0, "--detach", "5 nodes, 3 orchestrators", "(created with 4 nodes)")
	b.wantStates("node1 running, node2 running, node3 running, node4 running, node5 running, orch1 running, orch2 running, orch3 running")
	b.want(0, "stop")
}

func TestDevStatusForPrograms(t *testing.T) {
	b := newDevBench(t)
	stdout, stderr, code := b.run("--nodes", "1", "--port", fmt.Sprint(b.base), "--detach", "-o", "json")
	if code != 0 {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	status, _, _ := b.run("status", "-o", "json")
	if stdout != status {
		t.Errorf("dev prints\n%s\nand its status is\n%s", stdout, status)
	}
	got := regexp.MustCompile(`"pid": [1-9]\d*`).ReplaceAllString(status, `"pid": PID`)
	want := fmt.Sprintf(`[
  {
    "name": "node1",
    "role": "data",
    "state": "running",
    "pid": PID,
    "zone": "z1",
    "client_addr": "%s",
    "admin_addr": "%s"
  },
  {
    "name": "orch1",
    "role": "orchestrator",
    "state": "running",
    "pid": PID,
    "zone": "",
    "client_addr": "%s",
    "admin_addr": "%s"
  }
]
`, b.address(0), b.address(1), b.address(-10), b.address(-9))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	var failure struct{ Code, Message string }
	_, stderr, code = b.run("kill", "node9", "-o", "json")
	if err := json.Unmarshal([]byte(stderr), &failure); err != nil || code != 3 || failure.Code != "NotFound" {
		t.Errorf("exit code %d, %v, error %s", code, err, stderr)
	}
	b.want(0, "stop")
}

func TestDevFlags(t *testing.T) {
	b := newDevBench(t)
	for args, want := range map[string]string{
		"--nodes 0":               "--nodes 0: want 1 to 100",
		"--nodes x":               "--nodes",
		"--orchestrators 2":       "--orchestrators 2: want 1, 3 or 5",
		"--nodes 2 --zones 3":     "--zones 3: want 1 to the number of nodes, 2",
		"--zones 0":               "--zones 0",
		"--port 70000":            "ports go from 1 to 65535",
		"--autonomous":            "--autonomous",
		"stauts":                  "status",
		"kill":                    "needs the NAME of a process",
		"status node1":            "node1",
		"status --detach":         "--detach",
		"--nodes 3 extra --port9": "--port9",
	} {
		b.want(2, args, want)
	}
	if _, err := os.Stat(b.dir()); !os.IsNotExist(err) {
		t.Errorf("bad flags left something in %s: %v", b.dir(), err)
	}

	create := fmt.Sprintf("--nodes 2 --zones 1 --port %d --detach", b.base)
	b.want(0, create)
	b.want(0, "stop")
	for args, want := range map[string]string{
		"--nodes 5":           "add nodes to it with `kvctl dev add`",
		"--nodes 1":           "the cluster in " + b.dir() + " has 2 nodes",
		"--orchestrators 3":   "has 2 nodes, 1 orchestrator, 1 zone",
		"--zones 2":           "unlike --zones 2",
		"--port 7400":         fmt.Sprintf("port %d, unlike --port 7400: leave that out", b.base),
		"--nodes 0 --zones 9": "unlike --nodes 0 and --zones 9",
	} {
		b.want(2, args+" --detach", want)
		b.wantStates("node1 stopped, node2 stopped, orch1 stopped")
	}
	b.want(0, create)
	b.want(0, "add")
	b.want(0, "stop")
	// Both the number it was created with and the present one are right.
	b.want(0, create)
	b.want(0, fmt.Sprintf("--nodes 3 --port %d --detach", b.base), "is already running")
	b.want(0, "stop")
}

func TestDevWithoutAHome(t *testing.T) {
	b := newDevBench(t)
	b.config = ""
	b.want(3, "status", "no development cluster is remembered", "--data")
	b.want(1, fmt.Sprintf("--nodes 1 --port %d --detach", b.base), "no directory to remember the cluster in")
	for _, s := range b.status("--data", b.dir()) {
		if s.State != devcluster.Stopped {
			t.Errorf("%s is %s", s.Name, s.State)
		}
	}
}

func TestDevSecondCluster(t *testing.T) {
	b := newDevBench(t)
	b.want(0, fmt.Sprintf("--nodes 1 --port %d --detach", b.base))
	b.extra = filepath.Join(t.TempDir(), "other")

	b.want(1, fmt.Sprintf("--nodes 1 --port %d --detach --data %s", b.base, b.extra),
		"nothing was started, as ports are taken",
		fmt.Sprintf("node1 needs port %d/tcp (gRPC), %d/tcp (admin HTTP), %d/tcp (gossip), %d/udp (gossip): in use by process", b.base, b.base+1, b.base+2, b.base+2),
		filepath.Join(b.dir(), "node1.yaml"))
	b.want(0, fmt.Sprintf("--nodes 1 --port %d --detach --data %s", b.base+30, b.extra))
	b.wantContext(b.address(30), b.address(20))

	// Without --data it is the last one; the other's context is not touched by add.
	b.want(0, "kill node1")
	b.wantStates("node1 stopped, orch1 running")
	if got := b.status("--data", b.dir()); got[0].State != devcluster.Running {
		t.Errorf("the first cluster's node1 is %s", got[0].State)
	}
	b.want(0, "add --data "+b.dir())
	b.wantContext(b.address(30), b.address(20))
	b.want(0, "stop")
	b.want(0, "stop --data "+b.dir())
	b.want(3, "stop --data "+t.TempDir(), "no development cluster in ")
}

func TestDevFailedStartStopsAll(t *testing.T) {
	b := newDevBench(t)
	t.Setenv(fakedaemon.Behaviour, "node2=exit")
	create := fmt.Sprintf("--nodes 2 --port %d --detach", b.base)
	b.want(1, create, "node2 ended before it was ready: exit status 1", "node2 was told to fail", filepath.Join(b.dir(), "node2.log"), "stopping orch1, node1, node2")
	b.wantStates("node1 stopped, node2 stopped, orch1 stopped")
	if err := os.Remove(filepath.Join(b.bin, "kvorch")); err != nil {
		t.Fatal(err)
	}
	b.want(1, create, filepath.Join(b.bin, "kvorch")+" is missing: build it with `make build`")
}

// devTalk is the output of a process under test.
type devTalk struct {
	mu   sync.Mutex
	text []byte
}

func (d *devTalk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.text = append(d.text, p...)
	return len(p), nil
}

func (d *devTalk) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return string(d.text)
}

// foreground starts kvctl dev as a process.
func (b *devBench) foreground(env []string, args ...string) (cmd *exec.Cmd, said *devTalk) {
	b.t.Helper()
	said = &devTalk{}
	cmd = exec.Command(filepath.Join(b.bin, "kvctl"), append([]string{"dev"}, args...)...)
	cmd.Env = append(slices.Concat(os.Environ(), env), "TEST_CONFIG_DIR="+b.config, "XDG_CACHE_HOME="+b.cache)
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { cmd.Process.Kill() })
	return cmd, said
}

func TestDevForeground(t *testing.T) {
	b := newDevBench(t)
	cmd, said := b.foreground(nil, "--nodes", "2", "--port", fmt.Sprint(b.base))
	expect := func(what string) {
		t.Helper()
		devEventually(t, what, func() bool { return strings.Contains(said.String(), what) })
	}
	expect("Ctrl-C stops the cluster and keeps its data.")
	b.want(0, "kill node2")
	expect("node2 died: signal: killed\n  | level=INFO msg=starting name=node2")
	expect("Start it again with: kvctl dev start node2")
	for _, s := range b.status() {
		if s.Name == "node2" && s.State != devcluster.Stopped {
			t.Errorf("node2 is %s", s.State)
		}
	}
	b.want(0, "start node2")
	expect("node2 was started")
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v, want exit code 0\n%s", err, said)
	}
	expect("stopping the nodes, then the orchestrators")
	expect("stopped; the data is in " + b.dir())
	// Also node2, which was another run's child.
	b.wantStates("node1 stopped, node2 stopped, orch1 stopped")
	if n := strings.Count(said.String(), "died"); n != 1 {
		t.Errorf("%d deaths were reported, want 1:\n%s", n, said)
	}
}

func TestDevForegroundStoppedFromElsewhere(t *testing.T) {
	b := newDevBench(t)
	cmd, said := b.foreground(nil, "--nodes", "1", "--port", fmt.Sprint(b.base))
	devEventually(t, "it is ready", func() bool { return strings.Contains(said.String(), "Ctrl-C stops") })
	b.want(0, "stop")
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v, want exit code 0\n%s", err, said)
	}
	if s := said.String(); !strings.Contains(s, "the cluster was stopped by another kvctl") || strings.Contains(s, "died") {
		t.Errorf("it said\n%s", s)
	}
}

func TestDevInterruptedStart(t *testing.T) {
	b := newDevBench(t)
	cmd, said := b.foreground([]string{fakedaemon.Behaviour + "=node1=unready"}, "--nodes", "1", "--port", fmt.Sprint(b.base), "--detach")
	devEventually(t, "it is waiting", func() bool { return strings.Contains(said.String(), "starting orch1, node1") })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said.String(), "interrupted before the cluster was ready") {
		t.Errorf("ended with %v\n%s", err, said)
	}
	b.wantStates("node1 stopped, orch1 stopped")
}

func TestDevSecondSignalKills(t *testing.T) {
	b := newDevBench(t)
	cmd, said := b.foreground([]string{fakedaemon.Behaviour + "=node1=stubborn"}, "--nodes", "1", "--port", fmt.Sprint(b.base))
	devEventually(t, "it is ready", func() bool { return strings.Contains(said.String(), "Ctrl-C stops") })
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	devEventually(t, "it is stopping", func() bool { return strings.Contains(said.String(), "Ctrl-C again kills") })
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v, want exit code 0\n%s", err, said)
	}
	if !strings.Contains(said.String(), "node1 had no time to stop: killing with SIGKILL") {
		t.Errorf("it said\n%s", said)
	}
	b.wantStates("node1 stopped, orch1 stopped")
}

func TestInvocation(t *testing.T) {
	for path, want := range map[string]string{"/usr/bin:/opt/kvasir/bin": "kvctl", "/usr/bin": "/opt/kvasir/bin/kvctl"} {
		a := &App{BinDir: "/opt/kvasir/bin", Getenv: func(string) string { return path }}
		if got := a.invocation(); got != want {
			t.Errorf("with PATH=%s: got %s, want %s", path, got, want)
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{filepath.Join(wd, "bin"): "bin/kvctl", wd: "./kvctl"} {
		a := &App{BinDir: dir, Getenv: func(string) string { return "" }}
		if got := a.invocation(); got != want {
			t.Errorf("from %s: got %s, want %s", dir, got, want)
		}
	}
}
