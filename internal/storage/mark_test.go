package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
)

func readFile(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func putFile(t *testing.T, fs vfs.FS, name string, b []byte) {
	t.Helper()
	f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// newestLog returns the path of the log that is being written.
func newestLog(t *testing.T, fs vfs.FS) string {
	t.Helper()
	names, err := fs.List("data")
	if err != nil {
		t.Fatal(err)
	}
	newest := ""
	for _, n := range names {
		if strings.HasSuffix(n, ".log") && n > newest {
			newest = n
		}
	}
	return filepath.Join("data", newest)
}

// filled returns the disk of a store that was stopped, by a close or by a crash,
// after 500 synced writes.
func filled(t *testing.T, crash bool) vfs.FS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	for i := range 500 {
		put(t, s, write(fmt.Sprint(i), value(1, "some payload to fill the log with")))
	}
	if crash {
		if err := s.writeMark(); err != nil { // as the interval does
			t.Fatal(err)
		}
		clone := fs.CrashClone(vfs.CrashCloneCfg{})
		closeStore(t, s)
		return clone
	}
	closeStore(t, s)
	return fs
}

// A log that is cut, zeroed or flipped near its end opens without an error and
// without the records; the mark tells.
func TestLostTailIsNoticed(t *testing.T) {
	// end returns where the written part of a log ends; logs are preallocated.
	end := func(b []byte) int { return len(bytes.TrimRight(b, "\x00")) }
	for name, harm := range map[string]func([]byte) []byte{
		"cut in half":          func(b []byte) []byte { return b[:end(b)/2] },
		"last record cut":      func(b []byte) []byte { return b[:end(b)-90] },
		"zeroed from the half": func(b []byte) []byte { clear(b[end(b)/2:]); return b },
		"flip in last record":  func(b []byte) []byte { b[end(b)-90] ^= 0x01; return b },
		"emptied":              func([]byte) []byte { return nil },
	} {
		for _, crash := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, crash %v", name, crash), func(t *testing.T) {
				fs := filled(t, crash)
				log := newestLog(t, fs)
				putFile(t, fs, log, harm(bytes.Clone(readFile(t, fs, log))))
				s, err := Open(testConfig(t, fs))
				if err != nil {
					if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "data") {
						t.Fatalf("error = %v, want ErrCorrupt with the path", err)
					}
					return // noticed by Pebble
				}
				if s.LostTail() == "" {
					t.Fatal("the lost tail went unnoticed")
				}
				// It stays so: commits after the loss must not make up for it.
				for i := range 1000 {
					put(t, s, write(fmt.Sprint("new", i), value(2, "x")))
				}
				closeStore(t, s)
				s = open(t, fs)
				defer closeStore(t, s)
				if s.LostTail() == "" {
					t.Fatal("the loss is forgotten after another start")
				}
			})
		}
	}
}

// While a flush is on its way, the manifest comes to know sequence numbers of
// commits that are in the log only.
func TestLostTailBesideAFlush(t *testing.T) {
	for round := range 20 {
		fs := vfs.NewCrashableMem()
		s := open(t, fs)
		for i := range 200 {
			put(t, s, write(fmt.Sprint(i), value(1, strings.Repeat("x", 1000))))
		}
		flushed, err := s.db.AsyncFlush()
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 * round {
			put(t, s, write(fmt.Sprint(i), value(2, "x")))
		}
		put(t, s, write("last", value(2, "x")))
		<-flushed
		if err := s.writeMark(); err != nil {
			t.Fatal(err)
		}
		clone := fs.CrashClone(vfs.CrashCloneCfg{})
		closeStore(t, s)
		putFile(t, clone, newestLog(t, clone), nil)
		s = open(t, clone)
		if s.LostTail() == "" {
			t.Errorf("round %d: the lost tail went unnoticed", round)
		}
		closeStore(t, s)
	}
}

