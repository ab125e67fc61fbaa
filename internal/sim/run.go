package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// RunConfig says what one run of the simulation does.
type RunConfig struct {
	Seed uint64
	// Minutes of load and faults, in cluster time.
	Minutes float64
	// Faults are the names of the tracks of faults that run. Default: Tracks.
	Faults []string
}

// Report is what came of a run.
type Report struct {
	Seed          uint64
	Nodes         int
	Orchestrators int
	// Minutes of load, and the whole of the cluster's time in it.
	Minutes, AllMinutes float64
	// Faults and Outcomes count by name; Completed are the operations whose clients
	// know what became of them.
	Faults    map[string]int
	Outcomes  map[string]int
	Completed int
	// Loops counts what the control loops did, by name.
	Loops map[string]int
	// Hit counts what ended or stopped while a slot moved, by what it was to the move and
	// the slot's phase.
	Hit map[Hit]int
	// Keys whose histories were decided, and not.
	Decided, Undecided int
	Options            string
	Violations         []Violation
}

// Hit is something that ends or stops while a slot moves: the orchestrators' leader, or
// a node that is something to the move.
type Hit struct {
	What  string
	Phase string
}

// What a process that ends or stops may be to a move.
const (
	HitLeader   = "the leader"
	HitOld      = "the old node"
	HitNewcomer = "the new node"
	HitOther    = "a node of another slot"
)

// MarshalText writes a hit as a key of JSON.
func (h Hit) MarshalText() ([]byte, error) { return []byte(h.What + ": " + h.Phase), nil }

// UnmarshalText reads what MarshalText writes.
func (h *Hit) UnmarshalText(b []byte) error {
	h.What, h.Phase, _ = strings.Cut(string(b), ": ")
	return nil
}

// run is one run under way.
type run struct {
	t          testing.TB
	cfg        RunConfig
	w          *World
	history    *History
	checker    *Checker
	topologies *topologies
	controls   map[string]adminv1.ControlServiceClient
	conns      map[string]*grpc.ClientConn
	report     *Report
	damage     damage
	faults     *faults
	// fleet and loops are set where the control loops are at work.
	fleet *fleet
	loops *loops
	mu    struct {
		sync.Mutex
		left map[string]*remains // of processes that started again
	}
}

// Run runs a workload under faults, lets the cluster settle, and checks the
// invariants of the design. It must be called in a synctest bubble. It reports
// what it found; broken invariants are not errors of t.
func Run(t testing.TB, cfg RunConfig) (*Report, *History) {
	r := &run{t: t, cfg: cfg, report: &Report{Seed: cfg.Seed, Minutes: cfg.Minutes, Faults: map[string]int{}, Loops: map[string]int{}, Hit: map[Hit]int{}}}
	r.report.Nodes, r.report.Orchestrators = cfg.size()
	r.report.Options = cfg.String()
	began := time.Now()
	f := newFaults(r)
	r.faults = f
	r.history = NewHistory()
	r.checker = NewChecker(r.history, f.clockError())
	r.topologies = newTopologies(r.checker)
	wc := Config{
		Seed: cfg.Seed, Nodes: r.report.Nodes, Orchestrators: r.report.Orchestrators,
		SyncDelay: f.syncDelay, Starting: r.starting, Logger: slog.New(errorLog{h: r.history}),
	}
	if cfg.reports() {
		wc.Reporting = reportingNodes
	}
	if cfg.loops() {
		r.fleet = newFleet(r)
		r.topologies.moves = true
		wc.fleet, wc.Zones = r.fleet, cfg.zones()
	}
	r.w = New(t, wc)
	r.addSpares()
	time.Sleep(2 * time.Second) // links and members find each other
	r.prepare()

	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { r.topologies.watch(ctx, r.watched(), rand.New(rand.NewPCG(cfg.Seed, 0x70b0))) })
	if r.loops != nil {
		watching.Go(func() { r.loops.watch(ctx) })
	}
	load := &Workload{
		World: r.w, Checker: r.checker, Spaces: r.spaces(), Seed: cfg.Seed, Clients: 6, Think: 250 * time.Millisecond,
		Incarnations: r.topologies.incarnations, Conns: r.conns,
		Watched: f.watched, Shown: f.shown, Through: f.through, Clearing: f.clearing, Reading: f.reading, Parted: f.nowParted,
	}
	if r.fleet != nil { // what changes is what matters
		load.Clients, load.Think = 3, 400*time.Millisecond
	}
	load.Start()
	reports := r.startReports()
	f.run(time.Now().Add(time.Duration(cfg.Minutes * float64(time.Minute))))
	load.Stop()
	reports.stop()
	if r.loops == nil {
		cancel()
		watching.Wait()
	}
	r.settle()
	cancel()
	watching.Wait()
	r.endLoops()
	r.w.Close()
	r.report.AllMinutes = time.Since(began).Minutes()
	r.report.Outcomes, r.report.Completed = r.history.Outcomes()
	r.report.Violations = r.history.Violations()
	return r.report, r.history
}

