package devcluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/devcluster/fakedaemon"
)

func TestMain(m *testing.M) {
	fakedaemon.Main()
	flag.Parse()
	asked := false
	flag.Visit(func(f *flag.Flag) { asked = asked || f.Name == "test.parallel" })
	if !asked {
		// Tests that run beside others wait for clocks and processes most of the time: as
		// many at once as there are cores would leave the cores idle.
		if err := flag.Set("test.parallel", strconv.Itoa(max(3, runtime.GOMAXPROCS(0)))); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// patience bounds every wait of these tests.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// notices collects what a cluster says.
type notices struct {
	mu   sync.Mutex
	text string
}

func (n *notices) add(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.text += s + "\n"
}

func (n *notices) has(s string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Contains(n.text, s)
}

func (n *notices) count(s string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Count(n.text, s)
}

// create makes a cluster of fake daemons whose processes end with the test.
func create(t *testing.T, nodes, orchestrators int) (*Cluster, *notices) {
	t.Helper()
	said := &notices{}
	opts := Options{BinDir: fakedaemon.Install(t), ReadyTimeout: patience, StopTimeout: patience, Notice: said.add}
	settings := Settings{Nodes: nodes, Orchestrators: orchestrators, Zones: DefaultZones(nodes), Port: fakedaemon.FreeBase(t)}
	c, err := Create(t.Context(), filepath.Join(t.TempDir(), "dev"), settings, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hurry, cancel := context.WithCancel(context.Background())
		cancel()
		c.StopChildren(hurry)
	})
	return c, said
}

func startAll(t *testing.T, c *Cluster) {
	t.Helper()
	if _, err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// states returns the state of every process.
func states(t *testing.T, c *Cluster) map[string]string {
	t.Helper()
	status, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range status {
		out[s.Name] = s.State
		if (s.PID == 0) != (s.State == Stopped) {
			t.Errorf("%s is %s with PID %d", s.Name, s.State, s.PID)
		}
	}
	return out
}

func wantStates(t *testing.T, c *Cluster, want map[string]string) {
	t.Helper()
	if diff := cmp.Diff(want, states(t, c)); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
}

// stamps returns the times in a file of a fake daemon.
func stamps(t *testing.T, c *Cluster, name, file string) []int64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Dir(), name, file))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var out []int64
	for _, line := range strings.Fields(string(b)) {
		n, err := strconv.ParseInt(line, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, n)
	}
	return out
}

func TestLife(t *testing.T) {
	c, _ := create(t, 2, 1)
	wantStates(t, c, map[string]string{"node1": Stopped, "node2": Stopped, "orch1": Stopped})
	startAll(t, c)
	wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})

	if err := c.Kill(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Stopped, "orch1": Running})
	for what, do := range map[string]func(context.Context, ...string) error{"kill": c.Kill, "pause": c.Pause, "resume": c.Resume} {
		if err := do(t.Context(), "node2"); err == nil || err.Error() != "node2 is not running" {
			t.Errorf("%s of a stopped process: got error %v", what, err)
		}
	}

	if err := c.Pause(t.Context(), "node1", "orch1"); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Paused, "node2": Stopped, "orch1": Paused})
	if _, err := c.Start(t.Context(), "node1", "node2"); err == nil || !strings.Contains(err.Error(), "node1 is paused: let it go on with `kvctl dev resume node1`") {
		t.Errorf("start of a paused process: got error %v", err)
	}
	wantStates(t, c, map[string]string{"node1": Paused, "node2": Stopped, "orch1": Paused})
	if err := c.Resume(t.Context(), "node1", "orch1"); err != nil {
		t.Fatal(err)
	}

	started, err := c.Start(t.Context(), "node2", "node1")
	if diff := cmp.Diff([]string{"node2"}, started); diff != "" || err != nil {
		t.Errorf("started (-want +got):\n%s%v", diff, err)
	}
	if err := c.WaitReady(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})
	if n := len(stamps(t, c, "node2", fakedaemon.Starts)); n != 2 {
		t.Errorf("node2 was started %d times on its data, want 2", n)
	}

	if err := c.Kill(t.Context(), "node1", "node9"); !errors.As(err, new(*UnknownNameError)) {
		t.Errorf("got error %v, want an UnknownNameError", err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})
}

