package storage

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// Hash trees tell whether two replicas of a vnode hold the same records, and where
// they differ, at a cost that follows what has changed since they were last asked.
//
// A tree's shape is decided by its keys alone, so equal records give equal trees
// (content-defined chunking, as in Noms' prolly trees): a key whose hash ends in
// leafBits zeros begins a leaf, one with branchBits more begins a branch. A leaf's
// hash is over its records, a branch's and the root's over the hashes below.
//
// Invariant: a leaf that is not dirty has the hash of its records that were visible
// when Apply last returned. Apply makes a leaf dirty after its records are visible,
// so a scan that missed them leaves the leaf dirty. Whoever asks gets every leaf as it
// was at some moment since he asked: under a stream of writes there is none at which
// all are clean.

const (
	leafBits   = 7 // 128 records a leaf
	branchBits = 6 // 64 leaves a branch
	// maxTouched bounds the keys that are remembered while leaves are being read; past
	// it all of those are dirty afterwards.
	maxTouched = 1024
)

// The levels of a tree.
const (
	Leaves = iota
	Branches
	Root
)

// TreeHash is half a SHA-256: equal hashes mean equal records.
type TreeHash [16]byte

// TreeNode stands for the records from Start to the start of the next node.
type TreeNode struct {
	Start   []byte
	Hash    TreeHash
	Records uint64
}

// DeadAt returns from which certificate on a record may be removed: a tombstone's
// version, or for a value that expires the later of version and expiry. It reports
// false for values that last.
func DeadAt(r record.Record) (hlc.Timestamp, bool) {
	switch {
	case r.Kind == record.Tombstone:
		return r.Version.Time, true
	case r.ExpiresAt != 0:
		return max(r.Version.Time, hlc.At(r.ExpiresAt)), true
	}
	return 0, false
}

type vnodeID struct{ namespace, vnode uint32 }

// leaf is what is known of the records from start to the start of the next leaf.
type leaf struct {
	start string
	dirty bool
	hash  TreeHash
	// records are those in the hash, bytes their keys and values; gone are those left out
	// for the certificate.
	records, gone uint32
	bytes         uint64
	// dead counts the records in the hash that may be removed one day, oldestDead is
	// when the first of them may.
	dead       uint32
	oldestDead hlc.Timestamp
}

// tree is the hash tree of a vnode's records in one namespace.
type tree struct {
	id vnodeID
	// refreshing holds a token while somebody reads dirty leaves, or what he has made
	// of them. Only he changes the starts of leaves.
	refreshing chan struct{}
	used       atomic.Int64 // by the clock of trees
	mu         struct {
		sync.Mutex
		// leaves is in order of start and never empty; the first starts at "".
		leaves      []leaf
		certificate hlc.Timestamp
		// touched are the first maxTouched keys written while leaves are being read.
		reading bool
		touched []string
		// dropped is set when it is no longer among the store's trees.
		dropped bool
	}
}

func newTree(id vnodeID) *tree {
	t := &tree{id: id, refreshing: make(chan struct{}, 1)}
	t.mu.leaves = []leaf{{dirty: true}}
	return t
}

// trees holds the hash trees of a store, at most so many leaves in all.
type trees struct {
	maxLeaves int64
	leaves    atomic.Int64
	clock     atomic.Int64
	read      atomic.Uint64 // bytes read to hash them
	mu        sync.RWMutex
	byVnode   map[vnodeID]*tree
}

func (ts *trees) of(id vnodeID) *tree {
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	return ts.byVnode[id]
}

// get returns a vnode's tree, making it when there is none.
func (ts *trees) get(id vnodeID) *tree {
	t := ts.of(id)
	if t == nil {
		ts.mu.Lock()
		if t = ts.byVnode[id]; t == nil {
			t = newTree(id)
			ts.byVnode[id] = t
			ts.leaves.Add(1)
		}
		ts.mu.Unlock()
	}
	t.used.Store(ts.clock.Add(1))
	return t
}

