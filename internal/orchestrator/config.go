package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/raft"

	"github.com/kvasirdb/kvasir/internal/provision"
	"github.com/kvasirdb/kvasir/internal/ring"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// Peer is one of the orchestrators, with the addresses others reach it by.
type Peer struct {
	Name          string `yaml:"name"`
	Address       string `yaml:"address"`
	AdminAddress  string `yaml:"admin_address"`
	GossipAddress string `yaml:"gossip_address"`
	RaftAddress   string `yaml:"raft_address"`
}

// Bootstrap says what a new cluster is to be. It is used once, when the cluster is
// founded, and has no effect afterwards.
type Bootstrap struct {
	// FoundingNodes is how many data nodes must have registered before the ring forms.
	// Default 3.
	FoundingNodes int `yaml:"founding_nodes" help:"data nodes that must have registered before the ring forms"`
	// Vnodes is the number of vnodes, a power of two. Default 256.
	Vnodes int `yaml:"vnodes" help:"number of vnodes, a power of two; fixed for the life of the cluster"`
	// HealthChecks is how fast nodes are taken for unhealthy and healthy again.
	HealthChecks HealthChecks `yaml:"health_checks"`
	// ReplaceAfter is how long a node is unhealthy before others take its place. Default
	// 10 minutes; 0 is for ever.
	ReplaceAfter time.Duration `yaml:"replace_after" help:"how long a node is unhealthy before others take its place; 0s is for ever"`
	// MaxValueBytes and MaxBatchBytes bound what clients write, MaxHintBytes, MaxHints
	// and MaxHintAge what a node keeps for others.
	MaxValueBytes int           `yaml:"max_value_bytes" help:"largest value, in bytes"`
	MaxBatchBytes int           `yaml:"max_batch_bytes" help:"largest batch, in bytes"`
	MaxHintBytes  int64         `yaml:"max_hint_bytes" help:"hints a node keeps for all others together, in bytes"`
	MaxHints      int64         `yaml:"max_hints" help:"hints a node keeps for all others together, in records"`
	MaxHintAge    time.Duration `yaml:"max_hint_age" help:"how long a hint is kept"`
	// AutoScalingGroup says how many data nodes there are to be. Without a min_capacity and a
	// max_capacity, which is the default, that is for people to say.
	AutoScalingGroup AutoScalingGroup `yaml:"auto_scaling_group"`
	// Join is manual, auto or default: auto with an auto-scaling group. Placement is even
	// (default) or weighted.
	Join      string    `yaml:"join" help:"who gives slots to spares: manual, auto, or default, which is auto with an auto_scaling_group"`
	Placement string    `yaml:"placement" help:"strategy that nodes are given slots by: even or weighted"`
	Rebalance Rebalance `yaml:"rebalance"`
}

// HealthChecks are the cluster's settings of the same name.
type HealthChecks struct {
	Interval           time.Duration `yaml:"interval" help:"time between probes of a node"`
	Timeout            time.Duration `yaml:"timeout" help:"how long a probe may take"`
	HealthyThreshold   int           `yaml:"healthy_threshold" help:"successful probes in a row that make a node healthy"`
	UnhealthyThreshold int           `yaml:"unhealthy_threshold" help:"failed probes in a row that make a node unhealthy"`
}

// AutoScalingGroup is the cluster's setting of the same name. Targets are written as 70%;
// off is not looked at.
type AutoScalingGroup struct {
	MinCapacity       int           `yaml:"min_capacity" help:"data nodes there are at least; 0 with a max_capacity of 0: no group"`
	MaxCapacity       int           `yaml:"max_capacity" help:"data nodes there are at most"`
	TargetCPU         string        `yaml:"target_cpu_utilization" help:"CPU that nodes are to use, as 70%, or off"`
	TargetDisk        string        `yaml:"target_disk_utilization" help:"disk that nodes are to use, as 60%, or off"`
	TargetOperations  string        `yaml:"target_operations" help:"operations a second that a node is to do, or off"`
	ScaleUpCooldown   time.Duration `yaml:"scale_up_cooldown" help:"least time between two scale-ups"`
	ScaleDownCooldown time.Duration `yaml:"scale_down_cooldown" help:"least time from any scaling to a scale-down"`
}

