package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/capacity"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func (a *App) capacityCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "capacity",
		Short: "Show how many nodes there are to be, and why",
		Long: `Shows what the orchestrators make of the number of nodes: what they see, what they want, why,
and what they wait for. They keep it between min_capacity and max_capacity of the setting
auto_scaling_group, by the load that nodes report; without it, they leave it alone.`,
		Example: `  kvctl capacity status
  kvctl capacity explain
  kvctl capacity simulate --curve day --load-per-node 10000 --peak 80000`,
	}
	cmd.AddCommand(&cobra.Command{
		Use: "status", Short: "Show the nodes as capacity is judged by them",
		Long:    "Shows the rules, the nodes with their load, and those that are being launched.",
		Example: "  kvctl capacity status\n  kvctl capacity status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.showCapacity(cmd.Context(), (*capacityDoc).writeStatus)
		},
	}, &cobra.Command{
		Use: "explain", Short: "Say what is wanted, why, and what it waits for",
		Long:    "Says how many nodes are wanted, which load asks for them, and what keeps them from coming or going.",
		Example: "  kvctl capacity explain\n  kvctl capacity explain -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.showCapacity(cmd.Context(), (*capacityDoc).writeExplanation)
		},
	}, a.capacityHistory(), a.capacitySimulate())
	return cmd
}

// capacityDoc is what the leader last thought of the number of nodes.
type capacityDoc struct {
	Provisioner string `json:"provisioner"`
	// Rules are null where nobody but people changes the number of nodes.
	Rules *rulesDoc `json:"auto_scaling_group"`
	// LookedAt is null before it looked.
	LookedAt     *string             `json:"looked_at"`
	Nodes        []capacityNodeDoc   `json:"nodes"`
	Launching    []launchDoc         `json:"launching"`
	Change       int32               `json:"change"`
	Desired      uint32              `json:"desired"`
	Why          string              `json:"why"`
	Waits        []string            `json:"waits"`
	Signals      []capacitySignalDoc `json:"signals"`
	ScaledUpAt   *string             `json:"scaled_up_at"`
	ScaledDownAt *string             `json:"scaled_down_at"`
}

type rulesDoc struct {
	MinCapacity         int     `json:"min_capacity"`
	MaxCapacity         int     `json:"max_capacity"`
	TargetCPU           float64 `json:"target_cpu_utilization"`
	TargetDisk          float64 `json:"target_disk_utilization"`
	TargetOperations    float64 `json:"target_operations"`
	ScaleUpCooldownMs   int64   `json:"scale_up_cooldown_ms"`
	ScaleDownCooldownMs int64   `json:"scale_down_cooldown_ms"`
}

type capacityNodeDoc struct {
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"`
	Zone        string `json:"zone"`
	// State is member, spare or leaving.
	State string `json:"state"`
	// Known: the rest means nothing otherwise.
	Known          bool    `json:"known"`
	CPU            float64 `json:"cpu_utilization"`
	DiskUsedBytes  uint64  `json:"disk_used_bytes"`
	DiskTotalBytes uint64  `json:"disk_total_bytes"`
	Operations     float64 `json:"operations"`
}

type launchDoc struct {
	Node     string `json:"node"`
	Zone     string `json:"zone"`
	State    string `json:"state"`
	Why      string `json:"why"`
	AskedAt  string `json:"asked_at"`
	Failures uint32 `json:"failures"`
	Problem  string `json:"problem"`
}

type capacitySignalDoc struct {
	Name      string  `json:"name"`
	Mean      float64 `json:"mean"`
	Peak      float64 `json:"peak"`
	PeakNode  string  `json:"peak_node"`
	Target    float64 `json:"target"`
	PeakLimit float64 `json:"peak_limit"`
	Wants     uint32  `json:"wants"`
	Enough    uint32  `json:"enough"`
	HotSpot   bool    `json:"hot_spot"`
}

func (a *App) showCapacity(ctx context.Context, people func(*capacityDoc, io.Writer)) error {
	t, err := a.topology(ctx)
	if err != nil {
		return err
	}
	var resp *adminv1.GetCapacityResponse
	err = a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).GetCapacity(ctx, &adminv1.GetCapacityRequest{})
		return err
	}})
	if err != nil {
		return err
	}
	d := newCapacityDoc(t, resp)
	return a.print(d, func(w io.Writer) { people(d, w) })
}

