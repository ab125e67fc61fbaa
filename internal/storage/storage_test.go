package storage

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

type testingT interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func testConfig(t testingT, fs vfs.FS) Config {
	return Config{
		FS: fs, Dir: "data", CacheBytes: 1 << 20, RecordCacheBytes: 1 << 20, MemTableBytes: 256 << 10,
		Logger: slog.New(slog.DiscardHandler),
		Fatal:  func(err error) { panic(err) },
	}
}

func open(t testingT, fs vfs.FS) *Store {
	t.Helper()
	s, err := Open(testConfig(t, fs))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeStore(t testingT, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func value(version uint64, payload string) []byte {
	return record.Encode(record.Record{
		Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1},
		Kind:    record.Value, Payload: []byte(payload),
	})
}

func tombstone(version uint64) []byte {
	return record.Encode(record.Record{
		Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1}, Kind: record.Tombstone,
	})
}

func write(key string, rec []byte) Write {
	return Write{Namespace: 1, Vnode: 7, Key: []byte(key), Record: rec}
}

// put applies records and waits until they are on disk.
func put(t testingT, s *Store, writes ...Write) {
	t.Helper()
	c, err := s.Apply(writes, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
}

func wantRecord(t testingT, s *Store, key string, want []byte) {
	t.Helper()
	got, err := s.Get(1, 7, []byte(key))
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("record of %s is %x, want %x", key, got, want)
	}
}

func TestApplyAndGet(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	if _, err := s.Get(1, 7, []byte("a")); !errors.Is(err, ErrNotFound) {
		t.Fatalf("error = %v, want ErrNotFound", err)
	}
	put(t, s, write("a", value(5, "five")))
	wantRecord(t, s, "a", value(5, "five"))
	put(t, s, write("a", value(3, "three")))
	wantRecord(t, s, "a", value(5, "five"))
	put(t, s, write("a", tombstone(5)))
	wantRecord(t, s, "a", tombstone(5))
	// The same key elsewhere is another key.
	if _, err := s.Get(1, 8, []byte("a")); !errors.Is(err, ErrNotFound) {
		t.Fatalf("error = %v, want ErrNotFound", err)
	}
	if _, err := s.Get(2, 7, []byte("a")); !errors.Is(err, ErrNotFound) {
		t.Fatalf("error = %v, want ErrNotFound", err)
	}
}

func TestApplyRefusesWhatDoesNotDecode(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	_, err := s.Apply([]Write{write("a", value(1, "x")), write("b", []byte("junk"))}, nil)
	if !errors.Is(err, ErrCorrupt) {
		t.Fatalf("error = %v, want ErrCorrupt", err)
	}
	if _, err := s.Get(1, 7, []byte("a")); !errors.Is(err, ErrNotFound) {
		t.Errorf("the other record of the batch was applied: %v", err)
	}
}