// touch notes that a key's record may have changed.
func (ts *trees) touch(id vnodeID, key []byte) {
	if t := ts.of(id); t != nil {
		k := string(key)
		t.mu.Lock()
		t.mu.leaves[t.find(k)].dirty = true
		if t.mu.reading && len(t.mu.touched) < maxTouched {
			t.mu.touched = append(t.mu.touched, k)
		}
		t.mu.Unlock()
	}
}

// find returns the leaf that a key belongs to.
// REQUIRES: t.mu is held.
func (t *tree) find(key string) int {
	return sort.Search(len(t.mu.leaves), func(i int) bool { return t.mu.leaves[i].start > key }) - 1
}

// forget drops the trees of some vnodes.
func (ts *trees) forget(matches func(vnodeID) bool) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for id, t := range ts.byVnode {
		if matches(id) {
			ts.drop(t)
		}
	}
}

// drop makes a tree be built anew when it is asked for next. Whoever has asked for
// the old one goes on with it: it knows of all that was written before he asked.
// REQUIRES: ts.mu is held.
func (ts *trees) drop(t *tree) {
	delete(ts.byVnode, t.id)
	t.mu.Lock()
	ts.leaves.Add(-int64(len(t.mu.leaves)))
	t.mu.dropped = true
	t.mu.Unlock()
}

// evict drops the trees that were not used for the longest time, but for one, until
// the rest is within bounds.
func (ts *trees) evict(keep *tree) {
	for ts.leaves.Load() > ts.maxLeaves {
		ts.mu.Lock()
		var oldest *tree
		for _, t := range ts.byVnode {
			if t != keep && (oldest == nil || t.used.Load() < oldest.used.Load()) {
				oldest = t
			}
		}
		if oldest != nil {
			ts.drop(oldest)
		}
		ts.mu.Unlock()
		if oldest == nil {
			return
		}
	}
}

// startsLeaf reports whether a key begins a leaf, and whether it begins a branch.
// All keys of a vnode share the high bits of this hash, so it is the low ones that
// count.
func startsLeaf(key []byte) (leaf, branch bool) {
	h := xxhash.Sum64(key)
	return h&(1<<leafBits-1) == 0, h&(1<<(leafBits+branchBits)-1) == 0
}

// Tree returns the nodes of a level of a vnode's hash tree that hold keys in [start,
// end), at most limit of them; next is where the rest begins, or nil. An empty end
// means no end. Records that certificate lets go are left out; it only grows, and
// the one that was counted by is returned. All records counted are on disk.
func (s *Store) Tree(ctx context.Context, namespace, vnode uint32, certificate hlc.Timestamp, level int, start, end []byte, limit int) (nodes []TreeNode, next []byte, by hlc.Timestamp, err error) {
	if level == Root {
		start, end = nil, nil
	}
	t, err := s.view(ctx, vnodeID{namespace, vnode}, certificate, start, end)
	if err != nil {
		return nil, nil, 0, err
	}
	defer t.release()
	by = t.mu.certificate
	b := nodeBuilder{level: level, limit: limit}
	for i := t.find(string(start)); i < len(t.mu.leaves); i++ {
		l := &t.mu.leaves[i]
		if len(end) > 0 && l.start >= string(end) {
			break
		}
		if !b.add(l) {
			return b.nodes, []byte(l.start), by, nil
		}
	}
	b.end()
	return b.nodes, nil, by, nil
}

// nodeBuilder makes nodes of a level from leaves.
type nodeBuilder struct {
	level, limit int
	nodes        []TreeNode
	open         []byte // what the last node's hash is over
}

