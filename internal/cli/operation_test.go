package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// spare adds a node without slots.
func (f *fake) spare(name, zone string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.topology.Nodes = append(f.mu.topology.Nodes, &topologyv1.Node{
		Incarnation: 9, Name: name, Zone: zone, Role: topologyv1.Role_ROLE_DATA, Address: "127.0.0.1:1", DataId: name,
	})
}

func (f *fake) bumpEpoch() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.topology.Epoch++
}

// begun returns the operation that was begun last.
func (f *fake) begun() *topologyv1.Operation {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.operations[len(f.mu.operations)-1].GetOperation()
}

func TestRingApplyOfAPlan(t *testing.T) {
	f := newFake(t, 3)
	f.spare("node4", "z4")
	plan := filepath.Join(t.TempDir(), "plan.json")
	f.run("ring", "plan", "--add", "node4", "--out", plan).want(t, 0, "kvctl ring apply "+plan+" --wait")
	f.run("ring", "plan", "--add", "node4", "--out", plan).want(t, 1, "file exists")
	golden(t, "ring-apply", f.run("ring", "apply", plan).want(t, 0).stdout)
	if op := f.begun(); op.GetKind() != "apply" || len(op.GetMoves()) == 0 || op.GetMoves()[0].GetTo() != 9 || len(op.GetRemove()) != 0 {
		t.Errorf("operation %v", op)
	}
	r := f.run("ring", "apply", plan, "--wait").want(t, 0)
	golden(t, "ring-apply-wait", r.stdout)
	if !strings.Contains(r.stderr, "0 of 6 moves") {
		t.Errorf("no progress: %q", r.stderr)
	}
	f.run("ring", "apply", plan, "--add", "1").want(t, 2, "leave --add")
	f.bumpEpoch()
	f.run("ring", "apply", plan).want(t, 5, "make the plan again")

	b, err := os.ReadFile(plan)
	if err != nil {
		t.Fatal(err)
	}
	f.run("ring", "apply", "-").want(t, 2, "- is no plan")
	other := filepath.Join(t.TempDir(), "other.json")
	if err := os.WriteFile(other, []byte(strings.Replace(string(b), `"cluster_id": "fake"`, `"cluster_id": "another"`, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	f.run("ring", "apply", other).want(t, 5, "made for cluster another, this is fake")
	for name, text := range map[string]string{"twice": string(b) + string(b), "empty": "", "half": string(b[:len(b)/2]), "other": `{"format": 2}`, "not ours": `{"a": 1}`} {
		bad := filepath.Join(t.TempDir(), "bad.json")
		if err := os.WriteFile(bad, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) { f.run("ring", "apply", bad).want(t, 2, "plan") })
	}
	f.run("ring", "apply", filepath.Join(t.TempDir(), "none")).want(t, 1, "no such file")
	f.runWith(func(a *App) {
		a.Stdin = strings.NewReader(f.run("ring", "plan", "--add", "node4", "-o", "json").stdout)
	}, "ring", "apply", "-").want(t, 0)
}

func TestRingApplyByFlags(t *testing.T) {
	f := newFake(t, 3)
	f.run("ring", "apply", "--add", "1", "--yes").want(t, 2, "new1 of the plan are not there yet: start them")
	f.spare("node4", "z4")
	f.run("ring", "apply", "--add", "1").want(t, 2, "--yes is missing")
	for in, code := range map[string]int{"y\n": 0, "yes\n": 0, "n\n": 1, "\n": 1, "": 1} {
		r := f.runWith(func(a *App) {
			a.Stdin, a.InTerminal, a.ErrTerminal = strings.NewReader(in), true, true
		}, "ring", "apply", "--add", "1").want(t, code)
		if !strings.Contains(r.stderr, "This will add 1. Go on?") || !strings.Contains(r.stderr, "of the data") {
			t.Errorf("the plan is not shown: %q", r.stderr)
		}
	}
	f.run("ring", "apply").want(t, 0) // the ring of the fake is even
	overtake := func(times int) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mu.overtaken = times
	}
	overtake(maxReplans)
	f.run("ring", "apply", "--add", "node4", "--yes").want(t, 0)
	overtake(maxReplans + 1)
	f.run("ring", "apply", "--add", "node4", "--yes").want(t, 5, "make the plan again")
	d := decode(t, f.run("ring", "apply", "--add", "node4", "--yes", "-o", "json").want(t, 0).stdout)
	if d["kind"] != "apply" || d["state"] != "running" || d["moves"] == 0.0 || d["started_at"] != "2026-03-01T12:00:00Z" {
		t.Errorf("document %v", d)
	}
}

func TestNodesComeAndGo(t *testing.T) {
	f := newFake(t, 5)
	f.spare("node6", "z1")
	f.mu.Lock()
	for _, v := range f.mu.topology.GetRing() {
		v.Slots = v.Slots[:3]
	}
	f.mu.Unlock()
	f.run("node", "drain", "node2", "--yes").want(t, 0, "operation 1, drain node2: running")
	if op := f.begun(); op.GetKind() != "drain" || len(op.GetRemove()) != 0 {
		t.Errorf("operation %v", op)
	}
	r := f.run("node", "decommission", "node2", "--yes", "--wait").want(t, 0, "operation 2, decommission node2: done")
	if !strings.Contains(r.stderr, "\nnode2, #2, then leaves the cluster\n") {
		t.Errorf("the plan is %s", r.stderr)
	}
	if op := f.begun(); op.GetKind() != "decommission" || len(op.GetRemove()) != 1 || op.GetRemove()[0] != 2 {
		t.Errorf("operation %v", op)
	}
	f.run("node", "decommission", "node6", "--yes").want(t, 0)
	if op := f.begun(); len(op.GetMoves()) != 0 || len(op.GetRemove()) != 1 {
		t.Errorf("of a spare: %v", op)
	}
	f.run("node", "replace", "node2", "node6", "--yes").want(t, 0, "node6 takes the place of node2")
	f.run("node", "replace", "node2=node6", "--yes").want(t, 0, "node6 takes the place of node2")
	if op := f.begun(); op.GetKind() != "replace" || len(op.GetMoves()) == 0 || op.GetMoves()[0].GetFrom() != 2 || op.GetMoves()[0].GetTo() != 9 || op.GetRemove()[0] != 2 {
		t.Errorf("operation %v", op)
	}
	for _, args := range [][]string{{"drain"}, {"drain", "node6", "--yes"}, {"replace", "node2", "--yes"}, {"replace", "node2=node6", "node3", "--yes"}, {"replace", "node2=node3", "--yes"}, {"replace", "node6=node6", "--yes"}} {
		f.run(append([]string{"node"}, args...)...).want(t, 2)
	}
	f.run("node", "drain", "nobody", "--yes").want(t, 3)
	small := newFake(t, 3)
	small.run("node", "drain", "node1", "--yes").want(t, 2, "2 nodes would be left with slots, and namespace default has N=3: add a node")
}

func TestOperations(t *testing.T) {
	f := newFake(t, 4)
	f.run("operation", "ls").want(t, 0, "has not been changed")
	if out := f.run("operation", "ls", "-o", "json").want(t, 0).stdout; strings.TrimSpace(out) != "[]" {
		t.Errorf("no operations: %q", out)
	}
	f.mu.Lock()
	f.mu.operations = []*adminv1.ObservedOperation{
		{Operation: &topologyv1.Operation{
			Id: 1, Kind: "drain", Title: "drain node2", State: topologyv1.Operation_STATE_DONE, StartedMs: 1772366400000, EndedMs: 1772366461000,
			MovedBytes: 3 << 20, MovedRecords: 1000, Moves: []*topologyv1.Move{{From: 2, To: 3, Done: true}},
		}},
		{
			Operation: &topologyv1.Operation{
				Id: 2, Kind: "apply", Title: "add node4", State: topologyv1.Operation_STATE_PAUSED, StartedMs: 1772366400000, EndedMs: 1772366402000,
				Moves: []*topologyv1.Move{{Vnode: 1, From: 1, To: 4, Done: true}, {Vnode: 2, Slot: 1, From: 2, To: 4}, {Vnode: 3, From: 3, To: 4}},
			},
			Moving: []*adminv1.MoveProgress{{
				Move: &topologyv1.Move{Vnode: 2, Slot: 1, From: 2, To: 4}, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Records: 10, Bytes: 2048, WaitsFor: "node2 is down",
			}},
		},
	}
	f.mu.Unlock()
	golden(t, "operation-ls", f.run("operation", "ls").want(t, 0).stdout)
	golden(t, "operation-ls-json", f.run("operation", "ls", "-o", "json").want(t, 0).stdout)
	golden(t, "operation-show", f.run("operation", "show", "2").want(t, 0).stdout)
	golden(t, "operation-show-json", f.run("operation", "show", "2", "-o", "json").want(t, 0).stdout)
	f.mu.Lock()
	f.mu.operations = append(f.mu.operations, &adminv1.ObservedOperation{Operation: &topologyv1.Operation{
		Id: 3, Kind: "replicas", Title: "N of namespace default from 2 to 3", State: topologyv1.Operation_STATE_DONE, NamespaceId: 1, FromN: 2, TargetN: 3,
		StartedMs: 1772366400000, EndedMs: 1772366406500,
	}})
	f.mu.Unlock()
	golden(t, "operation-show-replicas", f.run("operation", "show", "3").want(t, 0).stdout)
	f.run("operation", "ls").want(t, 0, "3  replicas  done      1/1        -    6.5 s  N of namespace")
	f.run("operation", "show", "3", "--wait").want(t, 0, "done after 6.5 s; 1 of 1 replicas\n")
	f.mu.Lock()
	f.mu.operations = append(f.mu.operations, &adminv1.ObservedOperation{Operation: &topologyv1.Operation{
		Id: 4, Kind: "quorums", Title: "W and R of namespace default", State: topologyv1.Operation_STATE_PAUSED, NamespaceId: 1, StartedMs: 1772366400000, EndedMs: 1772366406500,
		FromWriteQuorum: "quorum", FromReadQuorum: "quorum", TargetWriteQuorum: "all", TargetReadQuorum: "one",
	}})
	ns := f.mu.topology.Namespaces[0]
	f.mu.Unlock()
	for _, step := range []struct{ w, r, alsoW, alsoR, done string }{{"quorum", "quorum", "", "", "0 of 3"}, {"quorum", "quorum", "all", "one", "1 of 3"}, {"all", "one", "quorum", "quorum", "2 of 3"}} {
		f.mu.Lock()
		if ns.WriteQuorum, ns.ReadQuorum, ns.AlsoWriteQuorum, ns.AlsoReadQuorum = step.w, step.r, step.alsoW, step.alsoR; step.alsoW != "" {
			ns.AlsoN, ns.Change, ns.Since = ns.N, topologyv1.NChange_N_CHANGE_LEVELING, 3
		}
		f.mu.Unlock()
		f.run("operation", "show", "4").want(t, 0, "steps      "+step.done+" done")
		if step.alsoW != "" {
			f.run("namespace", "show", "default").want(t, 0, "W and R are changing, and writes need W=")
		}
	}
	f.run("health").want(t, 0, "meet W=3 and R=1 of N=3")
	f.run("operation", "show", "9").want(t, 3, "there is no operation 9")
	f.run("operation", "show", "x").want(t, 2, "want its number")
	f.run("operation", "show", "2", "--wait").want(t, 0, "paused")
	f.run("operation", "resume", "2").want(t, 0, "operation 2, add node4: running")
	f.run("operation", "pause", "2").want(t, 0, "paused")
	f.run("operation", "abort", "2", "--wait").want(t, 1, "operation 2, add node4: aborted")
}

func TestPace(t *testing.T) {
	start := time.Unix(1000, 0)
	var p pace
	for _, c := range []struct {
		after time.Duration
		bytes uint64
		done  int
		rate  float64
		still bool
	}{
		{0, 500, 0, 0, false}, {time.Second, 1500, 0, 1000, false}, {2 * time.Second, 1500, 1, 500, false},
		{4 * time.Second, 1500, 1, 250, false}, {5 * time.Second, 1500, 1, 200, true},
		{12 * time.Second, 22_500, 1, 2100, false},                                   // the first seconds are out of the window
		{13 * time.Second, 100, 1, 0, false}, {14 * time.Second, 300, 1, 200, false}, // something was taken back
	} {
		p.note(c.bytes, c.done, start.Add(c.after))
		if rate := p.bytesPerSecond(); rate != c.rate || p.still() != c.still {
			t.Errorf("after %s: %v bytes a second, still: %v, want %v, %v", c.after, rate, p.still(), c.rate, c.still)
		}
	}
	o := &adminv1.ObservedOperation{
		Operation: &topologyv1.Operation{Id: 7, State: topologyv1.Operation_STATE_RUNNING, Moves: []*topologyv1.Move{{}, {}}},
		Moving:    []*adminv1.MoveProgress{{Bytes: 300, WaitsFor: "it is being filled"}, {WaitsFor: "node2 is not healthy"}},
	}
	if got := progressText(o, &p); strings.Contains(got, "waits") || !strings.HasSuffix(got, "0 of 2 moves  300 B  200 B/s") {
		t.Errorf("on its way: %s", got)
	}
	p.note(300, 1, start.Add(15*time.Second))
	p.note(300, 1, start.Add(19*time.Second))
	if got := progressText(o, &p); !strings.HasSuffix(got, "0 of 2 moves  300 B  waits: node2 is not healthy") {
		t.Errorf("it stands still: %s", got)
	}
}
