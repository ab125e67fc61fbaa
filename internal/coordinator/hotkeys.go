package coordinator

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
)

// How keys are counted: one in hotSample, in windows of hotWindow, at most hotCounters of
// them. Of keys longer than hotKeyBytes the beginning is kept.
const (
	hotSample   = 16
	hotWindow   = 10 * time.Second
	hotCounters = 256
	hotKeyBytes = 256
	// hotLeast is how often a key must have been drawn to be named.
	hotLeast = 8
)

// hotKeys finds the keys that many requests are for in bounded space, by Space-Saving:
// A. Metwally, D. Agrawal, A. El Abbadi, "Efficient computation of frequent and top-k
// elements in data streams", ICDT 2005. A key that takes the place of the rarest one begins
// with the count of that, which is not believed when keys are named: so a key has at least
// what is said of it, and uniform traffic has no hot keys.
type hotKeys struct {
	mu                sync.Mutex
	current, previous hotWindowCounts
}

type hotWindowCounts struct {
	began time.Time
	took  time.Duration // once it is over
	drawn int
	keys  []hotCount
	index map[hotID]int
}

type hotID struct {
	namespace uint32
	hash      uint64
}

type hotCount struct {
	id   hotID
	key  []byte
	size int
	// inherited is what the key it took the place of had.
	reads, writes, inherited int
}

func (c hotCount) total() int { return c.reads + c.writes + c.inherited }

// HotKey is a key that many requests are for.
type HotKey struct {
	Namespace uint32
	// Key is the key's first 256 bytes at most, Bytes how many it has.
	Key   []byte
	Bytes int
	// ReadsPerSecond and WritesPerSecond are what it is asked for at least.
	ReadsPerSecond, WritesPerSecond float64
}

// note counts a request for a key.
func (h *hotKeys) note(namespace uint32, key []byte, write bool) {
	if rand.Uint32()%hotSample == 0 {
		h.draw(namespace, key, write, time.Now())
	}
}

func (h *hotKeys) draw(namespace uint32, key []byte, write bool, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rotate(now)
	w := &h.current
	w.drawn++
	id := hotID{namespace, xxhash.Sum64(key)}
	i, ok := w.index[id]
	if !ok {
		i = w.place()
		old := w.keys[i]
		delete(w.index, old.id)
		w.keys[i] = hotCount{id: id, key: slices.Clone(key[:min(len(key), hotKeyBytes)]), size: len(key), inherited: old.total()}
		w.index[id] = i
	}
	if write {
		w.keys[i].writes++
	} else {
		w.keys[i].reads++
	}
}

// place returns where a new key is to be counted.
func (w *hotWindowCounts) place() int {
	if len(w.keys) < hotCounters {
		w.keys = append(w.keys, hotCount{})
		return len(w.keys) - 1
	}
	rarest := 0
	for i := range w.keys {
		if w.keys[i].total() < w.keys[rarest].total() {
			rarest = i
		}
	}
	return rarest
}

// rotate begins a new window when the present one is over.
// REQUIRES: h.mu is held.
func (h *hotKeys) rotate(now time.Time) {
	age := now.Sub(h.current.began)
	if age < hotWindow {
		return
	}
	h.previous = h.current
	h.previous.took = age
	if age >= 2*hotWindow {
		h.previous = hotWindowCounts{} // of long ago
	}
	h.current = hotWindowCounts{began: now, index: map[hotID]int{}}
}

// top returns the most popular keys, for how many keys a second the node was asked in all,
// and the length of the window that this is of: the last whole one, or the present one until
// there is one.
func (h *hotKeys) top(limit int, now time.Time) (keys []HotKey, perSecond float64, window time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rotate(now)
	w, took := &h.previous, h.previous.took
	if took == 0 {
		w, took = &h.current, max(now.Sub(h.current.began), time.Second)
	}
	rate := func(drawn int) float64 { return float64(drawn) * hotSample / took.Seconds() }
	counts := slices.DeleteFunc(slices.Clone(w.keys), func(c hotCount) bool { return c.reads+c.writes < hotLeast })
	slices.SortFunc(counts, func(a, b hotCount) int { return cmp.Compare(b.reads+b.writes, a.reads+a.writes) })
	for _, c := range counts[:min(limit, len(counts))] {
		keys = append(keys, HotKey{Namespace: c.id.namespace, Key: c.key, Bytes: c.size, ReadsPerSecond: rate(c.reads), WritesPerSecond: rate(c.writes)})
	}
	return keys, rate(w.drawn), took
}

// HotKeys returns the keys that most of the requests are for which this node coordinates, the
// most popular first; for how many keys a second it is asked in all; and the length of the
// window that this is of. It counts a sample.
func (c *Coordinator) HotKeys(limit int) (keys []HotKey, perSecond float64, window time.Duration) {
	return c.hot.top(limit, time.Now())
}

// hottest returns the share of requests that are for the most popular key.
func (h *hotKeys) hottest() float64 {
	keys, perSecond, _ := h.top(1, time.Now())
	if len(keys) == 0 || perSecond == 0 {
		return 0
	}
	return (keys[0].ReadsPerSecond + keys[0].WritesPerSecond) / perSecond
}
