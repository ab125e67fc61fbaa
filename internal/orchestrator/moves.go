package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// changeRing returns the next command that brings the slots in transition forward, or
// the operation under way, or nil. All that a change has come to is in the topology
// and in what the nodes say, so any leader can go on with it.
func changeRing(s *topology.State, v view) *topologyv1.Command {
	for _, step := range []func(*topology.State, view) *topologyv1.Command{advance, beginReplacing, beginMoves, changeNamespace, endOperation, removeReplaced, trim} {
		if cmd := step(s, v); cmd != nil {
			return cmd
		}
	}
	return nil
}

// changing reports whether a slot is in transition, or is to be.
func changing(s *topology.State) bool {
	return s != nil && (s.Active() != nil || replacing(s.Topology))
}

// advance takes every slot in transition a phase further that can go there.
func advance(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	b := batch{t: t}
	for i := range t.Ring {
		j := t.Ring[i].Moving()
		if j < 0 {
			continue
		}
		vnode := uint32(i)
		old := t.Ring[i].Slots[j]
		next, _ := nextPhase(s, vnode, j, v)
		if next == old {
			continue
		}
		b.set(vnode, j, next)
		switch {
		case next.Phase != topology.Stable:
			b.count(t.NodeName(next.Incoming), fmt.Sprintf("%s to #%d: %s", t.NodeName(old.Node), next.Incoming, next.Phase))
		case next.Node == old.Node:
			b.count(t.NodeName(next.Node), fmt.Sprintf("#%d stays", next.Node))
		default:
			f := filling(t, vnode, j, v)
			b.moved(f.GetRecords(), f.GetBytes())
			b.count(t.NodeName(next.Node), fmt.Sprintf("#%d has been filled and votes", next.Node))
		}
	}
	return b.command("%s on %d vnodes")
}

// nextPhase returns what a slot in transition becomes, and, where it stays as it is,
// what it waits for.
func nextPhase(s *topology.State, vnode uint32, slot int, v view) (_ topology.Slot, waitsFor string) {
	t := s.Topology
	cur := t.Ring[vnode].Slots[slot]
	back := cur
	back.Phase = topology.WriteBothReadOld
	stay := topology.Slot{Node: cur.Node, Phase: topology.Stable}
	done := topology.Slot{Node: cur.Incoming, Phase: topology.Stable}
	undo := aborted(s, vnode, slot) || successor(t, cur.Incoming, v) != nil
	switch cur.Phase {
	case topology.WriteBothReadOld:
		if undo && !v.gone(t, cur.Node) {
			// Reads have been the new node's before if the phase is not the move's first: then
			// none may be on its way there any more when writes go to the old node alone.
			if t.Ring[vnode].ChangedEpoch > cur.Since {
				if why := barrier(t, vnode, slot, cur.Node, v); why != "" {
					return cur, why
				}
			}
			return stay, ""
		}
		complete := filling(t, vnode, slot, v).GetComplete()
		if !complete && v.gone(t, cur.Node) {
			next := cur
			next.Phase = topology.WriteNewReadNone
			return next, ""
		}
		if !complete && !mutant.On("advance-unfilled") {
			return cur, fillingWaits(t, vnode, slot, v)
		}
		if why := barrier(t, vnode, slot, cur.Incoming, v); why != "" {
			return cur, why
		}
		next := cur
		next.Phase = topology.WriteBothReadNew
		return next, ""
	case topology.WriteBothReadNew:
		if undo && !v.gone(t, cur.Node) {
			return back, ""
		}
		if why := barrier(t, vnode, slot, cur.Incoming, v); why != "" {
			return cur, why
		}
		return done, ""
	case topology.WriteNewReadNone:
		// The new node is the only one of the slot that has had the writes since, so it gets
		// the slot also where the move is aborted, unless it is lost itself.
		if aborted(s, vnode, slot) && v.gone(t, cur.Incoming) && cur.Incoming != cur.Node && v.healthy(cur.Node) {
			return topology.Slot{Node: cur.Node, Incoming: cur.Node, Phase: topology.WriteNewReadNone}, ""
		}
		if why := barrier(t, vnode, slot, cur.Incoming, v); why != "" {
			return cur, why
		}
		if !filling(t, vnode, slot, v).GetComplete() {
			return cur, fillingWaits(t, vnode, slot, v)
		}
		return done, ""
	}
	return cur, ""
}

// aborted reports whether the move of a slot is one that is being taken back.
func aborted(s *topology.State, vnode uint32, slot int) bool {
	op := s.Active()
	return op != nil && op.State == topology.Aborting && slices.ContainsFunc(op.Moves, func(m topology.Move) bool {
		return m.Vnode == vnode && m.Slot == slot && !m.Done
	})
}

