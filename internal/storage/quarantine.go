package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Bit rot that took records only does not cost the store. The stretch of keys it may
// have hit is quarantined: noted on disk before anything else, and reads of every vnode
// it touches are refused. Then the stretch is cut out, all levels of it, so that
// nothing older comes to light beneath what was lost. Once the vnodes have been joined
// with enough other replicas the quarantine is lifted.

// maxQuarantines bounds the stretches in quarantine; a store with more is damaged as a
// whole.
const maxQuarantines = 64

// metaQuarantine is what holds the quarantines.
const metaQuarantine = "quarantine"

// Quarantine is a stretch of storage keys whose records were lost to bit rot.
type Quarantine struct {
	ID           uint64
	lower, upper []byte
	// cut is set once what was in the stretch is gone.
	cut bool
}

// Covers reports whether a place has records in the stretch.
func (q *Quarantine) Covers(p Place) bool {
	lower, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
	return bytes.Compare(q.lower, upper) < 0 && bytes.Compare(lower, q.upper) < 0
}

func (q *Quarantine) String() string { return fmt.Sprintf("%x to %x", q.lower, q.upper) }

type quarantines struct {
	// changing is held while they are written.
	changing sync.Mutex
	list     atomic.Pointer[[]Quarantine] // what it points to is never changed
	// changes counts how often the list has changed since the store was opened.
	changes atomic.Uint64
}

// set is called with changing held.
func (q *quarantines) set(list []Quarantine) {
	// In this order: who reads the counter, then records, then both, sees what concerns
	// the records, or that something has changed.
	q.changes.Add(1)
	q.list.Store(&list)
}

func (q *quarantines) load() []Quarantine {
	if l := q.list.Load(); l != nil {
		return *l
	}
	return nil
}

// Quarantines returns the stretches in quarantine that have been cut out.
func (s *Store) Quarantines() (out []Quarantine) {
	for _, q := range s.quarantines.load() {
		if q.cut {
			out = append(out, q)
		}
	}
	return out
}

// QuarantineCount returns how many stretches are in quarantine, cut out or not.
func (s *Store) QuarantineCount() int { return len(s.quarantines.load()) }

// Quarantined reports whether records of a place may be lacking.
func (s *Store) Quarantined(p Place) bool {
	for _, q := range s.quarantines.load() {
		if q.Covers(p) {
			return true
		}
	}
	return false
}

// Reading returns what Read takes when the reading is done.
func (s *Store) Reading() uint64 { return s.quarantines.changes.Load() }

// Read returns ErrCorrupt if what was read of some vnodes since Reading may lack
// records that the store had acknowledged.
func (s *Store) Read(reading uint64, namespace uint32, vnodes ...uint32) error {
	if len(s.quarantines.load()) == 0 && s.quarantines.changes.Load() == reading {
		return nil
	}
	for _, v := range vnodes {
		if s.Quarantined(Place{namespace, v}) {
			return fmt.Errorf("%w: vnode %d lost records to bit rot and is not yet filled again", ErrCorrupt, v)
		}
	}
	if s.quarantines.changes.Load() != reading {
		return fmt.Errorf("%w: records were lost to bit rot, or filled in again, while they were read", ErrCorrupt)
	}
	return nil
}

// quarantine notes that records of a stretch are lost, and returns when that is on
// disk. Where other than records is lost it says that the store is damaged.
func (s *Store) quarantine(lower, upper []byte, what string) error {
	end := []byte{kindRecord + 1}
	if len(lower) == 0 || lower[0] != kindRecord || bytes.Compare(upper, end) > 0 || len(s.quarantines.load()) >= maxQuarantines {
		s.giveUp(what)
		return nil
	}
	err := s.changeQuarantines(func(l []Quarantine) []Quarantine {
		next := Quarantine{ID: 1, lower: lower, upper: upper}
		for _, q := range l {
			if !q.cut && bytes.Equal(q.lower, lower) && bytes.Equal(q.upper, upper) {
				return l // found twice
			}
			next.ID = max(next.ID, q.ID+1)
		}
		s.cfg.Logger.Error("records lost to bit rot: their vnodes are refused to readers until they are filled from other nodes", "dir", s.cfg.Dir,
			"lower", fmt.Sprintf("%x", lower), "upper", fmt.Sprintf("%x", upper), "what", what)
		return append(l, next)
	})
	s.signal()
	return err
}

