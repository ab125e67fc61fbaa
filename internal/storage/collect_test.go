package storage

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

func expiring(version uint64, at int64) []byte {
	return record.Encode(record.Record{
		Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1}, Kind: record.Value, ExpiresAt: at, Payload: []byte("x"),
	})
}

func repair(key string, rec []byte) Write {
	w := write(key, rec)
	w.Repair = true
	return w
}

func certify(t testingT, s *Store, ts hlc.Timestamp) {
	t.Helper()
	if err := errors.Join(s.Promise(1, 7, ts), s.Certify(1, 7, ts, []uint64{1, 2, 3})); err != nil {
		t.Fatal(err)
	}
}

func collect(t testingT, s *Store, keys ...string) int {
	t.Helper()
	var all [][]byte
	for _, k := range keys {
		all = append(all, []byte(k))
	}
	n, err := s.Collect(1, 7, all)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func wantAbsent(t testingT, s *Store, key string) {
	t.Helper()
	if b, err := s.Get(1, 7, []byte(key)); !errors.Is(err, ErrNotFound) {
		t.Fatalf("get %s: %x, %v; want nothing", key, b, err)
	}
}

// The format of a collection state is frozen.
func TestCollectionGolden(t *testing.T) {
	c := Collection{Promise: 0x0203, Certificate: 0x0102, Endpoints: []uint64{1, 2, 300}}
	const golden = "01" + "0000000000000203" + "0000000000000102" + "01" + "02" + "ac02"
	if got := hex.EncodeToString(encodeCollection(c)); got != golden {
		t.Fatalf("encoded as %s, want %s", got, golden)
	}
	if got := hex.EncodeToString(collectionKey(1, 7)); got != "04"+"00000001"+"00000007" {
		t.Fatalf("key is %s", got)
	}
	for _, bad := range []string{
		"", "00", "01", golden[:20], golden + "01", golden + "80",
		"02" + golden[2:], // newer
		"01" + "0000000000000101" + "0000000000000102" + "01", // certificate above promise
		"01" + "0000000000000203" + "0000000000000102",        // for nobody
		"01" + "0000000000000203" + "0000000000000000" + "01", // no certificate
	} {
		b, _ := hex.DecodeString(bad)
		if _, err := decodeCollection(b); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewerFormat) {
			t.Errorf("%s decodes with error %v", bad, err)
		}
	}
}

func FuzzDecodeCollection(f *testing.F) {
	f.Add(encodeCollection(Collection{Promise: 9}))
	f.Add(encodeCollection(Collection{Promise: 9, Certificate: 8, Endpoints: []uint64{1, 1 << 60}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCollection(b)
		if err == nil && !bytes.Equal(encodeCollection(c), b) {
			t.Errorf("%x decodes to %+v, which is encoded as %x", b, c, encodeCollection(c))
		}
	})
}

// Promises and certificates survive, only rise, and go with their namespace.
func TestCollectionStates(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := open(t, fs)
	certify(t, s, 10)
	certify(t, s, 5)
	if err := s.Promise(1, 7, 20); err != nil {
		t.Fatal(err)
	}
	if err := s.Promise(2, 7, 4); err != nil {
		t.Fatal(err)
	}
	crashed := fs.CrashClone(vfs.CrashCloneCfg{})
	closeStore(t, s)
	s = open(t, crashed)
	defer func() { closeStore(t, s) }()
	c := s.Collection(1, 7)
	if c.Promise != 20 || c.Certificate != 10 || len(c.Endpoints) != 3 || c.Learned.IsZero() {
		t.Fatalf("state is %+v after a crash", c)
	}
	// Another set of endpoints has a certificate of its own, even a lower one.
	if err := s.Certify(1, 7, 8, []uint64{2, 3, 4}); err != nil {
		t.Fatal(err)
	}
	if c := s.Collection(1, 7); c.Certificate != 8 || c.Endpoints[2] != 4 {
		t.Fatalf("state is %+v", c)
	}
	if err := s.VoidCertificates(Place{1, 7}); err != nil {
		t.Fatal(err)
	}
	if c := s.Collection(1, 7); c.Certificate != 0 || c.Promise != 20 {
		t.Fatalf("state is %+v without a certificate", c)
	}
	if ids, err := s.Namespaces(); err != nil || len(ids) != 2 {
		t.Fatalf("namespaces %v, %v: those with nothing but states count", ids, err)
	}
	if err := s.DropNamespace(1); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if a, b := s.Collection(1, 7), s.Collection(2, 7); a.Promise != 0 || b.Promise != 4 {
			t.Fatalf("states %+v and %+v after the first namespace was dropped", a, b)
		}
		closeStore(t, s)
		s = open(t, crashed)
	}
}