// Rebalance is the cluster's setting of the same name.
type Rebalance struct {
	Policy    string        `yaml:"policy" help:"what is done when load is spread badly: accept or auto"`
	Threshold string        `yaml:"threshold" help:"how much above the mean the node with most may have, as 20%"`
	QuietCPU  string        `yaml:"quiet_cpu_utilization" help:"CPU that the busiest node may use while slots move for that, as 40%"`
	Cooldown  time.Duration `yaml:"cooldown" help:"least time between two rebalances"`
}

// Config holds an orchestrator's process settings.
type Config struct {
	// Name is one of Peers. Required.
	Name string `yaml:"name" help:"this orchestrator, one of peers (required)"`
	// DataDir is the directory of the Raft store. Required.
	DataDir string `yaml:"data_dir" help:"directory of the Raft store (required)"`
	// Listen, AdminListen, GossipListen and RaftListen are the host:port to listen on.
	// Defaults 0.0.0.0:7390 to 0.0.0.0:7393.
	Listen       string `yaml:"listen" help:"host:port for nodes, clients and kvctl (gRPC)"`
	AdminListen  string `yaml:"admin_listen" help:"host:port for health and metrics (HTTP)"`
	GossipListen string `yaml:"gossip_listen" help:"host:port for gossip (TCP and UDP)"`
	RaftListen   string `yaml:"raft_listen" help:"host:port for Raft"`
	// Peers lists the 1, 3 or 5 orchestrators, this one included; the same on each.
	Peers []Peer `yaml:"peers"`
	// Bootstrap says what a new cluster is to be.
	Bootstrap Bootstrap `yaml:"bootstrap"`
	// Recover names the file that kvctl recover wrote, with which the orchestrators of a new
	// generation are started in empty directories; afterwards it has no effect.
	Recover string `yaml:"recover" help:"file of kvctl recover, to begin a new generation of a cluster whose orchestrators are lost; data_dir must be empty"`
	// ElectionTimeout is how long an orchestrator waits for its leader before it
	// stands for election, at least. Default 1 s.
	ElectionTimeout time.Duration `yaml:"election_timeout" help:"least time without a leader before an election"`
	// Provision says who launches and ends nodes. Default nobody: what they would do is only
	// said.
	Provision provision.Config `yaml:"provisioner"`
	// TLS names PEM files: all three or none. It covers gRPC and Raft; gossip has a key.
	TLS rpc.TLSFiles `yaml:"tls"`
	// GossipKey, 16, 24 or 32 bytes in base64, encrypts gossip. The same everywhere.
	GossipKey string `yaml:"gossip_key" help:"16, 24 or 32 bytes in base64 that encrypt gossip; the same on every process"`

	// What the process gives, not the operator.

	// Logger is required. Software names the version of the software.
	Logger   *slog.Logger `yaml:"-"`
	Software string       `yaml:"-"`
	// Recovery is what the file named by Recover holds, or nil.
	Recovery *topology.State `yaml:"-"`
	// Provisioner launches and ends nodes; nil only advises.
	Provisioner Provisioner `yaml:"-"`
	// Fatal is called when the disk fails. It must not return in production.
	Fatal func(error) `yaml:"-"`
	// Restart begins a restart of the process: it ends the context of Run. It returns an
	// error when the process could not start again. Nil where it cannot be restarted.
	Restart func(context.Context) error `yaml:"-"`
	// Seams hold what simulations replace. The zero value is production.
	Seams Seams `yaml:"-"`
}