// barrier returns why not enough nodes have taken in the epoch of a vnode's last
// change for the next one, or "".
//
// The endpoint that reads go to, all live nodes and, for every namespace that uses the
// slot, N−q+1 slots with all their endpoints must have taken it in and ended what they
// did under older ones. Then no quorum of an older epoch can be reached any more; see
// models/barrier.py for what a weaker rule allows. A slot whose old node was taken for
// dead counts when that has taken it in, too.
func barrier(t *topology.Topology, vnode uint32, slot int, endpoint uint64, v view) string {
	ring := &t.Ring[vnode]
	epoch := ring.ChangedEpoch
	if v.epoch(endpoint) < epoch {
		return fmt.Sprintf("%s has not taken in epoch %s yet", t.NodeName(endpoint), topology.EpochString(epoch))
	}
	if why := allTaken(t, epoch, v); why != "" || mutant.On("advance-on-live-nodes") {
		return why
	}
	for i := range t.Namespaces {
		if ns := &t.Namespaces[i]; slot < ns.Wide() {
			if why := quorumsTaken(t, ns, vnode, epoch, majority, v); why != "" {
				return why
			}
		}
	}
	return ""
}

func majority(n int) int { return quorum.Majority.Need(n) }

// quorumsTaken returns why too few slots of a namespace's vnode have taken in an epoch,
// or "": N−q+1 must have, of both numbers of slots while N changes.
func quorumsTaken(t *topology.Topology, ns *topology.Namespace, vnode uint32, epoch uint64, q func(n int) int, v view) string {
	for _, n := range []int{ns.N, ns.AlsoN} {
		if n == 0 {
			continue
		}
		have, want := 0, n-q(n)+1
		for j, s := range t.Slots(vnode, n) {
			slot := t.Ring[vnode].Slots[j]
			old := slot.Phase != topology.WriteNewReadNone || t.Node(slot.Node) != nil && taken(t, slot.Node, epoch, v)
			if old && taken(t, s.Write[0], epoch, v) && taken(t, s.Write[1], epoch, v) {
				have++
			}
		}
		if have < want {
			return fmt.Sprintf("%d replicas of namespace %s have taken in epoch %s, %d must have", have, ns.Name, topology.EpochString(epoch), want)
		}
	}
	return ""
}

// allTaken returns which live node has not taken in an epoch, or "".
func allTaken(t *topology.Topology, epoch uint64, v view) string {
	for i := range t.Nodes {
		if inc := t.Nodes[i].Incarnation; !v.unhealthy(inc) && v.epoch(inc) < epoch {
			return fmt.Sprintf("%s has not taken in epoch %s yet", t.Nodes[i].Name, topology.EpochString(epoch))
		}
	}
	return ""
}

// taken reports whether an endpoint has taken in an epoch; no endpoint has, and one that
// people gave up for lost answers under no epoch any more.
func taken(t *topology.Topology, incarnation, epoch uint64, v view) bool {
	return incarnation == 0 || v.epoch(incarnation) >= epoch || t.Lost(incarnation)
}

// filling returns what the incoming node of a slot says of its filling, or nil.
func filling(t *topology.Topology, vnode uint32, slot int, v view) *adminv1.Filling {
	s := t.Ring[vnode].Slots[slot]
	for _, f := range v.status(s.Incoming).GetFillings() {
		if f.GetVnode() == vnode && f.GetNamespaceId() == 0 && f.GetAssignedEpoch() == s.Since {
			return f
		}
	}
	return nil
}

func fillingWaits(t *topology.Topology, vnode uint32, slot int, v view) string {
	f := filling(t, vnode, slot, v)
	if inc := t.Ring[vnode].Slots[slot].Incoming; f == nil && v.epoch(inc) < t.Ring[vnode].ChangedEpoch {
		return fmt.Sprintf("%s has not taken in epoch %s yet", t.NodeName(inc), topology.EpochString(t.Ring[vnode].ChangedEpoch))
	}
	return cmp.Or(f.GetWaitsFor(), "it is being filled")
}

// beginMoves begins moves of the operation under way, in their order, one slot of a
// vnode at a time.
func beginMoves(s *topology.State, v view) *topologyv1.Command {
	op := s.Active()
	if op == nil || op.State != topology.Running {
		return nil
	}
	t := s.Topology
	busy := map[uint64]int{}
	for i := range t.Ring {
		if j := t.Ring[i].Moving(); j >= 0 {
			busy[t.Ring[i].Slots[j].Node]++
			busy[t.Ring[i].Slots[j].Incoming]++
		}
	}
	b := batch{t: t}
	topology.Begin(op.Moves, busy, func(m topology.Move) (topology.Slot, bool) {
		next, why := firstPhase(op, t, m, v)
		return next, why == ""
	}, func(i int, next topology.Slot) {
		b.set(op.Moves[i].Vnode, op.Moves[i].Slot, next)
		b.count(t.NodeName(next.Incoming), fmt.Sprintf("%s to %s", t.NodeName(next.Node), t.NodeName(next.Incoming)))
	})
	return b.command(fmt.Sprintf("operation %d moves ", op.ID) + "%s on %d vnodes")
}

