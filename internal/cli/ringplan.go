package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
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
	replace  string
	strategy string
	steps    bool
	// kind is that of the operation that the plan is for; leave says that the removed
	// nodes leave the cluster.
	kind  string
	leave bool
}

// strategies are the ways to place slots, as kvctl names them.
var strategies = map[string]strategy{
	"even": func(p *placing) (placement.Assignment, error) {
		return placement.Even(p.current, p.nodes, p.uses)
	},
	"split": func(p *placing) (placement.Assignment, error) {
		return placement.Split(p.current, p.nodes, p.uses)
	},
	"weighted": func(p *placing) (placement.Assignment, error) {
		weights, err := p.holds.weights(p.topology)
		if err != nil {
			return nil, err
		}
		return placement.Weighted(p.current, p.nodes, p.uses, weights)
	},
}

type strategy func(*placing) (placement.Assignment, error)

// placing is what a strategy places by.
type placing struct {
	topology *topology.Topology
	current  placement.Assignment
	nodes    []placement.Node
	uses     []int // N of each namespace
	holds    ringUse
}

func (a *App) ringPlan() *cobra.Command {
	r := planRequest{kind: "apply"}
	var out, replicas string
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what other nodes would change, without changing it",
		Long: `Shows which slots would move if nodes came or went, and how evenly the ring would be
spread then. Nothing is changed. --add takes names of registered nodes, or how many nodes;
then spares are taken first, and nodes that are not there yet stand in for the rest, each
in the zone with the fewest. Without --add and --remove it shows what the strategy would
change for the nodes that have slots now, as after some were started in other zones.
--replace gives all slots of one node to another. What --out writes, or -o json prints, can
be made: see kvctl ring apply. --replicas shows where the replicas would lie with another N
of a namespace: see kvctl namespace set.

Bytes are what the nodes say they hold, the time is a guess: 64 MiB/s for each receiver, and
at least 2 s for every 32 moves of a node. --steps shows in which stages the moves would be
made: side by side as far as nodes may take part in so many, one slot of a vnode at a time.

even gives every node as many slots, as far as zones allow, and moves little more than the
newcomers' share. weighted gives every node as many bytes, by what the nodes say they hold;
it moves nothing while none is off by more than 5%. split has each newcomer take half of
one node's slots: it moves least, and leaves three nodes and one at 33, 17, 33 and 17%.`,
		Example: `  kvctl ring plan --add 1
  kvctl ring plan --add 3 --strategy split
  kvctl ring plan --strategy weighted --steps
  kvctl ring plan --add node4,node5 --remove node1
  kvctl ring plan --replace node2=node6 --out plan.json
  kvctl ring plan --replicas orders=5`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.formedTopology(cmd.Context())
			if err != nil {
				return err
			}
			uses, _, err := a.uses(cmd.Context(), t)
			if err != nil {
				return err
			}
			if replicas != "" {
				d, err := planReplicas(t, replicas, uses)
				if err != nil {
					return err
				}
				return a.print(d, d.write)
			}
			d, err := planRing(t, r, uses)
			if err != nil {
				return err
			}
			if out != "" {
				if err := writePlan(out, d); err != nil {
					return err
				}
			}
			return a.print(d, func(w io.Writer) {
				d.write(w)
				d.writeNext(w, out)
			})
		},
	}
	r.addFlags(cmd)
	cmd.Flags().StringVar(&out, "out", "", "file to write the plan to")
	cmd.Flags().BoolVar(&r.steps, "steps", false, "show the stages in which the moves would be made")
	cmd.Flags().StringVar(&replicas, "replicas", "", "NAMESPACE=N: another number of replicas")
	for _, other := range []string{"out", "add", "zone", "remove", "replace", "strategy", "steps"} {
		cmd.MarkFlagsMutuallyExclusive("replicas", other)
	}
	return cmd
}

