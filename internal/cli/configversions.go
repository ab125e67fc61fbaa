package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// settingsVersions returns the versions of the settings that are kept, oldest first; there
// is one at least.
func (a *App) settingsVersions(ctx context.Context) ([]topology.SettingsVersion, error) {
	var resp *adminv1.ListSettingsResponse
	err := a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).ListSettings(ctx, &adminv1.ListSettingsRequest{})
		return err
	}})
	if err != nil {
		return nil, err
	}
	var out []topology.SettingsVersion
	for _, v := range resp.GetVersions() {
		out = append(out, topology.SettingsVersionFromProto(v))
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the orchestrators keep no settings")
	}
	return out, nil
}

// settingsVersionDoc is a version of the settings as a document.
type settingsVersionDoc struct {
	Version  uint64      `json:"version"`
	Epoch    uint64      `json:"epoch"`
	At       string      `json:"at"`
	What     string      `json:"what"`
	Settings settingsDoc `json:"settings"`
}

func (a *App) configHistory() *cobra.Command {
	return &cobra.Command{
		Use:   "history",
		Short: "Show how the settings came about",
		Long: `Shows the versions of the settings that are kept, about 100, oldest first. Where a node's
settings had to be corrected, kvctl events --subject settings shows it.`,
		Example: "  kvctl config history",
		RunE: func(cmd *cobra.Command, _ []string) error {
			versions, err := a.settingsVersions(cmd.Context())
			if err != nil {
				return err
			}
			docs := []settingsVersionDoc{}
			tab := newTable(">VERSION", ">EPOCH", "WHEN", "WHAT")
			for _, v := range versions {
				docs = append(docs, settingsVersionDoc{v.Settings.Version, v.Epoch, timeOf(v.AtMillis), v.What, settingsDocOf(v.Settings)})
				tab.add(v.Settings.Version, topology.EpochString(v.Epoch), time.UnixMilli(v.AtMillis).UTC().Format(time.RFC3339), v.What)
			}
			return a.print(docs, tab.write)
		},
	}
}

// settingsDiffDoc is what differs between two versions; that of a file has the number 0.
type settingsDiffDoc struct {
	From    uint64               `json:"from"`
	To      uint64               `json:"to"`
	Changes []changeOfSettingDoc `json:"changes"`
}

func (a *App) configDiff() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "diff [VERSION [VERSION]]",
		Short: "Show how settings differ",
		Long: `Shows how the settings in use differ from those of a version, or from the version before, or
two versions from each other. With --file it shows what setting a file would change.`,
		Example: `  kvctl config diff
  kvctl config diff 3
  kvctl config diff 3 5
  kvctl config diff -f rules.yaml`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if file != "" {
				if len(args) > 0 {
					return usagef("give versions, or --file, not both")
				}
				return a.diffFile(cmd.Context(), file)
			}
			return a.diffVersions(cmd.Context(), args)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "YAML file with settings; - for stdin")
	return cmd
}

func (a *App) diffFile(ctx context.Context, file string) error {
	values, err := a.settingValues(file, nil)
	if err != nil {
		return err
	}
	u, err := a.updateSettings(ctx, &adminv1.UpdateSettingsRequest{Values: values, DryRun: true})
	if err != nil {
		return err
	}
	return a.printDiff(u.before.Settings, u.after.Settings, u.before.Settings.Version, 0)
}

func (a *App) diffVersions(ctx context.Context, args []string) error {
	versions, err := a.settingsVersions(ctx)
	if err != nil {
		return err
	}
	last := len(versions) - 1
	from, to := versions[max(0, last-1)].Settings, versions[last].Settings
	for i, side := range []*topology.Settings{&from, &to}[:len(args)] {
		v, err := parseVersion(args[i])
		if err != nil {
			return err
		}
		found := false
		for _, kept := range versions {
			if kept.Settings.Version == v {
				*side, found = kept.Settings, true
			}
		}
		if !found {
			return missingError{"settings version", strconv.FormatUint(v, 10), nil}
		}
	}
	return a.printDiff(from, to, from.Version, to.Version)
}

func (a *App) printDiff(from, to topology.Settings, fromVersion, toVersion uint64) error {
	changes := topology.DiffSettings(from, to)
	return a.print(settingsDiffDoc{fromVersion, toVersion, settingChangeDocs(changes)}, func(w io.Writer) {
		name := fmt.Sprintf("version %d", toVersion)
		if toVersion == 0 {
			name = "the file"
		}
		if len(changes) == 0 {
			fmt.Fprintf(w, "version %d and %s do not differ\n", fromVersion, name)
			return
		}
		fmt.Fprintf(w, "from version %d to %s\n\n", fromVersion, name)
		writeSettingChanges(w, changes)
	})
}
