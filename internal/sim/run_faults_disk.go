package sim

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// brokenLog breaks the write-ahead log of a node, which has to end, and starts it again
// on a mended disk.
func (f *faults) brokenLog(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	f.note("broken log", "%s", name)
	f.r.w.Break(name, LogBroken)
	select {
	case <-f.r.w.Died(name):
		f.r.history.Note("%s has died of its log", name)
	case <-time.After(time.Duration(rng.IntN(10_000)) * time.Millisecond): // nothing was written
	}
	// What a sync that failed left may be there or not.
	f.end(name, Crash(rng.IntN(2)))
	f.r.w.Break(name, NoFault)
	pause(rng, 5)
	f.start(name)
}

// fullDisk takes a node's disk space away for a while. The node refuses what needs
// space, or ends.
func (f *faults) fullDisk(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	f.note("full disk", "%s", name)
	f.r.w.Break(name, DiskFull)
	select {
	case <-f.r.w.Died(name):
		f.r.history.Note("%s has died of its full disk", name)
		f.end(name, Kill)
		f.r.w.Break(name, NoFault)
		f.start(name)
	case <-time.After(time.Duration(rng.IntN(20_000)) * time.Millisecond):
		f.r.w.Break(name, NoFault)
		f.r.history.Note("%s has space again", name)
	}
}

// damage is the node whose disk a fault has damaged. There is one at a time, until it is
// whole again: what two replicas lose is lost.
type damage struct {
	sync.Mutex
	name string
}

func (d *damage) begin(name string) bool {
	d.Lock()
	defer d.Unlock()
	if d.name != "" {
		return false
	}
	d.name = name
	return true
}

func (d *damage) of(name string) bool {
	d.Lock()
	defer d.Unlock()
	return d.name == name
}

func (d *damage) end() {
	d.Lock()
	defer d.Unlock()
	d.name = ""
}

// lostDisk takes the disk of a node or the end of its log away, and waits until its
// successor votes.
func (f *faults) lostDisk(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	t := f.r.topologies.latest()
	if t == nil || t.Resolve(name) == nil || !f.r.damage.begin(name) {
		return
	}
	old := t.Resolve(name).Incarnation
	f.end(name, Kill)
	f.r.checker.DiskLost()
	if rng.IntN(2) == 0 {
		f.note("wiped disk", "%s", name)
		f.r.w.Wipe(name)
	} else {
		how, err := f.r.w.LoseTail(name, rng)
		f.note("lost tail", "%s: %s %v", name, how, err)
		// What was lost within a moment of its sync goes unnoticed, and more than a lost
		// disk is promised nobody.
		if left, err := readRemains(f.r.w.process(name).disk, t); err == nil && left.lostTail == "" {
			f.note("wiped disk", "%s, as too little of its log is lost", name)
			f.r.w.Wipe(name)
		}
	}
	pause(rng, 5)
	heal := func() {}
	if rng.IntN(4) > 0 {
		heal = f.splitSources(name, old)
	}
	f.start(name)
	heal()
	if f.replaced(name, old) {
		f.r.damage.end()
	}
}

// replaced waits until the successor of a data directory votes, and reports whether it
// does before faults end. The node must not serve as before.
func (f *faults) replaced(name string, old uint64) bool {
	for time.Now().Before(f.until) {
		time.Sleep(time.Second)
		if f.serves(name, old) {
			f.r.history.violate(18, "%s serves as incarnation %d, whose disk is lost or damaged", name, old)
			return false
		}
		t := f.r.topologies.latest()
		if n := t.Resolve(name); t.Node(old) == nil && n != nil && !incoming(t, n.Incarnation) {
			f.r.history.Note("the successor of %s votes", name)
			return true
		}
	}
	return false
}

// serves reports whether a node says that it serves as an incarnation.
func (f *faults) serves(name string, incarnation uint64) bool {
	return f.servesIn(name, incarnation, 0)
}

// servesIn reports whether a node says that it serves as an incarnation, and has taken in
// an epoch. Before it has, it may not have heard of it: nodes start without orchestrators.
func (f *faults) servesIn(name string, incarnation, epoch uint64) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(f.r.conns[name]).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	s := resp.GetStatus()
	return err == nil && s.GetState() == adminv1.NodeStatus_STATE_SERVING && s.GetIncarnation() == incarnation && s.GetEpoch() >= epoch
}

// incoming reports whether a node is about to take slots over.
func incoming(t *topology.Topology, incarnation uint64) bool {
	for _, v := range t.Ring {
		for _, s := range v.Slots {
			if s.Incoming == incarnation {
				return true
			}
		}
	}
	return false
}

// flipBit flips a bit on a node's disk, may end the node, and waits until a scrub has
// found what there is to find and the others have filled it in again, or until a new
// directory has taken the place of one that was damaged beyond its records.
func (f *faults) flipBit(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	t := f.r.topologies.latest()
	if t == nil || t.Resolve(name) == nil || !f.r.damage.begin(name) {
		return
	}
	old := t.Resolve(name).Incarnation
	f.r.checker.DiskLost()
	f.r.checker.Rotten(old)
	where, err := f.r.w.FlipBit(name, rng)
	if err != nil { // it has no table yet
		f.r.checker.Mended(old)
		f.r.damage.end()
		return
	}
	f.note("flipped bit", "%s: %s", name, where)
	pause(rng, 5)
	if rng.IntN(2) == 0 {
		how := Crash(rng.IntN(2))
		f.note([]string{"kill -9", "power cut"}[how], "%s, whose disk has rotted", name)
		f.end(name, how)
		pause(rng, 5)
		f.start(name)
	}
	// No other scrub comes in time, so this goes on when all other faults have ended.
	for until := f.until.Add(settleFor); time.Now().Before(until) && len(f.r.history.Violations()) == 0; {
		f.scrub(name)
		select {
		case <-f.r.w.Died(name):
			f.r.history.Note("%s has given its disk up", name)
			f.end(name, Kill)
			pause(rng, 5)
			f.start(name)
			if f.replaced(name, old) {
				f.r.damage.end()
			}
			return
		case <-time.After(10 * time.Second):
		}
		left, err := readRemains(f.r.w.CopyDisk(name), f.r.topologies.latest())
		switch {
		case err != nil || !left.whole():
		case left.incarnation > old: // it began anew when it was started
			if f.replaced(name, old) {
				f.r.damage.end()
			}
			return
		case left.incarnation == old:
			f.r.history.Note("the disk of %s is whole again", name)
			f.r.w.Mended(name)
			f.r.checker.Mended(old)
			f.r.damage.end()
			return
		}
	}
	if len(f.r.history.Violations()) == 0 {
		f.r.history.violate(18, "the disk of %s is not whole %s after the last fault", name, settleFor)
	}
}

// scrub has a node read all it has on disk.
func (f *faults) scrub(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := adminv1.NewRepairServiceClient(f.r.conns[name]).StartRepair(ctx, &adminv1.StartRepairRequest{Scrub: true})
	if err != nil {
		f.r.history.Note("%s does not scrub: %v", name, err)
	}
}
