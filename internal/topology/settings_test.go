package topology_test

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func TestSettingsWith(t *testing.T) {
	type values = map[string]string
	grouped, err := topology.DefaultSettings().With(values{"auto_scaling_group.max_capacity": "12"})
	if err != nil || grouped.AutoScalingGroup != topology.DefaultGroup() {
		t.Fatalf("a group with one key set is %+v, %v", grouped.AutoScalingGroup, err)
	}
	for _, tc := range []struct {
		name  string
		from  topology.Settings
		set   values
		check func(topology.Settings) bool
	}{
		{"nothing", topology.DefaultSettings(), nil, func(s topology.Settings) bool { return s == topology.DefaultSettings() }},
		{"a duration", topology.DefaultSettings(), values{"health_checks.interval": "90s"}, func(s topology.Settings) bool { return s.HealthChecks.Interval == 90*time.Second }},
		{"days", topology.DefaultSettings(), values{"max_hint_age": "2d"}, func(s topology.Settings) bool { return s.MaxHintAge == 48*time.Hour }},
		{"for ever", topology.DefaultSettings(), values{"replace_after": "0s"}, func(s topology.Settings) bool { return s.ReplaceAfter == 0 }},
		{"bytes", topology.DefaultSettings(), values{"max_value_bytes": "2MiB", "max_hint_bytes": "12345"}, func(s topology.Settings) bool { return s.MaxValueBytes == 2<<20 && s.MaxHintBytes == 12345 }},
		{"two that go together only", topology.DefaultSettings(), values{"max_value_bytes": "16MiB", "max_batch_bytes": "32MiB"}, func(s topology.Settings) bool { return s.MaxBatchBytes == 32<<20 }},
		{"words", topology.DefaultSettings(), values{"join": "auto", "placement": "weighted", "rebalance.policy": "auto"}, func(s topology.Settings) bool {
			return s.Join == topology.JoinAuto && s.Placement == topology.PlaceWeighted && s.Rebalance.Policy == topology.RebalanceAuto
		}},
		{"percent", topology.DefaultSettings(), values{"rebalance.threshold": "12.5%", "rebalance.quiet_cpu_utilization": "0.3"}, func(s topology.Settings) bool {
			return s.Rebalance.Threshold == 0.125 && s.Rebalance.QuietCPU == 0.3
		}},
		{"a group as a whole", topology.DefaultSettings(), values{
			"auto_scaling_group.min_capacity": "3", "auto_scaling_group.max_capacity": "12", "auto_scaling_group.target_cpu_utilization": "70%",
			"auto_scaling_group.scale_up_cooldown": "300s", "auto_scaling_group.scale_down_cooldown": "300s",
		}, func(s topology.Settings) bool { return s.AutoScalingGroup == topology.DefaultGroup() && s.JoinsAuto() }},
		{"a key of a group", grouped, values{"auto_scaling_group.target_disk_utilization": "60%"}, func(s topology.Settings) bool {
			return s.AutoScalingGroup.TargetDisk == 0.6 && s.AutoScalingGroup.TargetCPU == 0.7
		}},
		{"a target is not looked at", grouped, values{"auto_scaling_group.target_cpu_utilization": "off", "auto_scaling_group.target_operations": "20000"}, func(s topology.Settings) bool {
			return s.AutoScalingGroup.TargetCPU == 0 && s.AutoScalingGroup.TargetOperations == 20000
		}},
		{"no group", grouped, values{"auto_scaling_group": "none"}, func(s topology.Settings) bool { return s == topology.DefaultSettings() }},
	} {
		if s, err := tc.from.With(tc.set); err != nil || !tc.check(s) {
			t.Errorf("%s: %+v, %v", tc.name, s, err)
		}
	}
}

