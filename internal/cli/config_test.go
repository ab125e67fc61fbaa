package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

const rules = `auto_scaling_group:
  min_capacity: 3
  max_capacity: 5
  target_cpu_utilization: 70%
  scale_up_cooldown: 300s
  scale_down_cooldown: 300s
`

// rulesFile writes a file of settings.
func rulesFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigSet(t *testing.T) {
	f := newFake(t, 3)
	golden(t, "config-diff-file", f.run("config", "diff", "-f", rulesFile(t, rules)).want(t, 0).stdout)
	golden(t, "config-set-dry-run", f.run("config", "set", "-f", rulesFile(t, rules), "--dry-run").want(t, 0).stdout)
	if n := len(f.mu.settings); n != 1 {
		t.Fatalf("a dry run made version %d", n)
	}
	golden(t, "config-set-file", f.run("config", "set", "-f", rulesFile(t, "health_checks: {interval: 10s}\n"+rules+"join: manual\n")).want(t, 0).stdout)
	if g := topology.SettingsVersionFromProto(f.mu.settings[1]).Settings.AutoScalingGroup; g.MaxCapacity != 5 || g.TargetCPU != 0.7 {
		t.Fatalf("the group is %+v", g)
	}
	golden(t, "config-set-json", f.run("config", "set", "replace_after", "5m", "max_value_bytes", "2MiB", "-o", "json").want(t, 0).stdout)
	f.run("config", "set", "replace_after", "5m").want(t, 0, "nothing changes: the settings are those of version 3")
	f.run("config", "set", "join", "auto", "--if-version", "2").want(t, 5)
	golden(t, "config-show-group", f.run("config", "show").want(t, 0).stdout)
	golden(t, "config-diff", f.run("config", "diff").want(t, 0).stdout)
	golden(t, "config-diff-json", f.run("config", "diff", "1", "-o", "json").want(t, 0).stdout)
	f.run("config", "diff", "2", "2").want(t, 0, "do not differ")
	f.run("config", "diff", "9").want(t, 3)
	golden(t, "config-rollback", f.run("config", "rollback", "1").want(t, 0).stdout)
	if got := topology.SettingsVersionFromProto(f.mu.settings[3]).Settings; got.Version != 4 || got.AutoScalingGroup.On() {
		t.Errorf("after going back the settings are %+v", got)
	}
	f.run("config", "rollback", "9").want(t, 3)
	golden(t, "config-history", f.run("config", "history").want(t, 0).stdout)
	var history []settingsVersionDoc
	if err := json.Unmarshal([]byte(f.run("config", "history", "-o", "json").want(t, 0).stdout), &history); err != nil || len(history) != 4 || history[1].Settings.AutoScalingGroup.MaxCapacity != 5 {
		t.Errorf("%v: %+v", err, history)
	}
	in := f.runWith(func(a *App) { a.Stdin = strings.NewReader("auto_scaling_group:\n  max_capacity: 4\n") }, "config", "set", "-f", "-")
	in.want(t, 0, "auto_scaling_group.max_capacity")
	f.run("config", "set", "auto_scaling_group", "none").want(t, 0, "none")
	f.mu.controlled = false
	f.run("config", "set", "join", "auto").want(t, 4)
	f.run("config", "status").want(t, 0, "follows")
}

