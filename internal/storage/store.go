// Package storage keeps records, hints and what a node must remember, in one
// Pebble. It is the only place that implements the join on disk: every record
// enters through Apply or an Ingest, and none is ever overwritten in another way. It knows
// nothing of nodes, quorums or the network.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// Errors of this package. Others come from Pebble and the file system.
var (
	// ErrInUse: another process has the data directory open.
	ErrInUse = errors.New("data directory is in use by another process")
	// ErrNotOurs: the directory holds something else.
	ErrNotOurs = errors.New("not a Kvasir node's data directory")
	// ErrNewerFormat: the directory was written by newer software.
	ErrNewerFormat = errors.New("on-disk format is newer than this software")
	// ErrCorrupt: bytes on disk are not what was written.
	ErrCorrupt = errors.New("corrupt data")
	// ErrDiskFull: writes are refused because the disk is nearly full.
	ErrDiskFull = errors.New("disk is nearly full: free space, or add nodes")
	// ErrNotFound: there is no such entry.
	ErrNotFound = errors.New("not found")
)

// pebbleFormat is pinned: raising it is a decision, since older software cannot
// open the store afterwards.
const pebbleFormat = pebble.FormatValueSeparation

// stopWritesMemTables is how many memtables may fill before writes wait for a flush.
const stopWritesMemTables = 4

// formatName is the file that says what the directory is; formatLine its content.
const (
	formatName    = "FORMAT"
	formatPrefix  = "kvasir node "
	formatVersion = 1
)

// Config says where and how a store is kept. Fields without a remark are required.
type Config struct {
	// FS is the file system; vfs.Default in production.
	FS  vfs.FS
	Dir string
	// CacheBytes is the size of the block cache. Default 64 MiB.
	CacheBytes int64
	// RecordCacheBytes is the size of the cache of records that are read often. 0: none.
	RecordCacheBytes int64
	// MemTableBytes is the size of one memtable. Default 32 MiB.
	MemTableBytes uint64
	// VersionCacheEntries bounds the cache of versions. Default 131072.
	VersionCacheEntries int
	// TreeLeaves bounds the leaves of all hash trees, each of about 100 bytes for 128
	// records. Beyond it trees that were not used lately are built anew. Default 1 Mi.
	TreeLeaves int64
	// MarkInterval is how often the mark that vouches for the log is written while
	// there are commits. A lost tail of commits younger than this goes unnoticed
	// after a crash; a clean stop leaves no such window. Default 50 ms.
	MarkInterval time.Duration
	// MinFreeBytes is the free space below which CheckDisk has records refused. 0: a
	// twentieth of the disk, at most 1 GiB. Besides, a file BALLAST takes the
	// space of four memtables, at most a 16th of the disk; it is given up when space
	// runs out all the same.
	MinFreeBytes uint64
	Logger       *slog.Logger
	// SyncDelay, in simulations, is how long a commit's records are visible before
	// their sync begins, and how late what SetMeta stores is. A disk that is slow itself would stop virtual time: Pebble
	// writes to it under a lock.
	SyncDelay func() time.Duration
	// Fatal is called when the disk fails in a way the store cannot survive. It must
	// not return in production.
	Fatal func(error)
}

func (c *Config) setDefaults() {
	if c.CacheBytes == 0 {
		c.CacheBytes = 64 << 20
	}
	if c.MemTableBytes == 0 {
		c.MemTableBytes = 32 << 20
	}
	if c.VersionCacheEntries == 0 {
		c.VersionCacheEntries = 128 << 10
	}
	if c.TreeLeaves == 0 {
		c.TreeLeaves = 1 << 20
	}
	if c.MarkInterval == 0 {
		c.MarkInterval = 50 * time.Millisecond
	}
}