// What is refused changes nothing, and the error names the key and what to write.
func TestSettingsAreRefused(t *testing.T) {
	for _, tc := range []struct{ key, value, want string }{
		{"health_checks.intervall", "1s", `there is no setting "health_checks.intervall": did you mean health_checks.interval`},
		{"min_capacity", "3", "did you mean auto_scaling_group.min_capacity"},
		{"repalce_after", "1m", "did you mean replace_after?"},
		{"auto_scaling_group.minimum", "1", "did you mean auto_scaling_group."},
		{"rebalance", "auto", "did you mean rebalance.policy"},
		{"colour", "red", `there is no setting "colour": kvctl config show lists all`},
		{"health_checks.interval", "10", `health_checks.interval is "10": it has no unit: write 10s`},
		{"health_checks.interval", "soon", "write a duration"},
		{"health_checks.interval", "-1s", "whole milliseconds"},
		{"health_checks.interval", "1us", "whole milliseconds"},
		{"health_checks.interval", "0s", "health_checks.interval is 0s: want at least 10ms"},
		{"max_hint_age", "90000000d", "write a duration"},
		{"health_checks.healthy_threshold", "two", "health_checks.healthy_threshold is \"two\": write a whole number"},
		{"health_checks.healthy_threshold", "4294967298", "write a whole number"},
		{"max_value_bytes", "1.5MiB", "write a number of bytes"},
		{"max_value_bytes", "17MiB", "max_value_bytes is 17825792"},
		{"max_value_bytes", "9223372036854775807GiB", "write a number of bytes"},
		{"max_hints", "0", "max_hints is 0"},
		{"join", "yes", "write default or manual or auto"},
		{"placement", "split", "write even or weighted"},
		{"rebalance.threshold", "70", "write 70%"},
		{"rebalance.threshold", "NaN", "write a percentage"},
		{"rebalance.threshold", "1e-1", "write a percentage"},
		{"rebalance.threshold", "-5%", "write a percentage"},
		{"rebalance.threshold", "%", "write a percentage"},
		{"rebalance.threshold", "1%", "rebalance.threshold is 0.01"},
		{"auto_scaling_group", "3", "write none"},
		{"auto_scaling_group.min_capacity", "0", "auto_scaling_group: min_capacity is 0: write 1 or more"},
		{"auto_scaling_group.min_capacity", "13", "auto_scaling_group: min_capacity is 13, above max_capacity, which is 12: write a max_capacity of 13 or more"},
		{"auto_scaling_group.max_capacity", "1001", "write 1000 or less"},
		{"auto_scaling_group.target_cpu_utilization", "0%", "or off"},
		{"auto_scaling_group.target_cpu_utilization", "120%", "auto_scaling_group: target_cpu_utilization is 120%: write 95% at most"},
		{"auto_scaling_group.target_cpu_utilization", "0.5%", "write 1% to 95%"},
		{"auto_scaling_group.target_cpu_utilization", "off", "auto_scaling_group: no target"},
		{"auto_scaling_group.target_operations", "many", "write a number"},
		{"auto_scaling_group.scale_up_cooldown", "0s", "auto_scaling_group: scale_up_cooldown is 0s: write 1s or more, as 300s"},
		{"auto_scaling_group.scale_down_cooldown", "0s", "auto_scaling_group: scale_down_cooldown is 0s"},
	} {
		before := topology.DefaultSettings()
		s, err := before.With(map[string]string{tc.key: tc.value, "replace_after": "1h"})
		if err == nil || !strings.Contains(err.Error(), tc.want) || s != before {
			t.Errorf("%s=%s: %v, want %q", tc.key, tc.value, err, tc.want)
		}
	}
	if _, err := topology.DefaultSettings().With(map[string]string{"auto_scaling_group": "none", "auto_scaling_group.max_capacity": "9"}); err == nil {
		t.Error("a group is removed and changed at once")
	}
}

// drawSettings draws settings by drawing a text for some keys.
func drawSettings(t *rapid.T) topology.Settings {
	texts := map[string]*rapid.Generator[string]{
		"duration": rapid.Custom(func(t *rapid.T) string {
			return (time.Duration(rapid.Int64Range(10, 1e10).Draw(t, "ms")) * time.Millisecond).String()
		}),
		"percent": rapid.Map(rapid.Float64Range(0.05, 0.95), func(f float64) string { return topology.WritePart(f) }),
	}
	s := topology.DefaultSettings()
	for _, k := range topology.SettingKeys() {
		if !rapid.Bool().Draw(t, k.Name) {
			continue
		}
		for _, g := range texts {
			if next, err := s.With(map[string]string{k.Name: g.Draw(t, "text")}); err == nil {
				s = next
			}
		}
	}
	return s
}