// changeQuarantines changes the list in memory, then on disk; where that fails the
// longer of the two lists stays in use.
func (s *Store) changeQuarantines(change func([]Quarantine) []Quarantine) error {
	s.quarantines.changing.Lock()
	defer s.quarantines.changing.Unlock()
	old := s.quarantines.load()
	next := change(slices.Clone(old))
	if len(next) > len(old) {
		s.quarantines.set(next)
	}
	if err := s.setMeta(metaQuarantine, encodeQuarantines(next)); err != nil {
		return err
	}
	s.quarantines.set(next)
	return nil
}

// Lift ends a quarantine: its records have been filled in again.
func (s *Store) Lift(id uint64) error {
	return s.changeQuarantines(func(l []Quarantine) []Quarantine {
		return slices.DeleteFunc(l, func(q Quarantine) bool { return q.ID == id && q.cut })
	})
}

// Cut removes what is left of the stretches in quarantine, then has what is left of the
// damaged tables written anew. Where a stretch cannot be cut out the store says that it is
// damaged. After other errors more may have to be inspected before the next try.
func (s *Store) Cut(ctx context.Context) error {
	before, err := s.virtual()
	if err != nil {
		return err
	}
	for _, stretch := range union(s.quarantines.load()) {
		if err := s.commit(s.db.Flush); err != nil {
			return err // what is cut out of the log would be cut out again by a flush
		}
		if err := s.checkEnds(ctx, &stretch); err != nil {
			return err
		}
		if err := s.cut(ctx, &stretch); err != nil {
			if ctx.Err() != nil {
				return err
			}
			s.giveUp(fmt.Sprintf("%s cannot be cut out: %s", &stretch, err))
			return nil
		}
		err := s.changeQuarantines(func(l []Quarantine) []Quarantine {
			for i := range l {
				l[i].cut = l[i].cut || bytes.Compare(stretch.lower, l[i].lower) <= 0 && bytes.Compare(l[i].upper, stretch.upper) <= 0
			}
			return l
		})
		if err != nil {
			return err
		}
	}
	return s.tidy(ctx, before)
}

// union joins the stretches that are to be cut out where they overlap: damage of one may
// lie where another ends.
func union(l []Quarantine) (out []Quarantine) {
	l = slices.DeleteFunc(slices.Clone(l), func(q Quarantine) bool { return q.cut })
	slices.SortFunc(l, func(a, b Quarantine) int { return bytes.Compare(a.lower, b.lower) })
	for _, q := range l {
		if n := len(out); n == 0 || bytes.Compare(out[n-1].upper, q.lower) < 0 {
			out = append(out, q)
		} else if bytes.Compare(out[n-1].upper, q.upper) < 0 {
			out[n-1].upper = q.upper
		}
	}
	return out
}

func (s *Store) cut(ctx context.Context, q *Quarantine) error {
	off := s.latches.suspend(keyRange{string(q.lower), string(q.upper)})
	err := s.commit(func() error { return s.db.Excise(ctx, pebble.KeyRange{Start: q.lower, End: q.upper}) })
	off.resume()
	s.trees.forget(func(id vnodeID) bool { return q.Covers(Place{id.namespace, id.vnode}) })
	// Whoever collects dead records must not take this replica for what it was.
	s.collections.states.Range(func(p, c any) bool {
		if q.Covers(p.(Place)) {
			c.(*collection).lateJoins.Add(1)
		}
		return true
	})
	return err
}

// checkEnds has a table inspected that cannot be read right where a stretch ends, and
// returns why. Excise would drop the rest of such a table without a word.
func (s *Store) checkEnds(ctx context.Context, q *Quarantine) error {
	levels, err := s.db.SSTables()
	if err != nil {
		return readError(err)
	}
	options := s.readerOptions()
	for _, level := range levels {
		for i := range level {
			t := &level[i]
			if !q.hits(t) || !q.startsIn(t) && !q.endsIn(t) {
				continue
			}
			err := s.readEnds(ctx, t, options, q)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				s.mistrust(tableName(t), err.Error())
				return fmt.Errorf("read %s where what bit rot took ends: %w", tableName(t), err)
			}
		}
	}
	return nil
}

// readEnds reads the keys of a table next to a stretch from the disk, as Excise does.
func (s *Store) readEnds(ctx context.Context, info *pebble.SSTableInfo, options sstable.ReaderOptions, q *Quarantine) error {
	return s.probe(ctx, info, options, func(it sstable.Iterator) (err error) {
		if q.startsIn(info) {
			it.SeekLT(q.lower, 0)
			err = it.Error()
		}
		if q.endsIn(info) {
			it.SeekGE(q.upper, 0)
			err = errors.Join(err, it.Error())
		}
		return err
	})
}

