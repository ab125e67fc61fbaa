package handoff

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// JoinerConfig holds what a joiner is made of. All fields are required.
type JoinerConfig struct {
	Filler *Filler
	// Leased reports whether a copy that is in sync may say so at present.
	Leased func(t *topology.Topology, c topology.Copy) bool
	// Clock returns the time since some moment, by a clock that is never set.
	Clock func() time.Duration
}

// behindInterval is the pause between two comparisons of a copy that no write waits for.
const behindInterval = 10 * time.Second

// Joiner has a reporting node's copies hold all that was acknowledged before writes waited
// for them: it compares each with enough of the vnode's slots that every write has left a
// record on one.
//
// By models of the barrier (package topology, copySteps): once the slots it compares with
// have ended what began in an epoch in which nobody waited for the copy, a write that did not
// wait can no longer be acknowledged by enough of them; and what was acknowledged before is
// on one of them.
type Joiner struct {
	cfg JoinerConfig
	mu  struct {
		sync.Mutex
		copies map[storage.Place]*copyProgress
	}
}

// copyProgress is how far a copy has come.
type copyProgress struct {
	since    uint64 // topology.Copy.Since
	joined   bool
	waitsFor string
	// completeAt is when all that was acknowledged by then was in it; complete: there is such
	// a time.
	completeAt time.Duration
	complete   bool
	compared   time.Time
}

// NewJoiner returns a joiner. Run does the work.
func NewJoiner(cfg JoinerConfig) *Joiner {
	j := &Joiner{cfg: cfg}
	j.mu.copies = map[storage.Place]*copyProgress{}
	return j
}

// Run joins what there is to join until ctx ends.
func (j *Joiner) Run(ctx context.Context) error {
	f := j.cfg.Filler
	tick := time.NewTicker(f.cfg.Interval)
	defer tick.Stop()
	for {
		changed := f.cfg.Changed()
		t := f.cfg.Fence.Topology()
		if jobs := j.jobs(t); len(jobs) > 0 {
			f.askDrained(ctx, t, jobs)
			each(jobs, func(jb job) { j.compare(ctx, t, jb) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// jobs returns the copies that are to be compared, those that writes wait for first, and
// notes of those that are in sync until when they were.
func (j *Joiner) jobs(t *topology.Topology) (jobs []job) {
	self, now := j.cfg.Filler.cfg.Self, j.cfg.Clock()
	var later []job
	j.mu.Lock()
	defer j.mu.Unlock()
	has := map[storage.Place]bool{}
	for v := range t.Ring {
		for _, c := range t.Ring[v].Copies {
			if c.Node != self {
				continue
			}
			place := storage.Place{Namespace: c.Namespace, Vnode: uint32(v)}
			has[place] = true
			p := j.mu.copies[place]
			if p == nil {
				p = &copyProgress{}
				j.mu.copies[place] = p
			}
			if p.since != c.Since {
				p.since, p.joined, p.waitsFor, p.compared = c.Since, false, "", time.Time{}
			}
			jb := job{assignment{Vnode: uint32(v), Namespace: c.Namespace, Epoch: c.Since}, -1, false}
			switch {
			case c.State == topology.Filling:
				p.complete = false
			case c.State == topology.InSync && j.cfg.Leased(t, c):
				p.completeAt, p.complete = now, true
			case c.State == topology.Joining && !p.joined:
				jobs = append(jobs, jb)
			case c.State == topology.Behind && time.Since(p.compared) >= behindInterval:
				later = append(later, jb)
			}
		}
	}
	maps.DeleteFunc(j.mu.copies, func(p storage.Place, _ *copyProgress) bool { return !has[p] })
	return append(jobs, later...)
}

// compare makes a copy complete, and notes when it was.
func (j *Joiner) compare(ctx context.Context, t *topology.Topology, jb job) {
	if j.cfg.Filler.cfg.Fence.Topology() != t {
		return // it may be another job now
	}
	began := j.cfg.Clock()
	err := j.converge(ctx, t, jb)
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.mu.copies[jb.place()]
	if p == nil || p.since != jb.Epoch {
		return
	}
	p.compared, p.waitsFor = time.Now(), ""
	if err != nil {
		p.waitsFor = err.Error()
		return
	}
	p.joined, p.completeAt, p.complete = true, max(p.completeAt, began), true
}

// converge compares a copy with all slots that can be, and at least as many as meet every
// write.
func (j *Joiner) converge(ctx context.Context, t *topology.Topology, jb job) error {
	f, ns := j.cfg.Filler, t.NamespaceByID(jb.Namespace)
	epoch := max(t.Ring[jb.Vnode].ChangedEpoch, ns.ChangedEpoch)
	met, left, lost := 0, 0, false
	var missing []string
	for i, s := range t.Slots(jb.Vnode, ns.N) {
		lost = lost || t.Lost(t.Ring[jb.Vnode].Slots[i].Node) || t.Lost(s.Read)
		if s.Read == 0 || t.Lost(s.Read) {
			continue
		}
		left++
		err := f.answers(t, s.Read, epoch)
		if err == nil && !mutant.On("join-unchecked") {
			err = f.cfg.Verify(ctx, t, jb.place(), s.Read)
		}
		if err != nil {
			missing = append(missing, err.Error())
			continue
		}
		met++
	}
	need := ns.N - ns.LeastWrites() + 1
	if lost { // what those that were given up had is lost: the others are all there is
		need = min(need, left)
	}
	if met < need {
		return fmt.Errorf("%d of the voting replicas of vnode %d could be compared with, namespace %s needs %d: %s", met, jb.Vnode, ns.Name, need, strings.Join(missing, ", "))
	}
	return nil
}

// answers returns why a slot's node cannot be asked for what it holds since an epoch, or nil.
func (f *Filler) answers(t *topology.Topology, n, epoch uint64) error {
	switch name := t.NodeName(n); {
	case !f.cfg.Peers.Alive(n):
		return errors.New(name + " is down")
	case f.drained(n) < epoch:
		return fmt.Errorf("%s has not taken in epoch %s yet", name, topology.EpochString(epoch))
	}
	return nil
}

// CopyProgress is how far a reporting node's copy of a vnode is.
type CopyProgress struct {
	storage.Place
	// Since is topology.Copy.Since.
	Since  uint64
	Joined bool
	// Behind is how long ago all that was acknowledged by then was in it. Known: there is such
	// a time.
	Behind   time.Duration
	Known    bool
	WaitsFor string
}

// Progress returns how far all copies are, in order of namespace and vnode.
func (j *Joiner) Progress() []CopyProgress {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.cfg.Clock()
	out := make([]CopyProgress, 0, len(j.mu.copies))
	for place, p := range j.mu.copies {
		out = append(out, CopyProgress{place, p.since, p.joined, now - p.completeAt, p.complete, p.waitsFor})
	}
	slices.SortFunc(out, func(a, b CopyProgress) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Vnode, b.Vnode))
	})
	return out
}
