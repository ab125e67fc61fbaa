package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// RunConfig says what one run of the simulation does.
type RunConfig struct {
	Seed uint64
	// Minutes of load and faults, in cluster time.
	Minutes float64
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
	// Keys whose histories were decided, and not.
	Decided, Undecided int
	Options            string
	Violations         []Violation
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
	report     *Report
}

// Run runs a workload under faults, lets the cluster settle, and checks the
// invariants of the design. It must be called in a synctest bubble. It reports
// what it found; broken invariants are not errors of t.
func Run(t testing.TB, cfg RunConfig) (*Report, *History) {
	r := &run{t: t, cfg: cfg, report: &Report{Seed: cfg.Seed, Minutes: cfg.Minutes, Faults: map[string]int{}}}
	r.report.Nodes, r.report.Orchestrators = 3, 1
	if cfg.Seed%2 == 1 {
		r.report.Nodes, r.report.Orchestrators = 5, 3
	}
	began := time.Now()
	r.w = New(t, Config{Seed: cfg.Seed, Nodes: r.report.Nodes, Orchestrators: r.report.Orchestrators})
	r.history = NewHistory()
	r.checker = NewChecker(r.history, 500*time.Millisecond)
	r.topologies = newTopologies(r.history)
	time.Sleep(2 * time.Second) // links and members find each other
	r.prepare()

	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { r.topologies.watch(ctx, r.controls, rand.New(rand.NewPCG(cfg.Seed, 0x70b0))) })
	load := &Workload{
		World: r.w, Checker: r.checker, Spaces: Spaces(r.report.Nodes), Seed: cfg.Seed, Clients: 6, Think: 250 * time.Millisecond,
		Incarnations: r.topologies.incarnations,
	}
	load.Start()
	r.faults(time.Now().Add(time.Duration(cfg.Minutes * float64(time.Minute))))
	load.Stop()
	cancel()
	watching.Wait()
	r.settle()
	r.w.Close()
	r.report.AllMinutes = time.Since(began).Minutes()
	r.report.Outcomes, r.report.Completed = r.history.Outcomes()
	r.report.Violations = r.history.Violations()
	return r.report, r.history
}

// prepare makes the namespaces.
func (r *run) prepare() {
	r.controls = map[string]adminv1.ControlServiceClient{}
	for name := range r.w.processes {
		r.controls[name] = r.w.Control(name)
	}
	for _, s := range Spaces(r.report.Nodes) {
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

// Faults of a run, until a time; all have ended when it returns.
func (r *run) faults(until time.Time) {
	rng := rand.New(rand.NewPCG(r.cfg.Seed, 0xfa17))
	note := func(kind, format string, args ...any) {
		r.report.Faults[kind]++
		r.history.Note(format, args...)
	}
	for time.Now().Before(until) && len(r.history.Violations()) == 0 {
		time.Sleep(time.Duration(2+rng.IntN(8)) * time.Second)
		name := fmt.Sprint("node", 1+rng.IntN(r.report.Nodes))
		for_ := time.Duration(1+rng.IntN(15)) * time.Second
		switch rng.IntN(3) {
		case 0:
			note("kill", "kill %s", name)
			r.w.Crash(name, Kill)
			time.Sleep(for_)
			r.history.Note("start %s", name)
			r.w.Start(name)
		case 1:
			note("power cut", "power cut of %s", name)
			r.w.Crash(name, PowerCut)
			time.Sleep(for_)
			r.history.Note("start %s", name)
			r.w.Start(name)
		case 2:
			note("isolate", "isolate %s", name)
			r.w.Isolate(name)
			time.Sleep(for_)
			r.history.Note("reconnect %s", name)
			r.w.Reconnect(name)
		}
	}
}

// settle waits until the cluster has mended itself and checks what must hold then.
func (r *run) settle() {
	r.history.Note("all faults have ended")
	time.Sleep(20 * time.Second)
	c := r.w.Client(client.WithTimeout(opTimeout))
	places := r.checker.Places()
	for _, p := range places {
		if r.final(c, p) {
			r.report.Decided++
		} else {
			r.report.Undecided++
		}
	}
	c.Close()
	if len(r.history.Violations()) > 0 {
		return // what follows from them says nothing new
	}
	r.compare()
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
	s, err := clusterStatus(context.Background(), r.controls["node1"])
	if err != nil {
		r.history.violate(4, "no topology after settling: %v", err)
		return
	}
	r.topologies.see("node1", s.GetTopology())
	t := r.topologies.latest()
	disks := map[uint64]disk{}
	now := time.Now()
	for _, n := range t.Nodes {
		p := r.w.processes[n.Name]
		if p == nil || p.live == nil || t.Resolve(n.Name).Incarnation != n.Incarnation {
			continue
		}
		r.w.Stop(n.Name)
		d, err := readDisk(r.w.Disk(n.Name), t)
		if err != nil {
			r.history.violate(4, "the disk of %s cannot be read: %v", n.Name, err)
			return
		}
		disks[n.Incarnation] = d
	}
	r.checker.replicasEqual(t, disks, now)
}
