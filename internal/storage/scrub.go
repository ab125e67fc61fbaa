package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/record"
)

// Bit rot is met in two ways: by a read, flush or compaction that comes across it, or
// by a scrub that looks for it. Either way Pebble's checksums keep damaged bytes from
// being served. A damaged table cannot be mended in place: what it held may have been
// acknowledged, and nobody can tell what that was. Where it was records only, their
// stretch is quarantined; else the store says that it is damaged, and the node gives it
// up and is filled anew.

// Damage says what bit rot was found, or "" while none was.
func (s *Store) Damage() string {
	if d := s.damage.Load(); d != nil {
		return *d
	}
	return ""
}

// Corruptions counts how often damaged bytes were met since the store was opened.
func (s *Store) Corruptions() uint64 { return s.corruptions.Load() }

// Damaged is closed when bit rot is found for the first time.
func (s *Store) Damaged() <-chan struct{} { return s.damaged }

// Attention holds a token when there is something to Inspect, Cut or fill.
func (s *Store) Attention() <-chan struct{} { return s.attention }

func (s *Store) signal() {
	select {
	case s.attention <- struct{}{}:
	default:
	}
}

// maxSuspects bounds the tables that wait to be inspected; a scrub finds the others.
const maxSuspects = 1024

// suspect is told of damage that Pebble met. It does not block.
func (s *Store) suspect(info pebble.DataCorruptionInfo) {
	s.corruptions.Add(1)
	// A compaction that met it begins anew at once, again and again.
	now := time.Now()
	s.retryAt.Store(&now)
	s.mistrust(filepath.Base(info.Path), info.String())
}

// mistrust has a table inspected.
func (s *Store) mistrust(name, why string) {
	s.suspects.Lock()
	if _, ok := s.suspects.tables[name]; !ok && len(s.suspects.tables) < maxSuspects {
		s.suspects.tables[name] = why
	}
	s.suspects.Unlock()
	s.signal()
}

// tableName returns the name of the file that a table, or this part of one, is in.
func tableName(info *pebble.SSTableInfo) string { return fmt.Sprintf("%s.sst", info.BackingSSTNum) }

func (s *Store) readerOptions() sstable.ReaderOptions {
	options := s.options()
	options.EnsureDefaults()
	return options.MakeReaderOptions()
}

// suspected reports whether damage was met in a table.
func (s *Store) suspected(name string) bool {
	s.suspects.Lock()
	defer s.suspects.Unlock()
	_, ok := s.suspects.tables[name]
	return ok
}

// giveUp says that the store is damaged beyond its records. It does not block.
func (s *Store) giveUp(what string) {
	if s.damage.CompareAndSwap(nil, &what) {
		s.cfg.Logger.Error("damaged bytes on disk", "dir", s.cfg.Dir, "what", what)
		close(s.damaged)
	}
}

// GiveUp makes sure that the directory is not served again: whoever opens it next
// finds LostTail.
func (s *Store) GiveUp() error {
	return s.mark.update(func(m *mark) { m.damaged = true })
}

// Check says what is wrong with a record that decodes, or nil. The key is that of the
// user.
type Check func(p Place, key []byte) error

// Scrub reads every table on the disk, past all caches, checks its checksums and
// records, and returns how many bytes it has read. Records that are damaged or that
// check rejects are quarantined; other damage Damage tells. pace is called before so
// many bytes are read and may wait. Errors are those of ctx, of pace, and of the file
// system where it does not say that a file is gone.
func (s *Store) Scrub(ctx context.Context, pace func(context.Context, int) error, check Check) (bytes uint64, err error) {
	return s.scrub(ctx, pace, check, nil)
}

// Inspect is a Scrub of the tables in which Pebble met damage since the last one.
func (s *Store) Inspect(ctx context.Context, check Check) error {
	s.suspects.Lock()
	suspects := s.suspects.tables
	s.suspects.tables = map[string]string{}
	s.suspects.Unlock()
	if len(suspects) == 0 {
		return nil
	}
	found := s.Corruptions()
	_, err := s.scrub(ctx, func(ctx context.Context, _ int) error { return ctx.Err() }, check, suspects)
	if err == nil && s.Corruptions() == found {
		for name, what := range suspects {
			s.cfg.Logger.Error("a table was read wrongly, but is sound or gone by now: mistrust the memory or the disk", "dir", s.cfg.Dir, "table", name, "what", what)
		}
	}
	return err
}

