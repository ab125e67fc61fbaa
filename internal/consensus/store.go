package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
)

// pebbleFormat is the format of the files, below the layout of format.go. Raising
// it keeps earlier releases from opening the store.
const pebbleFormat = pebble.FormatValueSeparation

// errNotFound has the text by which Raft recognizes that a stable value is missing.
var errNotFound = errors.New("not found")

// errLostTail: the store may lack entries and votes that it had acknowledged.
var errLostTail = errors.New("entries or votes are missing that this server had given its word for")

// store is Raft's log, its stable store (term and vote) and its snapshots. Every
// write is synced before it returns. It is safe for concurrent use.
//
// Invariant 1: the log's entries are contiguous. The first one is entry 1, or one at
// or before the index of the newest snapshot; that index is in the log.
// Invariant 2: no entry at or below the newest snapshot's index contradicts it.
// Invariant 3: mark.commits is at most the number of commits that are synced, and
// equals it between two commits.
type store struct {
	dir   string
	fatal func(error)
	db    *pebble.DB
	mark  *mark
	// committing holds one token; who has it may commit, and use mark.
	committing chan struct{}
	// users counts the calls that use db.
	users sync.WaitGroup
	// saving holds one token; who has it may add a snapshot. It is no mutex, as the
	// holder writes to disk.
	saving chan struct{}
	mu     struct {
		sync.Mutex
		closed bool
		// first and last are the indexes of the log's ends, 0 when it is empty.
		first, last uint64
		// base is the index of the newest snapshot, 0 without one.
		base uint64
	}
}

// openStore opens or creates the store in dir. Failures that leave it unknown
// what is on disk go to fatal.
func openStore(fsys vfs.FS, dir string, logger *slog.Logger, fatal func(error)) (*store, error) {
	failed := func(err error) { fatal(diskError(dir, err)) }
	// Pebble may crash over a full disk before it says so.
	fsys = vfs.OnDiskFull(fsys, func() { failed(syscall.ENOSPC) })
	db, err := openPebble(fsys, dir, logger, failed)
	if err != nil {
		return nil, err
	}
	s := &store{dir: dir, fatal: failed, db: db, committing: make(chan struct{}, 1), saving: make(chan struct{}, 1)}
	s.committing <- struct{}{}
	s.saving <- struct{}{}
	if err := s.load(fsys); err != nil {
		return nil, errors.Join(fmt.Errorf("consensus: store in %s: %w", dir, err), s.close())
	}
	return s, nil
}

// openPebble opens the database, and creates it first where there is none. A
// write-ahead log that was begun below the newest format says nothing about how
// far it was synced, so that damage in its middle looks like its end. Such a log
// is written by the first opening only, hence a second one before anything is
// stored.
func openPebble(fsys vfs.FS, dir string, logger *slog.Logger, fatal func(error)) (*pebble.DB, error) {
	opts := &pebble.Options{
		FS:                 fsys,
		FormatMajorVersion: pebbleFormat,
		MaxOpenFiles:       100,
		Logger:             pebbleLogger{dir, logger, fatal},
	}
	found, err := pebble.Peek(dir, fsys)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		found = &pebble.DBDesc{}
	case err != nil:
		return nil, fmt.Errorf("consensus: store in %s: %w", dir, err)
	case found.FormatMajorVersion > pebbleFormat:
		return nil, fmt.Errorf("consensus: store in %s was written by a newer release (files of format %d, this release reads up to %d)", dir, found.FormatMajorVersion, pebbleFormat)
	}
	if !found.Exists || found.FormatMajorVersion < pebbleFormat {
		db, err := pebble.Open(dir, opts)
		if err != nil {
			return nil, openError(dir, err)
		}
		if err := db.Close(); err != nil {
			return nil, fmt.Errorf("consensus: creating the store in %s: %w", dir, err)
		}
	}
	db, err := pebble.Open(dir, opts)
	if err != nil {
		return nil, openError(dir, err)
	}
	return db, nil
}

func openError(dir string, err error) error {
	if errors.Is(err, syscall.EAGAIN) || strings.Contains(err.Error(), "lock held by current process") {
		return fmt.Errorf("consensus: store in %s is in use by another process: %w", dir, err)
	}
	return fmt.Errorf("consensus: store in %s: %w", dir, err)
}

// load checks the store's format and its mark, and finds the ends of the log.
func (s *store) load(fsys vfs.FS) error {
	format, err := s.get([]byte{prefixFormat})
	fresh := errors.Is(err, pebble.ErrNotFound)
	switch {
	case fresh:
		if err := s.checkUnused(); err != nil {
			return err
		}
	case err != nil:
		return err
	case len(format) != 1 || format[0] == 0:
		return errMalformed
	case format[0] > storeFormat:
		return fmt.Errorf("it was written by a newer release (format %d, this release reads up to %d)", format[0], storeFormat)
	}
	if err := s.checkTail(fsys, fresh); err != nil {
		return err
	}
	if fresh {
		b := s.db.NewBatch()
		defer b.Close()
		if err := errors.Join(b.Set([]byte{prefixFormat}, []byte{storeFormat}, nil), s.commit(b)); err != nil {
			return err
		}
	}
	if s.mu.first, s.mu.last, err = s.logEnds(); err != nil {
		return err
	}
	ids, err := s.snapshotIDs()
	if len(ids) > 0 {
		s.mu.base = ids[0].index
	}
	return err
}

