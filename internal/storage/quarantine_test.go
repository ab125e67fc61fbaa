package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

func freely(ctx context.Context, _ int) error { return ctx.Err() }

func anyKey(Place, []byte) error { return nil }

const rotKeys = 4000

func rotKey(i int) (uint32, []byte) { return uint32(i % 8), fmt.Appendf(nil, "key%05d", i) }

// rotStore fills a store so that its tables have many blocks, and closes it.
func rotStore(t *testing.T) *vfs.MemFS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	var writes []Write
	for i := range rotKeys {
		v, k := rotKey(i)
		writes = append(writes, Write{Namespace: 1, Vnode: v, Key: k, Record: rotValue(i)})
	}
	put(t, s, writes...)
	// To the last level, where nothing rewrites it on its own.
	if err := s.db.Compact(t.Context(), []byte{kindRecord}, []byte{kindDirty}, false); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	return fs
}

func rotValue(i int) []byte { return value(uint64(i+1), strings.Repeat("v", 50)) }

// rot changes one byte of a file, as a failing disk does.
func rot(t *testing.T, disk vfs.FS, path string, at int) {
	t.Helper()
	b := contentOf(t, disk, path)
	b[at] ^= 0x10
	f, err := disk.Create(path, vfs.WriteCategoryUnspecified)
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

func contentOf(t *testing.T, disk vfs.FS, path string) []byte {
	t.Helper()
	f, err := disk.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, info.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// largestTable returns the name of the table with most bytes, and how many.
func largestTable(t *testing.T, disk vfs.FS) (path string, size int) {
	t.Helper()
	names, err := disk.List("data")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasSuffix(n, ".sst") {
			if b := contentOf(t, disk, "data/"+n); len(b) > size {
				path, size = "data/"+n, len(b)
			}
		}
	}
	return path, size
}

// fillAgain does what peers do: all records that were ever there are joined.
func fillAgain(t *testing.T, s *Store) {
	t.Helper()
	var writes []Write
	for i := range rotKeys {
		v, k := rotKey(i)
		writes = append(writes, Write{Namespace: 1, Vnode: v, Key: k, Record: rotValue(i), Repair: true})
	}
	put(t, s, writes...)
	for _, q := range s.Quarantines() {
		if err := s.Lift(q.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// readRight fails when a read that is trusted returns anything but what was written.
func readRight(t *testing.T, s *Store, when string) (refused int) {
	t.Helper()
	for i := range rotKeys {
		v, k := rotKey(i)
		reading := s.Reading()
		got, err := s.Get(1, v, k)
		if s.Read(reading, 1, v) != nil || errors.Is(err, ErrCorrupt) {
			refused++
			continue
		}
		if err != nil || !bytes.Equal(got, rotValue(i)) {
			t.Fatalf("%s: %s is %q, %v", when, k, got, err)
		}
	}
	return refused
}

// Invariant 18: wherever a byte of a table flips, a scrub finds it, nothing wrong is
// ever served, whenever the power is cut, and once the records were joined again all
// are there and the damaged table is gone.
func TestRotIsFoundCutOutAndFilledAgain(t *testing.T) {
	fs := rotStore(t)
	path, size := largestTable(t, fs)
	quarantined, gaveUp, rewritten := 0, 0, 0
	step := size/23 + 1
	if testing.Short() {
		step = size/11 + 1
	}
	for at := size - 1; at >= 0; at -= step {
		when := fmt.Sprintf("byte %d of %d", at, size)
		rng := rand.New(rand.NewPCG(1, uint64(at)))
		disk := fs.CrashClone(vfs.CrashCloneCfg{})
		rot(t, disk, path, at)
		s, err := Open(testConfig(t, disk))
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: %v", when, err)
			}
			gaveUp++
			continue
		}
		readRight(t, s, when+", before the scrub")
		if _, err := s.Scrub(t.Context(), freely, anyKey); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if s.Corruptions() == 0 {
			t.Fatalf("%s: the flip is not found", when)
		}
		if s.Damage() != "" {
			gaveUp++
			if err := s.GiveUp(); err != nil {
				t.Fatal(err)
			}
			s.Close() // may fail, the store is damaged
			continue
		}
		if len(s.quarantines.load()) == 0 {
			rewritten++
		} else {
			quarantined++
			if readRight(t, s, when+", in quarantine") == 0 {
				t.Fatalf("%s: no read is refused", when)
			}
			// The power is cut before the stretch is cut out, then after.
			for range 2 {
				disk = disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
				s.Close()
				s = open(t, disk)
				if readRight(t, s, when+", after a power cut") == 0 {
					t.Fatalf("%s: no read is refused after a power cut", when)
				}
				if err := s.Cut(t.Context()); err != nil || s.Damage() != "" {
					t.Fatalf("%s: %v, %s", when, err, s.Damage())
				}
			}
			fillAgain(t, s)
		}
		if refused := readRight(t, s, when+", at the end"); refused > 0 {
			t.Fatalf("%s: %d reads are refused at the end", when, refused)
		}
		found := s.Corruptions()
		if _, err := s.Scrub(t.Context(), freely, anyKey); err != nil || s.Corruptions() != found {
			t.Fatalf("%s: the next scrub finds damage again: %v", when, err)
		}
		closeStore(t, s)
		if names, err := disk.List("data"); err != nil || strings.Contains(strings.Join(names, " "), strings.TrimPrefix(path, "data/")) {
			t.Fatalf("%s: the damaged table is still there: %v, %v", when, names, err)
		}
	}
	t.Logf("%d quarantined, %d given up, %d rewritten", quarantined, gaveUp, rewritten)
	if quarantined == 0 {
		t.Fatal("no flip led to a quarantine")
	}
}

// A record under the wrong vnode is damage like any other.
func TestScrubChecksPlaces(t *testing.T) {
	fs := rotStore(t)
	s := open(t, fs)
	defer closeStore(t, s)
	_, err := s.Scrub(t.Context(), freely, func(p Place, key []byte) error {
		if p.Vnode == 3 && string(key) == "key00803" {
			return errors.New("is not of this vnode")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for v := range uint32(8) {
		if got, want := s.Quarantined(Place{1, v}), v == 3; got != want {
			t.Errorf("vnode %d is quarantined: %v", v, got)
		}
	}
}

// failures counts the compactions that Pebble says failed.
type failures struct {
	slog.Handler
	count *atomic.Int64
}

func (f failures) Enabled(context.Context, slog.Level) bool { return true }

func (f failures) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "flush or compaction failed" && f.count.Add(1) > 1000 {
		panic("compactions are tried without end") // virtual time would stand still
	}
	return nil
}

// A compaction that meets damage in the first block it reads, before it has created
// a table, is not tried again at once.
func TestACompactionThatFailsRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		s := open(t, fs)
		flush := func(keys int) {
			var writes []Write
			for i := range keys {
				_, k := rotKey(i)
				writes = append(writes, Write{Namespace: 1, Vnode: 1, Key: k, Record: rotValue(i)})
			}
			put(t, s, writes...)
			if err := s.db.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		flush(100)
		closeStore(t, s)
		path, _ := largestTable(t, fs)
		rot(t, fs, path, 4)

		failed := failures{slog.DiscardHandler, new(atomic.Int64)}
		cfg := testConfig(t, fs)
		cfg.Logger = slog.New(failed)
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for range 4 { // as many tables as begin a compaction
			flush(1)
		}
		time.Sleep(10 * time.Second)
		if n := failed.count.Load(); n < 5 || n > 15 {
			t.Errorf("%d attempts in 10 s", n)
		}
		closeStore(t, s)
	})
}

// Nor does Pebble ask again at once how much a table has, where it cannot be opened.
func TestATableThatCannotBeOpenedRests(t *testing.T) {
	met := false
	for fromEnd := 60; fromEnd < 900; fromEnd += 40 {
		synctest.Test(t, func(t *testing.T) {
			fs := vfs.NewMem()
			s := open(t, fs)
			var writes []Write
			for i := range 2000 {
				writes = append(writes, write(fmt.Sprintf("k%04d", i), value(1, "x")))
			}
			ingest(t, s, writes...)
			closeStore(t, s)
			path, size := largestTable(t, fs)
			rot(t, fs, path, size-fromEnd)
			failed := failures{slog.DiscardHandler, new(atomic.Int64)}
			cfg := testConfig(t, fs)
			cfg.Logger = slog.New(failed)
			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Second)
			n := failed.count.Load()
			if met = met || n > 0; n > 25 {
				t.Errorf("damage %d bytes before the end: %d attempts in 10 s", fromEnd, n)
			}
			closeStore(t, s)
		})
	}
	if !met {
		t.Error("no damage was met: the test shows nothing")
	}
}

// What is left of a table around a stretch that was cut out is checked up to where it
// ends.
func TestScrubFindsRotBesideACut(t *testing.T) {
	lower, _ := vnodeRange(1, 2, nil, nil)
	_, upper := vnodeRange(1, 3, nil, nil)
	for _, tenth := range []int{1, 6} { // what is cut out lies between
		fs := rotStore(t)
		path, size := largestTable(t, fs)
		s := open(t, fs)
		if err := s.db.Excise(t.Context(), pebble.KeyRange{Start: lower, End: upper}); err != nil {
			t.Fatal(err)
		}
		closeStore(t, s)
		rot(t, fs, path, size*tenth/10)
		s = open(t, fs)
		if _, err := s.Scrub(t.Context(), freely, anyKey); err != nil {
			t.Fatal(err)
		}
		q := s.quarantines.load()
		if len(q) != 1 || bytes.Compare(q[0].lower, upper) < 0 && bytes.Compare(lower, q[0].upper) < 0 {
			t.Errorf("in the %d. tenth: quarantines are %v", tenth, q)
		}
		closeStore(t, s)
	}
}
