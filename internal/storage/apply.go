package storage

import (
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
)

// Write is a record on its way into the store.
type Write struct {
	Namespace, Vnode uint32
	Key              []byte
	// Record is in storage encoding.
	Record []byte
	// Repair says that another replica holds the record, and the collection of dead
	// records has a word in it: see Store.Apply.
	Repair bool
	// ReadAt is when a repair's record was read, by the reader's clock; 0 is now.
	// Certificate is the greatest that the reader knew before it read.
	ReadAt, Certificate hlc.Timestamp
}

// Commit is a batch that has been applied. Whoever applied it must call Wait.
type Commit struct {
	store *Store
	batch *pebble.Batch
	keys  []string
	// applied is set when the batch has something to sync.
	applied bool
	// behind are the commits whose records made some of this one's superfluous.
	behind []*Commit
	done   chan struct{}
	err    error
	begun  time.Time
}

// Apply joins records into the store and adds hints, as one commit. On return the
// records are visible; what a caller tells others about them must wait for
// Commit.Wait. Records that the store knows to be superseded are not written
// again, nor are records marked Repair whose key is absent because they, or what
// followed them, were removed under the vnode's certificate. Errors are ErrDiskFull, ErrCorrupt for a record that does not decode (then
// nothing is applied), what Config.Fatal was called with, or Pebble's.
func (s *Store) Apply(writes []Write, hints []Hint) (*Commit, error) {
	if err := s.failure(); err != nil {
		return nil, err
	}
	if s.diskFull.Load() != nil {
		return nil, ErrDiskFull
	}
	// Whoever makes a promise waits for the applies that had not seen it.
	defer s.promises.enter().leave()
	keys := make([]string, len(writes))
	recs := make([]record.Record, len(writes))
	var set stripeSet
	var scratch []byte
	for i, w := range writes {
		rec, err := record.Decode(w.Record)
		if err != nil {
			return nil, fmt.Errorf("%w: record of key %q: %w", ErrCorrupt, w.Key, err)
		}
		recs[i] = rec
		scratch = appendRecordKey(scratch[:0], w.Namespace, w.Vnode, w.Key)
		keys[i] = string(scratch)
		set.add(stripeOf(scratch))
	}
	c := &Commit{store: s, batch: s.db.NewBatch(), keys: keys, done: make(chan struct{}), begun: time.Now()}
	for _, h := range hints {
		if err := c.batch.Set(hintKey(h.Target, h.Seq), encodeHint(h), nil); err != nil {
			return nil, errors.Join(err, c.batch.Close())
		}
	}
	if err := s.apply(c, &set, recs, writes); err != nil {
		c.err = err
		s.end(c)
		close(c.done)
		return nil, err
	}
	return c, nil
}

// apply decides on the records and makes them visible. The latches are held from
// the first to the last.
func (s *Store) apply(c *Commit, set *stripeSet, recs []record.Record, writes []Write) error {
	s.latches.lock(set)
	defer s.latches.unlock(set)
	// Counted once they are visible, and before Apply ends: whoever has made a promise,
	// and so waited for the applies before it, misses none that he could have seen.
	var late []*collection
	defer func() {
		for _, l := range late {
			l.lateJoins.Add(1)
		}
	}()
	changed := make([]bool, len(writes))
	for i, w := range writes {
		if w.Repair && s.collected(c.batch, c.keys[i], recs[i], w) {
			continue
		}
		before := c.batch.Count()
		if err := s.decide(c, c.keys[i], recs[i], w.Record); err != nil {
			s.forget(c.keys[:i+1])
			return errors.Join(err, c.batch.Close())
		}
		changed[i] = c.batch.Count() > before
		if !w.Repair || !changed[i] {
			continue
		}
		if l := s.collections.late(w, recs[i].Version); l != nil {
			late = append(late, l)
		}
	}
	if c.batch.Empty() {
		return nil
	}
	s.begin(c)
	err := s.commit(func() error {
		if s.cfg.SyncDelay != nil {
			return s.db.Apply(c.batch, pebble.NoSync)
		}
		return s.db.ApplyNoSyncWait(c.batch, pebble.Sync)
	})
	// After the records are visible: a scan that missed them leaves its leaf dirty.
	for i, w := range writes {
		if changed[i] {
			s.trees.touch(vnodeID{w.Namespace, w.Vnode}, w.Key)
		}
	}
	if err != nil {
		s.forget(c.keys)
		return fmt.Errorf("apply batch: %w", err) // Pebble may still hold the batch
	}
	c.applied = true
	return nil
}

// forget removes what is cached of keys whose decisions were not carried out.
// REQUIRES: the latches of keys are held.
func (s *Store) forget(keys []string) {
	for _, k := range keys {
		s.latches.of([]byte(k)).drop(k)
	}
}

