package storage

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// Collection is how far the collection of a vnode's dead records has come. Both
// timestamps only rise, but that a certificate can be voided.
type Collection struct {
	// Promise: no first-hand write and no hint at or below it is taken any more.
	Promise hlc.Timestamp
	// Certificate: once, all Endpoints held equal records at or below it, having
	// promised. Zero when there is none.
	Certificate hlc.Timestamp
	// Endpoints are the incarnations that the certificate is for, ascending.
	Endpoints []uint64
	// Learned is when this process learned of the certificate; it is not on disk.
	Learned time.Time
}

// collectionFormat 1: format(1) promise(8) certificate(8) endpoints(uvarint each).
const collectionFormat = 1

func encodeCollection(c Collection) []byte {
	b := []byte{collectionFormat}
	b = binary.BigEndian.AppendUint64(b, uint64(c.Promise))
	b = binary.BigEndian.AppendUint64(b, uint64(c.Certificate))
	for _, e := range c.Endpoints {
		b = binary.AppendUvarint(b, e)
	}
	return b
}

func decodeCollection(b []byte) (Collection, error) {
	const fixed = 1 + 8 + 8
	switch {
	case len(b) < fixed || b[0] == 0:
		return Collection{}, fmt.Errorf("%w: collection state of %d bytes", ErrCorrupt, len(b))
	case b[0] > collectionFormat:
		return Collection{}, fmt.Errorf("%w: collection state of format %d", ErrNewerFormat, b[0])
	}
	c := Collection{
		Promise:     hlc.Timestamp(binary.BigEndian.Uint64(b[1:])),
		Certificate: hlc.Timestamp(binary.BigEndian.Uint64(b[9:])),
	}
	for rest := b[fixed:]; len(rest) > 0; {
		e, n := binary.Uvarint(rest)
		if n <= 0 || n > 1 && rest[n-1] == 0 || len(c.Endpoints) > 0 && e <= c.Endpoints[len(c.Endpoints)-1] {
			return Collection{}, fmt.Errorf("%w: endpoints of a certificate", ErrCorrupt)
		}
		c.Endpoints = append(c.Endpoints, e)
		rest = rest[n:]
	}
	if c.Certificate > c.Promise || (c.Certificate == 0) != (len(c.Endpoints) == 0) {
		return Collection{}, fmt.Errorf("%w: certificate %s of %d endpoints with promise %s", ErrCorrupt, c.Certificate, len(c.Endpoints), c.Promise)
	}
	return c, nil
}

// collections are the states of all vnodes that have one, in memory.
type collections struct {
	states sync.Map // Place → *collection
	// writing holds a token while no state is being written.
	writing          chan struct{}
	removed, skipped atomic.Uint64
}

type collection struct {
	state atomic.Pointer[Collection] // what it points to is never changed
	// lateJoins counts the repairs at or below the promise that were joined.
	lateJoins atomic.Uint64
}

func (c *collections) init() {
	c.writing = make(chan struct{}, 1)
	c.writing <- struct{}{}
}

func (c *collections) of(id Place) *collection {
	if v, ok := c.states.Load(id); ok {
		return v.(*collection)
	}
	fresh := &collection{}
	fresh.state.Store(&Collection{})
	v, _ := c.states.LoadOrStore(id, fresh)
	return v.(*collection)
}

func (c *collections) load(id Place) Collection {
	if v, ok := c.states.Load(id); ok {
		return *v.(*collection).state.Load()
	}
	return Collection{}
}

func (c *collections) forget(namespace uint32) {
	c.states.Range(func(id, _ any) bool {
		if id.(Place).Namespace == namespace {
			c.states.Delete(id)
		}
		return true
	})
}

// loadCollections reads all states into memory.
func (s *Store) loadCollections() error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kindCollection}, UpperBound: []byte{kindCollection + 1}})
	if err != nil {
		return readError(err)
	}
	defer it.Close()
	now := time.Now()
	for valid := it.First(); valid; valid = it.Next() {
		ns, vnode, err := decodeCollectionKey(it.Key())
		if err != nil {
			return err
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		c, err := decodeCollection(value)
		if err != nil {
			return fmt.Errorf("namespace %d vnode %d: %w", ns, vnode, err)
		}
		c.Learned = now
		s.collections.of(Place{ns, vnode}).state.Store(&c)
	}
	if err := it.Error(); err != nil {
		return readError(err)
	}
	return nil
}

// Collection returns how far the collection of a vnode's dead records has come.
func (s *Store) Collection(namespace, vnode uint32) Collection {
	return s.collections.load(Place{namespace, vnode})
}

// Applying is a stretch of time in which what Collection returned as a promise
// holds good for an Apply: Promise waits for its end.
type Applying struct{ generation *generation }