// starting looks at the disk of a process that is about to start again. One that a
// fault has damaged may lack the end of its log, or all; what its directory still
// vouches for is judged all the same.
func (r *run) starting(name string) {
	t := r.topologies.latest()
	p := r.w.processes[name]
	if t == nil || r.controls[name] == nil || isReporting(name) || t.Resolve(name) == nil || len(r.history.Violations()) > 0 {
		return
	}
	if r.fleet != nil && hostOf(t.Resolve(name).Address) != p.host {
		return // another process has the name
	}
	left, err := readRemains(p.disk, t)
	if err != nil || left.incarnation == 0 || !left.whole() {
		r.history.Note("the disk of %s: %s", name, describeRemains(left, err))
	}
	damaged := r.damage.of(name)
	if err != nil || left.lostTail != "" || left.incarnation == 0 && damaged {
		if !damaged {
			r.history.violate(18, "the disk of %s, which no fault has damaged: %s", name, describeRemains(left, err))
		}
		r.mu.Lock()
		delete(r.mu.left, name)
		r.mu.Unlock()
		r.checker.DiskLost()
		return
	}
	r.mu.Lock()
	r.mu.left[name] = left
	r.mu.Unlock()
	if left.topology != nil { // it may have handed over what nobody else is known to have
		r.topologies.see(name, left.topology)
		t = r.topologies.latest()
	}
	r.checker.Restarts(name, left.incarnation <= uint64(r.report.Nodes), left, t)
}

// prepare makes the namespaces.
func (r *run) prepare() {
	r.controls = map[string]adminv1.ControlServiceClient{}
	r.conns = map[string]*grpc.ClientConn{}
	r.mu.left = map[string]*remains{}
	for name := range r.w.processes {
		r.conns[name] = r.w.Conn(name)
		r.controls[name] = adminv1.NewControlServiceClient(r.conns[name])
	}
	if r.fleet != nil {
		r.loops = newLoops(r)
	}
	for _, s := range r.spaces() {
		if !s.Create {
			continue
		}
		n, ttl, hints := uint32(s.N), uint64(s.TTL.Milliseconds()), s.Hints
		w, rq := fmt.Sprint(s.W), fmt.Sprint(s.R)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_, err := r.controls["node1"].CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: s.Name, Settings: &adminv1.NamespaceSettings{
			N: &n, WriteQuorum: &w, ReadQuorum: &rq, TtlMs: &ttl, Hints: &hints,
		}})
		cancel()
		if err != nil {
			r.t.Fatalf("create namespace %s: %v", s.Name, err)
		}
	}
	time.Sleep(time.Second)
	s, err := clusterStatus(context.Background(), r.controls["node1"])
	if err != nil {
		r.t.Fatal(err)
	}
	r.topologies.see("node1", s.GetTopology())
}

// endLoops stops the orchestrators where their control loops are at work, and with them all
// that launches and ends nodes.
func (r *run) endLoops() {
	if r.fleet == nil {
		return
	}
	for _, name := range r.orchestrators() {
		if r.w.process(name).live != nil {
			r.w.Stop(name)
		}
	}
	r.fleet.close()
}

// spaces returns the namespaces of the run.
func (r *run) spaces() []Space {
	if r.fleet != nil {
		return Spaces(3) // so that few nodes are enough
	}
	return Spaces(r.report.Nodes)
}

// watched returns the processes that are asked for what they know.
func (r *run) watched() map[string]adminv1.ControlServiceClient {
	if r.fleet == nil {
		return r.controls
	}
	out := map[string]adminv1.ControlServiceClient{} // most nodes do not run
	for _, name := range r.orchestrators() {
		out[name] = r.controls[name]
	}
	for i := range loopsMax {
		name := fmt.Sprint("node", i+1)
		out[name] = r.controls[name]
	}
	return out
}

