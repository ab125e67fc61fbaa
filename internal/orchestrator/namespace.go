package orchestrator

import (
	"fmt"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// changeNamespace takes the namespace whose N, or W and R, the operation under way
// changes a step further, where it can go there. N changes by one at a time.
func changeNamespace(s *topology.State, v view) *topologyv1.Command {
	op := s.Active()
	if op == nil || !op.OfNamespace() {
		return nil
	}
	t := s.Topology
	ns := t.NamespaceByID(op.Namespace)
	if ns == nil || ns.AlsoN == 0 && (op.State != topology.Running || op.Reached(ns)) {
		return nil // it ends
	}
	if why := namespaceWait(t, ns, op, v); why != "" {
		return nil
	}
	next := op.Step(ns)
	cmd := &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "namespace", Name: ns.Name, What: fmt.Sprintf("operation %d: N=%d", op.ID, next.N)},
	}
	switch {
	case op.Kind == topology.KindQuorums:
		cmd.Change.What = fmt.Sprintf("operation %d: W=%s R=%s", op.ID, next.W, next.R)
		if next.AlsoN != 0 {
			cmd.Change.What += fmt.Sprintf(", and writes need W=%s too", next.AlsoW)
		}
	case next.AlsoN != 0:
		cmd.Change.What += fmt.Sprintf(", and writes need quorums of %d too", next.AlsoN)
	}
	if next.Wide() > len(t.Ring[0].Slots) {
		ring, err := widen(t, t.Members(), next.Wide())
		if err != nil {
			return nil // too few nodes are left: see namespaceWait
		}
		cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetRing{SetRing: ring}})
	}
	cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: next.Proto()}}})
	return cmd
}

// namespaceWait returns what has to happen before the next step, or "".
func namespaceWait(t *topology.Topology, ns *topology.Namespace, op *topology.Operation, v view) string {
	if replacing(t) {
		return "a node is being replaced"
	}
	if ns.AlsoN == 0 {
		if nodes := len(t.Members()); op.AimN() > nodes {
			return fmt.Sprintf("N=%d needs %d active data nodes, the ring has %d", op.AimN(), op.AimN(), nodes)
		}
		return ""
	}
	if why := namespaceBarrier(t, ns, op, v); why != "" || !awaitsFilling(ns, op) {
		return why
	}
	for _, p := range joining(t, ns, v) {
		if p.GetWaitsFor() != "" {
			return fmt.Sprintf("vnode %d at %s: %s", p.GetMove().GetVnode(), t.NodeName(p.GetMove().GetTo()), p.GetWaitsFor())
		}
	}
	return ""
}

// namespaceBarrier returns why not enough nodes have taken in the epoch of a namespace's
// last change for the next one, or "".
func namespaceBarrier(t *topology.Topology, ns *topology.Namespace, op *topology.Operation, v view) string {
	q := majority
	if op.Kind == topology.KindQuorums {
		if op.State == topology.Aborting && ns.ChangedEpoch == ns.Since {
			return "" // no read has gone by the other quorum yet
		}
		q = leaving(op)
	}
	if why := allTaken(t, ns.ChangedEpoch, v); why != "" {
		return why
	}
	for i := range t.Ring {
		if why := quorumsTaken(t, ns, uint32(i), ns.ChangedEpoch, q, v); why != "" {
			return why
		}
	}
	return ""
}

// leaving returns the smallest quorum that counts for anything where requests still go by
// the quorums that an operation gives up. It may be less than a majority: who reads one
// slot, as writes go to all, asks a node that is cut off and finds it whole.
func leaving(op *topology.Operation) func(n int) int {
	w, r := op.FromW, op.FromR
	if op.State == topology.Aborting {
		w, r = op.TargetW, op.TargetR
	}
	return func(n int) int {
		if quorum.StrengthOf(n, w.Need(n), r.Need(n)) == quorum.Eventual {
			return majority(n)
		}
		return min(w.Need(n), r.Need(n), majority(n))
	}
}

// awaitsFilling reports whether the next step is the one before which slots are filled,
// where any are. What is taken back was complete before.
func awaitsFilling(ns *topology.Namespace, op *topology.Operation) bool {
	if op.Kind == topology.KindQuorums {
		return op.State != topology.Aborting && ns.AlsoW == op.TargetW && ns.AlsoR == op.TargetR
	}
	forward := (ns.Change == topology.Widening) == (op.AimN() > min(ns.N, ns.AlsoN))
	return forward && ns.N != ns.TowardsN(op.AimN())
}

// joining returns the copies of a namespace that a change of it has filled. What waits
// for nothing is complete.
func joining(t *topology.Topology, ns *topology.Namespace, v view) (out []*adminv1.MoveProgress) {
	filled := map[uint64]map[uint32]*adminv1.Filling{}
	of := func(node uint64, vnode uint32) *adminv1.Filling {
		if filled[node] == nil {
			filled[node] = map[uint32]*adminv1.Filling{}
			for _, f := range v.status(node).GetFillings() {
				if f.GetNamespaceId() == ns.ID && f.GetAssignedEpoch() == ns.Since {
					filled[node][f.GetVnode()] = f
				}
			}
		}
		return filled[node][vnode]
	}
	for i := range t.Ring {
		for j, s := range t.Slots(uint32(i), ns.Wide()) {
			if filled, _ := ns.Filled(j); !filled {
				continue
			}
			for _, node := range s.Write {
				if node == 0 {
					continue
				}
				f := of(node, uint32(i))
				p := &adminv1.MoveProgress{
					Move:    &topologyv1.Move{Vnode: uint32(i), Slot: uint32(j), To: node, Done: f.GetComplete()},
					Phase:   topologyv1.Phase(topology.Stable),
					Records: f.GetRecords(), Bytes: f.GetBytes(),
				}
				if !f.GetComplete() {
					if p.WaitsFor = f.GetWaitsFor(); p.WaitsFor == "" {
						p.WaitsFor = "it is being filled"
					}
				}
				out = append(out, p)
			}
		}
	}
	return out
}

// maxObserved bounds how many copies are shown of a change of a namespace.
const maxObserved = 32

// observeNamespace returns what a change of a namespace waits for.
func observeNamespace(t *topology.Topology, op *topology.Operation, v view) (out []*adminv1.MoveProgress) {
	ns := t.NamespaceByID(op.Namespace)
	if ns == nil {
		return nil
	}
	if ns.AlsoN != 0 {
		for _, p := range joining(t, ns, v) {
			if p.GetWaitsFor() != "" && len(out) < maxObserved {
				out = append(out, p)
			}
		}
	}
	if why := namespaceWait(t, ns, op, v); why != "" && len(out) == 0 {
		out = append(out, &adminv1.MoveProgress{Move: &topologyv1.Move{}, WaitsFor: why})
	}
	return out
}