func (r *planRequest) addFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.add, "add", "", "nodes to add: how many, or names with commas")
	cmd.Flags().StringVar(&r.zone, "zone", "", "zone of the added nodes that are not there yet")
	cmd.Flags().StringSliceVar(&r.remove, "remove", nil, "nodes to take the slots from, by name")
	cmd.Flags().StringVar(&r.replace, "replace", "", "OLD=NEW: a node whose slots all go to a spare")
	cmd.Flags().StringVar(&r.strategy, "strategy", "even", "even, weighted or split")
	cmd.MarkFlagsMutuallyExclusive("replace", "add")
	cmd.MarkFlagsMutuallyExclusive("replace", "remove")
	cmd.MarkFlagsMutuallyExclusive("replace", "strategy")
}

// planFormat is the version of the document that a plan is.
const planFormat = 1

// planDoc is a plan as a document.
type planDoc struct {
	Format   int           `json:"format"`
	Cluster  string        `json:"cluster_id"`
	Kind     string        `json:"kind"`
	Title    string        `json:"title"`
	Strategy string        `json:"strategy"`
	Epoch    uint64        `json:"epoch"`
	Leave    []nodeRef     `json:"leave"`
	Nodes    []plannedDoc  `json:"nodes"`
	Before   evennessDoc   `json:"before"`
	After    evennessDoc   `json:"after"`
	Slots    int           `json:"slots"`
	Moves    []slotMoveDoc `json:"moves"`
	// Vnodes is how many vnodes have slots that move.
	Vnodes int `json:"vnodes_with_moves"`
	// Forced are the zones whose nodes cannot have the same as all others.
	Forced []string `json:"forced_zones"`
	// Bytes is about what the moves copy, EstimatedMs about how long they take; null where
	// no node says what it holds.
	Bytes       *uint64   `json:"bytes"`
	EstimatedMs *int64    `json:"estimated_ms"`
	Zones       []zoneDoc `json:"zones"`
	// Violations are what would be against a rule, or could not be made.
	Violations []string `json:"violations"`
	// Mended is what would be better.
	Mended []string `json:"mended,omitempty"`
	// Data says how evenly bytes are spread; null where there are none, or no node says.
	Data *dataDoc `json:"data"`
	// Stages are how the moves would be made, if that was asked for.
	Stages []stageDoc `json:"stages,omitempty"`
}

type plannedDoc struct {
	Node   string `json:"node"`
	Zone   string `json:"zone"`
	Exists bool   `json:"exists"`
	Before int    `json:"slots_before"`
	After  int    `json:"slots_after"`
	// Null where no node says what it holds.
	BytesBefore *uint64 `json:"bytes_before"`
	BytesAfter  *uint64 `json:"bytes_after"`
}

// evennessDoc says how evenly slots, or what they hold, are spread over the nodes that
// have some.
type evennessDoc struct {
	MaxOverMean float64 `json:"max_over_mean"`
	Deviation   float64 `json:"standard_deviation"`
}

// nodeRef names a node; its incarnation is 0 when it is still to be started.
type nodeRef struct {
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"`
}

type slotMoveDoc struct {
	Vnode int `json:"vnode"`
	Slot  int `json:"slot"`
	// From is null for a replica that is new.
	From *nodeRef `json:"from"`
	To   nodeRef  `json:"to"`
}

// planned is a node that a plan is about.
type planned struct {
	placement.Node
	name string
	// used: it has slots in the end; removed: they are taken from it.
	exists, used, removed bool
}

