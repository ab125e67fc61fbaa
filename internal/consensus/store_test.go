package consensus

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// fataler is what both *testing.T and *rapid.T can do.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

func mustOpen(t fataler, fsys vfs.FS) *store {
	t.Helper()
	s, err := openStore(fsys, "data/raft", slog.New(slog.DiscardHandler), func(err error) { panic(err) })
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

func mustClose(t fataler, s *store) {
	t.Helper()
	if err := s.close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data), AppendedAt: time.Unix(0, int64(index))}
}

func sameEntry(a, b raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && bytes.Equal(a.Data, b.Data) &&
		bytes.Equal(a.Extensions, b.Extensions) && a.AppendedAt.Equal(b.AppendedAt)
}

func checkEnds(t fataler, s *store, first, last uint64) {
	t.Helper()
	gotFirst, err1 := s.FirstIndex()
	gotLast, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil || gotFirst != first || gotLast != last {
		t.Fatalf("the log is from %d to %d (%v), want from %d to %d", gotFirst, gotLast, err, first, last)
	}
}

func TestLogStore(t *testing.T) {
	type ends [2]uint64
	for _, tc := range []struct {
		name  string
		store [2]uint64 // first and last index stored
		drop  [2]uint64
		fails string
		want  ends
	}{
		{name: "from the start", store: ends{1, 9}, drop: ends{1, 4}, want: ends{5, 9}},
		{name: "from before the start", store: ends{5, 9}, drop: ends{1, 6}, want: ends{7, 9}},
		{name: "to the end", store: ends{1, 9}, drop: ends{7, 9}, want: ends{1, 6}},
		{name: "beyond the end", store: ends{1, 9}, drop: ends{7, 99}, want: ends{1, 6}},
		{name: "everything", store: ends{3, 9}, drop: ends{3, 9}, want: ends{0, 0}},
		{name: "one of one", store: ends{3, 3}, drop: ends{3, 3}, want: ends{0, 0}},
		{name: "nothing there", store: ends{5, 9}, drop: ends{1, 4}, want: ends{5, 9}},
		{name: "in the middle", store: ends{1, 9}, drop: ends{4, 5}, fails: "invariant 1", want: ends{1, 9}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fsys := vfs.NewMem()
			s := mustOpen(t, fsys)
			checkEnds(t, s, 0, 0)
			var logs []*raft.Log
			for i := tc.store[0]; i <= tc.store[1]; i++ {
				logs = append(logs, entry(i, 2, fmt.Sprint(i)))
			}
			if err := s.StoreLogs(logs); err != nil {
				t.Fatal(err)
			}
			err := s.DeleteRange(tc.drop[0], tc.drop[1])
			if tc.fails == "" && err != nil || tc.fails != "" && (err == nil || !strings.Contains(err.Error(), tc.fails)) {
				t.Fatalf("DeleteRange: %v, want an error with %q", err, tc.fails)
			}
			for range 2 {
				checkEnds(t, s, tc.want[0], tc.want[1])
				for i := uint64(0); i < 12; i++ {
					var got raft.Log
					err := s.GetLog(i, &got)
					if i < tc.want[0] || i > tc.want[1] || tc.want[0] == 0 {
						if err != raft.ErrLogNotFound {
							t.Fatalf("GetLog(%d) = %v, want ErrLogNotFound", i, err)
						}
					} else if err != nil || !sameEntry(got, *entry(i, 2, fmt.Sprint(i))) {
						t.Fatalf("GetLog(%d) = %+v, %v", i, got, err)
					}
				}
				mustClose(t, s)
				s = mustOpen(t, fsys)
			}
			mustClose(t, s)
		})
	}
}

func TestLogRefusesGaps(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer mustClose(t, s)
	if err := s.StoreLogs([]*raft.Log{entry(7, 1, "a"), entry(8, 1, "b")}); err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]*raft.Log{
		{entry(10, 1, "c")},
		{entry(8, 2, "c")},
		{entry(9, 1, "c"), entry(11, 1, "d")},
	} {
		if err := s.StoreLogs(bad); err == nil || !strings.Contains(err.Error(), "invariant 1") {
			t.Errorf("storing %d after 8: %v", bad[0].Index, err)
		}
		checkEnds(t, s, 7, 8)
	}
}

