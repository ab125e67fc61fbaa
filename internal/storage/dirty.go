package storage

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

// Place names the records of one namespace in one vnode.
type Place struct{ Namespace, Vnode uint32 }

func (p Place) compare(q Place) int {
	return cmp.Or(cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Vnode, q.Vnode))
}

// Dirty is the mark of a place whose replicas may differ although nobody keeps a
// hint: repair has to compare them.
type Dirty struct {
	Place
	// SinceMillis is when the place was marked, in milliseconds since 1970.
	SinceMillis int64
	// times counts how often the place was marked, so that a repair that began before
	// the last time does not clear the mark.
	times uint64
}

// dirtyMarks are the marks in memory. Whoever writes or deletes them on disk holds
// the turn, and takes along what others wait to have written.
type dirtyMarks struct {
	turn chan struct{} // holds a token while it is free
	mu   struct {
		sync.Mutex
		marks map[Place]*dirtyMark
	}
}

type dirtyMark struct {
	Dirty
	synced bool // the mark is on disk
}

// dirtyFormat 1: format(1) since(8).
const dirtyFormat = 1

func encodeDirty(d Dirty) []byte {
	return binary.BigEndian.AppendUint64([]byte{dirtyFormat}, uint64(d.SinceMillis))
}

func decodeDirty(key, b []byte) (d Dirty, err error) {
	if d.Place, err = decodeDirtyKey(key); err != nil {
		return d, err
	}
	if len(b) < 1 || b[0] == 0 || b[0] == dirtyFormat && len(b) != 9 {
		return d, fmt.Errorf("%w: dirty mark of %d bytes", ErrCorrupt, len(b))
	}
	if b[0] > dirtyFormat {
		return d, fmt.Errorf("%w: dirty mark of format %d", ErrNewerFormat, b[0])
	}
	d.SinceMillis = int64(binary.BigEndian.Uint64(b[1:]))
	return d, nil
}

// MarkDirty marks places and returns when the marks are on disk. A place that is
// marked already costs no write. Where it fails the marks are kept in memory, and
// the next call for the place writes them again.
func (s *Store) MarkDirty(nowMillis int64, places ...Place) error {
	return s.markDirty(nil, nowMillis, places)
}

// DropHints removes hints that will not be delivered and marks their places dirty,
// as one commit, and returns when it is on disk.
func (s *Store) DropHints(hints []Hint, nowMillis int64) error {
	if len(hints) == 0 {
		return nil
	}
	b := s.db.NewBatch()
	var places []Place
	for _, h := range hints {
		if err := b.Delete(hintKey(h.Target, h.Seq), nil); err != nil {
			return errors.Join(err, b.Close())
		}
		if p := (Place{h.Namespace, h.Vnode}); !slices.Contains(places, p) {
			places = append(places, p)
		}
	}
	return s.markDirty(b, nowMillis, places)
}

// markDirty commits a batch, which may be nil, with all marks that are not on disk
// yet.
func (s *Store) markDirty(b *pebble.Batch, nowMillis int64, places []Place) error {
	if s.noteDirty(nowMillis, places) && b == nil {
		return nil
	}
	<-s.dirty.turn
	defer func() { s.dirty.turn <- struct{}{} }()
	if b == nil {
		b = s.db.NewBatch()
	}
	marks := s.unsyncedDirty()
	var errs []error
	for _, d := range marks {
		errs = append(errs, b.Set(dirtyKey(d.Place), encodeDirty(d), nil))
	}
	if errors.Join(errs...) == nil && !b.Empty() {
		errs = append(errs, s.commit(func() error { return b.Commit(pebble.Sync) }))
	}
	if err := errors.Join(append(errs, b.Close())...); err != nil {
		return fmt.Errorf("mark vnodes dirty: %w", err)
	}
	s.unmark()
	s.dirty.mu.Lock()
	defer s.dirty.mu.Unlock()
	for _, d := range marks {
		s.dirty.mu.marks[d.Place].synced = true
	}
	return nil
}

// noteDirty marks places in memory and reports whether all were on disk before.
func (s *Store) noteDirty(nowMillis int64, places []Place) (synced bool) {
	s.dirty.mu.Lock()
	defer s.dirty.mu.Unlock()
	synced = true
	for _, p := range places {
		m := s.dirty.mu.marks[p]
		if m == nil {
			m = &dirtyMark{Dirty: Dirty{Place: p, SinceMillis: nowMillis}}
			s.dirty.mu.marks[p] = m
		}
		m.times++
		synced = synced && m.synced
	}
	return synced
}

func (s *Store) unsyncedDirty() (out []Dirty) {
	s.dirty.mu.Lock()
	defer s.dirty.mu.Unlock()
	for _, m := range s.dirty.mu.marks {
		if !m.synced {
			out = append(out, m.Dirty)
		}
	}
	return out
}

// Dirty returns the places that are marked, in order.
func (s *Store) Dirty() []Dirty {
	s.dirty.mu.Lock()
	out := make([]Dirty, 0, len(s.dirty.mu.marks))
	for _, m := range s.dirty.mu.marks {
		out = append(out, m.Dirty)
	}
	s.dirty.mu.Unlock()
	slices.SortFunc(out, func(a, b Dirty) int { return a.compare(b.Place) })
	return out
}

// ClearDirty removes a mark that Dirty returned, unless the place has been marked
// again since. It does not wait for the disk: a mark that comes back after a crash
// has the place compared once more.
func (s *Store) ClearDirty(d Dirty) error {
	<-s.dirty.turn
	defer func() { s.dirty.turn <- struct{}{} }()
	if !s.forgetDirty(d, false) {
		return nil
	}
	if err := s.commit(func() error { return s.db.Delete(dirtyKey(d.Place), pebble.NoSync) }); err != nil {
		return fmt.Errorf("clear a dirty mark: %w", err)
	}
	s.forgetDirty(d, true)
	return nil
}

// forgetDirty reports whether a mark is as it was when Dirty returned it, and
// removes it from memory if it is gone from the disk. Until then whoever marks the
// place again waits for the turn to write the mark anew.
func (s *Store) forgetDirty(d Dirty, gone bool) bool {
	s.dirty.mu.Lock()
	defer s.dirty.mu.Unlock()
	m := s.dirty.mu.marks[d.Place]
	if m == nil || m.times != d.times {
		return false
	}
	m.synced = false
	if gone {
		delete(s.dirty.mu.marks, d.Place)
	}
	return true
}

// loadDirty reads the marks on disk.
func (s *Store) loadDirty() error {
	s.dirty.turn = make(chan struct{}, 1)
	s.dirty.turn <- struct{}{}
	s.dirty.mu.marks = map[Place]*dirtyMark{}
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kindDirty}, UpperBound: []byte{kindDirty + 1}})
	if err != nil {
		return readError(err)
	}
	defer it.Close()
	for valid := it.First(); valid; valid = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		d, err := decodeDirty(it.Key(), value)
		if err != nil {
			return err
		}
		s.dirty.mu.marks[d.Place] = &dirtyMark{Dirty: d, synced: true}
	}
	if err := it.Error(); err != nil {
		return readError(err)
	}
	return nil
}
