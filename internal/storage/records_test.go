package storage

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// What was read is cached, and what changes a record changes what is cached, or drops it.
func TestCachedRecords(t *testing.T) {
	old := value(5, "five")
	for _, tc := range []struct {
		name         string
		change       func(t *testing.T, s *Store)
		want, cached []byte // nil: not found, not cached
	}{
		{"nothing", func(*testing.T, *Store) {}, old, old},
		{"a newer record", func(t *testing.T, s *Store) { put(t, s, write("k", value(6, "six"))) }, value(6, "six"), value(6, "six")},
		{"an older one", func(t *testing.T, s *Store) { put(t, s, write("k", value(4, "four"))) }, old, old},
		{"the same version with greater bytes", func(t *testing.T, s *Store) { put(t, s, write("k", value(5, "six"))) }, value(5, "six"), nil},
		{"a tombstone", func(t *testing.T, s *Store) { put(t, s, write("k", tombstone(6))) }, tombstone(6), nil},
		{"a record that expires", func(t *testing.T, s *Store) { put(t, s, write("k", expiring(6, 1))) }, expiring(6, 1), nil},
		{"two in one batch", func(t *testing.T, s *Store) {
			put(t, s, write("k", value(7, "seven")), write("k", value(6, "six")))
		}, value(7, "seven"), value(7, "seven")},
		{"a file", func(t *testing.T, s *Store) { ingest(t, s, write("k", value(6, "six"))) }, value(6, "six"), nil},
		{"a wipe", func(t *testing.T, s *Store) {
			if err := s.WipeVnodes([]uint32{1}, []uint32{7}, "note", []byte("done")); err != nil {
				t.Fatal(err)
			}
		}, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, vfs.NewMem())
			defer closeStore(t, s)
			put(t, s, write("k", old))
			if s.Cached(1, 7, []byte("k")) != nil {
				t.Fatal("it is cached before it was read")
			}
			wantRecord(t, s, "k", old)
			if got := s.Cached(1, 7, []byte("k")); !bytes.Equal(got, old) {
				t.Fatalf("after a read %x is cached", got)
			}
			tc.change(t, s)
			if got := s.Cached(1, 7, []byte("k")); !bytes.Equal(got, tc.cached) {
				t.Errorf("%x is cached, want %x", got, tc.cached)
			}
			got, err := s.Get(1, 7, []byte("k"))
			if tc.want == nil && !errors.Is(err, ErrNotFound) || tc.want != nil && (err != nil || !bytes.Equal(got, tc.want)) {
				t.Errorf("read %x, %v, want %x", got, err, tc.want)
			}
		})
	}
}

// A record is cached while its key is written, and is not handed out without waiting before
// it is on disk.
func TestCachedRecordsThatAreNotOnDisk(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", value(5, "five")))
	wantRecord(t, s, "k", value(5, "five"))
	c, err := s.Apply([]Write{write("k", value(6, "six"))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Cached(1, 7, []byte("k")); got != nil {
		t.Errorf("%x is handed out before it is on disk", got)
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := s.Cached(1, 7, []byte("k")); !bytes.Equal(got, value(6, "six")) {
		t.Errorf("%x is cached", got)
	}
}

// A read that was under way while a vnode was wiped tells of what was.
func TestReadsAcrossAWipeAreNotCached(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", value(5, "five")))
	k := appendRecordKey(nil, 1, 7, []byte("k"))
	st := s.latches.of(k)
	off := s.latches.suspend(rangeOf(Place{1, 7}))
	before := st.generation.Load()
	rec, err := s.get(k)
	if err != nil {
		t.Fatal(err)
	}
	off.resume()
	s.learn(st, k, rec, before)
	if got := s.Cached(1, 7, []byte("k")); got != nil {
		t.Errorf("%x is cached", got)
	}
}

// The cache keeps to its bound, whatever is read and written.
func TestRecordCacheIsBounded(t *testing.T) {
	const limit = 4096
	c := newRecordCache(limit)
	rng := rand.New(rand.NewPCG(1, 1))
	held := func() (n int64) {
		for _, k := range c.keys() {
			n += cachedSize(k, c.get([]byte(k)))
		}
		return n
	}
	for i := range 5000 {
		key := fmt.Sprint(rng.IntN(200))
		rec := record.Record{Version: record.Version{Time: hlc.Timestamp(i)}, Kind: record.Value, Payload: make([]byte, rng.IntN(600))}
		switch rng.IntN(4) {
		case 0:
			c.remove(key)
		case 1:
			c.replaced(key, rec, record.Encode(rec))
		default:
			c.learn([]byte(key), rec, record.Encode(rec))
		}
		if n := held(); n != c.bytes || n > limit {
			t.Fatalf("after %d steps it holds %d bytes, counts %d, and may have %d", i, n, c.bytes, limit)
		}
	}
	if len(c.keys()) == 0 {
		t.Error("it holds nothing")
	}
}

// In simulations time goes on while somebody waits for a latch.
func TestLatchesInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig(t, vfs.NewMem())
		cfg.SyncDelay = func() time.Duration { return time.Millisecond }
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer closeStore(t, s)
		st := s.latches.of(appendRecordKey(nil, 1, 7, []byte("k")))
		st.mu.Lock()
		time.AfterFunc(time.Second, st.mu.Unlock)
		put(t, s, write("k", value(5, "five")))
		wantRecord(t, s, "k", value(5, "five"))
	})
}
