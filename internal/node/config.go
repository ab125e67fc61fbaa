package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/memberlist"
	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// Config holds a node's process settings. What the cluster agrees on (namespaces,
// limits, health checks) is not among them.
type Config struct {
	// Name is how people call the node. Required.
	Name string `yaml:"name" help:"how people call the node (required)"`
	// Zone is the failure domain replicas are spread over. It may be another one at the next
	// start. Default "default".
	Zone string `yaml:"zone" help:"failure domain replicas are spread over; may be another one at the next start"`
	// Role is data or reporting: what the node holds records for. A data directory keeps its
	// role. Default data.
	Role string `yaml:"role" help:"data, or reporting: hold copies for reports only, and serve no reads and writes; a data directory keeps its role"`
	// DataDir is the data directory. Required.
	DataDir string `yaml:"data_dir" help:"data directory (required)"`
	// Orchestrators lists the gRPC addresses of orchestrators. Required.
	Orchestrators []string `yaml:"orchestrators" help:"gRPC addresses of orchestrators, host:port (required)"`
	// Listen, AdminListen and GossipListen are the host:port to listen on: gRPC for
	// clients and nodes, HTTP for health and metrics, and gossip (TCP and UDP).
	// Defaults 0.0.0.0:7400, 0.0.0.0:7401, 0.0.0.0:7402.
	Listen       string `yaml:"listen" help:"host:port for clients and nodes (gRPC)"`
	AdminListen  string `yaml:"admin_listen" help:"host:port for health and metrics (HTTP)"`
	GossipListen string `yaml:"gossip_listen" help:"host:port for gossip (TCP and UDP)"`
	// Advertise, AdminAdvertise and GossipAdvertise are the host:port others use.
	// Defaults: the listen addresses, which must then name a host.
	Advertise       string `yaml:"advertise" help:"host:port others reach listen by (default: listen)"`
	AdminAdvertise  string `yaml:"admin_advertise" help:"host:port others reach admin_listen by"`
	GossipAdvertise string `yaml:"gossip_advertise" help:"host:port others reach gossip_listen by"`
	// CacheBytes is the size of the block cache, RecordCacheBytes of the cache of records
	// that are read often, MemTableBytes of one memtable.
	CacheBytes       int64 `yaml:"cache_bytes" help:"block cache, in bytes"`
	RecordCacheBytes int64 `yaml:"record_cache_bytes" help:"cache of records that are read often, in bytes; 0: none"`
	MemTableBytes    int64 `yaml:"memtable_bytes" help:"one memtable, in bytes"`
	// CPULimit is the number of cores that count as full use; 0: the control group's
	// quota, or else the machine's cores.
	CPULimit float64 `yaml:"cpu_limit" help:"cores that count as full use; 0: the control group's quota, or all cores"`
	// MinFreeDiskBytes is the free space below which writes are refused. Default: a
	// twentieth of the disk, at most 1 GiB. See storage.Config.MinFreeBytes.
	MinFreeDiskBytes int64 `yaml:"min_free_disk_bytes" help:"free space below which writes are refused; 0: a twentieth of the disk, at most 1 GiB"`
	// ScrubCycle is how often all data on disk are read to find bit rot, and
	// ScrubBytesPerSecond how fast at least. Defaults 168 h and 4 MiB.
	ScrubCycle          time.Duration `yaml:"scrub_cycle" help:"how often all data on disk are read to find bit rot"`
	ScrubBytesPerSecond int64         `yaml:"scrub_bytes_per_second" help:"bytes a second that are read at least to find bit rot"`
	// MoveBytesPerSecond bounds what a node takes in when vnodes move to it, as long as it
	// has nothing else to do. Default 64 MiB. It takes less, down to 1 MiB, while commits
	// take longer than they have to by MoveCommitDelay, and more than twice as long as they
	// have to. Default 2 ms; 0: whatever they take.
	MoveBytesPerSecond int           `yaml:"move_bytes_per_second" help:"bytes a second that are taken in at most when vnodes move here"`
	MoveCommitDelay    time.Duration `yaml:"move_commit_delay" help:"by how much longer commits may take before less is taken in; 0: any"`
	// DiskStallAfter is how long a sync may take before the node takes its disk for one
	// that hangs, and serves nothing until that goes on. Default 10 s.
	DiskStallAfter time.Duration `yaml:"disk_stall_after" help:"how long a sync may take before the node serves nothing until the disk goes on"`
	// DrainTimeout bounds how long a stop waits for requests. Default 10 s.
	DrainTimeout time.Duration `yaml:"drain_timeout" help:"how long a stop waits for requests"`
	// TLS names PEM files: all three or none. It covers gRPC and Raft; gossip has a key.
	TLS rpc.TLSFiles `yaml:"tls"`
	// GossipKey, 16, 24 or 32 bytes in base64, encrypts gossip. The same everywhere.
	GossipKey string `yaml:"gossip_key" help:"16, 24 or 32 bytes in base64 that encrypt gossip; the same on every process"`

	// What the process gives, not the operator.

	// Logger is required. Software names the version of the software.
	Logger   *slog.Logger `yaml:"-"`
	Software string       `yaml:"-"`
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
	// Gossip returns the transport for an address to bind.
	Gossip func(bind string) (memberlist.Transport, error)
	// WallClock returns milliseconds since 1970.
	WallClock func() int64
	// BootClock is boottime.Now.
	BootClock func() time.Duration
	// LeastFileBytes is what moves as a sorted file at least; small stores have less.
	LeastFileBytes int
	// SyncDelay delays the sync of commits in simulations.
	SyncDelay func() time.Duration
	// CPU returns the process's CPU over its allowance, 0 to about 1: a simulated process
	// shares the real one with others.
	CPU func() float64
}