func newCapacityDoc(t *topology.Topology, resp *adminv1.GetCapacityResponse) *capacityDoc {
	d := &capacityDoc{
		Provisioner: resp.GetProvisioner(), LookedAt: momentOf(resp.GetLookedMs()), Nodes: []capacityNodeDoc{}, Launching: []launchDoc{},
		Change: resp.GetChange(), Desired: resp.GetDesired(), Why: resp.GetWhy(), Waits: append([]string{}, resp.GetWaits()...), Signals: []capacitySignalDoc{},
		ScaledUpAt: momentOf(resp.GetScaledUpMs()), ScaledDownAt: momentOf(resp.GetScaledDownMs()),
	}
	if g := resp.GetSettings().GetAutoScalingGroup(); g.GetMaxCapacity() > 0 {
		d.Rules = &rulesDoc{
			int(g.GetMinCapacity()), int(g.GetMaxCapacity()), g.GetTargetCpuUtilization(), g.GetTargetDiskUtilization(), g.GetTargetOperations(),
			int64(g.GetScaleUpCooldownMs()), int64(g.GetScaleDownCooldownMs()),
		}
	}
	for _, n := range resp.GetNodes() {
		state := "spare"
		switch {
		case n.GetLeaving():
			state = "leaving"
		case n.GetMember():
			state = "member"
		}
		zone := ""
		if node := t.Node(n.GetIncarnation()); node != nil {
			zone = node.Zone
		}
		d.Nodes = append(d.Nodes, capacityNodeDoc{
			t.NodeName(n.GetIncarnation()), n.GetIncarnation(), zone, state, n.GetKnown(), n.GetCpuUtilization(), n.GetDiskUsedBytes(), n.GetDiskTotalBytes(), n.GetOperations(),
		})
	}
	for _, p := range resp.GetLaunching() {
		d.Launching = append(d.Launching, launchDoc{
			p.GetNode(), p.GetZone(), topology.ProvisionState(p.GetState()).String(), p.GetWhy(), *momentOf(p.GetAtMs()), p.GetFailures(), p.GetProblem(),
		})
	}
	for _, s := range resp.GetSignals() {
		node := ""
		if s.GetPeakNode() != 0 {
			node = t.NodeName(s.GetPeakNode())
		}
		d.Signals = append(d.Signals, capacitySignalDoc{s.GetName(), s.GetMean(), s.GetPeak(), node, s.GetTarget(), s.GetPeakLimit(), s.GetWants(), s.GetEnough(), s.GetHotSpot()})
	}
	return d
}

// momentOf writes a time in milliseconds since 1970, 0 as null.
func momentOf(ms uint64) *string {
	if ms == 0 {
		return nil
	}
	at := time.UnixMilli(int64(ms)).UTC().Format(time.RFC3339Nano)
	return &at
}

// rules are those of a document.
func (d *rulesDoc) rules() capacity.Rules {
	return capacity.Rules{
		MinCapacity: d.MinCapacity, MaxCapacity: d.MaxCapacity, TargetCPU: d.TargetCPU, TargetDisk: d.TargetDisk, TargetOperations: d.TargetOperations,
		ScaleUpCooldown:   time.Duration(d.ScaleUpCooldownMs) * time.Millisecond,
		ScaleDownCooldown: time.Duration(d.ScaleDownCooldownMs) * time.Millisecond,
	}
}

const noRules = "no auto_scaling_group is set, so nobody but people changes the number of nodes; set one with: kvctl config set -f rules.yaml"

func (d *capacityDoc) writeStatus(w io.Writer) {
	if d.Rules == nil {
		fmt.Fprintln(w, noRules)
		return
	}
	fields(w, "rules", d.Rules.rules().String(), "provisioner", d.provisioner(), "nodes wanted", fmt.Sprint(d.Desired),
		"last scale-up", whenText(d.ScaledUpAt), "last scale-down", whenText(d.ScaledDownAt))
	t := newTable("NODE", "ZONE", "STATE", ">CPU", ">DISK", ">OPS/S")
	for _, n := range d.Nodes {
		if !n.Known {
			t.add(n.Node, n.Zone, n.State, "unknown", "unknown", "unknown")
			continue
		}
		t.add(n.Node, n.Zone, n.State, fmt.Sprintf("%.0f%%", 100*n.CPU), fmt.Sprintf("%.0f%%", 100*float64(n.DiskUsedBytes)/float64(max(n.DiskTotalBytes, 1))), fmt.Sprintf("%.0f", n.Operations))
	}
	for _, l := range d.Launching {
		t.add(l.Node, l.Zone, "launching: "+l.State, "", "", "")
	}
	fmt.Fprintln(w)
	t.write(w)
}