// Only what is dead at or below the certificate goes.
func TestCollect(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("old tombstone", tombstone(uint64(hlc.At(10)))))
	put(t, s, write("young tombstone", tombstone(uint64(hlc.At(10)+1))))
	put(t, s, write("value", value(1, "x")))
	put(t, s, write("expired", expiring(1, 10)))
	put(t, s, write("expires later", expiring(1, 11)))
	put(t, s, write("written after its expiry", expiring(uint64(hlc.At(12)), 10)))
	all := []string{"old tombstone", "young tombstone", "value", "expired", "expires later", "written after its expiry", "absent"}
	if n := collect(t, s, all...); n != 0 {
		t.Fatalf("%d records went without a certificate", n)
	}
	certify(t, s, hlc.At(10))
	if n := collect(t, s, all...); n != 2 || s.Removals().Removed != 2 {
		t.Fatalf("%d records went, %+v", n, s.Removals())
	}
	wantAbsent(t, s, "old tombstone")
	wantAbsent(t, s, "expired")
	wantRecord(t, s, "expires later", expiring(1, 11))
	wantRecord(t, s, "young tombstone", tombstone(uint64(hlc.At(10)+1)))
}

// A dead record that a repair brings for an absent key is left out; values and newer
// records join.
func TestLateRepairsAreSkipped(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("present", value(3, "x")), write("removed", tombstone(5)))
	certify(t, s, 10)
	collect(t, s, "removed")
	put(t, s, repair("removed", tombstone(5)))
	wantAbsent(t, s, "removed")
	put(t, s, repair("present", tombstone(5)))
	wantRecord(t, s, "present", tombstone(5))
	put(t, s, repair("value", value(4, "y")), repair("young", tombstone(11)), write("first-hand", tombstone(5)))
	wantRecord(t, s, "value", value(4, "y"))
	wantRecord(t, s, "young", tombstone(11))
	wantRecord(t, s, "first-hand", tombstone(5))
	// Twice in one commit: the first makes the key present.
	put(t, s, repair("twice", value(4, "y")), repair("twice", tombstone(6)))
	wantRecord(t, s, "twice", tombstone(6))
	if r := s.Removals(); r.Skipped != 1 {
		t.Errorf("%+v, want one skipped", r)
	}
	// present, value and both of twice were at or below the promise.
	if n := s.LateJoins(1, 7); n != 4 {
		t.Errorf("%d late joins, want 4", n)
	}
	put(t, s, repair("value", value(4, "y"))) // may join or not, but nothing is superseded silently
	wantRecord(t, s, "value", value(4, "y"))
	if err := s.VoidCertificates(Place{1, 7}); err != nil {
		t.Fatal(err)
	}
	put(t, s, repair("removed", tombstone(5)))
	wantRecord(t, s, "removed", tombstone(5))
}

// A repair that was read before the endpoints were found equal brings nothing that one
// of them lacks: without this a value that a paused node has read and sends later
// would be back after its tombstone went.
func TestRepairsReadBeforeACertificateAreSkipped(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	c := hlc.At(1_000_000)
	put(t, s, write("k", tombstone(uint64(c)-1)), write("present", value(1, "x")))
	certify(t, s, c)
	collect(t, s, "k")
	horizon := hlc.At(c.Millis() + RepairHorizon.Milliseconds())
	dated := func(key string, rec []byte, readAt hlc.Timestamp) Write {
		w := repair(key, rec)
		w.ReadAt = readAt
		return w
	}
	put(t, s, dated("k", value(5, "old"), horizon))
	wantAbsent(t, s, "k")
	put(t, s, dated("present", value(5, "newer"), horizon))
	wantRecord(t, s, "present", value(5, "newer"))
	put(t, s, dated("young", value(uint64(c)+1, "young"), horizon))
	// Who read it knew of an earlier certificate, or of this one: then bit rot may have
	// taken the record here.
	knew := func(key string, certificate hlc.Timestamp) Write {
		w := dated(key, value(5, "old"), horizon)
		w.Certificate = certificate
		return w
	}
	put(t, s, knew("lost", c-1))
	wantAbsent(t, s, "lost")
	put(t, s, knew("lost", c))
	wantRecord(t, s, "lost", value(5, "old"))
	wantRecord(t, s, "young", value(uint64(c)+1, "young"))
	// What is read later is joined: a replica that lost its disk has to have it.
	put(t, s, dated("k", value(5, "old"), horizon+1))
	wantRecord(t, s, "k", value(5, "old"))
	put(t, s, repair("undated", value(5, "old")))
	wantRecord(t, s, "undated", value(5, "old"))
}

