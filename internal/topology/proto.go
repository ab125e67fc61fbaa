package topology

import (
	"fmt"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// FromProto checks and converts a topology. It shares no memory with pb.
func FromProto(pb *topologyv1.Topology) (*Topology, error) {
	t := &Topology{
		ClusterID:     pb.GetClusterId(),
		Epoch:         pb.GetEpoch(),
		Vnodes:        pb.GetVnodes(),
		FoundingNodes: int(pb.GetFoundingNodes()),
		Settings:      settingsFromProto(pb.GetSettings()),
		Recovery:      pb.GetRecovery(),
	}
	for _, n := range pb.GetNodes() {
		t.Nodes = append(t.Nodes, nodeFromProto(n))
	}
	for _, v := range pb.GetRing() {
		t.Ring = append(t.Ring, vnodeFromProto(v))
	}
	for _, n := range pb.GetNamespaces() {
		ns, err := NamespaceFromProto(n)
		if err != nil {
			return nil, fmt.Errorf("topology: %w", err)
		}
		t.Namespaces = append(t.Namespaces, ns)
	}
	for _, o := range pb.GetOrchestrators() {
		t.Orchestrators = append(t.Orchestrators, orchestratorFromProto(o))
	}
	for i := range t.Ring {
		if err := t.Ring[i].checkPhases(i); err != nil {
			return nil, fmt.Errorf("topology: %w", err)
		}
	}
	t.index()
	if err := t.validate(); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	return t, nil
}

// Proto converts a topology to its wire form.
func (t *Topology) Proto() *topologyv1.Topology {
	pb := t.restProto()
	pb.Ring = RingProto(t.Ring)
	return pb
}

// restProto converts everything but the vnodes.
func (t *Topology) restProto() *topologyv1.Topology {
	pb := &topologyv1.Topology{
		ClusterId:     t.ClusterID,
		Epoch:         t.Epoch,
		Vnodes:        t.Vnodes,
		FoundingNodes: uint32(t.FoundingNodes),
		Settings:      t.Settings.Proto(),
		Recovery:      t.Recovery,
	}
	for i := range t.Nodes {
		pb.Nodes = append(pb.Nodes, t.Nodes[i].Proto())
	}
	for i := range t.Namespaces {
		pb.Namespaces = append(pb.Namespaces, t.Namespaces[i].Proto())
	}
	for _, o := range t.Orchestrators {
		pb.Orchestrators = append(pb.Orchestrators, o.Proto())
	}
	return pb
}

func nodeFromProto(n *topologyv1.Node) Node {
	return Node{
		Incarnation:   n.GetIncarnation(),
		Name:          n.GetName(),
		Zone:          n.GetZone(),
		Role:          Role(n.GetRole()),
		Address:       n.GetAddress(),
		AdminAddress:  n.GetAdminAddress(),
		GossipAddress: n.GetGossipAddress(),
		DataID:        n.GetDataId(),
		LostEpoch:     n.GetLostEpoch(),
	}
}

// Proto converts a node to its wire form.
func (n *Node) Proto() *topologyv1.Node {
	return &topologyv1.Node{
		Incarnation:   n.Incarnation,
		Name:          n.Name,
		Zone:          n.Zone,
		Role:          topologyv1.Role(n.Role),
		Address:       n.Address,
		AdminAddress:  n.AdminAddress,
		GossipAddress: n.GossipAddress,
		DataId:        n.DataID,
		LostEpoch:     n.LostEpoch,
	}
}

func vnodeFromProto(v *topologyv1.Vnode) Vnode {
	out := Vnode{ChangedEpoch: v.GetChangedEpoch()}
	if n := len(v.GetSlots()); n > 0 {
		out.Slots = make([]Slot, 0, n)
	}
	for _, c := range v.GetCopies() {
		out.Copies = append(out.Copies, copyFromProto(c))
	}
	for _, s := range v.GetSlots() {
		out.Slots = append(out.Slots, Slot{Node: s.GetNode(), Incoming: s.GetIncoming(), Phase: Phase(s.GetPhase()), Since: s.GetSince()})
	}
	return out
}

// RingProto converts a ring to its wire form.
func RingProto(ring []Vnode) []*topologyv1.Vnode {
	out := make([]*topologyv1.Vnode, 0, len(ring))
	for i := range ring {
		out = append(out, ring[i].proto())
	}
	return out
}

func (v *Vnode) proto() *topologyv1.Vnode {
	pb := &topologyv1.Vnode{ChangedEpoch: v.ChangedEpoch}
	for _, s := range v.Slots {
		pb.Slots = append(pb.Slots, &topologyv1.Slot{Node: s.Node, Incoming: s.Incoming, Phase: topologyv1.Phase(s.Phase), Since: s.Since})
	}
	for _, c := range v.Copies {
		pb.Copies = append(pb.Copies, c.Proto())
	}
	return pb
}

// checkPhases returns an error unless what index needs to know of the vnode is right.
func (v *Vnode) checkPhases(at int) error {
	for j, s := range v.Slots {
		if s.Phase < Stable || s.Phase > WriteNewReadNone {
			return fmt.Errorf("vnode %d slot %d: unknown %s", at, j, s.Phase)
		}
	}
	return nil
}

// NamespaceFromProto converts a namespace. It returns an error for quorums that
// do not parse; other rules are checked with the topology it becomes part of.
func NamespaceFromProto(pb *topologyv1.Namespace) (Namespace, error) {
	var specs [4]quorum.Spec
	for i, text := range []string{pb.GetWriteQuorum(), pb.GetReadQuorum(), pb.GetAlsoWriteQuorum(), pb.GetAlsoReadQuorum()} {
		var err error
		if specs[i], err = quorum.Parse(text); err != nil {
			return Namespace{}, fmt.Errorf("namespace %s: %s: %w", pb.GetName(), []string{"write", "read"}[i%2], err)
		}
	}
	return Namespace{
		ID:             pb.GetId(),
		Name:           pb.GetName(),
		N:              int(pb.GetN()),
		W:              specs[0],
		R:              specs[1],
		ReadRepair:     ReadRepair(pb.GetReadRepair()),
		RepairChance:   pb.GetRepairChance(),
		Hints:          pb.GetHints(),
		TTL:            time.Duration(pb.GetTtlMs()) * time.Millisecond,
		LeastWriteAcks: int(pb.GetLeastWriteAcks()),
		ChangedEpoch:   pb.GetChangedEpoch(),
		AlsoN:          int(pb.GetAlsoN()),
		Change:         NChange(pb.GetChange()),
		Since:          pb.GetSince(),
		AlsoW:          specs[2],
		AlsoR:          specs[3],
		Reporting:      reportingFromProto(pb.GetReporting()),
	}, nil
}

// Proto converts a namespace to its wire form.
func (ns *Namespace) Proto() *topologyv1.Namespace {
	return &topologyv1.Namespace{
		Id:             ns.ID,
		Name:           ns.Name,
		N:              uint32(ns.N),
		WriteQuorum:    ns.W.String(),
		ReadQuorum:     ns.R.String(),
		ReadRepair:     topologyv1.ReadRepairMode(ns.ReadRepair),
		RepairChance:   ns.RepairChance,
		Hints:          ns.Hints,
		TtlMs:          uint64(ns.TTL / time.Millisecond),
		LeastWriteAcks: uint32(ns.LeastWriteAcks),
		ChangedEpoch:   ns.ChangedEpoch,
		AlsoN:          uint32(ns.AlsoN),
		Change:         topologyv1.NChange(ns.Change),
		Since:          ns.Since,

		AlsoWriteQuorum: ns.AlsoW.String(),
		AlsoReadQuorum:  ns.AlsoR.String(),
		Reporting:       ns.Reporting.proto(),
	}
}

func orchestratorFromProto(pb *topologyv1.Orchestrator) Orchestrator {
	return Orchestrator{
		Name:          pb.GetName(),
		Address:       pb.GetAddress(),
		AdminAddress:  pb.GetAdminAddress(),
		GossipAddress: pb.GetGossipAddress(),
	}
}

// Proto converts an orchestrator to its wire form.
func (o Orchestrator) Proto() *topologyv1.Orchestrator {
	return &topologyv1.Orchestrator{
		Name:          o.Name,
		Address:       o.Address,
		AdminAddress:  o.AdminAddress,
		GossipAddress: o.GossipAddress,
	}
}
