package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// autonomy names the tracks that run with the control loops at work: those that break what
// these go by, and some of the others. The cluster then changes itself, which tracks that
// steer the ring do not expect.
const autonomy = "autonomy"

// provisionerTrack is the name of the track with which the provisioner makes mistakes.
const provisionerTrack = "provisioner"

var autonomyTracks = []string{
	"loads", "dead-nodes", "flapping-nodes", "gossip-lies", "lost-leaders", provisionerTrack, "uneven-rings", "no-majority",
	"more-cuts", "latencies", "orchestrators",
}

// changeLoad changes the load that the policy sees.
func (f *faults) changeLoad(rng *rand.Rand) {
	load := loopsTarget * (loopsMin - 1 + rng.Float64()*(loopsMax-loopsMin+2))
	f.note("load change", "%.2f nodes' CPU", load)
	f.r.fleet.setLoad(load)
}

// unbalance has people move slots from one node of a zone to another one, which then has far more
// than others: that is for the control loops to mend.
func (f *faults) unbalance(rng *rand.Rand) {
	ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
	defer cancel()
	by := f.r.control()
	if op, err := activeOperation(ctx, by); err != nil || op != nil {
		return
	}
	t := f.r.present()
	members := t.Members()
	from, to := members[rng.IntN(len(members))], members[rng.IntN(len(members))]
	if from == to || from.Zone != to.Zone {
		return
	}
	op := &topologyv1.Operation{Kind: "apply", Title: fmt.Sprintf("slots of %s to %s", from.Name, to.Name)}
	for v := range t.Ring {
		slots := t.Ring[v].Slots
		i := slices.IndexFunc(slots, func(s topology.Slot) bool { return s.Node == from.Incarnation })
		if i >= 0 && len(op.Moves) < 6 && !slices.ContainsFunc(slots, func(s topology.Slot) bool { return s.Node == to.Incarnation }) {
			op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(i), From: from.Incarnation, To: to.Incarnation})
		}
	}
	if len(op.GetMoves()) > 0 {
		f.begin(ctx, by, t, op)
	}
}

// deadNode ends a node for good, with its disk, and waits until others have its slots. There is
// one at a time: what two replicas lose is lost.
func (f *faults) deadNode(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	t := f.r.present()
	n := t.Resolve(name)
	if n == nil || !t.Names(n.Incarnation) || !f.r.damage.begin(name) {
		return
	}
	f.hits(name)
	f.r.checker.DiskLost()
	if !f.r.fleet.down(name, Kill, true) {
		f.r.damage.end()
		return
	}
	f.setEnded(name, true)
	f.note("dead node", "%s, #%d, with its disk", name, n.Incarnation)
	for time.Now().Before(f.until) {
		time.Sleep(time.Second)
		if now := f.r.topologies.latest(); now.Node(n.Incarnation) == nil {
			f.r.history.Note("all is whole without %s, #%d", name, n.Incarnation)
			f.r.damage.end()
			return
		}
	}
}

// flap has a node come and go, each time for about as long as it takes to be found unhealthy,
// or about as long as it takes to be given up.
func (f *faults) flap(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	away := 3 * time.Second
	if rng.IntN(3) == 0 {
		away = replaceAfter + 3*time.Second
	}
	stop := rng.IntN(2) == 0
	f.note("flapping node", "%s, for about %s each time", name, away)
	for range 2 + rng.IntN(4) {
		d := away + time.Duration(rng.IntN(3000)-1500)*time.Millisecond
		if stop {
			f.end(name, Kill)
		} else {
			f.r.w.Pause(name)
		}
		time.Sleep(d)
		if stop {
			f.start(name)
		} else {
			f.r.w.Resume(name)
		}
		time.Sleep(time.Duration(500+rng.IntN(4000)) * time.Millisecond)
		if time.Now().After(f.until) {
			return
		}
	}
}

// lie has gossip take a living node for dead: what it says and is told there is lost, to
// and from all others or the orchestrators, and all else works. The control loops may not
// give it up.
func (f *faults) lie(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	n := f.r.present().Resolve(name)
	if n == nil {
		return
	}
	deaf, from := func(string) bool { return true }, "everybody"
	if rng.IntN(2) == 0 {
		var orchestrators []string
		for _, o := range f.r.orchestrators() {
			orchestrators = append(orchestrators, f.r.w.Host(o))
		}
		deaf, from = func(host string) bool { return slices.Contains(orchestrators, host) }, "the orchestrators"
	}
	f.note("gossip lost", "of %s, with %s", name, from)
	f.r.w.Mute(name, deaf)
	done := f.r.loops.alive(n.Incarnation)
	time.Sleep(time.Duration(8+rng.IntN(25)) * time.Second)
	f.r.w.Mute(name, nil)
	done()
}