func TestStableStore(t *testing.T) {
	fsys := vfs.NewMem()
	s := mustOpen(t, fsys)
	if _, err := s.Get([]byte("a")); err == nil || err.Error() != "not found" {
		t.Errorf("missing value: %v, want exactly: not found", err)
	}
	if _, err := s.GetUint64([]byte("a")); err == nil || err.Error() != "not found" {
		t.Errorf("missing number: %v, want exactly: not found", err)
	}
	if err := errors.Join(s.Set([]byte("a"), []byte("x")), s.Set([]byte("a"), []byte("y")), s.SetUint64([]byte("n"), 7)); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	s = mustOpen(t, fsys)
	defer mustClose(t, s)
	if v, err := s.Get([]byte("a")); err != nil || string(v) != "y" {
		t.Errorf("Get = %q, %v", v, err)
	}
	if v, err := s.GetUint64([]byte("n")); err != nil || v != 7 {
		t.Errorf("GetUint64 = %d, %v", v, err)
	}
	if _, err := s.GetUint64([]byte("a")); !errors.Is(err, errMalformed) {
		t.Errorf("GetUint64 of another value: %v", err)
	}
	if err := s.clearStable(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get([]byte("a")); err == nil || err.Error() != "not found" {
		t.Errorf("after clearStable: %v", err)
	}
}

// Whatever is appended and deleted, the store equals a map; closing, crashing and
// opening again loses nothing, whether or not what was not synced survives.
func TestLogStoreMatchesModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fsys := vfs.NewCrashableMem()
		s := mustOpen(t, fsys)
		defer func() { mustClose(t, s) }()
		model := map[uint64]raft.Log{}
		votes := map[string]uint64{}
		ends := func() (uint64, uint64) {
			var first, last uint64
			for i := range model {
				if first == 0 || i < first {
					first = i
				}
				last = max(last, i)
			}
			return first, last
		}
		t.Repeat(map[string]func(*rapid.T){
			"store": func(t *rapid.T) {
				_, last := ends()
				if last == 0 {
					last = rapid.Uint64Range(0, 1000).Draw(t, "start")
				}
				var logs []*raft.Log
				for n := rapid.IntRange(1, 8).Draw(t, "n"); n > 0; n-- {
					last++
					l := entry(last, rapid.Uint64().Draw(t, "term"), rapid.String().Draw(t, "data"))
					l.Type = raft.LogType(rapid.Byte().Draw(t, "type"))
					l.Extensions = rapid.SliceOfN(rapid.Byte(), 0, 4).Draw(t, "extensions")
					logs = append(logs, l)
					model[last] = *l
				}
				if err := s.StoreLogs(logs); err != nil {
					t.Fatal(err)
				}
			},
			"delete": func(t *rapid.T) {
				first, last := ends()
				if last == 0 {
					t.Skip("empty")
				}
				from, to := first, rapid.Uint64Range(first, last).Draw(t, "to")
				if rapid.Bool().Draw(t, "suffix") {
					from, to = to, last
				}
				if err := s.DeleteRange(from, to); err != nil {
					t.Fatal(err)
				}
				for i := from; i <= to; i++ {
					delete(model, i)
				}
			},
			"vote": func(t *rapid.T) {
				name, term := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "name"), rapid.Uint64().Draw(t, "value")
				if err := s.SetUint64([]byte(name), term); err != nil {
					t.Fatal(err)
				}
				votes[name] = term
			},
			"reopen": func(t *rapid.T) {
				mustClose(t, s)
				s = mustOpen(t, fsys)
			},
			"crash": func(t *rapid.T) {
				after := fsys.CrashClone(vfs.CrashCloneCfg{
					UnsyncedDataPercent: rapid.SampledFrom([]int{0, 50, 100}).Draw(t, "unsynced"),
					RNG:                 rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)),
				})
				mustClose(t, s)
				fsys = after
				s = mustOpen(t, fsys)
			},
			"": func(t *rapid.T) {
				first, last := ends()
				checkEnds(t, s, first, last)
				for i, want := range model {
					var got raft.Log
					if err := s.GetLog(i, &got); err != nil || !sameEntry(got, want) {
						t.Fatalf("GetLog(%d) = %+v, %v, want %+v", i, got, err, want)
					}
				}
				for name, want := range votes {
					if got, err := s.GetUint64([]byte(name)); err != nil || got != want {
						t.Fatalf("GetUint64(%s) = %d, %v, want %d", name, got, err, want)
					}
				}
			},
		})
	})
}

