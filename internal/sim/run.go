package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
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
	conns      map[string]*grpc.ClientConn
	left       map[string]*remains // of processes that start again
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
	r.w = New(t, Config{
		Seed: cfg.Seed, Nodes: r.report.Nodes, Orchestrators: r.report.Orchestrators,
		SyncDelay: r.syncDelay(rand.New(rand.NewPCG(cfg.Seed, 0x5bc))), Starting: r.starting,
	})
	r.history = NewHistory()
	r.checker = NewChecker(r.history, 500*time.Millisecond)
	r.topologies = newTopologies(r.checker)
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

// syncDelay draws how long syncs take: mostly some ms, seldom much longer.
func (r *run) syncDelay(rng *rand.Rand) func() time.Duration {
	var mu sync.Mutex
	return func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		if rng.IntN(50) == 0 {
			return time.Duration(rng.IntN(60)) * time.Millisecond
		}
		return time.Duration(rng.IntN(3000)) * time.Microsecond
	}
}

// starting looks at the disk of a process that is about to start again.
func (r *run) starting(name string) {
	t := r.topologies.latest()
	p := r.w.processes[name]
	if t == nil || r.controls[name] == nil || t.Resolve(name) == nil || len(r.history.Violations()) > 0 {
		return
	}
	left, err := readRemains(p.disk, t)
	if err != nil || left.lostTail != "" {
		r.history.Note("the disk of %s: %v %v", name, err, left)
		r.checker.DiskLost()
		return
	}
	r.left[name] = left
	inc := t.Resolve(name).Incarnation
	r.checker.Restarts(name, inc, inc <= uint64(r.report.Nodes), left, t)
}

// prepare makes the namespaces.
func (r *run) prepare() {
	r.controls = map[string]adminv1.ControlServiceClient{}
	r.conns = map[string]*grpc.ClientConn{}
	r.left = map[string]*remains{}
	for name := range r.w.processes {
		r.conns[name] = r.w.Conn(name)
		r.controls[name] = adminv1.NewControlServiceClient(r.conns[name])
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

// faults happen until a time; all have ended when it returns.
func (r *run) faults(until time.Time) {
	rng := rand.New(rand.NewPCG(r.cfg.Seed, 0xfa17))
	note := func(kind, format string, args ...any) {
		r.report.Faults[kind]++
		r.history.Note(format, args...)
	}
	seconds := func(n int) time.Duration { return time.Duration(1+rng.IntN(n)) * time.Second }
	start := func(name string) {
		r.history.Note("start %s", name)
		r.w.Start(name)
		r.hintsKept(name, r.left[name])
	}
	for time.Now().Before(until) && len(r.history.Violations()) == 0 {
		time.Sleep(seconds(8))
		order := rng.Perm(r.report.Nodes)
		for i := range order {
			order[i]++
		}
		name := fmt.Sprint("node", order[0])
		other := fmt.Sprint("node", order[1])
		how := Crash(rng.IntN(2))
		switch rng.IntN(7) {
		case 0, 1:
			note([]string{"kill", "power cut"}[how], "crash %s", name)
			r.w.Crash(name, how)
			time.Sleep(seconds(15))
			start(name)
		case 2:
			note("isolate", "isolate %s", name)
			r.w.Isolate(name)
			time.Sleep(seconds(15))
			r.history.Note("reconnect %s", name)
			r.w.Reconnect(name)
		case 3:
			n := 2 + rng.IntN(r.report.Nodes-1)
			note("correlated power cut", "power cut of %d nodes", n)
			for _, i := range order[:n] {
				r.w.Crash(fmt.Sprint("node", i), PowerCut)
			}
			time.Sleep(seconds(5))
			for _, i := range order[:n] {
				start(fmt.Sprint("node", i))
			}
		case 4:
			note("restart while another is down", "crash %s, restart %s", name, other)
			r.w.Crash(name, how)
			time.Sleep(seconds(10))
			r.w.Crash(other, how)
			start(other)
			time.Sleep(seconds(3))
			start(name)
		case 5:
			note("clock step", "clock of %s goes ahead, and back while it restarts", name)
			r.w.SetClock(name, 220*time.Millisecond)
			time.Sleep(seconds(5))
			r.w.Crash(name, how)
			r.w.SetClock(name, 0)
			start(name)
		case 6:
			note("cut from orchestrators", "cut %s from the orchestrators", name)
			cut := func(f func(from, to string)) {
				for i := range r.report.Orchestrators {
					o := r.w.Host(fmt.Sprint("orch", i+1))
					f(r.w.Host(name), o)
					f(o, r.w.Host(name))
				}
			}
			cut(r.w.Net.Cut)
			time.Sleep(seconds(3))
			r.changeNamespace(other, rng.Float64())
			time.Sleep(seconds(10))
			cut(r.w.Net.Heal)
		}
	}
}

// changeNamespace changes a setting of the default namespace that no answer depends
// on: the epoch rises, and requests of older epochs are refused.
func (r *run) changeNamespace(by string, chance float64) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err := r.controls[by].UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: "default", Settings: &adminv1.NamespaceSettings{RepairChance: &chance}})
	r.history.Note("repair chance of namespace default set to %.2f by %s: %v", chance, by, err)
	r.report.Faults["namespace change"]++
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
