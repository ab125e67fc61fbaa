package cli

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// placeOf names the records of a namespace in a vnode.
type placeOf struct{ namespace, vnode uint32 }

// places returns what each place holds: the most that a replica of it says.
func (u ringUse) places() map[placeOf]uint64 {
	out := map[placeOf]uint64{}
	for _, n := range u {
		for _, v := range n.vnodes {
			p := placeOf{v.GetNamespaceId(), v.GetVnode()}
			out[p] = max(out[p], v.GetBytes())
		}
	}
	return out
}

const (
	// moveBandwidth is what a node takes in at most in a second, if nobody set it otherwise.
	moveBandwidth = 64 << 20
	// moveRound is how long as many moves of a node take at least as are under way at a time.
	moveRound = 2 * time.Second
	// A replica that is new takes no steps of its own: a node fills copiesPerNode at a time,
	// and so many take copyRound at least.
	copiesPerNode = 4
	copyRound     = 200 * time.Millisecond
)

// sizes returns a function that says what a slot of a vnode holds of the namespaces that
// count for it.
func (u ringUse) sizes(t *topology.Topology, counts func(ns *topology.Namespace, slot int) bool) func(vnode, slot int) uint64 {
	places := u.places()
	return func(vnode, slot int) (size uint64) {
		for i := range t.Namespaces {
			if ns := &t.Namespaces[i]; counts(ns, slot) {
				size += places[placeOf{ns.ID, uint32(vnode)}]
			}
		}
		return size
	}
}

// uses reports whether a namespace uses a slot.
func uses(ns *topology.Namespace, slot int) bool { return slot < ns.Wide() }

// estimate says what moves copy, and about how long it takes: nil where no node said
// what it holds.
func (u ringUse) estimate(moves []slotMoveDoc, sizeOf func(vnode, slot int) uint64) (bytes *uint64, ms *int64) {
	if len(u) == 0 {
		return nil, nil
	}
	type load struct {
		in            uint64
		moves, copies int
	}
	loads := map[nodeRef]*load{}
	of := func(n nodeRef) *load {
		if loads[n] == nil {
			loads[n] = &load{}
		}
		return loads[n]
	}
	sum := uint64(0)
	for _, m := range moves {
		size := sizeOf(m.Vnode, m.Slot)
		sum += size
		of(m.To).in += size
		if m.From == nil {
			of(m.To).copies++
			continue
		}
		of(m.To).moves++
		of(*m.From).moves++
	}
	longest := time.Duration(0)
	for _, l := range loads {
		rounds := time.Duration((l.moves + topology.MovesPerNode - 1) / topology.MovesPerNode)
		copies := time.Duration((l.copies + copiesPerNode - 1) / copiesPerNode)
		longest = max(longest, rounds*moveRound, copies*copyRound, time.Duration(float64(l.in)/moveBandwidth*float64(time.Second)))
	}
	if whole := longest.Truncate(time.Second); whole < longest {
		longest = whole + time.Second // it is a guess, no more exact than that
	}
	return &sum, ptr(longest.Milliseconds())
}

// zoneDoc is what a plan makes of a zone.
type zoneDoc struct {
	Zone        string `json:"zone"`
	NodesBefore int    `json:"nodes_before"`
	NodesAfter  int    `json:"nodes_after"`
	SlotsBefore int    `json:"slots_before"`
	SlotsAfter  int    `json:"slots_after"`
}

// zonesOf sums nodes with slots, and their slots, by zone.
func zonesOf(nodes []plannedDoc) []zoneDoc {
	zones := map[string]*zoneDoc{}
	out := []zoneDoc{}
	for _, n := range nodes {
		z := zones[n.Zone]
		if z == nil {
			z = &zoneDoc{Zone: n.Zone}
			zones[n.Zone] = z
		}
		z.SlotsBefore += n.Before
		z.SlotsAfter += n.After
		if n.Before > 0 {
			z.NodesBefore++
		}
		if n.After > 0 {
			z.NodesAfter++
		}
	}
	for _, z := range zones {
		out = append(out, *z)
	}
	slices.SortFunc(out, func(a, b zoneDoc) int { return cmp.Or(compareNames(a.Zone, b.Zone), cmp.Compare(a.Zone, b.Zone)) })
	return out
}

