package topology

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// ErrOtherBase is the error of a delta that does not fit the topology at hand. Whoever
// gets it asks for the whole topology.
var ErrOtherBase = errors.New("the difference does not fit the topology that is known here")

// Diff returns what makes next of old, or nil where only the whole will do: there is no
// old one, or what never changes later differs, as it does when the ring forms or a
// generation begins.
func Diff(old, next *Topology) *topologyv1.TopologyDelta {
	if old == nil || old.ClusterID != next.ClusterID || old.Epoch >= next.Epoch || old.Vnodes != next.Vnodes || old.Recovery != next.Recovery ||
		old.FoundingNodes != next.FoundingNodes || len(old.Ring) != len(next.Ring) ||
		len(next.Orchestrators) == 0 && len(old.Orchestrators) > 0 {
		return nil
	}
	d := &topologyv1.TopologyDelta{ClusterId: next.ClusterID, BaseEpoch: old.Epoch, Epoch: next.Epoch, Sum: next.sum()}
	for i := range next.Nodes {
		n := &next.Nodes[i]
		if o := old.Node(n.Incarnation); o == nil || *o != *n {
			d.Nodes = append(d.Nodes, n.Proto())
		}
	}
	for i := range old.Nodes {
		if inc := old.Nodes[i].Incarnation; next.Node(inc) == nil {
			d.RemovedNodes = append(d.RemovedNodes, inc)
		}
	}
	for i := range next.Ring {
		if v := &next.Ring[i]; !v.same(&old.Ring[i]) {
			d.Vnodes = append(d.Vnodes, &topologyv1.VnodeChange{Index: uint32(i), Vnode: v.proto()})
		}
	}
	for i := range next.Namespaces {
		n := &next.Namespaces[i]
		if o := old.NamespaceByID(n.ID); o == nil || *o != *n {
			d.Namespaces = append(d.Namespaces, n.Proto())
		}
	}
	for i := range old.Namespaces {
		if id := old.Namespaces[i].ID; next.NamespaceByID(id) == nil {
			d.RemovedNamespaces = append(d.RemovedNamespaces, id)
		}
	}
	if old.Settings != next.Settings {
		d.Settings = next.Settings.Proto()
	}
	if !slices.Equal(old.Orchestrators, next.Orchestrators) {
		for _, o := range next.Orchestrators {
			d.Orchestrators = append(d.Orchestrators, o.Proto())
		}
	}
	return d
}

// same reports whether two vnodes of one place are the same; topologies that follow each
// other share those.
func (v *Vnode) same(o *Vnode) bool {
	if v.ChangedEpoch != o.ChangedEpoch || len(v.Slots) != len(o.Slots) || !slices.Equal(v.Copies, o.Copies) {
		return false
	}
	return len(v.Slots) == 0 || &v.Slots[0] == &o.Slots[0] || slices.Equal(v.Slots, o.Slots)
}

// Patch returns the topology that a delta makes of old. It shares with old what did not
// change, and no memory with d. A delta for another topology is refused with ErrOtherBase,
// and so is one whose outcome is not the one that it was made for.
func Patch(old *Topology, d *topologyv1.TopologyDelta) (*Topology, error) {
	if d.GetClusterId() != old.ClusterID || d.GetBaseEpoch() != old.Epoch || d.GetEpoch() <= old.Epoch {
		return nil, fmt.Errorf("%w: it leads from epoch %s of cluster %s to %s, this is epoch %s of cluster %s", ErrOtherBase,
			EpochString(d.GetBaseEpoch()), d.GetClusterId(), EpochString(d.GetEpoch()), EpochString(old.Epoch), old.ClusterID)
	}
	t := *old
	t.Epoch = d.GetEpoch()
	if err := t.patchRest(old, d); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	if err := t.patchRing(d.GetVnodes()); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	t.holders = &holders{}
	if t.sum() != d.GetSum() {
		return nil, fmt.Errorf("%w: epoch %s has another checksum", ErrOtherBase, EpochString(t.Epoch))
	}
	if err := t.validatePatched(old, d); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	return &t, nil
}

