package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// settingsFlags are those of changes of the cluster's settings.
type settingsFlags struct {
	dryRun, wait bool
	ifVersion    uint64
}

func (f *settingsFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would change")
	cmd.Flags().BoolVar(&f.wait, "wait", true, "wait until the live nodes have the settings")
	cmd.Flags().Uint64Var(&f.ifVersion, "if-version", 0, "refuse unless the settings are at this version; 0 for whichever")
}

func (a *App) configSet() *cobra.Command {
	var f settingsFlags
	var file string
	cmd := &cobra.Command{
		Use:   "set KEY VALUE",
		Short: "Change settings, all together or none",
		Long: `Changes settings of the cluster, all together or none, and shows what changed. Keys are those of
kvctl config show; a YAML file has the same names, nested. Without an auto_scaling_group, setting
one of its keys makes one; auto_scaling_group none ends it.

Settings take effect without a restart. It then waits until all live nodes have them, 15 s at
most, and exits with 4 if some have not; the change is made all the same.`,
		Example: `  kvctl config set health_checks.interval 10s health_checks.timeout 2s
  kvctl config set auto_scaling_group.max_capacity 12
  kvctl config set auto_scaling_group none
  kvctl config set -f rules.yaml --dry-run`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case file != "" && len(args) > 0:
				return fmt.Errorf("give KEY and VALUE, or --file, not both")
			case file == "" && len(args) == 0:
				return fmt.Errorf("KEY and VALUE are missing: usage: %s", cmd.UseLine())
			case len(args)%2 == 1:
				return fmt.Errorf("VALUE is missing for %q: give pairs of KEY and VALUE", args[len(args)-1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := a.settingValues(file, args)
			if err != nil {
				return err
			}
			return a.changeSettings(cmd.Context(), &adminv1.UpdateSettingsRequest{Values: values}, f)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVarP(&file, "file", "f", "", "YAML file with the settings to change; - for stdin")
	return cmd
}

func (a *App) configRollback() *cobra.Command {
	var f settingsFlags
	cmd := &cobra.Command{
		Use:   "rollback VERSION",
		Short: "Set the settings of an earlier version again",
		Long: `Sets the settings of an earlier version again, as a new version. Which there are shows
kvctl config history.`,
		Example: "  kvctl config rollback 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			version, err := parseVersion(args[0])
			if err != nil {
				return err
			}
			return a.changeSettings(cmd.Context(), &adminv1.UpdateSettingsRequest{RollbackTo: version}, f)
		},
	}
	f.add(cmd)
	return cmd
}

func parseVersion(s string) (uint64, error) {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v == 0 {
		return 0, usagef("%q is no version of the settings: want a number from 1, see kvctl config history", s)
	}
	return v, nil
}

// settingValues returns the values to set by key, of a file or a command line.
func (a *App) settingValues(file string, args []string) (map[string]string, error) {
	values := map[string]string{}
	if file != "" {
		var err error
		if values, err = a.readSettings(file); err != nil {
			return nil, err
		}
	}
	for i := 0; i < len(args); i += 2 {
		if _, twice := values[args[i]]; twice {
			return nil, usagef("%s is given twice", args[i])
		}
		values[args[i]] = args[i+1]
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if of := processSettingOf(key); of != "" {
			return nil, usagef("%s is a setting of each process: change it in the configuration of %s and restart that", key, of)
		}
	}
	return values, nil
}

// settingsUpdated is the answer to a change of settings.
type settingsUpdated struct {
	before, after topology.SettingsVersion
	warnings      []string
}

// updateSettings asks for a change of settings.
func (a *App) updateSettings(ctx context.Context, r *adminv1.UpdateSettingsRequest) (settingsUpdated, error) {
	var resp *adminv1.UpdateSettingsResponse
	err := a.control(ctx, question{changes: !r.GetDryRun(), ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).UpdateSettings(ctx, r)
		return err
	}})
	return settingsUpdated{topology.SettingsVersionFromProto(resp.GetBefore()), topology.SettingsVersionFromProto(resp.GetAfter()), resp.GetWarnings()}, err
}

