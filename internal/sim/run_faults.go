package sim

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// faults breaks a cluster in many ways at once. Each kind of trouble is a track with
// random numbers of its own: it waits, breaks something that no other track has
// broken, and mends it.
type faults struct {
	r     *run
	until time.Time
	mu    struct {
		sync.Mutex
		busy   map[string]bool
		down   int                         // nodes that are busy
		ended  map[string]bool             // processes that do not run
		slow   map[string]time.Duration    // by host, and by process for its disk
		links  map[[2]string]time.Duration // by hosts
		held   map[string]time.Time        // processes whose disks wait until then
		watch  uint64                      // incarnation at which clients look, or 0
		saw    chan struct{}               // holds a token once it has shown them something
		via    string                      // node that clients write some namespace through, or ""
		clear  string                      // namespace that a client is to delete all keys of, or ""
		space  Space                       // which one
		quorum string                      // by which
		reads  Space                       // namespace that clients read again and again, if it has a name
		parted *parted                     // keys that clients write and read through some nodes only, if any
		syncs  *rand.Rand
	}
}

func newFaults(r *run) *faults {
	f := &faults{r: r}
	f.mu.busy, f.mu.ended, f.mu.slow = map[string]bool{}, map[string]bool{}, map[string]time.Duration{}
	f.mu.links, f.mu.held = map[[2]string]time.Duration{}, map[string]time.Time{}
	f.mu.syncs = rand.New(rand.NewPCG(r.cfg.Seed, 0x5bc))
	return f
}

// latency is that of the network, with what slow nodes add.
func (f *faults) latency(from, to string) (base, jitter time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	extra := f.mu.slow[from] + f.mu.slow[to] + f.mu.links[[2]string{from, to}]
	return 50*time.Microsecond + extra, 100*time.Microsecond + extra
}

// syncDelay draws how long syncs take: mostly some ms, seldom much longer.
func (f *faults) syncDelay(name string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if held := time.Until(f.mu.held[name]); held > 0 {
		return held
	}
	if f.mu.syncs.IntN(50) == 0 {
		return f.mu.slow[name] + time.Duration(f.mu.syncs.IntN(60))*time.Millisecond
	}
	return f.mu.slow[name] + time.Duration(f.mu.syncs.IntN(3000))*time.Microsecond
}

// clockError is how far clocks are off at most in this run, for the judges of expiry.
func (f *faults) clockError() time.Duration {
	if f.jumps() {
		return 6 * time.Second
	}
	return time.Second
}

// jumps is whether clocks jump in this run by more than a coordinator may be off.
func (f *faults) jumps() bool { return f.r.cfg.Seed%3 == 0 }

// run breaks things until a time, or until an invariant is broken; everything is
// mended when it returns.
func (f *faults) run(until time.Time) {
	f.until = until
	if f.r.fleet != nil {
		f.r.fleet.err(until)
		f.r.fleet.setLoad(loopsTarget * float64(f.r.report.Nodes))
	}
	f.r.w.Net.SetLatency(f.latency)
	var tracks sync.WaitGroup
	for _, t := range f.r.cfg.tracks() {
		rng := f.r.w.stream("faults: " + t.name)
		tracks.Go(func() {
			for {
				wait := time.Duration((0.2 + rng.ExpFloat64()) * float64(t.every) * 0.8)
				if f.r.fleet != nil {
					wait = min(wait, time.Until(f.until)+time.Millisecond)
				}
				time.Sleep(wait)
				if time.Now().After(f.until) || len(f.r.history.Violations()) > 0 {
					return
				}
				t.fault(f, rng)
			}
		})
	}
	tracks.Wait()
}

// note counts and records a fault.
func (f *faults) note(kind, format string, args ...any) {
	f.r.count(f.r.report.Faults, kind)
	f.r.history.Note("%s: %s", kind, fmt.Sprintf(format, args...))
}

// claim returns a node that works, for one fault, or "". Mostly a majority is left to
// work.
func (f *faults) claim(rng *rand.Rand) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	limit := (f.r.report.Nodes - 1) / 2
	if rng.IntN(10) == 0 {
		limit++
	}
	if f.mu.down >= limit {
		return ""
	}
	names := f.r.nodeNames()
	name := names[rng.IntN(len(names))]
	if f.mu.busy[name] {
		return ""
	}
	f.mu.busy[name] = true
	f.mu.down++
	return name
}

