package storage

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// smallDisk is a disk of a size that can be changed.
type smallDisk struct {
	*vfs.MemFS
	size atomic.Int64
}

func newSmallDisk(size int64) (*smallDisk, vfs.FS) {
	d := &smallDisk{MemFS: vfs.NewMem()}
	d.resize(size)
	return d, errorfs.Wrap(d, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileWrite && d.free() == 0 {
			return syscall.ENOSPC
		}
		return nil
	}))
}

func (d *smallDisk) resize(size int64) { d.size.Store(size) }

func (d *smallDisk) free() int64 {
	left := d.size.Load()
	names, _ := d.List("data")
	for _, n := range names {
		if info, err := d.Stat(filepath.Join("data", n)); err == nil {
			left -= info.Size()
		}
	}
	return max(0, left)
}

func (d *smallDisk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: uint64(d.free()), TotalBytes: uint64(d.size.Load())}, nil
}

// payload does not compress.
var payload = func() string {
	b := make([]byte, 10_000)
	rand.NewChaCha8([32]byte{}).Read(b)
	return string(b)
}()

// A disk that fills up makes the store refuse records and go on reading; with more
// space it takes them again, and sets some aside again first.
func TestFullDisk(t *testing.T) {
	for name, check := range map[string]bool{"noticed in time": true, "noticed too late": false} {
		t.Run(name, func(t *testing.T) {
			disk, fs := newSmallDisk(64 << 20)
			cfg := testConfig(t, fs)
			cfg.MemTableBytes = 4 << 20 // never full
			if check {
				cfg.MinFreeBytes = 46 << 20
			}
			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if s.RefusesRecords() != "" || !s.hasBallast() {
				t.Fatalf("a new store refuses: %q", s.RefusesRecords())
			}
			n := 0
			for ; s.RefusesRecords() == ""; n++ {
				put(t, s, write(fmt.Sprint(n), value(1, payload)))
				if check {
					s.CheckDisk()
				} else if n == 100 { // another program takes it all
					disk.resize(disk.size.Load() - disk.free())
				}
			}
			if s.hasBallast() != check {
				t.Errorf("the ballast is there: %v; %s", !check, s.RefusesRecords())
			}
			wantRecord(t, s, fmt.Sprint(n-1), value(1, payload))
			if err := s.SetMeta("topology", []byte("t")); err != nil {
				t.Errorf("what is not a record: %v", err)
			}
			disk.resize(disk.size.Load() - disk.free())
			s.CheckDisk()
			if s.RefusesRecords() == "" {
				t.Error("records are taken although nothing is free")
			}
			disk.resize(128 << 20)
			s.CheckDisk()
			if s.RefusesRecords() != "" || !s.hasBallast() {
				t.Fatalf("refuses with half of the disk free: %s", s.RefusesRecords())
			}
			put(t, s, write("more", value(1, "x")))
			closeStore(t, s)
			s = open(t, fs)
			defer closeStore(t, s)
			for i := range n {
				wantRecord(t, s, fmt.Sprint(i), value(1, payload))
			}
			if s.LostTail() != "" {
				t.Error(s.LostTail())
			}
		})
	}
}

// A store without room for a ballast starts, reads and refuses records.
func TestStartOnANearlyFullDisk(t *testing.T) {
	disk, fs := newSmallDisk(8 << 20)
	s := open(t, fs)
	put(t, s, write("a", value(1, "x")))
	closeStore(t, s)
	if err := disk.Remove(filepath.Join("data", ballastName)); err != nil {
		t.Fatal(err)
	}
	putFile(t, disk, "data/other", make([]byte, 4<<20))
	disk.resize(8<<20 - disk.free() + 64<<10)
	s = open(t, fs)
	defer closeStore(t, s)
	wantRecord(t, s, "a", value(1, "x"))
	if _, err := s.Apply([]Write{write("a", value(2, "x"))}, nil); !errors.Is(err, ErrDiskFull) {
		t.Errorf("error = %v, want ErrDiskFull", err)
	}
}

