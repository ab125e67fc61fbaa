package topology

import (
	"maps"
	"slices"
	"sync"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// maxRecent is how many topologies a server remembers. They share what did not change,
// save for the ring's table: 64 bytes a vnode each.
const maxRecent = 16

// Recent remembers the newest topologies of a server, so that whoever has one of them is
// told only what differs. Its zero value is empty and ready.
type Recent struct {
	mu struct {
		sync.Mutex
		kept []*Topology // in order of epochs
		// delta is the last one made: most receivers have the same topology.
		delta *topologyv1.TopologyDelta
	}
}

// Add remembers a topology, in place of any that is not older.
func (r *Recent) Add(t *Topology) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.kept = slices.DeleteFunc(r.mu.kept, func(o *Topology) bool { return o.Epoch >= t.Epoch })
	r.mu.kept = append(r.mu.kept, t)
	if extra := len(r.mu.kept) - maxRecent; extra > 0 {
		r.mu.kept = slices.Delete(r.mu.kept, 0, extra)
	}
}

// since returns what differs between the topology of an epoch and next, or nil when that
// epoch is not remembered.
func (r *Recent) since(epoch uint64, next *Topology) *topologyv1.TopologyDelta {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d := r.mu.delta; d.GetBaseEpoch() == epoch && d.GetEpoch() == next.Epoch {
		return d
	}
	for _, t := range r.mu.kept {
		if t.Epoch == epoch {
			d := Diff(t, next)
			r.mu.delta = d
			return d
		}
	}
	return nil
}

// Update returns what takes a receiver from the topology of an epoch, 0 if it has none,
// to next: the difference, or the whole where that epoch is not remembered. It returns
// neither where next is not newer. Receivers share the difference, which must not be
// changed.
func (r *Recent) Update(known uint64, next *Topology) (*topologyv1.Topology, *topologyv1.TopologyDelta) {
	if next.Epoch <= known {
		return nil, nil
	}
	if d := r.since(known, next); d != nil {
		return nil, d
	}
	return next.Proto(), nil
}

// Updating is a message with what Update returned.
type Updating interface {
	GetTopology() *topologyv1.Topology
	GetDelta() *topologyv1.TopologyDelta
}

// Updated returns the topology that a message leads to from known, which is empty if the
// receiver has none: known itself where the message brings nothing newer. The error is
// ErrOtherBase where the receiver has to ask for the whole.
func Updated(known *Topology, m Updating) (*Topology, error) {
	d := m.GetDelta()
	switch {
	case known.Epoch == 0 || m.GetTopology() != nil:
		return FromProto(m.GetTopology())
	case d == nil || d.GetClusterId() == known.ClusterID && d.GetEpoch() <= known.Epoch:
		return known, nil
	}
	return Patch(known, d)
}

// HealthNews returns what of all nodes' health a watcher has not been told yet, and notes in
// told that it is now.
func HealthNews(told map[uint64]*topologyv1.NodeHealth, all []*topologyv1.NodeHealth) (news []*topologyv1.NodeHealth) {
	for _, h := range all {
		t := told[h.GetIncarnation()]
		if t == nil || t.GetState() != h.GetState() || t.GetReason() != h.GetReason() || t.GetSinceMs() != h.GetSinceMs() {
			told[h.GetIncarnation()] = h
			news = append(news, h)
		}
	}
	if len(told) > len(all) { // of nodes that are gone
		clear(told)
		for _, h := range all {
			told[h.GetIncarnation()] = h
		}
	}
	return news
}

// HealthAfter returns what a watcher of a topology knows of its nodes' health after news:
// known itself where there are none.
func HealthAfter(known map[uint64]*topologyv1.NodeHealth, news []*topologyv1.NodeHealth, t *Topology) map[uint64]*topologyv1.NodeHealth {
	if known != nil && len(news) == 0 && len(known) <= len(t.Nodes) {
		return known
	}
	next := make(map[uint64]*topologyv1.NodeHealth, len(t.Nodes))
	for _, h := range known {
		next[h.GetIncarnation()] = h
	}
	for _, h := range news {
		next[h.GetIncarnation()] = h
	}
	maps.DeleteFunc(next, func(incarnation uint64, _ *topologyv1.NodeHealth) bool { return t.Node(incarnation) == nil })
	return next
}