// checkUnused tells whether an empty database is about to become a store of ours.
func (s *store) checkUnused() error {
	it, err := s.db.NewIter(nil)
	if err != nil {
		return err
	}
	used := it.First()
	if err := it.Close(); err != nil {
		return err
	}
	if used {
		return errors.New("the directory holds a database of another kind")
	}
	return nil
}

// checkTail compares the database with the mark. A fresh one gets its mark before
// anything is written, so that only a mark of 0, or none, can go with an empty one.
func (s *store) checkTail(fsys vfs.FS, fresh bool) error {
	commits, err := s.commits()
	if err != nil {
		return err
	}
	var found bool
	if s.mark, found, err = openMark(fsys, s.dir); err != nil {
		return err
	}
	switch {
	case fresh && !found:
		return s.mark.write(0)
	case !found:
		return fmt.Errorf("%w: the file %s is missing or damaged, so nothing vouches for the write-ahead log", errLostTail, markName)
	case commits < s.mark.commits:
		return fmt.Errorf("%w: the write-ahead log ends at commit %d, but commit %d had been synced", errLostTail, commits, s.mark.commits)
	case commits > s.mark.commits:
		return s.mark.write(commits)
	}
	return nil
}

// commits returns how many commits the database holds.
func (s *store) commits() (uint64, error) {
	value, err := s.get([]byte{prefixCommits})
	switch {
	case errors.Is(err, pebble.ErrNotFound):
		return 0, nil
	case err != nil:
		return 0, err
	case len(value) != 8:
		return 0, errMalformed
	}
	return binary.BigEndian.Uint64(value), nil
}

func (s *store) logEnds() (first, last uint64, err error) {
	it, err := s.iterate(prefixSpan(prefixLog))
	if err != nil {
		return 0, 0, err
	}
	if it.First() {
		first = binary.BigEndian.Uint64(it.Key()[1:])
	}
	if it.Last() {
		last = binary.BigEndian.Uint64(it.Key()[1:])
	}
	return first, last, it.Close()
}

// close waits for the calls under way. Later ones fail with ErrClosed: the library
// has a goroutine, for a metric, that reads the log and that it does not wait for.
func (s *store) close() error {
	s.mu.Lock()
	closed := s.mu.closed
	s.mu.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.users.Wait()
	err := s.db.Close()
	if s.mark != nil {
		err = errors.Join(err, s.mark.file.Close())
	}
	if err != nil {
		return fmt.Errorf("consensus: closing the store in %s: %w", s.dir, err)
	}
	return nil
}

// use keeps the database open until users.Done.
func (s *store) use() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return ErrClosed
	}
	s.users.Add(1)
	return nil
}

// get returns a copy of a value, or pebble.ErrNotFound.
func (s *store) get(key []byte) ([]byte, error) {
	if err := s.use(); err != nil {
		return nil, err
	}
	defer s.users.Done()
	value, closer, err := s.db.Get(key)
	if err != nil {
		return nil, err
	}
	value = append([]byte(nil), value...)
	return value, closer.Close()
}

// diskError says what to do about a write that failed.
func diskError(dir string, err error) error {
	advice := "check the disk"
	if errors.Is(err, syscall.ENOSPC) {
		advice = "the disk is full: free space"
	}
	return fmt.Errorf("consensus: store in %s cannot be written: %w: %s, then start this server again; nothing acknowledged is lost", dir, err, advice)
}

// commit applies a batch durably: the batch first, then the mark (invariant 3).
// A failure is fatal, as what is on disk is unknown after it. The batch is the
// caller's to close.
func (s *store) commit(b *pebble.Batch) error {
	if err := s.use(); err != nil {
		return err
	}
	defer s.users.Done()
	<-s.committing
	defer func() { s.committing <- struct{}{} }()
	commits := s.mark.commits + 1
	if err := b.Set([]byte{prefixCommits}, binary.BigEndian.AppendUint64(nil, commits), nil); err != nil {
		return err
	}
	err := commitBatch(b)
	if err == nil {
		err = s.mark.write(commits)
	}
	if err != nil {
		s.fatal(err)
	}
	return err
}

// commitBatch turns the panic by which Pebble reports some failed writes into an error.
func commitBatch(b *pebble.Batch) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("pebble: %v", p)
		}
	}()
	return b.Commit(pebble.Sync)
}

func (s *store) iterate(over span) (*pebble.Iterator, error) {
	return s.db.NewIter(&pebble.IterOptions{LowerBound: over.lower, UpperBound: over.upper})
}

// FirstIndex implements raft.LogStore.
func (s *store) FirstIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.first, nil
}

// LastIndex implements raft.LogStore.
func (s *store) LastIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.last, nil
}