// add takes the next leaf, unless it would begin a node too many.
func (b *nodeBuilder) add(l *leaf) bool {
	begins := len(b.nodes) == 0
	switch b.level {
	case Leaves:
		begins = true
	case Branches:
		_, branch := startsLeaf([]byte(l.start))
		begins = begins || l.start != "" && branch
	}
	if begins {
		b.end()
		if b.limit > 0 && len(b.nodes) == b.limit {
			return false
		}
		b.nodes = append(b.nodes, TreeNode{Start: []byte(l.start)})
	}
	n := &b.nodes[len(b.nodes)-1]
	n.Records += uint64(l.records)
	if l.records > 0 || b.level == Leaves {
		b.open = appendBytes(b.open, []byte(l.start))
		b.open = append(b.open, l.hash[:]...)
	}
	return true
}

func (b *nodeBuilder) end() {
	if len(b.nodes) > 0 && len(b.open) > 0 {
		sum := sha256.Sum256(b.open)
		b.nodes[len(b.nodes)-1].Hash = TreeHash(sum[:16])
		b.open = b.open[:0]
	}
}

func appendBytes(dst, b []byte) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(b))), b...)
}

// Dead says what of a vnode's records may be removed.
type Dead struct {
	// Records counts tombstones and values that expire, Oldest is when the first of
	// them may be removed; see DeadAt. Gone counts those that the certificate lets go
	// and that are still on disk.
	Records, Gone uint64
	Oldest        hlc.Timestamp
}

// Dead returns what of a vnode's records may be removed, by the certificate given
// or a greater one that was given before.
func (s *Store) Dead(ctx context.Context, namespace, vnode uint32, certificate hlc.Timestamp) (d Dead, err error) {
	t, err := s.view(ctx, vnodeID{namespace, vnode}, certificate, nil, nil)
	if err != nil {
		return d, err
	}
	defer t.release()
	for i := range t.mu.leaves {
		l := &t.mu.leaves[i]
		d.Records += uint64(l.dead)
		d.Gone += uint64(l.gone)
		if l.dead > 0 && (d.Oldest == 0 || l.oldestDead < d.Oldest) {
			d.Oldest = l.oldestDead
		}
	}
	return d, nil
}

// GoneRanges returns the stretches of keys in which a vnode has records that the
// certificate lets go, as pairs of start and end; an empty end means no end.
func (s *Store) GoneRanges(ctx context.Context, namespace, vnode uint32, certificate hlc.Timestamp) (ranges [][2][]byte, err error) {
	t, err := s.view(ctx, vnodeID{namespace, vnode}, certificate, nil, nil)
	if err != nil {
		return nil, err
	}
	defer t.release()
	for i := range t.mu.leaves {
		if t.mu.leaves[i].gone > 0 {
			ranges = append(ranges, [2][]byte{[]byte(t.mu.leaves[i].start), []byte(t.endOf(i))})
		}
	}
	return ranges, nil
}

// endOf returns where a leaf ends, "" for the last.
// REQUIRES: t.mu is held.
func (t *tree) endOf(i int) string {
	if i+1 < len(t.mu.leaves) {
		return t.mu.leaves[i+1].start
	}
	return ""
}

// TreeBytesRead returns how many bytes of records have been read for hash trees.
func (s *Store) TreeBytesRead() uint64 { return s.trees.read.Load() }

// view returns a vnode's tree after reading those leaves again that hold keys in
// [start, end) and were dirty. It counts by the certificate, or by a greater one. The
// caller holds the tree, and must release it.
func (s *Store) view(ctx context.Context, id vnodeID, certificate hlc.Timestamp, start, end []byte) (*tree, error) {
	t := s.trees.get(id)
	select {
	case t.refreshing <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	err := s.refresh(ctx, t, certificate, string(start), string(end))
	s.trees.evict(t)
	if err != nil {
		<-t.refreshing
		return nil, err
	}
	t.mu.Lock()
	return t, nil
}

// release ends a view.
func (t *tree) release() {
	t.mu.Unlock()
	<-t.refreshing
}

// refresh reads the dirty leaves that hold keys in [start, end), from the first to
// the last, each once.
// REQUIRES: the caller holds t's token.
func (s *Store) refresh(ctx context.Context, t *tree, certificate hlc.Timestamp, start, end string) error {
	t.mu.Lock()
	if certificate > t.mu.certificate {
		t.mu.certificate = certificate
		for i := range t.mu.leaves {
			l := &t.mu.leaves[i]
			l.dirty = l.dirty || l.dead > 0 && l.oldestDead <= certificate
		}
	}
	certificate = t.mu.certificate
	t.mu.Unlock()
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		if start, more, err = s.refreshOne(ctx, t, certificate, start, end); err != nil {
			return err
		}
	}
	return nil
}

