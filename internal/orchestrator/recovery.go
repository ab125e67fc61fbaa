package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// kindRecover is the kind of the operations that the leader begins for a dead node.
const kindRecover = "recover"

// recoverNodes returns what is to be done next about a node that has been unhealthy for
// longer than replace_after: a spare takes its place, or a node that the provisioner is
// asked for, or else the other nodes do. The node is not waited for any more, but its
// data is left alone until all its vnodes are whole without it.
func recoverNodes(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	if s.Active() != nil || !v.knows(t) || frozen(t, v) != "" {
		return nil
	}
	dead := deadNodes(t, v)
	if len(dead) == 0 {
		if d := deadSpare(s, v); d != nil {
			return startRecovery(s, []*topology.Node{d}, fmt.Sprintf("%s, without slots, is dead and leaves", d.Name), placement.Of(t), v)
		}
		return condition(s, topology.ConditionRecovery, "recovery", "", "no dead node is left to be replaced")
	}
	d := dead[0]
	if spare := spareFor(s, d, v); spare != nil {
		next := placement.Substitute(placement.Of(t), d.Incarnation, spare.Incarnation)
		return startRecovery(s, dead[:1], fmt.Sprintf("%s takes the place of %s, which is dead", spare.Name, d.Name), next, v)
	}
	if v.provisions {
		if cmd, wait := launchFor(s, d, v); cmd != nil || wait {
			return cmd
		}
	}
	next, err := placement.Even(placement.Of(t), survivors(t, v), placement.Uses(t))
	if err == nil {
		return startRecovery(s, dead, fmt.Sprintf("the other nodes take over from %s, which is dead", nodeNames(dead)), next, v)
	}
	return condition(s, topology.ConditionRecovery, "recovery",
		fmt.Sprintf("%s is dead, and there is no node to take its place: add one (it is used as soon as it registers), or start %s again", d.Name, d.Name), "")
}

// dead reports whether a node has been unhealthy for longer than replace_after, and no freeze
// ended since, or was given up for lost. One that a new data directory of the same name takes
// the place of needs nothing.
func (v view) dead(t *topology.Topology, incarnation uint64) bool {
	if t.Lost(incarnation) {
		return successor(t, incarnation, v) == nil
	}
	after := t.Settings.ReplaceAfter
	return after > 0 && v.grace == 0 && v.unhealthy(incarnation) && v.down(incarnation) > after && successor(t, incarnation, v) == nil
}

// deadNodes returns the nodes with slots that are dead, longest first.
func deadNodes(t *topology.Topology, v view) (dead []*topology.Node) {
	for _, n := range t.Members() {
		if v.dead(t, n.Incarnation) {
			dead = append(dead, n)
		}
	}
	slices.SortStableFunc(dead, func(a, b *topology.Node) int { return -cmp.Compare(v.down(a.Incarnation), v.down(b.Incarnation)) })
	return dead
}

// deadSpare returns a dead node without slots that is to leave, or nil: one that the
// provisioner launched, or launched another one in the place of, or whose slots a recovery
// gave to others before it was aborted. What people started without slots, or drained, is
// theirs to remove.
func deadSpare(s *topology.State, v view) *topology.Node {
	t := s.Topology
	for i := range t.Nodes {
		n := &t.Nodes[i]
		launched := v.provisions && slices.ContainsFunc(s.Provisions, func(p topology.Provision) bool {
			return p.Kind == topology.Launch && (p.Incarnation == n.Incarnation || p.Replaces == n.Incarnation && p.State == topology.Provided)
		})
		bereft := slices.ContainsFunc(s.Operations, func(op topology.Operation) bool {
			return op.Kind == kindRecover && slices.Contains(op.Remove, n.Incarnation)
		})
		if (launched || bereft) && !t.Names(n.Incarnation) && v.dead(t, n.Incarnation) {
			return n
		}
	}
	return nil
}

// unblock aborts an operation that cannot end as things are, or need not: one that moves
// slots to a dead node, and a recovery from the death of a node that has come back.
func unblock(s *topology.State, v view) *topologyv1.Command {
	op := s.Active()
	if op == nil || op.State != topology.Running && op.State != topology.Paused {
		return nil
	}
	t := s.Topology
	why := ""
	if op.Kind == kindRecover && op.Left() > 0 && slices.ContainsFunc(op.Remove, v.healthy) {
		why = "the node that was taken for dead is back"
	}
	if i := slices.IndexFunc(op.Moves, func(m topology.Move) bool { return !m.Done && v.dead(t, m.To) }); i >= 0 {
		why = fmt.Sprintf("%s is dead, and slots were to move to it", t.NodeName(op.Moves[i].To))
	}
	if why == "" {
		return nil
	}
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "recovery", Name: fmt.Sprint(op.ID), What: fmt.Sprintf("operation %d is aborted: %s", op.ID, why)},
		Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: &topologyv1.SteerOperation{
			Id: op.ID, State: topologyv1.Operation_STATE_ABORTING,
		}}}},
	}
}

// spares returns the healthy data nodes without a slot, the newest of each name.
func spares(t *topology.Topology, v view) (out []*topology.Node) {
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role == topology.Data && v.healthy(n.Incarnation) && !t.Names(n.Incarnation) && t.Resolve(n.Name) == n {
			out = append(out, n)
		}
	}
	return out
}

