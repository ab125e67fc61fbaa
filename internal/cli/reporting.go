package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func (a *App) reportingCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "reporting", Short: "Show the copies that reports are read from", Example: "  kvctl reporting status",
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "status",
		Short: "Show which copies are in sync, and how far behind others are",
		Long: `Shows, for each namespace and reporting node, how many copies of vnodes are in which state:

filling    is being filled for the first time
behind     gets every write, and no write waits for it
joining    writes wait for it already, while it is compared with what was written before
in sync    holds every acknowledged write
evicting   was told to answer no more; writes go on without it when its lease is over

BEHIND is how long ago all that was acknowledged by then was in every one of the node's copies
that are not in sync. LEASE is for how long the node may go on answering for those in sync without
word from the orchestrators. What happened lately is listed below.`,
		Example: `  kvctl reporting status
  kvctl reporting status -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.reportingStatus(cmd.Context()) },
	})
	return cmd
}

// copiesDoc is what a reporting node has of a namespace.
type copiesDoc struct {
	Namespace string `json:"namespace"`
	Policy    string `json:"policy"`
	Node      string `json:"node"`
	Healthy   bool   `json:"healthy"`
	// Copies counts vnodes by state.
	Copies  map[string]int `json:"copies"`
	InSync  bool           `json:"in_sync"`
	LeaseMs uint64         `json:"lease_ms"`
	// CompleteAt is when all that was acknowledged by then was in every copy; null where that
	// is not known of any moment, or all are in sync.
	CompleteAt *string `json:"complete_at"`
	// Since is the earliest epoch since which a copy is not in sync, 0 if all are.
	SinceEpoch uint64   `json:"since_epoch"`
	WaitsFor   []string `json:"waits_for"`

	behind time.Duration
}

// reportingHistory is how many changes are listed.
const reportingHistory = 15

func (a *App) reportingStatus(ctx context.Context) error {
	s, err := a.status(ctx)
	if err != nil {
		return err
	}
	changes, err := a.changes(ctx, &adminv1.ListChangesRequest{Subject: "reporting", Limit: reportingHistory})
	if err != nil {
		a.warn("the history is not available: %s", err)
	}
	doc := struct {
		Copies  []*copiesDoc `json:"copies"`
		Drained []string     `json:"drained"`
		History []changeDoc  `json:"history"`
	}{s.copies(time.Now()), s.drainedReporting(), []changeDoc{}}
	for _, c := range changes {
		doc.History = append(doc.History, changeDoc{c.GetEpoch(), time.UnixMilli(int64(c.GetAtMs())).UTC().Format(time.RFC3339Nano), c.GetWhat()})
	}
	return a.print(doc, func(w io.Writer) { writeCopies(w, s, doc.Copies, changes) })
}

// drainedReporting names the reporting nodes that people drained.
func (s *clusterStatus) drainedReporting() []string {
	out := []string{}
	for _, n := range s.nodes {
		if n.Role == topology.Reporting && s.drained(n.Incarnation) {
			out = append(out, n.Name)
		}
	}
	return out
}

// copies returns what reporting nodes have of each namespace.
func (s *clusterStatus) copies(now time.Time) []*copiesDoc {
	t := s.topology
	docs := []*copiesDoc{}
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		for _, n := range s.nodes {
			if d := copiesOf(t, ns, n, now); d != nil {
				docs = append(docs, d)
			}
		}
	}
	return docs
}

// copiesOf returns what a node has of a namespace, or nil if nothing.
func copiesOf(t *topology.Topology, ns *topology.Namespace, n observedNode, now time.Time) *copiesDoc {
	progress := map[uint32]*adminv1.CopyProgress{}
	for _, p := range n.status.GetCopies() {
		if p.GetNamespaceId() == ns.ID {
			progress[p.GetVnode()] = p
		}
	}
	d := &copiesDoc{
		Namespace: ns.Name, Policy: ns.Reporting.Policy.String(), Node: n.Name, Healthy: n.health == topologyv1.NodeHealth_STATE_HEALTHY,
		Copies: map[string]int{}, InSync: true, LeaseMs: n.status.GetLeaseMs(), WaitsFor: []string{},
	}
	oldest := now.UnixMilli()
	for v := range t.Vnodes {
		c, ok := t.Copy(v, ns.ID, n.Incarnation)
		if !ok {
			continue
		}
		d.Copies[c.State.String()]++
		if c.State == topology.InSync {
			continue
		}
		d.InSync = false
		if d.SinceEpoch == 0 || c.Since < d.SinceEpoch {
			d.SinceEpoch = c.Since
		}
		p := progress[v]
		oldest = min(oldest, int64(p.GetCompleteAtMs()))
		if why := p.GetWaitsFor(); why != "" && !slices.Contains(d.WaitsFor, why) && len(d.WaitsFor) < 3 {
			d.WaitsFor = append(d.WaitsFor, why)
		}
	}
	if len(d.Copies) == 0 {
		return nil
	}
	if !d.InSync && oldest > 0 {
		at := time.UnixMilli(oldest).UTC().Format(time.RFC3339Nano)
		d.CompleteAt, d.behind = &at, max(0, now.Sub(time.UnixMilli(oldest)))
	}
	return d
}

func writeCopies(w io.Writer, s *clusterStatus, docs []*copiesDoc, changes []*topologyv1.Change) {
	if len(docs) == 0 {
		fmt.Fprintln(w, s.noCopies())
	} else {
		t := newTable("NAMESPACE", "POLICY", "NODE", ">IN SYNC", ">OTHERS", ">BEHIND", ">LEASE", "STATE")
		for _, d := range docs {
			sum, states := 0, []string{}
			for state, n := range d.Copies {
				sum += n
				states = append(states, state)
			}
			synced := d.Copies[topology.InSync.String()]
			slices.SortFunc(states, func(x, y string) int { return -cmp.Compare(d.Copies[x], d.Copies[y]) })
			behind := "-"
			switch {
			case d.InSync:
			case d.CompleteAt == nil:
				behind = "unknown"
			default:
				behind = durationText(d.behind.Round(100 * time.Millisecond))
			}
			state := states[0]
			if !d.Healthy {
				state += ", unhealthy"
			}
			lease := "none"
			if d.LeaseMs > 0 {
				lease = durationText(time.Duration(d.LeaseMs) * time.Millisecond)
			}
			t.add(d.Namespace, d.Policy, d.Node, synced, sum-synced, behind, lease, state)
		}
		t.write(w)
		for _, d := range docs {
			for _, why := range d.WaitsFor {
				fmt.Fprintf(w, "\n%s on %s waits: %s\n", d.Namespace, d.Node, why)
			}
		}
	}
	for _, name := range s.drainedReporting() {
		fmt.Fprintf(w, "\n%s is drained: kvctl node drain %s --undo has it given copies again\n", name, name)
	}
	if len(changes) > 0 {
		fmt.Fprintln(w)
		t := newTable(">EPOCH", "WHEN", "WHAT")
		for _, c := range changes {
			t.add(topology.EpochString(c.GetEpoch()), time.UnixMilli(int64(c.GetAtMs())).UTC().Format(time.RFC3339), c.GetWhat())
		}
		t.write(w)
	}
}

// noCopies says why no reporting node has a copy.
func (s *clusterStatus) noCopies() string {
	nodes, wanted := 0, 0
	for _, n := range s.nodes {
		if n.Role == topology.Reporting {
			nodes++
		}
	}
	for _, ns := range s.topology.Namespaces {
		if ns.Reporting.Copies > 0 {
			wanted++
		}
	}
	switch {
	case wanted == 0:
		return "no namespace has copies for reports: kvctl namespace set NAME --reporting block|degrade|best_effort"
	case nodes == 0:
		return fmt.Sprintf("copies for reports are wanted by %s, and there is no reporting node: start one with kvnode --role reporting", plural(wanted, "namespace"))
	case nodes == len(s.drainedReporting()):
		return fmt.Sprintf("copies for reports are wanted by %s, and every reporting node is drained", plural(wanted, "namespace"))
	}
	return "no copy has been begun yet"
}
