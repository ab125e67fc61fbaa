package sim

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// floor is the least that an answer may be: a version, with what is known of the
// record that has it.
type floor struct {
	version client.Version
	// tombstone is set when the record is one, expires, in milliseconds, when it is a
	// value that does.
	tombstone bool
	expires   int64
	by        *Op
}

// raise returns the greater of two floors.
func (f floor) raise(o floor) floor {
	if o.version.Compare(f.version) > 0 {
		return o
	}
	return f
}

// dead reports whether the record is a tombstone or has expired at a time.
func (f floor) dead(atMillis int64) bool {
	return f.tombstone || f.expires != 0 && atMillis >= f.expires
}

// floors are those of one key for one operation.
type floors struct {
	// strong and read hold for strong reads, read only where stale replicas are mended
	// before the answer; copied holds for the replica's own copy.
	strong, read, copied floor
	// met holds for reads that are not eventual while no replica is replaced.
	met floor
	// acked holds for reports: a majority had acknowledged it, and so as many as default
	// writes need where reports are checked.
	acked floor
}

// register is what the checker knows of one key. Because versions order all writes,
// a read is right if it gives no less than what was acknowledged or read before it
// began, and nothing that was not written: a maximum register, which is decided
// operation by operation.
type register struct {
	// strong is the greatest write that a majority acknowledged, read the greatest
	// record that a strong read returned and made sure of.
	strong, read floor
	// met is the greatest write whose receipt says that default reads meet it.
	met floor
	// acked[w] is the greatest write that was acknowledged by at least w slots, full
	// that which all had acknowledged.
	acked  [6]floor
	full   floor
	copied map[uint64]floor
	writes []*Op
}

// own is what one client knows of one key: its writes by the slots they needed, and
// its reads.
type own struct {
	acked [6]floor
	read  floor
}

// Checker judges operations as they return. It is safe for concurrent use.
//
// It checks invariants 2, 3, 5, 10, 14, 17 and 18 at every operation, and 1 at
// the final reads.
type Checker struct {
	h *History
	// Slack is how far the clocks that judge expiry may be off.
	Slack time.Duration
	mu    struct {
		sync.Mutex
		registers map[Place]*register
		own       map[string]map[Place]*own
		byValue   map[string]*Op
		byVersion map[client.Version]*Op
		issued    map[uint64][]issued
		latest    map[string]client.Version
		lost      time.Time            // when a replica last lost its disk
		replaced  bool                 // a node was taken for dead, and its slots given away
		rotten    map[uint64]bool      // replicas that may lack what bit rot took
		mended    map[uint64]time.Time // when they had got it back
		epochs    map[uint64]uint64    // that nodes were seen to serve by
		// moves are the copies that may have begun anew.
		moves    map[copyAt]bool
		topology *topology.Topology
	}
}

// issued is the greatest version of an incarnation that was known at a time.
type issued struct {
	at      time.Time
	version client.Version
}

// NewChecker returns a checker that reports to a history.
func NewChecker(h *History, slack time.Duration) *Checker {
	c := &Checker{h: h, Slack: slack}
	c.mu.registers = map[Place]*register{}
	c.mu.own = map[string]map[Place]*own{}
	c.mu.byValue = map[string]*Op{}
	c.mu.byVersion = map[client.Version]*Op{}
	c.mu.issued = map[uint64][]issued{}
	c.mu.latest = map[string]client.Version{}
	c.mu.epochs = map[uint64]uint64{}
	c.mu.moves = map[copyAt]bool{}
	c.mu.rotten = map[uint64]bool{}
	c.mu.mended = map[uint64]time.Time{}
	return c
}

// DiskLost tells that a replica lost its disk: what one replica alone had
// acknowledged, or acknowledges to an operation under way, may be gone from now on.
func (c *Checker) DiskLost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.lost = time.Now()
	for _, r := range c.mu.registers {
		r.acked[1] = r.acked[2]
	}
	for _, places := range c.mu.own {
		for _, o := range places {
			o.acked[1] = o.acked[2]
		}
	}
}

// Rotten tells that bits flipped on the disk of a replica, which goes on: until Mended,
// what its own copy shows may go back where records were taken.
func (c *Checker) Rotten(incarnation uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.rotten[incarnation] = true
	for _, r := range c.mu.registers {
		delete(r.copied, incarnation)
	}
}

// Mended tells that a replica has got back what bit rot took.
func (c *Checker) Mended(incarnation uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mu.rotten, incarnation)
	c.mu.mended[incarnation] = time.Now()
}

