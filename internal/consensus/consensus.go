// Package consensus replicates opaque commands into a state machine, by Raft. It
// wraps hashicorp/raft and keeps log, votes and snapshots in one Pebble store. It
// knows nothing of topologies or of what a command means, never changes the set
// of servers, and is not on the path of a user's key.
//
// DESIGN.md beside this file describes goroutines, queues and failure cases.
package consensus

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
)

// The errors of Propose, Barrier and VerifyLeader.
var (
	// ErrNotLeader: another server leads, or none. Nothing was proposed.
	ErrNotLeader = errors.New("consensus: this server is not the leader")
	// ErrLeadershipLost: the server stopped leading while it waited. Whether the
	// command will be applied is unknown.
	ErrLeadershipLost = errors.New("consensus: leadership was lost, the outcome is unknown")
	// ErrTimeout: the context ended first. Whether the command will be applied is
	// unknown. It is joined by the context's error.
	ErrTimeout = errors.New("consensus: timed out, the outcome is unknown")
	// ErrClosed: the server is stopping. Whether a command under way will be applied
	// is unknown.
	ErrClosed = errors.New("consensus: closed")
	// ErrOtherGroup is Open's: the store was founded with another Config.Group.
	ErrOtherGroup = errors.New("consensus: the servers of another group have this store")
)

// Server is one of the servers that agree.
type Server struct {
	// Name is unique and never reused for another store.
	Name string
	// Address is the host:port where the others reach its stream layer.
	Address string
}

// Config says who agrees and where this server keeps its part. Durations left at
// zero take their defaults.
type Config struct {
	// Name is this server's name, one of Servers.
	Name string
	// Servers are all voters: the same on each of them, and for the life of the
	// store. Their order does not matter.
	Servers []Server
	// Group tells the servers from others of the same names and addresses that agreed
	// before them and are to be heard no more: a connection of another group is refused. It
	// is kept in a store that is founded; empty means what the store has, and is what the
	// first servers use. At most 255 bytes.
	Group string
	// FS holds Dir.
	FS vfs.FS
	// Dir is the directory of the store. It belongs to this package alone.
	Dir string
	// Streams carries Raft's traffic; its address is that of this server in Servers.
	// Open takes it over and closes it, also when Open fails.
	Streams raft.StreamLayer

	// HeartbeatTimeout is how long a follower waits for its leader, stretched by a
	// random factor of up to two. Default 500 ms.
	HeartbeatTimeout time.Duration
	// ElectionTimeout is how long a candidate waits for votes, stretched by a random
	// factor of up to two; at least HeartbeatTimeout. Default 500 ms.
	ElectionTimeout time.Duration
	// LeaderLease is how long a leader leads without hearing from a majority; at most
	// HeartbeatTimeout. Default 500 ms.
	LeaderLease time.Duration
	// RPCTimeout bounds a dial, and the wait for an answer of another server; sending
	// a snapshot takes this for each 256 KiB. Default 2 s.
	RPCTimeout time.Duration

	// SnapshotInterval is how often the need for a snapshot is considered, stretched
	// by a random factor of up to two. Default 1 min.
	SnapshotInterval time.Duration
	// SnapshotThreshold is how many log entries since the last snapshot call for a new
	// one. Default 1024.
	SnapshotThreshold uint64
	// TrailingLogs is how many log entries are kept behind the last one after a
	// snapshot, for followers that are a little behind. Default 4096.
	TrailingLogs uint64

	// Logger is nil for none.
	Logger *slog.Logger
	// Fatal is called when the store fails in a way the process cannot survive: what
	// is on disk is unknown from then on. It must end the process; where it returns,
	// as in a test, the server must not be used any more. The default panics.
	Fatal func(error)
}

// StateMachine is what commands are applied to. Its methods are called by one
// goroutine at a time and must not call back into this package.
type StateMachine interface {
	// Apply applies a committed command. The result must depend on nothing but the
	// commands so far: every server must come to the same state. Indexes grow, with
	// gaps. What it returns is what Propose returns on the proposing server.
	Apply(index uint64, command []byte) any
	// Snapshot returns the whole state, at most 1 GiB.
	Snapshot() ([]byte, error)
	// Restore replaces the whole state by one that Snapshot returned, here or on
	// another server.
	Restore(snapshot []byte) error
}

