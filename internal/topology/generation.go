package topology

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/kvasirdb/kvasir/internal/quorum"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Generation returns the generation of an epoch or incarnation: how often the control
// plane has been recovered.
func Generation(number uint64) uint64 { return number >> generationShift }

// maxGeneration is the last generation that fits an epoch.
const maxGeneration = 1<<(64-generationShift) - 1

// Start is the last start of a node's data directory that is known.
type Start struct {
	Incarnation, Boot uint64
	BootID            string
}

// Recovery is what makes a new generation of a cluster whose orchestrators are lost.
type Recovery struct {
	// ID tells recoveries apart that begin the same generation.
	ID         string
	Generation uint64
	// Newest is the newest topology that the nodes have.
	Newest *Topology
	Starts []Start
	// Lost are nodes that are given up with their disks. See AcceptLoss.
	Lost []uint64
	// AtMillis is milliseconds since 1970, What what the history says.
	AtMillis int64
	What     string
}

// The counters of what only the orchestrators knew go on from numbers that the generations
// before cannot have reached: identifiers are never reused.
const (
	namespacesPerGeneration = 1 << 16
	operationsPerGeneration = 1000
	nodesPerGeneration      = 1000
)

// State returns the first state of the new generation.
//
// Every vnode and namespace counts as changed in it, so that whoever has taken it in
// refuses all requests of older generations: these may know of a step that no node which
// answered has seen (invariant 8). Slots in transition, and namespaces, stay as far as they
// have come and go on from there.
func (r Recovery) State() (*State, error) {
	t := *r.Newest
	t.holders = nil
	if r.ID == "" || r.Generation <= Generation(t.Epoch) || r.Generation > maxGeneration {
		return nil, fmt.Errorf("recovery %q cannot begin generation %d after epoch %s", r.ID, r.Generation, EpochString(t.Epoch))
	}
	first := r.Generation << generationShift
	t.Epoch = first | (t.Epoch&(1<<generationShift-1) + 1)
	t.Recovery = r.ID
	t.Nodes, t.Ring, t.Namespaces = slices.Clone(t.Nodes), slices.Clone(t.Ring), slices.Clone(t.Namespaces)
	for i := range t.Ring {
		t.Ring[i] = Vnode{Slots: t.Ring[i].Slots, ChangedEpoch: t.Epoch, Copies: evicted(t.Ring[i].Copies, t.Epoch)}
	}
	namespaces := uint32(0)
	for i := range t.Namespaces {
		t.Namespaces[i].ChangedEpoch = t.Epoch
		namespaces = max(namespaces, t.Namespaces[i].ID)
	}
	s := &State{
		Topology: &t, ScaledUpMillis: r.AtMillis, ScaledDownMillis: r.AtMillis,
		nextIncarnation: first | 1,
		nextNamespace:   (namespaces/namespacesPerGeneration + 1) * namespacesPerGeneration,
		nextOperation:   r.Generation * operationsPerGeneration,
		nextProvision:   first,
		lastChange:      first,
		boots:           map[uint64]boot{},
	}
	for _, start := range r.Starts {
		s.boots[start.Incarnation] = boot{start.Boot, start.BootID}
	}
	d := draft{State: s}
	s.lastNodeNumber = d.greatestNodeNumber() + nodesPerGeneration
	t.index()
	for _, n := range t.Nodes {
		// Who was drained is not known any more; where that is so, people decide.
		if n.Role == Data && !t.Names(n.Incarnation) {
			s.heldBack = append(s.heldBack, n.Incarnation)
		}
	}
	s.resumeNamespace(r.AtMillis)
	s.keepSettings(r.AtMillis, "as they were when the control plane was recovered")
	s.note(&topologyv1.Change{AtMs: uint64(r.AtMillis), Subject: "cluster", Name: t.ClusterID, What: r.What})
	if len(r.Lost) > 0 {
		if err := d.acceptLoss(&topologyv1.AcceptLoss{Incarnations: r.Lost}, r.AtMillis); err != nil {
			return nil, err
		}
		s.note(&topologyv1.Change{AtMs: uint64(r.AtMillis), Subject: SubjectLoss, What: s.Losses[0].Describe()})
		t.index()
	}
	return s, t.validate()
}

// resumeNamespace adds an operation that goes on with the namespace that was being changed.
func (s *State) resumeNamespace(atMillis int64) {
	i := slices.IndexFunc(s.Topology.Namespaces, func(ns Namespace) bool { return ns.AlsoN != 0 })
	if i < 0 {
		return
	}
	ns := &s.Topology.Namespaces[i]
	s.nextOperation++
	op := Operation{ID: s.nextOperation, Kind: KindReplicas, State: Running, Namespace: ns.ID, StartedMillis: atMillis, TargetN: ns.AlsoN, FromN: ns.N}
	op.Title = fmt.Sprintf("go on to N=%d of namespace %s", ns.AlsoN, ns.Name)
	if ns.Change >= Requiring {
		op.Kind, op.TargetN, op.TargetW, op.TargetR, op.FromW, op.FromR = KindQuorums, 0, ns.AlsoW, ns.AlsoR, ns.W, ns.R
		op.Title = fmt.Sprintf("go on to W=%s R=%s of namespace %s", ns.AlsoW, ns.AlsoR, ns.Name)
	}
	s.Operations = append(s.Operations, op)
}

// Shortage is a vnode of which too few replicas are left for a namespace.
type Shortage struct {
	Vnode      uint32
	Namespace  string
	Have, Need int
}

// Unsealed returns the vnodes of which fewer than a majority of a namespace's slots have
// all their endpoints among some nodes. Without them an older generation could still pass
// a barrier, which takes N−q+1 slots, or reach a quorum.
func (t *Topology) Unsealed(among func(incarnation uint64) bool) []Shortage {
	return t.shortages(func(ns *Namespace) int { return quorum.Majority.Need(ns.N) }, func(s quorum.Slot) bool {
		return (s.Read == 0 || among(s.Read)) && among(s.Write[0]) && (s.Write[1] == 0 || among(s.Write[1]))
	})
}

// Short returns the vnodes of which fewer than N−q+1 voting replicas of a namespace are on
// nodes that are left: too few to have every write that a majority has acknowledged.
func (t *Topology) Short(left func(incarnation uint64) bool) []Shortage {
	return t.shortages(func(ns *Namespace) int { return ns.N - quorum.Majority.Need(ns.N) + 1 }, func(s quorum.Slot) bool {
		return s.Read != 0 && left(s.Read)
	})
}

// shortages returns the vnodes that have fewer slots than are needed.
func (t *Topology) shortages(need func(*Namespace) int, counts func(quorum.Slot) bool) (out []Shortage) {
	for i := range t.Ring {
		for j := range t.Namespaces {
			ns, have := &t.Namespaces[j], 0
			for _, s := range t.Slots(uint32(i), ns.N) {
				if counts(s) {
					have++
				}
			}
			if n := need(ns); have < n {
				out = append(out, Shortage{uint32(i), ns.Name, have, n})
			}
		}
	}
	return out
}

// SortedVnodes returns the vnodes and the namespaces of some shortages, each once.
func SortedVnodes(shortages []Shortage) (vnodes []uint32, namespaces []string) {
	for _, s := range shortages {
		vnodes, namespaces = append(vnodes, s.Vnode), append(namespaces, s.Namespace)
	}
	slices.Sort(vnodes)
	slices.SortFunc(namespaces, cmp.Compare[string])
	return slices.Compact(vnodes), slices.Compact(namespaces)
}
