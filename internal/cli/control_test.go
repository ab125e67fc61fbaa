package cli

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func TestNamespaces(t *testing.T) {
	f := newFake(t, 5)
	golden(t, "namespace-create", f.run("namespace", "create", "orders", "--n", "5", "--w", "40%", "--r", "one", "--read-repair", "async", "--repair-chance", "0.1", "--hints", "off", "--ttl", "7d").want(t, 0).stdout)
	r := f.run("namespace", "create", "narrow", "--w", "67%").want(t, 0)
	if !strings.Contains(r.stderr, "67% of 3 replicas is all of them") || strings.Contains(r.stdout, "all of them") {
		t.Errorf("the warning is not on stderr: %s%s", r.stdout, r.stderr)
	}
	f.run("namespace", "create", "half", "--w", "all", "--r", "one").want(t, 0, "strong while no replica is replaced")
	golden(t, "namespace-ls", f.run("namespace", "ls").want(t, 0).stdout)
	golden(t, "namespace-ls-json", f.run("namespace", "ls", "-o", "json").want(t, 0).stdout)
	golden(t, "namespace-ls-yaml", f.run("namespace", "ls", "-o", "yaml").want(t, 0).stdout)
	set := decode(t, f.run("namespace", "set", "orders", "--r", "4", "--ttl", "0s", "-o", "json").want(t, 0).stdout)
	if set["r"] != "4" || set["w"] != "40%" || set["w_needs"] != 2.0 || set["ttl_ms"] != 0.0 || set["epoch"] != set["changed_epoch"] || set["repair_chance"] != 0.1 {
		t.Errorf("set: %v", set)
	}
	golden(t, "namespace-show", f.run("namespace", "show", "orders").want(t, 0).stdout)
	golden(t, "namespace-show-json", f.run("namespace", "show", "orders", "-o", "json").want(t, 0).stdout)
	f.run("namespace", "show", "nope").want(t, 3, "nope")
	f.run("namespace", "set", "orders", "--hints", "on", "--if-changed-epoch", "11").want(t, 0)
	f.run("namespace", "set", "orders", "--hints", "on", "--if-changed-epoch", "11").want(t, 5)
	f.run("namespace", "set", "default", "--n", "6").want(t, 1, "N=6")
	f.run("namespace", "set", "default", "--n", "5").want(t, 0, "operation 1 changes N from 3 to 5; follow it with: kvctl operation show 1 --wait")
	f.run("namespace", "set", "default", "--w", "all", "--r", "one").want(t, 0, "operation 1 changes W and R from quorum and quorum to all and one; follow it with")

	f.mu.Lock()
	f.mu.controlled = false
	f.mu.Unlock()
	r = f.run("namespace", "show", "orders").want(t, 0)
	if !strings.Contains(r.stderr, "the history is not available: no orchestrator leads") {
		t.Errorf("stderr is %q", r.stderr)
	}
	f.run("namespace", "create", "more", "--timeout", "200ms").want(t, 4, "reads and writes go on, but nothing can be changed until a majority of the orchestrators runs")
	r = f.run("namespace", "create", "more", "-o", "json").want(t, 4)
	if d := decode(t, r.stderr)["details"].(map[string]any); d["reason"] != "NO_LEADER" || d["cause"] != "no orchestrator can be reached" {
		t.Errorf("details %v", d)
	}
}

func TestNamespaceDrop(t *testing.T) {
	f := newFake(t, 3)
	f.run("namespace", "create", "orders").want(t, 0)
	f.run("namespace", "drop", "orders").want(t, 2, "--yes")
	type answer struct {
		in   string
		code int
		want string
	}
	for _, c := range []answer{{"no\n", 1, "nothing was changed"}, {"", 1, "nothing was changed"}, {"orders\n", 0, "dropped namespace orders in epoch 9"}} {
		f.runWith(func(a *App) {
			a.Stdin, a.InTerminal, a.ErrTerminal = strings.NewReader(c.in), true, true
		}, "namespace", "drop", "orders").want(t, c.code, c.want)
	}
	f.run("namespace", "drop", "orders", "--yes").want(t, 3)
	f.run("namespace", "drop", "default", "--yes").want(t, 1, "cannot be dropped")
}