// What is refused changes nothing, and says what to write.
func TestConfigIsRefused(t *testing.T) {
	f := newFake(t, 3)
	file := func(from, to string) []string {
		return []string{"-f", rulesFile(t, strings.Replace(rules, from, to, 1))}
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{file("min_capacity: 3", "min_capacity: 6"), "write a max_capacity of 6 or more"},
		{file("min_capacity: 3", "min_capacity: 2"), "write a min_capacity of 3 or more"},
		{file("max_capacity: 5", "max_capacity: 12"), "found a cluster with 16 vnodes"},
		{file("70%", "0%"), "or off"},
		{file("70%", "120%"), "write 95% at most"},
		{file("scale_up_cooldown: 300s", "scale_up_cooldown: 0s"), "write 1s or more"},
		{file("scale_down_cooldown: 300s", "scale_down_cooldown: 0"), "write 1s or more"},
		{file("max_capacity", "max_capacty"), "did you mean auto_scaling_group.max_capacity"},
		{file("  max_capacity: 5", "  min_capacity: 5"), "line 3: auto_scaling_group.min_capacity is there twice"},
		{file(": 5", ":"), "line 3: auto_scaling_group.max_capacity has no value"},
		{file("min_capacity: 3", "min_capacity: [3]"), "line 2: want names with values"},
		{file("auto", "\tauto"), "rules.yaml"},
		{[]string{"-f", rulesFile(t, "")}, "there are no settings in it"},
		{[]string{"-f", rulesFile(t, "a: &x {b: *x}")}, "want names with values"},
		{[]string{"-f", "nowhere.yaml"}, "nowhere.yaml"},
		{[]string{"-f", rulesFile(t, "listen: 0.0.0.0:7400\n")}, "listen is a setting of each process"},
		{[]string{"listen", "0.0.0.0:7400"}, "listen is a setting of each process: change it in the configuration of kvnode or kvorch and restart that"},
		{[]string{"cache_bytes", "1"}, "configuration of kvnode and"},
		{[]string{"bootstrap.vnodes", "64"}, "configuration of kvorch and"},
		{[]string{"replace_after", "soon"}, "write a duration"},
		{[]string{"replace_after"}, "VALUE is missing"},
		{nil, "KEY and VALUE are missing"},
		{[]string{"join", "auto", "join", "manual"}, "join is given twice"},
		{[]string{"join", "auto", "-f", "x"}, "not both"},
	} {
		r := f.run(append([]string{"config", "set"}, tc.args...)...)
		if r.code != 2 || !strings.Contains(r.stderr, tc.want) || r.stdout != "" {
			t.Errorf("%v: exit %d, %q; want 2, %q", tc.args, r.code, r.stderr, tc.want)
		}
	}
	f.run("config", "rollback", "first").want(t, 2)
	f.run("config", "diff", "0").want(t, 2)
	if len(f.mu.settings) != 1 {
		t.Errorf("there are %d versions", len(f.mu.settings))
	}
}

func TestConfigStatus(t *testing.T) {
	f := newFake(t, 5)
	f.run("config", "set", "join", "manual").want(t, 0)
	f.mu.deaf[2], f.mu.deaf[5] = true, true
	f.mu.health[5] = &topologyv1.NodeHealth{Incarnation: 5, State: topologyv1.NodeHealth_STATE_UNHEALTHY, Reason: "silent"}
	f.mu.status[3].ProcessSettingsHash = 0xdef
	f.runWith(func(a *App) { a.settle = time.Nanosecond }, "config", "set", "replace_after", "5m").
		want(t, 4, "version 3", "in use at node1, node3, node4\nnot yet at node2: it has taken in epoch 8\n")
	f.mu.status[4].SettingsHash = 0x123
	golden(t, "config-status", f.run("config", "status").want(t, 0).stdout)
	golden(t, "config-status-json", f.run("config", "status", "-o", "json").want(t, 0).stdout)
}

// Keys of a structure with yaml tags, as kvnode and kvorch know them.
func yamlKeys(v reflect.Type) (out []string) {
	for _, f := range reflect.VisibleFields(v) {
		name := f.Tag.Get("yaml")
		switch {
		case name == "" || name == "-":
		case f.Type.Kind() == reflect.Struct:
			out = append(out, name+".")
		default:
			out = append(out, name)
		}
	}
	return append(out, "log.")
}

// kvctl knows the settings of processes, none of which is one of the cluster.
func TestProcessSettingsAreKnown(t *testing.T) {
	for _, tc := range []struct {
		config reflect.Type
		known  []string
	}{{reflect.TypeFor[node.Config](), nodeSettings}, {reflect.TypeFor[orchestrator.Config](), orchestratorSettings}} {
		want, known := yamlKeys(tc.config), slices.Clone(tc.known)
		slices.Sort(want)
		slices.Sort(known)
		if !slices.Equal(want, known) {
			t.Errorf("%s has %v, kvctl knows %v", tc.config, want, known)
		}
	}
	for _, k := range topology.SettingKeys() {
		if of := processSettingOf(k.Name); of != "" {
			t.Errorf("%s is a setting of %s, too", k.Name, of)
		}
	}
	for key, want := range map[string]string{"tls": "kvnode or kvorch", "tls.cert": "kvnode or kvorch", "peers": "kvorch", "zone": "kvnode", "tlsx": ""} {
		if of := processSettingOf(key); of != want {
			t.Errorf("%s belongs to %q, want %q", key, of, want)
		}
	}
}