func TestScanMergesVnodesInKeyOrder(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	for i := range 40 {
		put(t, s, Write{Namespace: 1, Vnode: uint32(i % 4), Key: fmt.Appendf(nil, "k%02d", i), Record: value(uint64(i+1), "x")})
	}
	put(t, s, Write{Namespace: 2, Vnode: 0, Key: []byte("k05"), Record: value(1, "other namespace")})
	scan := func(vnodes []uint32, start, end string, most int) (keys []string) {
		err := s.Scan(1, vnodes, []byte(start), []byte(end), func(v uint32, key, rec []byte) bool {
			if len(keys) == most {
				return false
			}
			keys = append(keys, fmt.Sprintf("%s/%d", key, v))
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		return keys
	}
	for _, tc := range []struct {
		vnodes     []uint32
		start, end string
		most       int
		want       string
	}{
		{[]uint32{0, 1, 2, 3}, "", "", 5, "k00/0 k01/1 k02/2 k03/3 k04/0"},
		{[]uint32{3, 1}, "k30", "", 99, "k31/3 k33/1 k35/3 k37/1 k39/3"},
		{[]uint32{0}, "k10", "k20", 99, "k12/0 k16/0"},
		{[]uint32{0, 1}, "k05", "k05", 99, ""},
		{[]uint32{0, 1}, "k06", "k05", 99, ""},
		{[]uint32{9}, "", "", 99, ""},
		{nil, "", "", 99, ""},
	} {
		if got := strings.Join(scan(tc.vnodes, tc.start, tc.end, tc.most), " "); got != tc.want {
			t.Errorf("vnodes %v from %q to %q: %q, want %q", tc.vnodes, tc.start, tc.end, got, tc.want)
		}
	}
}

// What was written lately is joined as it is read, in memory that reads take turns with: it
// is neither mixed up nor allocated for each record.
func TestScansOfFreshRecordsShareMemory(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	const records = 2000
	text := func(i int) string { return fmt.Sprint("value of ", i) }
	for i := range records {
		put(t, s, write(fmt.Sprintf("k%04d", i), value(1, "older")))
		put(t, s, write(fmt.Sprintf("k%04d", i), value(2, text(i))))
	}
	scan := func() {
		n := 0
		err := s.Scan(1, []uint32{7}, nil, nil, func(_ uint32, key, raw []byte) bool {
			rec, err := record.Decode(raw)
			if err != nil || string(rec.Payload) != text(n) {
				t.Errorf("record %d is %q, %v", n, rec.Payload, err)
			}
			n++
			return true
		})
		if err != nil || n != records {
			t.Errorf("%d records, %v", n, err)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(scan)
	}
	wg.Wait()
	var buf []byte
	perScan := testing.AllocsPerRun(5, func() {
		s.Scan(1, []uint32{7}, nil, nil, func(_ uint32, _, raw []byte) bool {
			buf = append(buf[:0], raw...)
			return true
		})
	})
	if perScan > records {
		t.Errorf("%.0f allocations for a scan of %d records", perScan, records)
	}
}

func TestScanBoundsOfExtremeKeys(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	keys := []string{"\x00", "\x00\x00", "a", "\xff", "\xff\xff\xff"}
	for _, k := range keys {
		put(t, s, write(k, value(1, k)))
	}
	put(t, s, Write{Namespace: 1, Vnode: 8, Key: []byte("\x00"), Record: value(1, "next vnode")})
	var got []string
	if err := s.Scan(1, []uint32{7}, nil, nil, func(_ uint32, k, _ []byte) bool {
		got = append(got, string(k))
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(keys, got); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
}

func TestDropNamespace(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("a", value(10, "old")))
	wantRecord(t, s, "a", value(10, "old")) // and its version is cached
	put(t, s, Write{Namespace: 2, Vnode: 7, Key: []byte("a"), Record: value(1, "kept")})
	if got, err := s.Namespaces(); err != nil || !cmp.Equal(got, []uint32{1, 2}) {
		t.Fatalf("namespaces %v, %v", got, err)
	}
	if err := s.DropNamespace(1); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Namespaces(); err != nil || !cmp.Equal(got, []uint32{2}) {
		t.Fatalf("namespaces %v, %v", got, err)
	}
	// The version cache must have forgotten the dropped record.
	put(t, s, write("a", value(5, "new")))
	wantRecord(t, s, "a", value(5, "new"))
}

func TestHints(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	hint := func(target uint64, key string) Hint {
		return Hint{Target: target, Seq: s.NextHintSeq(), CreatedMillis: 1700000000000, Write: write(key, value(1, key))}
	}
	a, b, c := hint(2, "a"), hint(3, "b"), hint(2, "c")
	commit, err := s.Apply([]Write{write("a", value(1, "a"))}, []Hint{a, b, c})
	if err != nil {
		t.Fatal(err)
	}
	if err := commit.Wait(); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)

	s = open(t, fs)
	defer closeStore(t, s)
	list := func(target, after uint64) (out []Hint) {
		if err := s.Hints(target, after, func(h Hint) bool { out = append(out, h); return true }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if diff := cmp.Diff([]Hint{a, c}, list(2, 0)); diff != "" {
		t.Errorf("hints for 2 (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Hint{c}, list(2, a.Seq)); diff != "" {
		t.Errorf("hints for 2 after the first (-want +got):\n%s", diff)
	}
	if got := s.NextHintSeq(); got <= c.Seq {
		t.Errorf("hint number %d is used again", got)
	}
	if err := s.DeleteHints([]Hint{a, c}); err != nil {
		t.Fatal(err)
	}
	if left := list(2, 0); len(left) != 0 {
		t.Errorf("%d hints left", len(left))
	}
	if left := list(3, 0); len(left) != 1 {
		t.Errorf("%d hints for another target left", len(left))
	}
}

// Records in any order, repeated, in batches that name a key twice, with reopenings
// and crashes in between: what is read is the join of all that was given, and a
// crash loses nothing that was waited for.
func TestStoreIsTheJoinOfAllWrites(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fs := vfs.NewCrashableMem()
		s := open(t, fs)
		defer func() { closeStore(t, s) }()
		want := map[string][]byte{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				closeStore(t, s)
				s = open(t, fs)
			case 1:
				seed := rapid.Uint64().Draw(t, "crash")
				survivor := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(seed, 1))})
				closeStore(t, s)
				fs = survivor
				s = open(t, fs)
				if s.LostTail() != "" {
					t.Fatalf("an honest crash is taken for a lost tail: %s", s.LostTail())
				}
			case 2:
				if err := s.db.Flush(); err != nil {
					t.Fatal(err)
				}
			case 3:
				if err := s.db.Compact(t.Context(), []byte{0}, []byte{0xff}, false); err != nil {
					t.Fatal(err)
				}
			default:
				var batch []Write
				for range rapid.IntRange(1, 12).Draw(t, "batch") {
					k := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "key")
					v := rapid.Uint64Range(1, 60).Draw(t, "version")
					rec := tombstone(v)
					if rapid.Bool().Draw(t, "value") {
						rec = value(v, rapid.SampledFrom([]string{"x", "y"}).Draw(t, "payload"))
					}
					batch = append(batch, write(k, rec))
					if old, ok := want[k]; ok {
						rec, _ = record.Join(old, rec)
					}
					want[k] = rec
				}
				put(t, s, batch...)
			}
			for k, rec := range want {
				wantRecord(t, s, k, rec)
			}
		}
	})
}