// busy gives the cluster's nodes something to say.
func (f *fake) busy() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, s := range f.mu.status {
		s.CpuUtilization, s.MemoryBytes, s.DiskUsedBytes, s.DiskAvailableBytes = 0.1*float64(i), 120<<20, 3<<30, 40<<30
		s.Get = &adminv1.OperationStats{PerSecond: 1234.5, P50Us: 310, P99Us: 2200, Total: 1_000_000, Errors: 3}
		s.Put = &adminv1.OperationStats{PerSecond: 4.5, P50Us: 510, P99Us: 12_000, Total: 5000}
		s.Scan = &adminv1.OperationStats{}
		s.RequestsInFlight, s.ClockOffsetMs, s.ClockOpinions, s.ClockOk, s.ClockLeadMs = 7, int64(i)-2, 2, true, 3
		s.UptimeMs, s.Software, s.SampledAtMs = 3_725_000, "v0-test", 1772366400000
		s.Queues = []*adminv1.QueueDepth{{Name: "requests", Depth: 7, Capacity: 4096}, {Name: "replica_calls", Depth: 2}, {Name: "write_bytes", Depth: 3 << 20, Capacity: 256 << 20}}
		f.mu.ages[i] = 400
	}
	f.mu.health[3].State, f.mu.health[3].Reason = topologyv1.NodeHealth_STATE_UNHEALTHY, "3 probes failed: deadline"
	f.mu.status[3] = nil
	f.mu.status[2].Hints = []*adminv1.HintBacklog{{Target: 3, Count: 1500, Bytes: 5 << 20, OldestMs: 1772366400000 - 90_000}}
	f.mu.status[2].WriteBacklog, f.mu.status[2].Unreachable = 1500, []uint64{3}
	f.mu.status[1].ClockOk, f.mu.status[1].ClockOffsetMs = false, -312
	f.mu.status[1].ClockProblem = "its clock is off by -312ms"
}

func TestStatus(t *testing.T) {
	f := newFake(t, 3)
	f.busy()
	golden(t, "cluster-status", f.run("cluster", "status").want(t, 0).stdout)
	golden(t, "cluster-status-json", f.anonymous(f.run("cluster", "status", "-o", "json").want(t, 0).stdout))
	golden(t, "node-ls", f.anonymous(f.run("node", "ls").want(t, 0).stdout))
	f.nodes[2].server.Stop() // else it would answer for itself
	golden(t, "node-status", f.anonymous(f.run("node", "status").want(t, 0).stdout))
	golden(t, "node-status-2", f.anonymous(f.run("node", "status", "node2").want(t, 0).stdout))
	golden(t, "node-status-3", f.anonymous(f.run("node", "status", "#3").want(t, 0).stdout))
	if d := decode(t, f.run("node", "status", "#2", "-o", "json").want(t, 0).stdout); d["name"] != "node2" || d["status"].(map[string]any)["age_ms"] != 400.0 {
		t.Errorf("document %v", d)
	}
	for name, out := range map[string]string{"cluster status": f.run("cluster", "status").stdout, "node status": f.run("node", "status").stdout} {
		for line := range strings.Lines(out) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 100 {
				t.Errorf("%s: a line of %d columns: %s", name, n, line)
			}
		}
	}
}

// What the orchestrators hold back, and why, is part of the status.
func TestStatusTellsWhatHolds(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.conditions = []*topologyv1.Condition{{Kind: "frozen", Text: "2 of 5 nodes are unhealthy: nothing is replaced", SinceMs: 1772366400000}}
	f.mu.Unlock()
	f.run("cluster", "status").want(t, 0, "\n\n2 of 5 nodes are unhealthy: nothing is replaced\n")
	d := decode(t, f.run("cluster", "status", "-o", "json").want(t, 0).stdout)
	want := map[string]any{"kind": "frozen", "text": "2 of 5 nodes are unhealthy: nothing is replaced", "since": "2026-03-01T12:00:00Z"}
	if got := d["conditions"].([]any); len(got) != 1 || !maps.Equal(got[0].(map[string]any), want) {
		t.Errorf("document %v", got)
	}
}