// Defaults returns a configuration with every default filled in.
func Defaults() Config {
	return Config{
		Zone: "default", Role: topology.Data.String(),
		Listen: "0.0.0.0:7400", AdminListen: "0.0.0.0:7401", GossipListen: "0.0.0.0:7402",
		CacheBytes: 128 << 20, RecordCacheBytes: 128 << 20, MemTableBytes: 32 << 20,
		ScrubCycle: 7 * 24 * time.Hour, ScrubBytesPerSecond: 4 << 20,
		MoveBytesPerSecond: 64 << 20, MoveCommitDelay: 2 * time.Millisecond,
		DiskStallAfter: 10 * time.Second, DrainTimeout: 10 * time.Second,
	}
}

// Complete fills in what follows from other fields.
func (c *Config) Complete() {
	for _, a := range []struct {
		advertise *string
		listen    string
	}{{&c.Advertise, c.Listen}, {&c.AdminAdvertise, c.AdminListen}, {&c.GossipAdvertise, c.GossipListen}} {
		if *a.advertise == "" {
			*a.advertise = a.listen
		}
	}
}

// Validate returns an error that names every key with an impossible value.
// REQUIRES: Complete was called.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	bad("name", topology.CheckName("node", c.Name))
	bad("zone", topology.CheckName("zone", c.Zone))
	if c.role() == 0 {
		bad("role", fmt.Errorf("%q: want data or reporting", c.Role))
	}
	if c.DataDir == "" {
		bad("data_dir", errors.New("is required"))
	}
	if len(c.Orchestrators) == 0 {
		bad("orchestrators", errors.New("at least one gRPC address is required"))
	}
	for _, a := range c.Orchestrators {
		bad("orchestrators", rpc.CheckAddress(a, true))
	}
	bad("listen", rpc.CheckAddress(c.Listen, false))
	bad("admin_listen", rpc.CheckAddress(c.AdminListen, false))
	bad("gossip_listen", rpc.CheckAddress(c.GossipListen, false))
	bad("advertise", rpc.CheckAddress(c.Advertise, true))
	bad("admin_advertise", rpc.CheckAddress(c.AdminAdvertise, true))
	bad("gossip_advertise", rpc.CheckAddress(c.GossipAdvertise, true))
	if c.RecordCacheBytes < 0 {
		bad("record_cache_bytes", fmt.Errorf("%d: want 0 or more", c.RecordCacheBytes))
	}
	if c.CacheBytes < 1<<20 {
		bad("cache_bytes", fmt.Errorf("%d: want at least 1048576", c.CacheBytes))
	}
	if c.MemTableBytes < 1<<20 || c.MemTableBytes > 1<<30 {
		bad("memtable_bytes", fmt.Errorf("%d: want 1048576 to 1073741824", c.MemTableBytes))
	}
	if !(c.CPULimit >= 0) || math.IsInf(c.CPULimit, 1) { // NaN is not at least 0
		bad("cpu_limit", fmt.Errorf("%v: want 0 (automatic) or more", c.CPULimit))
	}
	if c.MinFreeDiskBytes < 0 {
		bad("min_free_disk_bytes", fmt.Errorf("%d: want 0 (automatic) or more", c.MinFreeDiskBytes))
	}
	if c.ScrubCycle < time.Minute || c.ScrubCycle > 365*24*time.Hour {
		bad("scrub_cycle", fmt.Errorf("%s: want 1m to 8760h", c.ScrubCycle))
	}
	if c.ScrubBytesPerSecond < 1<<10 {
		bad("scrub_bytes_per_second", fmt.Errorf("%d: want at least 1024", c.ScrubBytesPerSecond))
	}
	if c.MoveBytesPerSecond < 64<<10 || c.MoveBytesPerSecond > 64<<30 {
		bad("move_bytes_per_second", fmt.Errorf("%d: want 65536 to 68719476736", c.MoveBytesPerSecond))
	}
	if c.MoveCommitDelay < 0 || c.MoveCommitDelay > time.Minute {
		bad("move_commit_delay", fmt.Errorf("%s: want 0s to 1m", c.MoveCommitDelay))
	}
	if c.DiskStallAfter < time.Second || c.DiskStallAfter > 10*time.Minute {
		bad("disk_stall_after", fmt.Errorf("%s: want 1s to 10m", c.DiskStallAfter))
	}
	if c.DrainTimeout < 0 || c.DrainTimeout > 10*time.Minute {
		bad("drain_timeout", fmt.Errorf("%s: want 0s to 10m", c.DrainTimeout))
	}
	bad("tls", c.TLS.Check())
	_, err := rpc.DecodeKey(c.GossipKey)
	bad("gossip_key", err)
	return errors.Join(errs...)
}

