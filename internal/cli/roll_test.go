package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// fakeRoll is what a fake cluster knows of restarts. Its processes can be restarted once
// it has a leader.
type fakeRoll struct {
	leader string
	silent string         // the orchestrator that does not answer
	late   string         // the orchestrator that has not applied all
	runs   map[string]int // by process, from 0 on
	// unready is, by process, how many more times it says that it does not serve.
	unready map[string]int
	// refuses are those that cannot start again, stuck those that do not serve again.
	refuses, stuck map[string]bool
	restarted      []string
	onRestart      func()
}

// rollable gives a fake cluster orchestrators, the first of which leads.
func rollable(t *testing.T, nodes, orchestrators int) *fake {
	t.Helper()
	f := newFake(t, nodes)
	f.mu.topology.Orchestrators = nil
	for i := range orchestrators {
		o := &fakeNode{f: f, name: fmt.Sprintf("orch%d", i+1)}
		o.start(rpc.Transport{})
		f.mu.topology.Orchestrators = append(f.mu.topology.Orchestrators, &topologyv1.Orchestrator{Name: o.name, Address: o.address})
	}
	f.mu.rolling = fakeRoll{leader: "orch1", runs: map[string]int{}, unready: map[string]int{}, refuses: map[string]bool{}, stuck: map[string]bool{}}
	return f
}

func (f *fake) observedOrchestrators() (out []*adminv1.ObservedOrchestrator) {
	r := &f.mu.rolling
	for _, o := range f.mu.topology.GetOrchestrators() {
		state := "follower"
		if o.GetName() == r.leader {
			state = "leader"
		}
		out = append(out, &adminv1.ObservedOrchestrator{Name: o.GetName(), Reachable: o.GetName() != r.silent, Status: &adminv1.OrchestratorStatus{
			RaftState: state, Leader: r.leader, AppliedIndex: 40, Epoch: f.mu.topology.GetEpoch(),
		}})
		if o.GetName() == r.late {
			out[len(out)-1].Status.AppliedIndex--
		}
	}
	return out
}

// deliver takes one hint of a node that restarts have made it keep.
func (f *fake) deliver(incarnation uint64) {
	if f.mu.rolling.leader == "" {
		return
	}
	for _, h := range f.mu.status[incarnation].GetHints() {
		h.Count = max(h.GetCount(), 1) - 1
	}
}

func (n *fakeNode) GetProcess(context.Context, *adminv1.GetProcessRequest) (*adminv1.GetProcessResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	r := &n.f.mu.rolling
	p := &adminv1.GetProcessResponse{Name: n.name, RunId: n.f.runID(n.name), UptimeMs: 3_600_000, Software: "v1"}
	if r.runs[n.name] > 0 {
		p.UptimeMs, p.Software = 0, "v2"
	}
	if r.unready[n.name] > 0 {
		p.NotReady = "connects to its peers"
		if !r.stuck[n.name] {
			r.unready[n.name]--
		}
	}
	return p, nil
}

func (f *fake) runID(name string) string { return fmt.Sprintf("%s/%d", name, f.mu.rolling.runs[name]) }

// Restart fails the test where the cluster is not ready for it.
func (n *fakeNode) Restart(_ context.Context, q *adminv1.RestartRequest) (*adminv1.RestartResponse, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &f.mu.rolling
	if q.GetRunId() != f.runID(n.name) {
		f.t.Errorf("run %q of %s is to restart", q.GetRunId(), n.name)
	}
	if r.refuses[n.name] {
		return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonCannotRestart, "%s goes on, as it could not start again: bad configuration", n.name)
	}
	for name, left := range r.unready {
		if left > 0 {
			f.t.Errorf("%s is restarted while %s does not serve", n.name, name)
		}
	}
	for _, s := range f.mu.status {
		if len(s.GetHints()) > 0 && s.GetHints()[0].GetCount() > 0 {
			f.t.Errorf("%s is restarted while %s keeps hints", n.name, s.GetName())
		}
	}
	r.runs[n.name]++
	r.unready[n.name] = 2
	r.restarted = append(r.restarted, n.name)
	if other := f.mu.status[n.incarnation%uint64(len(f.nodes))+1]; n.incarnation > 0 {
		other.Hints = []*adminv1.HintBacklog{{Target: n.incarnation, Count: 2}}
	}
	if r.onRestart != nil {
		r.onRestart()
	}
	return &adminv1.RestartResponse{}, nil
}

// restarts returns what was restarted, in order.
func (f *fake) restarts() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.mu.rolling.restarted, " ")
}

