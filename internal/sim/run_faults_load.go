package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// claimSoon is claim for faults that wait a while for a node.
func (f *faults) claimSoon(rng *rand.Rand) string {
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until) && time.Now().Before(f.until); time.Sleep(500 * time.Millisecond) {
		if name := f.claim(rng); name != "" {
			return name
		}
	}
	return ""
}

// startWatching has clients look at a node for what they have just written. saw holds a
// token once it has shown them some of that. One node at a time is watched; ok tells
// whether it is this one.
func (f *faults) startWatching(name string) (saw <-chan struct{}, ok bool) {
	t := f.r.topologies.latest()
	if t == nil || t.Resolve(name) == nil {
		return nil, false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.watch != 0 {
		return nil, false
	}
	f.mu.watch, f.mu.saw = t.Resolve(name).Incarnation, make(chan struct{}, 1)
	return f.mu.saw, true
}

func (f *faults) stopWatching() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.watch = 0
}

// watched returns the incarnation of the node that is watched, or 0.
func (f *faults) watched() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.watch
}

// shown notes that a node has shown a client what it had just written.
func (f *faults) shown(incarnation uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.watch != incarnation {
		return
	}
	select {
	case f.mu.saw <- struct{}{}:
	default:
	}
}

// heldDisk has a node's disk sync nothing for a moment, and takes the node's power away
// as soon as it has shown what was just written: that must have been on disk.
func (f *faults) heldDisk(rng *rand.Rand) {
	name := f.claimSoon(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	saw, ok := f.startWatching(name)
	if !ok {
		return
	}
	defer f.stopWatching()
	d := time.Duration(200+rng.IntN(1000)) * time.Millisecond
	f.note("held disk", "%s for %s", name, d)
	f.mu.Lock()
	f.mu.held[name] = time.Now().Add(d)
	f.mu.Unlock()
	select {
	case <-saw:
	case <-time.After(d + 200*time.Millisecond):
	}
	f.note("power cut", "%s, as it shows what was written", name)
	f.end(name, PowerCut)
	pause(rng, 5)
	f.start(name)
}

// lateHints has a node get hints of many writes to a key at once, after newer ones and
// after a restart, and looks at its disk a little later.
func (f *faults) lateHints(rng *rand.Rand) {
	name := f.claimSoon(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	if _, ok := f.startWatching(name); !ok {
		return
	}
	defer f.stopWatching()
	from := f.other(rng, name)
	f.note("late hints", "%s, of %s", name, from)
	a, b := f.r.w.Host(name), f.r.w.Host(from)
	f.r.w.Net.Cut(a, b)
	f.r.w.Net.Cut(b, a)
	f.writeThrough(from, Spaces(f.r.report.Nodes)[0], "quorum")
	time.Sleep(time.Duration(6+rng.IntN(6)) * time.Second) // a write gives a replica up after 5 s
	f.stopThrough(from)
	time.Sleep(time.Duration(2000+rng.IntN(4000)) * time.Millisecond)
	f.end(name, Kill)
	f.r.w.Net.Heal(a, b)
	f.r.w.Net.Heal(b, a)
	f.start(name)
	time.Sleep(time.Duration(1000+rng.IntN(2000)) * time.Millisecond)
	f.note("kill -9", "%s, as hints come in", name)
	f.end(name, Kill)
	f.start(name)
}

// absence ends a node for longer than dead records are kept where nobody is missing, as
// the others get to delete much that it has. In a small cluster little else could be
// broken meanwhile.
func (f *faults) absence(rng *rand.Rand) {
	if f.r.cfg.Seed%4 != 1 {
		return
	}
	name := f.claimSoon(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	d := time.Duration(95+rng.IntN(20)) * time.Second
	if time.Until(f.until) < d {
		return
	}
	f.note("absence", "%s for %s", name, d)
	f.end(name, Kill)
	time.Sleep(3 * time.Second) // by then it is known to be missing
	f.mu.Lock()
	f.mu.clear = "unhinted"
	f.mu.Unlock()
	time.Sleep(d)
	f.start(name)
}

// lonely has a node alone take writes of a namespace where reads ask fewer slots than
// must hold what they find, and has clients read those once the others hear of it.
func (f *faults) lonely(rng *rand.Rand) {
	spaces := Spaces(f.r.report.Nodes)
	space := spaces[len(spaces)-1]
	if space.N-space.R+1 <= space.R {
		return
	}
	name := f.claimSoon(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	f.note("lonely writes", "%s", name)
	f.r.w.Partition([]string{name})
	f.writeThrough(name, space, "one")
	time.Sleep(time.Duration(1000+rng.IntN(1000)) * time.Millisecond)
	f.stopThrough(name)
	for i := range f.r.nodes() { // what is under way never arrives
		if o := fmt.Sprint("node", i+1); o != name {
			f.r.w.Net.Reset(f.r.w.Host(name), f.r.w.Host(o))
		}
	}
	f.r.w.Join([]string{name})
	f.setReads(space)
	time.Sleep(time.Second)
	f.setReads(Space{})
}

func (f *faults) setReads(s Space) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.reads = s
}

// reading returns what setReads set.
func (f *faults) reading() (s Space, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.reads, f.mu.reads.Name != ""
}

// clearing returns the namespace that a client is to delete all keys of, once, or "".
func (f *faults) clearing() (namespace string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	namespace, f.mu.clear = f.mu.clear, ""
	return namespace
}

// changeUnheard changes a namespace while a node cannot note that on its disk, and so
// goes on with the epoch before. Clients that know no better write through it.
func (f *faults) changeUnheard(rng *rand.Rand) {
	name := f.claimSoon(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	spaces := Spaces(f.r.report.Nodes)
	space := spaces[rng.IntN(len(spaces))]
	by := f.other(rng, name)
	d := time.Duration(500+rng.IntN(1500)) * time.Millisecond
	f.note("held disk", "%s for %s, while a namespace changes", name, d)
	f.mu.Lock()
	f.mu.held[name] = time.Now().Add(d)
	f.mu.Unlock()
	f.change(rng, space.Name, by)
	f.writeThrough(name, space, "quorum")
	defer f.stopThrough(name)
	for until := time.Now().Add(d); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		f.r.topologies.ask(context.Background(), by, f.r.controls[by])
		f.r.served()
	}
}

// other returns a node that is not the one named.
func (f *faults) other(rng *rand.Rand, name string) string {
	for {
		if o := fmt.Sprint("node", 1+rng.IntN(f.r.nodes())); o != name {
			return o
		}
	}
}

// writeThrough has clients write a namespace's hot keys through a node, until stopThrough.
// The last who asks for it has it.
func (f *faults) writeThrough(node string, s Space, quorum string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.via, f.mu.space, f.mu.quorum = node, s, quorum
}

func (f *faults) stopThrough(node string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.via == node {
		f.mu.via = ""
	}
}

// through returns what writeThrough set.
func (f *faults) through() (node string, s Space, quorum string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.via, f.mu.space, f.mu.quorum
}

// served notes by which epochs the nodes say that they serve.
func (r *run) served() {
	for i := range r.nodes() {
		name := fmt.Sprint("node", i+1)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		resp, err := adminv1.NewStatusServiceClient(r.conns[name]).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
		cancel()
		if err == nil {
			r.checker.Serves(resp.GetStatus().GetIncarnation(), resp.GetStatus().GetEpoch(), r.topologies.latest())
		}
	}
}