// role returns what Role names, or 0.
func (c *Config) role() topology.Role {
	for _, r := range []topology.Role{topology.Data, topology.Reporting} {
		if c.Role == r.String() {
			return r
		}
	}
	return 0
}

// hash identifies what is configured alike on nodes that are: without what tells one node
// from another, and with secrets and their files only by whether there are any.
func (c Config) hash() uint64 {
	c.Name, c.Zone, c.DataDir = "", "", ""
	c.Listen, c.AdminListen, c.GossipListen, c.Advertise, c.AdminAdvertise, c.GossipAdvertise = "", "", "", "", "", ""
	c.Orchestrators = slices.Sorted(slices.Values(c.Orchestrators))
	if c.GossipKey != "" {
		c.GossipKey = "set"
	}
	if c.TLS != (rpc.TLSFiles{}) {
		c.TLS = rpc.TLSFiles{Cert: "set"}
	}
	b, err := yaml.Marshal(c)
	if err != nil { // a struct of texts and numbers has a YAML
		panic(fmt.Sprintf("node: hash the configuration: %v", err))
	}
	return xxhash.Sum64(b)
}

// gossipKey returns the key that gossip is encrypted with, or nil.
// REQUIRES: Validate returned nil.
func (c *Config) gossipKey() []byte {
	key, _ := rpc.DecodeKey(c.GossipKey)
	return key
}
