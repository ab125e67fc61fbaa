package storage

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// The rules that keep the join true. Each test fails when its rule is broken.

// A blind merge makes no entry: the stored version may be greater than the merged
// one, and a later Set over it would lose it.
func TestRuleBlindMergeMakesNoEntry(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	put(t, s, write("k", value(10, "newest")))
	closeStore(t, s)
	s = open(t, fs) // with an empty cache
	defer closeStore(t, s)
	for v := uint64(1); v <= 9; v++ {
		put(t, s, write("k", value(v, "late")))
		wantRecord(t, s, "k", value(10, "newest"))
	}
}

// The latch is held from the decision until the batch is applied: otherwise two
// Sets, each right when it was decided, are applied in the wrong order.
func TestRuleLatchCoversDecisionAndApply(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	const writers, rounds = 8, 400
	put(t, s, write("k", value(1, "x")))
	wantRecord(t, s, "k", value(1, "x")) // makes the entry exact
	for round := range rounds {
		base := uint64(2 + round*writers)
		var wg sync.WaitGroup
		for i := range writers {
			wg.Go(func() { put(t, s, write("k", value(base+uint64(i), "x"))) })
		}
		wg.Wait()
		wantRecord(t, s, "k", value(base+writers-1, "x"))
	}
}

// A read that overlaps a write must not leave the older version as exact.
func TestRuleReadDoesNotLearnWhileAWriterIsActive(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", value(1, "x")))
	key := appendRecordKey(nil, 1, 7, []byte("k"))
	st := s.latches.of(key)
	before := st.generation.Load()
	stale, err := s.get(key)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, write("k", value(9, "newest"))) // a second blind merge
	s.learn(st, key, stale, before)           // the read comes to its end only now
	put(t, s, write("k", value(5, "late")))
	wantRecord(t, s, "k", value(9, "newest"))
}

// The cache of a range is off while the range is dropped or ingested into, and
// knows nothing of it afterwards.
func TestRuleNoEntriesAcrossARangeChange(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", value(1, "x")))
	wantRecord(t, s, "k", value(1, "x"))
	lower, upper := namespaceRange(1)
	off := s.latches.suspend(keyRange{string(lower), string(upper)})
	put(t, s, write("k", value(2, "x")))
	wantRecord(t, s, "k", value(2, "x"))
	// What an ingested table would do: a greater record appears beside the cache.
	if err := s.db.Merge(appendRecordKey(nil, 1, 7, []byte("k")), value(10, "ingested"), nil); err != nil {
		t.Fatal(err)
	}
	put(t, s, write("k", value(3, "late")))
	wantRecord(t, s, "k", value(10, "ingested"))
	off.resume()
	put(t, s, write("k", value(4, "late")))
	wantRecord(t, s, "k", value(10, "ingested"))
}

// An entry that outlasts a suspension is exact: the keys that came meanwhile, and those
// that were written, have none.
func TestRuleNoStaleEntriesAcrossAnIngest(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	cached := func(key string) bool {
		k := appendRecordKey(nil, 1, 7, []byte(key))
		e, ok := s.latches.of(k).mu.versions.Peek(string(k))
		return ok && e.exact
	}
	for _, k := range []string{"came", "rests", "written"} {
		put(t, s, write(k, value(1, "x")))
		wantRecord(t, s, k, value(1, "x"))
		if !cached(k) {
			t.Fatalf("%s is not cached: the test shows nothing", k)
		}
	}
	off := s.latches.suspend(rangeOf(Place{1, 7}))
	came := appendRecordKey(nil, 1, 7, []byte("came"))
	if err := s.db.Merge(came, value(10, "ingested"), nil); err != nil {
		t.Fatal(err)
	}
	put(t, s, write("written", value(10, "written")))
	off.resumeKeys(slices.Values([][]byte{came}))
	if cached("came") || cached("written") || !cached("rests") {
		t.Errorf("cached: %v, %v, %v", cached("came"), cached("written"), cached("rests"))
	}
	for _, k := range []string{"came", "rests", "written"} {
		put(t, s, write(k, value(4, "late")))
	}
	wantRecord(t, s, "came", value(10, "ingested"))
	wantRecord(t, s, "written", value(10, "written"))
	wantRecord(t, s, "rests", value(4, "late"))
}