// REQUIRES: c.mu is held.
func (c *Checker) register(p Place) *register {
	r := c.mu.registers[p]
	if r == nil {
		r = &register{copied: map[uint64]floor{}}
		c.mu.registers[p] = r
	}
	return r
}

// REQUIRES: c.mu is held.
func (c *Checker) ownOf(client string, p Place) *own {
	m := c.mu.own[client]
	if m == nil {
		m = map[Place]*own{}
		c.mu.own[client] = m
	}
	if m[p] == nil {
		m[p] = &own{}
	}
	return m[p]
}

// Invoke notes the beginning of an operation.
func (c *Checker) Invoke(op *Op) {
	op.Invoked, op.Outcome = time.Now(), Pending
	c.h.add(op)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch op.Kind {
	case OpScan, OpReport:
		op.scan = map[Place]floors{}
		for p, r := range c.mu.registers {
			if p.Namespace == op.Namespace {
				op.scan[p] = floors{strong: r.strong.raise(r.read), met: r.met, acked: r.strong}
			}
		}
	case OpPut, OpDelete:
		r := c.register(op.Place)
		r.writes = append(r.writes, op)
		op.refusing = c.refusing(op.Place)
		if op.Kind == OpPut {
			c.mu.byValue[op.Value] = op
		}
	default:
		r := c.register(op.Place)
		op.floors = floors{strong: r.strong, read: r.read, copied: r.copied[op.Replica], met: r.met}
	}
}

// Return judges an operation that has returned; tell fills in outcome, receipt and
// what was found.
func (c *Checker) Return(op *Op, tell func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	tell()
	op.Returned = time.Now()
	switch op.Kind {
	case OpPut, OpDelete:
		c.wrote(op)
	case OpGet:
		if op.Outcome == OK || op.Outcome == NotFound {
			c.read(op)
		}
	case OpCopy:
		if op.Outcome == OK || op.Outcome == NotFound {
			c.copied(op)
		}
	}
}

// wrote judges a write.
func (c *Checker) wrote(op *Op) {
	if op.Outcome == Failed && !op.seen.IsZero() {
		c.h.violate(17, "a write that was said to have failed was seen before as %s: %s", op.seen, op)
	}
	if op.Outcome != OK {
		return
	}
	v := op.Receipt.Version
	if !op.seen.IsZero() && op.seen != v && !op.Retried {
		c.h.violate(17, "a write was seen as %s and acknowledged as another version: %s", op.seen, op)
	}
	if !op.Retried {
		op.seen = v
	}
	if other := c.mu.byVersion[v]; other != nil && other != op {
		c.h.violate(10, "two writes have one version: %s and %s", op, other)
	}
	c.mu.byVersion[v] = op
	c.inOrder(op)
	c.inEpoch(op)
	f := floor{version: v, tombstone: op.Kind == OpDelete, expires: expiresAt(op, v), by: op}
	r, o := c.register(op.Place), c.ownOf(op.Client, op.Place)
	least := 1
	if !op.Invoked.After(c.mu.lost) {
		least = 2
	}
	for w := least; w <= op.Receipt.Needed && w < len(r.acked); w++ {
		r.acked[w] = r.acked[w].raise(f)
		o.acked[w] = o.acked[w].raise(f)
	}
	if max(op.Receipt.Needed, op.Receipt.Acknowledged) >= op.Receipt.N {
		r.full = r.full.raise(f)
	}
	if op.Receipt.Needed > op.Receipt.N/2 {
		r.strong = r.strong.raise(f)
	}
	if s := op.Receipt.Strength; s == client.Strong || s == client.StrongWhileNotReplaced { // batches do not say
		r.met = r.met.raise(f)
	}
}

// expiresAt is when a write's value expires, or 0.
func expiresAt(op *Op, v client.Version) int64 {
	if op.Kind != OpPut || op.TTL == 0 {
		return 0
	}
	return millis(v) + op.TTL.Milliseconds()
}

func millis(v client.Version) int64 { return int64(v.Timestamp >> 16) }

