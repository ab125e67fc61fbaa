package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
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

// flip is rot of a file that is in use.
func flip(t *testing.T, disk vfs.FS, path string, at int) {
	t.Helper()
	b := contentOf(t, disk, path)[at] ^ 0x10
	f, err := disk.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b}, int64(at)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
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
		if n := failed.count.Load(); n < 5 || n > 30 { // one a second, and some for the flushes
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

// tableInfos returns the tables that have records.
func tableInfos(t *testing.T, s *Store) (out []pebble.SSTableInfo) {
	t.Helper()
	levels, err := s.db.SSTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, level := range levels {
		for _, info := range level {
			if info.Smallest.UserKey[0] == kindRecord {
				out = append(out, info)
			}
		}
	}
	return out
}

func recordKey(i int) []byte {
	v, k := rotKey(i)
	return appendRecordKey(nil, 1, v, k)
}

// What is left around a cut leaves the old table, of the last level too.
func TestWhatIsLeftAroundACutIsWrittenAnew(t *testing.T) {
	fs := rotStore(t)
	s := open(t, fs)
	defer closeStore(t, s)
	before := tableInfos(t, s)
	if err := s.quarantine(recordKey(1002), recordKey(2002), "a test"); err != nil {
		t.Fatal(err)
	}
	if err := s.Cut(t.Context()); err != nil || s.Damage() != "" {
		t.Fatalf("%v, %s", err, s.Damage())
	}
	for _, info := range tableInfos(t, s) {
		if info.Virtual {
			t.Errorf("%s is still part of %s", info.FileNum, info.BackingSSTNum)
		}
	}
	if after := tableInfos(t, s); len(before) != 1 || len(after) == 0 || after[0].BackingSSTNum == before[0].BackingSSTNum {
		t.Errorf("the tables were %v and are %v", before, after)
	}
	fillAgain(t, s)
	if n := readRight(t, s, "at the end"); n > 0 {
		t.Errorf("%d reads are refused", n)
	}
}

// rottenBlock returns a store, not open, with a damaged block, and a record in that.
func rottenBlock(t *testing.T) (fs *vfs.MemFS, i int, key []byte) {
	t.Helper()
	fs = rotStore(t)
	path, size := largestTable(t, fs)
	rot(t, fs, path, size/2)
	closeStore(t, open(t, fs)) // syncs the directory
	probe := open(t, fs.CrashClone(vfs.CrashCloneCfg{}))
	defer closeStore(t, probe)
	if _, err := probe.Scrub(t.Context(), freely, anyKey); err != nil {
		t.Fatal(err)
	}
	q := probe.quarantines.load()
	if len(q) != 1 {
		t.Fatalf("quarantines are %v", q)
	}
	var lost []int
	for i := range rotKeys {
		if k := recordKey(i); bytes.Compare(q[0].lower, k) < 0 && bytes.Compare(k, q[0].upper) < 0 {
			lost = append(lost, i)
		}
	}
	slices.SortFunc(lost, func(a, b int) int { return bytes.Compare(recordKey(a), recordKey(b)) })
	i = lost[len(lost)/2]
	return fs, i, recordKey(i)
}

// Pebble finds the level of a file that is taken in by reading what lies there. It does so
// in a flush where the log has records of the file's range, and begins one that fails anew
// without end.
func TestNoFileIsTakenInWhereThereIsDamage(t *testing.T) {
	fs, i, _ := rottenBlock(t)
	s := open(t, fs)
	v, k := rotKey(i)
	put(t, s, Write{Namespace: 1, Vnode: v, Key: append(bytes.Clone(k), 'b'), Record: rotValue(1)})
	take := func() error {
		in, err := s.NewIngest(Place{1, v})
		if err != nil {
			t.Fatal(err)
		}
		for _, end := range "ac" {
			if err := in.Add(append(bytes.Clone(k), byte(end)), rotValue(1)); err != nil {
				t.Fatal(err)
			}
		}
		return in.Finish(t.Context())
	}
	if err := take(); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("error %v, want ErrCorrupt", err)
	}
	if err := errors.Join(s.Inspect(t.Context(), anyKey), s.Cut(t.Context())); err != nil || s.Damage() != "" {
		t.Fatalf("%v, %s", err, s.Damage())
	}
	if err := take(); err != nil {
		t.Errorf("after the damage was cut out: %v", err)
	}
	fillAgain(t, s)
	if n := readRight(t, s, "at the end"); n > 0 {
		t.Errorf("%d reads are refused", n)
	}
	closeStore(t, s)
}

// Pebble drops the rest of a table that it cannot read where a stretch ends: a stretch
// that ends in damage nobody knew of is not cut out before that is known too.
func TestACutThatEndsInDamageLosesNothingElse(t *testing.T) {
	for _, ends := range []string{"lower", "upper"} {
		fs, _, inside := rottenBlock(t)
		s := open(t, fs)
		lower, upper := inside, []byte{kindRecord + 1}
		if ends == "upper" {
			lower, upper = recordKey(0), inside
		}
		if err := s.quarantine(lower, upper, "a test"); err != nil {
			t.Fatal(err)
		}
		if err := s.Cut(t.Context()); err == nil {
			t.Errorf("%s end: cut out in the middle of damage", ends)
		}
		for range 2 { // what was met is inspected
			if err := errors.Join(s.Inspect(t.Context(), anyKey), s.Cut(t.Context())); err != nil || s.Damage() != "" {
				t.Fatalf("%s end: %v, %s", ends, err, s.Damage())
			}
		}
		if readRight(t, s, ends+" end") == rotKeys {
			t.Errorf("%s end: all reads are refused", ends)
		}
		list := s.Quarantines()
		for _, q := range list {
			if err := s.Lift(q.ID); err != nil {
				t.Fatal(err)
			}
		}
		for i := range rotKeys { // nobody fills what the stretches did not take
			v, k := rotKey(i)
			taken := false
			for _, q := range list {
				key := recordKey(i)
				taken = taken || bytes.Compare(q.lower, key) <= 0 && bytes.Compare(key, q.upper) < 0
			}
			if _, err := s.Get(1, v, k); errors.Is(err, ErrNotFound) != taken || err != nil && !taken {
				t.Fatalf("%s end: %s, which was taken: %v, is read as %v", ends, k, taken, err)
			}
		}
		closeStore(t, s)
	}
}