func (f *faults) release(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.mu.busy, name)
	f.mu.down--
}

// start starts a process again.
func (f *faults) start(name string) {
	f.r.history.Note("start %s", name)
	down := f.down()
	if f.r.fleet != nil && strings.HasPrefix(name, "node") {
		f.r.fleet.up(name)
		f.setEnded(name, false)
		return
	}
	if err := f.r.w.TryStart(name); err != nil {
		f.r.history.violate(0, "%s does not start: %v", name, err)
		return
	}
	f.setEnded(name, false)
	// Who has been down all the while cannot have got hints in between.
	f.r.hintsKept(name, func(target string) bool { return down[target] && f.ended(target) })
}

// end ends a process against its will, unless it could not start again.
func (f *faults) end(name string, how Crash) {
	if f.ended(name) {
		return
	}
	f.hits(name)
	if f.r.fleet != nil && strings.HasPrefix(name, "node") {
		f.r.fleet.down(name, how, false)
	} else {
		f.r.w.Crash(name, how)
	}
	f.setEnded(name, true)
}

// hits counts the phases of the moves that the end or a stop of a process hits.
func (f *faults) hits(name string) {
	t := f.r.present()
	if t == nil {
		return
	}
	leads := f.r.leads(name)
	hit := map[Hit]bool{}
	for i := range t.Ring {
		j := t.Ring[i].Moving()
		if j < 0 {
			continue
		}
		for k, s := range t.Ring[i].Slots {
			what := ""
			switch {
			case leads:
				what = HitLeader
			case t.NodeName(s.Node) == name && k == j:
				what = HitOld
			case t.NodeName(s.Incoming) == name && k == j:
				what = HitNewcomer
			case t.NodeName(s.Node) == name:
				what = HitOther
			default:
				continue
			}
			hit[Hit{what, t.Ring[i].Slots[j].Phase.String()}] = true
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for h := range hit {
		f.r.report.Hit[h]++
	}
}

// leads reports whether a process is the orchestrators' leader.
func (r *run) leads(name string) bool {
	if !strings.HasPrefix(name, "orch") {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(r.conns[name]).GetOrchestratorStatus(ctx, &adminv1.GetOrchestratorStatusRequest{})
	return err == nil && resp.GetStatus().GetRaftState() == "leader"
}

// down returns the processes that do not run.
func (f *faults) down() map[string]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.mu.ended)
}

func (f *faults) setEnded(name string, ended bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.ended[name] = ended
}

func (f *faults) ended(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.ended[name]
}

// pause waits for a moment, or up to so many seconds.
func pause(rng *rand.Rand, seconds float64) {
	if rng.IntN(3) == 0 {
		seconds /= 10
	}
	time.Sleep(time.Duration(rng.Float64() * seconds * float64(time.Second)))
}

func (f *faults) crash(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	how := Crash(rng.IntN(2))
	f.note([]string{"kill -9", "power cut"}[how], "%s", name)
	f.end(name, how)
	pause(rng, 15)
	f.start(name)
	for rng.IntN(3) == 0 { // again, before it has got what it missed
		pause(rng, 1.5)
		f.note([]string{"kill -9", "power cut"}[how], "%s again", name)
		f.end(name, how)
		f.start(name)
	}
	pause(rng, 3)
}

// slowDisk makes a node's syncs late, and then takes its power away.
func (f *faults) slowDisk(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	late := time.Duration(50+rng.IntN(600)) * time.Millisecond
	f.note("slow disk", "%s by %s", name, late)
	set := func(d time.Duration) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mu.slow[name] = d
	}
	set(late)
	pause(rng, 6)
	if rng.IntN(2) == 0 {
		f.note("power cut", "%s, while its disk is slow", name)
		f.end(name, PowerCut)
		set(0)
		pause(rng, 5)
		f.start(name)
	}
	set(0)
}

// correlated ends several nodes at once.
func (f *faults) correlated(rng *rand.Rand) {
	f.mu.Lock()
	var names []string
	for _, i := range rng.Perm(f.r.nodes()) {
		name := fmt.Sprint("node", i+1)
		if !f.mu.busy[name] && (len(names) < 2 || rng.IntN(2) == 0) {
			f.mu.busy[name] = true
			f.mu.down++
			names = append(names, name)
		}
	}
	f.mu.Unlock()
	f.note("power cut of several nodes", "%v", names)
	for _, name := range names {
		f.end(name, PowerCut)
	}
	pause(rng, 6)
	for _, name := range names {
		f.start(name)
		f.release(name)
	}
}