// firstPhase returns what a slot becomes when its move begins, or why it cannot.
func firstPhase(op *topology.Operation, t *topology.Topology, m topology.Move, v view) (_ topology.Slot, waitsFor string) {
	vnode := &t.Ring[m.Vnode]
	if vnode.Moving() >= 0 && !mutant.On("two-transitions") {
		return topology.Slot{}, "another slot of the vnode is moving"
	}
	next := topology.Slot{Node: vnode.Slots[m.Slot].Node, Incoming: m.To, Phase: topology.WriteBothReadOld}
	if n := t.Node(m.To); n != nil {
		next.Incoming = t.Resolve(n.Name).Incarnation // its disk may have been lost meanwhile
	}
	switch {
	case !v.healthy(next.Incoming):
		return next, t.NodeName(next.Incoming) + " is not healthy"
	case hasSlot(vnode, next.Incoming):
		return next, t.NodeName(next.Incoming) + " has a slot of the vnode"
	case v.gone(t, next.Node), v.unhealthy(next.Node) && (op.Kind == kindReplace || op.Kind == kindRecover):
		next.Phase = topology.WriteNewReadNone
	case !v.healthy(next.Node):
		return next, t.NodeName(next.Node) + " is not healthy"
	}
	return next, ""
}

// kindReplace is the kind of the operations that have one node take the place of
// another, which may be dead.
const kindReplace = "replace"

// endOperation ends the operation whose moves are all done, or taken back.
func endOperation(s *topology.State, v view) *topologyv1.Command {
	op := s.Active()
	if op == nil {
		return nil
	}
	end := &topologyv1.SteerOperation{Id: op.ID, State: topologyv1.Operation_STATE_DONE}
	what := []string{fmt.Sprintf("operation %d is done: %s", op.ID, op.Title)}
	mutations := []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: end}}}
	switch {
	case op.OfNamespace():
		ns := s.Topology.NamespaceByID(op.Namespace)
		switch {
		case ns != nil && (ns.AlsoN != 0 || op.State == topology.Paused || op.State == topology.Running && !op.Reached(ns)):
			return nil
		case op.State == topology.Aborting:
			end.State = topologyv1.Operation_STATE_ABORTED
			what[0] = fmt.Sprintf("operation %d is aborted: %s", op.ID, op.Title)
		}
	case op.State == topology.Running && op.Left() == 0 && !reports(s.Topology, op):
		remove := &topologyv1.RemoveNodes{}
		for _, inc := range op.Remove {
			// A node that was given slots since, or is gone already, stays out of it.
			if s.Topology.Node(inc) != nil && !s.Topology.Names(inc) {
				remove.Incarnations = append(remove.Incarnations, inc)
				what = append(what, fmt.Sprintf("%s, #%d, has left", s.Topology.NodeName(inc), inc))
			}
		}
		if len(remove.Incarnations) > 0 {
			mutations = append(mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_RemoveNodes{RemoveNodes: remove}})
			if v.provisions {
				mutations = append(mutations, endRemoved(s, op, remove.Incarnations)...)
			}
		}
	case op.State == topology.Aborting && !slices.ContainsFunc(op.Moves, func(m topology.Move) bool {
		return !m.Done && s.Topology.Ring[m.Vnode].Slots[m.Slot].Phase != topology.Stable
	}):
		end.State = topologyv1.Operation_STATE_ABORTED
		what[0] = fmt.Sprintf("operation %d is aborted: %s", op.ID, op.Title)
	default:
		return nil
	}
	return &topologyv1.Command{
		ExpectEpoch: s.Topology.Epoch,
		Change:      &topologyv1.Change{Subject: "operation", Name: fmt.Sprint(op.ID), What: strings.Join(what, "; ")},
		Mutations:   mutations,
	}
}

// reports reports whether a node that an operation removes still has copies for reports.
func reports(t *topology.Topology, op *topology.Operation) bool {
	return slices.ContainsFunc(op.Remove, func(inc uint64) bool {
		n := t.Node(inc)
		return n != nil && n.Role == topology.Reporting && t.Names(inc)
	})
}

// observeOperation returns an operation with how far its moves have come.
func observeOperation(s *topology.State, op *topology.Operation, v view) *adminv1.ObservedOperation {
	out := &adminv1.ObservedOperation{Operation: op.Proto()}
	if op.State.Ended() {
		return out
	}
	if op.OfNamespace() {
		out.Moving = observeNamespace(s.Topology, op, v)
		return out
	}
	begun := map[uint32]bool{}
	for _, m := range op.Moves {
		if m.Done || begun[m.Vnode] {
			continue
		}
		begun[m.Vnode] = true
		slot := s.Topology.Ring[m.Vnode].Slots[m.Slot]
		p := &adminv1.MoveProgress{Move: m.Proto(), Phase: topologyv1.Phase(slot.Phase)}
		if slot.Phase == topology.Stable {
			if _, p.WaitsFor = firstPhase(op, s.Topology, m, v); p.WaitsFor == "" {
				continue // its turn has not come
			}
		} else {
			f := filling(s.Topology, m.Vnode, m.Slot, v)
			p.Records, p.Bytes = f.GetRecords(), f.GetBytes()
			_, p.WaitsFor = nextPhase(s, m.Vnode, m.Slot, v)
		}
		out.Moving = append(out.Moving, p)
	}
	return out
}