// A start that ends between noticing the loss and anything after it does not make
// up for what was lost.
func TestInterruptedStartHidesNoLoss(t *testing.T) {
	fs := filled(t, true)
	log := newestLog(t, fs)
	b := bytes.Clone(readFile(t, fs, log))
	putFile(t, fs, log, b[:len(bytes.TrimRight(b, "\x00"))-90])
	for start := range 5 {
		disk := errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if op.Kind == errorfs.OpFileSyncData && filepath.Base(op.Path) == markName {
				return errorfs.ErrInjected
			}
			return nil
		}))
		if s, err := Open(testConfig(t, disk)); err == nil {
			closeStore(t, s)
			t.Fatalf("start %d: it opened without a mark", start)
		}
	}
	s := open(t, fs)
	defer closeStore(t, s)
	if s.LostTail() == "" {
		t.Error("the lost tail is forgotten")
	}
}

func TestHonestStopsAreNotTakenForLoss(t *testing.T) {
	for _, crash := range []bool{true, false} {
		fs := filled(t, crash)
		for range 3 {
			s := open(t, fs)
			if s.LostTail() != "" {
				t.Fatalf("crash %v: %s", crash, s.LostTail())
			}
			wantRecord(t, s, "499", value(1, "some payload to fill the log with"))
			closeStore(t, s)
		}
	}
}

func TestMissingMarkIsALoss(t *testing.T) {
	fs := filled(t, true)
	if err := fs.Remove(filepath.Join("data", markName)); err != nil {
		t.Fatal(err)
	}
	s := open(t, fs)
	defer closeStore(t, s)
	if !strings.Contains(s.LostTail(), markName) {
		t.Fatalf("reason = %q", s.LostTail())
	}
}

// A torn write harms one slot of the mark; the other one still vouches.
func TestTornMark(t *testing.T) {
	for slot := range 2 {
		fs := filled(t, true)
		path := filepath.Join("data", markName)
		b := bytes.Clone(readFile(t, fs, path))
		b[slot*markStride+10] ^= 0xff
		putFile(t, fs, path, b)
		s := open(t, fs)
		if s.LostTail() != "" {
			t.Errorf("slot %d torn: %s", slot, s.LostTail())
		}
		closeStore(t, s)
	}
}

func TestReservedClockSurvives(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	if s.Reserved() != 0 {
		t.Fatalf("a new store has reserved %s", s.Reserved())
	}
	for _, ts := range []hlc.Timestamp{100, 300, 200} {
		if err := s.ReserveClock(ts); err != nil {
			t.Fatal(err)
		}
	}
	clone := fs.CrashClone(vfs.CrashCloneCfg{})
	closeStore(t, s)
	s = open(t, clone)
	defer closeStore(t, s)
	if s.Reserved() != 300 {
		t.Errorf("reserved is %d, want the greatest ever", s.Reserved())
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		harm func(t *testing.T, fs vfs.FS)
		want error
		text string
	}{
		{"a foreign directory", func(t *testing.T, fs vfs.FS) {
			if err := fs.MkdirAll("data", 0o755); err != nil {
				t.Fatal(err)
			}
			putFile(t, fs, "data/holiday.jpg", nil)
		}, ErrNotOurs, "holiday.jpg"},
		{"an orchestrator's directory", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			putFile(t, fs, "data/FORMAT", []byte("kvasir orchestrator 1\n"))
		}, ErrNotOurs, "orchestrator"},
		{"a newer format", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			putFile(t, fs, "data/FORMAT", []byte("kvasir node 2\n"))
		}, ErrNewerFormat, filepath.Join("data", "FORMAT")},
		{"a damaged format file", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			putFile(t, fs, "data/FORMAT", []byte("kvasir node x\n"))
		}, ErrCorrupt, filepath.Join("data", "FORMAT")},
		{"a newer mark", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			b := mark{generation: 1 << 40}.encode()[:markLen-4]
			b[4] = markFormat + 1
			putFile(t, fs, "data/MARK", sealMark(b))
		}, ErrNewerFormat, "MARK"},
		{"a newer store", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			names, err := fs.List("data")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range names {
				if strings.HasPrefix(n, "marker.format-version.") {
					if err := fs.Remove(filepath.Join("data", n)); err != nil {
						t.Fatal(err)
					}
				}
			}
			putFile(t, fs, "data/marker.format-version.000099.099", nil)
		}, ErrNewerFormat, "data"},
		{"a damaged manifest", func(t *testing.T, fs vfs.FS) {
			closeStore(t, open(t, fs))
			names, err := fs.List("data")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range names {
				if strings.HasPrefix(n, "MANIFEST-") {
					putFile(t, fs, filepath.Join("data", n), []byte("junk that is no manifest at all"))
				}
			}
		}, nil, "data"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fs := vfs.NewMem()
			tc.harm(t, fs)
			s, err := Open(testConfig(t, fs))
			if err == nil {
				closeStore(t, s)
				t.Fatal("it opened")
			}
			if tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("error = %v, want %v naming %s", err, tc.want, tc.text)
			}
			// What was refused is not locked for ever.
			if _, again := Open(testConfig(t, fs)); errors.Is(again, ErrInUse) {
				t.Error("the refused directory stays locked")
			}
		})
	}
}