// A vnode that was wiped keeps its promise, and takes tombstones again.
func TestWipedVnodesForgetCertificates(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", tombstone(5)))
	certify(t, s, 10)
	if err := s.WipeVnodes([]uint32{1}, []uint32{7}, "wiped", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if c := s.Collection(1, 7); c.Certificate != 0 || c.Promise != 10 {
		t.Fatalf("state is %+v", c)
	}
	put(t, s, repair("k", tombstone(5)))
	wantRecord(t, s, "k", tombstone(5))
}

// The cache knows nothing of a removed record: a write that thought an older one
// superseded, or a Set over it, would go by what is not there any more.
func TestRuleNoEntryAcrossARemoval(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	for i := range 20 { // exact by reads, by Sets and by counted merges
		put(t, s, write("k", tombstone(uint64(5+i))))
		if i%3 == 0 {
			wantRecord(t, s, "k", tombstone(uint64(5+i)))
		}
	}
	certify(t, s, 100)
	if n := collect(t, s, "k"); n != 1 {
		t.Fatalf("%d records went", n)
	}
	put(t, s, repair("k", value(3, "older than what was removed")))
	wantRecord(t, s, "k", value(3, "older than what was removed"))
}

// Invariant 1: a removal never swallows a newer record that is joined at the same
// time, however it is joined.
func TestRuleRemovalsRaceWrites(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	certify(t, s, 1<<40)
	const rounds = 3000
	var wg sync.WaitGroup
	turns := make(chan int)
	wg.Go(func() {
		for range turns {
			if _, err := s.Collect(1, 7, [][]byte{[]byte("k")}); err != nil {
				t.Error(err)
			}
		}
	})
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range rounds {
		base := uint64(1<<41 + 10*i)
		put(t, s, write("k", tombstone(uint64(i+1)))) // dead, or superseded by the last round's
		if rng.IntN(2) == 0 {
			s.Get(1, 7, []byte("k")) // makes the entry exact, sometimes
		}
		turns <- i
		put(t, s, write("k", value(base, fmt.Sprint(i))))
		wantRecord(t, s, "k", value(base, fmt.Sprint(i)))
		// Back to nothing, so that the next round's tombstone is the newest.
		if err := s.db.Delete(appendRecordKey(nil, 1, 7, []byte("k")), nil); err != nil {
			t.Fatal(err)
		}
		s.latches.purge(keyRange{"", "\xff"})
	}
	close(turns)
	wg.Wait()
}

// A removal comes after the latch: what was decided before it was held counts not.
func TestRuleRemovalLooksAgain(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	put(t, s, write("k", tombstone(5)))
	certify(t, s, 10)
	key := appendRecordKey(nil, 1, 7, []byte("k"))
	var set stripeSet
	set.add(stripeOf(key))
	s.latches.lock(&set)
	done := make(chan int)
	go func() { done <- collect(t, s, "k") }()
	// A writer that holds the latch merges a newer record.
	if err := s.db.Merge(key, value(11, "newer"), nil); err != nil {
		t.Fatal(err)
	}
	s.latches.unlock(&set)
	if n := <-done; n != 0 {
		t.Errorf("%d records went", n)
	}
	wantRecord(t, s, "k", value(11, "newer"))
}

// Invariant 5: whatever part of a removal a crash leaves, the record is there whole
// or gone, and the certificate that let it go is there.
func TestRemovalAndCrash(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for range 20 {
		fs := vfs.NewCrashableMem()
		s := open(t, fs)
		var keys []string
		for i := range 40 {
			keys = append(keys, fmt.Sprint("k", i))
			put(t, s, write(keys[i], tombstone(uint64(i+1))))
		}
		certify(t, s, 100)
		collect(t, s, keys[:rng.IntN(41)]...)
		crashed := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		closeStore(t, s)
		s = open(t, crashed)
		if c := s.Collection(1, 7); c.Certificate != 100 {
			t.Fatalf("certificate is %+v after a crash", c)
		}
		for i, k := range keys {
			if b, err := s.Get(1, 7, []byte(k)); !errors.Is(err, ErrNotFound) && !bytes.Equal(b, tombstone(uint64(i+1))) {
				t.Fatalf("%s is %x, %v", k, b, err)
			}
		}
		collect(t, s, keys...)
		for _, k := range keys {
			wantAbsent(t, s, k)
		}
		closeStore(t, s)
	}
}

// When Promise returns, all that an apply took without knowing of it is visible.
func TestPromiseWaitsForApplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, vfs.NewMem())
		defer closeStore(t, s)
		first := s.BeginApply()
		if p := s.Collection(1, 7).Promise; p != 0 {
			t.Fatalf("promise is %s", p)
		}
		promised := make(chan error, 2)
		for range 2 { // the second must not overtake the first
			go func() { promised <- s.Promise(1, 7, 10) }()
		}
		synctest.Wait()
		if len(promised) != 0 {
			t.Fatal("the promise does not wait for an apply that may not have seen it")
		}
		second := s.BeginApply()
		if p := s.Collection(1, 7).Promise; p != 10 {
			t.Fatalf("an apply that began later sees promise %s", p)
		}
		put(t, s, write("k", value(5, "x")))
		first.End()
		time.Sleep(time.Second)
		if len(promised) == 0 {
			t.Fatal("the promise waits for an apply that saw it")
		}
		second.End()
		for range 2 {
			if err := <-promised; err != nil {
				t.Error(err)
			}
		}
	})
}
