package storage

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// ingest takes records in as a sorted file.
func ingest(t *testing.T, s *Store, writes ...Write) {
	t.Helper()
	in, err := s.NewIngest(Place{1, 7})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range writes {
		if err := in.Add(w.Key, w.Record); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Finish(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func compact(t *testing.T, s *Store) {
	t.Helper()
	if err := s.db.Compact(context.Background(), []byte{0}, []byte{255}, true); err != nil {
		t.Fatal(err)
	}
}

// Invariant 6: what comes in a file joins what is there, and what comes later joins it.
func TestIngestedRecordsJoin(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs)
	put(t, s, write("newer", value(9, "nine")), write("older", value(2, "two")), write("gone", tombstone(9)))
	put(t, s, write("newer", value(9, "nine")), write("older", value(3, "three"))) // versions are cached by now
	ingest(t, s, write("fresh", value(1, "one")), write("gone", value(4, "four")), write("newer", value(5, "five")), write("older", value(5, "five")))
	check := func() {
		t.Helper()
		wantRecord(t, s, "fresh", value(1, "one"))
		wantRecord(t, s, "gone", tombstone(9))
		wantRecord(t, s, "newer", value(9, "nine"))
		wantRecord(t, s, "older", value(5, "five"))
	}
	check()
	put(t, s, write("older", value(4, "late"))) // by the cache of before it would be greater
	check()
	compact(t, s)
	check()
	closeStore(t, s)
	s = open(t, fs)
	defer closeStore(t, s)
	check()
}

// Whatever order Applies, files, compactions and reopenings come in, the greatest record
// of each key is what is there.
func TestRandomIngests(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewMem()
	s := open(t, fs)
	defer func() { closeStore(t, s) }()
	greatest := map[string]uint64{}
	draw := func() (out []Write) {
		for k := range 12 {
			if key, v := fmt.Sprintf("k%02d", k), uint64(1+rng.IntN(500)); rng.IntN(2) == 0 {
				out = append(out, write(key, value(v, fmt.Sprint(v))))
				greatest[key] = max(greatest[key], v)
			}
		}
		return out
	}
	for i := range 120 {
		switch rng.IntN(8) {
		case 0, 1, 2:
			put(t, s, draw()...)
		case 3, 4, 5:
			if ws := draw(); len(ws) > 0 {
				ingest(t, s, ws...)
			}
		case 6:
			compact(t, s)
		case 7:
			closeStore(t, s)
			s = open(t, fs)
		}
		for key, v := range greatest {
			got, err := s.Get(1, 7, []byte(key))
			if err != nil || string(got) != string(value(v, fmt.Sprint(v))) {
				t.Fatalf("seed %d, step %d: %s is %x, %v; want version %d", seed, i, key, got, err, v)
			}
		}
	}
}

// Writers of the same keys go on while a file is taken in.
func TestIngestBesideWriters(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for v := range uint64(200) {
				put(t, s, write(fmt.Sprintf("k%d", v%10), value(4*v+uint64(w)+1, "w")))
			}
		})
	}
	for v := range uint64(20) {
		var ws []Write
		for k := range 10 {
			ws = append(ws, write(fmt.Sprintf("k%d", k), value(40*v+1000, "ingested")))
		}
		ingest(t, s, ws...)
	}
	wg.Wait()
	for k := range 10 {
		wantRecord(t, s, fmt.Sprintf("k%d", k), value(40*19+1000, "ingested"))
	}
}