func TestStopOrderAndPausedProcesses(t *testing.T) {
	c, said := create(t, 2, 1)
	startAll(t, c)
	if err := c.Pause(t.Context(), "node2", "orch1"); err != nil {
		t.Fatal(err)
	}
	stopped, err := c.Stop(t.Context())
	if diff := cmp.Diff([]string{"node1", "node2", "orch1"}, stopped); diff != "" || err != nil {
		t.Fatalf("stopped (-want +got):\n%s%v", diff, err)
	}
	wantStates(t, c, map[string]string{"node1": Stopped, "node2": Stopped, "orch1": Stopped})
	orch := stamps(t, c, "orch1", fakedaemon.Stops)
	for _, name := range []string{"node1", "node2"} {
		if at := stamps(t, c, name, fakedaemon.Stops); len(at) != 1 || len(orch) != 1 || at[0] >= orch[0] {
			t.Errorf("%s stopped by itself at %v, the orchestrator at %v; want the node first", name, at, orch)
		}
	}
	if said.has("SIGKILL") {
		t.Errorf("said %q", said.text)
	}
	if stopped, err = c.Stop(t.Context()); err != nil || len(stopped) != 0 {
		t.Errorf("a second stop: %v, %v", stopped, err)
	}
}

func TestStubbornProcessIsKilled(t *testing.T) {
	t.Setenv(fakedaemon.Behaviour, "node1=stubborn")
	c, said := create(t, 2, 1)
	startAll(t, c)
	c.opts.StopTimeout = 200 * time.Millisecond
	if _, err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Stopped, "node2": Stopped, "orch1": Stopped})
	if !said.has("node1") || !said.has("did not stop within 200ms: killing with SIGKILL") {
		t.Errorf("said %q", said.text)
	}
}

func TestStopIsHurriedByItsContext(t *testing.T) {
	t.Setenv(fakedaemon.Behaviour, "node1=stubborn,orch1=stubborn")
	c, said := create(t, 1, 1)
	startAll(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := c.Stop(ctx)
		done <- err
	}()
	eventually(t, "the stop is under way", func() bool {
		st, err := loadState(c.Dir())
		return err == nil && st.Processes[0].Stopping
	})
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Stopped, "orch1": Stopped})
	if !said.has("node1 had no time to stop: killing with SIGKILL") {
		t.Errorf("said %q", said.text)
	}
}

