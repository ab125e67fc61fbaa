package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// planRequest is what the ring is planned for.
type planRequest struct {
	add      string
	zone     string
	remove   []string
	strategy string
}

// strategies are the ways to place slots.
var strategies = map[string]func(placement.Assignment, []placement.Node, []int) (placement.Assignment, error){
	"even":  placement.Even,
	"split": placement.Split,
}

func (a *App) ringPlan() *cobra.Command {
	var r planRequest
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what other nodes would change, without changing it",
		Long: `Shows which slots would move if nodes came or went, and how evenly the ring would be
spread then. Nothing is changed. --add takes names of registered nodes, or how many nodes;
then spares are taken first, and nodes that are not there yet stand in for the rest, each
in the zone with the fewest. Without --add and --remove it shows what the strategy would
change for the nodes that have slots now.

even gives every node the same, as far as zones allow, and moves little more than the
newcomers' share. split has each newcomer take half of one node's slots: it moves least,
and leaves three nodes and one at 33, 17, 33 and 17%.`,
		Example: `  kvctl ring plan --add 1
  kvctl ring plan --add 3 --strategy split
  kvctl ring plan --add node4,node5 --remove node1`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.formedTopology(cmd.Context())
			if err != nil {
				return err
			}
			d, err := planRing(t, r)
			if err != nil {
				return err
			}
			return a.print(d, d.write)
		},
	}
	cmd.Flags().StringVar(&r.add, "add", "", "nodes to add: how many, or names with commas")
	cmd.Flags().StringVar(&r.zone, "zone", "", "zone of the added nodes that are not there yet")
	cmd.Flags().StringSliceVar(&r.remove, "remove", nil, "nodes to take the slots from, by name")
	cmd.Flags().StringVar(&r.strategy, "strategy", "even", "even or split")
	return cmd
}

// planDoc is a plan as a document.
type planDoc struct {
	Strategy string        `json:"strategy"`
	Epoch    string        `json:"epoch"`
	Nodes    []plannedDoc  `json:"nodes"`
	Before   evennessDoc   `json:"before"`
	After    evennessDoc   `json:"after"`
	Slots    int           `json:"slots"`
	Moves    []slotMoveDoc `json:"moves"`
	// Vnodes is how many vnodes have slots that move.
	Vnodes int `json:"vnodes_with_moves"`
	// Forced are the zones whose nodes cannot have the same as all others.
	Forced []string `json:"forced_zones"`
}

type plannedDoc struct {
	Node   string `json:"node"`
	Zone   string `json:"zone"`
	Exists bool   `json:"exists"`
	Before int    `json:"slots_before"`
	After  int    `json:"slots_after"`
}

// evennessDoc says how evenly slots are spread over the nodes that have some.
type evennessDoc struct {
	MaxOverMean float64 `json:"max_over_mean"`
	Deviation   float64 `json:"standard_deviation"`
}

type slotMoveDoc struct {
	Vnode int    `json:"vnode"`
	Slot  int    `json:"slot"`
	From  string `json:"from"`
	To    string `json:"to"`
}

// planned is a node that a plan is about.
type planned struct {
	placement.Node
	name         string
	exists, used bool // used: it has slots in the end
}

func planRing(t *topology.Topology, r planRequest) (*planDoc, error) {
	place := strategies[r.strategy]
	if place == nil {
		return nil, usagef("there is no strategy %q: use even or split", r.strategy)
	}
	nodes, err := r.nodes(t)
	if err != nil {
		return nil, err
	}
	var current placement.Assignment
	for i := range t.Ring {
		var slots []uint64
		for _, s := range t.Ring[i].Slots {
			slots = append(slots, cmp.Or(s.Incoming, s.Node)) // what moves will have moved
		}
		current = append(current, slots)
	}
	var uses []int
	for i := range t.Namespaces {
		uses = append(uses, t.Namespaces[i].N)
	}
	var members []placement.Node
	names := map[uint64]string{}
	for _, n := range nodes {
		names[n.ID] = n.name
		if n.used {
			members = append(members, n.Node)
		}
	}
	next, err := place(current, members, uses)
	if errors.Is(err, placement.ErrTooFewNodes) {
		return nil, usagef("%w would be left: remove fewer, add some, or lower N of the namespaces", err)
	}
	if err != nil {
		return nil, err
	}
	d := &planDoc{Strategy: r.strategy, Epoch: topology.EpochString(t.Epoch), Moves: []slotMoveDoc{}, Forced: []string{}}
	before, after := map[uint64]int{}, map[uint64]int{}
	for v := range next {
		moves := len(d.Moves)
		for s, n := range next[v] {
			d.Slots++
			before[current[v][s]]++
			after[n]++
			if n != current[v][s] {
				d.Moves = append(d.Moves, slotMoveDoc{v, s, t.NodeName(current[v][s]), names[n]})
			}
		}
		if len(d.Moves) > moves {
			d.Vnodes++
		}
	}
	for _, n := range nodes {
		if before[n.ID]+after[n.ID] > 0 || n.used {
			d.Nodes = append(d.Nodes, plannedDoc{n.name, n.Zone, n.exists, before[n.ID], after[n.ID]})
		}
	}
	for _, n := range members {
		after[n.ID] += 0 // with nothing, it counts too
	}
	slices.SortStableFunc(d.Nodes, func(a, b plannedDoc) int { return cmp.Or(compareNames(a.Zone, b.Zone), compareNames(a.Node, b.Node)) })
	d.Before, d.After = evenness(before), evenness(after)
	for zone, s := range placement.Shares(members, len(next), len(next[0])) {
		if s.Forced {
			d.Forced = append(d.Forced, zone)
		}
	}
	slices.SortFunc(d.Forced, compareNames)
	return d, nil
}

