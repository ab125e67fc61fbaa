package orchestrator

import (
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// decide returns the next command that brings the agreed state closer to what it
// should be, or nil. It is a function of its arguments; newID is drawn by the
// caller and used only to found the cluster.
func decide(s *topology.State, cfg *Config, v view, newID string) (*topologyv1.Command, error) {
	switch {
	case s == nil && cfg.Recovery != nil:
		return &topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Recover{Recover: &topologyv1.Recover{State: cfg.Recovery.Proto()}}}}}, nil
	case s == nil:
		return found(cfg, newID)
	case !slices.Equal(s.Topology.Orchestrators, orchestrators(cfg)):
		return setOrchestrators(s.Topology, cfg), nil
	case !s.Topology.Formed():
		if nodes := founders(s.Topology, v.healthy); len(nodes) >= s.Topology.FoundingNodes {
			return formRing(s.Topology, nodes)
		}
		return nil, nil
	}
	v.grace = grace(s, v)
	for _, loop := range []func(*topology.State, view) *topologyv1.Command{
		noteHealth, noteConditions, noteProvisions, correctSettings, changeCopies, unblock, changeRing, recoverNodes, joinSpares, rebalance,
	} {
		if cmd := loop(s, v); cmd != nil {
			return cmd, nil
		}
	}
	return nil, nil
}

func found(cfg *Config, id string) (*topologyv1.Command, error) {
	settings, err := cfg.Bootstrap.settings()
	if err != nil {
		return nil, err
	}
	return &topologyv1.Command{
		Change: &topologyv1.Change{Subject: "cluster", Name: id, What: fmt.Sprintf("founded with %d vnodes, ring forms with %d nodes", cfg.Bootstrap.Vnodes, cfg.Bootstrap.FoundingNodes)},
		Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Found{Found: &topologyv1.Found{
			ClusterId: id, Vnodes: uint32(cfg.Bootstrap.Vnodes), FoundingNodes: uint32(cfg.Bootstrap.FoundingNodes),
			Settings: settings.Proto(),
		}}}},
	}, nil
}

// orchestrators returns the configured orchestrators as the topology lists them.
func orchestrators(cfg *Config) []topology.Orchestrator {
	var out []topology.Orchestrator
	for _, p := range cfg.Peers {
		out = append(out, topology.Orchestrator{Name: p.Name, Address: p.Address, AdminAddress: p.AdminAddress, GossipAddress: p.GossipAddress})
	}
	return out
}

func setOrchestrators(t *topology.Topology, cfg *Config) *topologyv1.Command {
	m := &topologyv1.SetOrchestrators{}
	for _, o := range orchestrators(cfg) {
		m.Orchestrators = append(m.Orchestrators, o.Proto())
	}
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "cluster", Name: t.ClusterID, What: fmt.Sprintf("%d orchestrators", len(m.Orchestrators))},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetOrchestrators{SetOrchestrators: m}}},
	}
}

// founders returns the data nodes that a ring can be formed of: those that live. A
// node that was wiped and registered again is there twice, and one of them is dead.
func founders(t *topology.Topology, healthy func(incarnation uint64) bool) []*topology.Node {
	var out []*topology.Node
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role == topology.Data && healthy(n.Incarnation) && t.Resolve(n.Name) == n {
			out = append(out, n)
		}
	}
	return out
}

// formRing places the founding nodes and makes the namespace default.
func formRing(t *topology.Topology, nodes []*topology.Node) (*topologyv1.Command, error) {
	n := min(3, t.FoundingNodes, len(nodes))
	ring, err := widen(t, nodes, n)
	if err != nil {
		return nil, err
	}
	ns := topology.FoundingNamespace(n)
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "ring", What: fmt.Sprintf("formed: %d vnodes on %d nodes, namespace default with N=%d", t.Vnodes, len(nodes), n)},
		Mutations: []*topologyv1.Mutation{
			{Kind: &topologyv1.Mutation_SetRing{SetRing: ring}},
			{Kind: &topologyv1.Mutation_CreateNamespace{CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()}}},
		},
	}, nil
}