// whenText writes a moment that may never have been.
func whenText(moment *string) string {
	if moment == nil {
		return "never"
	}
	return *moment
}

// provisioner says who launches nodes.
func (d *capacityDoc) provisioner() string {
	if d.Provisioner == "recommend" {
		return "recommend: nobody launches or ends nodes but people"
	}
	return d.Provisioner
}

func (d *capacityDoc) writeExplanation(w io.Writer) {
	switch {
	case d.Rules == nil:
		fmt.Fprintln(w, noRules)
		return
	case d.LookedAt == nil:
		fmt.Fprintln(w, "the leader has not looked at the nodes yet: it was elected a moment ago, or does not know the health of all of them")
		return
	}
	fmt.Fprintln(w, d.Why)
	switch {
	case d.Change == 0:
	case d.Provisioner == "recommend" && d.Change > 0:
		fmt.Fprintf(w, "recommended: add %s, %d in all\n", plural(int(d.Change), "node"), d.Desired)
	case d.Provisioner == "recommend":
		fmt.Fprintf(w, "recommended: take %s out, and leave %d\n", plural(int(-d.Change), "node"), d.Desired)
	case d.Change > 0:
		fmt.Fprintf(w, "it asks for %s more, %d in all\n", plural(int(d.Change), "node"), d.Desired)
	default:
		fmt.Fprintf(w, "it takes %s out, and leaves %d\n", plural(int(-d.Change), "node"), d.Desired)
	}
	for _, wait := range d.Waits {
		fmt.Fprintf(w, "it waits: %s\n", wait)
	}
	for _, l := range d.Launching {
		fmt.Fprintf(w, "%s is %s in zone %s since %s: %s\n", l.Node, l.State, l.Zone, l.AskedAt, l.Why)
		if l.Problem != "" {
			fmt.Fprintf(w, "  the provisioner failed %s, last: %s\n", plural(int(l.Failures), "time"), l.Problem)
		}
	}
	t := newTable("LOAD", ">MEAN", ">MOST", "OF", ">TARGET", ">NODES AT TARGET", ">ENOUGH")
	for _, s := range d.Signals {
		target := "none"
		if s.Target > 0 {
			target = loadText(s.Name, s.Target)
		}
		of := s.PeakNode
		if s.HotSpot {
			of += " (a hot spot)"
		}
		t.add(s.Name, loadText(s.Name, s.Mean), loadText(s.Name, s.Peak), of, target, s.Wants, s.Enough)
	}
	fmt.Fprintln(w)
	t.write(w)
}

// loadText writes a value of a signal.
func loadText(signal string, v float64) string {
	switch signal {
	case capacity.Operations:
		return fmt.Sprintf("%.0f/s", v)
	case capacity.TimeToFull:
		return (time.Duration(min(v, 1e9)) * time.Second).String()
	}
	return fmt.Sprintf("%.0f%%", 100*v)
}

// capacitySubjects are the events that tell what became of the number of nodes.
var capacitySubjects = []string{"capacity", "provision", "recovery", "rebalance"}

func (a *App) capacityHistory() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use: "history", Short: "Show what was decided, and what came of it",
		Long: `Shows decisions on the number of nodes, replacements of dead ones, what the provisioner was
asked for and what came of it, and rebalancing, oldest first. kvctl events shows it among all else.`,
		Example: "  kvctl capacity history\n  kvctl capacity history --limit 0 -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 0 {
				return usagef("--limit %d: want 0 (all) or more", limit)
			}
			all, err := a.changes(cmd.Context(), &adminv1.ListChangesRequest{})
			if err != nil {
				return err
			}
			return a.printEvents(of(all, capacitySubjects), limit)
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 50, "the newest so many; 0 for all that are kept")
	return cmd
}

// of returns the changes about some subjects.
func of(all []*topologyv1.Change, subjects []string) (out []*topologyv1.Change) {
	for _, c := range all {
		for _, s := range subjects {
			if c.GetSubject() == s {
				out = append(out, c)
			}
		}
	}
	return out
}
