package gossip

import (
	"bytes"
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// A dead member is remembered for an hour, and at most so many of them.
const (
	rememberDead = time.Hour
	maxDead      = 1024
)

// Member is a process of the cluster.
type Member struct {
	Name string
	// Address is the host:port of its gossip.
	Address string
	// Meta is the zero value when it cannot be read: a later release wrote it.
	Meta Meta
	// Alive is false once the member left or was declared dead. One that is merely
	// suspected is alive.
	Alive bool
	// Since is when Alive took its value, by this process's clock.
	Since time.Time
}

// table is what is known of the members. The library reports to it while it holds
// its own lock, so the table neither calls anybody nor waits.
type table struct {
	changed chan struct{}
	mu      struct {
		sync.Mutex
		members map[string]Member
		// run is which run of the library is reported by.
		run int
		// meta is what this process says of itself, encoded.
		meta []byte
	}
}

func newTable(meta Meta) *table {
	t := &table{changed: make(chan struct{}, 1)}
	t.mu.members = map[string]Member{}
	t.mu.meta = meta.encode()
	return t
}

// setMeta reports whether that is anything new.
func (t *table) setMeta(m Meta) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := m.encode()
	changed := !bytes.Equal(now, t.mu.meta)
	t.mu.meta = now
	return changed
}

// anew forgets the members, and listens to the next run of the library only: timers of
// the last one may report for some seconds.
func (t *table) anew() *reporter {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.mu.members)
	t.mu.run++
	return &reporter{t, t.mu.run}
}

// reporter is told of members by one run of the library.
type reporter struct {
	table *table
	run   int
}

func (r *reporter) report(n *memberlist.Node, alive bool) {
	t := r.table
	m := Member{Name: n.Name, Address: n.Address(), Alive: alive, Since: time.Now()}
	m.Meta, _ = decodeMeta(n.Meta)
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.run != t.mu.run {
		return
	}
	if old, ok := t.mu.members[m.Name]; ok && old.Alive == alive {
		m.Since = old.Since
	}
	t.mu.members[m.Name] = m
	if !alive {
		t.forget(m.Since)
	}
	signal(t.changed)
}

// forget drops the members that are dead for too long, or too many.
//
// REQUIRES: t.mu is held.
func (t *table) forget(now time.Time) {
	var dead []Member
	for name, m := range t.mu.members {
		switch {
		case m.Alive:
		case now.Sub(m.Since) > rememberDead:
			delete(t.mu.members, name)
		default:
			dead = append(dead, m)
		}
	}
	if len(dead) > maxDead {
		slices.SortFunc(dead, func(a, b Member) int { return a.Since.Compare(b.Since) })
		for _, m := range dead[:len(dead)-maxDead] {
			delete(t.mu.members, m.Name)
		}
	}
}

func (t *table) list() []Member {
	t.mu.Lock()
	t.forget(time.Now())
	out := make([]Member, 0, len(t.mu.members))
	for _, m := range t.mu.members {
		out = append(out, m)
	}
	t.mu.Unlock()
	slices.SortFunc(out, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (t *table) get(name string) (Member, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m, ok := t.mu.members[name]
	return m, ok && (m.Alive || time.Since(m.Since) <= rememberDead)
}

// NotifyJoin implements memberlist.EventDelegate.
func (r *reporter) NotifyJoin(n *memberlist.Node) { r.report(n, true) }

// NotifyUpdate implements memberlist.EventDelegate.
func (r *reporter) NotifyUpdate(n *memberlist.Node) { r.report(n, true) }

// NotifyLeave implements memberlist.EventDelegate.
func (r *reporter) NotifyLeave(n *memberlist.Node) { r.report(n, false) }

// NodeMeta implements memberlist.Delegate.
func (t *table) NodeMeta(int) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.meta
}

// NotifyMsg implements memberlist.Delegate.
func (t *table) NotifyMsg([]byte) {}

// GetBroadcasts implements memberlist.Delegate.
func (t *table) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState implements memberlist.Delegate.
func (t *table) LocalState(bool) []byte { return nil }

// MergeRemoteState implements memberlist.Delegate.
func (t *table) MergeRemoteState([]byte, bool) {}

// Members returns the members by name: this process, those that are alive, and
// those that died within the last hour.
func (g *Gossip) Members() []Member { return g.table.list() }

// Member returns what is known of a member; ok is false when nothing is.
func (g *Gossip) Member(name string) (m Member, ok bool) { return g.table.get(name) }

// Alive tells whether a member is alive, and whether it is known at all.
func (g *Gossip) Alive(name string) (alive, known bool) {
	m, known := g.table.get(name)
	return known && m.Alive, known
}

// Changed returns a channel with a token in it after every change of what Members
// returns, the mere forgetting of the dead excepted. Several changes may leave one
// token. There is one channel, for one reader; it is never closed.
func (g *Gossip) Changed() <-chan struct{} { return g.table.changed }
