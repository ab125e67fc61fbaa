package storage

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
)

// Get returns a key's record in storage encoding, after waiting until it is on disk. It
// must not be changed. Errors are ErrNotFound, ErrCorrupt or Pebble's.
func (s *Store) Get(namespace, vnode uint32, key []byte) ([]byte, error) {
	var scratch [128]byte
	k := appendRecordKey(scratch[:0], namespace, vnode, key)
	st := s.latches.of(k)
	value, unsynced := s.cached(st, k)
	var err error
	if value != nil {
		s.reads.cached.Add(1)
	} else {
		s.reads.stored.Add(1)
		before := st.generation.Load()
		value, err = s.get(k)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
		if err == nil {
			s.learn(st, k, value, before)
		}
		// A record is visible before it is synced. Its commit was registered before it
		// became visible, so looking for the commit after the read cannot miss it.
		unsynced = s.latches.pending(st, k)
	}
	if unsynced != nil && !mutant.On("reply-before-sync") {
		if err := unsynced.wait(); err != nil {
			return nil, err
		}
	}
	// A commit that failed was taken off the register after the store had ended.
	if failed := s.failure(); failed != nil {
		return nil, failed
	}
	return value, err
}

// Cached returns a key's record, which must not be changed, if that is in the cache and on
// disk, or nil. It never waits.
func (s *Store) Cached(namespace, vnode uint32, key []byte) []byte {
	var scratch [128]byte
	k := appendRecordKey(scratch[:0], namespace, vnode, key)
	rec, unsynced := s.cached(s.latches.of(k), k)
	if rec == nil || unsynced != nil || s.failure() != nil {
		return nil
	}
	s.reads.cached.Add(1)
	return rec
}

// Reads returns how many reads of a key were answered from the cache of records, and how
// many from the store.
func (s *Store) Reads() (cached, stored uint64) { return s.reads.cached.Load(), s.reads.stored.Load() }

// cached returns a record from the cache, and the commit that whoever is told of it must
// wait for. It gives way to writers, who may be waiting for the disk.
func (s *Store) cached(st *stripe, k []byte) ([]byte, *Commit) {
	if !st.mu.TryLock() {
		return nil, nil
	}
	defer st.mu.Unlock()
	rec := st.mu.records.get(k)
	if rec == nil || !s.latches.cacheable(view(k)) {
		return nil, nil
	}
	return rec, st.mu.unsynced[string(k)]
}

func (s *Store) get(k []byte) ([]byte, error) {
	value, closer, err := s.db.Get(k)
	if err == pebble.ErrNotFound {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, readError(err)
	}
	out := slices.Clone(value)
	return out, closer.Close()
}

// learn caches what was read of a key when no writer was active in its stripe since
// before, and makes the entry of a key exact that has gathered blind merges.
func (s *Store) learn(st *stripe, k, value []byte, before uint64) {
	if before%2 != 0 || len(k) > maxCachedKeyBytes || !st.mu.TryLock() {
		return
	}
	defer st.mu.Unlock()
	if st.generation.Load() != before || !s.latches.cacheable(view(k)) {
		return
	}
	rec, err := record.Decode(value)
	if err != nil {
		return
	}
	st.mu.records.learn(k, rec, value)
	if e, ok := st.mu.versions.Peek(string(k)); ok && !e.exact {
		st.mu.versions.Add(string(k), entry{version: rec.Version, exact: true})
	}
}

func readError(err error) error {
	if pebble.IsCorruptionError(err) || errors.Is(err, record.ErrCorrupt) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return fmt.Errorf("read: %w", err)
}

// Scan visits the records of some vnodes of a namespace with keys in [start, end),
// tombstones included, in key order over all of them, until visit returns false.
// An empty end means no end. All are of one moment, and on disk before the first
// is visited. The slices are valid during the visit only.
func (s *Store) Scan(namespace uint32, vnodes []uint32, start, end []byte, visit func(vnode uint32, key, rec []byte) bool) error {
	if len(vnodes) == 0 {
		return nil
	}
	moment, err := s.Snapshot()
	if err != nil {
		return err
	}
	defer moment.Close()
	return moment.Scan(namespace, vnodes, start, end, visit)
}

// Snapshot is the store as it was at one moment. It holds what was removed since on disk, and
// is not safe for concurrent use.
type Snapshot struct{ base *pebble.Iterator }

// Snapshot returns the store as it is, once all of that is on disk. Close must be called.
func (s *Store) Snapshot() (*Snapshot, error) {
	base, err := s.db.NewIter(&pebble.IterOptions{})
	if err != nil {
		return nil, readError(err)
	}
	if err := s.waitInflight(); err != nil {
		base.Close()
		return nil, err
	}
	return &Snapshot{base}, nil
}

// Close ends the use of a snapshot.
func (s *Snapshot) Close() { s.base.Close() } // errors were seen when it was used

// Scan is Store.Scan at the moment of the snapshot.
func (s *Snapshot) Scan(namespace uint32, vnodes []uint32, start, end []byte, visit func(vnode uint32, key, rec []byte) bool) error {
	m := &merge{base: s.base}
	defer m.close()
	for _, v := range vnodes {
		if err := m.add(namespace, v, start, end); err != nil {
			return readError(err)
		}
	}
	return m.visit(visit)
}