// Many places are wiped as one; what was cached of them, and only that, is forgotten.
func TestRuleNoEntriesAcrossAWipe(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	in := func(vnode uint32, v uint64) Write {
		w := write("k", value(v, "x"))
		w.Vnode = vnode
		return w
	}
	for v := range uint32(6) {
		put(t, s, in(v, 9))
		if _, err := s.Get(1, v, []byte("k")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Wipe([]Place{{1, 4}, {1, 1}, {1, 2}}); err != nil {
		t.Fatal(err)
	}
	for v := range uint32(6) {
		put(t, s, in(v, 5)) // lower than what was there
		want := value(9, "x")
		if v == 1 || v == 2 || v == 4 {
			want = value(5, "x")
		}
		if got, err := s.Get(1, v, []byte("k")); err != nil || string(got) != string(want) {
			t.Errorf("vnode %d holds %x, %v", v, got, err)
		}
	}
	if off := *s.latches.off.Load(); len(off) != 0 {
		t.Errorf("the cache is off for %v", off)
	}
}

// gateFS holds back the syncs of log files while it is shut.
type gateFS struct {
	vfs.FS
	mu   sync.Mutex
	gate chan struct{}
}

func (g *gateFS) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gate = make(chan struct{})
}

func (g *gateFS) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.gate)
	g.gate = nil
}

func (g *gateFS) wait() {
	g.mu.Lock()
	gate := g.gate
	g.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

func (g *gateFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.Create(name, c)
	return gateFile{f, g}, err
}

func (g *gateFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.ReuseForWrite(old, name, c)
	return gateFile{f, g}, err
}

type gateFile struct {
	vfs.File
	g *gateFS
}

func (f gateFile) Sync() error                      { f.g.wait(); return f.File.Sync() }
func (f gateFile) SyncData() error                  { f.g.wait(); return f.File.SyncData() }
func (f gateFile) SyncTo(int64) (bool, error)       { f.g.wait(); return true, f.File.Sync() }
func (f gateFile) Preallocate(off, len int64) error { return f.File.Preallocate(off, len) }

// Nothing that tells of a record leaves before the record is on disk: neither an
// acknowledgement, nor "I have a newer one already", nor a read or scan.
func TestRuleRepliesWaitForTheSync(t *testing.T) {
	for name, reply := range map[string]func(t *testing.T, s *Store){
		"acknowledgement": func(t *testing.T, s *Store) {
			put(t, s, write("other", value(1, "x")))
		},
		"already superseded": func(t *testing.T, s *Store) {
			put(t, s, write("k", value(2, "older")))
		},
		"read": func(t *testing.T, s *Store) {
			wantRecord(t, s, "k", value(3, "unsynced"))
		},
		"scan": func(t *testing.T, s *Store) {
			n := 0
			if err := s.Scan(1, []uint32{7}, nil, nil, func(uint32, []byte, []byte) bool { n++; return true }); err != nil || n != 1 {
				t.Errorf("scan sees %d records, error %v", n, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := &gateFS{FS: vfs.NewMem()}
				s := open(t, g)
				put(t, s, write("k", value(1, "x")))
				wantRecord(t, s, "k", value(1, "x")) // the entry is exact from here on
				g.shut()
				c, err := s.Apply([]Write{write("k", value(3, "unsynced"))}, nil)
				if err != nil {
					t.Fatal(err)
				}
				acknowledged, replied := make(chan error, 1), make(chan struct{})
				go func() { acknowledged <- c.Wait() }()
				go func() { defer close(replied); reply(t, s) }()
				synctest.Wait()
				select {
				case <-replied:
					t.Error("the reply left before the record was on disk")
				case <-acknowledged:
					t.Error("the write was acknowledged before it was on disk")
				default:
				}
				g.open()
				if err := <-acknowledged; err != nil {
					t.Error(err)
				}
				<-replied
				closeStore(t, s)
			})
		})
	}
}
