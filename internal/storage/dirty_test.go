package storage

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
)

func places(s *Store) (out []Place) {
	for _, d := range s.Dirty() {
		out = append(out, d.Place)
	}
	return out
}

func powerCut(t *testing.T, s *Store, fs *vfs.MemFS) (*Store, *vfs.MemFS) {
	t.Helper()
	clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 0, RNG: rand.New(rand.NewPCG(1, 2))})
	closeStore(t, s)
	return open(t, clone), clone
}

// Invariant 15: a mark is on disk when MarkDirty returns.
func TestDirtyMarksSurviveAPowerCut(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	if err := s.MarkDirty(1000, Place{2, 9}, Place{1, 300}, Place{2, 9}); err != nil {
		t.Fatal(err)
	}
	if err := s.MarkDirty(2000, Place{1, 300}); err != nil {
		t.Fatal(err)
	}
	s, fs = powerCut(t, s, fs)
	want := []Dirty{{Place: Place{1, 300}, SinceMillis: 1000}, {Place: Place{2, 9}, SinceMillis: 1000}}
	if diff := cmp.Diff(want, s.Dirty(), cmp.AllowUnexported(Dirty{})); diff != "" {
		t.Fatalf("marks after a power cut (-want +got):\n%s", diff)
	}
	if err := s.ClearDirty(s.Dirty()[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.SetMeta("x", nil); err != nil { // which syncs what went before
		t.Fatal(err)
	}
	s, _ = powerCut(t, s, fs)
	defer closeStore(t, s)
	if diff := cmp.Diff([]Place{{2, 9}}, places(s)); diff != "" {
		t.Fatalf("marks after one was cleared (-want +got):\n%s", diff)
	}
}

// A repair that began before a place was marked once more does not clear the mark.
func TestMarkedAgainStaysDirty(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	for range 2 {
		if err := s.MarkDirty(1, Place{1, 1}); err != nil {
			t.Fatal(err)
		}
	}
	before := s.Dirty()[0]
	if err := s.MarkDirty(2, Place{1, 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.ClearDirty(before); err != nil || len(s.Dirty()) != 1 {
		t.Fatalf("the mark is cleared, %v", err)
	}
	s, _ = powerCut(t, s, fs)
	defer closeStore(t, s)
	now := s.Dirty()
	if len(now) != 1 {
		t.Fatal("the mark is gone from the disk")
	}
	if err := s.ClearDirty(now[0]); err != nil || len(s.Dirty()) != 0 {
		t.Fatalf("marks %+v, %v", s.Dirty(), err)
	}
}

// Marks and clears that race: a mark that was made last is on disk.
func TestDirtyMarksUnderRaces(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	var wg sync.WaitGroup
	for v := range uint32(8) {
		wg.Go(func() {
			for range 50 {
				if err := s.MarkDirty(1, Place{1, v}, Place{1, 99}); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range 50 {
				for _, d := range s.Dirty() {
					if err := s.ClearDirty(d); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for v := range uint32(8) {
		if err := s.MarkDirty(1, Place{1, v}); err != nil {
			t.Fatal(err)
		}
	}
	s, _ = powerCut(t, s, fs)
	defer closeStore(t, s)
	if got := places(s); len(got) < 8 {
		t.Errorf("marks %v", got)
	}
}

// Hints that are dropped leave a mark in the same commit.
func TestDroppedHintsLeaveAMark(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	var hints []Hint
	for i := range 3 {
		h := Hint{Target: 2, Seq: s.NextHintSeq(), CreatedMillis: 1, Write: write(fmt.Sprint(i), value(1, "x"))}
		h.Vnode = uint32(i / 2)
		hints = append(hints, h)
	}
	commit, err := s.Apply(nil, hints)
	if err != nil {
		t.Fatal(err)
	}
	if err := commit.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := s.DropHints(hints[:2], 7); err != nil {
		t.Fatal(err)
	}
	s, _ = powerCut(t, s, fs)
	defer closeStore(t, s)
	var left []uint64
	if err := s.AllHints(func(h Hint) bool { left = append(left, h.Seq); return true }); err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 || left[0] != hints[2].Seq || !cmp.Equal(places(s), []Place{{1, 0}}) {
		t.Errorf("hints %v and marks %v are left", left, places(s))
	}
}

func TestDirtyFormat(t *testing.T) {
	d := Dirty{Place: Place{Namespace: 0x01020304, Vnode: 0x05060708}, SinceMillis: 0x0a0b0c0d0e0f}
	const key, val = "050102030405060708", "0100000a0b0c0d0e0f"
	if got := hex.EncodeToString(dirtyKey(d.Place)); got != key {
		t.Errorf("key %s, want %s", got, key)
	}
	if got := hex.EncodeToString(encodeDirty(d)); got != val {
		t.Errorf("value %s, want %s", got, val)
	}
	for b, want := range map[string]error{"": ErrCorrupt, "00": ErrCorrupt, "0100": ErrCorrupt, "02": ErrNewerFormat, val + "00": ErrCorrupt, val: nil} {
		raw, err := hex.DecodeString(b)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeDirty(dirtyKey(d.Place), raw)
		if !errors.Is(err, want) || err == nil && got != d {
			t.Errorf("%q is read as %+v, %v; want %v", b, got, err, want)
		}
	}
	if _, err := decodeDirty([]byte{kindDirty, 0}, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a short key: %v", err)
	}
}
