package cli

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/capacity"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// simulateFlags are what rules are tried on.
type simulateFlags struct {
	curve      string
	perNode    float64
	peak       float64
	file       string
	nodes      int
	launch     time.Duration
	move       time.Duration
	skew       float64
	hotSpot    float64
	disk, data float64
	growth     float64
	vnodes     uint32
	n          int
	width      int
}

// ruleFlags are the flags that set a rule.
var ruleFlags = []struct{ flag, rule string }{
	{"min", "min_capacity"},
	{"max", "max_capacity"},
	{"target-cpu", "target_cpu_utilization"},
	{"target-disk", "target_disk_utilization"},
	{"scale-up-cooldown", "scale_up_cooldown"},
	{"scale-down-cooldown", "scale_down_cooldown"},
}

func (a *App) capacitySimulate() *cobra.Command {
	var f simulateFlags
	cmd := &cobra.Command{
		Use:   "simulate",
		Short: "Try scaling rules on a load curve",
		Long: `Replays a load curve against scaling rules and draws what they would do: load, nodes and CPU
over time, with each decision and its reason. Nothing is changed, and no cluster is needed.

The curve is a CSV file of seconds and load (any unit), or one of
` + strings.Join(capacity.Names(), ", ") + `, which are scaled so that the most load is --peak.
The rules are those of a file as kvctl config set -f takes it, with what the flags say instead;
those that are not given are the defaults.

The model is simple: load is spread over the nodes that serve, one of them has --skew times the
mean, and a node takes --launch-time to register and --move-time to join or leave.`,
		Example: `  kvctl capacity simulate --curve day --load-per-node 10000 --peak 80000
  kvctl capacity simulate --curve load.csv --load-per-node 10000 --min 3 --max 24
  kvctl capacity simulate -f rules.yaml --curve spike --load-per-node 10000
  kvctl capacity simulate --curve week --min 10 --max 1000 --load-per-node 1 --peak 800`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules, err := a.simulatedRules(cmd, f)
			if err != nil {
				return err
			}
			return a.simulateCapacity(rules, f)
		},
	}
	o := capacity.DefaultOptions(1)
	l := cmd.Flags()
	l.StringVar(&f.curve, "curve", "day", "CSV file of seconds and load, or "+strings.Join(capacity.Names(), ", "))
	l.Float64Var(&f.perNode, "load-per-node", 10000, "load that takes all CPU of a node, in the curve's unit")
	l.Float64Var(&f.peak, "peak", 0, "the most load of the curve, which is scaled to it (default: a file as it is, others 5 times --load-per-node)")
	l.StringVarP(&f.file, "file", "f", "", "YAML file with an auto_scaling_group, - for stdin")
	defaults := topology.Settings{AutoScalingGroup: topology.DefaultGroup()}.Values()
	for _, r := range ruleFlags {
		l.String(r.flag, defaults[groupSetting(r.rule)], r.rule)
	}
	l.IntVar(&f.nodes, "nodes", 0, "nodes at the start (default: as many as the load asks for)")
	l.DurationVar(&f.launch, "launch-time", o.LaunchTime, "until a launched node registers")
	l.DurationVar(&f.move, "move-time", o.MoveTime, "until it has joined the ring, or has left it")
	l.Float64Var(&f.skew, "skew", o.Skew, "what the most loaded node has over the mean, 1 or more")
	l.Float64Var(&f.hotSpot, "hot-spot", 0, "load that stays on one node, however many there are")
	l.Float64Var(&f.disk, "disk-bytes", o.DiskBytes, "size of a node's disk")
	l.Float64Var(&f.data, "data-bytes", 0, "what all nodes hold at the start, replicas counted")
	l.Float64Var(&f.growth, "growth-bytes", 0, "by how much that grows, a second")
	l.Uint32Var(&f.vnodes, "vnodes", 256, "vnodes of the ring, which bound max_capacity")
	l.IntVar(&f.n, "replicas", 3, "the largest N in use, which bounds min_capacity")
	l.IntVar(&f.width, "width", 80, "columns of the drawing, 40 or more")
	return cmd
}

// simulationDoc is a simulation as a document.
type simulationDoc struct {
	Rules   rulesDoc           `json:"auto_scaling_group"`
	Events  []scalingDoc       `json:"decisions"`
	Summary simulationSumDoc   `json:"summary"`
	Steps   []simulatedStepDoc `json:"steps"`
}

type scalingDoc struct {
	AtMs   int64  `json:"at_ms"`
	Action string `json:"action"`
	Before int    `json:"nodes_before"`
	After  int    `json:"nodes_after"`
	Why    string `json:"why"`
}