func TestLargeBatch(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	var batch []Write
	for i := range 300 {
		batch = append(batch, write(fmt.Sprint(i), value(1, strings.Repeat("x", 4096))))
	}
	put(t, s, batch...)
	closeStore(t, s)
	s = open(t, fs)
	defer closeStore(t, s)
	if s.LostTail() != "" {
		t.Fatal(s.LostTail())
	}
	wantRecord(t, s, "299", value(1, strings.Repeat("x", 4096)))
}

// A hot key costs a few merges, then plain Sets, whether it was known before or not.
func TestHotKeyIsWrittenPlainly(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	put(t, s, write("hot", value(1, "x")))
	closeStore(t, s)
	s = open(t, fs)
	defer closeStore(t, s)
	kinds := map[pebble.InternalKeyKind]int{}
	for v := uint64(2); v < 1000; v++ {
		c, err := s.Apply([]Write{write("hot", value(v, "x"))}, nil)
		if err != nil {
			t.Fatal(err)
		}
		r := c.batch.Reader()
		kind, _, _, _, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		kinds[kind]++
		if err := c.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if merges := kinds[pebble.InternalKeyKindMerge]; merges > blindLimit {
		t.Errorf("%d of 998 writes were merges, want at most %d", merges, blindLimit)
	}
	wantRecord(t, s, "hot", value(999, "x"))
}

// A stored record that is damaged fails reads of its key, and no writes of others.
func TestDamagedRecordHarmsNoOtherWrite(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	for range blindLimit {
		put(t, s, write("bad", value(1, "x")))
	}
	if err := s.db.Set(appendRecordKey(nil, 1, 7, []byte("bad")), []byte{1, 2}, pebble.Sync); err != nil {
		t.Fatal(err)
	}
	put(t, s, write("bad", value(2, "x")), write("good", value(2, "y")))
	wantRecord(t, s, "good", value(2, "y"))
	if _, err := s.Get(1, 7, []byte("bad")); !errors.Is(err, ErrCorrupt) {
		t.Errorf("error = %v, want ErrCorrupt", err)
	}
}

func TestReadMakesAMergedKeyExact(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	defer closeStore(t, s)
	put(t, s, write("k", value(1, "x"))) // blind
	wantRecord(t, s, "k", value(1, "x"))
	e, ok := s.latches.of(appendRecordKey(nil, 1, 7, []byte("k"))).mu.versions.Peek(string(appendRecordKey(nil, 1, 7, []byte("k"))))
	if !ok || !e.exact || e.version.Time != 1 {
		t.Errorf("entry after a read is %+v", e)
	}
}

func TestMetaAndBoots(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	if _, err := s.Meta("topology"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("error = %v, want ErrNotFound", err)
	}
	if err := s.SetMeta("topology", []byte("t1")); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Boots(); err != nil || n != 1 {
		t.Fatalf("boots = %d, %v", n, err)
	}
	closeStore(t, s)
	s = open(t, fs)
	defer closeStore(t, s)
	if got, err := s.Meta("topology"); err != nil || string(got) != "t1" {
		t.Fatalf("meta = %q, %v", got, err)
	}
	if n, err := s.Boots(); err != nil || n != 2 {
		t.Fatalf("boots = %d, %v", n, err)
	}
}

func FuzzDecodeHint(f *testing.F) {
	h := Hint{Target: 3, Seq: 9, CreatedMillis: 1, Write: write("key", value(1, "x"))}
	f.Add(hintKey(3, 9), encodeHint(h))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, key, b []byte) {
		h, err := decodeHint(key, b)
		if err != nil {
			return
		}
		again, err := decodeHint(hintKey(h.Target, h.Seq), encodeHint(h))
		if err != nil || !cmp.Equal(h, again) {
			t.Fatalf("%+v becomes %+v, %v", h, again, err)
		}
	})
}
