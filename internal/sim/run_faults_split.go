package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// split is a move of one of three slots that holds a key: its old node and the new
// one, the nodes of the other two slots, and one that has none of the three.
type split struct {
	place              Place
	vnode              uint32
	epoch              uint64
	old, newcomer      string
	one, other, remote string
}

// splitMove splits the nodes of a key in two as one of its slots moves, and has clients
// write and read the key through them. Either side has two of the four nodes, which is
// enough for whoever counts nodes and not slots; or one side has a quorum of the slots
// as they were and hears of no epoch any more, when it is taken for dead; or a
// coordinator that has heard of no move reaches nodes that have.
func (f *faults) splitMove(rng *rand.Rand) {
	how := []func(*faults, *rand.Rand, split){(*faults).splitEvenly, (*faults).splitOff, (*faults).splitOff, (*faults).deafen}[rng.IntN(4)]
	if s, ok := f.claimMove(rng); ok {
		how(f, rng, s)
		for _, n := range s.nodes() {
			f.release(n)
		}
	}
}

// nodes returns all of them.
func (s split) nodes() []string { return []string{s.old, s.newcomer, s.one, s.other, s.remote} }

// splitEvenly has the newcomer and one of the other slots reach each other, and the old
// node and the other one.
func (f *faults) splitEvenly(rng *rand.Rand, s split) {
	f.note("move split evenly", "vnode %d of %s: %s, %s from %s, %s", s.vnode, s.place, s.newcomer, s.one, s.old, s.other)
	some, others := []string{s.newcomer, s.one}, []string{s.old, s.other}
	f.bothWays(some, others, f.r.w.Net.Cut)
	all := append(some, others...)
	f.part(&parted{places: []Place{s.place}, writes: all, reads: all}, time.Duration(2000+rng.IntN(4000))*time.Millisecond)
	f.bothWays(some, others, f.r.w.Net.Heal)
	f.r.history.Note("the move of vnode %d is whole again", s.vnode)
}

// splitOff cuts the old node and one of the other slots off from all but clients and
// each other, once the newcomer has been filled and all of them have taken in the
// phase of that. Until then another node takes no epoch in, so that it stays.
func (f *faults) splitOff(rng *rand.Rand, s split) {
	const held = 2500 * time.Millisecond
	until := time.Now().Add(held)
	f.mu.Lock()
	f.mu.held[s.remote] = until
	f.mu.Unlock()
	for !f.filled(s) {
		if time.Sleep(50 * time.Millisecond); time.Now().After(until) {
			f.r.history.Note("the move of vnode %d is not ready to be split off", s.vnode)
			return
		}
	}
	side := []string{s.old, s.one}
	f.note("move split off", "vnode %d of %s: %v from all others", s.vnode, s.place, side)
	f.r.w.Partition(side)
	// What clients write there would be newer than what they have from the other side.
	f.part(&parted{places: []Place{s.place}, writes: []string{s.newcomer, s.other}, reads: side}, time.Duration(6000+rng.IntN(4000))*time.Millisecond)
	f.r.w.Join(side)
	f.r.history.Note("%v are connected again", side)
}

// deafen cuts a node off from all others until the slot has gone a step further, and
// then has clients write through it as it reaches the nodes of the other slots again.
func (f *faults) deafen(_ *rand.Rand, s split) {
	f.note("deaf coordinator", "%s, for the move of vnode %d of %s", s.remote, s.vnode, s.place)
	f.r.w.Isolate(s.remote)
	for range 100 {
		time.Sleep(100 * time.Millisecond)
		if t := f.r.present(); t.Ring[s.vnode].ChangedEpoch > s.epoch {
			f.r.topologies.see("an orchestrator", t.Proto())
			break
		}
	}
	time.Sleep(500 * time.Millisecond)
	f.r.served()
	f.bothWays([]string{s.remote}, []string{s.one, s.other}, f.r.w.Net.Heal)
	f.part(&parted{places: []Place{s.place}, writes: []string{s.remote}}, 3*time.Second)
	f.r.w.Reconnect(s.remote)
	f.r.history.Note("%s is connected again", s.remote)
}

