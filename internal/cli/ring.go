package cli

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/ring"
	"github.com/kvasirdb/kvasir/internal/topology"
)

func (a *App) ringCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ring",
		Short: "Show and change which nodes hold which keys",
		Long: `Shows and changes which nodes hold which keys. The hash of a key is its token on the ring. The ring
is cut into vnodes, equal slices; a vnode's slots say which nodes hold it.`,
		Example: `  kvctl ring describe greeting
  kvctl ring distribution
  kvctl ring plan --add 1
  kvctl ring apply --add 1 --wait`,
	}
	cmd.AddCommand(a.ringShow(), a.ringDescribe(), a.ringDistribution(), a.ringPlan(), a.ringApply())
	return cmd
}

// vnodeDoc is a vnode in a document.
type vnodeDoc struct {
	Vnode        uint32    `json:"vnode"`
	FirstToken   string    `json:"first_token"`
	LastToken    string    `json:"last_token"`
	ChangedEpoch uint64    `json:"changed_epoch"`
	Slots        []slotDoc `json:"slots"`
}

type slotDoc struct {
	Node        string  `json:"node"`
	Incarnation uint64  `json:"incarnation"`
	Zone        string  `json:"zone"`
	Phase       string  `json:"phase"`
	Incoming    *string `json:"incoming,omitempty"`
}

func tokenText(t ring.Token) string { return fmt.Sprintf("%016x", uint64(t)) }

// vnodeDocOf describes a vnode with the first n of its slots.
func vnodeDocOf(t *topology.Topology, vnode uint32, n int) vnodeDoc {
	first, last := ring.Range(vnode, t.Vnodes)
	v := t.Ring[vnode]
	d := vnodeDoc{Vnode: vnode, FirstToken: tokenText(first), LastToken: tokenText(last), ChangedEpoch: v.ChangedEpoch, Slots: []slotDoc{}}
	for _, s := range v.Slots[:min(n, len(v.Slots))] {
		slot := slotDoc{Node: t.NodeName(s.Node), Incarnation: s.Node, Phase: s.Phase.String()}
		if node := t.Node(s.Node); node != nil {
			slot.Zone = node.Zone
		}
		if s.Incoming != 0 {
			slot.Incoming = ptr(t.NodeName(s.Incoming))
		}
		d.Slots = append(d.Slots, slot)
	}
	return d
}

// text is a slot in a table: its node, and where it moves.
func (s slotDoc) text() string {
	if s.Incoming != nil {
		return fmt.Sprintf("%s→%s (%s)", s.Node, *s.Incoming, s.Phase)
	}
	return s.Node
}

func (a *App) ringShow() *cobra.Command {
	return &cobra.Command{
		Use:     "show",
		Short:   "List the vnodes with their slots",
		Long:    "Lists the vnodes with their slots, in order. A namespace with N replicas uses the first N slots.",
		Example: "  kvctl ring show\n  kvctl ring show -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.formedTopology(cmd.Context())
			if err != nil {
				return err
			}
			docs := []vnodeDoc{}
			tab := newTable(">VNODE", "FIRST TOKEN", ">CHANGED", "SLOTS")
			for v := range t.Vnodes {
				d := vnodeDocOf(t, v, quorum.MaxN)
				docs = append(docs, d)
				slots := make([]string, len(d.Slots))
				for i, s := range d.Slots {
					slots[i] = s.text()
				}
				tab.add(v, d.FirstToken, topology.EpochString(d.ChangedEpoch), strings.Join(slots, "  "))
			}
			return a.print(docs, tab.write)
		},
	}
}

func (a *App) ringDescribe() *cobra.Command {
	f := &dataFlags{}
	cmd := &cobra.Command{
		Use:     "describe KEY",
		Short:   "Show where a key lives",
		Long:    "Shows a key's token and vnode, and the nodes that hold its replicas, with their health.\nThe key need not exist.",
		Example: "  kvctl ring describe greeting\n  kvctl ring describe greeting -n orders -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.status(cmd.Context())
			if err != nil {
				return err
			}
			if err := checkFormed(s.topology); err != nil {
				return err
			}
			ns := s.topology.Namespace(f.namespace)
			if ns == nil {
				return topologyRefusal(topology.ErrNamespaceNotFound(f.namespace))
			}
			return a.printPlace(s, ns, []byte(args[0]))
		},
	}
	f.addNamespace(cmd)
	return cmd
}