// settingsUpdateDoc is what became of a change of settings.
type settingsUpdateDoc struct {
	Version uint64 `json:"version"`
	// Epoch is 0 with dry_run.
	Epoch    uint64               `json:"epoch"`
	DryRun   bool                 `json:"dry_run"`
	Changes  []changeOfSettingDoc `json:"changes"`
	Warnings []string             `json:"warnings"`
	// Acknowledged are the nodes that have the settings, WaitingFor the live ones that have
	// not; both are empty where that was not waited for.
	Acknowledged []string     `json:"acknowledged"`
	WaitingFor   []waitingDoc `json:"waiting_for"`
}

type waitingDoc struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

func (a *App) changeSettings(ctx context.Context, r *adminv1.UpdateSettingsRequest, f settingsFlags) error {
	r.DryRun, r.IfVersion = f.dryRun, f.ifVersion
	u, err := a.updateSettings(ctx, r)
	if err != nil {
		return err
	}
	for _, w := range u.warnings {
		a.warn("%s", w)
	}
	changes := topology.DiffSettings(u.before.Settings, u.after.Settings)
	doc := settingsUpdateDoc{
		Version: u.after.Settings.Version, Epoch: u.after.Epoch, DryRun: f.dryRun, Changes: settingChangeDocs(changes),
		Warnings: append([]string{}, u.warnings...), Acknowledged: []string{}, WaitingFor: []waitingDoc{},
	}
	if f.wait && !f.dryRun && len(changes) > 0 {
		if doc.Acknowledged, doc.WaitingFor, err = a.awaitSettings(ctx, u.after); err != nil {
			a.warn("the settings are set, but who has them is not known: %s", err)
		}
	}
	if err := a.print(doc, func(w io.Writer) { doc.write(w, changes) }); err != nil {
		return err
	}
	if len(doc.WaitingFor) > 0 || err != nil {
		return exitCodeError(exitUnavailable)
	}
	return nil
}

func (d *settingsUpdateDoc) write(w io.Writer, changes []topology.SettingChange) {
	if len(changes) == 0 {
		fmt.Fprintf(w, "nothing changes: the settings are those of version %d\n", d.Version)
		return
	}
	writeSettingChanges(w, changes)
	if d.DryRun {
		fmt.Fprintf(w, "\nwould be version %d; nothing was changed\n", d.Version)
		return
	}
	fmt.Fprintf(w, "\nversion %d in epoch %s; nothing needs a restart\n", d.Version, topology.EpochString(d.Epoch))
	if len(d.Acknowledged) > 0 {
		fmt.Fprintf(w, "in use at %s\n", strings.Join(d.Acknowledged, ", "))
	}
	for _, n := range d.WaitingFor {
		fmt.Fprintf(w, "not yet at %s: %s\n", n.Name, n.Reason)
	}
}

const (
	// settleTimeout bounds how long nodes are waited for, settlePause is between two looks.
	settleTimeout = 15 * time.Second
	settlePause   = 100 * time.Millisecond
)

// awaitSettings waits until all live nodes have settings, and returns who has and who
// has not.
func (a *App) awaitSettings(ctx context.Context, v topology.SettingsVersion) (have []string, waiting []waitingDoc, err error) {
	deadline := time.Now().Add(cmp.Or(a.settle, settleTimeout))
	for {
		s, err := a.status(ctx)
		if err != nil {
			return []string{}, []waitingDoc{}, err
		}
		var late []*observedNode
		for i := range s.nodes {
			if n := &s.nodes[i]; settingsState(n, v) != followsSettings && n.down() == "" {
				late = append(late, n)
			}
		}
		if err := a.askNodes(ctx, late); err != nil {
			return []string{}, []waitingDoc{}, err
		}
		have, waiting = []string{}, []waitingDoc{}
		for i := range s.nodes {
			n := &s.nodes[i]
			switch state := settingsState(n, v); {
			case state == followsSettings:
				have = append(have, n.Name)
			case slices.Contains(late, n) && n.down() == "":
				waiting = append(waiting, waitingDoc{n.Name, settingsReason(n, state)})
			}
		}
		if len(waiting) == 0 || !time.Now().Before(deadline) {
			return have, waiting, nil
		}
		select {
		case <-ctx.Done():
			return have, waiting, nil
		case <-time.After(settlePause):
		}
	}
}
