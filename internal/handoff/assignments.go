package handoff

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// metaAssignments is where a store keeps what its node is being filled with, metaPulled
// how far that has come.
const (
	metaAssignments = "assignments"
	metaPulled      = "pulled"
)

// assignment is a vnode that the node is to be filled with, as it is on disk.
type assignment struct {
	Vnode uint32 `json:"vnode"`
	// Namespace is the only one that it is about, as its N or its quorums change or the node
	// is a reporting one, or 0.
	Namespace uint32 `json:"namespace,omitempty"`
	// Epoch is the one in which the node became incoming on the vnode, topology.Slot.Since,
	// or was given the copy, topology.Copy.Since, or in which the namespace's change began.
	Epoch uint64 `json:"epoch"`
	// Keep says that the node holds the vnode, and is to take over what other slots have.
	Keep     bool `json:"keep,omitempty"`
	Complete bool `json:"complete,omitempty"`
}

func (a assignment) place() storage.Place {
	return storage.Place{Namespace: a.Namespace, Vnode: a.Vnode}
}

// Assignments are the vnodes that a node is incoming on: each was wiped once, before
// the node took in the epoch that assigned it, is closed to writes until the barrier
// of that epoch has been seen to be passed, and is filled until it is complete.
type Assignments struct {
	store *storage.Store
	// writing holds a token while nothing is being written to disk.
	writing chan struct{}
	mu      struct {
		sync.Mutex
		// byPlace has namespace 0 for what is about all that use the slot.
		byPlace map[storage.Place]assignment
		// open are the places that take records.
		open     map[storage.Place]bool
		progress map[storage.Place]progress
		pulled   []pulled
		// taking counts the files that are being taken in, by vnode; ended tells of the end
		// of one.
		taking map[uint32]int
		ended  *sync.Cond
	}
}

// pulled is how far a source's records of a namespace have come, for one assignment.
type pulled struct {
	Vnode     uint32 `json:"vnode"`
	Assigned  uint32 `json:"assigned,omitempty"` // assignment.Namespace
	Epoch     uint64 `json:"epoch"`
	Namespace uint32 `json:"namespace"`
	Source    uint64 `json:"source"`
	// From is the first key that is missing.
	From []byte `json:"from,omitempty"`
	Done bool   `json:"done,omitempty"`
}

func (p pulled) of(a assignment) bool {
	return p.Vnode == a.Vnode && p.Assigned == a.Namespace && p.Epoch == a.Epoch
}

// errAssignedAnew ends the filling of what is no assignment any more, or another one.
var errAssignedAnew = errors.New("the vnode was assigned anew meanwhile")

// pulled returns the first key that is missing of what a source has, and whether none is.
func (a *Assignments) pulled(as assignment, namespace uint32, source uint64) (from []byte, done bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.mu.pulled {
		if p.of(as) && p.Namespace == namespace && p.Source == source {
			return p.From, p.Done
		}
	}
	return nil, false
}

// take has records taken in while they are still assigned, and notes how far a source's
// have come by that: on disk, unless that is all, which completion notes. Records that
// are assigned no more are dropped: the place may have been wiped. Taking in may last,
// and must not keep new topologies waiting, but for one that assigns the place anew.
func (a *Assignments) take(as assignment, namespace uint32, source uint64, from []byte, done bool, take func() error, drop func()) error {
	end, err := a.begin(as)
	if err != nil {
		drop()
		return err
	}
	err = take()
	end()
	if err != nil {
		return err
	}
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	if all[as.place()] != as {
		return errAssignedAnew
	}
	a.mu.Lock()
	next := slices.DeleteFunc(slices.Clone(a.mu.pulled), func(p pulled) bool {
		now, ok := all[storage.Place{Namespace: p.Assigned, Vnode: p.Vnode}]
		return !ok || !p.of(now) || now.Complete || p.of(as) && p.Namespace == namespace
	})
	next = append(next, pulled{as.Vnode, as.Namespace, as.Epoch, namespace, source, from, done})
	a.mu.pulled = next
	a.mu.Unlock()
	if done {
		return nil
	}
	b, err := json.Marshal(next)
	if err != nil {
		panic(err) // it always encodes
	}
	return a.store.SetMeta(metaPulled, b)
}

// begin has whoever assigns or sweeps the vnode of an assignment wait until end is
// called.
func (a *Assignments) begin(as assignment) (end func(), _ error) {
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.byPlace[as.place()] != as {
		return nil, errAssignedAnew
	}
	a.mu.taking[as.Vnode]++
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.mu.taking[as.Vnode]--; a.mu.taking[as.Vnode] == 0 {
			delete(a.mu.taking, as.Vnode)
		}
		a.mu.ended.Broadcast()
	}, nil
}