// spareFor returns the spare that is best to take a dead node's place, or nil: the one
// launched for it, then one of its zone, then one that leaves the zones as good as they
// can be.
func spareFor(s *topology.State, d *topology.Node, v view) *topology.Node {
	rank := func(n *topology.Node) int {
		launched := slices.IndexFunc(s.Provisions, func(p topology.Provision) bool { return p.Kind == topology.Launch && p.Node == n.Name })
		switch {
		case launched >= 0 && s.Provisions[launched].Replaces == d.Incarnation:
			return 0
		case n.Zone == d.Zone:
			return 1
		}
		return 2
	}
	all := spares(s.Topology, v)
	if len(all) == 0 {
		return nil
	}
	best := slices.MinFunc(all, func(a, b *topology.Node) int { return cmp.Compare(rank(a), rank(b)) })
	if rank(best) == 2 && crowds(s.Topology, d, best, v) {
		return nil // the others can do better
	}
	return best
}

// crowds reports whether a node of another zone in a dead node's place would put two
// replicas into one zone that the surviving nodes could keep apart.
func crowds(t *topology.Topology, d, spare *topology.Node, v view) bool {
	zone := map[uint64]string{}
	for i := range t.Nodes {
		zone[t.Nodes[i].Incarnation] = t.Nodes[i].Zone
	}
	for _, slots := range placement.Substitute(placement.Of(t), d.Incarnation, spare.Incarnation) {
		if !slices.Contains(slots, spare.Incarnation) {
			continue
		}
		if slices.ContainsFunc(slots, func(n uint64) bool { return n != spare.Incarnation && zone[n] == spare.Zone }) {
			_, err := placement.Even(placement.Of(t), survivors(t, v), placement.Uses(t))
			return err == nil
		}
	}
	return false
}

// survivors returns the nodes that slots of dead ones can go to: the healthy members and
// spares.
func survivors(t *topology.Topology, v view) (out []placement.Node) {
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role == topology.Data && n.LostEpoch == 0 && t.Resolve(n.Name) == n && (v.healthy(n.Incarnation) || t.Names(n.Incarnation) && v.down(n.Incarnation) <= t.Settings.ReplaceAfter) {
			out = append(out, placement.Node{ID: n.Incarnation, Zone: n.Zone})
		}
	}
	return out
}

// startRecovery returns the command that begins the moves from one assignment to another,
// those of the vnodes with the fewest live replicas first. The dead nodes that have no
// slot then leave.
func startRecovery(s *topology.State, dead []*topology.Node, title string, next placement.Assignment, v view) *topologyv1.Command {
	t := s.Topology
	live := t.LiveReplicas(t.LargestN(), v.healthy)
	op := topology.Operation{Kind: kindRecover, Title: title, Moves: placement.Moves(placement.Of(t), next)}
	slices.SortStableFunc(op.Moves, func(a, b topology.Move) int { return cmp.Compare(live[a.Vnode], live[b.Vnode]) })
	for _, d := range dead {
		op.Remove = append(op.Remove, d.Incarnation)
	}
	why := fmt.Sprintf("has been unhealthy for %s, replace_after is %s", v.down(dead[0].Incarnation).Round(time.Second), t.Settings.ReplaceAfter)
	if dead[0].LostEpoch != 0 {
		why = "was given up for lost"
	}
	cmd := startOperation(s, op, "recovery", dead[0].Name, fmt.Sprintf("%s, #%d, %s: %s (%d moves)", dead[0].Name, dead[0].Incarnation, why, title, len(op.Moves)))
	if mutant.On("end-before-whole") {
		cmd.Mutations = append(cmd.Mutations, endRemoved(s, &op, op.Remove)...)
	}
	return cmd
}

func nodeNames(nodes []*topology.Node) string {
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	return strings.Join(names, ", ")
}

// startOperation returns the command that begins an operation of the leader's own.
func startOperation(s *topology.State, op topology.Operation, subject, name, what string) *topologyv1.Command {
	return &topologyv1.Command{
		ExpectEpoch: s.Topology.Epoch,
		Change:      &topologyv1.Change{Subject: subject, Name: name, What: what},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: op.Proto()}}}},
	}
}

// kindJoin is the kind of the operations that give slots to spares.
const kindJoin = "join"

// joinSpares gives slots to spares where nobody else is to, all at once that are there
// or are about to be.
func joinSpares(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	if !t.Settings.JoinsAuto() || s.Active() != nil || !v.knows(t) || frozen(t, v) != "" || len(deadNodes(t, v)) > 0 {
		return nil
	}
	if slices.ContainsFunc(s.Provisions, func(p topology.Provision) bool {
		return p.Kind == topology.Launch && !p.State.Ended() && p.Replaces == 0
	}) {
		return nil
	}
	nodes := members(t)
	var names []string
	for _, n := range spares(t, v) {
		if !s.HeldBack(n.Incarnation) {
			nodes = append(nodes, placement.Node{ID: n.Incarnation, Zone: n.Zone})
			names = append(names, n.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	held := holdings(nil)
	if t.Settings.Placement == topology.PlaceWeighted {
		if held = v.held(); held == nil && degraded(t, v) == "" {
			return nil // nodes are being asked; where one cannot answer, numbers do
		}
	}
	next, err := place(t, nodes, held)
	if err != nil {
		return nil // there were enough before
	}
	moves := placement.Moves(placement.Of(t), next)
	if len(moves) == 0 {
		return nil // there are more nodes than slots
	}
	title := strings.Join(names, ", ") + " join"
	if len(names) == 1 {
		title += "s"
	}
	return startOperation(s, topology.Operation{Kind: kindJoin, Title: title, Moves: moves}, "capacity", eventName(names), fmt.Sprintf("%s (%d moves)", title, len(moves)))
}