// TestHealthSince: what was agreed on counts more than what the one who answers saw.
func TestHealthSince(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.health[3].State, f.mu.health[3].Reason, f.mu.health[3].SinceMs = topologyv1.NodeHealth_STATE_UNHEALTHY, "no answer", 1772366405000
	f.mu.health[2].Reason, f.mu.health[2].SinceMs = "slow", 1772366400000
	f.mu.status[2].Unreachable = []uint64{3}
	f.mu.Unlock()
	since := func(node, want string) map[string]any {
		t.Helper()
		d := decode(t, f.run("node", "status", node, "-o", "json").want(t, 0).stdout)
		if d["health_since"] != want {
			t.Errorf("%s: since %v, want %s", node, d["health_since"], want)
		}
		return d
	}
	since("node1", "")
	since("node2", "2026-03-01T12:00:00Z")
	since("node3", "2026-03-01T12:00:05Z")
	f.mu.Lock()
	f.mu.foundMs = 1772366402000
	f.mu.Unlock()
	d := since("node3", "2026-03-01T12:00:02Z")
	if by := fmt.Sprint(d["unreachable_by"]); by != "[node2]" || d["gossip"] != "dead" || len(d["checks"].([]any)) != 2 {
		t.Errorf("document %v", d)
	}
	f.run("node", "status", "node3").want(t, 0, "unhealthy since 2026-03-0", "no answer", "1 m 1 s ago")
	f.run("node", "ls").want(t, 0, "node2 is healthy, but slow")
}

// TestStatusOfStrangeFigures: a node cannot break the documents of all.
func TestStatusOfStrangeFigures(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.status[1].CpuUtilization = math.NaN()
	f.mu.status[1].Get = &adminv1.OperationStats{PerSecond: math.Inf(1)}
	f.mu.Unlock()
	d := decode(t, f.run("node", "status", "node1", "-o", "json").want(t, 0).stdout)["status"].(map[string]any)
	if cpu, ok := d["cpu_utilization"]; !ok || cpu != nil || d["operations_per_second"] != nil {
		t.Errorf("document %v", d)
	}
	f.run("node", "status", "-o", "yaml").want(t, 0, "cpu_utilization: null")
	f.run("node", "status").want(t, 0)
}

// TestStatusAsksOldNodes: figures that are old are asked for anew.
func TestStatusAsksOldNodes(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.ages[1], f.mu.ages[2] = 60_000, 9_000
	f.mu.Unlock()
	for _, c := range []struct {
		node string
		age  float64
	}{{"node1", 0}, {"node2", 9000}} {
		d := decode(t, f.run("node", "status", c.node, "-o", "json").want(t, 0).stdout)
		if got := d["status"].(map[string]any)["age_ms"]; got != c.age {
			t.Errorf("%s: age %v, want %v", c.node, got, c.age)
		}
	}
}

func TestStatusBeforeTheRing(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.topology.Ring, f.mu.topology.Namespaces, f.mu.topology.FoundingNodes = nil, nil, 5
	f.mu.Unlock()
	f.run("cluster", "status").want(t, 0, "not formed: 3 of 5 founding nodes have registered")
	f.run("ring", "show").want(t, 1, "3 of 5 founding nodes")
	f.run("ring", "describe", "k").want(t, 1, "3 of 5 founding nodes")
	f.run("ring", "distribution").want(t, 1, "3 of 5 founding nodes")
	f.run("health").want(t, 4, "unavailable", "3 of 5 founding nodes")
}

func TestWatch(t *testing.T) {
	f := newFake(t, 3)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	out := &stopAt{text: "orch1", stop: cancel}
	a := &App{Stdin: strings.NewReader(""), Stdout: out, Stderr: out, Terminal: true, Getenv: func(string) string { return f.endpoints() }, ConfigDir: t.TempDir()}
	if code := a.Run(ctx, []string{"cluster", "status", "--watch"}); code != 0 {
		t.Errorf("exit code %d: %s", code, out.got.String())
	}
	if got := out.got.String(); !strings.HasPrefix(got, "\x1b[H\x1b[2J") || strings.Count(got, "\x1b[2J") != 1 {
		t.Errorf("wrote %q", got)
	}
}

// stopAt calls stop when a text is written.
type stopAt struct {
	text string
	stop func()
	got  strings.Builder
}

func (s *stopAt) Write(p []byte) (int, error) {
	s.got.Write(p)
	if strings.Contains(s.got.String(), s.text) {
		s.stop()
	}
	return len(p), nil
}