// Store is an open data directory. It is safe for concurrent use.
type Store struct {
	cfg Config
	// disk is cfg.FS as it was given; cfg.FS calls onDiskFull and watches the log.
	disk    vfs.FS
	db      *pebble.DB
	lock    *pebble.Lock
	mark    *markFile
	latches *latches
	trees   trees

	// unmarked is set when there are synced commits that the mark does not vouch for.
	unmarked atomic.Bool
	// toMark holds a token when unmarked was set.
	toMark   chan struct{}
	marking  sync.Mutex // held by writeMark
	lostTail string
	hintSeq  atomic.Uint64
	ingests  atomic.Uint64 // files that were begun
	// diskFull is why records are refused, failed why the store has ended, or nil.
	diskFull atomic.Pointer[string]
	failed   atomic.Pointer[error]
	// retryAt is when an operation last found no space, or damaged bytes.
	retryAt atomic.Pointer[time.Time]
	// damage is why the store must be given up; damaged is closed then.
	damage      atomic.Pointer[string]
	corruptions atomic.Uint64
	damaged     chan struct{}
	// suspects are tables in which damage was met, with what it was.
	suspects struct {
		sync.Mutex
		tables map[string]string
	}
	quarantines quarantines
	attention   chan struct{}
	// reads counts those of one key.
	reads struct{ cached, stored atomic.Uint64 }
	// rewriting holds a token while a table is written anew, stopRewrite ends that.
	rewriting   chan struct{}
	stopRewrite atomic.Pointer[context.CancelCauseFunc]

	opened atomic.Bool // from here on a failure of the log is fatal
	diskMu sync.Mutex  // held while the ballast is made or removed

	delays delays
	stalls stalls

	// inflight holds the commits that are visible and not yet on disk, with when their
	// sync began, or zero.
	inflight struct {
		sync.Mutex
		commits map[*Commit]time.Time
	}

	dirty dirtyMarks
	// promises lets a promise wait for the applies that began before it.
	promises    gate
	collections collections

	stop    chan struct{}
	stopped sync.WaitGroup
}

// Open opens a data directory, making it when it is missing or empty. Errors are
// ErrInUse, ErrNotOurs, ErrNewerFormat, ErrCorrupt, or the file system's; each
// names the path.
func Open(cfg Config) (*Store, error) {
	cfg.setDefaults()
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make data directory %s: %w", cfg.Dir, err)
	}
	lock, err := pebble.LockDirectory(cfg.Dir, cfg.FS)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("lock data directory %s: %w", cfg.Dir, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %s (%w)", ErrInUse, cfg.Dir, err)
	}
	s := &Store{cfg: cfg, disk: cfg.FS, lock: lock, latches: newLatches(cfg.VersionCacheEntries, cfg.RecordCacheBytes), stop: make(chan struct{}), toMark: make(chan struct{}, 1), damaged: make(chan struct{}), attention: make(chan struct{}, 1), rewriting: make(chan struct{}, 1)}
	s.latches.simulated = cfg.SyncDelay != nil
	s.suspects.tables = map[string]string{}
	s.inflight.commits = map[*Commit]time.Time{}
	s.trees.maxLeaves, s.trees.byVnode = cfg.TreeLeaves, map[vnodeID]*tree{}
	s.promises.init()
	s.collections.init()
	s.cfg.FS = logFS{vfs.OnDiskFull(cfg.FS, s.onDiskFull), s}
	if err := s.open(); err != nil {
		if s.db != nil {
			err = errors.Join(err, s.db.Close())
		}
		if s.mark != nil {
			err = errors.Join(err, s.mark.close())
		}
		return nil, errors.Join(err, lock.Close())
	}
	s.CheckDisk()
	s.stopped.Go(s.keepMark)
	return s, nil
}

func (s *Store) open() error {
	if into, err := asideInto(s.cfg.FS, s.cfg.Dir); err != nil {
		return err
	} else if into != "" {
		return fmt.Errorf("%w: the store in %s was on its way to %s", ErrCorrupt, s.cfg.Dir, into)
	}
	fresh, err := checkFormat(s.cfg.FS, s.cfg.Dir)
	if err != nil {
		return err
	}
	if fresh {
		// A new store's first log has no sync offsets, and so cannot tell a flipped
		// byte from its end. The second open starts a log that can.
		db, err := pebble.Open(s.cfg.Dir, s.options())
		if err != nil {
			return s.openError(err)
		}
		if err := db.Close(); err != nil {
			return fmt.Errorf("create store in %s: %w", s.cfg.Dir, err)
		}
	}
	if s.db, err = pebble.Open(s.cfg.Dir, s.options()); err != nil {
		return s.openError(err)
	}
	s.opened.Store(true)
	var markErr error
	if s.mark, markErr = openMark(s.cfg.FS, s.cfg.Dir); markErr != nil && !errors.Is(markErr, errNoMark) {
		return markErr
	}
	if err := s.checkTail(fresh, markErr); err != nil {
		return err
	}
	if fresh {
		if err := writeFormat(s.cfg.FS, s.cfg.Dir); err != nil {
			return err
		}
	}
	return errors.Join(s.dropIngests(), s.loadHintSeq(), s.loadDirty(), s.loadCollections(), s.loadQuarantines())
}

// metaBoots counts how often the directory was opened; metaTail is the number that
// the mark has too.
const (
	metaBoots = "boots"
	metaTail  = "tail"
)