// widen returns a ring whose vnodes have at least width slots on the given nodes.
// New slots are stable at once: no namespace has used them, so they miss no record.
func widen(t *topology.Topology, nodes []*topology.Node, width int) (*topologyv1.SetRing, error) {
	var current placement.Assignment
	for i := range t.Ring {
		var slots []uint64
		for _, s := range t.Ring[i].Slots {
			slots = append(slots, s.Node)
		}
		current = append(current, slots)
	}
	places := make([]placement.Node, len(nodes))
	for i, n := range nodes {
		places[i] = placement.Node{ID: n.Incarnation, Zone: n.Zone}
	}
	wide, err := placement.Widen(current, int(t.Vnodes), places, width)
	if err != nil {
		return nil, err
	}
	ring := make([]topology.Vnode, t.Vnodes)
	for v := range ring {
		have := 0
		if v < len(t.Ring) {
			ring[v].Slots = slices.Clone(t.Ring[v].Slots)
			have = len(ring[v].Slots)
		}
		for _, n := range wide[v][have:] {
			ring[v].Slots = append(ring[v].Slots, topology.Slot{Node: n, Phase: topology.Stable})
		}
	}
	return &topologyv1.SetRing{Ring: topology.RingProto(ring)}, nil
}

// createNamespace decides how a namespace is made, with wider vnodes where its N
// asks for them.
func createNamespace(s *topology.State, name string, set topology.NamespaceSettings) (*topologyv1.Command, []string, error) {
	t := s.Topology
	ns, warnings, err := t.NewNamespace(name, set)
	if err != nil {
		return nil, nil, err
	}
	cmd := &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "namespace", Name: name, What: "created: " + ns.Describe()},
	}
	if len(t.Ring[0].Slots) < ns.N {
		if changing(s) {
			return nil, nil, rpc.Errorf(codes.FailedPrecondition, "RING_CHANGING", "N=%d needs more slots than the vnodes have, and the ring is changing: wait until that is done (kvctl operation ls), then try again", ns.N)
		}
		ring, err := widen(t, t.Members(), ns.N)
		if err != nil {
			return nil, nil, err
		}
		cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetRing{SetRing: ring}})
	}
	cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_CreateNamespace{
		CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()},
	}})
	return cmd, warnings, nil
}

// updateNamespace decides what a namespace becomes. Another N is an operation's work, and
// so are other quorums.
func updateNamespace(t *topology.Topology, name string, set topology.NamespaceSettings, allowEventual bool) (*topologyv1.Command, []string, error) {
	ns, wanted, warnings, err := t.ChangedNamespace(name, set, allowEventual)
	if err != nil {
		return nil, nil, err
	}
	cmd := &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "namespace", Name: name, What: "set: " + ns.Describe()},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}}},
	}
	op := &topologyv1.Operation{NamespaceId: ns.ID}
	switch {
	case wanted.N != ns.N:
		cmd.Change.What += fmt.Sprintf(", N to become %d", wanted.N)
		op.Kind, op.TargetN = topology.KindReplicas, uint32(wanted.N)
		op.Title = fmt.Sprintf("N of namespace %s from %d to %d", name, ns.N, wanted.N)
	case wanted.W != ns.W || wanted.R != ns.R:
		cmd.Change.What += fmt.Sprintf(", W and R to become %s and %s", wanted.W, wanted.R)
		op.Kind, op.TargetWriteQuorum, op.TargetReadQuorum = topology.KindQuorums, wanted.W.String(), wanted.R.String()
		op.Title = fmt.Sprintf("W and R of namespace %s from %s and %s to %s and %s", name, ns.W, ns.R, wanted.W, wanted.R)
	default:
		return cmd, warnings, nil
	}
	cmd.Mutations = append(cmd.Mutations, &topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: op}}})
	return cmd, warnings, nil
}

// dropNamespace decides how a namespace goes.
func dropNamespace(t *topology.Topology, name string) (*topologyv1.Command, error) {
	ns, err := t.DroppableNamespace(name)
	if err != nil {
		return nil, err
	}
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "namespace", Name: name, What: "dropped"},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_DropNamespace{DropNamespace: &topologyv1.DropNamespace{Id: ns.ID}}}},
	}, nil
}

// trim takes out the slots that no namespace uses any more, so that fewer nodes do.
func trim(s *topology.State, _ view) *topologyv1.Command {
	t := s.Topology
	width := t.Width()
	if len(t.Ring[0].Slots) <= width || changing(s) {
		return nil
	}
	ring := slices.Clone(t.Ring)
	for i := range ring {
		ring[i].Slots = ring[i].Slots[:width:width]
	}
	return &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: "ring", What: fmt.Sprintf("vnodes have %d slots, as many as namespaces use", width)},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetRing{SetRing: &topologyv1.SetRing{Ring: topology.RingProto(ring)}}}},
	}
}