// scrub checks all tables, or those in which Pebble met damage.
func (s *Store) scrub(ctx context.Context, pace func(context.Context, int) error, check Check, suspects map[string]string) (bytes uint64, err error) {
	levels, err := s.db.SSTables()
	if err != nil {
		return 0, readError(err)
	}
	readers := s.readerOptions()
	for _, level := range levels {
		for i := range level {
			name := tableName(&level[i])
			met := suspects[name]
			if suspects != nil && met == "" {
				continue
			}
			found := s.Corruptions()
			n, err := s.scrubTable(ctx, name, &level[i], readers, pace, check)
			bytes += n
			if err == nil && met != "" && level[i].Virtual && s.Corruptions() == found && s.live(&level[i]) {
				// The records of this part are sound; what leads to them may not be.
				err = s.replace(ctx, &level[i], met)
			}
			if err != nil {
				return bytes, err
			}
		}
	}
	return bytes, nil
}

// scrubTable checks one table.
func (s *Store) scrubTable(ctx context.Context, name string, info *pebble.SSTableInfo, options sstable.ReaderOptions, pace func(context.Context, int) error, check Check) (uint64, error) {
	path := filepath.Join(s.cfg.Dir, name)
	f, err := s.disk.Open(path, vfs.SequentialReadsOption)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // a compaction has replaced it
	}
	if err != nil {
		return 0, fmt.Errorf("scrub %s: %w", path, err)
	}
	paced := &pacedFile{File: f, ctx: ctx, pace: pace}
	readable, err := sstable.NewSimpleReadable(paced)
	if err != nil {
		return 0, errors.Join(fmt.Errorf("scrub %s: %w", path, err), f.Close())
	}
	t := newTable(info)
	t.check = check
	err = t.read(ctx, readable, options)
	switch {
	case paced.failed != nil:
		return paced.read, fmt.Errorf("scrub %s: %w", path, paced.failed)
	case ctx.Err() != nil:
		return paced.read, ctx.Err()
	case err == nil:
		return paced.read, nil
	}
	s.corruptions.Add(1)
	what := fmt.Sprintf("%s, which holds %x to %x: %s", path, info.Smallest.UserKey, info.Largest.UserKey, err)
	if t.records {
		return paced.read, s.replace(ctx, info, what)
	}
	return paced.read, s.quarantine(t.lower, t.upper, what)
}

// replace has a table written anew whose records are sound, but not what leads to them.
// Where that is impossible the records are taken for lost.
func (s *Store) replace(ctx context.Context, info *pebble.SSTableInfo, what string) error {
	met := s.Corruptions()
	err := s.rewrite(ctx, info)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		s.cfg.Logger.Error("a damaged table was written anew, its records were sound", "what", what)
		return nil
	case s.Corruptions() != met:
		return nil // it lies above or below a damaged one, which is inspected first
	}
	return s.quarantine(info.Smallest.UserKey, append(bytes.Clone(info.Largest.UserKey), 0), fmt.Sprintf("%s (%s)", what, err))
}

// table is what a scrub finds in a table.
type table struct {
	info  *pebble.SSTableInfo
	check Check
	// lower and upper are where damage was found. records is set when all records of
	// the table are sound.
	lower, upper []byte
	records      bool
}

func newTable(info *pebble.SSTableInfo) *table {
	return &table{info: info, lower: info.Smallest.UserKey, upper: append(bytes.Clone(info.Largest.UserKey), 0)}
}

// read checks a table and closes it. What is wrong with it is its error.
func (t *table) read(ctx context.Context, readable objstorage.Readable, options sstable.ReaderOptions) error {
	r, err := sstable.NewReader(ctx, readable, options)
	if err != nil {
		return errors.Join(err, readable.Close())
	}
	return errors.Join(t.readRecords(ctx, r), r.Close())
}