// The texts of all settings make the same settings of any others.
func TestSettingsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := drawSettings(t), drawSettings(t)
		got, err := b.With(a.Values())
		if err != nil || got != a {
			t.Fatalf("%v: %+v became %+v", err, a, got)
		}
		if d := topology.DiffSettings(a, got); len(d) != 0 {
			t.Fatalf("equal settings differ: %v", d)
		}
		same := a == b
		if (len(topology.DiffSettings(a, b)) == 0) != same || (a.Hash() == b.Hash()) != same {
			t.Fatalf("%+v and %+v: differ %v, hashes %x and %x", a, b, topology.DiffSettings(a, b), a.Hash(), b.Hash())
		}
		v := b
		v.Version++
		if v.Hash() != b.Hash() {
			t.Fatal("the version is part of the hash")
		}
	})
}

// Settings survive the wire and disks with their hash.
func TestSettingsTravel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSettings(t)
		got, err := topology.FromProto(&topologyv1.Topology{ClusterId: "c", Vnodes: 2, Settings: s.Proto()})
		if err != nil || got.Settings != s || got.Settings.Hash() != s.Hash() {
			t.Fatalf("%v: %+v became %+v", err, s, got)
		}
	})
}

func TestCheckSettings(t *testing.T) {
	c := cluster{t: t}
	c.must(found(16))
	with := func(values map[string]string) (topology.Settings, error) {
		return c.state.Topology.SettingsWith(values)
	}
	check := func(values map[string]string) ([]string, error) {
		t.Helper()
		s, err := with(values)
		if err != nil {
			t.Fatal(err)
		}
		return c.state.Topology.CheckSettings(s)
	}
	if _, err := check(map[string]string{"auto_scaling_group.max_capacity": "12"}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"a", "b", "c", "d"} {
		c.must(register(name, 0, 1, name))
	}
	c.must(setRing(16, 1, 2, 3))
	ns := topology.FoundingNamespace(3)
	c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_CreateNamespace{CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()}}})
	if s, err := with(map[string]string{"auto_scaling_group.max_capacity": "9"}); err != nil || s.AutoScalingGroup.MinCapacity != 4 || s.AutoScalingGroup.MaxCapacity != 9 {
		t.Errorf("a group of a cluster of four is %+v, %v", s.AutoScalingGroup, err)
	}
	for _, tc := range []struct{ key, value, want string }{
		{"auto_scaling_group.min_capacity", "2", "min_capacity is 2, and there are namespaces with N=3, which need as many nodes: write a min_capacity of 3 or more"},
		{"auto_scaling_group.max_capacity", "13", "max_capacity is 13, but 16 vnodes with N=3 can be spread evenly over 12 nodes at most: write a max_capacity of 12 or less, or found a cluster with 32 vnodes"},
		{"health_checks.timeout", "31s", "health_checks.timeout is 31s: write health_checks.interval, which is 30s, or less"},
	} {
		if _, err := check(map[string]string{tc.key: tc.value}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s=%s: %v", tc.key, tc.value, err)
		}
	}
	for _, tc := range []struct {
		values map[string]string
		want   string
	}{
		{map[string]string{"auto_scaling_group.max_capacity": "12", "join": "manual"}, "join is manual"},
		{map[string]string{"auto_scaling_group.min_capacity": "5"}, "there are 4 data nodes"},
		{map[string]string{"replace_after": "0s"}, "not replaced"},
	} {
		if warnings, err := check(tc.values); err != nil || !slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, tc.want) }) {
			t.Errorf("%v: warnings %q, %v", tc.values, warnings, err)
		}
	}
}