// Seams are the places where a simulated world is put in. Nil fields stand for the
// real one.
type Seams struct {
	FS     vfs.FS
	Listen func(address string) (net.Listener, error)
	Dial   rpc.Dialer
	// Gossip and Raft return the transports for an address to bind.
	Gossip func(bind string) (memberlist.Transport, error)
	Raft   func(bind, advertise string) (raft.StreamLayer, error)
	// WallClock returns milliseconds since 1970.
	WallClock func() int64
	// BootClock is boottime.Now.
	BootClock func() time.Duration
}

// Defaults returns a configuration with every default filled in.
func Defaults() Config {
	d, g := topology.DefaultSettings(), topology.DefaultGroup()
	d.AutoScalingGroup = g
	text := d.Values()
	return Config{
		Listen: "0.0.0.0:7390", AdminListen: "0.0.0.0:7391", GossipListen: "0.0.0.0:7392", RaftListen: "0.0.0.0:7393",
		ElectionTimeout: time.Second, Provision: provision.Defaults(),
		Bootstrap: Bootstrap{
			FoundingNodes: 3, Vnodes: ring.DefaultVnodes,
			HealthChecks: HealthChecks{
				Interval: d.HealthChecks.Interval, Timeout: d.HealthChecks.Timeout,
				HealthyThreshold: d.HealthChecks.HealthyThreshold, UnhealthyThreshold: d.HealthChecks.UnhealthyThreshold,
			},
			ReplaceAfter:  d.ReplaceAfter,
			MaxValueBytes: d.MaxValueBytes, MaxBatchBytes: d.MaxBatchBytes,
			MaxHintBytes: d.MaxHintBytes, MaxHints: d.MaxHints, MaxHintAge: d.MaxHintAge,
			AutoScalingGroup: AutoScalingGroup{
				TargetCPU: text["auto_scaling_group.target_cpu_utilization"], TargetDisk: text["auto_scaling_group.target_disk_utilization"],
				TargetOperations: text["auto_scaling_group.target_operations"],
				ScaleUpCooldown:  g.ScaleUpCooldown, ScaleDownCooldown: g.ScaleDownCooldown,
			},
			Join: text["join"], Placement: text["placement"],
			Rebalance: Rebalance{
				Policy: text["rebalance.policy"], Threshold: text["rebalance.threshold"],
				QuietCPU: text["rebalance.quiet_cpu_utilization"], Cooldown: d.Rebalance.Cooldown,
			},
		},
	}
}

// settings returns the cluster's settings that a bootstrap asks for. Errors name the key.
func (b Bootstrap) settings() (topology.Settings, error) {
	s := topology.DefaultSettings()
	s.HealthChecks = topology.HealthChecks{
		Interval: b.HealthChecks.Interval, Timeout: b.HealthChecks.Timeout,
		HealthyThreshold: b.HealthChecks.HealthyThreshold, UnhealthyThreshold: b.HealthChecks.UnhealthyThreshold,
	}
	s.MaxValueBytes, s.MaxBatchBytes = b.MaxValueBytes, b.MaxBatchBytes
	s.MaxHintBytes, s.MaxHints, s.MaxHintAge = b.MaxHintBytes, b.MaxHints, b.MaxHintAge
	s.ReplaceAfter = b.ReplaceAfter
	s.Rebalance.Cooldown = b.Rebalance.Cooldown
	values := map[string]string{
		"join": b.Join, "placement": b.Placement,
		"rebalance.policy": b.Rebalance.Policy, "rebalance.threshold": b.Rebalance.Threshold, "rebalance.quiet_cpu_utilization": b.Rebalance.QuietCPU,
	}
	if g := b.AutoScalingGroup; g.MinCapacity != 0 || g.MaxCapacity != 0 {
		s.AutoScalingGroup = topology.AutoScalingGroup{
			MinCapacity: g.MinCapacity, MaxCapacity: g.MaxCapacity, ScaleUpCooldown: g.ScaleUpCooldown, ScaleDownCooldown: g.ScaleDownCooldown,
		}
		values["auto_scaling_group.target_cpu_utilization"] = g.TargetCPU
		values["auto_scaling_group.target_disk_utilization"] = g.TargetDisk
		values["auto_scaling_group.target_operations"] = g.TargetOperations
	}
	s, err := s.With(values)
	if err != nil {
		return s, err
	}
	_, err = (&topology.Topology{Vnodes: uint32(b.Vnodes), FoundingNodes: b.FoundingNodes}).CheckSettings(s)
	return s, err
}