// placeDoc is where a key lives.
type placeDoc struct {
	keyDoc
	Namespace string `json:"namespace"`
	Token     string `json:"token"`
	vnodeDoc
}

func (a *App) printPlace(s *clusterStatus, ns *topology.Namespace, key []byte) error {
	t := s.topology
	vnode := t.VnodeOf(key)
	d := placeDoc{keyDoc: keyDocOf(key), Namespace: ns.Name, Token: tokenText(ring.TokenOf(key)), vnodeDoc: vnodeDocOf(t, vnode, ns.N)}
	return a.print(d, func(w io.Writer) {
		fields(w,
			"key", fmt.Sprintf("%s in namespace %s", quoted(key), ns.Name),
			"token", d.Token,
			"vnode", fmt.Sprintf("%d of %d: tokens %s to %s", vnode, t.Vnodes, d.FirstToken, d.LastToken),
			"replicas", fmt.Sprintf("N=%d, of which W=%s must have a write and R=%s answer a read", ns.N, quorumText(ns.W, ns.N), quorumText(ns.R, ns.N)),
		)
		fmt.Fprintln(w)
		tab := newTable(">SLOT", "NODE", "ZONE", "ADDRESS", "HEALTH", "PHASE")
		for i, slot := range d.Slots {
			tab.add(append([]any{i + 1, slot.Node, slot.Zone}, s.addressAndHealth(slot.Incarnation, slot.Phase)...)...)
			if incoming := t.Ring[vnode].Slots[i].Incoming; incoming != 0 {
				tab.add(append([]any{"", *slot.Incoming, t.Node(incoming).Zone}, s.addressAndHealth(incoming, "incoming")...)...)
			}
		}
		tab.write(w)
	})
}

func (s *clusterStatus) addressAndHealth(incarnation uint64, phase string) []any {
	for i := range s.nodes {
		if n := &s.nodes[i]; n.Incarnation == incarnation {
			return []any{n.Address, n.healthText(), phase}
		}
	}
	return []any{"-", "removed", phase}
}

// distributionDoc is how slots, and what they hold, are spread over nodes.
type distributionDoc struct {
	Nodes       []shareDoc   `json:"nodes"`
	Slots       int          `json:"slots"`
	Max         int          `json:"max"`
	Mean        float64      `json:"mean"`
	MaxOverMean float64      `json:"max_over_mean"`
	Imbalance   imbalanceDoc `json:"imbalance"`
}

// imbalanceDoc says of several measures how much more than the mean the fullest node
// has; null where no node said, or there is nothing.
type imbalanceDoc struct {
	Slots        *float64 `json:"slots"`
	Records      *float64 `json:"records"`
	Bytes        *float64 `json:"bytes"`
	OpsPerSecond *float64 `json:"operations_per_second"`
}

type shareDoc struct {
	Node        string  `json:"node"`
	Incarnation uint64  `json:"incarnation"`
	Zone        string  `json:"zone"`
	Slots       int     `json:"slots"`
	Share       float64 `json:"share"`
	// What follows is null for a node that does not say.
	Records      *uint64 `json:"records"`
	Bytes        *uint64 `json:"bytes"`
	OpsPerSecond *number `json:"operations_per_second"`
}