func TestOpenRefuses(t *testing.T) {
	open := func(fsys vfs.FS) error {
		s, err := openStore(fsys, "data/raft", slog.New(slog.DiscardHandler), func(err error) { panic(err) })
		if err == nil {
			return s.close()
		}
		return err
	}
	wantError := func(t *testing.T, fsys vfs.FS, parts ...string) {
		t.Helper()
		err := open(fsys)
		for _, part := range append(parts, "data/raft") {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Fatalf("open: %v, want an error with %q", err, part)
			}
		}
	}
	set := func(t *testing.T, fsys vfs.FS, key, value string) {
		t.Helper()
		db, err := pebble.Open("data/raft", &pebble.Options{FS: fsys, Logger: pebbleLogger{to: slog.New(slog.DiscardHandler)}})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Set([]byte(key), []byte(value), pebble.Sync), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("newer layout", func(t *testing.T) {
		fsys := vfs.NewMem()
		mustClose(t, mustOpen(t, fsys))
		set(t, fsys, "f", "\x02")
		wantError(t, fsys, "newer release")
	})
	t.Run("malformed format", func(t *testing.T) {
		fsys := vfs.NewMem()
		mustClose(t, mustOpen(t, fsys))
		set(t, fsys, "f", "")
		wantError(t, fsys, "malformed")
	})
	t.Run("another database", func(t *testing.T) {
		fsys := vfs.NewMem()
		set(t, fsys, "k", "v")
		wantError(t, fsys, "another kind")
	})
	t.Run("in use", func(t *testing.T) {
		fsys := vfs.NewMem()
		s := mustOpen(t, fsys)
		wantError(t, fsys, "in use by another process")
		mustClose(t, s)
		if err := open(fsys); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("in use on a real disk", func(t *testing.T) {
		dir := t.TempDir() + "/data/raft"
		s, err := openStore(vfs.Default, dir, slog.New(slog.DiscardHandler), func(err error) { panic(err) })
		if err != nil {
			t.Fatal(err)
		}
		defer mustClose(t, s)
		_, err = openStore(vfs.Default, dir, slog.New(slog.DiscardHandler), func(err error) { panic(err) })
		if err == nil || !strings.Contains(err.Error(), "in use by another process") || !strings.Contains(err.Error(), dir) {
			t.Fatalf("open: %v", err)
		}
	})
}

// A crash at any point of the first opening leaves something that can be opened,
// and whose log then says how far it was synced.
func TestCrashWhileCreating(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var clones []*vfs.MemFS
	base := vfs.NewCrashableMem()
	fsys := &hookFS{FS: base, hook: func() {
		clones = append(clones, base.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rng}))
	}}
	mustClose(t, mustOpen(t, fsys))
	if len(clones) < 10 {
		t.Fatalf("only %d moments were tried", len(clones))
	}
	for _, after := range clones {
		s := mustOpen(t, after)
		if err := s.StoreLog(entry(1, 1, "a")); err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
	}
}

// hookFS calls hook before files are created and renamed, and before the mark is
// written and synced.
type hookFS struct {
	vfs.FS
	hook func()
}

func (h *hookFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	h.hook()
	return h.FS.Create(name, c)
}

func (h *hookFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	h.hook()
	f, err := h.FS.OpenReadWrite(name, c, opts...)
	return hookFile{f, h.hook}, err
}

type hookFile struct {
	vfs.File
	hook func()
}

func (f hookFile) WriteAt(b []byte, at int64) (int, error) {
	f.hook()
	return f.File.WriteAt(b, at)
}

func (f hookFile) SyncData() error {
	f.hook()
	return f.File.SyncData()
}

func (h *hookFS) Rename(from, to string) error {
	h.hook()
	return h.FS.Rename(from, to)
}

// The store's first write-ahead log that holds anything reports damage in its
// middle instead of losing what follows.
func TestDamagedLogIsNoticed(t *testing.T) {
	fsys := vfs.NewCrashableMem()
	s := mustOpen(t, fsys)
	for i := uint64(1); i <= 500; i++ {
		if err := s.StoreLog(entry(i, 1, strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	after := fsys.CrashClone(vfs.CrashCloneCfg{})
	mustClose(t, s)
	name := newestLog(t, after, "data/raft")
	f, err := after.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], info.Size()/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b[:], info.Size()/2); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = openStore(after, "data/raft", slog.New(slog.DiscardHandler), func(err error) { panic(err) })
	if err == nil {
		last, _ := s.LastIndex()
		mustClose(t, s)
		t.Fatalf("a byte flipped in the middle of %s went unnoticed: the log ends at %d", name, last)
	}
	if !strings.Contains(err.Error(), "data/raft") {
		t.Errorf("the error does not name the directory: %v", err)
	}
}

func TestClosedStore(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	mustClose(t, s)
	mustClose(t, s)
	if err := s.GetLog(1, new(raft.Log)); !errors.Is(err, ErrClosed) {
		t.Errorf("GetLog: %v", err)
	}
	if err := s.StoreLog(entry(1, 1, "a")); !errors.Is(err, ErrClosed) {
		t.Errorf("StoreLog: %v", err)
	}
	if _, err := s.List(); !errors.Is(err, ErrClosed) {
		t.Errorf("List: %v", err)
	}
}
