package topology

import (
	"cmp"
	"fmt"
	"time"

	"github.com/cespare/xxhash/v2"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// HealthChecks says how fast a node is taken for unhealthy and for healthy again.
type HealthChecks struct {
	Interval, Timeout                    time.Duration
	HealthyThreshold, UnhealthyThreshold int
}

// Settings of the cluster as a whole.
type Settings struct {
	HealthChecks HealthChecks
	// MaxValueBytes bounds one value, MaxBatchBytes the keys and values of a batch.
	MaxValueBytes, MaxBatchBytes int
	// MaxHintBytes and MaxHints bound the hints a node keeps for all targets together,
	// MaxHintAge how long it keeps one.
	MaxHintBytes int64
	MaxHints     int64
	MaxHintAge   time.Duration
	// Version is 1 when the cluster is founded, and one more with every change.
	Version uint64
	// ReplaceAfter is how long a node is unhealthy before others take its place; 0: for
	// ever.
	ReplaceAfter time.Duration
	// AutoScalingGroup is zero where nobody but people changes the number of nodes.
	AutoScalingGroup AutoScalingGroup
	Join             JoinPolicy
	// Placement is the strategy that nodes are given slots by: even or weighted.
	Placement string
	Rebalance Rebalance
}

// JoinPolicy says who gives slots to spares: people, or the orchestrators.
type JoinPolicy uint8

// The policies. Their numbers are those of the wire format; the zero one is JoinAuto with an
// auto-scaling group, and JoinManual without.
const (
	JoinManual JoinPolicy = iota + 1
	JoinAuto
)

// String names a policy; that of the zero one is default.
func (p JoinPolicy) String() string {
	switch p {
	case 0:
		return "default"
	case JoinManual:
		return "manual"
	case JoinAuto:
		return "auto"
	}
	return fmt.Sprintf("join(%d)", uint8(p))
}

// RebalancePolicy says whether the orchestrators move slots to spread load better.
type RebalancePolicy uint8

// The policies. Their numbers are those of the wire format.
const (
	// RebalanceAccept leaves things as they are.
	RebalanceAccept RebalancePolicy = iota + 1
	RebalanceAuto
)

// String names a policy.
func (p RebalancePolicy) String() string {
	switch p {
	case RebalanceAccept:
		return "accept"
	case RebalanceAuto:
		return "auto"
	}
	return fmt.Sprintf("rebalance(%d)", uint8(p))
}

// Rebalance says when slots are moved to spread load better.
type Rebalance struct {
	Policy RebalancePolicy
	// Threshold is how much above the mean the node with most may have, 0.1 for 10%.
	Threshold float64
	// QuietCPU is the share of its CPU that the busiest node may use meanwhile, 0 to 1.
	QuietCPU float64
	// Cooldown is the least time between two of them.
	Cooldown time.Duration
}

// The strategies that nodes are given slots by without being asked.
const (
	PlaceEven     = "even"
	PlaceWeighted = "weighted"
)

// JoinsAuto reports whether the orchestrators give slots to spares.
func (s *Settings) JoinsAuto() bool {
	return s.Join == JoinAuto || s.Join == 0 && s.AutoScalingGroup.On()
}

// DefaultSettings returns the settings of a new cluster.
func DefaultSettings() Settings {
	return Settings{
		HealthChecks: HealthChecks{
			Interval: 30 * time.Second, Timeout: 10 * time.Second,
			HealthyThreshold: 2, UnhealthyThreshold: 3,
		},
		MaxValueBytes: 1 << 20,
		MaxBatchBytes: 8 << 20,
		MaxHintBytes:  1 << 30,
		MaxHints:      1_000_000,
		MaxHintAge:    3 * time.Hour,
		Version:       1,
		ReplaceAfter:  10 * time.Minute,
		Placement:     PlaceEven,
		Rebalance:     Rebalance{Policy: RebalanceAccept, Threshold: 0.2, QuietCPU: 0.4, Cooldown: time.Hour},
	}
}

// Validate returns an error that names the first impossible setting.
func (s Settings) Validate() error {
	h := s.HealthChecks
	switch {
	case h.Interval < 10*time.Millisecond:
		return fmt.Errorf("health_checks.interval is %s: want at least 10ms", h.Interval)
	case h.Timeout < 10*time.Millisecond:
		return fmt.Errorf("health_checks.timeout is %s: want at least 10ms", h.Timeout)
	case h.HealthyThreshold < 1:
		return fmt.Errorf("health_checks.healthy_threshold is %d: want at least 1", h.HealthyThreshold)
	case h.UnhealthyThreshold < 1:
		return fmt.Errorf("health_checks.unhealthy_threshold is %d: want at least 1", h.UnhealthyThreshold)
	case s.MaxValueBytes < 1 || s.MaxValueBytes > HardMaxValue:
		return fmt.Errorf("max_value_bytes is %d: want 1 to %d", s.MaxValueBytes, HardMaxValue)
	case s.MaxBatchBytes < s.MaxValueBytes || s.MaxBatchBytes > HardMaxBatch:
		return fmt.Errorf("max_batch_bytes is %d: want max_value_bytes (%d) to %d", s.MaxBatchBytes, s.MaxValueBytes, HardMaxBatch)
	case s.MaxHintBytes < 0:
		return fmt.Errorf("max_hint_bytes is %d: want 0 or more", s.MaxHintBytes)
	case s.MaxHints < 1:
		return fmt.Errorf("max_hints is %d: want at least 1", s.MaxHints)
	case s.MaxHintAge < 0:
		return fmt.Errorf("max_hint_age is %s: want 0 or more", s.MaxHintAge)
	case s.ReplaceAfter < 0:
		return fmt.Errorf("replace_after is %s: want 0 (never) or more", s.ReplaceAfter)
	case s.Join > JoinAuto:
		return fmt.Errorf("join is %s: want manual or auto", s.Join)
	case s.Placement != PlaceEven && s.Placement != PlaceWeighted:
		return fmt.Errorf("placement is %q: want even or weighted", s.Placement)
	}
	if s.AutoScalingGroup.On() {
		if err := s.AutoScalingGroup.validate(); err != nil {
			return err
		}
	}
	return s.Rebalance.validate()
}

// Hash identifies what settings say, whatever their version is. Those that have their
// default are left out, so that software that does not know one yet agrees with software
// that does, as long as nobody uses it.
func (s Settings) Hash() uint64 {
	h := xxhash.New()
	for _, c := range DiffSettings(DefaultSettings(), s) {
		fmt.Fprintf(h, "%s=%s\n", c.Name, c.To)
	}
	return h.Sum64()
}

func (r Rebalance) validate() error {
	switch {
	case r.Policy != RebalanceAccept && r.Policy != RebalanceAuto:
		return fmt.Errorf("rebalance.policy is %s: want accept or auto", r.Policy)
	case !(r.Threshold >= 0.05 && r.Threshold <= 10):
		return fmt.Errorf("rebalance.threshold is %v: want 0.05 (5%%) to 10", r.Threshold)
	case !(r.QuietCPU > 0 && r.QuietCPU <= 1):
		return fmt.Errorf("rebalance.quiet_cpu_utilization is %v: want above 0, at most 1 (100%%)", r.QuietCPU)
	case r.Cooldown < 0:
		return fmt.Errorf("rebalance.cooldown is %s: want 0 or more", r.Cooldown)
	}
	return nil
}

func settingsFromProto(pb *topologyv1.Settings) Settings {
	h, g, r := pb.GetHealthChecks(), pb.GetAutoScalingGroup(), pb.GetRebalance()
	d := DefaultSettings()
	if r == nil { // made before there were these settings
		r = d.Rebalance.proto()
	}
	return Settings{
		HealthChecks: HealthChecks{
			Interval:           duration(h.GetIntervalMs()),
			Timeout:            duration(h.GetTimeoutMs()),
			HealthyThreshold:   int(h.GetHealthyThreshold()),
			UnhealthyThreshold: int(h.GetUnhealthyThreshold()),
		},
		MaxValueBytes: int(pb.GetMaxValueBytes()),
		MaxBatchBytes: int(pb.GetMaxBatchBytes()),
		MaxHintBytes:  int64(pb.GetMaxHintBytes()),
		MaxHints:      cmp.Or(int64(pb.GetMaxHints()), d.MaxHints),
		MaxHintAge:    duration(pb.GetMaxHintAgeMs()),
		Version:       pb.GetVersion(),
		ReplaceAfter:  duration(pb.GetReplaceAfterMs()),
		AutoScalingGroup: AutoScalingGroup{
			MinCapacity: int(g.GetMinCapacity()), MaxCapacity: int(g.GetMaxCapacity()),
			TargetCPU: g.GetTargetCpuUtilization(), TargetDisk: g.GetTargetDiskUtilization(), TargetOperations: g.GetTargetOperations(),
			ScaleUpCooldown: duration(g.GetScaleUpCooldownMs()), ScaleDownCooldown: duration(g.GetScaleDownCooldownMs()),
		},
		Join:      JoinPolicy(pb.GetJoin()),
		Placement: cmp.Or(pb.GetPlacement(), d.Placement),
		Rebalance: Rebalance{
			Policy: RebalancePolicy(r.GetPolicy()), Threshold: r.GetThreshold(), QuietCPU: r.GetQuietCpuUtilization(), Cooldown: duration(r.GetCooldownMs()),
		},
	}
}

func duration(ms uint64) time.Duration { return time.Duration(ms) * time.Millisecond }

func millis(d time.Duration) uint64 { return uint64(d / time.Millisecond) }

// Proto converts settings to their wire form.
func (s Settings) Proto() *topologyv1.Settings {
	h, g := s.HealthChecks, s.AutoScalingGroup
	pb := &topologyv1.Settings{
		HealthChecks: &topologyv1.HealthChecks{
			IntervalMs:         millis(h.Interval),
			TimeoutMs:          millis(h.Timeout),
			HealthyThreshold:   uint32(h.HealthyThreshold),
			UnhealthyThreshold: uint32(h.UnhealthyThreshold),
		},
		MaxValueBytes:  uint32(s.MaxValueBytes),
		MaxBatchBytes:  uint32(s.MaxBatchBytes),
		MaxHintBytes:   uint64(s.MaxHintBytes),
		MaxHints:       uint64(s.MaxHints),
		MaxHintAgeMs:   millis(s.MaxHintAge),
		Version:        s.Version,
		ReplaceAfterMs: millis(s.ReplaceAfter),
		Join:           topologyv1.JoinPolicy(s.Join),
		Placement:      s.Placement,
		Rebalance:      s.Rebalance.proto(),
	}
	if g.On() {
		pb.AutoScalingGroup = &topologyv1.AutoScalingGroup{
			MinCapacity: uint32(g.MinCapacity), MaxCapacity: uint32(g.MaxCapacity),
			TargetCpuUtilization: g.TargetCPU, TargetDiskUtilization: g.TargetDisk, TargetOperations: g.TargetOperations,
			ScaleUpCooldownMs: millis(g.ScaleUpCooldown), ScaleDownCooldownMs: millis(g.ScaleDownCooldown),
		}
	}
	return pb
}

func (r Rebalance) proto() *topologyv1.Rebalance {
	return &topologyv1.Rebalance{
		Policy: topologyv1.Rebalance_Policy(r.Policy), Threshold: r.Threshold, QuietCpuUtilization: r.QuietCPU, CooldownMs: millis(r.Cooldown),
	}
}