// loseLeader ends the orchestrators' leader, or cuts it off from all others, in the
// middle of what a loop does.
func (f *faults) loseLeader(rng *rand.Rand) {
	moments := []string{"a launch", "a registration", "an end", "recover", "join", "shrink", "rebalance", "a call"}
	moment := moments[rng.IntN(len(moments))]
	how := rng.IntN(3)
	for range 150 {
		time.Sleep(200 * time.Millisecond)
		if time.Now().After(f.until) {
			return
		}
		if !f.inTheMiddle(moment) {
			continue
		}
		time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
		name := ""
		for _, o := range f.r.orchestrators() {
			if f.r.leads(o) {
				name = o
			}
		}
		if name == "" || !f.claimOrchestrators(name) {
			continue
		}
		defer f.releaseOrchestrators(name)
		f.note("leader lost in the middle of "+moment, "%s", name)
		if how == 2 {
			f.r.w.Isolate(name)
			pause(rng, 12)
			f.r.w.Reconnect(name)
			return
		}
		f.end(name, Crash(how))
		pause(rng, 10)
		f.start(name)
		return
	}
}

// inTheMiddle reports whether a loop is in the middle of something.
func (f *faults) inTheMiddle(moment string) bool {
	switch moment {
	case "a launch":
		return f.r.fleet.underWay(topology.Launch) > 0
	case "an end":
		return f.r.fleet.underWay(topology.End) > 0
	case "a call":
		return f.r.fleet.underWay(topology.Launch)+f.r.fleet.underWay(topology.End) > 0
	case "a registration":
		return f.r.loops.registering()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	op, err := activeOperation(ctx, f.r.control())
	return err == nil && op.GetKind() == moment
}

// killWrong has the provisioner end a node that it was not asked to end; its disk stays, and
// it starts again.
func (f *faults) killWrong(rng *rand.Rand) {
	for range 100 {
		time.Sleep(200 * time.Millisecond)
		if time.Now().After(f.until) {
			return
		}
		if f.r.fleet.underWay(topology.Launch)+f.r.fleet.underWay(topology.End) == 0 {
			continue
		}
		name := f.claim(rng)
		if name == "" {
			continue
		}
		defer f.release(name)
		f.note("wrong node killed", "%s", name)
		f.end(name, Kill)
		pause(rng, 8)
		f.start(name)
		return
	}
}

// noMajority ends all orchestrators while all nodes work, or all but one, and has a client put
// and get meanwhile: the data path does not notice (invariant 11). That nothing is changed
// (12) is seen in what was agreed on.
func (f *faults) noMajority(rng *rand.Rand) {
	nodes := f.r.nodeNames()
	if !f.claimAll(nodes...) {
		return
	}
	defer func() {
		for _, n := range nodes {
			f.release(n)
		}
	}()
	names := f.r.orchestrators()
	if !f.claimOrchestrators(names...) {
		return
	}
	defer f.releaseOrchestrators(names...)
	down := names[rng.IntN(2):]
	how := Crash(rng.IntN(2))
	f.note("no majority of orchestrators", "without %v", down)
	for _, n := range down {
		f.end(n, how)
	}
	time.Sleep(3 * time.Second) // nodes leave them
	c := f.r.w.Client(client.WithTimeout(opTimeout))
	for range 4 + rng.IntN(12) {
		p := wide("default", rng.IntN(wideKeys))
		wrote := &Op{Client: "alone", Kind: OpPut, Place: p, Value: fmt.Sprintf("alone.%d", time.Now().UnixMilli())}
		f.r.checker.Invoke(wrote)
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		receipt, err := c.Put(ctx, []byte(p.Key), []byte(wrote.Value))
		cancel()
		f.r.checker.Return(wrote, func() {
			wrote.Receipt = receipt
			wrote.Outcome, wrote.Error = writeOutcome(err)
		})
		got := &Op{Client: "alone", Kind: OpGet, Place: p}
		read(f.r.checker, c, got, nil)
		if wrote.Outcome != OK || got.Outcome == Failed {
			f.r.history.violate(11, "all nodes work, and without %v: %s, %s", down, wrote, got)
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	c.Close()
	for _, n := range down {
		f.start(n)
	}
}

// control returns the control service that the run itself asks.
func (r *run) control() adminv1.ControlServiceClient {
	if r.fleet == nil {
		return r.controls["node1"]
	}
	return r.controls["orch1"] // nodes come and go
}

func (r *run) orchestrators() (out []string) {
	for i := range r.report.Orchestrators {
		out = append(out, fmt.Sprint("orch", i+1))
	}
	return out
}

// nodeNames returns the names of the nodes that there are, registered ones where they come and go.
func (r *run) nodeNames() (out []string) {
	if r.fleet == nil {
		for i := range r.nodes() {
			out = append(out, fmt.Sprint("node", i+1))
		}
		return out
	}
	t := r.topologies.latest()
	for i := range t.Nodes {
		if n := &t.Nodes[i]; t.Resolve(n.Name) == n {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return out
}
