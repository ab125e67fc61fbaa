package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// kind is a kind of fault.
type kind struct {
	name string
	// minority tells that every vnode keeps a majority that works and is connected, so
	// that operations go on.
	minority bool
	// hits picks what is hit and does it. It returns a description and how it ends.
	hits func(w *world, rng *rand.Rand) (what string, heal func() error, err error)
	// losesData tells that a node loses what it holds, of which the cluster bears one
	// at a time.
	losesData bool
	// heals bounds how long the cluster may take to be whole again.
	heals time.Duration
}

// kinds are all faults.
var kinds = []kind{
	{name: "kill", minority: true, hits: killOne, heals: healPatience},
	{name: "kill-orch", minority: true, hits: killOrchestrator, heals: healPatience},
	{name: "kill-all", hits: killAll, heals: healPatience},
	{name: "wipe", minority: true, losesData: true, hits: wipe, heals: 2 * time.Minute},
	{name: "pause", minority: true, hits: pause, heals: healPatience},
	{name: "full-disk", minority: true, hits: fullDisk, heals: healPatience},
	{name: "cut", minority: true, hits: cutOff(true, true), heals: healPatience},
	{name: "cut-in", minority: true, hits: cutOff(true, false), heals: healPatience},
	{name: "cut-out", minority: true, hits: cutOff(false, true), heals: healPatience},
	{name: "cut-pair", minority: true, hits: cutPair, heals: healPatience},
	{name: "cut-zone", minority: true, hits: cutZone, heals: healPatience},
	{name: "cut-orch", minority: true, hits: cutOrchestrator, heals: healPatience},
	// Writes wait for the copies on the reporting node until these are let go of.
	{name: "kill-report", hits: ofInSync(killReporting), heals: healPatience},
	{name: "pause-report", hits: ofInSync(pauseReporting), heals: healPatience},
	{name: "cut-report", hits: ofInSync(cutReporting), heals: healPatience},
}

// kindsNamed returns the faults of a comma-separated list; all when it is empty.
func kindsNamed(list string) ([]kind, error) {
	if list == "" {
		return kinds, nil
	}
	var out []kind
	for name := range strings.SplitSeq(list, ",") {
		n := len(out)
		for _, k := range kinds {
			if k.name == name {
				out = append(out, k)
			}
		}
		if len(out) == n {
			return nil, fmt.Errorf("no fault is called %q", name)
		}
	}
	return out, nil
}

func one(rng *rand.Rand, ms []*machine) *machine { return ms[rng.IntN(len(ms))] }

func killOne(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.nodes)
	return m.name, func() error { return w.start(m) }, kill(m)
}

func killOrchestrator(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.orchestrators)
	if leader := w.leader(); leader != nil && rng.IntN(2) == 0 {
		m = leader
	}
	return m.name, func() error { return w.start(m) }, kill(m)
}

// killAll kills all nodes at once, half the time the orchestrators too. The nodes
// come back in any order.
func killAll(w *world, rng *rand.Rand) (string, func() error, error) {
	victims, what := append([]*machine{}, w.nodes...), "all nodes"
	if rng.IntN(2) == 0 {
		victims, what = w.machines(), "all nodes and orchestrators"
	}
	rng.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })
	return what, func() error { return w.startAll(victims...) }, kill(victims...)
}

// wipe deletes a node's data directory, half the time while the node runs. It comes
// back with an empty one, as a new node of the same name, and the cluster gives it
// the old one's slots and records.
func wipe(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.nodes)
	what := m.name + " was killed"
	if rng.IntN(2) == 0 {
		what = m.name + " was running"
		m.expectEnd()
		if err := os.RemoveAll(m.dataDir()); err != nil {
			return "", nil, err
		}
		time.Sleep(500 * time.Millisecond)
	}
	if err := kill(m); err != nil {
		return "", nil, err
	}
	return what, func() error { return w.start(m) }, os.RemoveAll(m.dataDir())
}

func pause(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.nodes)
	return m.name, func() error { return m.signal(syscall.SIGCONT, false) }, m.signal(syscall.SIGSTOP, false)
}

// fullDisk takes all space of a node's disk. The node must go on, and take writes
// again by itself once there is space.
func fullDisk(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.nodes)
	return m.name, func() error { return unfill(m.dir) }, fill(m.dir)
}

// cutOff cuts a node off from all other machines, half the time from the clients
// too: what goes in, what goes out, or both.
func cutOff(in, out bool) func(*world, *rand.Rand) (string, func() error, error) {
	return func(w *world, rng *rand.Rand) (string, func() error, error) {
		m := one(rng, w.nodes)
		return w.cutOffMachines(rng, in, out, m)
	}
}

func cutOrchestrator(w *world, rng *rand.Rand) (string, func() error, error) {
	m := one(rng, w.orchestrators)
	if leader := w.leader(); leader != nil && rng.IntN(2) == 0 {
		m = leader
	}
	dir := rng.IntN(3)
	return w.cutOffMachines(rng, dir != 1, dir != 2, m)
}

// cutZone cuts a zone off from the rest.
func cutZone(w *world, rng *rand.Rand) (string, func() error, error) {
	zone := one(rng, w.nodes).zone
	var ms []*machine
	for _, m := range w.nodes {
		if m.zone == zone {
			ms = append(ms, m)
		}
	}
	dir := rng.IntN(3)
	return w.cutOffMachines(rng, dir != 1, dir != 2, ms...)
}

func (w *world) cutOffMachines(rng *rand.Rand, in, out bool, ms ...*machine) (string, func() error, error) {
	var inner, outer []end
	names := map[string]bool{}
	what := ""
	for _, m := range ms {
		inner, names[m.name] = append(inner, m.end()), true
		what += m.name + " "
	}
	for _, m := range w.machines() {
		if !names[m.name] {
			outer = append(outer, m.end())
		}
	}
	if rng.IntN(2) == 0 {
		outer = append(outer, hubEnd)
		what += "from all and clients"
	} else {
		what += "from all but clients"
	}
	var err error
	if in {
		what += ", deaf"
		err = w.cuts.cut(outer, inner)
	}
	if out && err == nil {
		what += ", mute"
		err = w.cuts.cut(inner, outer)
	}
	return what, w.cuts.heal, err
}

// cutPair cuts two nodes off from each other, half the time one way only.
func cutPair(w *world, rng *rand.Rand) (string, func() error, error) {
	i := rng.IntN(nodeCount)
	a, b := w.nodes[i], w.nodes[(i+1+rng.IntN(nodeCount-1))%nodeCount]
	what := fmt.Sprintf("%s does not hear %s", a.name, b.name)
	err := w.cuts.cut([]end{b.end()}, []end{a.end()})
	if rng.IntN(2) == 0 && err == nil {
		what += ", nor the other way"
		err = w.cuts.cut([]end{a.end()}, []end{b.end()})
	}
	return what, w.cuts.heal, err
}

// leader returns the orchestrator that leads, if it says so.
func (w *world) leader() *machine {
	for _, m := range w.orchestrators {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		s, err := m.status.GetOrchestratorStatus(ctx, &adminv1.GetOrchestratorStatusRequest{})
		cancel()
		if err == nil && s.GetStatus().GetRaftState() == "leader" {
			return m
		}
	}
	return nil
}
