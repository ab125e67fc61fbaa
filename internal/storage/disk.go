package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A full disk is met twice. CheckDisk refuses records before the last space is
// used. Space may be gone sooner, taken by another program or by a log file that is
// allocated ahead: then the operation that found none makes room by removing the
// ballast, and is tried again. What is left goes to what had begun; records are
// refused until there is a ballast again.

// ballastName is a file that does nothing but take space.
const ballastName = "BALLAST"

// maxMinFreeBytes bounds the default of Config.MinFreeBytes.
const maxMinFreeBytes = 1 << 30

// RefusesRecords returns why Apply returns ErrDiskFull at present, or "".
func (s *Store) RefusesRecords() string {
	if p := s.diskFull.Load(); p != nil {
		return *p
	}
	return ""
}

// CheckDisk makes Apply refuse records when little space is left, and take them
// again once there is enough and the ballast is in place. It is to be called every
// second.
func (s *Store) CheckDisk() {
	available, total, err := s.DiskUsage()
	if err != nil || total == 0 {
		return
	}
	// Room for all memtables, so that commits that wait for a flush can end.
	ballast := min(total/16, stopWritesMemTables*s.cfg.MemTableBytes)
	least := s.cfg.MinFreeBytes
	if least == 0 {
		least = min(total/20, maxMinFreeBytes)
	}
	s.diskMu.Lock()
	defer s.diskMu.Unlock()
	kept := s.hasBallast()
	// Some more than the least is needed to go on, lest the two take turns.
	if !kept || s.diskFull.Load() != nil {
		least += ballast
	}
	if available < least {
		s.refuse(fmt.Sprintf("%d MiB are free, %d are needed", available>>20, least>>20))
		return
	}
	if !kept {
		if err := s.makeBallast(ballast); err != nil {
			s.refuse(fmt.Sprintf("no space can be set aside: %s", err))
			return
		}
	}
	if s.diskFull.Swap(nil) != nil {
		s.cfg.Logger.Info("writes are taken again", "dir", s.cfg.Dir, "available_bytes", available)
	}
}

// refuse makes Apply refuse records.
func (s *Store) refuse(reason string) {
	if s.diskFull.Swap(&reason) == nil {
		s.cfg.Logger.Warn("writes are refused: free space or add nodes", "dir", s.cfg.Dir, "reason", reason)
	}
}

// onDiskFull is called by the file system while an operation that found no space
// waits to be tried again.
func (s *Store) onDiskFull() {
	s.diskMu.Lock()
	defer s.diskMu.Unlock()
	if err := s.disk.Remove(s.ballastPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.cfg.Logger.Error("cannot give up the ballast", "dir", s.cfg.Dir, "err", err)
	}
	s.refuse("an operation found no space left")
	now := time.Now()
	s.retryAt.Store(&now)
}

// pause keeps flushes and compactions that found no space or damage from trying
// again at once, unless the store is being closed: nobody waits for them then.
func (s *Store) pause() {
	at := s.retryAt.Load()
	if at == nil {
		return
	}
	rest := time.NewTimer(time.Until(at.Add(time.Second)))
	defer rest.Stop()
	select {
	case <-s.stop:
	case <-rest.C:
	}
}

func (s *Store) ballastPath() string { return filepath.Join(s.cfg.Dir, ballastName) }

func (s *Store) hasBallast() bool {
	_, err := s.disk.Stat(s.ballastPath())
	return err == nil
}

// makeBallast takes the space, by asking for it where the file system then keeps it,
// else by writing what does not compress.
func (s *Store) makeBallast(size uint64) error {
	f, err := s.disk.Create(s.ballastPath(), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	before, _, _ := s.DiskUsage()
	err = f.Preallocate(0, int64(size))
	if after, _, _ := s.DiskUsage(); err != nil || after+size/2 > before {
		err = writeBallast(f, size)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, s.disk.Remove(s.ballastPath()))
	}
	return nil
}

func writeBallast(f vfs.File, size uint64) error {
	chunk := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(chunk)
	for size > 0 {
		n := min(size, uint64(len(chunk)))
		if _, err := f.Write(chunk[:n]); err != nil {
			return err
		}
		size -= n
	}
	return nil
}