func (f *fake) wantRestarts(want string) {
	f.t.Helper()
	if got := f.restarts(); got != want {
		f.t.Errorf("restarted: %q, want %q", got, want)
	}
}

// Nodes first, the leading orchestrator last, each when the cluster is ready for it; and
// once more, nothing that was started since.
func TestRoll(t *testing.T) {
	f := rollable(t, 3, 3)
	began := time.Now().UTC().Format(time.RFC3339)
	out := f.run("cluster", "roll").want(t, exitOK, "6 of 6 restarted in ", "had been up 1 h; v2, was v1")
	const order = "node1 node2 node3 orch2 orch3 orch1"
	f.wantRestarts(order)
	var told []string
	for line := range strings.Lines(out.stdout) {
		if name, rest, _ := strings.Cut(line, "  "); strings.HasPrefix(rest, "serving again after ") {
			told = append(told, name)
		}
	}
	if got := strings.Join(told, " "); got != order {
		t.Errorf("told of %q", got)
	}
	f.run("cluster", "roll", "--started-before", began).want(t, exitOK, "0 of 6 restarted in ", ", 6 spared")
	f.wantRestarts(order)
}

func TestRollSome(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"--nodes", "node1 node2"},
		{"--orchestrators", "orch2 orch3 orch1"},
		{"orch2 node2", "node2 orch2"},
		{"#1 node1", "node1"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			t.Parallel()
			f := rollable(t, 2, 3)
			out := f.run(append([]string{"cluster", "roll", "-o", "json"}, strings.Fields(tc.args)...)...).want(t, exitOK)
			f.wantRestarts(tc.want)
			var docs []rollDoc
			if err := json.Unmarshal([]byte(out.stdout), &docs); err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, d := range docs {
				names = append(names, d.Name)
				if !d.Restarted || d.UptimeMs != 3_600_000 || d.Software != "v2" || d.DowntimeMs == 0 || (d.Role == "data") != strings.HasPrefix(d.Name, "node") {
					t.Errorf("%+v", d)
				}
			}
			if got := strings.Join(names, " "); got != tc.want {
				t.Errorf("documents of %q", got)
			}
		})
	}
}

// Where the cluster is not well nothing is restarted, and the answer says why.
func TestRollIsRefused(t *testing.T) {
	operation := func(s topologyv1.Operation_State) func(*fake) {
		return func(f *fake) {
			f.mu.operations = []*adminv1.ObservedOperation{{Operation: &topologyv1.Operation{Id: 4, Title: "add node4", State: s}}}
		}
	}
	for _, tc := range []struct {
		name, args string
		change     func(*fake)
		code       int
		want       string
	}{
		{"a node is down", "", func(f *fake) {
			f.mu.health[2].State, f.mu.health[2].Reason = topologyv1.NodeHealth_STATE_UNHEALTHY, "3 probes failed"
		}, exitError, "node node2 is down: unhealthy: 3 probes failed"},
		{"a node says that it stops", "", func(f *fake) { f.mu.status[2].State = adminv1.NodeStatus_STATE_STOPPING }, exitError, "node node2 is down: stopping"},
		{"a node does not answer", "", func(f *fake) { f.mu.topology.Nodes[1].Address = "127.0.0.1:1" }, exitUnavailable, "node2 at 127.0.0.1:1: cannot be reached"},
		{"an operation moves slots", "", operation(topologyv1.Operation_STATE_RUNNING), exitError, "operation 4 is under way (add node4)"},
		{"an operation is taken back", "", operation(topologyv1.Operation_STATE_ABORTING), exitError, "operation 4 is under way"},
		{"an orchestrator is down", "", func(f *fake) { f.mu.rolling.silent = "orch3" }, exitError, "orchestrator orch3 does not answer"},
		{"nobody leads", "", func(f *fake) { f.mu.rolling.leader = "nobody" }, exitError, "the orchestrators have no leader"},
		{"a node answers for them", "", func(f *fake) { f.mu.controlled = false }, exitError, "no orchestrator answers"},
		{"the ring has not formed", "", func(f *fake) { f.mu.topology.Ring = nil }, exitError, "the ring has not formed yet"},
		{"a dry run says so, too", "--dry-run", operation(topologyv1.Operation_STATE_RUNNING), exitError, "not now: operation 4 is under way"},
		{"hints stay", "--wait-timeout 1s", func(f *fake) {
			f.mu.status[2].Hints = []*adminv1.HintBacklog{{Target: 1, Count: 1 << 40}}
		}, exitUnavailable, "nothing was restarted: node node2 keeps 1,099,511,62"},
		{"a node nobody knows of", "--wait-timeout 1s", func(f *fake) { f.mu.health[3].State = topologyv1.NodeHealth_STATE_UNSPECIFIED }, exitUnavailable, "nothing was restarted: node node3 has not been heard of"},
		{"epoch is behind", "--wait-timeout 1s", func(f *fake) { f.mu.status[2].Epoch = 6 }, exitUnavailable, "node node2 has epoch 6 of 7"},
		{"nodes do not reach each other", "--wait-timeout 1s", func(f *fake) { f.mu.status[2].Unreachable = []uint64{3} }, exitUnavailable, "node node2 does not reach node3"},
		{"a node is filled", "--wait-timeout 1s", func(f *fake) { f.mu.status[2].Fillings = []*adminv1.Filling{{Vnode: 1}} }, exitUnavailable, "node node2 is being filled"},
		{"an orchestrator is behind", "--wait-timeout 1s", func(f *fake) { f.mu.rolling.late = "orch2" }, exitUnavailable, "orchestrator orch2 catches up"},
		{"unknown name", "node1 node9", func(*fake) {}, exitNotFound, `there is no process "node9"`},
		{"names and --nodes", "node1 --nodes", func(*fake) {}, exitUsage, "only one of them"},
		{"bad time", "--started-before yesterday", func(*fake) {}, exitUsage, "want a time such as"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := rollable(t, 3, 3)
			f.mu.Lock()
			tc.change(f)
			f.mu.Unlock()
			f.run(append([]string{"cluster", "roll"}, strings.Fields(tc.args)...)...).want(t, tc.code, tc.want)
			f.wantRestarts("")
		})
	}
}