// probe reads something of a table, or this part of one, from the disk, past all caches.
func (s *Store) probe(ctx context.Context, info *pebble.SSTableInfo, options sstable.ReaderOptions, read func(sstable.Iterator) error) error {
	f, err := s.disk.Open(filepath.Join(s.cfg.Dir, tableName(info)), vfs.RandomReadsOption)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a compaction has replaced it
	}
	if err != nil {
		return err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	r, err := sstable.NewReader(ctx, readable, options)
	if err != nil {
		return errors.Join(err, readable.Close())
	}
	it, err := newTable(info).iterate(r)
	if err != nil {
		return errors.Join(err, r.Close())
	}
	return errors.Join(read(it), it.Close(), r.Close())
}

// hits reports whether a table may have records in the stretch.
func (q *Quarantine) hits(t *pebble.SSTableInfo) bool {
	return bytes.Compare(t.Smallest.UserKey, q.upper) < 0 && bytes.Compare(q.lower, t.Largest.UserKey) <= 0
}

// startsIn reports whether a table has something before the stretch, endsIn after it.
func (q *Quarantine) startsIn(t *pebble.SSTableInfo) bool {
	return bytes.Compare(t.Smallest.UserKey, q.lower) < 0
}

func (q *Quarantine) endsIn(t *pebble.SSTableInfo) bool {
	return bytes.Compare(q.upper, t.Largest.UserKey) <= 0
}

// virtual returns the tables that are parts of others.
func (s *Store) virtual() (map[string]bool, error) {
	levels, err := s.db.SSTables()
	if err != nil {
		return nil, readError(err)
	}
	nums := map[string]bool{}
	for _, level := range levels {
		for i := range level {
			if level[i].Virtual {
				nums[level[i].FileNum.String()] = true
			}
		}
	}
	return nums, nil
}

// tidy has what is left of tables written anew, so that damaged bytes leave the disk; what
// was a part of a table before is left alone. None of those bytes is read any more; damage
// that is met on the way is inspected like any other.
func (s *Store) tidy(ctx context.Context, before map[string]bool) error {
	levels, err := s.db.SSTables()
	if err != nil {
		return readError(err)
	}
	for _, level := range levels {
		for i := range level {
			t := &level[i]
			if !t.Virtual || before[t.FileNum.String()] || !s.live(t) {
				continue
			}
			if err := s.rewrite(ctx, t); err != nil && ctx.Err() == nil {
				s.cfg.Logger.Warn("what is left of a damaged table cannot be written anew yet", "dir", s.cfg.Dir, "table", tableName(t), "err", err)
			}
		}
	}
	return ctx.Err()
}

// quarantineFormat 1: format(1), then each: id(uvarint) cut(1) lower upper, with their
// lengths (uvarint).
const quarantineFormat = 1

func encodeQuarantines(l []Quarantine) []byte {
	b := []byte{quarantineFormat}
	for _, q := range l {
		b = binary.AppendUvarint(b, q.ID)
		cut := byte(0)
		if q.cut {
			cut = 1
		}
		b = append(b, cut)
		b = appendBytes(b, q.lower)
		b = appendBytes(b, q.upper)
	}
	return b
}

func decodeQuarantines(b []byte) (out []Quarantine, err error) {
	if len(b) == 0 || b[0] == 0 {
		return nil, fmt.Errorf("%w: quarantines of %d bytes", ErrCorrupt, len(b))
	}
	if b[0] > quarantineFormat {
		return nil, fmt.Errorf("%w: quarantines of format %d", ErrNewerFormat, b[0])
	}
	bad := fmt.Errorf("%w: quarantine", ErrCorrupt)
	text := func() []byte {
		n, used := binary.Uvarint(b)
		if used <= 0 || n > uint64(len(b)-used) {
			err = bad
			return nil
		}
		t := b[used : used+int(n)]
		b = b[used+int(n):]
		return slices.Clone(t)
	}
	for b = b[1:]; len(b) > 0; {
		id, used := binary.Uvarint(b)
		if used <= 0 || len(b) == used || b[used] > 1 {
			return nil, bad
		}
		q := Quarantine{ID: id, cut: b[used] == 1}
		b = b[used+1:]
		q.lower, q.upper = text(), text()
		if err != nil {
			return nil, err
		}
		if bytes.Compare(q.lower, q.upper) >= 0 {
			return nil, bad
		}
		out = append(out, q)
	}
	return out, nil
}

func (s *Store) loadQuarantines() error {
	b, err := s.Meta(metaQuarantine)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	l, err := decodeQuarantines(b)
	if err != nil {
		return err
	}
	s.quarantines.list.Store(&l)
	s.signal()
	return nil
}
