package cli

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// maxSettingsFile bounds a file of settings.
const maxSettingsFile = 1 << 20

// readSettings reads a YAML file of settings; - is stdin.
func (a *App) readSettings(path string) (map[string]string, error) {
	in, name := a.Stdin, "stdin"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, usageError{err}
		}
		defer f.Close()
		in, name = f, path
	}
	b, err := io.ReadAll(io.LimitReader(in, maxSettingsFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxSettingsFile {
		return nil, usagef("%s: a file of settings has 1 MiB at most", name)
	}
	values, err := parseSettings(b)
	if err != nil {
		return nil, usagef("%s: %w", name, err)
	}
	return values, nil
}

// parseSettings reads settings in YAML: nested as in the first configuration of an
// orchestrator, or with dots. The values are texts, for the cluster to judge.
func parseSettings(b []byte) (map[string]string, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	values := map[string]string{}
	if len(doc.Content) > 0 {
		if err := flatten(doc.Content[0], "", values); err != nil {
			return nil, err
		}
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("there are no settings in it")
	}
	return values, nil
}

// flatten adds what is below a YAML node, names joined by dots.
func flatten(n *yaml.Node, name string, values map[string]string) error {
	switch {
	case n.Kind == yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := n.Content[i].Value
			if name != "" {
				key = name + "." + key
			}
			if err := flatten(n.Content[i+1], key, values); err != nil {
				return err
			}
		}
		return nil
	case n.Kind != yaml.ScalarNode || name == "":
		return fmt.Errorf("line %d: want names with values", n.Line)
	case n.Tag == "!!null" && name != topology.SettingGroup:
		return fmt.Errorf("line %d: %s has no value", n.Line, name)
	}
	if _, twice := values[name]; twice {
		return fmt.Errorf("line %d: %s is there twice", n.Line, name)
	}
	values[name] = n.Value
	if n.Tag == "!!null" {
		values[name] = topology.NoGroup
	}
	return nil
}

// The settings of processes, which are none of the cluster's. They are repeated here, and
// compared with the real ones in a test, because kvctl must not be linked with storage and
// consensus. What is under a name that ends in a dot belongs to it.
var (
	nodeSettings = []string{
		"name", "zone", "role", "data_dir", "orchestrators", "listen", "admin_listen", "gossip_listen", "advertise", "admin_advertise", "gossip_advertise",
		"cache_bytes", "record_cache_bytes", "memtable_bytes", "cpu_limit", "min_free_disk_bytes", "scrub_cycle", "scrub_bytes_per_second",
		"move_bytes_per_second", "move_commit_delay", "drain_timeout", "disk_stall_after", "tls.", "gossip_key", "log.",
	}
	orchestratorSettings = []string{
		"name", "data_dir", "listen", "admin_listen", "gossip_listen", "raft_listen", "peers", "bootstrap.", "recover", "election_timeout", "provisioner.", "tls.", "gossip_key", "log.",
	}
)

// processSettingOf returns which processes have a setting of their own, or "".
func processSettingOf(key string) string {
	has := func(names []string) bool {
		return slices.ContainsFunc(names, func(n string) bool {
			return n == key || strings.HasSuffix(n, ".") && strings.HasPrefix(key+".", n)
		})
	}
	switch n, o := has(nodeSettings), has(orchestratorSettings); {
	case n && o:
		return "kvnode or kvorch"
	case n:
		return "kvnode"
	case o:
		return "kvorch"
	}
	return ""
}
