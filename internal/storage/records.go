package storage

import (
	"slices"
	"unsafe"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
)

// recordCache holds records that are read often, so that reads of them need neither
// search the levels of the store nor join what they find there. It belongs to a stripe.
//
// Invariant: a record in the cache is what a read with the latch held would return. It is
// a value without an expiry: dead records are removed from the store without a write.
//
// REQUIRES of all methods: the stripe's latch is held.
type recordCache struct {
	lru          *simplelru.LRU[string, []byte] // nil: nothing is cached
	bytes, limit int64
}

// cachedOverhead is about what the cache takes for a record besides its key and bytes.
const cachedOverhead = 128

func newRecordCache(limit int64) recordCache {
	if limit < cachedOverhead {
		return recordCache{}
	}
	// The bound is on bytes, which keeps the number below that of the list.
	lru, err := simplelru.NewLRU[string, []byte](int(limit/cachedOverhead)+1, nil)
	if err != nil {
		panic(err) // the size is positive
	}
	return recordCache{lru: lru, limit: limit}
}

func cachedSize(key string, rec []byte) int64 { return int64(len(key)+len(rec)) + cachedOverhead }

// get returns a record that is not to be changed, or nil.
func (c *recordCache) get(key []byte) []byte {
	if c.lru == nil {
		return nil
	}
	rec, _ := c.lru.Get(view(key))
	return rec
}

// view returns bytes as a string for a lookup that does not keep it.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// learn adds what a read returned, which must not be changed any more.
func (c *recordCache) learn(key []byte, rec record.Record, encoded []byte) {
	if c.lru != nil && c.takes(view(key), rec, encoded) {
		c.set(string(key), encoded)
	}
}

// takes reports whether a record may be cached. One that is large would drive out many.
func (c *recordCache) takes(key string, rec record.Record, encoded []byte) bool {
	return rec.Kind == record.Value && rec.ExpiresAt == 0 && cachedSize(key, encoded) <= c.limit/8
}

func (c *recordCache) set(key string, encoded []byte) {
	c.remove(key)
	c.lru.Add(key, encoded)
	for c.bytes += cachedSize(key, encoded); c.bytes > c.limit; {
		oldest, rec, _ := c.lru.RemoveOldest()
		c.bytes -= cachedSize(oldest, rec)
	}
}

// replaced has the cache follow a write after which the key's record is rec: what was
// cached is read often, so the new one is cached, too.
func (c *recordCache) replaced(key string, rec record.Record, encoded []byte) {
	if c.lru == nil || !c.lru.Contains(key) {
		return
	}
	c.remove(key)
	if c.takes(key, rec, encoded) {
		c.set(key, slices.Clone(encoded)) // it may be a part of a frame
	}
}

func (c *recordCache) remove(key string) {
	if c.lru == nil || mutant.On("cached-record-kept") {
		return
	}
	if rec, ok := c.lru.Peek(key); ok {
		c.lru.Remove(key)
		c.bytes -= cachedSize(key, rec)
	}
}

func (c *recordCache) keys() []string {
	if c.lru == nil {
		return nil
	}
	return c.lru.Keys()
}