// filled reports whether the newcomer of a move has been filled, and its endpoints and
// one of the other slots say that they have taken in the epoch of that.
func (f *faults) filled(s split) bool {
	for _, name := range []string{s.old, s.one, s.newcomer} {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		resp, err := adminv1.NewStatusServiceClient(f.r.conns[name]).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
		cancel()
		if err != nil || resp.GetStatus().GetEpoch() < s.epoch {
			return false
		}
		if name == s.newcomer && !slices.ContainsFunc(resp.GetStatus().GetFillings(), func(f *adminv1.Filling) bool {
			return f.GetVnode() == s.vnode && f.GetNamespaceId() == 0 && f.GetComplete()
		}) {
			return false
		}
	}
	return true
}

// parted are keys that clients write through some nodes and read through some.
type parted struct {
	places        []Place
	writes, reads []string
	// gap is the time between two operations; unless it is 0, the keys are taken in turn.
	gap time.Duration
	mu  struct {
		sync.Mutex
		turn int
		last time.Time
	}
}

// next draws what a client does next: what it writes or reads, and through which node,
// or "".
func (p *parted) next(rng *rand.Rand) (place Place, write bool, node string) {
	place, write = p.places[rng.IntN(len(p.places))], len(p.writes) > 0 && (len(p.reads) == 0 || rng.IntN(2) == 0)
	nodes := p.reads
	if write {
		nodes = p.writes
	}
	node = nodes[rng.IntN(len(nodes))]
	if p.gap == 0 {
		return place, write, node
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.mu.last) < p.gap {
		return place, write, ""
	}
	p.mu.turn++
	p.mu.last = time.Now()
	return p.places[p.mu.turn%len(p.places)], write, node
}

// part has clients write and read so for a while.
func (f *faults) part(p *parted, d time.Duration) {
	defer f.beginParted(p)()
	time.Sleep(d)
}

// beginParted has clients write and read so. The last who asks for it has it, until what
// is returned is called.
func (f *faults) beginParted(p *parted) (end func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.parted = p
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.mu.parted == p {
			f.mu.parted = nil
		}
	}
}

// nowParted returns how clients are to write and read, or nil.
func (f *faults) nowParted() *parted {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.parted
}

// sources are two nodes that a third is filled from, in the order in which it asks.
type sources [2]string

// sourcesOf returns those that most keys of three slots share which a node has, and
// these keys.
func (f *faults) sourcesOf(t *topology.Topology, node uint64) (most sources, places []Place) {
	shared := map[sources][]Place{}
	for _, s := range f.r.spacesOfThree(t) {
		for i := range hotKeys + wideKeys {
			p := hot(s, i)
			if i >= hotKeys {
				p = wide(s.Name, i-hotKeys)
			}
			v := t.VnodeOf([]byte(p.Key))
			var from []string
			for _, s := range t.Ring[v].Slots[:3] {
				if s.Node != node {
					from = append(from, t.NodeName(s.Node))
				}
			}
			if len(from) != 2 || t.Ring[v].Moving() >= 0 {
				continue
			}
			first := sources{from[v%2], from[1-v%2]}
			if shared[first] = append(shared[first], p); len(shared[first]) > len(places) {
				most, places = first, shared[first]
			}
		}
	}
	return most, places
}

// splitSources cuts the second of the two nodes that a data directory's successor is to be
// filled from off from all other nodes, and has what it pulls from the first one arrive
// late. What clients write meanwhile, through others, the first one and the successor
// get, but it is newer than what is on its way between them. As soon as the successor
// votes, clients read through the second one, whom nobody else reaches. It returns what
// does that once the successor has started.
func (f *faults) splitSources(name string, old uint64) func() {
	from, places := f.sourcesOf(f.r.present(), old)
	if len(places) == 0 || !f.claimAll(from[:]...) {
		return func() {}
	}
	var others []string
	for _, n := range f.names()[:f.r.nodes()] {
		if n != name && n != from[0] && n != from[1] {
			others = append(others, n)
		}
	}
	f.note("sources split", "of %s: %s, which is late, and %s, for %d keys", name, from[0], from[1], len(places))
	away := append([]string{from[0]}, others...)
	f.bothWays(away, from[1:], f.r.w.Net.Cut)
	late := [2]string{f.r.w.Host(from[0]), f.r.w.Host(name)}
	f.setLink(late, 150*time.Millisecond)
	return func() {
		// Seldom enough that what is lost on the way is not soon written again.
		end := f.beginParted(&parted{places: places, writes: others, gap: 2 * time.Second / time.Duration(len(places))})
		for range 80 {
			time.Sleep(100 * time.Millisecond)
			t := f.r.present()
			if n := t.Resolve(name); t.Node(old) == nil && n != nil && !incoming(t, n.Incarnation) {
				break
			}
		}
		end()
		f.setLink(late, 0)
		f.part(&parted{places: places, reads: from[1:]}, 3*time.Second)
		f.bothWays(away, from[1:], f.r.w.Net.Heal)
		f.release(from[0])
		f.release(from[1])
		f.r.history.Note("the sources of %s are whole again", name)
	}
}