// A log that cannot be written ends the store: nothing is acknowledged, and nothing
// is committed from then on.
func TestFailedLogEndsTheStore(t *testing.T) {
	for name, fails := range map[string]func(op errorfs.Op) error{
		"write": func(op errorfs.Op) error {
			if op.Kind == errorfs.OpFileWrite && strings.HasSuffix(op.Path, ".log") {
				return syscall.ENOSPC
			}
			return nil
		},
		"sync": func(op errorfs.Op) error {
			if op.Kind == errorfs.OpFileSyncData && strings.HasSuffix(op.Path, ".log") {
				return syscall.EIO
			}
			return nil
		},
		"rotation": func(op errorfs.Op) error { // Pebble panics
			if (op.Kind == errorfs.OpCreate || op.Kind == errorfs.OpReuseForWrite) && strings.HasSuffix(op.Path, ".log") {
				return syscall.ENOSPC
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			var broken atomic.Bool
			cfg := testConfig(t, errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
				if broken.Load() {
					return fails(op)
				}
				return nil
			})))
			told, times := make(chan error, 1), atomic.Int32{}
			cfg.Fatal = func(err error) {
				if times.Add(1) == 1 {
					told <- err
				}
			}
			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			broken.Store(true)
			for i := 0; err == nil; i++ {
				if i > 1000 {
					t.Fatal("writes are acknowledged")
				}
				var c *Commit
				if c, err = s.Apply([]Write{write(fmt.Sprint(i), value(1, payload))}, nil); err == nil {
					err = c.Wait()
				}
			}
			if name != "rotation" {
				broken.Store(false) // must not help
			}
			text, advice := (<-told).Error(), "free space"
			if name == "sync" {
				advice = "mend the disk"
			}
			if !strings.Contains(text, "data directory data") || !strings.Contains(text, advice+", then start the node again") {
				t.Errorf("fatal error: %s", text)
			}
			if _, err := s.Apply([]Write{write("0", value(2, "x"))}, nil); err == nil {
				t.Error("a write after the failure is applied")
			}
			if err := s.SetMeta("a", nil); err == nil {
				t.Error("a setting after the failure is stored")
			}
			if err := s.DeleteHints([]Hint{{Seq: 1}}); err == nil {
				t.Error("a deletion after the failure is stored")
			}
			// What is visible may never come to disk.
			if err := s.Scan(1, []uint32{7}, nil, nil, func(uint32, []byte, []byte) bool { return true }); err == nil {
				t.Error("a scan after the failure shows what may not be on disk")
			}
			if rec, err := s.Get(1, 7, []byte("0")); err == nil {
				t.Errorf("a read after the failure shows %x", rec)
			}
			if err := s.Close(); err == nil {
				t.Error("the failure is not told at the end")
			}
			if times.Load() != 1 {
				t.Errorf("told %d times", times.Load())
			}
		})
	}
}

// A batch that Pebble refuses leaves nothing that readers would wait for.
func TestRefusedBatchIsForgotten(t *testing.T) {
	fs := vfs.NewMem()
	closeStore(t, open(t, fs))
	s := open(t, fs)
	defer closeStore(t, s)
	db := s.db
	s.db = readOnly(t, fs)
	if _, err := s.Apply([]Write{write("a", value(1, "x"))}, nil); !errors.Is(err, pebble.ErrReadOnly) {
		t.Errorf("error = %v, want ErrReadOnly", err)
	}
	if err := s.db.Close(); err != nil {
		t.Error(err)
	}
	s.db = db
	if _, err := s.Get(1, 7, []byte("a")); !errors.Is(err, ErrNotFound) {
		t.Errorf("error = %v, want ErrNotFound", err)
	}
	if err := s.Scan(1, []uint32{7}, nil, nil, func(uint32, []byte, []byte) bool { return true }); err != nil {
		t.Error(err)
	}
}

// readOnly opens a copy of a data directory without the right to write.
func readOnly(t *testing.T, fs vfs.FS) *pebble.DB {
	t.Helper()
	if ok, err := vfs.Clone(fs, fs, "data", "copy"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	db, err := pebble.Open("copy", &pebble.Options{FS: fs, ReadOnly: true, FormatMajorVersion: pebbleFormat, Merger: joinMerger})
	if err != nil {
		t.Fatal(err)
	}
	return db
}