// patchRest changes everything but the vnodes.
func (t *Topology) patchRest(old *Topology, d *topologyv1.TopologyDelta) error {
	if len(d.GetNodes())+len(d.GetRemovedNodes())+len(d.GetNamespaces())+len(d.GetRemovedNamespaces())+len(d.GetOrchestrators()) == 0 && d.GetSettings() == nil {
		return nil
	}
	nodes := make(map[uint64]bool, len(d.GetNodes()))
	t.Nodes = nil
	for _, pb := range d.GetNodes() {
		t.Nodes = append(t.Nodes, nodeFromProto(pb))
		nodes[pb.GetIncarnation()] = true
	}
	for _, n := range old.Nodes {
		if !nodes[n.Incarnation] && !slices.Contains(d.GetRemovedNodes(), n.Incarnation) {
			t.Nodes = append(t.Nodes, n)
		}
	}
	slices.SortFunc(t.Nodes, func(a, b Node) int { return cmp.Compare(a.Incarnation, b.Incarnation) })
	namespaces := make(map[uint32]bool, len(d.GetNamespaces()))
	t.Namespaces = nil
	for _, pb := range d.GetNamespaces() {
		ns, err := NamespaceFromProto(pb)
		if err != nil {
			return err
		}
		t.Namespaces = append(t.Namespaces, ns)
		namespaces[ns.ID] = true
	}
	for _, ns := range old.Namespaces {
		if !namespaces[ns.ID] && !slices.Contains(d.GetRemovedNamespaces(), ns.ID) {
			t.Namespaces = append(t.Namespaces, ns)
		}
	}
	slices.SortFunc(t.Namespaces, func(a, b Namespace) int { return cmp.Compare(a.ID, b.ID) })
	if d.GetSettings() != nil {
		t.Settings = settingsFromProto(d.GetSettings())
	}
	if len(d.GetOrchestrators()) > 0 {
		t.Orchestrators = nil
		for _, o := range d.GetOrchestrators() {
			t.Orchestrators = append(t.Orchestrators, orchestratorFromProto(o))
		}
	}
	t.indexRest()
	return nil
}

// patchRing replaces vnodes.
func (t *Topology) patchRing(changes []*topologyv1.VnodeChange) error {
	if len(changes) == 0 {
		return nil
	}
	t.Ring = slices.Clone(t.Ring)
	for _, c := range changes {
		i := int(c.GetIndex())
		if i >= len(t.Ring) {
			return fmt.Errorf("%w: there is no vnode %d, the ring has %d", ErrOtherBase, i, len(t.Ring))
		}
		v := vnodeFromProto(c.GetVnode())
		if err := v.checkPhases(i); err != nil {
			return err
		}
		v.index(i)
		t.ringSum += v.sum - t.Ring[i].sum
		t.Ring[i] = v
	}
	return nil
}

// validatePatched is validate for what d made of a valid topology: vnodes that stayed
// can only have become wrong by other nodes, more slots in use, or copies of namespaces
// that are gone.
func (t *Topology) validatePatched(old *Topology, d *topologyv1.TopologyDelta) error {
	width := t.Width()
	if len(d.GetNodes())+len(d.GetRemovedNodes())+len(d.GetRemovedNamespaces()) > 0 || width > old.Width() {
		return t.validate()
	}
	if err := t.validateRest(); err != nil {
		return err
	}
	for _, c := range d.GetVnodes() {
		if err := t.validateVnode(int(c.GetIndex()), width); err != nil {
			return err
		}
	}
	return nil
}

// Check returns a delta that leads from a topology to itself and changes nothing. By its
// checksum whoever has that epoch finds out whether it has the same.
func (t *Topology) Check() *topologyv1.TopologyDelta {
	return &topologyv1.TopologyDelta{ClusterId: t.ClusterID, BaseEpoch: t.Epoch, Epoch: t.Epoch, Sum: t.sum()}
}

// Fails reports whether a delta that Check returned is of the epoch of this topology, and
// not of this topology.
func (t *Topology) Fails(check *topologyv1.TopologyDelta) bool {
	return t.Epoch != 0 && check.GetBaseEpoch() == t.Epoch && check.GetEpoch() == t.Epoch && check.GetClusterId() == t.ClusterID && check.GetSum() != t.sum()
}

// sum returns a checksum of everything but the epoch. Those of the vnodes are added up,
// so that it can follow a change of few.
func (t *Topology) sum() uint64 { return t.ringSum + t.restSum }

// sumRest returns a checksum of everything but the vnodes and the epoch.
func (t *Topology) sumRest() uint64 {
	pb := t.restProto()
	pb.Epoch = 0
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(pb)
	if err != nil { // text that is not UTF-8 cannot travel, and so was not received
		return 0
	}
	return xxhash.Sum64(b)
}

// sumAt returns a checksum of a vnode and its place.
func (v *Vnode) sumAt(at int) uint64 {
	b := make([]byte, 0, 256)
	b = binary.LittleEndian.AppendUint64(b, uint64(at))
	b = binary.LittleEndian.AppendUint64(b, v.ChangedEpoch)
	for _, s := range v.Slots {
		for _, n := range []uint64{s.Node, s.Incoming, uint64(s.Phase), s.Since} {
			b = binary.LittleEndian.AppendUint64(b, n)
		}
	}
	for _, c := range v.Copies {
		for _, n := range []uint64{uint64(c.Namespace), c.Node, uint64(c.State), c.Since} {
			b = binary.LittleEndian.AppendUint64(b, n)
		}
	}
	return xxhash.Sum64(b)
}