// planRing plans what is asked for, with what the nodes say they hold.
func planRing(t *topology.Topology, r planRequest, holds ringUse) (*planDoc, error) {
	place := strategies[r.strategy]
	if place == nil {
		return nil, usagef("there is no strategy %q: use even, weighted or split", r.strategy)
	}
	if r.replace != "" {
		old, spare, err := r.replaced(t)
		if err != nil {
			return nil, err
		}
		place = func(p *placing) (placement.Assignment, error) {
			return placement.Substitute(p.current, old.Incarnation, spare.Incarnation), nil
		}
		r.strategy = "replace"
	}
	nodes, err := r.nodes(t)
	if err != nil {
		return nil, err
	}
	if r.leave && !slices.ContainsFunc(nodes, func(n *planned) bool { return n.removed && t.SlotCounts(quorum.MaxN)[n.ID] > 0 }) {
		// Spares leave: the others keep what they have.
		place = func(p *placing) (placement.Assignment, error) { return p.current, nil }
	}
	in := &placing{topology: t, current: placement.Of(t), uses: placement.Uses(t), holds: holds}
	refs := map[uint64]nodeRef{}
	for _, n := range nodes {
		refs[n.ID] = nodeRef{Node: n.name}
		if n.exists {
			refs[n.ID] = nodeRef{n.name, n.ID}
		}
		if n.used {
			in.nodes = append(in.nodes, n.Node)
		}
	}
	next, err := place(in)
	if errors.Is(err, placement.ErrTooFewNodes) {
		return nil, tooFewNodes(t, len(in.nodes))
	}
	if err != nil {
		return nil, err
	}
	d := &planDoc{
		Format: planFormat, Cluster: t.ClusterID, Kind: r.kind, Title: r.title(), Strategy: r.strategy, Epoch: t.Epoch,
		Leave: []nodeRef{}, Moves: []slotMoveDoc{}, Forced: []string{}, Violations: []string{},
	}
	zoneOf := map[uint64]string{}
	for _, n := range nodes {
		zoneOf[n.ID] = n.Zone
		if r.leave && n.removed {
			d.Leave = append(d.Leave, nodeRef{n.name, n.ID})
		}
	}
	current := in.current
	before, after := map[uint64]int{}, map[uint64]int{}
	data := newDataShares(t, holds)
	order := placement.Moves(current, next)
	for v := range next {
		for s, n := range next[v] {
			d.Slots++
			before[current[v][s]]++
			after[n]++
			data.add(v, s, current[v][s], n)
		}
	}
	for i, m := range order {
		d.Moves = append(d.Moves, slotMoveDoc{int(m.Vnode), m.Slot, &nodeRef{t.NodeName(m.From), m.From}, refs[m.To]})
		if i == 0 || m.Vnode != order[i-1].Vnode {
			d.Vnodes++
		}
	}
	for _, n := range nodes {
		if before[n.ID]+after[n.ID] > 0 || n.used {
			p := plannedDoc{Node: n.name, Zone: n.Zone, Exists: n.exists, Before: before[n.ID], After: after[n.ID]}
			p.BytesBefore, p.BytesAfter = data.of(n.ID)
			d.Nodes = append(d.Nodes, p)
		}
	}
	for _, n := range in.nodes {
		after[n.ID] += 0 // with nothing, it counts too
		data.after[n.ID] += 0
	}
	sortPlanned(d.Nodes)
	d.Before, d.After, d.Data = evenness(before), evenness(after), data.doc()
	d.Forced = forced(in.nodes, len(next), append(in.uses, len(next[0])))
	d.Zones = zonesOf(d.Nodes)
	d.Bytes, d.EstimatedMs = holds.estimate(d.Moves, data.size)
	worse, better := crowded(t, current, next, zoneOf)
	d.Violations, d.Mended = append(d.Violations, worse...), better
	d.Violations = append(d.Violations, holds.strained(d.Moves, data.size)...)
	if r.steps {
		d.Stages = stagesOf(order, in.nodes, before, data)
	}
	return d, nil
}

// forced returns the zones whose nodes cannot have the same as all others, for one of the
// numbers of replicas in use.
func forced(nodes []placement.Node, vnodes int, uses []int) []string {
	zones := map[string]bool{}
	for _, n := range uses {
		for zone, s := range placement.Shares(nodes, vnodes, n) {
			if s.Forced {
				zones[zone] = true
			}
		}
	}
	return append([]string{}, slices.SortedFunc(maps.Keys(zones), compareNames)...)
}

func sortPlanned(nodes []plannedDoc) {
	slices.SortStableFunc(nodes, func(a, b plannedDoc) int { return cmp.Or(compareNames(a.Zone, b.Zone), compareNames(a.Node, b.Node)) })
}