// settled waits until nothing is being taken into some vnodes.
// REQUIRES: the token of a.writing is held, so that nothing begins.
func (a *Assignments) settled(vnodes ...uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, v := range vnodes {
		for a.mu.taking[v] > 0 {
			a.mu.ended.Wait()
		}
	}
}

// progress is what is shown of an assignment.
type progress struct {
	records, bytes uint64
	waitsFor       string
}

// LoadAssignments reads what a store keeps. Errors are storage's.
func LoadAssignments(store *storage.Store) (*Assignments, error) {
	a := &Assignments{store: store, writing: make(chan struct{}, 1)}
	a.writing <- struct{}{}
	a.mu.taking, a.mu.ended = map[uint32]int{}, sync.NewCond(&a.mu)
	a.mu.byPlace, a.mu.open, a.mu.progress = map[storage.Place]assignment{}, map[storage.Place]bool{}, map[storage.Place]progress{}
	b, err := store.Meta(metaAssignments)
	if errors.Is(err, storage.ErrNotFound) {
		return a, nil
	}
	if err != nil {
		return nil, err
	}
	var list []assignment
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", storage.ErrCorrupt, metaAssignments, err)
	}
	for _, as := range list {
		a.mu.byPlace[as.place()] = as
	}
	b, err = store.Meta(metaPulled)
	if errors.Is(err, storage.ErrNotFound) {
		return a, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &a.mu.pulled); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", storage.ErrCorrupt, metaPulled, err)
	}
	return a, nil
}

// Prepare wipes what a topology newly assigns to a node, once for every assignment,
// and returns when that is on disk. Until then the place is not open: what is left of
// an earlier assignment must not be there when the first write is. After a crash the
// topology can be older than the assignments, which then stay.
func (a *Assignments) Prepare(self uint64, next *topology.Topology) error {
	known := a.all()
	news := false
	for p, as := range assigned(self, next) {
		news = news || known[p].Epoch < as.Epoch
	}
	if !news {
		return nil // most topologies assign nothing here, and need not wait for the disk
	}
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	var vnodes []uint32
	var places []storage.Place
	fresh := false
	for p, as := range assigned(self, next) {
		if all[p].Epoch >= as.Epoch {
			continue
		}
		all[p], fresh = as, true
		switch {
		case p.Namespace == 0:
			vnodes = append(vnodes, p.Vnode)
		case !as.Keep:
			places = append(places, p)
		}
	}
	if !fresh {
		return nil
	}
	if mutant.On("no-wipe") {
		places, vnodes = nil, nil
	}
	for _, p := range places {
		a.settled(p.Vnode)
	}
	a.settled(vnodes...)
	// Places first: until the assignments are on disk with the rest, all is done again.
	if err := a.store.Wipe(places); err != nil {
		return err
	}
	var namespaces []uint32
	for i := range next.Namespaces {
		namespaces = append(namespaces, next.Namespaces[i].ID)
	}
	if err := a.store.WipeVnodes(namespaces, vnodes, metaAssignments, encodeAssignments(all)); err != nil {
		return err
	}
	a.replace(all)
	return nil
}

// assigned returns what a topology has a node filled with.
func assigned(self uint64, t *topology.Topology) map[storage.Place]assignment {
	out := map[storage.Place]assignment{}
	for v, slot := range t.Incoming(self) {
		as := assignment{Vnode: v, Epoch: t.Ring[v].Slots[slot].Since}
		out[as.place()] = as
	}
	for i := range t.Ring {
		for _, c := range t.Ring[i].Copies {
			if c.Node == self && c.State == topology.Filling {
				as := assignment{Vnode: uint32(i), Namespace: c.Namespace, Epoch: c.Since}
				out[as.place()] = as
			}
		}
	}
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		if ns.Change == 0 {
			continue
		}
		for v := range t.Ring {
			for j, s := range t.Slots(uint32(v), ns.Wide()) {
				if filled, keep := ns.Filled(j); filled && (s.Write[0] == self || s.Write[1] == self) {
					as := assignment{Vnode: uint32(v), Namespace: ns.ID, Epoch: ns.Since, Keep: keep}
					out[as.place()] = as
				}
			}
		}
	}
	return out
}

// Settle forgets the assignments that are none any more under a topology. Later ones
// stay, for after a crash the topology can be older than they are.
func (a *Assignments) Settle(self uint64, t *topology.Topology) error {
	if len(a.all()) == 0 {
		return nil
	}
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	now := assigned(self, t)
	before := len(all)
	maps.DeleteFunc(all, func(p storage.Place, as assignment) bool {
		_, ok := now[p]
		return !ok && as.Epoch <= t.Epoch
	})
	if len(all) == before {
		return nil
	}
	if err := a.store.SetMeta(metaAssignments, encodeAssignments(all)); err != nil {
		return err
	}
	a.replace(all)
	return nil
}