// nodes returns the data nodes that a plan is about, those without slots only where
// they are added.
func (r planRequest) nodes(t *topology.Topology) ([]*planned, error) {
	var out []*planned
	slots := t.SlotCounts(quorum.MaxN)
	zones := map[string]int{}
	next := uint64(0)
	for i := range t.Nodes {
		n := &t.Nodes[i]
		next = max(next, n.Incarnation)
		if n.Role != topology.Data {
			continue
		}
		p := &planned{Node: placement.Node{ID: n.Incarnation, Zone: n.Zone}, name: n.Name, exists: true, used: slots[n.Incarnation] > 0}
		out = append(out, p)
		if p.used {
			zones[n.Zone]++
		}
	}
	for _, name := range r.remove {
		p, err := r.find(t, out, name)
		if err != nil {
			return nil, err
		}
		if !p.used {
			return nil, usagef("%s has no slots: there is nothing to remove", p.name)
		}
		p.used = false
		zones[p.Zone]--
	}
	count, err := strconv.Atoi(r.add)
	if r.add != "" && err != nil {
		for name := range strings.SplitSeq(r.add, ",") {
			p, err := r.find(t, out, strings.TrimSpace(name))
			if err != nil {
				return nil, err
			}
			if p.used || slots[p.ID] > 0 {
				return nil, usagef("%s has slots already: only spares can be added", p.name)
			}
			p.used = true
		}
		return out, nil
	}
	if count < 0 || count > maxAdded {
		return nil, usagef("--add %d: want names, or a number up to %d", count, maxAdded)
	}
	for _, p := range out {
		if count > 0 && !p.used && slots[p.ID] == 0 {
			p.used = true
			zones[p.Zone]++
			count--
		}
	}
	for i := range count {
		zone := r.zone
		if zone == "" {
			for z, n := range zones {
				if zone == "" || n < zones[zone] || n == zones[zone] && compareNames(z, zone) < 0 {
					zone = z
				}
			}
		}
		zones[zone]++
		next++
		out = append(out, &planned{Node: placement.Node{ID: next, Zone: zone}, name: fmt.Sprint("new", i+1), used: true})
	}
	return out, nil
}

// maxAdded bounds the nodes that a plan adds.
const maxAdded = 1000

func (planRequest) find(t *topology.Topology, nodes []*planned, name string) (*planned, error) {
	n, err := resolveNode(t, name)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(nodes, func(p *planned) bool { return p.ID == n.Incarnation })
	if i < 0 {
		return nil, usagef("%s is no data node", name)
	}
	return nodes[i], nil
}

// evenness measures how many slots nodes have.
func evenness(slots map[uint64]int) evennessDoc {
	sum, most := 0, 0
	for _, n := range slots {
		sum += n
		most = max(most, n)
	}
	mean := float64(sum) / float64(len(slots))
	squares := 0.0
	for _, n := range slots {
		squares += (float64(n) - mean) * (float64(n) - mean)
	}
	return evennessDoc{float64(most) / mean, math.Sqrt(squares / float64(len(slots)))}
}

func (d *planDoc) write(w io.Writer) {
	most := 0
	for _, n := range d.Nodes {
		most = max(most, n.Before, n.After)
	}
	share := func(n int) string { return fmt.Sprintf("%.1f%%", 100*float64(n)/float64(d.Slots)) }
	bar := func(n int) string { return strings.Repeat("█", int(float64(n)/float64(most)*24+0.5)) }
	tab := newTable("NODE", "ZONE", ">BEFORE", "", ">AFTER", "")
	for _, n := range d.Nodes {
		name := n.Node
		if !n.Exists {
			name += " (to be started)"
		}
		tab.add(name, n.Zone, share(n.Before), bar(n.Before), share(n.After), bar(n.After))
	}
	tab.write(w)
	fmt.Fprintf(w, "\nmax/mean %.2f, then %.2f; standard deviation %.1f slots, then %.1f\n", d.Before.MaxOverMean, d.After.MaxOverMean, d.Before.Deviation, d.After.Deviation)
	if len(d.Moves) == 0 {
		fmt.Fprintf(w, "nothing would move: strategy %s, epoch %s\n", d.Strategy, d.Epoch)
		return
	}
	fmt.Fprintf(w, "%d of %s would move, %s of the data, in %s: strategy %s, epoch %s\n", len(d.Moves), plural(d.Slots, "slot"), share(len(d.Moves)),
		plural(d.Vnodes, "vnode"), d.Strategy, d.Epoch)
	if len(d.Forced) > 0 {
		fmt.Fprintf(w, "every vnode's replicas lie in as many zones as they can: that keeps the nodes of %s from having what all others have\n", zonesText(d.Forced))
	}
}

func zonesText(zones []string) string {
	if len(zones) == 1 {
		return "zone " + zones[0]
	}
	return "zones " + strings.Join(zones[:len(zones)-1], ", ") + " and " + zones[len(zones)-1]
}
