package orchestrator

import (
	"fmt"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// changeReplicas takes the namespace whose N the operation under way changes a step
// further, where it can go there. N changes by one at a time.
func changeReplicas(s *topology.State, v view) *topologyv1.Command {
	op := s.Active()
	if op == nil || op.Kind != topology.KindReplicas {
		return nil
	}
	t := s.Topology
	ns := t.NamespaceByID(op.Namespace)
	if ns == nil || ns.AlsoN == 0 && (op.State != topology.Running || ns.N == op.TargetN) {
		return nil // it ends
	}
	if why := replicasWait(t, ns, op, v); why != "" {
		return nil
	}
	next := ns.StepN(aim(op))
	cmd := &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "namespace", Name: ns.Name, What: fmt.Sprintf("operation %d: N=%d", op.ID, next.N)},
	}
	if next.AlsoN != 0 {
		cmd.Change.What += fmt.Sprintf(", and writes need quorums of %d too", next.AlsoN)
	}
	if next.Wide() > len(t.Ring[0].Slots) {
		ring, err := widen(t, t.Members(), next.Wide())
		if err != nil {
			return nil // too few nodes are left: see replicasWait
		}
		cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetRing{SetRing: ring}})
	}
	cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: next.Proto()}}})
	return cmd
}

// aim is the N that an operation goes to now.
func aim(op *topology.Operation) int {
	if op.State == topology.Aborting {
		return op.FromN
	}
	return op.TargetN
}

// replicasWait returns what has to happen before the next step, or "".
func replicasWait(t *topology.Topology, ns *topology.Namespace, op *topology.Operation, v view) string {
	if replacing(t) {
		return "a node is being replaced"
	}
	if ns.AlsoN == 0 {
		if nodes := len(t.Members()); aim(op) > nodes {
			return fmt.Sprintf("N=%d needs %d active data nodes, the ring has %d", aim(op), aim(op), nodes)
		}
		return ""
	}
	if why := allTaken(t, ns.ChangedEpoch, v); why != "" {
		return why
	}
	for i := range t.Ring {
		if why := quorumsTaken(t, ns, uint32(i), ns.ChangedEpoch, v); why != "" {
			return why
		}
	}
	// What is taken back was complete before.
	forward := (ns.Change == topology.Widening) == (aim(op) > min(ns.N, ns.AlsoN))
	if towards := ns.TowardsN(aim(op)); ns.N == towards || !forward {
		return ""
	}
	for _, p := range joining(t, ns, v) {
		if p.GetWaitsFor() != "" {
			return fmt.Sprintf("vnode %d at %s: %s", p.GetMove().GetVnode(), t.NodeName(p.GetMove().GetTo()), p.GetWaitsFor())
		}
	}
	return ""
}

// joining returns the copies of a namespace that a change of its N has filled: those of
// the slot that it did not use before, or those of all slots that it keeps. What waits
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
			if (j == ns.Wide()-1) != (ns.Change == topology.Widening) {
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

// maxObserved bounds how many copies are shown of a change of N.
const maxObserved = 32

// observeReplicas returns what a change of N waits for.
func observeReplicas(t *topology.Topology, op *topology.Operation, v view) (out []*adminv1.MoveProgress) {
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
	if why := replicasWait(t, ns, op, v); why != "" && len(out) == 0 {
		out = append(out, &adminv1.MoveProgress{Move: &topologyv1.Move{}, WaitsFor: why})
	}
	return out
}
