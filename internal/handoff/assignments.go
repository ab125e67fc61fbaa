package handoff

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// metaAssignments is where a store keeps what its node is being filled with.
const metaAssignments = "assignments"

// assignment is a vnode that the node is to be filled with, as it is on disk.
type assignment struct {
	Vnode uint32 `json:"vnode"`
	// Epoch is the one in which the node became incoming on the vnode, topology.Slot.Since.
	Epoch    uint64 `json:"epoch"`
	Complete bool   `json:"complete,omitempty"`
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
		byVnode map[uint32]assignment
		// open are the places that take records.
		open     map[storage.Place]bool
		progress map[uint32]progress
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
	a.mu.byVnode, a.mu.open, a.mu.progress = map[uint32]assignment{}, map[storage.Place]bool{}, map[uint32]progress{}
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
		a.mu.byVnode[as.Vnode] = as
	}
	return a, nil
}

// Prepare wipes what a topology newly assigns to a node, once for every assignment,
// and returns when that is on disk. It is called before the topology is taken in:
// what is left of an earlier assignment must not be there when the first write is.
func (a *Assignments) Prepare(self uint64, next *topology.Topology) error {
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	var fresh []uint32
	for v, slot := range next.Incoming(self) {
		if epoch := next.Ring[v].Slots[slot].Since; all[v].Epoch != epoch {
			all[v] = assignment{Vnode: v, Epoch: epoch}
			fresh = append(fresh, v)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	if err := a.store.WipeVnodes(fresh, metaAssignments, encodeAssignments(all)); err != nil {
		return err
	}
	a.replace(all)
	return nil
}

// Settle forgets the assignments that are none any more under a topology that has
// been taken in.
func (a *Assignments) Settle(self uint64, t *topology.Topology) error {
	<-a.writing
	defer func() { a.writing <- struct{}{} }()
	all := a.all()
	incoming := t.Incoming(self)
	before := len(all)
	maps.DeleteFunc(all, func(v uint32, _ assignment) bool { _, ok := incoming[v]; return !ok })
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
	if all[done.Vnode] != done {
		return nil // assigned anew, or no more
	}
	done.Complete = true
	all[done.Vnode] = done
	if err := a.store.SetMeta(metaAssignments, encodeAssignments(all)); err != nil {
		return err
	}
	a.replace(all)
	return nil
}

// Open reports whether a vnode takes records of a namespace. Until then writes count
// for nothing here, so that those of the epoch that assigned the vnode are held by
// enough of its other replicas to meet the reads of the epoch before. What is complete
// has been open, before a restart perhaps.
func (a *Assignments) Open(namespace, vnode uint32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.byVnode[vnode].Complete || a.mu.open[storage.Place{Namespace: namespace, Vnode: vnode}]
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
		if _, assigned := all[p.Vnode]; !assigned && !needed(p) {
			swept = append(swept, p)
		}
	}
	if len(swept) == 0 {
		return nil, nil
	}
	return swept, a.store.Wipe(swept)
}

// open lets a vnode take records of a namespace, if it is still assigned so.
func (a *Assignments) open(as assignment, namespace uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.byVnode[as.Vnode].Epoch == as.Epoch {
		a.mu.open[storage.Place{Namespace: namespace, Vnode: as.Vnode}] = true
	}
}

// all returns a copy of the assignments.
func (a *Assignments) all() map[uint32]assignment {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.mu.byVnode)
}

// replace makes assignments those in use, and closes what is assigned anew or no
// more.
func (a *Assignments) replace(all map[uint32]assignment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.mu.byVnode
	a.mu.byVnode = all
	same := func(v uint32) bool { n, ok := all[v]; return ok && n.Epoch == old[v].Epoch }
	maps.DeleteFunc(a.mu.open, func(p storage.Place, _ bool) bool { return !same(p.Vnode) })
	maps.DeleteFunc(a.mu.progress, func(v uint32, _ progress) bool { return !same(v) })
}

// note changes what is shown of a vnode.
func (a *Assignments) note(vnode uint32, change func(*progress)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.mu.progress[vnode]
	change(&p)
	a.mu.progress[vnode] = p
}

// Filling is how far a vnode has come to the node.
type Filling struct {
	Vnode    uint32
	Epoch    uint64
	Complete bool
	// Records and Bytes were taken in by this run of the process.
	Records, Bytes uint64
	// WaitsFor is why it does not go on, or "".
	WaitsFor string
}

// Fillings returns all assignments in order of vnode.
func (a *Assignments) Fillings() []Filling {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]Filling, 0, len(a.mu.byVnode))
	for _, v := range slices.Sorted(maps.Keys(a.mu.byVnode)) {
		as, p := a.mu.byVnode[v], a.mu.progress[v]
		f := Filling{Vnode: v, Epoch: as.Epoch, Complete: as.Complete, Records: p.records, Bytes: p.bytes}
		if !as.Complete {
			f.WaitsFor = p.waitsFor
		}
		out = append(out, f)
	}
	return out
}

func encodeAssignments(all map[uint32]assignment) []byte {
	list := make([]assignment, 0, len(all))
	for _, v := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[v])
	}
	b, err := json.Marshal(list)
	if err != nil {
		panic(err) // numbers always encode
	}
	return b
}