// checkTail compares the store with the mark that vouches for its log. What it finds
// is in the mark before anything is written that could hide it.
func (s *Store) checkTail(fresh bool, markErr error) error {
	tail, err := s.counter(metaTail)
	if err != nil {
		return err
	}
	m := s.mark.load()
	switch {
	case fresh:
	case markErr != nil:
		s.lostTail = fmt.Sprintf("%s is missing or damaged, so nothing vouches for the write-ahead log", filepath.Join(s.cfg.Dir, markName))
	case m.damaged:
		s.lostTail = "damaged bytes were found in the store, so some of what it held is lost"
	case m.lostTail:
		s.lostTail = "the write-ahead log had lost its tail at an earlier start"
	case tail < m.tail:
		s.lostTail = fmt.Sprintf("the write-ahead log in %s ends at mark %d, but mark %d had been synced", s.cfg.Dir, tail, m.tail)
	}
	err = s.mark.update(func(m *mark) {
		m.lostTail = s.lostTail != ""
		m.tail = max(m.tail, tail)
	})
	if err != nil {
		return err
	}
	boots, err := s.Boots()
	if err != nil {
		return err
	}
	if err := s.setMeta(metaBoots, strconv.AppendUint(nil, boots+1, 10)); err != nil {
		return err
	}
	return s.writeMark()
}

// LostTail returns why the store may lack records that it had acknowledged, or ""
// when it has them all. Such a store must not vote in any quorum; it stays so for
// good. SetAside makes room for another.
func (s *Store) LostTail() string { return s.lostTail }

// Boots returns how often the directory has been opened, this time included.
func (s *Store) Boots() (uint64, error) { return s.counter(metaBoots) }

// counter returns a number that is kept under a name, 0 if none is.
func (s *Store) counter(name string) (uint64, error) {
	b, err := s.Meta(name)
	if errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %s is %q in %s", ErrCorrupt, name, b, s.cfg.Dir)
	}
	return n, nil
}

// Reserved returns the greatest timestamp that ReserveClock has made durable.
func (s *Store) Reserved() hlc.Timestamp { return s.mark.load().reserved }

// ReserveClock returns when it is on disk that timestamps up to t may have been
// issued.
func (s *Store) ReserveClock(t hlc.Timestamp) error {
	return s.mark.update(func(m *mark) { m.reserved = max(m.reserved, t) })
}

// unmark notes that there are synced commits that the mark does not vouch for.
func (s *Store) unmark() {
	if s.unmarked.Load() || s.unmarked.Swap(true) {
		return // what clears it comes after the sync of the caller's commit
	}
	select {
	case s.toMark <- struct{}{}:
	default:
	}
}

// keepMark writes the mark an interval after the first commit that it does not vouch for,
// and now and then while there are none: else nobody would notice that the disk of an idle
// node has gone.
func (s *Store) keepMark() {
	due := time.NewTimer(proveInterval)
	defer due.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-s.toMark:
			due.Reset(s.cfg.MarkInterval)
			continue
		case <-due.C:
		}
		rest, err := time.Duration(0), s.writeMark()
		if err == nil {
			rest, err = s.mark.prove(proveInterval)
		}
		if err != nil {
			s.fatal(err)
			return
		}
		due.Reset(rest)
	}
}

// writeMark has the mark vouch for all commits that are synced.
func (s *Store) writeMark() error {
	s.marking.Lock()
	defer s.marking.Unlock()
	if !s.unmarked.Swap(false) {
		return nil
	}
	tail := s.mark.load().tail + 1
	err := s.commit(func() error {
		return s.db.Set(metaKey(metaTail), strconv.AppendUint(nil, tail, 10), pebble.Sync)
	})
	if err != nil {
		return err
	}
	return s.mark.update(func(m *mark) { m.tail = tail })
}

// DiskUsage returns the space of the file system the store is on, in bytes.
func (s *Store) DiskUsage() (available, total uint64, err error) {
	u, err := s.cfg.FS.GetDiskUsage(s.cfg.Dir)
	return u.AvailBytes, u.TotalBytes, err
}

// Metrics returns Pebble's own figures.
func (s *Store) Metrics() *pebble.Metrics { return s.db.Metrics() }

// Close waits for commits to reach the disk and closes the directory.
// REQUIRES: no other call is running or follows.
func (s *Store) Close() error {
	close(s.stop)
	s.stopped.Wait()
	// Unsynced entries, such as deleted hints, become durable with this one.
	err := s.commit(func() error { return s.db.LogData(nil, pebble.Sync) })
	return errors.Join(err, s.writeMark(), s.db.Close(), s.mark.close(), s.lock.Close())
}

