package cli

import (
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// settingsDoc is the cluster's settings as a document.
type settingsDoc struct {
	Version        uint64          `json:"version"`
	HealthChecks   healthChecksDoc `json:"health_checks"`
	MaxKeyBytes    int             `json:"max_key_bytes"`
	MaxValueBytes  int             `json:"max_value_bytes"`
	MaxBatchBytes  int             `json:"max_batch_bytes"`
	MaxHintBytes   int64           `json:"max_hint_bytes"`
	MaxHints       int64           `json:"max_hints"`
	MaxHintAgeMs   int64           `json:"max_hint_age_ms"`
	ReplaceAfterMs int64           `json:"replace_after_ms"`
	// AutoScalingGroup is null where there is none.
	AutoScalingGroup *groupDoc    `json:"auto_scaling_group"`
	Join             string       `json:"join"`
	Placement        string       `json:"placement"`
	Rebalance        rebalanceDoc `json:"rebalance"`
}

type healthChecksDoc struct {
	IntervalMs         int64 `json:"interval_ms"`
	TimeoutMs          int64 `json:"timeout_ms"`
	HealthyThreshold   int   `json:"healthy_threshold"`
	UnhealthyThreshold int   `json:"unhealthy_threshold"`
}

// groupDoc is an auto-scaling group. Utilizations are 0 to 1; a target of 0 is not looked at.
type groupDoc struct {
	MinCapacity           int     `json:"min_capacity"`
	MaxCapacity           int     `json:"max_capacity"`
	TargetCPUUtilization  float64 `json:"target_cpu_utilization"`
	TargetDiskUtilization float64 `json:"target_disk_utilization"`
	TargetOperations      float64 `json:"target_operations"`
	ScaleUpCooldownMs     int64   `json:"scale_up_cooldown_ms"`
	ScaleDownCooldownMs   int64   `json:"scale_down_cooldown_ms"`
}

type rebalanceDoc struct {
	Policy              string  `json:"policy"`
	Threshold           float64 `json:"threshold"`
	QuietCPUUtilization float64 `json:"quiet_cpu_utilization"`
	CooldownMs          int64   `json:"cooldown_ms"`
}

func settingsDocOf(s topology.Settings) settingsDoc {
	h, r := s.HealthChecks, s.Rebalance
	doc := settingsDoc{
		Version:      s.Version,
		HealthChecks: healthChecksDoc{h.Interval.Milliseconds(), h.Timeout.Milliseconds(), h.HealthyThreshold, h.UnhealthyThreshold},
		MaxKeyBytes:  topology.MaxKeyBytes, MaxValueBytes: s.MaxValueBytes, MaxBatchBytes: s.MaxBatchBytes,
		MaxHintBytes: s.MaxHintBytes, MaxHints: s.MaxHints, MaxHintAgeMs: s.MaxHintAge.Milliseconds(),
		ReplaceAfterMs: s.ReplaceAfter.Milliseconds(), Join: s.Join.String(), Placement: s.Placement,
		Rebalance: rebalanceDoc{r.Policy.String(), r.Threshold, r.QuietCPU, r.Cooldown.Milliseconds()},
	}
	if g := s.AutoScalingGroup; g.On() {
		doc.AutoScalingGroup = &groupDoc{g.MinCapacity, g.MaxCapacity, g.TargetCPU, g.TargetDisk, g.TargetOperations, g.ScaleUpCooldown.Milliseconds(), g.ScaleDownCooldown.Milliseconds()}
	}
	return doc
}

func (a *App) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Show and change the cluster's settings",
		Long: `Shows and changes the settings that the cluster agrees on. They take effect without a restart,
travel with the topology, and are kept in versions. Those of one process are its own: see
kvnode config and kvorch config.`,
		Example: `  kvctl config show
  kvctl config set replace_after 5m
  kvctl config set -f rules.yaml --dry-run
  kvctl config rollback 3`,
	}
	cmd.AddCommand(a.configShow(), a.configSet(), a.configDiff(), a.configHistory(), a.configRollback(), a.configStatus())
	return cmd
}

func (a *App) configShow() *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Show the cluster's settings", Example: "  kvctl config show -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.topology(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(settingsDocOf(t.Settings), func(w io.Writer) { settingsTable(t.Settings).write(w) })
		},
	}
}

func settingsTable(s topology.Settings) *table {
	tab := newTable("SETTING", ">VALUE", "MEANING")
	group := false
	for _, k := range topology.SettingKeys() {
		value := k.Get(s)
		switch {
		case k.Name == "max_value_bytes":
			tab.add("max_key_bytes", "4KiB", "largest key; fixed")
		case value == topology.NoGroup && group:
			continue
		case value == topology.NoGroup:
			tab.add(topology.SettingGroup, value, "how many data nodes there are, and when that changes by itself")
			group = true
			continue
		}
		tab.add(k.Name, value, k.Help)
	}
	return tab
}

// changeOfSettingDoc is a setting before and after a change, as it is written.
type changeOfSettingDoc struct {
	Key    string `json:"key"`
	From   string `json:"from"`
	To     string `json:"to"`
	Effect string `json:"takes_effect"`
}

func settingChangeDocs(changes []topology.SettingChange) []changeOfSettingDoc {
	out := []changeOfSettingDoc{}
	for _, c := range changes {
		out = append(out, changeOfSettingDoc{c.Name, c.From, c.To, c.Effect})
	}
	return out
}

// writeSettingChanges writes what differs for people.
func writeSettingChanges(w io.Writer, changes []topology.SettingChange) {
	tab := newTable("SETTING", ">FROM", ">TO", "TAKES EFFECT")
	for _, c := range changes {
		tab.add(c.Name, c.From, c.To, c.Effect)
	}
	tab.write(w)
}

// timeOf is a time in milliseconds since 1970, as documents have it.
func timeOf(millis int64) string { return time.UnixMilli(millis).UTC().Format(time.RFC3339Nano) }
