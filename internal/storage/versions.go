package storage

import (
	"iter"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/kvasirdb/kvasir/internal/record"
)

// stripes is the number of latches. A key's latch is that of its stripe.
const stripes = 256

// maxCachedKeyBytes bounds the keys whose versions are cached, and so the
// cache's memory.
const maxCachedKeyBytes = 256

// blindLimit is how many merges a key gathers before a write reads it instead.
const blindLimit = 8

// entry is what is known of a key's stored version.
//
// An entry is exact or it is not an entry: exact is set by a Set, by a Merge over
// an exact entry, or by a read with the latch held; never by a blind Merge. A
// blind entry only counts merges and says nothing about the version.
type entry struct {
	version record.Version
	exact   bool
	blind   uint8
}

// stripe is a latch with what it guards.
type stripe struct {
	// generation is odd while the latch is held by a writer, and changes with every
	// write, and where files are taken in. A read that began and ended in the same even
	// generation happened as if under the latch.
	generation atomic.Uint64
	// dirty is the size of unsynced, to be read without the latch.
	dirty atomic.Int64
	mu    struct {
		sync.Mutex
		versions *simplelru.LRU[string, entry]
		records  recordCache
		// unsynced holds the newest commit of every key with one that is visible but
		// perhaps not on disk.
		unsynced map[string]*Commit
	}
}

// latches is the version cache and the latches in one.
type latches struct {
	stripes [stripes]stripe
	// simulated: see hold.
	simulated bool
	// off lists the key ranges whose entries must not be relied on, nor any be made.
	off atomic.Pointer[[]keyRange]
	// offMu serializes changes of off.
	offMu sync.Mutex
}

type keyRange struct{ lower, upper string }

// rangeOf returns the range of a place's records.
func rangeOf(p Place) keyRange {
	lower, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
	return keyRange{string(lower), string(upper)}
}

func (r keyRange) contains(key string) bool { return key >= r.lower && key < r.upper }

// drop forgets what is known of a key.
// REQUIRES: the latch is held.
func (s *stripe) drop(key string) {
	s.mu.versions.Remove(key)
	s.mu.records.remove(key)
}

func newLatches(entries int, recordBytes int64) *latches {
	l := &latches{}
	l.off.Store(&[]keyRange{})
	for i := range l.stripes {
		s := &l.stripes[i]
		lru, err := simplelru.NewLRU[string, entry](max(1, entries/stripes), nil)
		if err != nil {
			panic(err) // the size is positive
		}
		s.mu.versions = lru
		s.mu.records = newRecordCache(recordBytes / stripes)
		s.mu.unsynced = map[string]*Commit{}
	}
	return l
}

func stripeOf(key []byte) int { return int(xxhash.Sum64(key) % stripes) }

// hold takes a latch. Virtual time stands still while a goroutine waits for a mutex, and
// whoever has the latch may wait for a flush that rests after a failure: in simulations it
// is tried for.
func (l *latches) hold(st *stripe) {
	if !l.simulated {
		st.mu.Lock()
		return
	}
	for !st.mu.TryLock() {
		time.Sleep(latchRetry)
	}
}

const latchRetry = 100 * time.Microsecond

func (l *latches) of(key []byte) *stripe { return &l.stripes[stripeOf(key)] }

// cacheable reports whether a key's version may be kept.
func (l *latches) cacheable(key string) bool {
	if len(key) > maxCachedKeyBytes {
		return false
	}
	for _, r := range *l.off.Load() {
		if r.contains(key) {
			return false
		}
	}
	return true
}

// suspension keeps the versions of some ranges out of the cache.
type suspension struct {
	latches *latches
	ranges  []keyRange // ascending
}

// suspend keeps the versions of some ranges out of the cache until resume or
// resumeKeys is called. On return every writer has noticed: none relies on an entry of
// theirs, and whoever writes a key removes its entry, which is exact no more.
// REQUIRES: the ranges do not overlap.
func (l *latches) suspend(ranges ...keyRange) *suspension {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b keyRange) int { return strings.Compare(a.lower, b.lower) })
	l.offMu.Lock()
	next := append(slices.Clone(*l.off.Load()), ranges...)
	l.off.Store(&next)
	l.offMu.Unlock()
	for i := range l.stripes { // whoever has not noticed holds a latch
		st := &l.stripes[i]
		l.hold(st)
		st.generation.Add(2) // reads that have begun tell of what was
		st.mu.Unlock()
	}
	return &suspension{l, ranges}
}

// resume ends a suspension after which no entry of the ranges holds good. It looks
// through the whole cache, for all the ranges at once.
func (s *suspension) resume() {
	s.latches.purge(s.ranges...)
	s.end()
}

// resumeKeys ends a suspension in which, but for writers, only some keys' records may
// have changed.
func (s *suspension) resumeKeys(keys iter.Seq[[]byte]) {
	for k := range keys {
		st := s.latches.of(k)
		s.latches.hold(st)
		st.drop(string(k))
		st.generation.Add(2)
		st.mu.Unlock()
	}
	s.end()
}

func (s *suspension) end() {
	l := s.latches
	l.offMu.Lock()
	defer l.offMu.Unlock()
	rest := slices.Clone(*l.off.Load())
	for _, r := range s.ranges {
		i := slices.Index(rest, r) // another suspension may be of the same range
		rest = slices.Delete(rest, i, i+1)
	}
	l.off.Store(&rest)
}

// purge removes the entries of some ranges, taking every latch once.
// REQUIRES: the ranges are ascending and do not overlap.
func (l *latches) purge(ranges ...keyRange) {
	for i := range l.stripes {
		s := &l.stripes[i]
		l.hold(s)
		for _, k := range append(s.mu.versions.Keys(), s.mu.records.keys()...) {
			at := sort.Search(len(ranges), func(i int) bool { return ranges[i].lower > k })
			if at > 0 && ranges[at-1].contains(k) {
				s.drop(k)
			}
		}
		s.generation.Add(2) // reads that have begun tell of what was
		s.mu.Unlock()
	}
}

// stripeSet is a set of stripes; a writer takes their latches in ascending order.
type stripeSet [stripes / 64]uint64

func (s *stripeSet) add(i int) { s[i/64] |= 1 << (i % 64) }

func (s *stripeSet) has(i int) bool { return s[i/64]&(1<<(i%64)) != 0 }

func (l *latches) lock(set *stripeSet) {
	for i := range l.stripes {
		if set.has(i) {
			l.hold(&l.stripes[i])
			l.stripes[i].generation.Add(1)
		}
	}
}

func (l *latches) unlock(set *stripeSet) {
	for i := range l.stripes {
		if set.has(i) {
			l.stripes[i].generation.Add(1)
			l.stripes[i].mu.Unlock()
		}
	}
}

// pending returns the commit that a reader of key has to wait for, or nil.
func (l *latches) pending(st *stripe, key []byte) *Commit {
	if st.dirty.Load() == 0 {
		return nil
	}
	l.hold(st)
	defer st.mu.Unlock()
	return st.mu.unsynced[string(key)]
}