func (s *Store) options() *pebble.Options {
	o := &pebble.Options{
		FS:                 s.cfg.FS,
		Lock:               s.lock,
		FormatMajorVersion: pebbleFormat,
		Merger:             joinMerger,
		CacheSize:          s.cfg.CacheBytes,
		MemTableSize:       s.cfg.MemTableBytes,
		Logger:             pebbleLogger{s},
		EventListener: &pebble.EventListener{
			BackgroundError: s.backgroundError,
			DataCorruption:  s.suspect,
			FlushEnd:        s.flushed,
			WriteStallBegin: func(pebble.WriteStallBeginInfo) { s.stalls.begin(time.Now()) },
			WriteStallEnd:   func() { s.stalls.end(time.Now()) },
		},
		MemTableStopWritesThreshold: stopWritesMemTables,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       20,
		LBaseMaxBytes:               64 << 20,
	}
	o.Experimental.CompactionScheduler = newScheduler(s.pause)
	for i := range o.Levels {
		// Filters on the last level too: a miss must not cost a read.
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	return o
}

// openError says which file keeps the store from opening.
func (s *Store) openError(err error) error {
	switch {
	case strings.Contains(err.Error(), "format major version"), strings.Contains(err.Error(), "unknown to this version"):
		return fmt.Errorf("%w: %s: %w", ErrNewerFormat, s.cfg.Dir, err)
	case pebble.IsCorruptionError(err), errors.Is(err, record.ErrCorrupt):
		return fmt.Errorf("%w in %s: %w", ErrCorrupt, s.cfg.Dir, err)
	}
	if strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		return fmt.Errorf("open store in %s: %w: free space, then start the node again; nothing acknowledged is lost", s.cfg.Dir, err)
	}
	return fmt.Errorf("open store in %s: %w", s.cfg.Dir, err)
}

// checkFormat reports whether the directory is new. A directory with files but
// without a format file is new if making it was interrupted, which leaves nothing
// but an empty store.
func checkFormat(disk vfs.FS, dir string) (fresh bool, err error) {
	path := filepath.Join(dir, formatName)
	f, err := disk.Open(path)
	if err == nil {
		b, err := io.ReadAll(io.LimitReader(f, 256))
		if err = errors.Join(err, f.Close()); err != nil {
			return false, fmt.Errorf("read %s: %w", path, err)
		}
		return false, parseFormat(path, string(b))
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("open %s: %w", path, err)
	}
	names, err := disk.List(dir)
	if err != nil {
		return false, fmt.Errorf("list %s: %w", dir, err)
	}
	for _, n := range names {
		if !ownFile(n) {
			return false, fmt.Errorf("%w: %s holds %s but no %s file", ErrNotOurs, dir, n, formatName)
		}
	}
	return true, nil
}

func parseFormat(path, line string) error {
	digits, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), formatPrefix)
	if !ok {
		return fmt.Errorf("%w: %s reads %q", ErrNotOurs, path, line)
	}
	v, err := strconv.Atoi(digits)
	switch {
	case err != nil || v < 1:
		return fmt.Errorf("%w: %s reads %q", ErrCorrupt, path, line)
	case v > formatVersion:
		return fmt.Errorf("%w: %s says format %d, this software knows %d", ErrNewerFormat, path, v, formatVersion)
	}
	return nil
}

func writeFormat(disk vfs.FS, dir string) error {
	return writeFile(disk, dir, formatName, fmt.Sprint(formatPrefix, formatVersion))
}

// writeFile writes a file of one line, which is there whole or not at all.
func writeFile(disk vfs.FS, dir, name, line string) error {
	path := filepath.Join(dir, name)
	f, err := disk.Create(path+".tmp", vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	_, err = fmt.Fprintln(f, line)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := disk.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("rename %s: %w", path, err)
	}
	return syncDir(disk, dir)
}

// ownFile reports whether a file is one that opening a new store leaves.
func ownFile(name string) bool {
	for _, ext := range []string{".log", ".sst", ".blob", ".dbtmp", ".tmp"} {
		if strings.HasSuffix(name, ext) {
			return true
		}
	}
	for _, prefix := range []string{"MANIFEST-", "OPTIONS-", "CURRENT", "LOCK", "marker.", markName, ballastName, asidePrefix} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return name == "lost+found"
}

// pebbleLogger passes Pebble's messages on; its fatal ones end the store.
type pebbleLogger struct{ s *Store }

func (l pebbleLogger) Infof(format string, args ...any) {
	if l.s.cfg.Logger.Enabled(context.Background(), slog.LevelDebug) {
		l.s.cfg.Logger.Debug("pebble: " + fmt.Sprintf(format, args...))
	}
}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.s.cfg.Logger.Error("pebble: " + fmt.Sprintf(format, args...))
}

func (l pebbleLogger) Fatalf(format string, args ...any) {
	l.s.diskFailed(fmt.Errorf(format, args...))
}