// inOrder checks that versions of one incarnation, and of one client with its
// token, increase in the order of issue.
func (c *Checker) inOrder(op *Op) {
	v := op.Receipt.Version
	list := c.mu.issued[v.Incarnation]
	i, _ := slices.BinarySearchFunc(list, op.Invoked, func(e issued, t time.Time) int {
		return cmp.Or(e.at.Compare(t), -1) // those at the same time began before
	})
	if i > 0 && list[i-1].at.Before(op.Invoked) && v.Compare(list[i-1].version) <= 0 {
		c.h.violate(10, "incarnation %d had issued %s before this write began: %s", v.Incarnation, list[i-1].version, op)
	}
	if n := len(list); n == 0 || v.Compare(list[n-1].version) > 0 {
		c.mu.issued[v.Incarnation] = append(list, issued{op.Returned, v})
	}
	if last := c.mu.latest[op.Client]; op.Note != batchNote && v.Timestamp <= last.Timestamp {
		c.h.violate(3, "the client had seen %s before this write: %s", last, op)
	}
	if v.Timestamp > c.mu.latest[op.Client].Timestamp {
		c.mu.latest[op.Client] = v
	}
}

// refusing returns which nodes serve a key's namespace and vnode by a topology in
// which these have changed, and the epoch of the change.
func (c *Checker) refusing(p Place) (out refusing) {
	t := c.mu.topology
	if t == nil || t.Namespace(p.Namespace) == nil {
		return out
	}
	ns, v := t.Namespace(p.Namespace), t.VnodeOf([]byte(p.Key))
	out.changed = max(ns.ChangedEpoch, t.Ring[v].ChangedEpoch)
	for i, s := range t.Slots(v, ns.N) { // while N changes, at most those refuse that count for reads
		n := s.Write[0]
		if slot := t.Ring[v].Slots[i]; slot.Phase == topology.WriteNewReadNone {
			n = slot.Node // which may only be taken for dead
		}
		if c.mu.epochs[n] >= out.changed {
			out.slots++
		}
	}
	return out
}

// refusing is how many slots would refuse a write of an epoch before changed.
type refusing struct {
	changed uint64
	slots   int
}

// inEpoch checks invariant 7: nodes that know of a change take no write of before it.
func (c *Checker) inEpoch(op *Op) {
	r := op.Receipt
	if r.Epoch != 0 && r.Epoch < op.refusing.changed && r.Needed > r.N-op.refusing.slots {
		c.h.violate(7, "%s: before it began %d slots knew of the change in epoch %d", op, op.refusing.slots, op.refusing.changed)
	}
}

// copyAt is a node's copy of a vnode.
type copyAt struct {
	incarnation uint64
	vnode       uint32
}

// Moves notes that a node may get a vnode that it had before: its copy begins anew then,
// and what it was says nothing about what it is.
func (c *Checker) Moves(to uint64, vnode uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.moves[copyAt{to, vnode}] = true
}

// moved reports whether a node may have got a vnode that it had before.
func (c *Checker) moved(to uint64, vnode uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.moves[copyAt{to, vnode}]
}

// Replaced tells that a node was taken for dead: it may answer itself while it is cut off.
func (c *Checker) Replaced() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.replaced = true
}

// Serves notes by which epoch a node serves, and the newest topology.
func (c *Checker) Serves(incarnation, epoch uint64, newest *topology.Topology) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.epochs[incarnation] = max(c.mu.epochs[incarnation], epoch)
	c.mu.topology = newest
}

// batchNote marks the writes of one batch, which have no order among themselves.
const batchNote = "in a batch"

// read judges a quorum read.
func (c *Checker) read(op *Op) {
	got := c.found(op, op.Outcome == OK, op.Receipt.Version, op.Found, op.ExpiresAt)
	r, o := c.register(op.Place), c.ownOf(op.Client, op.Place)
	if op.Receipt.Strength == client.Strong {
		c.atLeast(2, op, op.floors.strong, "acknowledged before")
		if !op.Unmended {
			c.atLeast(2, op, op.floors.read, "read before")
			r.read = r.read.raise(got)
		}
	}
	if op.Receipt.Strength != client.Eventual && c.mu.lost.IsZero() && !c.mu.replaced {
		c.atLeast(2, op, op.floors.met, "acknowledged before")
	}
	overlap := op.Receipt.Needed > 1 && op.Receipt.Strength != client.Eventual && !op.Unmended
	if overlap && (op.Receipt.Strength == client.Strong || c.mu.lost.IsZero()) {
		c.atLeast(3, op, o.read, "read by this client before")
		if w := op.Receipt.N - op.Receipt.Needed + 1; w < len(o.acked) {
			c.atLeast(3, op, o.acked[w], "written by this client before")
		}
		o.read = o.read.raise(got)
	}
	if v := op.Receipt.Version; v.Compare(op.Least) < 0 && !(v.IsZero() && c.vanished(op.Place, floor{version: op.Least}, op.Returned)) {
		c.h.violate(3, "a read that asked for at least %s: %s", op.Least, op)
	}
	if ts := op.Receipt.Version; ts.Timestamp > c.mu.latest[op.Client].Timestamp {
		c.mu.latest[op.Client] = ts
	}
	if op.Client == finalClient {
		c.atLeast(1, op, r.acked[1], "acknowledged before")
	}
}

