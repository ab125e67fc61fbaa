package capacity_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/capacity"
)

func TestValidate(t *testing.T) {
	if err := capacity.Default().ValidateFor(256, 3); err != nil {
		t.Error(err)
	}
	type rules = capacity.Rules
	for want, change := range map[string]func(*rules){
		"min_capacity is 0: write 1 or more":                                          func(r *rules) { r.MinCapacity = 0 },
		"max_capacity is 1001: write 1000 or less":                                    func(r *rules) { r.MaxCapacity = 1001 },
		"min_capacity is 13, above max_capacity, which is 12: write a max_capacity":   func(r *rules) { r.MinCapacity = 13 },
		"no target is set, so nothing would ever scale: write target_cpu_utilization": func(r *rules) { r.TargetCPU = 0 },
		"target_cpu_utilization is 120%: write 95% at most":                           func(r *rules) { r.TargetCPU = 1.2 },
		"target_cpu_utilization is -10%: write 1% to 95%":                             func(r *rules) { r.TargetCPU = -0.1 },
		"target_cpu_utilization is NaN%: write":                                       func(r *rules) { r.TargetCPU = math.NaN() },
		"target_disk_utilization is 0.5%: write 1% to 95%, or leave it out":           func(r *rules) { r.TargetDisk = 0.005 },
		"target_operations is -1: write":                                              func(r *rules) { r.TargetOperations = -1 },
		"target_operations is NaN":                                                    func(r *rules) { r.TargetOperations = math.NaN() },
		"target_operations is +Inf":                                                   func(r *rules) { r.TargetOperations = math.Inf(1) },
		"scale_up_cooldown is 0s: write 1s or more, as 300s":                          func(r *rules) { r.ScaleUpCooldown = 0 },
		"scale_down_cooldown is -5m0s: write 1s or more":                              func(r *rules) { r.ScaleDownCooldown = -5 * time.Minute },
		"scale_down_cooldown is 999ms":                                                func(r *rules) { r.ScaleDownCooldown = 999 * time.Millisecond },
		"min_capacity is 2, and there are namespaces with N=3":                        func(r *rules) { r.MinCapacity = 2 },
		"256 vnodes with N=3 can be spread evenly over 192 nodes at most: write a max_capacity of 192 or less, or found a cluster with 512 vnodes": func(r *rules) { r.MaxCapacity = 193 },
		"found a cluster with 2048 vnodes": func(r *rules) { r.MaxCapacity = 1000 },
	} {
		r := capacity.Default()
		change(&r)
		if err := r.ValidateFor(256, 3); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", r, err, want)
		}
	}
}

func TestValidateGood(t *testing.T) {
	for _, tc := range []struct {
		vnodes   uint32
		n        int
		min, max int
	}{{256, 3, 3, 192}, {2048, 3, 10, 1000}, {512, 3, 3, 384}, {4096, 1, 1, 1000}, {64, 3, 48, 48}} {
		r := capacity.Default()
		r.MinCapacity, r.MaxCapacity = tc.min, tc.max
		if err := r.ValidateFor(tc.vnodes, tc.n); err != nil {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	// What is asked for must be enough.
	for most := 4; most <= capacity.MostNodes; most++ {
		r := capacity.Default()
		r.MaxCapacity = most
		vnodes := uint32(1)
		for r.ValidateFor(vnodes, 3) != nil {
			vnodes *= 2
		}
		if vnodes > 1 && 3*vnodes/2 >= uint32(4*most) {
			t.Fatalf("%d nodes are refused with %d vnodes, with which each has four slots", most, vnodes/2)
		}
	}
	r := capacity.Default()
	r.TargetCPU, r.TargetOperations = 0, 1 // one target of any kind
	if err := r.Validate(); err != nil {
		t.Error(err)
	}
}

func TestRulesString(t *testing.T) {
	r := capacity.Default()
	if got, want := r.String(), "3 to 12 nodes at cpu 70%; cooldowns 300 s up, 300 s down"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	r.TargetDisk, r.TargetOperations, r.ScaleDownCooldown = 0.725, 20000, time.Hour
	if got, want := r.String(), "3 to 12 nodes at cpu 70%, disk 72.5%, 20,000 operations/s a node; cooldowns 300 s up, 60 min down"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
