package cli

import (
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// settingsDoc is the cluster's settings as a document.
type settingsDoc struct {
	HealthChecks  healthChecksDoc `json:"health_checks"`
	MaxKeyBytes   int             `json:"max_key_bytes"`
	MaxValueBytes int             `json:"max_value_bytes"`
	MaxBatchBytes int             `json:"max_batch_bytes"`
	MaxHintBytes  int64           `json:"max_hint_bytes"`
	MaxHints      int64           `json:"max_hints"`
	MaxHintAgeMs  int64           `json:"max_hint_age_ms"`
}

type healthChecksDoc struct {
	IntervalMs         int64 `json:"interval_ms"`
	TimeoutMs          int64 `json:"timeout_ms"`
	HealthyThreshold   int   `json:"healthy_threshold"`
	UnhealthyThreshold int   `json:"unhealthy_threshold"`
}

func settingsDocOf(s topology.Settings) settingsDoc {
	h := s.HealthChecks
	return settingsDoc{
		HealthChecks: healthChecksDoc{h.Interval.Milliseconds(), h.Timeout.Milliseconds(), h.HealthyThreshold, h.UnhealthyThreshold},
		MaxKeyBytes:  topology.MaxKeyBytes, MaxValueBytes: s.MaxValueBytes, MaxBatchBytes: s.MaxBatchBytes,
		MaxHintBytes: s.MaxHintBytes, MaxHints: s.MaxHints, MaxHintAgeMs: s.MaxHintAge.Milliseconds(),
	}
}

func (a *App) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Show the cluster's settings",
		Long: `Shows the settings that the cluster agrees on. Those of one process are its own: see
kvnode config and kvorch config.`,
		Example: "  kvctl config show",
	}
	cmd.AddCommand(&cobra.Command{
		Use: "show", Short: "Show the cluster's settings", Example: "  kvctl config show -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.topology(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(settingsDocOf(t.Settings), func(w io.Writer) { settingsTable(t.Settings).write(w) })
		},
	})
	return cmd
}

func settingsTable(s topology.Settings) *table {
	h := s.HealthChecks
	tab := newTable("SETTING", ">VALUE", "MEANING")
	tab.add("health_checks.interval", durationText(h.Interval), "between two probes of a node")
	tab.add("health_checks.timeout", durationText(h.Timeout), "how long a probe may take")
	tab.add("health_checks.healthy_threshold", strconv.Itoa(h.HealthyThreshold), "good probes in a row until a node is healthy")
	tab.add("health_checks.unhealthy_threshold", strconv.Itoa(h.UnhealthyThreshold), "failed probes in a row until it is unhealthy")
	tab.add("max_key_bytes", sizeText(topology.MaxKeyBytes), "largest key; fixed")
	tab.add("max_value_bytes", sizeText(uint64(s.MaxValueBytes)), "largest value")
	tab.add("max_batch_bytes", sizeText(uint64(s.MaxBatchBytes)), "largest batch, keys and values")
	tab.add("max_hint_bytes", sizeText(uint64(s.MaxHintBytes)), "hints that a node keeps for all others")
	tab.add("max_hints", countText(s.MaxHints), "how many of them it keeps")
	tab.add("max_hint_age", durationText(s.MaxHintAge), "how long it keeps one")
	return tab
}
