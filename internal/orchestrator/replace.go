package orchestrator

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// view is what the leader knows of the nodes when it decides.
type view struct {
	// state is a node's health, unspecified until it was probed.
	state func(incarnation uint64) topologyv1.NodeHealth_State
	// status is what a node last said of itself, nil if nothing. Epochs and complete
	// fillings only grow within an incarnation, so an old status errs to the safe side.
	status func(incarnation uint64) *adminv1.NodeStatus
	// reason says why, in words, or what is odd about a healthy one.
	reason func(incarnation uint64) string
	// down is how long a node has been unhealthy.
	down func(incarnation uint64) time.Duration
	// grace is for how long no node is taken for dead yet: see the function.
	grace time.Duration
	// fresh reports whether what a node last said of itself is of now.
	fresh func(incarnation uint64) bool
	// held returns what vnodes hold, or nil while that is not known.
	held func() holdings
	// copies is what this leader remembers of the copies on reporting nodes, nil if nothing.
	copies *copyWatch
	// nowMillis is milliseconds since 1970.
	nowMillis int64
	// provisions tells that there is a provisioner; what it launches has launchTimeout to
	// register.
	provisions    bool
	launchTimeout time.Duration
}

// patience is how long an unhealthy node is waited for that a slot is being moved from:
// a restart takes less, and what the newcomer has taken in from it stays of use.
const patience = 20 * time.Second

// gone reports whether a node is not waited for: it was removed, another data directory
// has its name, or it has been unhealthy for long.
func (v view) gone(t *topology.Topology, incarnation uint64) bool {
	return t.Node(incarnation) == nil || successor(t, incarnation, v) != nil || v.unhealthy(incarnation) && v.down(incarnation) > patience
}

func (v view) healthy(incarnation uint64) bool {
	return v.state(incarnation) == topologyv1.NodeHealth_STATE_HEALTHY
}

func (v view) unhealthy(incarnation uint64) bool {
	return v.state(incarnation) == topologyv1.NodeHealth_STATE_UNHEALTHY
}

func (v view) epoch(incarnation uint64) uint64 { return v.status(incarnation).GetEpoch() }

// successor returns the newest data directory under a node's name when that is
// another one, it is healthy and the node is known not to be. A directory is only
// ever admitted under the name of a node that is not healthy.
func successor(t *topology.Topology, incarnation uint64, v view) *topology.Node {
	n := t.Node(incarnation)
	if n == nil || n.Role != topology.Data || !v.unhealthy(incarnation) {
		return nil
	}
	newest := t.Resolve(n.Name)
	if newest == n || newest.Role != topology.Data || !v.healthy(newest.Incarnation) {
		return nil
	}
	return newest
}

// beginReplacing makes successors incoming on the slots of the nodes whose place
// they take, one slot of a vnode at a time.
func beginReplacing(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	b := batch{t: t}
	for i := range t.Ring {
		vnode := &t.Ring[i]
		moving := vnode.Moving()
		for j, s := range vnode.Slots {
			dead := s.Node
			if s.Phase == topology.WriteNewReadNone {
				dead = s.Incoming // the successor may need one itself
			}
			if moving >= 0 && moving != j || s.Phase != topology.Stable && s.Phase != topology.WriteNewReadNone {
				continue
			}
			next := successor(t, dead, v)
			if next == nil || hasSlot(vnode, next.Incarnation) {
				continue
			}
			b.set(uint32(i), j, topology.Slot{Node: dead, Incoming: next.Incarnation, Phase: topology.WriteNewReadNone})
			b.count(next.Name, fmt.Sprintf("#%d takes the place of #%d", next.Incarnation, dead))
			break
		}
	}
	return b.command("%s on %d vnodes: they are being filled from the other replicas")
}

func hasSlot(v *topology.Vnode, incarnation uint64) bool {
	return slices.ContainsFunc(v.Slots, func(s topology.Slot) bool { return s.Node == incarnation || s.Incoming == incarnation })
}

// removeReplaced takes out the data directories that a newer one under their name
// has replaced on all their slots.
func removeReplaced(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	m := &topologyv1.RemoveNodes{}
	var what []string
	name := ""
	for i := range t.Nodes {
		n := &t.Nodes[i]
		newest := t.Resolve(n.Name)
		if newest == n || !v.healthy(newest.Incarnation) || t.Names(n.Incarnation) || awaited(s, n.Incarnation) {
			continue
		}
		m.Incarnations = append(m.Incarnations, n.Incarnation)
		what = append(what, fmt.Sprintf("#%d: #%d has taken its place", n.Incarnation, newest.Incarnation))
		name = n.Name
	}
	if len(what) == 0 {
		return nil
	}
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "node", Name: name, What: "removed " + strings.Join(what, ", ")},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_RemoveNodes{RemoveNodes: m}}},
	}
}

// awaited reports whether a move of the operation under way names a node.
func awaited(s *topology.State, incarnation uint64) bool {
	op := s.Active()
	return op != nil && slices.ContainsFunc(op.Moves, func(m topology.Move) bool { return !m.Done && m.To == incarnation })
}

// batch gathers changes of many vnodes into one command.
type batch struct {
	t    *topology.Topology
	m    topologyv1.SetVnodes
	name string
	// what happens, in the order it was first said.
	what []string
}

func (b *batch) set(vnode uint32, slot int, s topology.Slot) {
	v := topology.Vnode{Slots: slices.Clone(b.t.Ring[vnode].Slots)}
	v.Slots[slot] = s
	b.m.Vnodes = append(b.m.Vnodes, &topologyv1.VnodeSlots{Vnode: vnode, Slots: topology.RingProto([]topology.Vnode{v})[0].GetSlots()})
}

// moved notes what the newcomer took in for the move that the last step set ends.
func (b *batch) moved(records, bytes uint64) {
	last := b.m.Vnodes[len(b.m.Vnodes)-1]
	last.MovedRecords, last.MovedBytes = records, bytes
}

func (b *batch) count(name, what string) {
	b.name = name
	if !slices.Contains(b.what, what) {
		b.what = append(b.what, what)
	}
}

// command returns what was gathered, or nil. format takes what happens and the
// number of vnodes.
func (b *batch) command(format string) *topologyv1.Command {
	if len(b.m.GetVnodes()) == 0 {
		return nil
	}
	return &topologyv1.Command{
		ExpectEpoch: b.t.Epoch,
		Change:      &topologyv1.Change{Subject: topology.SubjectMove, Name: b.name, What: fmt.Sprintf(format, strings.Join(b.what, ", "), len(b.m.GetVnodes()))},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetVnodes{SetVnodes: &b.m}}},
	}
}

// replacing returns the nodes whose state the leader waits for: while a slot is in
// transition or a node has a successor, all.
func replacing(t *topology.Topology) bool {
	if t == nil || !t.Formed() {
		return false
	}
	for i := range t.Ring {
		if t.Ring[i].Moving() >= 0 {
			return true
		}
	}
	return slices.ContainsFunc(t.Nodes, func(n topology.Node) bool {
		return n.Role == topology.Data && t.Resolve(n.Name).Incarnation != n.Incarnation
	})
}