// count counts what is told of in the report.
func (r *run) count(m map[string]int, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m[what]++
}

// settleFor is how long the replicas may take to become equal.
const settleFor = 10 * time.Minute

// settle waits until the cluster has mended itself and checks what must hold then.
func (r *run) settle() {
	r.history.Note("all faults have ended")
	if len(r.history.Violations()) > 0 {
		return // what follows from them says nothing new
	}
	c := r.w.Client(client.WithTimeout(opTimeout))
	defer c.Close()
	if r.loops != nil && !r.loops.rest() || !r.finishOperation() || !r.converge(c) || !r.reportInTheEnd() {
		return
	}
	for _, p := range r.checker.Places() {
		if r.final(c, p) {
			r.report.Decided++
		} else {
			r.report.Undecided++
		}
	}
	if len(r.history.Violations()) == 0 {
		r.compare()
	}
}

// converge waits until every replica's own copy of every key is the same.
func (r *run) converge(c *client.Client) bool {
	difference := ""
	for waited := time.Duration(0); waited < settleFor; waited += 15 * time.Second {
		time.Sleep(15 * time.Second)
		if difference = r.difference(c); difference == "" {
			r.history.Note("replicas are equal")
			return true
		}
	}
	r.history.violate(4, "%s after the last fault: %s", settleFor, difference)
	return false
}

// difference describes one key whose replicas differ, or returns "".
func (r *run) difference(c *client.Client) string {
	s, err := clusterStatus(context.Background(), r.control())
	if err != nil {
		return "no topology: " + err.Error()
	}
	r.topologies.see("node1", s.GetTopology())
	t := r.topologies.latest()
	for _, p := range r.checker.Places() {
		var first client.Value
		var from uint64
		for i, slot := range t.Slots(t.VnodeOf([]byte(p.Key)), t.Namespace(p.Namespace).N) {
			ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
			v, err := c.Get(ctx, []byte(p.Key), client.Namespace(p.Namespace), client.FromReplica(fmt.Sprint("#", slot.Write[0])))
			cancel()
			if err != nil && !errors.Is(err, client.ErrNotFound) {
				return fmt.Sprintf("%s does not show %s: %v", t.NodeName(slot.Write[0]), p, err)
			}
			if i == 0 {
				first, from = v, slot.Write[0]
			} else if a, b := first.Receipt.Version, v.Receipt.Version; a != b && !(a.IsZero() || b.IsZero()) {
				return fmt.Sprintf("%s has version %s of %s, %s has %s", t.NodeName(from), a, p, t.NodeName(slot.Write[0]), b)
			} else if a != b && (first.Value != nil || v.Value != nil) {
				return fmt.Sprintf("%s or %s has nothing of %s, the other has version %s%s", t.NodeName(from), t.NodeName(slot.Write[0]), p, a, b)
			}
		}
	}
	return ""
}

// final reads a key from all replicas and reports whether they answered.
func (r *run) final(c *client.Client, p Place) bool {
	for range 5 {
		op := &Op{Client: finalClient, Kind: OpGet, Place: p, Quorum: "R=all"}
		read(r.checker, c, op, []client.CallOption{client.Namespace(p.Namespace), client.R("all")})
		if op.Outcome == OK || op.Outcome == NotFound {
			return true
		}
		time.Sleep(5 * time.Second)
	}
	return false
}

// compare stops the nodes and compares their disks.
func (r *run) compare() {
	s, err := clusterStatus(context.Background(), r.control())
	if err != nil {
		r.history.violate(4, "no topology after settling: %v", err)
		return
	}
	r.topologies.see("node1", s.GetTopology())
	t := r.topologies.latest()
	r.endLoops()
	disks := map[uint64]disk{}
	now := time.Now()
	for _, n := range t.Nodes {
		p := r.w.at(n.Address)
		if p == nil || p.live == nil || t.Resolve(n.Name).Incarnation != n.Incarnation {
			continue
		}
		r.w.Stop(p.name)
		d, err := readDisk(p.disk, t)
		if err != nil {
			r.history.violate(4, "the disk of %s cannot be read: %v", n.Name, err)
			return
		}
		disks[n.Incarnation] = d
	}
	r.checker.replicasEqual(t, disks, now)
}