// GetLog implements raft.LogStore. The error for a missing entry is
// raft.ErrLogNotFound itself, as Raft compares it.
func (s *store) GetLog(index uint64, out *raft.Log) error {
	value, err := s.get(logKey(index))
	if errors.Is(err, pebble.ErrNotFound) {
		return raft.ErrLogNotFound
	}
	if err != nil {
		return fmt.Errorf("consensus: reading log entry %d: %w", index, err)
	}
	*out, err = decodeEntry(value)
	if err != nil {
		return fmt.Errorf("consensus: reading log entry %d in %s: %w", index, s.dir, err)
	}
	out.Index = index
	return nil
}

// StoreLog implements raft.LogStore.
func (s *store) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. The entries must follow the last one
// (invariant 1); an empty log takes any. All of them are stored or none.
func (s *store) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	last, _ := s.LastIndex()
	b := s.db.NewBatch()
	defer b.Close()
	for _, l := range logs {
		if last != 0 && l.Index != last+1 || l.Index == 0 {
			return fmt.Errorf("consensus: log entry %d cannot follow entry %d (invariant 1)", l.Index, last)
		}
		last = l.Index
		if err := b.Set(logKey(l.Index), encodeEntry(l), nil); err != nil {
			return fmt.Errorf("consensus: storing log entry %d: %w", l.Index, err)
		}
	}
	if err := s.commit(b); err != nil {
		return fmt.Errorf("consensus: storing log entries up to %d: %w", last, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.first == 0 {
		s.mu.first = logs[0].Index
	}
	s.mu.last = last
	return nil
}

// DeleteRange implements raft.LogStore: it deletes the entries from first to last,
// both included, at one end of the log or the other. From a range that holds the
// entry at the newest snapshot's index, it spares that one and what follows
// (invariant 1): Raft may compact with it, but what it still holds of a log that
// contradicted a snapshot hangs on that entry. See replaceLog.
func (s *store) DeleteRange(first, last uint64) error {
	s.mu.Lock()
	from, to, base := s.mu.first, s.mu.last, s.mu.base
	s.mu.Unlock()
	if to == 0 {
		return nil
	}
	first, last = max(first, from), min(last, to)
	if first <= base && base <= last {
		last = base - 1
	}
	if first > last {
		return nil
	}
	if first > from && last < to {
		return fmt.Errorf("consensus: deleting log entries %d to %d would leave a gap between %d and %d (invariant 1)", first, last, from, to)
	}
	b := s.db.NewBatch()
	defer b.Close()
	gone := logSpan(first, last)
	if err := b.DeleteRange(gone.lower, gone.upper, nil); err != nil {
		return fmt.Errorf("consensus: deleting log entries %d to %d: %w", first, last, err)
	}
	if err := s.commit(b); err != nil {
		return fmt.Errorf("consensus: deleting log entries %d to %d: %w", first, last, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// The log may have grown meanwhile: Raft compacts beside its main goroutine.
	switch {
	case first == s.mu.first && last == s.mu.last:
		s.mu.first, s.mu.last = 0, 0
	case first == s.mu.first:
		s.mu.first = last + 1
	case last == s.mu.last:
		s.mu.last = first - 1
	}
	return nil
}

// Set implements raft.StableStore.
func (s *store) Set(name, value []byte) error {
	b := s.db.NewBatch()
	defer b.Close()
	if err := b.Set(stableKey(name), value, nil); err != nil {
		return fmt.Errorf("consensus: storing %s: %w", name, err)
	}
	if err := s.commit(b); err != nil {
		return fmt.Errorf("consensus: storing %s: %w", name, err)
	}
	return nil
}

// Get implements raft.StableStore. The error for a missing value reads "not found".
func (s *store) Get(name []byte) ([]byte, error) {
	value, err := s.get(stableKey(name))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, errNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("consensus: reading %s: %w", name, err)
	}
	return value, nil
}

// SetUint64 implements raft.StableStore.
func (s *store) SetUint64(name []byte, value uint64) error {
	return s.Set(name, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 implements raft.StableStore. The error for a missing value reads "not
// found".
func (s *store) GetUint64(name []byte) (uint64, error) {
	value, err := s.Get(name)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("consensus: reading %s: %w", name, errMalformed)
	}
	return binary.BigEndian.Uint64(value), nil
}

// setGroup keeps the group of the servers.
func (s *store) setGroup(group string) error {
	b := s.db.NewBatch()
	defer b.Close()
	if err := b.Set([]byte{prefixGroup}, []byte(group), nil); err != nil {
		return err
	}
	return s.commit(b)
}

// group returns the group of the servers, empty where they have none.
func (s *store) group() (string, error) {
	value, err := s.get([]byte{prefixGroup})
	if errors.Is(err, pebble.ErrNotFound) {
		return "", nil
	}
	return string(value), err
}

// clearStable forgets term and vote.
func (s *store) clearStable() error {
	b := s.db.NewBatch()
	defer b.Close()
	all := prefixSpan(prefixStable)
	if err := b.DeleteRange(all.lower, all.upper, nil); err != nil {
		return err
	}
	return s.commit(b)
}
