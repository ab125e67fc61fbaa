package sim

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// topologies judges every topology that any process shows.
//
// It checks invariants 8 and 9, that no two data directories share an incarnation
// (10), and that one epoch is one topology wherever it is seen (12).
type topologies struct {
	h       *History
	checker *Checker
	// moves: nodes of several zones come and go. Zones hold when that has come to rest.
	moves bool
	mu    struct {
		sync.Mutex
		byEpoch map[uint64]*topology.Topology
		protos  map[uint64]*topologyv1.Topology
		dataIDs map[uint64]string // by incarnation
		newest  *topology.Topology
	}
}

func newTopologies(c *Checker) *topologies {
	ts := &topologies{h: c.h, checker: c}
	ts.mu.byEpoch = map[uint64]*topology.Topology{}
	ts.mu.protos = map[uint64]*topologyv1.Topology{}
	ts.mu.dataIDs = map[uint64]string{}
	return ts
}

// watch asks one process after the other, in an order drawn from rng, until ctx ends.
func (ts *topologies) watch(ctx context.Context, controls map[string]adminv1.ControlServiceClient, rng *rand.Rand) {
	names := make([]string, 0, len(controls))
	for n := range controls {
		names = append(names, n)
	}
	slices.Sort(names)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
		name := names[rng.IntN(len(names))]
		ts.ask(ctx, name, controls[name])
	}
}

// ask judges the topology that a process shows, and notes which epochs it says that
// nodes serve by.
func (ts *topologies) ask(ctx context.Context, name string, control adminv1.ControlServiceClient) {
	s, err := clusterStatus(ctx, control)
	if err != nil {
		return
	}
	ts.see(name, s.GetTopology())
	for _, n := range s.GetNodes() {
		if st := n.GetStatus(); st != nil {
			ts.checker.Serves(st.GetIncarnation(), st.GetEpoch(), ts.latest())
		}
	}
}

func clusterStatus(ctx context.Context, c adminv1.ControlServiceClient) (*adminv1.GetClusterStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return c.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
}

// latest returns the topology of the greatest epoch seen, or nil.
func (ts *topologies) latest() *topology.Topology {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.mu.newest
}

// before returns the topology of the greatest epoch seen up to one, or nil.
func (ts *topologies) before(epoch uint64) (t *topology.Topology) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for e, o := range ts.mu.byEpoch {
		if e <= epoch && (t == nil || e > t.Epoch) {
			t = o
		}
	}
	return t
}

// incarnations returns those of the newest topology's data nodes.
func (ts *topologies) incarnations() []uint64 {
	var out []uint64
	if t := ts.latest(); t != nil {
		for _, n := range t.Nodes {
			out = append(out, n.Incarnation)
		}
	}
	return out
}

// see judges a topology that a process shows.
func (ts *topologies) see(by string, pb *topologyv1.Topology) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if old := ts.mu.protos[pb.GetEpoch()]; old != nil {
		if !proto.Equal(old, pb) {
			ts.h.violate(12, "%s shows epoch %d with other contents than it was seen with before", by, pb.GetEpoch())
		}
		return
	}
	t, err := topology.FromProto(pb)
	if err != nil {
		ts.h.violate(9, "%s shows an impossible topology: %v", by, err)
		return
	}
	ts.mu.protos[t.Epoch], ts.mu.byEpoch[t.Epoch] = pb, t
	if ts.mu.newest == nil || t.Epoch > ts.mu.newest.Epoch {
		ts.mu.newest = t
	}
	ts.h.Note("epoch %d is seen, at %s: %s", t.Epoch, by, describeMoves(t))
	for _, n := range t.Nodes {
		if id, ok := ts.mu.dataIDs[n.Incarnation]; ok && id != n.DataID {
			ts.h.violate(10, "incarnation %d is of two data directories, %s and %s", n.Incarnation, id, n.DataID)
		}
		ts.mu.dataIDs[n.Incarnation] = n.DataID
	}
	if !t.Formed() {
		return
	}
	ts.slots(t)
	// Neighbouring epochs are in use at once whenever one is made.
	for _, e := range []uint64{t.Epoch - 1, t.Epoch + 1} {
		if o := ts.mu.byEpoch[e]; o != nil && o.Formed() {
			ts.intersect(t, o)
			ts.intersect(o, t)
		}
	}
}