func TestAnotherRunGoesOn(t *testing.T) {
	c, _ := create(t, 1, 1)
	startAll(t, c)
	other, err := Open(c.Dir(), Options{BinDir: c.opts.BinDir, StopTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	wantStates(t, other, map[string]string{"node1": Running, "orch1": Running})
	if started, err := other.Start(t.Context()); err != nil || len(started) != 0 {
		t.Errorf("started %v, %v, want nothing", started, err)
	}
	if err := other.Kill(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Stopped, "orch1": Running})
	if _, err := other.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := other.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "orch1": Running})
	if _, err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestConcurrentStartsStartOnce(t *testing.T) {
	c, _ := create(t, 2, 1)
	var wg sync.WaitGroup
	var mu sync.Mutex
	total := 0
	for range 4 {
		wg.Go(func() {
			started, err := c.Start(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			total += len(started)
		})
	}
	wg.Wait()
	if total != 3 {
		t.Errorf("%d processes were started, want 3", total)
	}
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestAddNode(t *testing.T) {
	c, _ := create(t, 1, 1)
	startAll(t, c)
	for i, zone := range []string{"", "attic"} {
		name, err := c.AddNode(t.Context(), zone)
		if want := fmt.Sprintf("node%d", i+2); err != nil || name != want {
			t.Fatalf("added %s, %v, want %s", name, err, want)
		}
		if _, err := c.Start(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitReady(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	status, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	base := c.Settings().Port
	for i, want := range []Status{
		{Name: "node1", Role: RoleData, State: Running, Zone: "z1", ClientAddr: address(base), AdminAddr: address(base + 1)},
		{Name: "node2", Role: RoleData, State: Running, Zone: "z1", ClientAddr: address(base + 10), AdminAddr: address(base + 11)},
		{Name: "node3", Role: RoleData, State: Running, Zone: "attic", ClientAddr: address(base + 20), AdminAddr: address(base + 21)},
		{Name: "orch1", Role: RoleOrchestrator, State: Running, ClientAddr: address(base - 10), AdminAddr: address(base - 9)},
	} {
		got := status[i]
		if got.PID == 0 {
			t.Errorf("%s has no PID", got.Name)
		}
		got.PID = 0
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if _, err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	started, err := c.Start(t.Context())
	if diff := cmp.Diff([]string{"orch1", "node1", "node2", "node3"}, started); diff != "" || err != nil {
		t.Errorf("started (-want +got):\n%s%v", diff, err)
	}
	if what, err := c.Describe(); err != nil || what != fmt.Sprintf("3 nodes, 1 orchestrator, 1 zone, port %d (created with 1 node)", base) {
		t.Errorf("described as %q, %v", what, err)
	}
}

func TestFailedStarts(t *testing.T) {
	t.Run("ends at once", func(t *testing.T) {
		t.Setenv(fakedaemon.Behaviour, "node2=exit")
		c, _ := create(t, 2, 1)
		if _, err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		err := c.WaitReady(t.Context())
		var failed *StartError
		if !errors.As(err, &failed) || failed.Name != "node2" || !failed.Exited {
			t.Fatalf("got error %v, want one that node2 ended", err)
		}
		for _, want := range []string{"exit status 1", "node2 was told to fail", c.LogPath("node2")} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got error %q without %q", err, want)
			}
		}
	})
	t.Run("not ready", func(t *testing.T) {
		t.Setenv(fakedaemon.Behaviour, "node1=unready,node2=unready")
		c, _ := create(t, 2, 1)
		c.opts.ReadyTimeout = 2 * time.Second
		if _, err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The processes must have come far enough to say so.
		for _, name := range []string{"node1", "node2", "orch1"} {
			eventually(t, name+" listens", func() bool { return len(stamps(t, c, name, fakedaemon.Starts)) == 1 })
		}
		err := c.WaitReady(t.Context())
		var failed *StartError
		if !errors.As(err, &failed) || failed.Name != "node1" || failed.Exited {
			t.Fatalf("got error %v, want one that node1 is not ready", err)
		}
		for _, want := range []string{`/readyz says "the ring has not formed" (HTTP 503)`, "nor are node2"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got error %q without %q", err, want)
			}
		}
		wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})
	})
	t.Run("removed", func(t *testing.T) {
		t.Setenv(fakedaemon.Behaviour, "node2=removed")
		c, said := create(t, 2, 1)
		startAll(t, c)
		if got := said.count("node2 was removed from the cluster"); got != 1 {
			t.Errorf("it is told of %d times", got)
		}
		wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})
	})
	t.Run("port taken", func(t *testing.T) {
		c, _ := create(t, 1, 1)
		startAll(t, c)
		second := c.Settings()
		_, err := Create(t.Context(), t.TempDir()+"/dev", second, c.opts)
		if !errors.As(err, new(*PortsBusyError)) || !strings.Contains(err.Error(), configPath(c.Dir(), "orch1")) {
			t.Errorf("got error %v, want the ports and the holder's command line", err)
		}
		if _, err := c.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("no executable", func(t *testing.T) {
		binDir := fakedaemon.Install(t)
		if err := os.Remove(filepath.Join(binDir, "kvnode")); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir() + "/dev"
		_, err := Create(t.Context(), dir, Settings{Nodes: 1, Orchestrators: 1, Zones: 1, Port: fakedaemon.FreeBase(t)}, Options{BinDir: binDir})
		if want := filepath.Join(binDir, "kvnode") + " is missing: build it with `make build`"; err == nil || err.Error() != want {
			t.Errorf("got error %v, want %q", err, want)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the directory was made all the same: %v", err)
		}
	})
}

func TestWatch(t *testing.T) {
	c, said := create(t, 2, 1)
	startAll(t, c)
	over := make(chan error)
	go func() { over <- c.Watch(t.Context()) }()

	other, err := Open(c.Dir(), Options{BinDir: c.opts.BinDir, StopTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(what string) {
		t.Helper()
		eventually(t, what, func() bool { return said.has(what) })
	}
	if err := other.Kill(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	expect("node2 died: signal: killed\n  | level=INFO msg=starting name=node2")
	expect("Start it again with: kvctl dev start node2")
	if _, err := other.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	expect("node2 was started (process ")
	if err := other.Pause(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	expect("node1 is paused")
	if err := other.Resume(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	expect("node1 goes on")
	if name, err := other.AddNode(t.Context(), ""); err != nil || name != "node3" {
		t.Fatal(name, err)
	}
	if _, err := other.Start(t.Context(), "node3"); err != nil {
		t.Fatal(err)
	}
	expect("node3 was started")
	// One that this run did not start.
	if err := other.Kill(t.Context(), "node3"); err != nil {
		t.Fatal(err)
	}
	expect("node3 died: it is not running")

	before := said.count("died")
	if _, err := other.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-over; !errors.Is(err, ErrStopped) {
		t.Errorf("Watch ended with %v, want ErrStopped", err)
	}
	// node3 was dead before it was asked to stop, so that nothing is left to report.
	if after := said.count("died"); after != before {
		t.Errorf("a planned stop was reported as a failure:\n%s", said.text)
	}
}

func TestWatchEndsWithTheDirectory(t *testing.T) {
	c, _ := create(t, 1, 1)
	startAll(t, c)
	if err := os.RemoveAll(c.Dir()); err != nil {
		t.Fatal(err)
	}
	if err := c.Watch(t.Context()); !errors.Is(err, ErrNoCluster) {
		t.Errorf("Watch ended with %v, want ErrNoCluster", err)
	}
	stopped, err := c.StopChildren(t.Context())
	if err != nil || len(stopped) != 2 {
		t.Errorf("stopped %v, %v, want both", stopped, err)
	}
}