// nodes returns the data nodes that a plan is about, those without slots only where
// they are added.
func (r planRequest) nodes(t *topology.Topology) ([]*planned, error) {
	var out []*planned
	slots := t.SlotCounts(quorum.MaxN)
	inherited := map[uint64]bool{} // slots of a directory whose place another one takes are that one's
	for i := range t.Nodes {
		if n := &t.Nodes[i]; slots[n.Incarnation] > 0 {
			inherited[t.Resolve(n.Name).Incarnation] = true
		}
	}
	zones := map[string]int{}
	next := uint64(0)
	for i := range t.Nodes {
		n := &t.Nodes[i]
		next = max(next, n.Incarnation)
		if n.Role != topology.Data && r.kind != "decommission" {
			continue // it has no slots, and copies come and go by themselves
		}
		p := &planned{Node: placement.Node{ID: n.Incarnation, Zone: n.Zone}, name: n.Name, exists: true, used: inherited[n.Incarnation]}
		out = append(out, p)
		if p.used {
			zones[n.Zone]++
		}
	}
	if r.replace != "" {
		old, spare, _ := strings.Cut(r.replace, "=")
		r.remove, r.add = []string{old}, spare
	}
	for _, name := range r.remove {
		p, err := r.find(t, out, name)
		if err != nil {
			return nil, err
		}
		p.removed = true
		if !p.used && !r.leave {
			return nil, usagef("%s has no slots: there is nothing to remove", p.name)
		}
		if p.used {
			p.used = false
			zones[p.Zone]--
		}
	}
	count, err := strconv.Atoi(r.add)
	if r.add != "" && err != nil {
		for name := range strings.SplitSeq(r.add, ",") {
			p, err := r.find(t, out, strings.TrimSpace(name))
			if err != nil {
				return nil, err
			}
			if p.used || inherited[p.ID] {
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
		if count > 0 && !p.used && !p.removed && !inherited[p.ID] && t.Resolve(p.name).Incarnation == p.ID {
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

// replaced returns the two nodes that --replace names.
func (r planRequest) replaced(t *topology.Topology) (old, spare *topology.Node, _ error) {
	from, to, ok := strings.Cut(r.replace, "=")
	if !ok {
		return nil, nil, usagef("--replace %s: want OLD=NEW", r.replace)
	}
	old, err := resolveNode(t, from)
	if err != nil {
		return nil, nil, err
	}
	if spare, err = resolveNode(t, to); err != nil {
		return nil, nil, err
	}
	if old.Role == topology.Reporting {
		return nil, nil, reportingNode(old.Name)
	}
	if t.SlotCounts(quorum.MaxN)[old.Incarnation] == 0 {
		return nil, nil, usagef("%s has no slots: there is nothing to replace", old.Name)
	}
	return old, spare, nil
}

// title says what a plan is for.
func (r planRequest) title() string {
	if old, spare, ok := strings.Cut(r.replace, "="); ok {
		return spare + " takes the place of " + old
	}
	var parts []string
	if r.add != "" && r.add != "0" {
		parts = append(parts, "add "+r.add)
	}
	if len(r.remove) > 0 {
		parts = append(parts, r.kindVerb()+" "+strings.Join(r.remove, ", "))
	}
	if len(parts) == 0 {
		return "even out the ring"
	}
	return strings.Join(parts, ", ")
}

func (r planRequest) kindVerb() string {
	if r.kind == "apply" {
		return "remove"
	}
	return r.kind
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
		return nil, reportingNode(n.Name)
	}
	return nodes[i], nil
}

// reportingNode says how copies are moved, which no plan does.
func reportingNode(name string) error {
	return usagef("%s is a reporting node, which has no slots: others take its copies by themselves with kvctl node drain %s, or kvctl node decommission %s", name, name, name)
}

// evenness measures how evenly nodes have something, of which there is some.
func evenness[T int | uint64](have map[uint64]T) evennessDoc {
	var sum, most T
	for _, n := range have {
		sum += n
		most = max(most, n)
	}
	mean := float64(sum) / float64(len(have))
	squares := 0.0
	for _, id := range slices.Sorted(maps.Keys(have)) { // in order, for the same rounding each time
		off := float64(have[id]) - mean
		squares += off * off
	}
	return evennessDoc{float64(most) / mean, math.Sqrt(squares / float64(len(have)))}
}