// A tree that was built before a file was taken in is the same as one built after.
func TestTreesNoticeIngests(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	for i := range 300 {
		put(t, s, write(fmt.Sprintf("k%03d", 2*i), value(1, "x")))
	}
	top := func() TreeHash {
		nodes, _, _, err := s.Tree(context.Background(), 1, 7, 0, 0, nil, nil, 10)
		if err != nil || len(nodes) == 0 {
			t.Fatalf("%d nodes, %v", len(nodes), err)
		}
		return nodes[0].Hash
	}
	before := top()
	var ws []Write
	for i := range 300 {
		ws = append(ws, write(fmt.Sprintf("k%03d", 2*i+1), value(1, "y")))
	}
	slices.SortFunc(ws, func(a, b Write) int { return slices.Compare(a.Key, b.Key) })
	ingest(t, s, ws...)
	after := top()
	s.trees.forget(func(vnodeID) bool { return true })
	if built := top(); before == after || after != built {
		t.Errorf("hash %x before, %x after, %x when built anew", before, after, built)
	}
}

// A power cut at any moment leaves all of a file's records or none, and no file.
func TestPowerCutDuringIngest(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, stage := range []string{"begun", "built", "taken in"} {
		for n := range uint64(5) {
			cutDuringIngest(t, stage, vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(seed, n))})
		}
	}
}

// cutDuringIngest cuts the power while a file is at a stage.
func cutDuringIngest(t *testing.T, stage string, crash vfs.CrashCloneCfg) {
	t.Helper()
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	put(t, s, write("a", value(1, "before")), write("k0500", value(9, "greater")))
	in, err := s.NewIngest(Place{1, 7})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		if err := in.Add(fmt.Appendf(nil, "k%04d", i), value(5, "v")); err != nil {
			t.Fatal(err)
		}
	}
	switch stage {
	case "built":
		err = in.w.Close()
	case "taken in":
		err = in.Finish(context.Background())
	}
	if err != nil {
		t.Fatal(err)
	}
	after := fs.CrashClone(crash)
	switch stage {
	case "begun":
		in.Abort()
	case "built":
		in.remove()
	}
	closeStore(t, s)
	s = open(t, after)
	defer closeStore(t, s)
	wantRecord(t, s, "a", value(1, "before"))
	wantRecord(t, s, "k0500", value(9, "greater"))
	if _, err := s.Get(1, 7, []byte("k0501")); (stage == "taken in") != (err == nil) {
		t.Errorf("%s: %v", stage, err)
	}
	left, err := after.List(filepath.Join(s.cfg.Dir, incomingDir))
	if err == nil && len(left) > 0 {
		t.Errorf("%s: %v are left", stage, left)
	}
}

func TestIngestRefusesWhatDoesNotDecode(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	in, err := s.NewIngest(Place{1, 7})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Abort()
	if err := in.Add([]byte("k"), []byte("junk")); !errors.Is(err, ErrCorrupt) {
		t.Errorf("error %v", err)
	}
}

// Without space for it a file is given up, and nothing else is: the store goes on.
func TestNoSpaceForAnIngest(t *testing.T) {
	full := false
	fs := noRoomFS{vfs.NewMem(), &full}
	s := open(t, fs)
	defer closeStore(t, s)
	in, err := s.NewIngest(Place{1, 7})
	if err != nil {
		t.Fatal(err)
	}
	full = true
	for i := 0; err == nil && i < 100; i++ {
		err = in.Add(fmt.Appendf(nil, "k%04d", i), value(5, "v"))
	}
	if err == nil {
		err = in.Finish(context.Background())
	} else {
		in.Abort()
	}
	if !errors.Is(err, ErrDiskFull) {
		t.Errorf("error %v", err)
	}
	if err := s.failure(); err != nil {
		t.Errorf("the store has ended: %v", err)
	}
	if s.RefusesRecords() == "" {
		t.Error("the store does not notice that its disk is full")
	}
}

// noRoomFS has no space for the files of ingests while full is set.
type noRoomFS struct {
	vfs.FS
	full *bool
}

func (f noRoomFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, category)
	if err != nil || filepath.Base(filepath.Dir(name)) != incomingDir {
		return file, err
	}
	return noRoomFile{file, f.full}, nil
}

type noRoomFile struct {
	vfs.File
	full *bool
}

func (f noRoomFile) Write(b []byte) (int, error) {
	if *f.full {
		return 0, syscall.ENOSPC
	}
	return f.File.Write(b)
}