// copied judges a read of one replica's own copy.
func (c *Checker) copied(op *Op) {
	got := c.found(op, op.Outcome == OK, op.Receipt.Version, op.Found, op.ExpiresAt)
	if c.mu.rotten[op.Replica] || op.Invoked.Before(c.mu.mended[op.Replica]) {
		return
	}
	if c.mu.topology != nil && c.mu.moves[copyAt{op.Replica, c.mu.topology.VnodeOf([]byte(op.Key))}] {
		return
	}
	c.atLeast(18, op, op.floors.copied, "in this replica before")
	r := c.register(op.Place)
	r.copied[op.Replica] = r.copied[op.Replica].raise(got)
}

// atLeast checks that a read gives no less than a floor. Nothing is as good as a
// dead record that may have been collected.
func (c *Checker) atLeast(invariant int, op *Op, f floor, why string) {
	v := op.Receipt.Version
	if v.Compare(f.version) >= 0 || v.IsZero() && c.vanished(op.Place, f, op.Returned) {
		return
	}
	if invariant != 18 && op.Outcome == OK && f.dead(op.Invoked.Add(-c.Slack).UnixMilli()) {
		invariant = 5 // it came back
	}
	c.h.violate(invariant, "%s gives less than version %s, which was %s: by %s", op, f.version, why, f.by)
}

// collectAfter is how long a dead record stays at least: a certificate is 30 s behind
// the clocks, and removal begins 15 s after it.
const collectAfter = 30 * time.Second

// collectable reports whether a record may have been removed from disk at a time.
func (c *Checker) collectable(f floor, at time.Time) bool {
	if f.version.IsZero() {
		return true
	}
	now := at.Add(c.Slack).UnixMilli()
	return f.dead(now) && now-max(millis(f.version), f.expires) >= collectAfter.Milliseconds()
}

// vanished reports whether a key that had a record may have none at a time: it may
// have been removed, or have been replaced by a dead one that was.
// REQUIRES: c.mu is held.
func (c *Checker) vanished(p Place, f floor, at time.Time) bool {
	if c.collectable(f, at) {
		return true
	}
	now := at.Add(c.Slack).UnixMilli()
	for _, w := range c.register(p).writes {
		if w.Outcome == Failed || w.Kind == OpPut && w.TTL == 0 {
			continue
		}
		v := w.Receipt.Version
		if v.IsZero() {
			v = w.seen
		}
		died := millis(v) // or expired
		switch {
		case !v.IsZero() && v.Compare(f.version) < 0:
			continue
		case v.IsZero(): // it got its version while it was under way, if it did
			if !w.Returned.IsZero() && w.Returned.Add(c.Slack+opTimeout).UnixMilli() < millis(f.version) {
				continue
			}
			died = w.Invoked.UnixMilli()
		}
		if w.Kind == OpPut {
			died += w.TTL.Milliseconds()
		}
		if now-died >= collectAfter.Milliseconds() {
			return true
		}
	}
	return false
}

