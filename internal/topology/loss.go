package topology

import (
	"fmt"
	"slices"
	"strings"
	"time"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// SubjectLoss is the subject of what people gave up for lost.
const SubjectLoss = "loss"

// maxLosses is how many losses are kept.
const maxLosses = 100

// Loss is what people gave up: vnodes whose acknowledged writes may be lost in part,
// since too few of their replicas were left. It breaks invariant 1, knowingly.
type Loss struct {
	Epoch uint64
	// AtMillis is when it was accepted, SinceMillis since when the first of the nodes was
	// unhealthy, 0 where that is not known; milliseconds since 1970.
	AtMillis, SinceMillis int64
	// Nodes and Namespaces are names.
	Nodes      []string
	Vnodes     []uint32
	Namespaces []string
}

// Describe says in words what was given up.
func (l Loss) Describe() string {
	since := ""
	if l.SinceMillis != 0 {
		since = fmt.Sprintf(", unhealthy since %s,", time.UnixMilli(l.SinceMillis).UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("loss accepted: %s%s given up: %d vnodes may have lost acknowledged writes of %s",
		strings.Join(l.Nodes, ", "), since, len(l.Vnodes), strings.Join(l.Namespaces, ", "))
}

// LossOf returns what it would be to give some nodes up, besides those that are lost
// already. It names no vnodes where enough replicas are left of each.
func (t *Topology) LossOf(incarnations []uint64) Loss {
	short := t.Short(func(inc uint64) bool { return !slices.Contains(incarnations, inc) && !t.Lost(inc) })
	l := Loss{}
	l.Vnodes, l.Namespaces = SortedVnodes(short)
	for _, inc := range incarnations {
		l.Nodes = append(l.Nodes, t.NodeName(inc))
	}
	return l
}

// Lost reports whether a node was given up.
func (t *Topology) Lost(incarnation uint64) bool {
	n := t.Node(incarnation)
	return n != nil && n.LostEpoch != 0
}

// acceptLoss gives nodes up. Their vnodes count as changed, so that requests which these
// nodes still make, if they live, are refused.
func (d *draft) acceptLoss(m *topologyv1.AcceptLoss, atMillis int64) error {
	t := d.Topology
	lost := m.GetIncarnations()
	t.index()
	t.holders = nil
	for _, inc := range lost {
		switch n := t.Node(inc); {
		case n == nil || n.Role != Data:
			return refuse(NotFound, "NODE_NOT_FOUND", fmt.Sprintf("there is no data node #%d", inc), "incarnation", inc)
		case n.LostEpoch != 0:
			return refuse(Conflict, "NODE_LOST", fmt.Sprintf("node %s, #%d, was given up already", n.Name, inc), "incarnation", inc)
		}
	}
	l := t.LossOf(lost)
	if len(l.Vnodes) == 0 {
		return refuse(Invalid, "NOTHING_LOST", "enough replicas of every vnode are left without these nodes: nothing needs to be given up")
	}
	l.Epoch, l.AtMillis, l.SinceMillis = t.Epoch, atMillis, int64(m.GetSinceMs())
	for i := range t.Nodes {
		if slices.Contains(lost, t.Nodes[i].Incarnation) {
			t.Nodes[i].LostEpoch = t.Epoch
		}
	}
	for i := range t.Ring {
		if slices.ContainsFunc(t.Ring[i].Slots, func(s Slot) bool { return slices.Contains(lost, s.Node) || slices.Contains(lost, s.Incoming) }) {
			t.Ring[i] = Vnode{Slots: t.Ring[i].Slots, ChangedEpoch: t.Epoch, Copies: t.Ring[i].Copies}
		}
	}
	d.Losses = append(d.Losses, l)
	if extra := len(d.Losses) - maxLosses; extra > 0 {
		d.Losses = slices.Delete(d.Losses, 0, extra)
	}
	d.changed = true
	return nil
}

// Proto converts a loss to its wire form.
func (l Loss) Proto() *topologyv1.Loss {
	return &topologyv1.Loss{
		Epoch: l.Epoch, AtMs: uint64(l.AtMillis), SinceMs: uint64(l.SinceMillis), Nodes: l.Nodes, Vnodes: l.Vnodes, Namespaces: l.Namespaces,
	}
}

// LossFromProto converts a loss. It shares memory with pb.
func LossFromProto(pb *topologyv1.Loss) Loss {
	return Loss{pb.GetEpoch(), int64(pb.GetAtMs()), int64(pb.GetSinceMs()), pb.GetNodes(), pb.GetVnodes(), pb.GetNamespaces()}
}
