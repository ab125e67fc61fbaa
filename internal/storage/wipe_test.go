package storage

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func count(t *testing.T, s *Store, namespace, vnode uint32) int {
	t.Helper()
	n := 0
	if err := s.Scan(namespace, []uint32{vnode}, nil, nil, func(uint32, []byte, []byte) bool { n++; return true }); err != nil {
		t.Fatal(err)
	}
	return n
}

// A wiped vnode is empty in every namespace, also to the version cache and the hash
// tree, and the note is on disk with it.
func TestWipeVnodes(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	for ns := range uint32(2) {
		for v := range uint32(3) {
			for i := range 10 {
				put(t, s, Write{Namespace: ns + 1, Vnode: v, Key: fmt.Append(nil, i), Record: value(100, "old")})
			}
		}
	}
	before, _, _, err := s.Tree(t.Context(), 1, 1, 0, 2, nil, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WipeVnodes([]uint32{1, 2}, []uint32{1, 2}, "note", []byte("done")); err != nil {
		t.Fatal(err)
	}
	put(t, s, Write{Namespace: 1, Vnode: 1, Key: []byte("3"), Record: value(1, "older than what was wiped")})
	after, _, _, err := s.Tree(t.Context(), 1, 1, 0, 2, nil, nil, 1)
	if err != nil || fmt.Sprint(before) == fmt.Sprint(after) {
		t.Errorf("the hash tree did not notice: %v, %v", after, err)
	}
	s = reopen(t, s, fs)
	for ns := range uint32(2) {
		for v, want := range []int{10, 0, 0} {
			if ns == 0 && v == 1 {
				want = 1
			}
			if got := count(t, s, ns+1, uint32(v)); got != want {
				t.Errorf("namespace %d vnode %d has %d records, want %d", ns+1, v, got, want)
			}
		}
	}
	if b, err := s.Meta("note"); err != nil || string(b) != "done" {
		t.Errorf("note %q, %v", b, err)
	}
	closeStore(t, s)
}

// reopen closes a store and opens it again.
func reopen(t *testing.T, s *Store, fs vfs.FS) *Store {
	t.Helper()
	closeStore(t, s)
	return open(t, fs)
}

func TestSetAside(t *testing.T) {
	fs := filled(t, false)
	s := open(t, fs)
	if _, err := SetAside(fs, "data", "x"); !errors.Is(err, ErrInUse) {
		t.Fatalf("of an open store: %v", err)
	}
	closeStore(t, s)
	if HasAside(fs, "data") {
		t.Error("something is aside before anything was set aside")
	}
	path, err := SetAside(fs, "data", "x")
	if err != nil || path != filepath.Join("data", "lost-x") {
		t.Fatalf("%q, %v", path, err)
	}
	s = open(t, fs)
	if boots, err := s.Boots(); s.LostTail() != "" || boots != 1 || err != nil || count(t, s, 1, 7) != 0 {
		t.Errorf("the directory is not as good as new: lost %q, %d starts, %v", s.LostTail(), boots, err)
	}
	closeStore(t, s)
	aside := openIn(t, fs, path)
	if n := count(t, aside, 1, 7); n != 500 {
		t.Errorf("what was set aside has %d records, want 500", n)
	}
	closeStore(t, aside)
	if !HasAside(fs, "data") {
		t.Error("nothing is aside")
	}
	if err := ForgetAside(fs, "data"); err != nil {
		t.Fatal(err)
	}
	if HasAside(fs, "data") {
		t.Error("something is aside after it was forgotten")
	}
	names, err := fs.List("data")
	if err != nil || strings.Contains(strings.Join(names, " "), "lost-") {
		t.Errorf("left are %v, %v", names, err)
	}
}

func openIn(t *testing.T, fs vfs.FS, dir string) *Store {
	t.Helper()
	cfg := testConfig(t, fs)
	cfg.Dir = dir
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// failingFS fails renames from the nth on, as a crash does.
type failingFS struct {
	vfs.FS
	left *int
}

func (f failingFS) Rename(from, to string) error {
	if *f.left--; *f.left < 0 {
		return errors.New("crash")
	}
	return f.FS.Rename(from, to)
}

// Wherever setting aside is interrupted, the store that is left does not open, and
// the next attempt takes it to the end.
func TestSetAsideInterrupted(t *testing.T) {
	for left := 0; ; left++ {
		fs := filled(t, false)
		n := left
		_, err := SetAside(failingFS{fs, &n}, "data", "x")
		if err == nil {
			if left < 5 {
				t.Fatalf("there were only %d files", left)
			}
			return
		}
		if left > 0 {
			if _, err := Open(testConfig(t, fs)); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("after %d files it opens with %v", left, err)
			}
		}
		path, err := SetAside(fs, "data", "y")
		if err != nil || left > 0 && path != filepath.Join("data", "lost-x") {
			t.Fatalf("%q, %v", path, err)
		}
		s, aside := open(t, fs), openIn(t, fs, path)
		if n := count(t, aside, 1, 7); n != 500 || count(t, s, 1, 7) != 0 {
			t.Fatalf("interrupted after %d files: %d records were kept, want 500", left, n)
		}
		closeStore(t, s)
		closeStore(t, aside)
	}
}

// Records that cannot be read are wiped like others: a node with some must be able to
// take in a topology that assigns vnodes to it.
func TestWipeOfDamagedVnodes(t *testing.T) {
	fs := rotStore(t)
	path, _ := largestTable(t, fs)
	rot(t, fs, path, 100) // in the first block, which is of vnode 0
	s := open(t, fs)
	defer closeStore(t, s)
	if err := s.WipeVnodes([]uint32{1, 2}, []uint32{0, 5}, "note", []byte("done")); err != nil {
		t.Fatal(err)
	}
	if b, err := s.Meta("note"); err != nil || string(b) != "done" {
		t.Errorf("note %q, %v", b, err)
	}
	if got := count(t, s, 1, 5); got != 0 {
		t.Errorf("%d records are left", got)
	}
}
