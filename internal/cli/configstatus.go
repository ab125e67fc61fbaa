package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// What becomes of the cluster's settings at a process.
const (
	followsSettings = "follows"
	lagsSettings    = "lags"
	differsSettings = "differs"
	unknownSettings = "unknown"
)

// settingsState says whether a node uses a version of the settings. It has acknowledged
// them when it has taken in their epoch and says to use them.
func settingsState(n *observedNode, v topology.SettingsVersion) string {
	switch {
	case n.status.GetSettingsHash() == 0:
		return unknownSettings // it never answered, or its software is older
	case n.status.GetEpoch() < v.Epoch:
		return lagsSettings
	case n.status.GetSettingsHash() != v.Settings.Hash():
		return differsSettings
	}
	return followsSettings
}

// settingsReason says why a node does not use a version of the settings, or "".
func settingsReason(n *observedNode, state string) string {
	if why := n.down(); why != "" {
		return why
	}
	switch state {
	case unknownSettings:
		return "it does not say what it uses"
	case lagsSettings:
		return "it has taken in epoch " + topology.EpochString(n.status.GetEpoch())
	case differsSettings:
		return "it uses other settings: the orchestrators correct that"
	}
	return ""
}

// settingsStatusDoc is who uses which settings. Hashes are 16 hexadecimal digits.
type settingsStatusDoc struct {
	Version       uint64                    `json:"version"`
	Epoch         uint64                    `json:"epoch"`
	Hash          string                    `json:"hash"`
	Nodes         []nodeSettingsDoc         `json:"nodes"`
	Orchestrators []orchestratorSettingsDoc `json:"orchestrators"`
}

type nodeSettingsDoc struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation"`
	State       string `json:"state"`
	Reason      string `json:"reason"`
	// Version is 0 where the hash is that of none that is kept.
	Version uint64 `json:"version"`
	Epoch   uint64 `json:"epoch"`
	Hash    string `json:"hash"`
	// ProcessHash is equal where the processes are configured alike; ProcessDiffers tells
	// that most are not configured like this one.
	ProcessHash    string `json:"process_settings_hash"`
	ProcessDiffers bool   `json:"process_settings_differ"`
}

type orchestratorSettingsDoc struct {
	Name    string `json:"name"`
	State   string `json:"state"`
	Version uint64 `json:"version"`
	Epoch   uint64 `json:"epoch"`
	Hash    string `json:"hash"`
}

func (a *App) configStatus() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show which settings each process uses",
		Long: `Shows which version of the cluster's settings each process uses: follows, lags while it has not
taken it in, differs where its copy is another one, which the orchestrators correct, or unknown.
PROCESS is a hash of what a node's own configuration has in common with others': nodes that are
configured alike have the same.`,
		Example: "  kvctl config status",
		RunE: func(cmd *cobra.Command, _ []string) error {
			doc, err := a.settingsStatus(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(doc, doc.write)
		},
	}
}

func (a *App) settingsStatus(ctx context.Context) (*settingsStatusDoc, error) {
	s, err := a.status(ctx)
	if err != nil {
		return nil, err
	}
	versions := []topology.SettingsVersion{{Settings: s.topology.Settings}}
	if s.controlled {
		if versions, err = a.settingsVersions(ctx); err != nil {
			return nil, err
		}
	}
	var nodes []*observedNode
	for i := range s.nodes {
		nodes = append(nodes, &s.nodes[i])
	}
	if err := a.askNodes(ctx, nodes); err != nil { // what the orchestrators know may be old
		return nil, err
	}
	use := versions[len(versions)-1]
	doc := &settingsStatusDoc{
		Version: use.Settings.Version, Epoch: use.Epoch, Hash: hashText(use.Settings.Hash()),
		Nodes: []nodeSettingsDoc{}, Orchestrators: []orchestratorSettingsDoc{},
	}
	usual := usualProcess(nodes)
	for _, n := range nodes {
		state, process := settingsState(n, use), n.status.GetProcessSettingsHash()
		d := nodeSettingsDoc{
			Name: n.Name, Incarnation: n.Incarnation, State: state, Reason: settingsReason(n, state), Epoch: n.status.GetEpoch(),
			Hash: hashText(n.status.GetSettingsHash()), ProcessHash: hashText(process), ProcessDiffers: process != 0 && process != usual,
		}
		for _, v := range versions {
			if v.Settings.Hash() == n.status.GetSettingsHash() {
				d.Version = v.Settings.Version
			}
		}
		doc.Nodes = append(doc.Nodes, d)
	}
	for _, o := range s.orchestrators {
		d := orchestratorSettingsDoc{Name: o.GetName(), State: unknownSettings, Epoch: o.GetStatus().GetEpoch()}
		if o.GetReachable() {
			d.State = lagsSettings
			for _, v := range versions { // the last that it has applied
				if v.Epoch <= d.Epoch {
					d.Version, d.Hash = v.Settings.Version, hashText(v.Settings.Hash())
				}
			}
			if d.Version == use.Settings.Version {
				d.State = followsSettings
			}
		}
		doc.Orchestrators = append(doc.Orchestrators, d)
	}
	return doc, nil
}

// usualProcess returns the hash of the process settings that most nodes have; of several
// that as many have, that of the first node.
func usualProcess(nodes []*observedNode) (usual uint64) {
	count := map[uint64]int{}
	for _, n := range nodes {
		if h := n.status.GetProcessSettingsHash(); h != 0 {
			count[h]++
		}
	}
	for _, n := range nodes {
		if h := n.status.GetProcessSettingsHash(); count[h] > count[usual] {
			usual = h
		}
	}
	return usual
}

// hashText writes a hash; "" is one that is not known.
func hashText(h uint64) string {
	if h == 0 {
		return ""
	}
	return fmt.Sprintf("%016x", h)
}

func (d *settingsStatusDoc) write(w io.Writer) {
	fmt.Fprintf(w, "settings are at version %d, hash %s\n\n", d.Version, d.Hash)
	version := func(v uint64) string {
		if v == 0 {
			return "-"
		}
		return fmt.Sprint(v)
	}
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	tab := newTable("NAME", ">VERSION", "HASH", "STATE", "PROCESS", "NOTE")
	for _, n := range d.Nodes {
		note := n.Reason
		if n.ProcessDiffers {
			if note != "" {
				note += "; "
			}
			note += "its process is configured unlike most"
		}
		tab.add(n.Name, version(n.Version), dash(n.Hash), n.State, dash(n.ProcessHash), note)
	}
	for _, o := range d.Orchestrators {
		tab.add(o.Name, version(o.Version), dash(o.Hash), o.State, "-", "")
	}
	tab.write(w)
}