func (f *faults) restart(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	f.note("restart", "%s", name)
	f.r.w.Stop(name)
	f.start(name)
}

// cut cuts a node off from some or all others, in one or both directions.
func (f *faults) cut(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	w := f.r.w
	var others []string
	kind := ""
	switch rng.IntN(4) {
	case 0:
		kind = "cut from all"
		for o := range w.processes {
			others = append(others, o)
		}
	case 1:
		kind = "cut from the orchestrators"
		for i := range f.r.report.Orchestrators {
			others = append(others, fmt.Sprint("orch", i+1))
		}
	default:
		kind = "cut from some nodes"
		for _, o := range f.r.nodeNames() {
			if o != name && (len(others) == 0 || rng.IntN(2) == 0) {
				others = append(others, o)
			}
		}
	}
	out, in := true, true
	switch rng.IntN(4) {
	case 0:
		out, kind = false, kind+", what it is sent"
	case 1:
		in, kind = false, kind+", what it sends"
	}
	each := func(do func(from, to string)) {
		for _, o := range others {
			if out && o != name {
				do(w.Host(name), w.Host(o))
			}
			if in && o != name {
				do(w.Host(o), w.Host(name))
			}
		}
	}
	f.note(kind, "%s, from %v", name, others)
	each(w.Net.Cut)
	pause(rng, 15)
	each(w.Net.Heal)
	f.r.history.Note("%s is connected again", name)
}

// clock sets a node's clock ahead or back, and may restart the node when it is set
// right.
func (f *faults) clock(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	ahead := time.Duration(rng.IntN(480)-240) * time.Millisecond
	kind := "clock step"
	if f.jumps() && rng.IntN(3) == 0 {
		ahead, kind = ahead*20, "clock jump"
	}
	f.note(kind, "%s by %s", name, ahead)
	f.r.w.SetClock(name, ahead)
	pause(rng, 10)
	if rng.IntN(2) == 0 {
		f.note("kill -9", "%s, while its clock is set right", name)
		f.end(name, Kill)
		f.r.w.SetClock(name, 0)
		f.start(name)
		return
	}
	// It drifts back.
	for ; ahead.Abs() > 10*time.Millisecond; ahead -= ahead / 4 {
		f.r.w.SetClock(name, ahead)
		time.Sleep(200 * time.Millisecond)
	}
	f.r.w.SetClock(name, 0)
}

func (f *faults) orchestrator(rng *rand.Rand) {
	name := fmt.Sprint("orch", 1+rng.IntN(f.r.report.Orchestrators))
	f.mu.Lock()
	taken := f.mu.busy[name]
	f.mu.busy[name] = true
	f.mu.Unlock()
	if taken {
		return
	}
	switch rng.IntN(3) {
	case 0:
		f.note("orchestrator cut off", "%s", name)
		f.r.w.Isolate(name)
		pause(rng, 20)
		f.r.w.Reconnect(name)
	default:
		how := Crash(rng.IntN(2))
		f.note("orchestrator "+[]string{"kill -9", "power cut"}[how], "%s", name)
		f.end(name, how)
		pause(rng, 20)
		f.start(name)
	}
	f.mu.Lock()
	delete(f.mu.busy, name)
	f.mu.Unlock()
}

// slow makes all that a node sends and is sent late.
func (f *faults) slow(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	late := time.Duration(1+rng.IntN(100)) * time.Millisecond
	f.note("slow node", "%s by %s", name, late)
	set := func(d time.Duration) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mu.slow[f.r.w.Host(name)] = d
	}
	set(late)
	pause(rng, 15)
	set(0)
}

// changeNamespace changes a setting of the default namespace that no answer depends
// on: the epoch rises, and requests of older epochs are refused.
func (f *faults) changeNamespace(rng *rand.Rand) {
	f.change(rng, "default", fmt.Sprint("node", 1+rng.IntN(f.r.report.Nodes)))
}

func (f *faults) change(rng *rand.Rand, namespace, by string) {
	chance := rng.Float64()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err := f.r.controls[by].UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: namespace, Settings: &adminv1.NamespaceSettings{RepairChance: &chance}})
	f.note("namespace change", "repair chance of %s set to %.2f by %s: %v", namespace, chance, by, err)
}