func TestHealth(t *testing.T) {
	f := newFake(t, 5)
	golden(t, "health-ok", f.run("health").want(t, 0).stdout)
	f.run("namespace", "create", "careful", "--n", "5", "--w", "4", "--r", "all").want(t, 0)
	f.mu.Lock()
	f.mu.controlled = false
	f.mu.health[2].State, f.mu.health[2].Reason = topologyv1.NodeHealth_STATE_UNHEALTHY, "no answer"
	f.mu.Unlock()
	r := f.run("health").want(t, 4)
	golden(t, "health-unavailable", r.stdout+r.stderr)
	f.run("namespace", "set", "default", "--w", "all").want(t, 4) // no orchestrator
	f.mu.Lock()
	f.mu.controlled = true
	f.mu.Unlock()
	f.run("namespace", "set", "careful", "--r", "2").want(t, 0)
	golden(t, "health-degraded", f.run("health").want(t, 0).stdout)
	golden(t, "health-degraded-json", f.run("health", "-o", "json").want(t, 0).stdout)

	// A node that nobody called unhealthy yet, but that has gone.
	f.nodes[4].server.Stop()
	f.run("health").want(t, 4, "node node5 is down: nobody listens at "+f.nodes[4].address, "namespace careful: 8 of 8 vnodes cannot be written with W=4 of N=5")
	// One that is there, and takes part in no quorum.
	f.mu.Lock()
	f.mu.health[2].State = topologyv1.NodeHealth_STATE_HEALTHY
	f.mu.status[2].State, f.mu.status[2].Reason = adminv1.NodeStatus_STATE_LOST_TAIL, "its log lost its tail"
	f.mu.Unlock()
	f.run("health").want(t, 4, "node node2 is down: lost tail: its log lost its tail")
}

// A node that is being filled shows how far it is and what it waits for.
func TestFillingIsShown(t *testing.T) {
	f := newFake(t, 5)
	f.mu.Lock()
	f.mu.status[2].Fillings = []*adminv1.Filling{
		{Vnode: 1, Complete: true, WaitsFor: "nothing any more"}, {Vnode: 4}, {Vnode: 6, WaitsFor: "node3 is down"},
	}
	f.mu.Unlock()
	for _, args := range [][]string{{"cluster", "status"}, {"node", "status"}} {
		if got := f.run(args...).want(t, 0).stdout; !strings.Contains(got, "node2 is being filled: 1/3 vnodes, waits: node3 is down") {
			t.Errorf("%v: %s", args, got)
		}
	}
	if got := f.run("node", "status", "node2").want(t, 0).stdout; !strings.Contains(got, "1/3 vnodes, waits: node3 is down") {
		t.Error(got)
	}
}

// TestHealthNamesWrongClocks: a node that has stopped for its clock is named, and one
// that only may be wrong.
func TestHealthNamesWrongClocks(t *testing.T) {
	f := newFake(t, 5)
	f.mu.Lock()
	for _, s := range f.mu.status {
		s.ClockOk = true
	}
	f.mu.status[2].ClockProblem = "its clock is off by 10m0s against 2 of its peers"
	f.mu.Unlock()
	f.run("health").want(t, 0, "ok\nnode node2 warns: its clock is off by 10m0s")
	f.mu.Lock()
	f.mu.status[2].ClockOk = false
	f.mu.Unlock()
	f.run("health").want(t, 0, "degraded\nnode node2 has stopped coordinating: its clock is off by 10m0s")
	f.run("cluster", "status").want(t, 0, "\nnode2 has stopped coordinating: its clock is off by 10m0s")
	f.run("node", "status", "node2").want(t, 0, "\nnode2 has stopped coordinating: its clock is off by 10m0s")
	d := decode(t, f.run("health", "-o", "json").want(t, 0).stdout)
	if off := d["clocks_off"].([]any); len(off) != 1 || off[0].(map[string]any)["coordinates"] != false || off[0].(map[string]any)["node"] != "node2" {
		t.Errorf("document %v", d)
	}
}