// found judges what a read says of a key's record: that it was written there, by an
// operation that may have happened, and is served neither after its expiry nor
// withheld before.
func (c *Checker) found(op *Op, found bool, v client.Version, value string, expires time.Time) floor {
	got := floor{version: v, tombstone: !found, by: op}
	if !found {
		if w := c.mu.byVersion[v]; w != nil && w.Kind == OpPut {
			if e := expiresAt(w, v); e == 0 || op.Returned.Add(c.Slack).UnixMilli() < e {
				c.h.violate(2, "%s finds nothing, but its version is that of %s", op, w)
			} else {
				got.tombstone, got.expires = false, e
			}
		}
		return got
	}
	w := c.mu.byValue[value]
	switch {
	case w == nil:
		c.h.violate(17, "%s: nobody wrote that", op)
		return got
	case op.Kind != OpScan && op.Kind != OpReport && w.Place != op.Place, w.Namespace != op.Namespace:
		c.h.violate(17, "%s: that was written to another key, by %s", op, w)
	case w.Outcome == Failed:
		c.h.violate(17, "%s: that write was said to have failed: %s", op, w)
	case w.seen.IsZero():
		if !w.Retried {
			w.seen = v
		}
	case w.seen != v:
		c.h.violate(17, "%s: the write was known as version %s: %s", op, w.seen, w)
	}
	if other := c.mu.byVersion[v]; other != nil && other != w {
		c.h.violate(10, "%s: two writes have the version, %s and %s", op, w, other)
	}
	c.mu.byVersion[v] = w
	if e := expiresAt(w, v); e != 0 || !expires.IsZero() {
		got.expires = e
		if expires.IsZero() || expires.UnixMilli() != e {
			c.h.violate(17, "%s: expires at %s, written to expire at %d", op, expires, e)
		}
		if op.Invoked.Add(-c.Slack).UnixMilli() >= e {
			c.h.violate(5, "%s: it had expired %d ms before the read began", op, op.Invoked.UnixMilli()-e)
		}
	}
	return got
}

// Scanned judges a scan that ended without an error, given its records. Each key is
// as one quorum read within it: by a strong R, or one that meets default writes while no
// replica is replaced. The latter may miss what a strong read has made sure of.
func (c *Checker) Scanned(op *Op, records []client.Record, strength client.Strength, inRange func(key string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	strong := strength == client.Strong
	least := func(f floors) (_ floor, why string) {
		switch {
		case strong:
			return f.strong, "acknowledged or read before"
		case strength == client.StrongWhileNotReplaced && c.mu.lost.IsZero() && !c.mu.replaced:
			return f.met, "acknowledged before"
		}
		return floor{}, ""
	}
	for p, got := range c.listed(2, op, records, least, inRange) {
		if strong {
			got.by = op
			r := c.register(p)
			r.read = r.read.raise(got)
		}
	}
}

// Reported judges a report by copies in sync, of all that has the prefix (invariant 13).
func (c *Checker) Reported(op *Op, records []client.Record, inRange func(key string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listed(13, op, records, func(f floors) (floor, string) { return f.acked, "acknowledged before the report began" }, inRange)
}

// listed judges the records that were read of a range, each of which must be no less than
// least says, and none be missing by that. It returns what was found.
// REQUIRES: c.mu is held.
func (c *Checker) listed(invariant int, op *Op, records []client.Record, least func(floors) (_ floor, why string), inRange func(key string) bool) map[Place]floor {
	op.Outcome, op.Returned = OK, time.Now()
	found := map[Place]floor{}
	for _, rec := range records {
		p := Place{op.Namespace, string(rec.Key)}
		if _, twice := found[p]; twice || !inRange(p.Key) {
			c.h.violate(17, "%s gives key %s, which is twice there or not in its range", op, p)
		}
		one := *op
		one.Place, one.Outcome, one.Found, one.ExpiresAt = p, OK, string(rec.Value), rec.ExpiresAt
		one.Receipt.Version = rec.Version
		found[p] = c.found(&one, true, rec.Version, one.Found, rec.ExpiresAt)
		if w := c.mu.byValue[one.Found]; w != nil && w.Place != p {
			c.h.violate(17, "%s gives key %s the value of %s", op, p, w)
		}
		f, why := least(op.scan[p])
		c.atLeast(invariant, &one, f, why)
	}
	for p, fs := range op.scan {
		_, there := found[p]
		if f, _ := least(fs); !there && inRange(p.Key) && !f.version.IsZero() && !c.mayBeMissing(op, p, f) {
			c.h.violate(invariant, "%s misses key %s, which had version %s: by %s", op, p, f.version, f.by)
		}
	}
	return found
}

// mayBeMissing reports whether a scan may find no record of a key whose floor is f.
func (c *Checker) mayBeMissing(op *Op, p Place, f floor) bool {
	now := op.Returned.Add(c.Slack).UnixMilli()
	if f.dead(now) {
		return true
	}
	for _, w := range c.register(p).writes {
		if w.Kind == OpPut && w.TTL == 0 || w.Outcome == Failed {
			continue
		}
		if w.seen.IsZero() || w.seen.Compare(f.version) > 0 && (w.Kind == OpDelete || expiresAt(w, w.seen) <= now) {
			return true
		}
	}
	return false
}

// Places returns all keys that were written or read, in order.
func (c *Checker) Places() []Place {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Place
	for p := range c.mu.registers {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Place) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Key, b.Key))
	})
	return out
}