// complete notes that a vnode has been filled, and returns when that is on disk.
func (a *Assignments) complete(done assignment) error {
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	if all[done.place()] != done {
		return nil // assigned anew, or no more
	}
	done.Complete = true
	all[done.place()] = done
	if err := a.store.SetMeta(metaAssignments, encodeAssignments(all)); err != nil {
		return err
	}
	a.replace(all)
	return nil
}

// Open reports whether a vnode that was assigned in an epoch takes records of a
// namespace. Until then writes count for nothing here, so that those of the epoch that
// assigned the vnode are held by enough of its other replicas to meet the reads of the
// epoch before. What is complete has been open, before a restart perhaps.
func (a *Assignments) Open(namespace, vnode uint32, assigned uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	own := storage.Place{Namespace: namespace, Vnode: vnode}
	for _, p := range []storage.Place{own, {Vnode: vnode}} {
		if as, ok := a.mu.byPlace[p]; ok && as.Epoch == assigned && (as.Complete || a.mu.open[own]) {
			return true
		}
	}
	return false
}

// Sweep removes the records of places that the node does not hold any more, which
// needed tells. It looks again when no assignment can come in between: a place that is
// being assigned is left to Prepare.
func (a *Assignments) Sweep(needed func(storage.Place) bool) (swept []storage.Place, _ error) {
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	held, err := a.store.Held()
	if err != nil {
		return nil, err
	}
	all := a.all()
	for _, p := range held {
		_, own := all[p]
		_, whole := all[storage.Place{Vnode: p.Vnode}]
		if !own && !whole && !needed(p) {
			swept = append(swept, p)
		}
	}
	if len(swept) == 0 {
		return nil, nil
	}
	for _, p := range swept {
		a.settled(p.Vnode)
	}
	return swept, a.store.Wipe(swept)
}

// open lets a vnode take records of a namespace, if it is still assigned so.
func (a *Assignments) open(as assignment, namespace uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.byPlace[as.place()].Epoch == as.Epoch {
		a.mu.open[storage.Place{Namespace: namespace, Vnode: as.Vnode}] = true
	}
}

// all returns a copy of the assignments.
func (a *Assignments) all() map[storage.Place]assignment {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.mu.byPlace)
}

// replace makes assignments those in use, and closes what is assigned anew or no
// more.
func (a *Assignments) replace(all map[storage.Place]assignment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.mu.byPlace
	a.mu.byPlace = all
	same := func(p storage.Place) bool { n, ok := all[p]; return ok && n.Epoch == old[p].Epoch }
	maps.DeleteFunc(a.mu.open, func(p storage.Place, _ bool) bool { return !same(p) && !same(storage.Place{Vnode: p.Vnode}) })
	maps.DeleteFunc(a.mu.progress, func(p storage.Place, _ progress) bool { return !same(p) })
}

// note changes what is shown of an assignment.
func (a *Assignments) note(as assignment, change func(*progress)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.mu.progress[as.place()]
	change(&p)
	a.mu.progress[as.place()] = p
}

// Filling is how far a vnode has come to the node.
type Filling struct {
	Vnode uint32
	// Namespace is the only one that it is about, or 0.
	Namespace uint32
	Epoch     uint64
	Complete  bool
	// Records and Bytes were taken in by this run of the process.
	Records, Bytes uint64
	// WaitsFor is why it does not go on, or "".
	WaitsFor string
}

// Fillings returns all assignments in order of vnode.
func (a *Assignments) Fillings() []Filling {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]Filling, 0, len(a.mu.byPlace))
	for _, as := range inOrder(a.mu.byPlace) {
		p := a.mu.progress[as.place()]
		f := Filling{Vnode: as.Vnode, Namespace: as.Namespace, Epoch: as.Epoch, Complete: as.Complete, Records: p.records, Bytes: p.bytes}
		if !as.Complete {
			f.WaitsFor = p.waitsFor
		}
		out = append(out, f)
	}
	return out
}

// inOrder returns assignments in order of vnode and namespace.
func inOrder(all map[storage.Place]assignment) []assignment {
	return slices.SortedFunc(maps.Values(all), func(a, b assignment) int {
		return cmp.Or(cmp.Compare(a.Vnode, b.Vnode), cmp.Compare(a.Namespace, b.Namespace))
	})
}

func encodeAssignments(all map[storage.Place]assignment) []byte {
	b, err := json.Marshal(inOrder(all))
	if err != nil {
		panic(err) // numbers always encode
	}
	return b
}