func TestRing(t *testing.T) {
	f := newFake(t, 4)
	f.mu.Lock()
	f.mu.topology.Ring[3].Slots[1].Incoming = 3
	f.mu.topology.Ring[3].Slots[1].Phase = topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD
	f.mu.topology.Ring[3].Slots[1].Since = 1
	for _, v := range f.mu.topology.GetRing() {
		v.Slots = v.Slots[:3]
	}
	f.mu.topology.Nodes = append(f.mu.topology.Nodes, &topologyv1.Node{Incarnation: 9, Name: "spare", Zone: "z2", Role: topologyv1.Role_ROLE_DATA, Address: "127.0.0.1:1", DataId: "spare"})
	f.mu.Unlock()
	golden(t, "ring-show", f.run("ring", "show").want(t, 0).stdout)
	r := f.run("ring", "distribution").want(t, 0)
	if !strings.Contains(r.stdout, "-  ████") || !strings.Contains(r.stderr, "node3 does not say what it holds: unknown method") {
		t.Errorf("of nodes that say nothing: %s%s", r.stdout, r.stderr)
	}
	golden(t, "ring-describe", f.anonymous(f.run("ring", "describe", "hello").want(t, 0).stdout))
	golden(t, "ring-describe-json", f.anonymous(f.run("ring", "describe", "hello", "-o", "json").want(t, 0).stdout))
	f.run("ring", "describe", "k", "-n", "nope").want(t, 3)
	f.holds()
	f.busy() // and node3 does not say who it is
	golden(t, "ring-distribution", f.run("ring", "distribution").want(t, 0).stdout)
	golden(t, "ring-distribution-json", f.run("ring", "distribution", "-o", "json").want(t, 0).stdout)
}

func TestConfigShow(t *testing.T) {
	f := newFake(t, 3)
	golden(t, "config-show", f.run("config", "show").want(t, 0).stdout)
	golden(t, "config-show-json", f.run("config", "show", "-o", "json").want(t, 0).stdout)
}

func TestVersion(t *testing.T) {
	runKvctl(t, func(*App) {}, "version").want(t, 0, "kvctl v0-test (go1.")
	if d := decode(t, runKvctl(t, func(*App) {}, "version", "-o", "json").want(t, 0).stdout); d["software"] != "v0-test" {
		t.Errorf("document %v", d)
	}
	runKvctl(t, func(*App) {}, "completion", "bash").want(t, 0, "complete")
}

// silentAddress is one that takes connections and says nothing.
func silentAddress(t *testing.T) string {
	t.Helper()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var taken sync.WaitGroup
	taken.Go(func() {
		for {
			c, err := silent.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	})
	t.Cleanup(func() {
		silent.Close()
		taken.Wait()
	})
	return silent.Addr().String()
}

// TestEndpointsInTurn: one endpoint that answers is enough, whatever the others do.
func TestEndpointsInTurn(t *testing.T) {
	f := newFake(t, 3)
	silent := silentAddress(t)
	at := "127.0.0.1:1," + silent + "," + f.nodes[1].address
	start := time.Now()
	f.run("namespace", "ls", "--endpoints", at).want(t, 0, "default")
	f.run("get", "k", "--endpoints", at).want(t, 3)
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("took %s", took)
	}
	r := f.run("namespace", "ls", "--endpoints", "127.0.0.1:1,"+silent, "-o", "json").want(t, 4, "no cluster at 127.0.0.1:1, "+silent+": start one with `make run`")
	if d := decode(t, r.stderr)["details"].(map[string]any); d["cause"] == "" {
		t.Errorf("details %v", d)
	}
}

// TestSilentEndpoints: those that say nothing do not cost a second each.
func TestSilentEndpoints(t *testing.T) {
	f := newFake(t, 3)
	var at []string
	for range 5 {
		silent := silentAddress(t)
		at = append(at, silent, silent)
	}
	at = append(at, f.nodes[2].address)
	start := time.Now()
	f.run("cluster", "status", "--endpoints", strings.Join(at, ",")).want(t, 0, "node1")
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("took %s", took)
	}
}

// TestStartingCluster: somebody is there, and says what it waits for.
func TestStartingCluster(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.starting = true
	f.mu.Unlock()
	f.run("get", "k", "--timeout", "100ms").want(t, 4, "it waits for an orchestrator")
	f.run("ring", "show", "--timeout", "100ms").want(t, 4, "it waits for an orchestrator")
}

func TestDefaultConfigDir(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", "/config")
	if dir, err := DefaultConfigDir(); err != nil || dir != filepath.Join("/config", "kvasir") {
		t.Errorf("got %q, %v", dir, err)
	}
}

func TestCompareNames(t *testing.T) {
	names := []string{"node10", "a", "node9", "node1", "node", "node09", "b7x"}
	slices.SortFunc(names, compareNames)
	if got := strings.Join(names, " "); got != "a b7x node node1 node09 node9 node10" {
		t.Errorf("sorted: %s", got)
	}
}
