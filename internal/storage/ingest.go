package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
)

// incomingDir is where sorted files are written before the store takes them in. What a
// crash leaves there is deleted at the next start.
const incomingDir = "incoming"

// Ingest is a sorted file of records of one vnode on its way into the store. It is used
// by one goroutine, and ended by Finish or Abort.
//
// Its records join what the store has, as those of Apply do: the file holds Merges only,
// and is taken in beside what is there. (A Set in it would hide an older, greater
// record, and taking it in by excision would hide all.)
//
// REQUIRES: no certificate of the vnode is there or may come, as in a transition. Files
// do not look at it, as Apply does for repairs, and whoever promised does not wait for
// them.
type Ingest struct {
	store *Store
	place Place
	path  string
	w     *sstable.Writer
	keys  [][]byte // in the store
	size  int64
}

// NewIngest begins a file. Errors are ErrDiskFull and those of the file system.
func (s *Store) NewIngest(p Place) (*Ingest, error) {
	if err := s.failure(); err != nil {
		return nil, err
	}
	if s.diskFull.Load() != nil {
		return nil, ErrDiskFull
	}
	dir := filepath.Join(s.cfg.Dir, incomingDir)
	if err := s.cfg.FS.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", dir, noRoom(err))
	}
	path := filepath.Join(dir, fmt.Sprintf("%d.sst", s.ingests.Add(1)))
	f, err := s.cfg.FS.Create(path, "kvasir-ingest")
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, noRoom(err))
	}
	options := s.options()
	options.EnsureDefaults()
	// Written back bit by bit, or else the log's next sync waits for the whole file.
	f = vfs.NewSyncingFile(f, vfs.SyncingFileOptions{BytesPerSync: options.BytesPerSync})
	w := sstable.NewWriter(objstorageprovider.NewFileWritable(f), options.MakeWriterOptions(0, s.db.TableFormat()))
	return &Ingest{store: s, place: p, path: path, w: w}, nil
}

// Add adds a record. Errors are ErrCorrupt for one that does not decode, and those of
// the file system.
// REQUIRES: keys come in ascending order, each once.
func (i *Ingest) Add(key, rec []byte) error {
	if _, err := record.Decode(rec); err != nil {
		return fmt.Errorf("%w: record of key %q: %w", ErrCorrupt, key, err)
	}
	k := appendRecordKey(nil, i.place.Namespace, i.place.Vnode, key)
	add := i.w.Merge
	if mutant.On("ingested-sets") {
		add = i.w.Set
	}
	if err := add(k, rec); err != nil {
		return fmt.Errorf("write %s: %w", i.path, noRoom(err))
	}
	i.keys = append(i.keys, k)
	i.size += int64(len(key) + len(rec))
	return nil
}

// SizeBytes returns how many bytes of keys and records the file has.
func (i *Ingest) SizeBytes() int64 { return i.size }

// Len returns how many records the file has.
func (i *Ingest) Len() int { return len(i.keys) }

// Finish takes the file in. On return its records are visible, and on disk.
func (i *Ingest) Finish(ctx context.Context) error {
	s := i.store
	if err := i.w.Close(); err != nil {
		i.remove()
		return fmt.Errorf("write %s: %w", i.path, noRoom(err))
	}
	if len(i.keys) == 0 {
		i.remove()
		return nil
	}
	if err := s.checkPlace(ctx, i.keys[0]); err != nil {
		i.remove()
		return fmt.Errorf("take in %s: %w", i.path, err)
	}
	// No version may be taken for exact that does not know of these.
	defer s.latches.suspend(rangeOf(i.place)).resumeKeys(slices.Values(i.keys))
	if err := s.commit(func() error { return s.db.Ingest(ctx, []string{i.path}) }); err != nil {
		i.remove()
		return fmt.Errorf("take in %s: %w", i.path, noRoom(err))
	}
	s.unmark()
	for _, k := range i.keys { // after the records are visible, as in apply
		s.trees.touch(vnodeID{i.place.Namespace, i.place.Vnode}, k[recordPrefixLen:])
	}
	return nil
}

// checkPlace returns ErrCorrupt, and has a table inspected, if it cannot be read right
// where a file begins that is to be taken in. Where the log has records of its range, too,
// Pebble finds the file's level in a flush, which would begin anew without end.
func (s *Store) checkPlace(ctx context.Context, first []byte) error {
	levels, err := s.db.SSTables()
	if err != nil {
		return readError(err)
	}
	options := s.readerOptions()
	for _, level := range levels {
		for i := range level {
			t := &level[i]
			if bytes.Compare(t.Smallest.UserKey, first) > 0 || bytes.Compare(first, t.Largest.UserKey) > 0 {
				continue // its bounds tell all
			}
			err := s.probe(ctx, t, options, func(it sstable.Iterator) error {
				it.SeekGE(first, 0)
				return it.Error()
			})
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				s.corruptions.Add(1)
				s.mistrust(tableName(t), err.Error())
				return fmt.Errorf("%w: %s: %w", ErrCorrupt, tableName(t), err)
			}
		}
	}
	return nil
}

// Abort drops the file.
func (i *Ingest) Abort() {
	if err := i.w.Close(); err != nil {
		i.store.cfg.Logger.Debug("closing a file that is dropped", "path", i.path, "err", err)
	}
	i.remove()
}

func (i *Ingest) remove() {
	if err := i.store.cfg.FS.Remove(i.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		i.store.cfg.Logger.Warn("cannot delete a file that is dropped", "path", i.path, "err", err)
	}
}

// noRoom tells a full disk from other failures: nothing is lost that is not written.
func noRoom(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	return err
}

// dropIngests deletes what a crash has left of files that were not taken in.
func (s *Store) dropIngests() error {
	dir := filepath.Join(s.cfg.Dir, incomingDir)
	if err := s.cfg.FS.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