// Stretches that overlap are cut out as one: damage of one may lie where another ends.
func TestStretchesThatOverlapAreCutOutTogether(t *testing.T) {
	q := func(id uint64, lower, upper string, cut bool) Quarantine {
		return Quarantine{ID: id, lower: []byte(lower), upper: []byte(upper), cut: cut}
	}
	got := union([]Quarantine{q(1, "m", "p", false), q(2, "a", "c", false), q(3, "b", "e", false), q(4, "e", "f", false), q(5, "g", "z", true), q(6, "n", "o", false)})
	if len(got) != 2 || got[0].String() != fmt.Sprintf("%x to %x", "a", "f") || got[1].String() != fmt.Sprintf("%x to %x", "m", "p") {
		t.Errorf("they are %v", got)
	}
}

// A read that may have missed what a quarantine covered is refused, also when the
// quarantine was lifted before the read was done.
func TestReadsThatAQuarantineEndedDuringAreRefused(t *testing.T) {
	fs := rotStore(t)
	s := open(t, fs)
	defer closeStore(t, s)
	if err := s.quarantine(recordKey(1002), recordKey(2002), "a test"); err != nil {
		t.Fatal(err)
	}
	if err := s.Cut(t.Context()); err != nil {
		t.Fatal(err)
	}
	reading := s.Reading()
	v, k := rotKey(1002)
	if _, err := s.Get(1, v, k); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	fillAgain(t, s)
	if err := s.Read(reading, 1, v); !errors.Is(err, ErrCorrupt) {
		t.Errorf("what was read before the records were filled in again is trusted: %v", err)
	}
	if err := s.Read(s.Reading(), 1, v); err != nil {
		t.Error(err)
	}
}

// What leads to the records of a part of a table is not checked by a scrub; reads meet
// damage there, and the part is written anew.
func TestADamagedFilterOfAPartIsMended(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	var writes []Write
	for i := range rotKeys / 10 {
		v, k := rotKey(i)
		writes = append(writes, Write{Namespace: 1, Vnode: v, Key: k, Record: rotValue(i)})
	}
	put(t, s, writes...)
	if err := s.db.Flush(); err != nil {
		t.Fatal(err)
	}
	path, _ := largestTable(t, fs)
	at := filterOf(t, s, fs, path)
	if err := s.db.Excise(t.Context(), pebble.KeyRange{Start: recordKey(102), End: recordKey(206)}); err != nil {
		t.Fatal(err)
	}
	flip(t, fs, path, at)
	defer closeStore(t, s)
	refused := readRefused(t, s)
	if refused == 0 {
		t.Fatal("no read meets the damage")
	}
	if err := errors.Join(s.Inspect(t.Context(), anyKey), s.Cut(t.Context())); err != nil || s.Damage() != "" || s.QuarantineCount() > 0 {
		t.Fatalf("%v, %s, %d quarantines", err, s.Damage(), s.QuarantineCount())
	}
	if n := readRefused(t, s); n > 0 {
		t.Errorf("%d reads are refused at the end, %d before", n, refused)
	}
}

// readRefused counts the reads that are refused.
func readRefused(t *testing.T, s *Store) (n int) {
	t.Helper()
	for i := range rotKeys {
		v, k := rotKey(i)
		if _, err := s.Get(1, v, k); errors.Is(err, ErrCorrupt) {
			n++
		}
	}
	return n
}

// filterOf returns where the filter of a table lies.
func filterOf(t *testing.T, s *Store, disk vfs.FS, path string) int {
	t.Helper()
	f, err := disk.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		t.Fatal(err)
	}
	r, err := sstable.NewReader(t.Context(), readable, s.readerOptions())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	layout, err := r.Layout()
	if err != nil || len(layout.Filter) == 0 {
		t.Fatalf("no filter: %v", err)
	}
	return int(layout.Filter[0].Offset) + 5
}

// Commits that wait for compactions that fail wait in vain.
func TestWritesThatDamageHaltsGiveTheStoreUp(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	failed := errors.New("a compaction met damage")
	s.backgroundError(failed)
	s.stalls.begin(time.Now().Add(-stallLimit / 2))
	s.backgroundError(failed)
	if s.Damage() != "" {
		t.Errorf("given up too soon: %s", s.Damage())
	}
	s.stalls.begin(time.Now().Add(-2 * stallLimit))
	s.backgroundError(fmt.Errorf("a full disk: %w", syscall.ENOSPC))
	if s.Damage() != "" {
		t.Errorf("given up although space can be made: %s", s.Damage())
	}
	s.backgroundError(failed)
	if !strings.Contains(s.Damage(), failed.Error()) {
		t.Errorf("damage is %q", s.Damage())
	}
}