// withDefaults returns the configuration with its gaps filled.
func (c Config) withDefaults() Config {
	setDefault(&c.HeartbeatTimeout, 500*time.Millisecond)
	setDefault(&c.ElectionTimeout, max(500*time.Millisecond, c.HeartbeatTimeout))
	setDefault(&c.LeaderLease, min(500*time.Millisecond, c.HeartbeatTimeout))
	setDefault(&c.RPCTimeout, 2*time.Second)
	setDefault(&c.SnapshotInterval, time.Minute)
	setDefault(&c.SnapshotThreshold, 1024)
	setDefault(&c.TrailingLogs, 4096)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Fatal == nil {
		c.Fatal = func(err error) { panic(err) }
	}
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports what is wrong with a configuration. The ranges of the timeouts
// are checked by Open.
func (c Config) Validate() error {
	if c.FS == nil || c.Dir == "" {
		return errors.New("consensus: no file system or directory given")
	}
	if c.Streams == nil {
		return errors.New("consensus: no stream layer given")
	}
	if len(c.Group) > maxGroupBytes {
		return fmt.Errorf("consensus: the group's name has %d bytes: want at most %d", len(c.Group), maxGroupBytes)
	}
	names, addresses := map[string]bool{}, map[string]bool{}
	for _, s := range c.Servers {
		if s.Name == "" || s.Address == "" {
			return fmt.Errorf("consensus: server %q at %q needs a name and an address", s.Name, s.Address)
		}
		if names[s.Name] || addresses[s.Address] {
			return fmt.Errorf("consensus: server %s at %s is listed twice, by name or by address", s.Name, s.Address)
		}
		names[s.Name], addresses[s.Address] = true, true
	}
	i := slices.IndexFunc(c.Servers, func(s Server) bool { return s.Name == c.Name })
	if i < 0 {
		return fmt.Errorf("consensus: this server, %q, is not among the servers", c.Name)
	}
	if at := c.Streams.Addr().String(); at != c.Servers[i].Address {
		return fmt.Errorf("consensus: server %s is listed at %s, but its stream layer is at %s", c.Name, c.Servers[i].Address, at)
	}
	return nil
}

// raftConfig returns the library's view of the configuration.
func (c Config) raftConfig(logger *raftLogger) *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(c.Name)
	conf.HeartbeatTimeout = c.HeartbeatTimeout
	conf.ElectionTimeout = c.ElectionTimeout
	conf.LeaderLeaseTimeout = c.LeaderLease
	conf.SnapshotInterval = c.SnapshotInterval
	conf.SnapshotThreshold = c.SnapshotThreshold
	conf.TrailingLogs = c.TrailingLogs
	conf.Logger = logger
	conf.NoLegacyTelemetry = true
	// Open restores the state machine itself: the library would turn to an older
	// snapshot after an error, and panic over the log entries it then lacks.
	conf.NoSnapshotRestoreOnStart = true
	return conf
}

// servers returns the configuration's servers as the library writes them.
func (c Config) servers() raft.Configuration {
	var out raft.Configuration
	for _, s := range c.Servers {
		out.Servers = append(out.Servers, raft.Server{
			Suffrage: raft.Voter,
			ID:       raft.ServerID(s.Name),
			Address:  raft.ServerAddress(s.Address),
		})
	}
	slices.SortFunc(out.Servers, func(a, b raft.Server) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// checkServers compares the servers that are configured with those that the store
// was made for. The error names the first server that differs.
func checkServers(configured, stored raft.Configuration) error {
	was := map[raft.ServerID]raft.ServerAddress{}
	for _, s := range stored.Servers {
		was[s.ID] = s.Address
	}
	for _, s := range configured.Servers {
		address, ok := was[s.ID]
		if !ok {
			return fmt.Errorf("server %s at %s is not one of those this store was made for: the set of servers cannot be changed", s.ID, s.Address)
		}
		if address != s.Address {
			return fmt.Errorf("server %s is configured at %s, but this store was made with it at %s: addresses cannot be changed", s.ID, s.Address, address)
		}
		delete(was, s.ID)
	}
	for _, s := range stored.Servers {
		if _, ok := was[s.ID]; ok {
			return fmt.Errorf("server %s at %s belongs to those this store was made for, but is not configured: the set of servers cannot be changed", s.ID, s.Address)
		}
	}
	return nil
}