func (f *faults) setLink(link [2]string, late time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.links[link] = late
}

// bothWays does something to all links between nodes of two groups.
func (f *faults) bothWays(some, others []string, do func(from, to string)) {
	for _, a := range some {
		for _, b := range others {
			do(f.r.w.Host(a), f.r.w.Host(b))
			do(f.r.w.Host(b), f.r.w.Host(a))
		}
	}
}

// claimMove waits a while for a move of one of the three slots of a hot key that has
// just begun, and claims its nodes and another one, which are more than other faults
// may break at once.
func (f *faults) claimMove(rng *rand.Rand) (s split, ok bool) {
	for range 300 {
		time.Sleep(100 * time.Millisecond)
		if time.Now().After(f.until) {
			break
		}
		t := f.r.present()
		if t == nil {
			continue
		}
		for _, space := range f.r.spacesOfThree(t) {
			for _, key := range rng.Perm(hotKeys) {
				if s, ok := f.moveOf(rng, t, hot(space, key)); ok {
					return s, true
				}
			}
		}
	}
	return split{}, false
}

// spacesOfThree returns the namespaces whose keys have three slots and keep them.
func (r *run) spacesOfThree(t *topology.Topology) (out []Space) {
	for _, s := range Spaces(r.report.Nodes) {
		if ns := t.Namespace(s.Name); ns != nil && ns.N == 3 && ns.AlsoN == 0 && s.TTL == 0 {
			out = append(out, s)
		}
	}
	return out
}

// moveOf claims the nodes of the move of a key's slot, if there is one.
func (f *faults) moveOf(rng *rand.Rand, t *topology.Topology, p Place) (s split, ok bool) {
	v := t.VnodeOf([]byte(p.Key))
	ring := &t.Ring[v]
	j := ring.Moving()
	if j < 0 || j >= 3 || ring.Slots[j].Phase != topology.WriteBothReadOld {
		return s, false
	}
	others := []int{(j + 1) % 3, (j + 2) % 3}
	rng.Shuffle(2, func(a, b int) { others[a], others[b] = others[b], others[a] })
	s = split{
		place: p, vnode: v, epoch: ring.ChangedEpoch,
		old: t.NodeName(ring.Slots[j].Node), newcomer: t.NodeName(ring.Slots[j].Incoming),
		one: t.NodeName(ring.Slots[others[0]].Node), other: t.NodeName(ring.Slots[others[1]].Node),
	}
	for _, i := range rng.Perm(len(t.Nodes)) {
		n := &t.Nodes[i]
		has := slices.ContainsFunc(ring.Slots, func(s topology.Slot) bool { return s.Node == n.Incarnation || s.Incoming == n.Incarnation })
		if s.remote = n.Name; !has && t.Resolve(n.Name) == n && f.claimAll(s.nodes()...) {
			return s, true
		}
	}
	return s, false
}

// claimAll claims nodes for one fault, all of them or none, however many.
func (f *faults) claimAll(names ...string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.ContainsFunc(names, func(n string) bool { return f.mu.busy[n] }) {
		return false
	}
	for _, n := range names {
		f.mu.busy[n] = true
	}
	f.mu.down += len(names)
	return true
}

// present returns the newest topology that an orchestrator shows at once, or else the
// newest that was seen.
func (r *run) present() *topology.Topology {
	newest := r.topologies.latest()
	for i := range r.report.Orchestrators {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		resp, err := topologyv1.NewTopologyServiceClient(r.conns[fmt.Sprint("orch", i+1)]).GetTopology(ctx, &topologyv1.GetTopologyRequest{})
		cancel()
		if err != nil {
			continue
		}
		if t, err := topology.FromProto(resp.GetTopology()); err == nil && (newest == nil || t.Epoch > newest.Epoch) {
			newest = t
		}
	}
	return newest
}