// distributionOf counts the slots of the data nodes, and what these hold. Spares, which
// have none, do not count for the mean.
func distributionOf(t *topology.Topology, uses ringUse) distributionDoc {
	d := distributionDoc{Nodes: []shareDoc{}}
	counts := t.SlotCounts(quorum.MaxN)
	for _, n := range counts {
		d.Slots += n
		d.Max = max(d.Max, n)
	}
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role == topology.Data {
			s := shareDoc{Node: n.Name, Incarnation: n.Incarnation, Zone: n.Zone, Slots: counts[n.Incarnation], Share: float64(counts[n.Incarnation]) / float64(d.Slots)}
			if u := uses[n.Incarnation]; u != nil {
				s.Records, s.Bytes, s.OpsPerSecond = &u.records, &u.bytes, ptr(number(u.perSecond))
			}
			d.Nodes = append(d.Nodes, s)
		}
	}
	slices.SortStableFunc(d.Nodes, func(a, b shareDoc) int { return cmp.Or(compareNames(a.Zone, b.Zone), compareNames(a.Node, b.Node)) })
	d.Mean = float64(d.Slots) / float64(len(counts))
	d.MaxOverMean = float64(d.Max) / d.Mean
	d.Imbalance = imbalanceDoc{
		Slots:        d.imbalance(func(s shareDoc) (float64, bool) { return float64(s.Slots), true }),
		Records:      d.imbalance(func(s shareDoc) (float64, bool) { return float64(deref(s.Records)), s.Records != nil }),
		Bytes:        d.imbalance(func(s shareDoc) (float64, bool) { return float64(deref(s.Bytes)), s.Bytes != nil }),
		OpsPerSecond: d.imbalance(func(s shareDoc) (float64, bool) { return float64(deref(s.OpsPerSecond)), s.OpsPerSecond != nil }),
	}
	return d
}

// deref is what p points to, or zero.
func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// imbalance is the maximum over the mean of a measure of the nodes with slots, nil where
// there is nothing to compare.
func (d distributionDoc) imbalance(of func(shareDoc) (float64, bool)) *float64 {
	sum, most, nodes := 0.0, 0.0, 0
	for _, n := range d.Nodes {
		if x, ok := of(n); ok && n.Slots > 0 {
			sum, most, nodes = sum+x, max(most, x), nodes+1
		}
	}
	ratio := most * float64(nodes) / sum
	if !(sum > 0) || math.IsInf(ratio, 0) || math.IsNaN(ratio) {
		return nil
	}
	return &ratio
}

func (a *App) ringDistribution() *cobra.Command {
	return &cobra.Command{
		Use:   "distribution",
		Short: "Show how evenly vnodes and data are spread over nodes",
		Long: `Shows how many vnode slots each data node has, about how many records and bytes it holds as
their replica (tombstones included), and how many operations a second it coordinates, as the
nodes say themselves. A vnode that repair has not read yet counts by its space on disk, which
is compressed. max/mean is how much more than its fair share the fullest node has:
1.00 is perfect. Spares have no slots and do not count for the mean.`,
		Example: "  kvctl ring distribution\n  kvctl ring distribution -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.formedTopology(cmd.Context())
			if err != nil {
				return err
			}
			uses, failed, err := a.uses(cmd.Context(), t)
			if err != nil {
				return err
			}
			for _, why := range failed {
				a.warn("%s", why)
			}
			d := distributionOf(t, uses)
			return a.print(d, d.write)
		},
	}
}

func (d distributionDoc) write(w io.Writer) {
	tab := newTable("NODE", "ZONE", ">SLOTS", ">SHARE", ">RECORDS", ">DATA", ">OPS/S", "")
	for _, n := range d.Nodes {
		bar := strings.Repeat("█", int(float64(n.Slots)/float64(d.Max)*barWidth+0.5))
		if n.Slots == 0 {
			bar = "spare"
		}
		records, data, ops := "-", "-", "-"
		if n.Records != nil {
			records, data, ops = countText(int64(*n.Records)), sizeText(*n.Bytes), rateText(float64(*n.OpsPerSecond))
		}
		tab.add(n.Node, n.Zone, n.Slots, fmt.Sprintf("%.1f%%", n.Share*100), records, data, ops, bar)
	}
	tab.write(w)
	fmt.Fprintf(w, "\n%s, mean %.1f, max %d, max/mean %.2f\n", plural(d.Slots, "slot"), d.Mean, d.Max, d.MaxOverMean)
	var also []string
	for _, m := range []struct {
		name string
		is   *float64
	}{{"records", d.Imbalance.Records}, {"data", d.Imbalance.Bytes}, {"operations", d.Imbalance.OpsPerSecond}} {
		if m.is != nil {
			also = append(also, fmt.Sprintf("of %s %.2f", m.name, *m.is))
		}
	}
	if len(also) > 0 {
		fmt.Fprintf(w, "max/mean %s\n", strings.Join(also, ", "))
	}
}