// Addresses are where nodes reach the orchestrators.
func (c *Config) Addresses() (out []string) {
	for _, p := range c.Peers {
		out = append(out, p.Address)
	}
	return out
}

// self returns this orchestrator's entry in Peers.
func (c *Config) self() (Peer, bool) {
	i := slices.IndexFunc(c.Peers, func(p Peer) bool { return p.Name == c.Name })
	if i < 0 {
		return Peer{}, false
	}
	return c.Peers[i], true
}

// Validate returns an error that names every key with an impossible value.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	bad("name", topology.CheckName("orchestrator", c.Name))
	if c.DataDir == "" {
		bad("data_dir", errors.New("is required"))
	}
	bad("listen", rpc.CheckAddress(c.Listen, false))
	bad("admin_listen", rpc.CheckAddress(c.AdminListen, false))
	bad("gossip_listen", rpc.CheckAddress(c.GossipListen, false))
	bad("raft_listen", rpc.CheckAddress(c.RaftListen, false))
	if n := len(c.Peers); n != 1 && n != 3 && n != 5 {
		bad("peers", fmt.Errorf("there are %d: want 1, 3 or 5 orchestrators", n))
	}
	seen := map[string]bool{}
	for i, p := range c.Peers {
		at := func(field string) string { return fmt.Sprintf("peers[%d].%s", i, field) }
		bad(at("name"), topology.CheckName("orchestrator", p.Name))
		if seen[p.Name] {
			bad(at("name"), fmt.Errorf("%q appears twice", p.Name))
		}
		seen[p.Name] = true
		bad(at("address"), rpc.CheckAddress(p.Address, true))
		bad(at("admin_address"), rpc.CheckAddress(p.AdminAddress, true))
		bad(at("gossip_address"), rpc.CheckAddress(p.GossipAddress, true))
		bad(at("raft_address"), rpc.CheckAddress(p.RaftAddress, true))
	}
	if _, ok := c.self(); !ok && len(c.Peers) > 0 {
		bad("name", fmt.Errorf("%q is not one of the peers", c.Name))
	}
	if n := c.Bootstrap.FoundingNodes; n < 1 || n > 1000 {
		bad("bootstrap.founding_nodes", fmt.Errorf("%d: want 1 to 1000", n))
	}
	if q := c.Bootstrap.Vnodes; q < 0 || q > ring.MaxVnodes {
		bad("bootstrap.vnodes", fmt.Errorf("%d: want a power of two up to %d", q, ring.MaxVnodes))
	} else {
		bad("bootstrap.vnodes", ring.CheckVnodes(uint32(q)))
	}
	_, err := c.Bootstrap.settings()
	bad("bootstrap", err)
	if c.ElectionTimeout < 50*time.Millisecond || c.ElectionTimeout > time.Minute {
		bad("election_timeout", fmt.Errorf("%s: want 50ms to 1m", c.ElectionTimeout))
	}
	if err := c.Provision.Validate(); err != nil {
		errs = append(errs, err)
	}
	bad("tls", c.TLS.Check())
	_, err = rpc.DecodeKey(c.GossipKey)
	bad("gossip_key", err)
	return errors.Join(errs...)
}

// gossipKey returns the key that gossip is encrypted with, or nil.
// REQUIRES: Validate returned nil.
func (c *Config) gossipKey() []byte {
	key, _ := rpc.DecodeKey(c.GossipKey)
	return key
}
