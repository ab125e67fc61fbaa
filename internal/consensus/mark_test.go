package consensus

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// newestLog returns the path of the write-ahead log that was being written.
func newestLog(t *testing.T, fsys vfs.FS, dir string) string {
	t.Helper()
	names, err := fsys.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".log") })
	return filepath.Join(dir, slices.Max(names))
}

// rewrite replaces a file by what change makes of it.
func rewrite(t *testing.T, fsys vfs.FS, name string, change func([]byte) []byte) {
	t.Helper()
	f, err := fsys.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if f, err = fsys.Create(name, vfs.WriteCategoryUnspecified); err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(change(b))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// voted returns the disk of a store after a crash that followed 100 entries and a
// vote at once.
func voted(t *testing.T) *vfs.MemFS {
	t.Helper()
	fsys := vfs.NewCrashableMem()
	s := mustOpen(t, fsys)
	for i := uint64(1); i <= 100; i++ {
		if err := s.StoreLog(entry(i, 1, strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetUint64([]byte("LastVoteTerm"), 7); err != nil {
		t.Fatal(err)
	}
	after := fsys.CrashClone(vfs.CrashCloneCfg{})
	mustClose(t, s)
	return after
}

// A store that may have forgotten entries or votes is not opened, now or later.
func TestLostTailIsRefused(t *testing.T) {
	const dir = "data/raft"
	// end returns where the written part of a log ends; logs are preallocated.
	end := func(b []byte) int { return len(bytes.TrimRight(b, "\x00")) }
	markFile := func(t *testing.T, fsys vfs.FS) string { return filepath.Join(dir, markName) }
	log := func(t *testing.T, fsys vfs.FS) string { return newestLog(t, fsys, dir) }
	for _, tc := range []struct {
		name string
		file func(*testing.T, vfs.FS) string
		harm func([]byte) []byte
		want string
	}{
		{"cut in half", log, func(b []byte) []byte { return b[:end(b)/2] }, "had been synced"},
		{"vote cut", log, func(b []byte) []byte { return b[:end(b)-1] }, "ends at commit 101, but commit 102 had been synced"},
		{"zeroed from the half", log, func(b []byte) []byte { clear(b[end(b)/2:]); return b }, "had been synced"},
		{"emptied", log, func([]byte) []byte { return nil }, "had been synced"},
		{"mark damaged", markFile, func(b []byte) []byte { return bytes.Repeat([]byte{1}, len(b)) }, "MARK is missing or damaged"},
		{"mark emptied", markFile, func(b []byte) []byte { return nil }, "MARK is missing or damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fsys := voted(t)
			rewrite(t, fsys, tc.file(t, fsys), tc.harm)
			for range 2 {
				s, err := openStore(fsys, dir, slog.New(slog.DiscardHandler), func(err error) { panic(err) })
				if err == nil {
					mustClose(t, s)
					t.Fatal("the store was opened")
				}
				if !errors.Is(err, errLostTail) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), dir) {
					t.Fatalf("open: %v, want an error with %q and the directory", err, tc.want)
				}
			}
		})
	}
}

func TestLostTailSaysWhatToDo(t *testing.T) {
	for servers, want := range map[int]string{1: "restore the whole directory", 3: "all other servers are up"} {
		fsys := vfs.NewCrashableMem()
		open := func() (*Raft, error) {
			return Open(Config{Name: "a", Servers: clusterServers[:servers], FS: fsys, Dir: "raft", Streams: newNetwork().listen("a:1")}, &ledger{})
		}
		r, err := open()
		if err != nil {
			t.Fatal(err)
		}
		after := fsys.CrashClone(vfs.CrashCloneCfg{})
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		fsys = after
		rewrite(t, fsys, newestLog(t, fsys, "raft"), func([]byte) []byte { return nil })
		if r, err = open(); err == nil {
			r.Close()
			t.Fatal("a server without its log was started")
		}
		if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "store in raft") {
			t.Errorf("open: %v, want an error with %q and the directory", err, want)
		}
	}
}

// One slot of the mark may be torn by a crash: the other still vouches.
func TestTornMark(t *testing.T) {
	fsys := voted(t)
	rewrite(t, fsys, "data/raft/"+markName, func(b []byte) []byte { b[10] ^= 1; return b }) // the slot of commit 102
	s := mustOpen(t, fsys)
	defer mustClose(t, s)
	if s.mark.commits != 102 {
		t.Errorf("the mark says %d commits, want 102", s.mark.commits)
	}
}