type simulationSumDoc struct {
	ScaleUps      int     `json:"scale_ups"`
	ScaleDowns    int     `json:"scale_downs"`
	Launched      int     `json:"launched"`
	Drained       int     `json:"drained"`
	LeastNodes    int     `json:"least_nodes"`
	MostNodes     int     `json:"most_nodes"`
	AboveTargetMs int64   `json:"above_target_ms"`
	MaxCPU        float64 `json:"max_cpu_utilization"`
	MaxDisk       float64 `json:"max_disk_utilization"`
	NodeHours     float64 `json:"node_hours"`
}

type simulatedStepDoc struct {
	AtMs  int64   `json:"at_ms"`
	Load  float64 `json:"load"`
	Nodes int     `json:"nodes"`
	CPU   float64 `json:"cpu_utilization"`
}

func (a *App) simulateCapacity(rules capacity.Rules, f simulateFlags) error {
	curve, err := f.load()
	if err != nil {
		return err
	}
	o := capacity.DefaultOptions(f.perNode)
	o.Nodes, o.LaunchTime, o.MoveTime, o.Skew, o.HotSpot = f.nodes, f.launch, f.move, f.skew, f.hotSpot
	o.DiskBytes, o.DataBytes, o.GrowthBytesPerSecond = f.disk, f.data, f.growth
	run, err := capacity.Simulate(rules, curve, o)
	if err != nil {
		return usageError{err}
	}
	return a.print(newSimulationDoc(run), func(w io.Writer) { fmt.Fprint(w, run.Draw(f.width)) })
}

func groupSetting(rule string) string { return topology.SettingGroup + "." + rule }

// simulatedRules returns what the file and the flags ask for, checked as the cluster would.
func (a *App) simulatedRules(cmd *cobra.Command, f simulateFlags) (capacity.Rules, error) {
	if f.vnodes < 1 || f.n < 1 {
		return capacity.Rules{}, usagef("--vnodes %d, --replicas %d: want 1 or more", f.vnodes, f.n)
	}
	values := map[string]string{groupSetting("min_capacity"): fmt.Sprint(topology.DefaultGroup().MinCapacity)}
	if f.file != "" {
		file, err := a.readSettings(f.file)
		if err != nil {
			return capacity.Rules{}, err
		}
		if file[topology.SettingGroup] == topology.NoGroup {
			return capacity.Rules{}, usagef("%s: there are no rules in it, as %s is %s", f.file, topology.SettingGroup, topology.NoGroup)
		}
		maps.Copy(values, file)
	}
	for _, r := range ruleFlags {
		if flag := cmd.Flags().Lookup(r.flag); flag.Changed {
			values[groupSetting(r.rule)] = flag.Value.String()
		}
	}
	settings, err := topology.DefaultSettings().With(values)
	if err != nil {
		return capacity.Rules{}, usageError{err}
	}
	rules := capacity.Rules(settings.AutoScalingGroup)
	if err := rules.ValidateFor(f.vnodes, f.n); err != nil {
		return rules, usageError{err}
	}
	return rules, nil
}

// load returns the curve that is asked for.
func (f *simulateFlags) load() (capacity.Curve, error) {
	if slices.Contains(capacity.Names(), f.curve) {
		curve, err := capacity.Named(f.curve)
		peak := f.peak
		if peak == 0 {
			peak = 5 * f.perNode
		}
		return curve.Scale(peak), err
	}
	file, err := os.Open(f.curve)
	if err != nil {
		return nil, usagef("--curve: %v; want a CSV file, or one of %s", err, strings.Join(capacity.Names(), ", "))
	}
	defer file.Close()
	curve, err := capacity.ParseCurve(file)
	if err != nil {
		return nil, usagef("--curve %s: %v", f.curve, err)
	}
	if f.peak > 0 {
		most := slices.MaxFunc(curve, func(a, b capacity.Point) int { return int(min(max(a.Load-b.Load, -1), 1)) }).Load
		if most > 0 {
			curve = curve.Scale(f.peak / most)
		}
	}
	return curve, nil
}

func newSimulationDoc(run *capacity.Run) *simulationDoc {
	r, s := run.Rules, run.Summary
	d := &simulationDoc{
		Rules:   rulesDoc{r.MinCapacity, r.MaxCapacity, r.TargetCPU, r.TargetDisk, r.TargetOperations, r.ScaleUpCooldown.Milliseconds(), r.ScaleDownCooldown.Milliseconds()},
		Events:  []scalingDoc{},
		Summary: simulationSumDoc{s.Ups, s.Downs, s.Launched, s.Drained, s.LeastNodes, s.MostNodes, s.AboveTarget.Milliseconds(), s.MaxCPU, s.MaxDisk, s.NodeHours},
	}
	for _, e := range run.Events {
		d.Events = append(d.Events, scalingDoc{e.At.Milliseconds(), e.Decision.Action.String(), e.Nodes, e.Decision.Desired, e.Decision.Why})
	}
	for _, s := range run.Steps {
		d.Steps = append(d.Steps, simulatedStepDoc{s.At.Milliseconds(), s.Load, s.Nodes, s.CPU})
	}
	return d
}