// A process that does not serve again, or does not want to restart, ends the roll.
func TestRollEndsEarly(t *testing.T) {
	t.Run("stuck", func(t *testing.T) {
		t.Parallel()
		f := rollable(t, 3, 3)
		f.mu.rolling.stuck["node1"] = true
		out := f.run("cluster", "roll", "--nodes", "--wait-timeout", "1s", "-o", "json").want(t, exitUnavailable,
			"node1 was told to restart and does not serve again after 1 s: connects to its peers", "go on with: kvctl cluster roll --started-before 20", "Z --nodes")
		f.wantRestarts("node1")
		var docs []rollDoc
		if err := json.Unmarshal([]byte(out.stdout), &docs); err != nil || len(docs) != 3 || docs[0].Restarted || docs[1].Restarted {
			t.Errorf("%v, %+v", err, docs)
		}
	})
	t.Run("refuses", func(t *testing.T) {
		t.Parallel()
		f := rollable(t, 3, 3)
		f.mu.rolling.refuses["node2"] = true
		f.run("cluster", "roll", "node2", "node3").want(t, exitError, "node2 was not restarted: node2 goes on, as it could not start again: bad configuration")
		f.wantRestarts("")
	})
	t.Run("interrupted", func(t *testing.T) {
		t.Parallel()
		f := rollable(t, 3, 3)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		f.mu.rolling.onRestart = cancel
		f.runIn(ctx, func(*App) {}, "cluster", "roll").want(t, exitError, "ends after node1", "node1  serving again after", "ended before node2 was restarted")
		f.wantRestarts("node1")
	})
}

// A dry run shows the order, and who would not be served in full.
func TestRollDryRun(t *testing.T) {
	f := rollable(t, 3, 1)
	f.mu.topology.Namespaces = append(f.mu.topology.Namespaces, &topologyv1.Namespace{Id: 2, Name: "single", N: 1, WriteQuorum: "one", ReadQuorum: "one", ReadRepair: topologyv1.ReadRepairMode_READ_REPAIR_MODE_BLOCKING, LeastWriteAcks: 1})
	out := f.run("cluster", "roll", "--dry-run").want(t, exitOK, "namespace single needs node1: with W=1 and R=1 of N=1 some requests fail while it restarts")
	f.wantRestarts("")
	if strings.Contains(out.stderr, "namespace default") {
		t.Errorf("warned of the namespace default: %s", out.stderr)
	}
	var names []string
	for line := range strings.Lines(out.stdout) {
		names = append(names, strings.Fields(line)[0])
	}
	if want := []string{"PROCESS", "node1", "node2", "node3", "orch1"}; !slices.Equal(names, want) {
		t.Errorf("shown %q in\n%s", names, out.stdout)
	}
}