// sealMark appends the checksum that the rest of a mark calls for.
func sealMark(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func TestSecondOpenIsRefused(t *testing.T) {
	cfg := testConfig(t, vfs.Default)
	cfg.Dir = t.TempDir()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	if _, err := Open(cfg); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), cfg.Dir) {
		t.Fatalf("error = %v, want ErrInUse naming the directory", err)
	}
}

// Making a data directory may be interrupted at any point.
func TestInterruptedCreation(t *testing.T) {
	fs := vfs.NewMem()
	closeStore(t, open(t, fs))
	if err := fs.Remove("data/FORMAT"); err != nil {
		t.Fatal(err)
	}
	s := open(t, fs)
	defer closeStore(t, s)
	if s.LostTail() != "" {
		t.Fatal(s.LostTail())
	}
}

func TestRealDisk(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Log("running as root: permissions are not enforced")
	}
	cfg := testConfig(t, vfs.Default)
	cfg.Dir = filepath.Join(t.TempDir(), "made", "on", "the", "way")
	for range 2 {
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		put(t, s, write("a", value(1, "x")))
		wantRecord(t, s, "a", value(1, "x"))
		if avail, total, err := s.DiskUsage(); err != nil || avail == 0 || total < avail {
			t.Errorf("disk usage %d of %d, %v", avail, total, err)
		}
		closeStore(t, s)
	}
}

func FuzzDecodeMark(f *testing.F) {
	f.Add(mark{generation: 3, tail: 99, reserved: 1 << 40, lostTail: true}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMark(b)
		if err == nil && !bytes.Equal(m.encode(), b) {
			t.Fatalf("%x decodes and encodes to %x", b, m.encode())
		}
	})
}

// The mark follows commits within its interval, however many they are, and is written now
// and then while there are none; in between nothing is.
func TestMarkFollowsCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, vfs.NewMem())
		defer func() {
			closeStore(t, s)
			time.Sleep(time.Minute)
		}()
		interval := s.cfg.MarkInterval
		// written returns how often the mark was while a time passed.
		written := func(d time.Duration) uint64 {
			before := s.mark.load().generation
			time.Sleep(d)
			synctest.Wait()
			return s.mark.load().generation - before
		}
		written(interval) // what opening has left
		for range 3 {
			tail := s.mark.load().tail
			for i := range 10 {
				put(t, s, write(fmt.Sprint(i), value(1, "x")))
			}
			if n := written(interval - 1); n != 0 {
				t.Fatalf("the mark was written %d times before its interval was over", n)
			}
			put(t, s, write("late", value(1, "x")))
			if n := written(1); n != 1 || s.mark.load().tail != tail+1 {
				t.Fatalf("after an interval the mark was written %d times, and vouches for %d after %d", n, s.mark.load().tail, tail)
			}
			if n := written(proveInterval - 1); n != 0 {
				t.Fatalf("the mark was written %d times without a commit", n)
			}
			if n := written(1); n != 1 {
				t.Fatalf("while there was no commit the mark was written %d times", n)
			}
		}
		if n := written(time.Minute); n != uint64(time.Minute/proveInterval) {
			t.Fatalf("the mark was written %d times in an idle minute", n)
		}
	})
}