// slots checks invariant 9.
func (ts *topologies) slots(t *topology.Topology) {
	zones := map[string]bool{}
	for _, n := range t.Nodes {
		zones[n.Zone] = true
	}
	for v := range t.Ring {
		slots := t.Ring[v].Slots
		if len(slots) < t.Width() { // those that are used no more are taken out later
			ts.h.violate(9, "epoch %d: vnode %d has %d slots, the largest N is %d", t.Epoch, v, len(slots), t.Width())
		}
		used := map[uint64]bool{}
		moving := 0
		for _, s := range slots {
			if s.Phase != topology.Stable {
				moving++
			}
			if s.Phase == topology.WriteNewReadNone {
				ts.checker.Replaced()
			}
			if s.Phase != topology.Stable { // whoever it was, the control loops may begin and abort moves
				ts.checker.Moves(s.Node, uint32(v))
				ts.checker.Moves(s.Incoming, uint32(v))
			}
			for _, n := range s.Quorum().Write {
				if n != 0 && used[n] {
					ts.h.violate(9, "epoch %d: vnode %d has two slots on node %d", t.Epoch, v, n)
				}
				used[n] = true
			}
		}
		if moving > 1 {
			ts.h.violate(8, "epoch %d: %d slots of vnode %d are in transition at once", t.Epoch, moving, v)
		}
		for _, ns := range t.Namespaces {
			in := map[string]bool{}
			for _, s := range slots[:min(ns.N, len(slots))] {
				if n := t.Node(s.Node); n != nil {
					in[n.Zone] = true
				}
			}
			if !ts.moves && len(zones) >= ns.N && len(in) < ns.N {
				ts.h.violate(9, "epoch %d: the replicas of vnode %d in namespace %s lie in %d of %d zones", t.Epoch, v, ns.Name, len(in), len(zones))
			}
		}
	}
}

// intersect checks invariant 8: every default write quorum of one epoch meets every
// default read quorum of the other, where reads of both meet writes. A slot whose old node is
// dead answers nobody in either epoch.
func (ts *topologies) intersect(writes, reads *topology.Topology) {
	for v := range writes.Ring {
		if v >= len(reads.Ring) || writes.Ring[v].ChangedEpoch == reads.Ring[v].ChangedEpoch && !changesNamespaces(writes, reads) {
			continue
		}
		dead := map[uint64]bool{}
		for _, t := range []*topology.Topology{writes, reads} {
			for _, s := range t.Ring[v].Slots {
				if s.Phase == topology.WriteNewReadNone {
					dead[s.Node] = true
				}
			}
		}
		for _, ns := range writes.Namespaces {
			other := reads.NamespaceByID(ns.ID)
			if other == nil {
				continue
			}
			goals, r := ns.Writes(quorum.Spec{}), other.R.Need(other.N)
			if ns.Strength() != quorum.Eventual && other.Strength() != quorum.Eventual && !meet(writes.Slots(uint32(v), ns.Wide()), goals, reads.Slots(uint32(v), other.N), r, dead) {
				ts.h.violate(8, "vnode %d, namespace %s: a write quorum of epoch %d misses a read quorum of epoch %d", v, ns.Name, writes.Epoch, reads.Epoch)
			}
		}
	}
}

// changesNamespaces reports whether N or a default quorum of a namespace, or what it is
// becoming, differs.
func changesNamespaces(a, b *topology.Topology) bool {
	return slices.ContainsFunc(a.Namespaces, func(ns topology.Namespace) bool {
		other := b.NamespaceByID(ns.ID)
		return other != nil && (other.N != ns.N || other.AlsoN != ns.AlsoN || other.W != ns.W || other.R != ns.R || other.AlsoW != ns.AlsoW)
	})
}

// meet reports whether every choice of writing slots that is enough shares a node with
// every choice of r reading ones.
func meet(writing []quorum.Slot, enough quorum.Goals, reading []quorum.Slot, r int, dead map[uint64]bool) bool {
	for ws := range 1 << len(writing) {
		if !enough.Met(writing, func(slot int) bool { return ws>>slot&1 == 1 }) {
			continue
		}
		has := map[uint64]bool{}
		for i, s := range writing {
			if ws>>i&1 == 1 {
				has[s.Write[0]], has[s.Write[1]] = true, true
			}
		}
		delete(has, 0)
		missing := 0 // readable slots that lack the write
		for _, s := range reading {
			if s.Read != 0 && !dead[s.Read] && !has[s.Read] {
				missing++
			}
		}
		if missing >= r {
			return false
		}
	}
	return true
}
