package consensus

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
)

var testServers = raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}, {ID: "b", Address: "b:1"}}}

func saveSnapshot(t *testing.T, s *store, index, term uint64, data []byte) error {
	t.Helper()
	k, err := s.Create(raft.SnapshotVersionMax, index, term, testServers, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Write(data); err != nil {
		t.Fatal(err)
	}
	return k.Close()
}

func mustSave(t *testing.T, s *store, index, term uint64, data []byte) {
	t.Helper()
	if err := saveSnapshot(t, s, index, term, data); err != nil {
		t.Fatal(err)
	}
}

func snapshotList(t *testing.T, s *store) []string {
	t.Helper()
	metas, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range metas {
		out = append(out, m.ID)
	}
	return out
}

func TestSnapshotStore(t *testing.T) {
	fsys := vfs.NewCrashableMem()
	s := mustOpen(t, fsys)
	sizes := []int{0, 1, partBytes - 1, partBytes, partBytes + 1, 3*partBytes + 5}
	contents := map[string][]byte{}
	rng := rand.New(rand.NewPCG(3, 4))
	for i, size := range sizes {
		data := make([]byte, size)
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		index := uint64(10 * (i + 1))
		mustSave(t, s, index, 2, data)
		contents[snapshotID{index, 2}.String()] = data
		want := []string{snapshotID{index, 2}.String()}
		if i > 0 {
			want = append(want, snapshotID{index - 10, 2}.String())
		}
		// What was stored survives a crash, and the one before the one before is gone.
		after := mustOpen(t, fsys.CrashClone(vfs.CrashCloneCfg{}))
		for _, s := range []*store{s, after} {
			if got := snapshotList(t, s); !slices.Equal(got, want) {
				t.Fatalf("snapshots %v, want %v", got, want)
			}
			for _, id := range want {
				meta, from, err := s.Open(id)
				if err != nil {
					t.Fatal(err)
				}
				data, err := io.ReadAll(from)
				if err != nil || !bytes.Equal(data, contents[id]) || meta.Size != int64(len(data)) || meta.ID != id ||
					meta.ConfigurationIndex != 1 || !slices.Equal(meta.Configuration.Servers, testServers.Servers) {
					t.Fatalf("snapshot %s: %d bytes, %+v, %v", id, len(data), meta, err)
				}
			}
		}
		mustClose(t, after)
	}
	if _, _, err := s.Open("2-10"); err == nil {
		t.Error("a dropped snapshot was opened")
	}
	// What is dropped leaves no content behind.
	ids, err := s.snapshotIDs()
	if err != nil {
		t.Fatal(err)
	}
	it, err := s.iterate(prefixSpan(prefixContent))
	if err != nil {
		t.Fatal(err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		if id, err := parseSnapshotKey(it.Key()[:17]); err != nil || !slices.Contains(ids, id) {
			t.Errorf("content of snapshot %s is left, %v", id, err)
		}
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
}

func TestSnapshotReplacesItselfOnly(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer mustClose(t, s)
	mustSave(t, s, 20, 3, bytes.Repeat([]byte("x"), 2*partBytes))
	mustSave(t, s, 20, 3, []byte("again"))
	for _, older := range []snapshotID{{19, 3}, {20, 2}} {
		if err := saveSnapshot(t, s, older.index, older.term, []byte("old")); err == nil || !strings.Contains(err.Error(), "3-20 is newer") {
			t.Errorf("saving %s: %v", older, err)
		}
	}
	if got := snapshotList(t, s); !slices.Equal(got, []string{"3-20"}) {
		t.Errorf("snapshots %v", got)
	}
	if _, data, err := s.readSnapshot(snapshotID{20, 3}); err != nil || string(data) != "again" {
		t.Errorf("content %q, %v", data, err)
	}
}

func TestCancelledSnapshot(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer mustClose(t, s)
	k, _ := s.Create(raft.SnapshotVersionMax, 5, 1, testServers, 1, nil)
	if _, err := k.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := k.Cancel(); err != nil {
		t.Fatal(err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if got := snapshotList(t, s); len(got) != 0 {
		t.Errorf("snapshots %v", got)
	}
}

// Invariant 2: a snapshot that is installed keeps of the log what agrees with it,
// and nothing else.
func TestSnapshotReplacesLog(t *testing.T) {
	for _, tc := range []struct {
		name        string
		last        uint64 // the log is from 1 to last, of term 2
		index, term uint64
		first, want uint64
		kept        bool
	}{
		{name: "own snapshot", last: 30, index: 20, term: 2, first: 1, want: 30, kept: true},
		{name: "at the end of the log", last: 20, index: 20, term: 2, first: 1, want: 20, kept: true},
		{name: "beyond the log", last: 15, index: 20, term: 2, first: 20, want: 20},
		{name: "empty log", last: 0, index: 20, term: 2, first: 20, want: 20},
		{name: "contradicted, log ends there", last: 20, index: 20, term: 3, first: 20, want: 20},
		{name: "contradicted, log goes on", last: 30, index: 20, term: 3, first: 20, want: 30},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fsys := vfs.NewCrashableMem()
			s := mustOpen(t, fsys)
			for i := uint64(1); i <= tc.last; i++ {
				if err := s.StoreLog(entry(i, 2, "x")); err != nil {
					t.Fatal(err)
				}
			}
			mustSave(t, s, tc.index, tc.term, []byte("state"))
			after := mustOpen(t, fsys.CrashClone(vfs.CrashCloneCfg{}))
			for _, s := range []*store{s, after} {
				checkEnds(t, s, tc.first, tc.want)
				var got raft.Log
				if err := s.GetLog(tc.index, &got); err != nil || got.Term != tc.term {
					t.Fatalf("entry %d: %+v, %v", tc.index, got, err)
				}
				if kept := got.Type == raft.LogCommand; kept != tc.kept {
					t.Errorf("entry %d kept: %v, want %v", tc.index, kept, tc.kept)
				}
				if r, err := s.recover(slog.New(slog.DiscardHandler)); err != nil || string(r.snapshot) != "state" || !r.restore || r.empty {
					t.Errorf("recovered %+v, %v", r, err)
				}
				if err := s.StoreLog(entry(tc.want+1, 3, "y")); err != nil {
					t.Error(err)
				}
				// Compaction leaves the entry that the next ones hang on.
				if err := s.DeleteRange(1, tc.index); err != nil {
					t.Error(err)
				}
				checkEnds(t, s, tc.index, tc.want+1)
				mustClose(t, s)
			}
		})
	}
}

func TestRecover(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	damage := func(t *testing.T, s *store, id snapshotID) {
		t.Helper()
		if err := s.db.Set(id.part(0), []byte("other"), pebble.Sync); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name      string
		snapshots []uint64
		first     uint64 // the log is from first to 30
		damaged   []uint64
		want      string // content of the recovered snapshot
		fails     string
	}{
		{name: "log alone", first: 1},
		{name: "snapshot and log", snapshots: []uint64{10, 20}, first: 5, want: "state 20"},
		{name: "log begins with the snapshot", snapshots: []uint64{20}, first: 20, want: "state 20"},
		{name: "log begins too late", snapshots: []uint64{20}, first: 21, fails: "log entries are missing"},
		{name: "no log", snapshots: []uint64{20}, first: 31, fails: "log entries are missing"},
		{name: "log without its start", first: 2, fails: "log entries are missing"},
		{name: "log ends before the snapshot", snapshots: []uint64{31}, first: 1, fails: "log entries are missing"},
		{name: "damaged, log reaches back", snapshots: []uint64{10, 20}, first: 10, damaged: []uint64{20}, want: "state 10"},
		{name: "damaged, log does not reach back", snapshots: []uint64{10, 20}, first: 11, damaged: []uint64{20}, fails: "does not reach back"},
		{name: "all damaged, whole log", snapshots: []uint64{10, 20}, first: 1, damaged: []uint64{10, 20}},
		{name: "all damaged", snapshots: []uint64{10, 20}, first: 2, damaged: []uint64{10, 20}, fails: "does not reach back"},
		{name: "older one damaged", snapshots: []uint64{10, 20}, first: 15, damaged: []uint64{10}, want: "state 20"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := mustOpen(t, vfs.NewMem())
			defer func() { mustClose(t, s) }()
			for i := uint64(1); i <= 30; i++ {
				l := entry(i, 2, "x")
				if i == 1 {
					l.Type, l.Data = raft.LogConfiguration, raft.EncodeConfiguration(testServers)
				}
				if err := s.StoreLog(l); err != nil {
					t.Fatal(err)
				}
			}
			for _, index := range tc.snapshots {
				if index > 30 {
					// No snapshot may be ahead of the log: write one past its guard.
					id := snapshotID{index, 2}
					if err := s.db.Set(id.key(prefixSnapshot), encodeSnapshotMeta(snapshotMeta{}), pebble.Sync); err != nil {
						t.Fatal(err)
					}
					continue
				}
				mustSave(t, s, index, 2, fmt.Appendf(nil, "state %d", index))
			}
			// DeleteRange would spare what must be there.
			if err := s.db.DeleteRange(logKey(1), logKey(tc.first), pebble.Sync); err != nil {
				t.Fatal(err)
			}
			for _, index := range tc.damaged {
				damage(t, s, snapshotID{index, 2})
			}
			r, err := s.recover(quiet)
			if tc.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tc.fails) {
					t.Fatalf("recover: %v, want an error with %q", err, tc.fails)
				}
				return
			}
			if err != nil || string(r.snapshot) != tc.want || r.restore != (tc.want != "") || r.empty || !slices.Equal(r.servers.Servers, testServers.Servers) {
				t.Fatalf("recovered %+v, %v", r, err)
			}
			// Raft takes the first one it is offered.
			if list := snapshotList(t, s); r.restore && list[0] != "2-"+strings.TrimPrefix(tc.want, "state ") {
				t.Errorf("snapshots %v", list)
			}
		})
	}
	s := mustOpen(t, vfs.NewMem())
	defer mustClose(t, s)
	if r, err := s.recover(quiet); err != nil || !r.empty || r.restore {
		t.Errorf("new store: %+v, %v", r, err)
	}
}
