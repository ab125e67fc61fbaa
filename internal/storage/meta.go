package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// Meta returns what SetMeta stored under a name. Errors are ErrNotFound,
// ErrCorrupt or Pebble's.
func (s *Store) Meta(name string) ([]byte, error) { return s.get(metaKey(name)) }

// SetMeta stores a value under a name and returns when it is on disk.
func (s *Store) SetMeta(name string, value []byte) error {
	if s.cfg.SyncDelay != nil {
		time.Sleep(s.cfg.SyncDelay())
	}
	return s.setMeta(name, value)
}

// setMeta is SetMeta for those who hold a lock, and so must not sleep in a simulation.
func (s *Store) setMeta(name string, value []byte) error {
	if err := s.commit(func() error { return s.db.Set(metaKey(name), value, pebble.Sync) }); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	s.unmark()
	return nil
}

// Hint is a record kept for a replica that could not be reached.
type Hint struct {
	// Target is the incarnation it is kept for, Seq its number among this node's
	// hints; see NextHintSeq.
	Target, Seq uint64
	// CreatedMillis is milliseconds since 1970.
	CreatedMillis int64
	Write
}

// NextHintSeq returns a number for a hint, above all earlier ones.
func (s *Store) NextHintSeq() uint64 { return s.hintSeq.Add(1) }

// hintFormat 1: format(1) created(8) namespace(4) vnode(4) key length(uvarint)
// key record.
const hintFormat = 1

// SizeBytes is what a hint takes of the space for hints.
func (h Hint) SizeBytes() int64 {
	return int64(hintKeyLen + 1 + 8 + 4 + 4 + 2 + len(h.Key) + len(h.Record))
}

func encodeHint(h Hint) []byte {
	b := make([]byte, 0, h.SizeBytes())
	b = append(b, hintFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(h.CreatedMillis))
	b = binary.BigEndian.AppendUint32(b, h.Namespace)
	b = binary.BigEndian.AppendUint32(b, h.Vnode)
	b = binary.AppendUvarint(b, uint64(len(h.Key)))
	b = append(b, h.Key...)
	return append(b, h.Record...)
}

func decodeHint(key, b []byte) (h Hint, err error) {
	if h.Target, h.Seq, err = decodeHintKey(key); err != nil {
		return h, err
	}
	const fixed = 1 + 8 + 4 + 4
	if len(b) < fixed || b[0] == 0 {
		return h, fmt.Errorf("%w: hint of %d bytes", ErrCorrupt, len(b))
	}
	if b[0] > hintFormat {
		return h, fmt.Errorf("%w: hint of format %d", ErrNewerFormat, b[0])
	}
	h.CreatedMillis = int64(binary.BigEndian.Uint64(b[1:]))
	h.Namespace = binary.BigEndian.Uint32(b[9:])
	h.Vnode = binary.BigEndian.Uint32(b[13:])
	n, used := binary.Uvarint(b[fixed:])
	rest := b[fixed+max(used, 0):]
	if used <= 0 || n > uint64(len(rest)) {
		return h, fmt.Errorf("%w: hint with a key of %d bytes", ErrCorrupt, n)
	}
	h.Key, h.Record = slices.Clone(rest[:n]), slices.Clone(rest[n:])
	return h, nil
}

// Hints visits the hints for a target with numbers above after, oldest first,
// until visit returns false.
func (s *Store) Hints(target, after uint64, visit func(Hint) bool) error {
	return s.visitHints(hintKey(target, after+1), successor(hintKey(target, 0)[:9]), visit)
}

// AllHints visits every hint, target by target, until visit returns false.
func (s *Store) AllHints(visit func(Hint) bool) error {
	return s.visitHints([]byte{kindHint}, []byte{kindHint + 1}, visit)
}

func (s *Store) visitHints(lower, upper []byte, visit func(Hint) bool) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return readError(err)
	}
	defer it.Close()
	for valid := it.First(); valid; valid = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		h, err := decodeHint(it.Key(), value)
		if err != nil {
			return err
		}
		if !visit(h) {
			return nil
		}
	}
	if err := it.Error(); err != nil {
		return readError(err)
	}
	return nil
}

// DeleteHints removes delivered hints. It does not wait for the disk: a hint that
// comes back after a crash is delivered again, which changes nothing.
func (s *Store) DeleteHints(hints []Hint) error {
	b := s.db.NewBatch()
	defer b.Close()
	var errs []error
	for _, h := range hints {
		errs = append(errs, b.Delete(hintKey(h.Target, h.Seq), nil))
	}
	errs = append(errs, s.commit(func() error { return b.Commit(pebble.NoSync) }))
	return errors.Join(errs...)
}

// loadHintSeq continues the numbering of hints, looking at the newest of each
// target only.
func (s *Store) loadHintSeq() error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kindHint}, UpperBound: []byte{kindHint + 1}})
	if err != nil {
		return readError(err)
	}
	defer it.Close()
	for valid := it.Last(); valid; {
		target, seq, err := decodeHintKey(it.Key())
		if err != nil {
			return err
		}
		s.hintSeq.Store(max(s.hintSeq.Load(), seq))
		valid = it.SeekLT(hintKey(target, 0))
	}
	if err := it.Error(); err != nil {
		return readError(err)
	}
	return nil
}
