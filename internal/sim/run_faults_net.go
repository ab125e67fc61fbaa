package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// names returns those of all processes, nodes first.
func (f *faults) names() []string {
	var out []string
	for i := range f.r.nodes() {
		out = append(out, fmt.Sprint("node", i+1))
	}
	for i := range f.r.report.Orchestrators {
		out = append(out, fmt.Sprint("orch", i+1))
	}
	return out
}

// partition splits the cluster in two: a minority of the nodes, mostly, and any of the
// orchestrators are on the other side.
func (f *faults) partition(rng *rand.Rand) {
	var nodes []string
	for range 1 + rng.IntN((f.r.report.Nodes+1)/2) {
		if name := f.claim(rng); name != "" {
			nodes = append(nodes, name)
			defer f.release(name)
		}
	}
	if len(nodes) == 0 {
		return
	}
	side := nodes
	for i := range f.r.report.Orchestrators {
		if rng.IntN(3) == 0 {
			side = append(side, fmt.Sprint("orch", i+1))
		}
	}
	f.note("partition", "%v from all others", side)
	f.r.w.Partition(side)
	pause(rng, 20)
	f.r.w.Join(side)
	f.r.history.Note("%v are connected again", side)
}

// pauseNode pauses a node, with its disk.
func (f *faults) pauseNode(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	kind, d := "pause", time.Duration(1+rng.IntN(12_000))*time.Millisecond
	if rng.IntN(2) == 0 { // as long as nobody gives it up for
		kind, d = "stall", time.Duration(1+rng.IntN(900))*time.Millisecond
	}
	f.note(kind, "%s for %s", name, d)
	f.mu.Lock()
	f.mu.held[name] = time.Now().Add(d)
	f.mu.Unlock()
	f.r.w.Pause(name)
	time.Sleep(d)
	f.r.w.Resume(name)
}

// loss loses datagrams of gossip everywhere.
func (f *faults) loss(rng *rand.Rand) {
	share := 0.02 + 0.5*rng.Float64()*rng.Float64()
	f.note("loss", "%.0f%% of all datagrams", share*100)
	f.r.w.Net.SetLoss(share)
	pause(rng, 30)
	f.r.w.Net.SetLoss(0)
}

// resets resets the connections between some pairs of processes.
func (f *faults) resets(rng *rand.Rand) {
	names := f.names()
	for range 1 + rng.IntN(6) {
		a, b := names[rng.IntN(f.r.report.Nodes)], names[rng.IntN(len(names))]
		if a == b {
			continue
		}
		f.note("reset", "between %s and %s", a, b)
		f.r.w.Net.Reset(f.r.w.Host(a), f.r.w.Host(b))
		pause(rng, 1)
	}
}

// slowLinks makes what some processes send to some others late, each by another time,
// so that what is sent later over another link arrives sooner.
func (f *faults) slowLinks(rng *rand.Rand) {
	names := f.names()
	late := map[[2]string]time.Duration{}
	for range 1 + rng.IntN(6) {
		a, b := names[rng.IntN(len(names))], names[rng.IntN(len(names))]
		late[[2]string{f.r.w.Host(a), f.r.w.Host(b)}] = time.Duration(1+rng.IntN(250)) * time.Millisecond
	}
	set := func(on bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for link, d := range late {
			if f.mu.links[link] = 0; on {
				f.mu.links[link] = d
			}
		}
	}
	f.note("slow links", "%v", late)
	set(true)
	pause(rng, 12)
	set(false)
}

// claimOrchestrators takes orchestrators that work for one fault, all of them or none.
func (f *faults) claimOrchestrators(names ...string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range names {
		if f.mu.busy[n] {
			return false
		}
	}
	for _, n := range names {
		f.mu.busy[n] = true
	}
	return true
}

func (f *faults) releaseOrchestrators(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range names {
		delete(f.mu.busy, n)
	}
}

// leader ends the orchestrator that leads, or cuts it off from the others only.
func (f *faults) leader(rng *rand.Rand) {
	name := ""
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s, err := clusterStatus(ctx, f.r.controls[fmt.Sprint("node", 1+rng.IntN(f.r.report.Nodes))])
	if err != nil {
		return
	}
	for _, o := range s.GetOrchestrators() {
		if o.GetStatus().GetRaftState() == "leader" {
			name = o.GetName()
		}
	}
	if name == "" || !f.claimOrchestrators(name) {
		return
	}
	defer f.releaseOrchestrators(name)
	if rng.IntN(2) == 0 {
		f.note("leader kill -9", "%s", name)
		f.end(name, Kill)
		pause(rng, 10)
		f.start(name)
		return
	}
	f.note("leader paused", "%s", name)
	f.hits(name)
	f.r.w.Pause(name)
	pause(rng, 8)
	f.r.w.Resume(name)
}

// noOrchestrators ends all orchestrators for a while.
func (f *faults) noOrchestrators(rng *rand.Rand) {
	names := f.names()[f.r.nodes():]
	if !f.claimOrchestrators(names...) {
		return
	}
	defer f.releaseOrchestrators(names...)
	how := Crash(rng.IntN(2))
	f.note("no orchestrators", "%v", names)
	for _, n := range names {
		f.end(n, how)
	}
	pause(rng, 25)
	for _, n := range names {
		f.start(n)
	}
}
