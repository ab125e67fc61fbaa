package storage

import (
	"sync"
	"sync/atomic"

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
	// write. A read that began and ended in the same even generation happened as if
	// under the latch.
	generation atomic.Uint64
	// dirty is the size of unsynced, to be read without the latch.
	dirty atomic.Int64
	mu    struct {
		sync.Mutex
		versions *simplelru.LRU[string, entry]
		// unsynced holds the newest commit of every key with one that is visible but
		// perhaps not on disk.
		unsynced map[string]*Commit
	}
}

// latches is the version cache and the latches in one.
type latches struct {
	stripes [stripes]stripe
	// off lists the key ranges whose versions must not be cached.
	off atomic.Pointer[[]keyRange]
	// offMu serializes changes of off.
	offMu sync.Mutex
}

type keyRange struct{ lower, upper string }

func (r keyRange) contains(key string) bool { return key >= r.lower && key < r.upper }

func newLatches(entries int) *latches {
	l := &latches{}
	l.off.Store(&[]keyRange{})
	for i := range l.stripes {
		s := &l.stripes[i]
		lru, err := simplelru.NewLRU[string, entry](max(1, entries/stripes), nil)
		if err != nil {
			panic(err) // the size is positive
		}
		s.mu.versions = lru
		s.mu.unsynced = map[string]*Commit{}
	}
	return l
}

func stripeOf(key []byte) int { return int(xxhash.Sum64(key) % stripes) }

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

// suspend keeps the versions of a range out of the cache until resume is called.
// On return none is cached and every writer has noticed.
func (l *latches) suspend(lower, upper []byte) (resume func()) {
	r := keyRange{string(lower), string(upper)}
	l.offMu.Lock()
	next := append(append([]keyRange(nil), *l.off.Load()...), r)
	l.off.Store(&next)
	l.offMu.Unlock()
	l.purge(r)
	return func() {
		l.purge(r)
		l.offMu.Lock()
		defer l.offMu.Unlock()
		var rest []keyRange
		dropped := false
		for _, o := range *l.off.Load() {
			if o == r && !dropped {
				dropped = true
				continue
			}
			rest = append(rest, o)
		}
		l.off.Store(&rest)
	}
}

// purge removes the entries of a range, taking every latch once.
func (l *latches) purge(r keyRange) {
	for i := range l.stripes {
		s := &l.stripes[i]
		s.mu.Lock()
		for _, k := range s.mu.versions.Keys() {
			if r.contains(k) {
				s.mu.versions.Remove(k)
			}
		}
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
			l.stripes[i].mu.Lock()
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
func (s *stripe) pending(key []byte) *Commit {
	if s.dirty.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.unsynced[string(key)]
}