// ScanVnodes is Scan in the order of vnodes, and of keys within each, which is cheaper
// where many are visited.
func (s *Snapshot) ScanVnodes(namespace uint32, vnodes []uint32, start, end []byte, visit func(vnode uint32, key, rec []byte) bool) error {
	more := true
	for i := 0; i < len(vnodes) && more; i++ {
		err := s.Scan(namespace, vnodes[i:i+1], start, end, func(vnode uint32, key, rec []byte) bool {
			more = visit(vnode, key, rec)
			return more
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// visit visits what is left, in key order, until f returns false.
func (m *merge) visit(f func(vnode uint32, key, rec []byte) bool) error {
	for m.Len() > 0 {
		c := m.cursors[0]
		value, err := c.iter.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		if !f(c.vnode, c.key, value) {
			return nil
		}
		if c.next() {
			heap.Fix(m, 0)
			continue
		}
		if err := c.iter.Error(); err != nil {
			return readError(err)
		}
		heap.Pop(m)
	}
	return nil
}

// waitInflight returns when every commit that is visible now is on disk.
func (s *Store) waitInflight() error {
	s.inflight.Lock()
	commits := make([]*Commit, 0, len(s.inflight.commits))
	for c := range s.inflight.commits {
		commits = append(commits, c)
	}
	s.inflight.Unlock()
	for _, c := range commits {
		if err := c.wait(); err != nil {
			return err
		}
	}
	return s.failure()
}

// cursor is a place in one vnode.
type cursor struct {
	vnode uint32
	iter  *pebble.Iterator
	key   []byte
}

func (c *cursor) at(valid bool) bool {
	if valid {
		c.key = c.iter.Key()[recordPrefixLen:]
	}
	return valid
}

func (c *cursor) next() bool { return c.at(c.iter.Next()) }

// merge is a heap of cursors, the smallest key first.
type merge struct {
	base    *pebble.Iterator
	all     []*pebble.Iterator
	cursors []*cursor
}

func (m *merge) add(namespace, vnode uint32, start, end []byte) error {
	lower, upper := vnodeRange(namespace, vnode, start, end)
	if len(end) > 0 && bytes.Compare(lower, upper) >= 0 {
		return nil
	}
	it, err := m.base.Clone(pebble.CloneOptions{IterOptions: &pebble.IterOptions{LowerBound: lower, UpperBound: upper}})
	if err != nil {
		return err
	}
	m.all = append(m.all, it)
	c := &cursor{vnode: vnode, iter: it}
	if c.at(it.First()) {
		heap.Push(m, c)
	}
	return it.Error()
}

func (m *merge) close() {
	for _, it := range m.all {
		it.Close() // errors were seen when the iterator was used
	}
}

func (m *merge) Len() int           { return len(m.cursors) }
func (m *merge) Less(i, j int) bool { return bytes.Compare(m.cursors[i].key, m.cursors[j].key) < 0 }
func (m *merge) Swap(i, j int)      { m.cursors[i], m.cursors[j] = m.cursors[j], m.cursors[i] }
func (m *merge) Push(x any)         { m.cursors = append(m.cursors, x.(*cursor)) }
func (m *merge) Pop() any {
	last := m.cursors[len(m.cursors)-1]
	m.cursors = m.cursors[:len(m.cursors)-1]
	return last
}

// DropNamespace removes all records of a namespace, and what the collection of its
// dead records has come to, and returns when that is on disk.
// REQUIRES: the namespace is not in use any more.
func (s *Store) DropNamespace(namespace uint32) error {
	lower, upper := namespaceRange(namespace)
	defer s.latches.suspend(keyRange{string(lower), string(upper)}).resume()
	<-s.collections.writing
	defer func() { s.collections.writing <- struct{}{} }()
	b := s.db.NewBatch()
	defer b.Close()
	err := b.DeleteRange(lower, upper, nil)
	lower, upper = collectionRange(namespace)
	err = errors.Join(err, b.DeleteRange(lower, upper, nil))
	if err == nil {
		err = s.commit(func() error { return b.Commit(pebble.Sync) })
	}
	if err != nil {
		return fmt.Errorf("drop namespace %d: %w", namespace, err)
	}
	s.trees.forget(func(id vnodeID) bool { return id.namespace == namespace })
	s.collections.forget(namespace)
	return nil
}

// Namespaces returns the identifiers of all namespaces that DropNamespace would find
// something of, in ascending order.
func (s *Store) Namespaces() ([]uint32, error) {
	var out []uint32
	for _, kind := range []byte{kindRecord, kindCollection} {
		ids, err := s.namespacesOf(kind)
		if err != nil {
			return nil, err
		}
		out = append(out, ids...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// namespacesOf returns the namespaces that have keys of a kind.
func (s *Store) namespacesOf(kind byte) ([]uint32, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kind}, UpperBound: []byte{kind + 1}})
	if err != nil {
		return nil, readError(err)
	}
	defer it.Close()
	var out []uint32
	for valid := it.First(); valid; {
		k := it.Key()
		if len(k) < recordPrefixLen {
			return nil, fmt.Errorf("%w: key %x", ErrCorrupt, k)
		}
		id := binary.BigEndian.Uint32(k[1:])
		out = append(out, id)
		valid = it.SeekGE(successor(k[:5]))
	}
	if err := it.Error(); err != nil {
		return nil, readError(err)
	}
	return out, nil
}