// refreshOne reads the first dirty leaf of a range. It returns where to go on.
// REQUIRES: the caller holds t's token.
func (s *Store) refreshOne(ctx context.Context, t *tree, certificate hlc.Timestamp, start, end string) (next string, more bool, err error) {
	t.mu.Lock()
	i := t.find(start)
	for i < len(t.mu.leaves) && !t.mu.leaves[i].dirty {
		i++
	}
	if i == len(t.mu.leaves) || end != "" && t.mu.leaves[i].start >= end {
		t.mu.Unlock()
		return "", false, nil
	}
	from, to := t.mu.leaves[i].start, t.endOf(i)
	t.mu.reading = true
	t.mu.Unlock()

	fresh, err := s.hashLeaves(ctx, t.id, certificate, from, to)
	t.mu.Lock()
	defer t.mu.Unlock()
	touched := t.mu.touched
	t.mu.reading, t.mu.touched = false, nil
	if err != nil {
		return "", false, err
	}
	next, more = t.replace(i, fresh, touched, &s.trees.leaves)
	return next, more, nil
}

// replace puts fresh leaves in the place of the i-th. Those that were touched
// meanwhile stay dirty. When the key that began the first of them is gone, the leaf
// before is to be read with them. It returns where to go on, if there is more.
// REQUIRES: t.mu and the token are held.
func (t *tree) replace(i int, fresh []leaf, touched []string, count *atomic.Int64) (next string, more bool) {
	next = t.endOf(i)
	more = next != ""
	lo, hi := i, i+1
	if from := t.mu.leaves[i].start; from != "" && fresh[0].start != from {
		lo--
		next, more = t.mu.leaves[lo].start, true
		fresh[0] = leaf{start: next, dirty: true}
	}
	if !t.mu.dropped {
		count.Add(int64(len(fresh) - (hi - lo)))
	}
	t.mu.leaves = slices.Replace(t.mu.leaves, lo, hi, fresh...)
	for _, k := range touched {
		t.mu.leaves[t.find(k)].dirty = true
	}
	if len(touched) == maxTouched {
		for j := range fresh {
			t.mu.leaves[lo+j].dirty = true
		}
	}
	return next, more
}

// hashLeaves reads the records with keys in [from, to) and returns their leaves. The
// first begins at from where that is a key that is there, or the first of all; else
// its start is empty.
func (s *Store) hashLeaves(ctx context.Context, id vnodeID, certificate hlc.Timestamp, from, to string) ([]leaf, error) {
	lower, upper := vnodeRange(id.namespace, id.vnode, []byte(from), []byte(to))
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return nil, readError(err)
	}
	defer it.Close()
	h := leafHasher{certificate: certificate, from: from, leaves: []leaf{{}}, sum: sha256.New()}
	for n, valid := 0, it.First(); valid; n, valid = n+1, it.Next() {
		if n%1024 == 1023 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return nil, readError(err)
		}
		if err := h.add(it.Key()[recordPrefixLen:], value); err != nil {
			return nil, err
		}
	}
	if err := it.Error(); err != nil {
		return nil, readError(err)
	}
	h.end()
	s.trees.read.Add(h.bytes)
	// What was read may not be on disk yet.
	return h.leaves, s.waitInflight()
}

// TreeStats says how much the hash trees of a store hold.
func (s *Store) TreeStats() (leaves, maxLeaves int64) {
	return s.trees.leaves.Load(), s.trees.maxLeaves
}
