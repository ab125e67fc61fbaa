package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func TestCapacity(t *testing.T) {
	f := newFake(t, 3)
	settings := topology.DefaultSettings()
	set := func(resp *adminv1.GetCapacityResponse) {
		f.mu.Lock()
		defer f.mu.Unlock()
		resp.Settings = settings.Proto()
		f.mu.capacity = resp
	}
	set(&adminv1.GetCapacityResponse{Provisioner: "recommend"})
	for _, verb := range []string{"status", "explain"} {
		f.run("capacity", verb).want(t, 0, "no auto_scaling_group is set", "kvctl config set -f rules.yaml")
	}
	if d := decode(t, f.run("capacity", "status", "-o", "json").want(t, 0).stdout); d["auto_scaling_group"] != nil || d["looked_at"] != nil {
		t.Errorf("without rules: %v", d)
	}
	settings.AutoScalingGroup = topology.AutoScalingGroup{MinCapacity: 3, MaxCapacity: 12, TargetCPU: 0.7, ScaleUpCooldown: 3e11, ScaleDownCooldown: 3e11}
	set(&adminv1.GetCapacityResponse{Provisioner: "process"})
	f.run("capacity", "explain").want(t, 0, "has not looked at the nodes yet")
	set(&adminv1.GetCapacityResponse{
		Provisioner: "process", LookedMs: 1772366400000, Change: 1, Desired: 5, Why: "cpu 91% of 3 nodes is above the target of 70%: 5 nodes would carry it",
		Waits: []string{"1 node is being launched"}, ScaledUpMs: 1772366300000,
		Nodes: []*adminv1.CapacityNode{
			{Incarnation: 1, Member: true, Known: true, CpuUtilization: 0.93, DiskUsedBytes: 1, DiskTotalBytes: 4, Operations: 1234},
			{Incarnation: 2, Member: true, Leaving: true}, {Incarnation: 3, Known: true, CpuUtilization: 0.02},
		},
		Launching: []*topologyv1.Provision{{Node: "node4", Zone: "z1", State: topologyv1.Provision_STATE_WANTED, Why: "more load", AtMs: 1772366300000, Failures: 2, Problem: "no image"}},
		Signals:   []*adminv1.CapacitySignal{{Name: "cpu", Mean: 0.91, Peak: 0.93, PeakNode: 1, Target: 0.7, Wants: 4, Enough: 5}, {Name: "disk", Mean: 0.2, Peak: 0.25, PeakNode: 1, Enough: 3}},
	})
	golden(t, "capacity-status", f.run("capacity", "status").want(t, 0).stdout)
	golden(t, "capacity-explain", f.run("capacity", "explain").want(t, 0).stdout)
	golden(t, "capacity-explain-json", f.run("capacity", "explain", "-o", "json").want(t, 0).stdout)
}

func TestCapacitySimulate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "load.csv")
	write := func(content string) {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args string) ran {
		return runKvctl(t, func(*App) {}, strings.Fields("capacity simulate "+args)...)
	}
	write("seconds,load\n0,10000\n3600,60000\n7200,10000\n")
	d := decode(t, run("-o json --curve "+file).want(t, 0).stdout)
	if s := d["summary"].(map[string]any); s["scale_ups"] == 0.0 || s["most_nodes"].(float64) < 6 {
		t.Errorf("summary %v", s)
	}
	run("--curve "+file).want(t, 0, "nodes", "▲ 3 → 4", "rules: 3 to 12 nodes at cpu 70%")
	// Rules of 10 to 1,000 nodes, on a ring that has room for them.
	run("--curve day --min 10 --max 1000 --vnodes 2048 --load-per-node 1 --peak 500").want(t, 0, "10 to 1000 nodes at cpu 70%; cooldowns 300 s up, 300 s down")
	run("--min 10 --max 1000").want(t, 2, "a cluster with 2048 vnodes")
	// Rules as they are set, with what the flags say instead.
	write("auto_scaling_group:\n  min_capacity: 10\n  max_capacity: 1000\n  target_cpu_utilization: 70%\n  scale_up_cooldown: 300s\n  scale_down_cooldown: 300s\n")
	run("-f "+file+" --vnodes 2048").want(t, 0, "rules: 10 to 1000 nodes at cpu 70%; cooldowns 300 s up, 300 s down")
	run("-f "+file+" --max 20 --target-cpu 50%").want(t, 0, "rules: 10 to 20 nodes at cpu 50%")
	run("-f "+file).want(t, 2, "a cluster with 2048 vnodes")
	write("auto_scaling_group: none\n")
	run("-f "+file).want(t, 2, "there are no rules in it")
	write("auto_scaling_group: {max_capcity: 5}\n")
	run("-f "+file).want(t, 2, "did you mean auto_scaling_group.max_capacity")
	write("seconds,load\n0,1\n10,much\n")
	run("--curve "+file).want(t, 2, "line 3")
	for args, want := range map[string]string{
		"--curve nope":           "want a CSV file, or one of day, week",
		"--min 5 --max 4":        "above max_capacity",
		"--target-cpu 0%":        "cannot be aimed at: write more, or off",
		"--target-cpu 120%":      "write 95% at most",
		"--scale-up-cooldown 0s": "write 1s or more",
		"--min 2":                "N=3",
		"--load-per-node 0":      "capacity of a node",
		"--replicas 0":           "want 1 or more",
		"--target-cpu off":       "no target is set",
		"--skew 0.5":             "skew",
		"-f nope.yaml":           "no such file",
	} {
		run(args).want(t, 2, want)
	}
}