func TestSettingsVersionsAreKept(t *testing.T) {
	c := cluster{t: t}
	c.must(found(4))
	set := func(values map[string]string) {
		t.Helper()
		s, err := c.state.Topology.SettingsWith(values)
		if err != nil {
			t.Fatal(err)
		}
		c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_SetSettings{SetSettings: &topologyv1.SetSettings{Settings: s.Proto()}}})
	}
	epoch := c.state.Topology.Epoch
	set(map[string]string{"replace_after": "10m"})
	if c.state.Topology.Epoch != epoch || c.state.SettingsInUse().Settings.Version != 1 {
		t.Error("what changes nothing makes a version")
	}
	set(map[string]string{"replace_after": "1m"})
	set(map[string]string{"join": "auto"})
	if v := c.state.SettingsInUse(); v.Settings.Version != 3 || v.Epoch != epoch+2 || v.Settings != c.state.Topology.Settings || v.What != "changed" {
		t.Errorf("version in use %+v", v)
	}
	old, err := c.state.SettingsOf(2)
	if err != nil || old.ReplaceAfter != time.Minute || old.Join != 0 {
		t.Errorf("version 2 is %+v, %v", old, err)
	}
	if _, err := c.state.SettingsOf(4); err == nil || !strings.Contains(err.Error(), "versions 1 to 3 are kept") {
		t.Errorf("version 4: %v", err)
	}
	for range 120 {
		set(map[string]string{"max_hints": "7"})
		set(map[string]string{"max_hints": "8"})
	}
	if _, err := c.state.SettingsOf(2); err == nil || len(c.state.SettingsVersions) != 100 {
		t.Errorf("%d versions are kept, %v", len(c.state.SettingsVersions), err)
	}
}

// A command without a mutation raises the epoch and is noted, so that everybody checks
// the topology that it has.
func TestEpochIsRaised(t *testing.T) {
	c := cluster{t: t}
	c.must(found(4))
	before := c.state
	c.must()
	if c.state.Topology.Epoch != before.Topology.Epoch+1 || len(c.state.History) != len(before.History)+1 {
		t.Errorf("epoch %d became %d", before.Topology.Epoch, c.state.Topology.Epoch)
	}
	// Who has the same is told nothing but the epoch; who has not, finds out.
	delta := topology.Diff(before.Topology, c.state.Topology)
	if next, err := topology.Patch(before.Topology, delta); err != nil || next.Epoch != c.state.Topology.Epoch {
		t.Errorf("%v, %v", next, err)
	}
	pb := before.Topology.Proto()
	pb.Settings.MaxHints++
	other, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topology.Patch(other, delta); err == nil {
		t.Error("a topology with other settings is patched")
	}
	check := before.Topology.Check()
	if before.Topology.Fails(check) || !other.Fails(check) || c.state.Topology.Fails(check) || (&topology.Topology{}).Fails(check) {
		t.Error("a check passes where it should not, or fails")
	}
	if got, err := topology.Updated(before.Topology, &topologyv1.WatchTopologyResponse{Delta: check}); got != before.Topology || err != nil {
		t.Errorf("a check led to %v, %v", got, err)
	}
}

// The documentation lists all settings as they are.
func TestSettingsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, k := range topology.SettingKeys() {
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", k.Name, k.Get(topology.DefaultSettings()), k.Help, k.Effect)
	}
	if !strings.Contains(string(b), "|---|---|---|---|\n"+want.String()+"\n") {
		t.Errorf("docs/configuration.md does not have the table\n%s", want.String())
	}
}

// Every part of the settings but their version has a name, and so is part of the hash.
func TestSettingsAreNamed(t *testing.T) {
	base := topology.DefaultSettings()
	base.AutoScalingGroup = topology.DefaultGroup()
	var walk func(v reflect.Value, name string, s *topology.Settings)
	walk = func(v reflect.Value, name string, s *topology.Settings) {
		if v.Kind() == reflect.Struct {
			for i := range v.NumField() {
				walk(v.Field(i), name+"."+v.Type().Field(i).Name, s)
			}
			return
		}
		before := reflect.New(v.Type()).Elem()
		before.Set(v)
		switch {
		case v.CanInt():
			v.SetInt(v.Int() + 1e9)
		case v.CanUint():
			v.SetUint(v.Uint() + 1)
		case v.CanFloat():
			v.SetFloat(v.Float() + 0.01)
		default:
			v.SetString("other")
		}
		if (s.Hash() == base.Hash()) != (name == ".Version") {
			t.Errorf("%s: another value and another hash do not go together", name)
		}
		v.Set(before)
	}
	s := base
	walk(reflect.ValueOf(&s).Elem(), "", &s)
}
