package storage

import (
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// collectKeys is how many keys' latches one batch of removals holds.
const collectKeys = 16

// Removals says what has been done under certificates since the store was opened.
type Removals struct {
	// Removed records were dead; Skipped ones came by a repair, dead, for absent keys.
	Removed, Skipped uint64
}

// Removals returns what has been done under certificates.
func (s *Store) Removals() Removals {
	return Removals{Removed: s.collections.removed.Load(), Skipped: s.collections.skipped.Load()}
}

func deadAt(rec record.Record, certificate hlc.Timestamp) bool {
	from, ok := DeadAt(rec)
	return ok && from <= certificate
}

// RepairHorizon is how long after its timestamp a certificate has been issued at the
// latest, by any clock that may issue versions.
const RepairHorizon = 2 * time.Minute

// collected reports whether a repair must not be joined. Its key is absent, and either
// it is dead at or below the certificate, so it has been removed here already; or it
// was read before all endpoints were found equal up to the certificate, so it brings
// nothing that this one lacks, but perhaps what has been deleted since. What was read
// after that is joined: bit rot may have taken it from this one.
// REQUIRES: the latch of key is held.
func (s *Store) collected(b *pebble.Batch, key string, rec record.Record, w Write) bool {
	certificate := s.Collection(w.Namespace, w.Vnode).Certificate
	old := w.ReadAt != 0 && rec.Version.Time <= certificate && w.Certificate < certificate && w.ReadAt <= hlc.At(certificate.Millis()+RepairHorizon.Milliseconds())
	if !old && !deadAt(rec, certificate) {
		return false
	}
	if e, ok := s.latches.of([]byte(key)).mu.versions.Peek(key); ok && (e.exact || e.blind > 0) {
		return false
	}
	stored, err := s.storedVersion(b, key)
	if err != nil || !stored.IsZero() {
		return false // a merge needs no read
	}
	s.collections.skipped.Add(1)
	return true
}

// Collect removes those of a vnode's keys whose records are dead at or below its
// certificate, and returns how many. It does not wait for the disk: a record that
// comes back after a crash is removed again.
//
// A removal looks at the record with the key's latch held. Otherwise a newer record
// that is merged in between would be swallowed.
func (s *Store) Collect(namespace, vnode uint32, keys [][]byte) (removed int, err error) {
	for len(keys) > 0 {
		n := min(len(keys), collectKeys)
		some, err := s.collect(namespace, vnode, keys[:n])
		removed += some
		if err != nil {
			return removed, fmt.Errorf("remove dead records of vnode %d of namespace %d: %w", vnode, namespace, err)
		}
		keys = keys[n:]
	}
	return removed, nil
}

func (s *Store) collect(namespace, vnode uint32, keys [][]byte) (int, error) {
	if err := s.failure(); err != nil {
		return 0, err
	}
	var set stripeSet
	full := make([][]byte, len(keys))
	for i, k := range keys {
		full[i] = appendRecordKey(nil, namespace, vnode, k)
		set.add(stripeOf(full[i]))
	}
	b := s.db.NewBatch()
	defer b.Close()
	s.latches.lock(&set)
	defer s.latches.unlock(&set)
	certificate := s.Collection(namespace, vnode).Certificate
	for _, k := range full {
		value, err := s.get(k)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return 0, err
		}
		rec, err := record.Decode(value)
		if err != nil {
			return 0, fmt.Errorf("%w: record of key %x: %w", ErrCorrupt, k, err)
		}
		if !deadAt(rec, certificate) {
			continue
		}
		if err := b.Delete(k, nil); err != nil {
			return 0, err
		}
		// Gone before the record is, and the latch keeps others from learning it again.
		s.latches.of(k).drop(string(k))
	}
	n := int(b.Count())
	if n == 0 {
		return 0, nil
	}
	err := s.commit(func() error { return b.Commit(pebble.NoSync) })
	for _, k := range keys {
		s.trees.touch(vnodeID{namespace, vnode}, k)
	}
	if err != nil {
		return 0, err
	}
	s.collections.removed.Add(uint64(n))
	return n, nil
}
