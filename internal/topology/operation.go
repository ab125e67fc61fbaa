package topology

import (
	"fmt"
	"slices"

	"github.com/kvasirdb/kvasir/internal/quorum"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// OperationState is what an operation is doing.
type OperationState uint8

// The states of an operation. Their numbers are those of the wire format.
const (
	Running OperationState = iota + 1
	// Paused: moves that have begun go on, no other begins.
	Paused
	// Aborting: moves that have begun are taken back.
	Aborting
	Done
	Aborted
)

// String names a state.
func (s OperationState) String() string {
	switch s {
	case Running:
		return "running"
	case Paused:
		return "paused"
	case Aborting:
		return "aborting"
	case Done:
		return "done"
	case Aborted:
		return "aborted"
	}
	return fmt.Sprintf("operation-state(%d)", uint8(s))
}

// Ended reports whether nothing will change any more.
func (s OperationState) Ended() bool { return s == Done || s == Aborted }

// Move takes one slot of a vnode from a node to another one.
type Move struct {
	Vnode    uint32
	Slot     int
	From, To uint64
	Done     bool
}

// Operation is a change of the ring that takes many steps. What has come of its moves
// is in the ring, so any leader can go on with it.
type Operation struct {
	ID uint64
	// Kind is apply, drain, decommission, replace, replicas or quorums, or what the leader
	// begins by itself: recover, join, shrink or rebalance. Title is what it is for, in words.
	Kind, Title string
	State       OperationState
	// Moves are begun in this order.
	Moves []Move
	// Remove are the nodes that leave the cluster when all moves are done.
	Remove []uint64
	// StartedMillis and EndedMillis are milliseconds since 1970, EndedMillis 0 before
	// the end.
	StartedMillis, EndedMillis int64
	// Of kind replicas: whose N is to become TargetN, and was FromN.
	Namespace      uint32
	TargetN, FromN int
	// Of kind quorums: what the default quorums of Namespace are to become, and were.
	TargetW, TargetR, FromW, FromR quorum.Spec
	// MovedRecords and MovedBytes were taken in by newcomers for the moves that are done.
	MovedRecords, MovedBytes uint64
}

// maxEnded is how many operations are kept that have ended.
const maxEnded = 50

// The kinds of operations that change a namespace: its N, or its default quorums.
const (
	KindReplicas = "replicas"
	KindQuorums  = "quorums"
)

// OfNamespace reports whether an operation changes a namespace, and no slots of nodes.
func (o *Operation) OfNamespace() bool { return o.Kind == KindReplicas || o.Kind == KindQuorums }

// AimN is the N that an operation of kind replicas goes to now.
func (o *Operation) AimN() int {
	if o.State == Aborting {
		return o.FromN
	}
	return o.TargetN
}

// AimQuorums are the default quorums that an operation of kind quorums goes to now.
func (o *Operation) AimQuorums() (w, r quorum.Spec) {
	if o.State == Aborting {
		return o.FromW, o.FromR
	}
	return o.TargetW, o.TargetR
}

// Reached reports whether a namespace is what its operation goes to now.
func (o *Operation) Reached(ns *Namespace) bool {
	if o.Kind == KindReplicas {
		return ns.AlsoN == 0 && ns.N == o.AimN()
	}
	w, r := o.AimQuorums()
	return ns.AlsoN == 0 && ns.W == w && ns.R == r
}

// Step returns what a namespace becomes by the next step of its operation.
// REQUIRES: it is not Reached.
func (o *Operation) Step(ns *Namespace) Namespace {
	if o.Kind == KindReplicas {
		return ns.StepN(o.AimN())
	}
	return ns.StepQuorums(o.AimQuorums())
}

// mayEnd reports whether a namespace is what an operation is for, or is gone.
func (t *Topology) mayEnd(op *Operation) bool {
	i := slices.IndexFunc(t.Namespaces, func(ns Namespace) bool { return ns.ID == op.Namespace })
	return i < 0 || op.Reached(&t.Namespaces[i])
}

// kindDrain is the kind of the operations that take all slots from a node that stays.
const kindDrain = "drain"

// HeldBack reports whether people drained a node: it is given slots, or copies, only when
// they ask.
func (s *State) HeldBack(incarnation uint64) bool { return slices.Contains(s.heldBack, incarnation) }

// DrainedNodes returns the nodes that are HeldBack.
func (s *State) DrainedNodes() []uint64 { return slices.Clone(s.heldBack) }

// holdBack notes that people drained a reporting node, or that a node may be given
// something again.
func (d *draft) holdBack(m *topologyv1.HoldBack) error {
	n := d.Topology.Node(m.GetIncarnation())
	switch {
	case n == nil:
		return refuse(NotFound, "NODE_NOT_FOUND", fmt.Sprintf("there is no node #%d", m.GetIncarnation()), "incarnation", m.GetIncarnation())
	case m.GetHeld() == d.HeldBack(n.Incarnation):
		return nil
	case !m.GetHeld():
		d.heldBack = slices.DeleteFunc(d.heldBack, func(inc uint64) bool { return inc == n.Incarnation })
	case n.Role != Reporting:
		return refuse(Invalid, "NODE_HAS_SLOTS", fmt.Sprintf("node %s, #%d, is no reporting node: an operation of kind drain takes its slots from it", n.Name, n.Incarnation), "incarnation", n.Incarnation)
	default:
		d.heldBack = append(d.heldBack, n.Incarnation)
	}
	d.noted = true
	return nil
}

// holdDrained notes the nodes that an operation drained.
func (d *draft) holdDrained(op *Operation) {
	d.heldBack = slices.DeleteFunc(d.heldBack, func(inc uint64) bool {
		n := d.Topology.Node(inc)
		return n == nil || n.Role == Data && d.Topology.Names(inc)
	})
	if op.Kind != kindDrain || op.State != Done {
		return
	}
	for _, m := range op.Moves {
		if !d.Topology.Names(m.From) && !slices.Contains(d.heldBack, m.From) {
			d.heldBack = append(d.heldBack, m.From)
		}
	}
}

// Left returns how many moves are not done.
func (o *Operation) Left() int {
	n := 0
	for _, m := range o.Moves {
		if !m.Done {
			n++
		}
	}
	return n
}

// Operation returns the operation of an identifier, or nil.
func (s *State) Operation(id uint64) *Operation {
	for i := range s.Operations {
		if s.Operations[i].ID == id {
			return &s.Operations[i]
		}
	}
	return nil
}

// Active returns the operation that has not ended, or nil. There is one at most.
func (s *State) Active() *Operation {
	i := slices.IndexFunc(s.Operations, func(o Operation) bool { return !o.State.Ended() })
	if i < 0 {
		return nil
	}
	return &s.Operations[i]
}

// startOperation checks and adds an operation.
func (d *draft) startOperation(pb *topologyv1.StartOperation, atMillis int64) error {
	if a := d.Active(); a != nil {
		return refuse(Conflict, "OPERATION_RUNNING", fmt.Sprintf("operation %d (%s) is %s: wait for its end, or abort it", a.ID, a.Title, a.State), "operation", a.ID)
	}
	op, err := operationFromProto(pb.GetOperation())
	if err != nil {
		return refuse(Invalid, "BAD_OPERATION", err.Error())
	}
	op.ID, op.State, op.StartedMillis, op.EndedMillis, op.MovedRecords, op.MovedBytes = d.nextOperation+1, Running, atMillis, 0, 0, 0
	for i := range op.Moves {
		op.Moves[i].Done = false
	}
	if op.OfNamespace() {
		ns := d.Topology.NamespaceByID(op.Namespace)
		if ns == nil || op.Reached(ns) || len(op.Moves) > 0 || len(op.Remove) > 0 || op.Kind == KindQuorums && (op.TargetW.IsZero() || op.TargetR.IsZero()) {
			return refuse(Invalid, "NOTHING_TO_DO", "the operation changes no namespace's N, W or R")
		}
		for _, q := range []quorum.Spec{op.TargetW, op.TargetR} {
			if err := q.Check(ns.N); err != nil {
				return refuse(Invalid, "QUORUM_ABOVE_N", err.Error(), "n", ns.N)
			}
		}
		op.FromN, op.FromW, op.FromR = ns.N, ns.W, ns.R
	} else if len(op.Moves) == 0 && len(op.Remove) == 0 {
		return refuse(Invalid, "NOTHING_TO_DO", "the operation has no moves and removes no node")
	}
	after, err := d.Topology.checkMoves(op.Moves)
	if err != nil {
		return err
	}
	for _, inc := range op.Remove {
		n := d.Topology.Node(inc)
		if n == nil {
			return refuse(NotFound, "NODE_NOT_FOUND", fmt.Sprintf("there is no node #%d", inc), "incarnation", inc)
		}
		if v := slices.IndexFunc(after, func(slots []uint64) bool { return slices.Contains(slots, inc) }); v >= 0 {
			return refuse(Invalid, "NODE_HAS_SLOTS", fmt.Sprintf("node %s, #%d, would still have a slot of vnode %d", n.Name, inc, v), "incarnation", inc)
		}
	}
	d.nextOperation = op.ID
	d.Operations = append(d.Operations, op)
	d.result.Operation = &d.Operations[len(d.Operations)-1]
	d.noted = true
	return nil
}

// checkMoves returns the nodes of all slots after some moves, or why these cannot be
// made, each after those before it.
func (t *Topology) checkMoves(moves []Move) (after [][]uint64, _ error) {
	for i := range t.Ring {
		var nodes []uint64
		for _, s := range t.Ring[i].Slots {
			if s.Phase == Stable {
				nodes = append(nodes, s.Node)
			} else {
				nodes = append(nodes, s.Incoming)
			}
		}
		after = append(after, nodes)
	}
	for _, m := range moves {
		bad := func(format string, args ...any) error {
			return refuse(Invalid, "BAD_MOVE", fmt.Sprintf("vnode %d slot %d: ", m.Vnode, m.Slot)+fmt.Sprintf(format, args...), "vnode", m.Vnode)
		}
		if int(m.Vnode) >= len(after) || m.Slot < 0 || m.Slot >= len(after[m.Vnode]) {
			return nil, bad("there is no such slot")
		}
		nodes := after[m.Vnode]
		switch to := t.Node(m.To); {
		case nodes[m.Slot] != m.From:
			return nil, bad("it is at %s, not %s", t.NodeName(nodes[m.Slot]), t.NodeName(m.From))
		case to == nil || to.Role != Data:
			return nil, bad("%s is no data node", t.NodeName(m.To))
		case t.Resolve(to.Name).Incarnation != m.To: // its slots are about to be another's
			return nil, bad("#%d has taken the place of %s, #%d", t.Resolve(to.Name).Incarnation, to.Name, to.Incarnation)
		}
		for j, n := range nodes { // or is about to take the place of a directory that has
			if n == m.To || j != m.Slot && t.NodeName(n) == t.NodeName(m.To) {
				return nil, bad("%s has a slot of the vnode already", t.NodeName(m.To))
			}
		}
		nodes[m.Slot] = m.To
	}
	return after, nil
}

// steerOperation changes the state of an operation.
func (d *draft) steerOperation(pb *topologyv1.SteerOperation, atMillis int64) error {
	op := d.Operation(pb.GetId())
	if op == nil {
		return refuse(NotFound, "OPERATION_NOT_FOUND", fmt.Sprintf("there is no operation %d", pb.GetId()), "operation", pb.GetId())
	}
	next := OperationState(pb.GetState())
	d.result.Operation = op
	if op.State == next {
		return nil
	}
	if next == Done && op.OfNamespace() && !d.Topology.mayEnd(op) || !d.mayBecome(op, next) {
		return refuse(Precondition, "OPERATION_STATE", fmt.Sprintf("operation %d is %s and cannot become %s", op.ID, op.State, next), "operation", op.ID, "state", op.State)
	}
	op.State = next
	d.noted = true
	if next.Ended() {
		op.EndedMillis = atMillis
		d.holdDrained(op)
		d.forgetEnded()
	}
	return nil
}

func (d *draft) mayBecome(op *Operation, next OperationState) bool {
	switch next {
	case Running:
		return op.State == Paused
	case Paused:
		return op.State == Running
	case Aborting:
		return op.State == Running || op.State == Paused
	case Done:
		return op.State == Running && op.Left() == 0
	case Aborted:
		return op.State == Aborting
	}
	return false
}

// forgetEnded forgets the oldest operations that have ended where there are too many.
func (d *draft) forgetEnded() {
	ended := 0
	for _, o := range d.Operations {
		if o.State.Ended() {
			ended++
		}
	}
	keep := d.result.Operation.ID
	d.Operations = slices.DeleteFunc(d.Operations, func(o Operation) bool {
		if ended <= maxEnded || !o.State.Ended() {
			return false
		}
		ended--
		return true
	})
	d.result.Operation = d.Operation(keep)
}

// noteStep notes what a step of a vnode means for the moves of the active operation.
func (d *draft) noteStep(vnode uint32, old, next *Vnode, pb *topologyv1.VnodeSlots) {
	op := d.Active()
	if op == nil {
		return
	}
	for j := range next.Slots {
		a, b := old.Slots[j], next.Slots[j]
		if a == b {
			continue
		}
		for k := range op.Moves {
			m := &op.Moves[k]
			if m.Vnode != vnode || m.Slot != j || m.Done {
				continue
			}
			if b.Phase != Stable {
				if d.sameName(m.To, b.Incoming) {
					m.To = b.Incoming // itself, or the data directory that took its place
				}
			} else if b.Node == m.To && m.To != m.From {
				m.Done = true
				op.MovedRecords += pb.GetMovedRecords()
				op.MovedBytes += pb.GetMovedBytes()
			}
			break
		}
	}
}

// sameName reports whether two data directories are of nodes of one name.
func (d *draft) sameName(a, b uint64) bool {
	name := func(inc uint64) string {
		i := slices.IndexFunc(d.Topology.Nodes, func(n Node) bool { return n.Incarnation == inc })
		if i < 0 {
			return ""
		}
		return d.Topology.Nodes[i].Name
	}
	return name(a) == name(b)
}

// needs returns the active operation that has a move to a node left, or 0.
func (d *draft) needs(incarnation uint64) uint64 {
	if op := d.Active(); op != nil && op.State != Aborting &&
		slices.ContainsFunc(op.Moves, func(m Move) bool { return !m.Done && m.To == incarnation }) {
		return op.ID
	}
	return 0
}

// Proto converts an operation to its wire form.
func (o *Operation) Proto() *topologyv1.Operation {
	pb := &topologyv1.Operation{
		Id: o.ID, Kind: o.Kind, Title: o.Title, State: topologyv1.Operation_State(o.State), Remove: o.Remove,
		StartedMs: uint64(o.StartedMillis), EndedMs: uint64(o.EndedMillis), MovedRecords: o.MovedRecords, MovedBytes: o.MovedBytes,
		NamespaceId: o.Namespace, TargetN: uint32(o.TargetN), FromN: uint32(o.FromN),
		TargetWriteQuorum: o.TargetW.String(), TargetReadQuorum: o.TargetR.String(), FromWriteQuorum: o.FromW.String(), FromReadQuorum: o.FromR.String(),
	}
	for _, m := range o.Moves {
		pb.Moves = append(pb.Moves, m.Proto())
	}
	return pb
}

// Proto converts a move to its wire form.
func (m Move) Proto() *topologyv1.Move {
	return &topologyv1.Move{Vnode: m.Vnode, Slot: uint32(m.Slot), From: m.From, To: m.To, Done: m.Done}
}

func operationFromProto(pb *topologyv1.Operation) (Operation, error) {
	o := Operation{
		ID: pb.GetId(), Kind: pb.GetKind(), Title: pb.GetTitle(), State: OperationState(pb.GetState()), Remove: slices.Clone(pb.GetRemove()),
		StartedMillis: int64(pb.GetStartedMs()), EndedMillis: int64(pb.GetEndedMs()), MovedRecords: pb.GetMovedRecords(), MovedBytes: pb.GetMovedBytes(),
		Namespace: pb.GetNamespaceId(), TargetN: int(pb.GetTargetN()), FromN: int(pb.GetFromN()),
	}
	for _, m := range pb.GetMoves() {
		o.Moves = append(o.Moves, Move{Vnode: m.GetVnode(), Slot: int(m.GetSlot()), From: m.GetFrom(), To: m.GetTo(), Done: m.GetDone()})
	}
	for i, text := range []string{pb.GetTargetWriteQuorum(), pb.GetTargetReadQuorum(), pb.GetFromWriteQuorum(), pb.GetFromReadQuorum()} {
		spec, err := quorum.Parse(text)
		if err != nil {
			return o, fmt.Errorf("operation %d: %w", o.ID, err)
		}
		*[]*quorum.Spec{&o.TargetW, &o.TargetR, &o.FromW, &o.FromR}[i] = spec
	}
	return o, nil
}
