package cli

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// replicasDoc shows the ring with another N of a namespace. Its moves have no From: they
// are copies. It cannot be applied as a plan.
type replicasDoc struct {
	planDoc
	Namespace string `json:"namespace"`
	FromN     int    `json:"from_n"`
	N         int    `json:"n"`
}

// planReplicas plans NAMESPACE=N the way the orchestrators make it: N changes by one at a
// time, and present slots stay.
func planReplicas(t *topology.Topology, asked string, holds ringUse) (*replicasDoc, error) {
	name, text, _ := strings.Cut(asked, "=")
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > quorum.MaxN {
		return nil, usagef("--replicas %s: want NAMESPACE=N, N from 1 to %d", asked, quorum.MaxN)
	}
	ns := t.Namespace(name)
	switch {
	case ns == nil:
		return nil, topologyRefusal(topology.ErrNamespaceNotFound(name))
	case ns.AlsoN != 0:
		return nil, fmt.Errorf("namespace %s is being changed: see kvctl operation ls", name)
	case n == ns.N:
		return nil, usagef("--replicas %s: namespace %s has N=%d already", asked, name, n)
	}
	current := placement.Of(t)
	next, err := widened(t, current, ns, n)
	if errors.Is(err, placement.ErrTooFewNodes) {
		return nil, usagef("N=%d needs %d nodes with slots, there are %d: start some, and give them slots with kvctl ring apply --add", n, n, len(slotted(t, current)))
	}
	if err != nil {
		return nil, err
	}
	d := &replicasDoc{Namespace: name, FromN: ns.N, N: n}
	d.Format, d.Cluster, d.Kind, d.Strategy, d.Epoch = planFormat, t.ClusterID, topology.KindReplicas, "widen", t.Epoch
	d.Title = fmt.Sprintf("N of namespace %s from %d to %d", name, ns.N, n)
	d.Leave, d.Moves, d.Forced, d.Violations = []nodeRef{}, []slotMoveDoc{}, []string{}, []string{}
	before, after := map[uint64]int{}, map[uint64]int{}
	zoneOf := map[uint64]string{}
	for v := range next {
		for _, node := range current[v] {
			before[node]++
		}
		for s, node := range next[v] {
			after[node]++
			if s >= ns.N && s < n {
				d.Moves = append(d.Moves, slotMoveDoc{Vnode: v, Slot: s, To: nodeRef{t.NodeName(node), node}})
			}
		}
		d.Slots += len(next[v])
	}
	if n > ns.N {
		d.Vnodes = len(next)
	}
	for _, m := range slotted(t, next) {
		zoneOf[m.Incarnation] = m.Zone
		d.Nodes = append(d.Nodes, plannedDoc{Node: m.Name, Zone: m.Zone, Exists: true, Before: before[m.Incarnation], After: after[m.Incarnation]})
	}
	sortPlanned(d.Nodes)
	d.Before, d.After, d.Zones = evenness(before), evenness(after), zonesOf(d.Nodes)
	if shared := sharing(next, n, zoneOf); shared > sharing(current, ns.N, zoneOf) {
		d.Violations = append(d.Violations, fmt.Sprintf("two replicas would share a zone in %d of %s, now in %d", shared, plural(len(next), "vnode"), sharing(current, ns.N, zoneOf)))
	}
	size := holds.sizes(t, func(other *topology.Namespace, _ int) bool { return other.ID == ns.ID })
	d.Bytes, d.EstimatedMs = holds.estimate(d.Moves, size)
	d.Violations = append(d.Violations, holds.strained(d.Moves, size)...)
	return d, nil
}

// slotted returns the nodes that have slots in an assignment, in order of incarnation.
func slotted(t *topology.Topology, a placement.Assignment) (out []*topology.Node) {
	has := map[uint64]bool{}
	for _, slots := range a {
		for _, n := range slots {
			has[n] = true
		}
	}
	for i := range t.Nodes {
		if has[t.Nodes[i].Incarnation] {
			out = append(out, &t.Nodes[i])
		}
	}
	return out
}

// widened returns the slots of all vnodes when a namespace has another N.
func widened(t *topology.Topology, current placement.Assignment, ns *topology.Namespace, n int) (placement.Assignment, error) {
	width := n
	for i := range t.Namespaces {
		if o := &t.Namespaces[i]; o.ID != ns.ID {
			width = max(width, o.Wide())
		}
	}
	var members []placement.Node
	for _, m := range slotted(t, current) {
		members = append(members, placement.Node{ID: m.Incarnation, Zone: m.Zone})
	}
	next := current
	for w := len(current[0]) + 1; w <= width; w++ {
		var err error
		if next, err = placement.Widen(next, len(next), members, w); err != nil {
			return nil, err
		}
	}
	out := make(placement.Assignment, len(next))
	for v := range next {
		out[v] = next[v][:width]
	}
	return out, nil
}

func (d *replicasDoc) write(w io.Writer) {
	tab := newTable("NODE", "ZONE", ">SLOTS", ">THEN", ">COPIES")
	copies := map[string]int{}
	for _, m := range d.Moves {
		copies[m.To.Node]++
	}
	for _, n := range d.Nodes {
		tab.add(n.Node, n.Zone, n.Before, n.After, copies[n.Node])
	}
	tab.write(w)
	fmt.Fprintf(w, "\nmax/mean %.2f, then %.2f\n", d.Before.MaxOverMean, d.After.MaxOverMean)
	if d.N > d.FromN {
		fmt.Fprintf(w, "%s: %s of vnodes would be made\n", d.Title, plural(len(d.Moves), "replica"))
		d.writeCost(w)
	} else {
		fmt.Fprintf(w, "%s: nothing is copied but what a remaining replica lacks\n", d.Title)
	}
	d.writeViolations(w)
	fmt.Fprintf(w, "nothing was changed: make it with kvctl namespace set %s --n %d --wait\n", d.Namespace, d.N)
}