// BeginApply begins an Applying. The caller must call End, after its Apply has
// returned and before it waits for the disk.
func (s *Store) BeginApply() Applying { return Applying{s.promises.enter()} }

// End ends an Applying.
func (a Applying) End() { a.generation.leave() }

// Promise raises a vnode's promise to at least ts. When it returns the promise is on
// disk, and the records of every apply that may not have known of it are visible.
// A newcomer adopts its sources' promises with it, too.
func (s *Store) Promise(namespace, vnode uint32, ts hlc.Timestamp) error {
	err := s.changeCollection(namespace, vnode, func(c *Collection) { c.Promise = max(c.Promise, ts) })
	if err != nil {
		return fmt.Errorf("promise for vnode %d of namespace %d: %w", vnode, namespace, err)
	}
	s.promises.wait()
	return nil
}

// Certify keeps a certificate for endpoints, given in ascending order, and returns
// when it is on disk. One that is lower than what is there for the same endpoints
// changes nothing.
func (s *Store) Certify(namespace, vnode uint32, ts hlc.Timestamp, endpoints []uint64) error {
	err := s.changeCollection(namespace, vnode, func(c *Collection) {
		if slices.Equal(c.Endpoints, endpoints) && ts <= c.Certificate {
			return
		}
		c.Promise = max(c.Promise, ts)
		c.Certificate, c.Endpoints, c.Learned = ts, slices.Clone(endpoints), time.Now()
	})
	if err != nil {
		return fmt.Errorf("certificate for vnode %d of namespace %d: %w", vnode, namespace, err)
	}
	return nil
}

// VoidCertificates forgets the certificates of some places, as one commit, and returns
// when that is on disk. Promises stay: they are kept whoever asks.
func (s *Store) VoidCertificates(places ...Place) error {
	<-s.collections.writing
	defer func() { s.collections.writing <- struct{}{} }()
	b := s.db.NewBatch()
	defer b.Close()
	voided := map[vnodeID]bool{}
	var stores []func()
	for _, p := range places {
		c := s.collections.of(p)
		next := *c.state.Load()
		if next.Certificate == 0 && len(next.Endpoints) == 0 {
			continue
		}
		next.Certificate, next.Endpoints, next.Learned = 0, nil, time.Time{}
		if err := b.Set(collectionKey(p.Namespace, p.Vnode), encodeCollection(next), nil); err != nil {
			return err
		}
		voided[vnodeID{p.Namespace, p.Vnode}] = true
		stores = append(stores, func() { c.state.Store(&next) })
	}
	if len(voided) == 0 {
		return nil
	}
	if err := s.commit(func() error { return b.Commit(pebble.Sync) }); err != nil {
		return fmt.Errorf("void certificates of %d vnodes: %w", len(voided), err)
	}
	s.unmark()
	for _, store := range stores {
		store()
	}
	// What they let go is dead like all other records again.
	s.trees.forget(func(id vnodeID) bool { return voided[id] })
	return nil
}

// Collections visits the states of all vnodes, in no order, until visit returns
// false.
func (s *Store) Collections(visit func(namespace, vnode uint32, c Collection) bool) {
	s.collections.states.Range(func(id, v any) bool {
		return visit(id.(Place).Namespace, id.(Place).Vnode, *v.(*collection).state.Load())
	})
}

// changeCollection changes a state on disk and in memory. A promise is in use before
// it is on disk, which refuses a little more; a certificate afterwards.
func (s *Store) changeCollection(namespace, vnode uint32, change func(*Collection)) error {
	<-s.collections.writing
	defer func() { s.collections.writing <- struct{}{} }()
	c := s.collections.of(Place{namespace, vnode})
	old := c.state.Load()
	next := *old
	change(&next)
	if next.Promise == old.Promise && next.Certificate == old.Certificate && slices.Equal(next.Endpoints, old.Endpoints) {
		return nil
	}
	early := *old
	early.Promise = next.Promise
	c.state.Store(&early)
	err := s.commit(func() error { return s.db.Set(collectionKey(namespace, vnode), encodeCollection(next), pebble.Sync) })
	if err != nil {
		c.state.Store(old) // nobody was promised anything
		return err
	}
	s.unmark()
	c.state.Store(&next)
	return nil
}

// LateJoins returns how many repairs at or below its promise have been joined into a
// vnode since the store was opened.
func (s *Store) LateJoins(namespace, vnode uint32) uint64 {
	if v, ok := s.collections.states.Load(Place{namespace, vnode}); ok {
		return v.(*collection).lateJoins.Load()
	}
	return 0
}

// late returns where to count a repair that is joined, if it is at or below the
// promise.
func (c *collections) late(w Write, v record.Version) *collection {
	if l, ok := c.states.Load(Place{w.Namespace, w.Vnode}); ok {
		if l := l.(*collection); v.Time <= l.state.Load().Promise {
			return l
		}
	}
	return nil
}
