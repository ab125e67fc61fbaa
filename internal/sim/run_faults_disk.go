package sim

import (
	"math/rand/v2"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
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

// lostDisk takes the disk of a node or the end of its log away, and waits until its
// successor votes: only one may be lost at a time.
func (f *faults) lostDisk(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	t := f.r.topologies.latest()
	if t == nil || t.Resolve(name) == nil {
		return
	}
	old := t.Resolve(name).Incarnation
	f.end(name, Kill)
	if rng.IntN(2) == 0 {
		f.note("wiped disk", "%s", name)
		f.r.checker.DiskLost()
		f.r.w.Wipe(name)
	} else {
		how, err := f.r.w.LoseTail(name, rng)
		f.note("lost tail", "%s: %s %v", name, how, err)
		f.r.checker.DiskLost()
		// What was lost within a moment of its sync goes unnoticed, and more than a lost
		// disk is promised nobody.
		if left, err := readRemains(f.r.w.process(name).disk, t); err == nil && left.lostTail == "" {
			f.note("wiped disk", "%s, as too little of its log is lost", name)
			f.r.w.Wipe(name)
		}
	}
	pause(rng, 5)
	f.start(name)
	for time.Now().Before(f.until) {
		time.Sleep(time.Second)
		t := f.r.topologies.latest()
		if n := t.Resolve(name); t.Node(old) == nil && n != nil && !incoming(t, n.Incarnation) {
			f.r.history.Note("the successor of %s votes", name)
			return
		}
	}
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

// flipBit flips a bit on a node's disk.
func (f *faults) flipBit(rng *rand.Rand) {
	name := f.claim(rng)
	if name == "" {
		return
	}
	defer f.release(name)
	if where, err := f.r.w.FlipBit(name, rng); err == nil {
		f.note("flipped bit", "%s: %s", name, where)
	}
}
