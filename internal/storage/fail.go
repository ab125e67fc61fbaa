package storage

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Invariant: once Config.Fatal was called, no commit succeeds.

// fatal ends the store: what is on disk is all that counts from here on.
func (s *Store) fatal(err error) error {
	err = fmt.Errorf("data directory %s: %w", s.cfg.Dir, err)
	if s.failed.CompareAndSwap(nil, &err) {
		s.cfg.Fatal(err)
	}
	return err
}

// diskFailed ends the store because the disk does not take what must be on it. A
// sync that failed may succeed the next time without the data being on disk, so it
// is never tried again.
func (s *Store) diskFailed(err error) error {
	advice := "mend the disk"
	if strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		advice = "free space"
	}
	return s.fatal(fmt.Errorf("%w: %s, then start the node again; nothing acknowledged is lost", err, advice))
}

// failure returns what Config.Fatal was called with, or nil.
func (s *Store) failure() error {
	if failed := s.failed.Load(); failed != nil {
		return *failed
	}
	return nil
}

// commit runs one of Pebble's commits, unless the store has ended, before or
// meanwhile.
func (s *Store) commit(apply func() error) error {
	if err := s.failure(); err != nil {
		return err
	}
	err := apply()
	if failed := s.failure(); failed != nil {
		return failed
	}
	return err
}

// stallLimit is how long commits may wait for compactions that fail. Damage is cut out
// long before; once they wait, nothing can be.
const stallLimit = 2 * time.Minute

// backgroundError is told why a flush or compaction failed; Pebble tries it again.
func (s *Store) backgroundError(err error) {
	switch {
	case !errors.Is(err, syscall.ENOSPC):
		if stop := s.stopRewrite.Load(); stop != nil {
			(*stop)(err)
		}
		s.cfg.Logger.Error("flush or compaction failed", "dir", s.cfg.Dir, "err", err)
		if s.stalls.present(time.Now()) > stallLimit {
			s.giveUp(fmt.Sprintf("no more can be written: %s", err))
		}
	case !s.opened.Load():
		s.diskFailed(err) // opening would wait for it without end
	default: // refuse has told
		s.cfg.Logger.Debug("no space for a flush or compaction", "dir", s.cfg.Dir, "err", err)
	}
}

// flushed is told of the end of a flush. What was taken in as a file finds its level in
// one, and damage met there (see checkPlace) cannot be cut out: that begins with a flush.
func (s *Store) flushed(info pebble.FlushInfo) {
	if info.Err != nil && info.Ingest && pebble.IsCorruptionError(info.Err) {
		s.giveUp(fmt.Sprintf("no file can be taken in: %s", info.Err))
	}
}

// logFS ends the store where its write-ahead log fails. Pebble would panic, partly
// with locks that nobody can open again; so where Config.Fatal returns, as in tests,
// Pebble is told that all went well, and commit refuses what it makes of that.
type logFS struct {
	vfs.FS
	store *Store
}

func (l logFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if strings.HasSuffix(name, ".sst") {
		l.store.pause()
	}
	f, err := l.FS.Create(name, category)
	return l.watch(name, f, err)
}

// Open waits before a table is read through, or opened again that was damaged. A
// compaction that fails on the first block it reads creates no table; Pebble begins the
// next attempt at once. So it does where it wants to know how much a table has that came
// as a whole.
func (l logFS) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	if strings.HasSuffix(name, ".sst") && (slices.Contains(opts, vfs.SequentialReadsOption) || l.store.suspected(filepath.Base(name))) {
		l.store.pause()
	}
	return l.FS.Open(name, opts...)
}

func (l logFS) ReuseForWrite(old, name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := l.FS.ReuseForWrite(old, name, category)
	return l.watch(name, f, err)
}

func (l logFS) watch(name string, f vfs.File, err error) (vfs.File, error) {
	if !strings.HasSuffix(name, ".log") {
		return f, err
	}
	if err != nil {
		if err = l.store.checkLog(err); err != nil {
			return nil, err
		}
		return vfs.NewMem().Create("nowhere", vfs.WriteCategoryUnspecified)
	}
	return logFile{f, l.store}, nil
}

// checkLog ends the store if an operation on its log failed, and returns the error
// if it is still being opened.
func (s *Store) checkLog(err error) error {
	if err == nil || !s.opened.Load() {
		return err
	}
	s.diskFailed(fmt.Errorf("write-ahead log: %w", err))
	return nil
}

// logFile is a file of the write-ahead log.
type logFile struct {
	vfs.File
	store *Store
}

func (f logFile) Write(b []byte) (int, error) {
	if n, err := f.File.Write(b); err != nil {
		return n, f.store.checkLog(err)
	}
	return len(b), nil
}

func (f logFile) Sync() error     { return f.store.checkLog(f.File.Sync()) }
func (f logFile) SyncData() error { return f.store.checkLog(f.File.SyncData()) }
func (f logFile) Close() error    { return f.store.checkLog(f.File.Close()) }

func (f logFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	return full, f.store.checkLog(err)
}