func (t *table) readRecords(ctx context.Context, r *sstable.Reader) error {
	last, err := t.walk(ctx, r, true)
	if err != nil {
		// The damage lies after the last sound key from the front and before the last
		// sound one from the back.
		if first, berr := t.walk(ctx, r, false); berr != nil && ctx.Err() == nil {
			t.between(last, first)
		}
		return err
	}
	if t.info.Virtual {
		return nil // the rest of the table's blocks are not the store's any more
	}
	if err := r.ValidateBlockChecksums(); err != nil {
		t.records = sound(r.NewRawRangeDelIter(ctx, sstable.NoFragmentTransforms, sstable.NoReadEnv)) && sound(r.NewRawRangeKeyIter(ctx, sstable.NoFragmentTransforms, sstable.NoReadEnv))
		return err
	}
	return nil
}

// sound closes what was opened, if it was.
func sound(it interface{ Close() }, err error) bool {
	if it != nil {
		it.Close()
	}
	return err == nil
}

// between narrows the damage to what lies between two sound keys. Both count as lost:
// older versions of them may be damaged, and the table can be cut there without reading
// what is damaged.
func (t *table) between(last, first []byte) {
	if last != nil {
		t.lower = last
	}
	if first != nil && bytes.Compare(first, t.lower) >= 0 {
		t.upper = append(first, 0)
	}
}

// walk reads a table's records, from one end or the other, and returns the last key
// before something is wrong.
func (t *table) walk(ctx context.Context, r *sstable.Reader, forward bool) (sound []byte, err error) {
	it, err := t.iterate(r)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	first, next := it.First, it.Next
	if !forward {
		first, next = it.Last, it.Prev
		if t.info.Virtual { // then Last panics
			first = seek(it.SeekLT, t.upper)
		}
	}
	for n, kv := 0, first(); kv != nil; n, kv = n+1, next() {
		if n%1024 == 1023 && ctx.Err() != nil {
			return sound, ctx.Err()
		}
		value, _, err := kv.Value(nil)
		if err != nil {
			return sound, err
		}
		if err := t.checkRecord(kv.K.Kind(), kv.K.UserKey, value); err != nil {
			return sound, err
		}
		sound = append(sound[:0], kv.K.UserKey...)
	}
	return sound, it.Error()
}

// iterate returns an iterator over the records of a table, or of this part of one.
func (t *table) iterate(r *sstable.Reader) (sstable.Iterator, error) {
	var lower, upper []byte
	if t.info.Virtual {
		lower, upper = t.lower, t.upper
	}
	return r.NewIter(sstable.NoTransforms, lower, upper, sstable.AssertNoBlobHandles)
}

// seek binds a seek, whose types have no public names, to a key.
func seek[F ~uint8, T any](to func([]byte, F) T, key []byte) func() T {
	return func() T { return to(key, 0) }
}

// checkRecord says what is wrong with a key and what is stored under it.
func (t *table) checkRecord(kind pebble.InternalKeyKind, key, value []byte) error {
	if len(key) == 0 || key[0] != kindRecord || kind != pebble.InternalKeyKindSet && kind != pebble.InternalKeyKindMerge {
		return nil
	}
	if len(key) < recordPrefixLen {
		return fmt.Errorf("%w: key %x", ErrCorrupt, key)
	}
	if _, err := record.Decode(value); err != nil {
		return fmt.Errorf("%w: record of key %x: %w", ErrCorrupt, key, err)
	}
	p := Place{binary.BigEndian.Uint32(key[1:]), binary.BigEndian.Uint32(key[5:])}
	if err := t.check(p, key[recordPrefixLen:]); err != nil {
		return fmt.Errorf("%w: record of key %x: %w", ErrCorrupt, key, err)
	}
	return nil
}

// pacedFile waits before it reads, and keeps what the file system or ctx said.
type pacedFile struct {
	vfs.File
	ctx    context.Context
	pace   func(context.Context, int) error
	read   uint64
	failed error
}

func (f *pacedFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.pace(f.ctx, len(b)); err != nil {
		f.failed = err
		return 0, err
	}
	n, err := f.File.ReadAt(b, off)
	f.read += uint64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		f.failed = err
	}
	return n, err
}