// decide adds a record to the batch: as a Set where the stored version is known
// to be lower, not at all where it is known to be higher, and as a Merge
// otherwise.
// REQUIRES: the latch of key is held.
func (s *Store) decide(c *Commit, key string, rec record.Record, encoded []byte) error {
	st := s.latches.of([]byte(key))
	if !s.latches.cacheable(key) {
		st.drop(key)
		return c.batch.Merge([]byte(key), encoded, nil)
	}
	merge := func() error {
		st.mu.records.remove(key)
		return c.batch.Merge([]byte(key), encoded, nil)
	}
	e, _ := st.mu.versions.Get(key)
	if !e.exact && e.blind >= blindLimit {
		stored, err := s.storedVersion(c.batch, key)
		if err != nil {
			// A merge needs no read; others in the batch must not fail for this key.
			return merge()
		}
		e = entry{version: stored, exact: true}
		st.mu.versions.Add(key, e)
	}
	if !e.exact {
		e.blind++
		if mutant.On("cache-from-blind-merge") {
			e = entry{version: rec.Version, exact: true}
		}
		st.mu.versions.Add(key, e)
		return merge()
	}
	switch e.version.Compare(rec.Version) {
	case -1:
		st.mu.versions.Add(key, entry{version: rec.Version, exact: true})
		st.mu.records.replaced(key, rec, encoded)
		return c.batch.Set([]byte(key), encoded, nil)
	case 0:
		// Equal versions may still differ in kind, expiry or bytes.
		return merge()
	}
	if p := st.mu.unsynced[key]; p != nil {
		c.behind = append(c.behind, p)
	}
	return nil
}

// storedVersion returns the version of a key's stored record, or zero.
// REQUIRES: the latch of key is held, and the batch has no operation on key that a
// cache entry does not tell of: blind merges of this batch are counted, not read,
// so they are looked up in the batch first.
func (s *Store) storedVersion(b *pebble.Batch, key string) (record.Version, error) {
	greatest := record.Version{}
	r := b.Reader()
	for {
		_, k, value, ok, err := r.Next()
		if err != nil {
			return greatest, err
		}
		if !ok {
			break
		}
		if string(k) == key {
			rec, err := record.Decode(value)
			if err != nil {
				return greatest, err
			}
			if greatest.Compare(rec.Version) < 0 {
				greatest = rec.Version
			}
		}
	}
	value, closer, err := s.db.Get([]byte(key))
	if err == pebble.ErrNotFound {
		return greatest, nil
	}
	if err != nil {
		return greatest, fmt.Errorf("read before write: %w", err)
	}
	defer closer.Close()
	rec, err := record.Decode(value)
	if err != nil {
		return greatest, err
	}
	if greatest.Compare(rec.Version) < 0 {
		greatest = rec.Version
	}
	return greatest, nil
}

// begin registers a commit before it becomes visible, so that whoever sees its
// records finds it.
// REQUIRES: the latches of its keys are held.
func (s *Store) begin(c *Commit) {
	for _, k := range c.keys {
		st := s.latches.of([]byte(k))
		if _, ok := st.mu.unsynced[k]; !ok {
			st.dirty.Add(1)
		}
		st.mu.unsynced[k] = c
	}
	s.inflight.Lock()
	s.inflight.commits[c] = time.Time{}
	s.inflight.Unlock()
}

// end takes a commit off the registers, if it is on them.
// REQUIRES: the latches of its keys are not held.
func (s *Store) end(c *Commit) {
	for _, k := range c.keys {
		st := s.latches.of([]byte(k))
		s.latches.hold(st)
		if st.mu.unsynced[k] == c {
			delete(st.mu.unsynced, k)
			st.dirty.Add(-1)
		}
		st.mu.Unlock()
	}
	s.inflight.Lock()
	delete(s.inflight.commits, c)
	s.inflight.Unlock()
}

// Wait returns when all that was applied, or what superseded it, is on disk. It
// must be called exactly once.
func (c *Commit) Wait() error {
	if c.applied {
		c.err = c.sync()
	} else {
		c.err = c.batch.Close()
	}
	close(c.done)
	for _, p := range c.behind {
		if err := p.wait(); err != nil {
			return err
		}
	}
	return c.err
}

func (c *Commit) sync() error {
	s := c.store
	s.syncing(c)
	err := s.syncWait(c.batch)
	if failed := s.failure(); failed != nil {
		err = failed
	} else if err != nil {
		err = s.diskFailed(err) // while readers wait
	}
	if err == nil {
		s.unmark()
		now := time.Now()
		s.delays.note(now.Sub(c.begun), now)
	}
	s.end(c)
	if cerr := c.batch.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("sync batch: %w", err)
	}
	return nil
}

// syncWait returns when an applied batch is on disk.
func (s *Store) syncWait(b *pebble.Batch) error {
	if s.cfg.SyncDelay == nil {
		return b.SyncWait()
	}
	if mutant.On("ack-before-sync") {
		return nil
	}
	time.Sleep(s.cfg.SyncDelay())
	return s.commit(func() error { return s.db.LogData(nil, pebble.Sync) })
}

// wait is for others than the one who applied the commit.
func (c *Commit) wait() error {
	<-c.done
	return c.err
}