// tooFewNodes says which namespace needs more nodes than would be left.
func tooFewNodes(t *topology.Topology, left int) error {
	most := &t.Namespaces[0]
	for i := range t.Namespaces {
		if ns := &t.Namespaces[i]; ns.Wide() > most.Wide() {
			most = ns
		}
	}
	if most.Wide() <= left { // the ring still has slots that no namespace uses any more
		return usagef("%s would be left with slots, and vnodes have %d: try again in a moment", plural(left, "node"), len(t.Ring[0].Slots))
	}
	return usagef("%s would be left with slots, and namespace %s has N=%d: add a node, take fewer away, or lower its N with kvctl namespace set %s --n %d",
		plural(left, "node"), most.Name, most.Wide(), most.Name, max(left, 1))
}

// sharing counts the vnodes that have two of their first n replicas in one zone.
func sharing(a placement.Assignment, n int, zoneOf map[uint64]string) (vnodes int) {
	for _, slots := range a {
		zones := map[string]bool{}
		for _, node := range slots[:n] {
			zones[zoneOf[node]] = true
		}
		if len(zones) < n {
			vnodes++
		}
	}
	return vnodes
}

// crowded says of which namespaces two replicas would share a zone: in more vnodes than
// now, or still for want of zones where there are several; and of which in fewer.
func crowded(t *topology.Topology, before, after placement.Assignment, zoneOf map[uint64]string) (worse, better []string) {
	zones := map[string]bool{}
	for _, slots := range after {
		for _, node := range slots {
			zones[zoneOf[node]] = true
		}
	}
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		was, will := sharing(before, ns.N, zoneOf), sharing(after, ns.N, zoneOf)
		few := len(zones) < ns.N
		text := fmt.Sprintf("namespace %s, N=%d: two replicas would share a zone in %d of %s, now in %d", ns.Name, ns.N, will, plural(len(after), "vnode"), was)
		if few {
			text += ": there would be nodes with slots in " + plural(len(zones), "zone")
		}
		switch {
		case will > was || few && len(zones) > 1:
			worse = append(worse, text)
		case will < was:
			better = append(better, text)
		}
	}
	return worse, better
}

// strained says which nodes would be given more than their disks have room for, and which
// say nothing while others do.
func (u ringUse) strained(moves []slotMoveDoc, sizeOf func(vnode, slot int) uint64) (out []string) {
	in := map[nodeRef]uint64{}
	for _, m := range moves {
		in[m.To] += sizeOf(m.Vnode, m.Slot)
	}
	to := slices.SortedFunc(maps.Keys(in), func(a, b nodeRef) int { return compareNames(a.Node, b.Node) })
	for _, n := range to {
		switch use := u[n.Incarnation]; {
		case n.Incarnation == 0 || len(u) == 0:
		case use == nil:
			out = append(out, fmt.Sprintf("%s does not answer: what moves there waits until it does", n.Node))
		case use.available > 0 && in[n] > use.available:
			out = append(out, fmt.Sprintf("%s would take in about %s, and its disk has %s free", n.Node, sizeText(in[n]), sizeText(use.available)))
		}
	}
	return out
}

// needlesslySharing counts the vnodes that have two of their first n replicas in one zone
// though there are n zones with replicas: as a node has changed its zone.
func needlesslySharing(t *topology.Topology, n int) int {
	zoneOf, zones := map[uint64]string{}, map[string]bool{}
	for _, m := range t.Members() {
		zoneOf[m.Incarnation] = m.Zone
		zones[m.Zone] = true
	}
	if len(zones) < n {
		return 0
	}
	return sharing(placement.Of(t), n, zoneOf)
}

// writeZones writes what becomes of the zones, where there are several.
func (d *planDoc) writeZones(w io.Writer) {
	if len(d.Zones) < 2 {
		return
	}
	fmt.Fprintln(w)
	tab := newTable("ZONE", ">NODES", ">THEN", ">BEFORE", ">AFTER")
	for _, z := range d.Zones {
		tab.add(z.Zone, z.NodesBefore, z.NodesAfter, d.share(z.SlotsBefore), d.share(z.SlotsAfter))
	}
	tab.write(w)
}

// writeCost writes about how much is copied, and how long that takes.
func (d *planDoc) writeCost(w io.Writer) {
	if d.Bytes == nil {
		fmt.Fprintln(w, "no node says how much it holds, so bytes and time are not known")
		return
	}
	fmt.Fprintf(w, "about %s would be copied, in about %s\n", sizeText(*d.Bytes), durationText(time.Duration(*d.EstimatedMs)*time.Millisecond))
}

// writeLeave says who leaves the cluster in the end.
func (d *planDoc) writeLeave(w io.Writer) {
	for _, n := range d.Leave {
		fmt.Fprintf(w, "%s, #%d, then leaves the cluster\n", n.Node, n.Incarnation)
	}
}
