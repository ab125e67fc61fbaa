// Package sim runs whole clusters in one process on virtual time: the real nodes and
// orchestrators, composed as the binaries compose them, over a simulated network,
// simulated disks and a clock for each process. Tests run it in a synctest bubble.
package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/simnet"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// Config says what a world consists of.
type Config struct {
	Seed          uint64
	Nodes         int
	Orchestrators int
	// Reporting is how many reporting nodes there are, report1 and on.
	Reporting int
	// Zones is how many zones the nodes are spread over. Default 1.
	Zones int
	// Vnodes of the cluster. Default 16: small stores are fast.
	Vnodes int
	// MaxHints is how many hints a node keeps. Default: as many as in any cluster.
	MaxHints int64
	// SyncDelay draws how long the records of a commit of a process are visible before
	// their sync begins. Default: not at all.
	SyncDelay func(name string) time.Duration
	// Starting, when set, is called with every process that is about to start again.
	Starting func(name string)
	Logger   *slog.Logger
	// fleet, when set, has the control loops at work.
	fleet *fleet
}

// World is a cluster with what it stands on.
type World struct {
	t         testing.TB
	cfg       Config
	Net       *simnet.Network
	processes map[string]*process
	rng       *rand.Rand
	// orchestrators are those that were added, as nodes that start know them.
	orchestrators []string
	clients       int
	conns         []*grpc.ClientConn
}

// process is a node or orchestrator with its host and disk, running or not.
type process struct {
	w    *World
	name string
	host string
	disk *vfs.MemFS
	// trouble is what is wrong with it.
	trouble trouble
	// offset is how many milliseconds its wall clock is ahead, boot its boot-time clock.
	offset atomic.Int64
	boot   bootClock
	// run starts it; stop ends the instance that runs. Both are nil when it has none.
	run  func(*instance) (stop func(), err error)
	live *instance
	// rng draws what a crash leaves of its disk.
	rng *rand.Rand
	// started is set once it has run.
	started bool
	// zone is what a node says at its next start, node what it is named, role what it is for.
	zone, node, role string
	// deafTo reports whether gossip with a host is lost; nil: with none.
	deafTo atomic.Pointer[func(host string) bool]
	// recovery is what an orchestrator is started with from its next start on, or nil.
	recovery *topology.State
}

// instance is one run of a process. What it does after its end goes nowhere.
type instance struct {
	p     *process
	ended atomic.Bool
	// died is closed when its disk has ended it.
	dead  atomic.Bool
	died  chan struct{}
	stop  func()
	err   error
	ready chan struct{} // closed when run has returned
	// starting ends with cancel: it does not start any more then.
	starting context.Context
	cancel   context.CancelFunc
}

// New starts a cluster and returns once every process serves.
func New(t testing.TB, cfg Config) *World {
	t.Helper()
	if cfg.Zones == 0 {
		cfg.Zones = 1
	}
	if cfg.Vnodes == 0 {
		cfg.Vnodes = 16
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	w := &World{
		t: t, cfg: cfg, Net: simnet.New(cfg.Seed), processes: map[string]*process{},
		rng: rand.New(rand.NewPCG(cfg.Seed, 0xd15c)),
	}
	var peers []orchestrator.Peer
	for i := range cfg.Orchestrators {
		h := fmt.Sprintf("10.0.1.%d", i+1)
		peers = append(peers, orchestrator.Peer{
			Name: fmt.Sprintf("orch%d", i+1), Address: h + ":7390", AdminAddress: h + ":7391", GossipAddress: h + ":7392", RaftAddress: h + ":7393",
		})
	}
	for i, p := range peers {
		w.addOrchestrator(p.Name, fmt.Sprintf("10.0.1.%d", i+1), peers)
	}
	for i := range cfg.Nodes {
		w.AddNode(fmt.Sprintf("node%d", i+1), fmt.Sprintf("z%d", i%cfg.Zones+1))
	}
	// Orchestrators first, then nodes in order, so that nodeI has incarnation I.
	for i := range cfg.Orchestrators {
		w.begin(w.processes[fmt.Sprintf("orch%d", i+1)])
	}
	for i := range cfg.Nodes {
		w.Start(fmt.Sprintf("node%d", i+1))
	}
	for i := range cfg.Orchestrators {
		w.await(w.processes[fmt.Sprintf("orch%d", i+1)])
	}
	for i := range cfg.Reporting {
		name := fmt.Sprintf("report%d", i+1)
		w.AddNode(name, fmt.Sprintf("z%d", i%cfg.Zones+1))
		w.process(name).role = topology.Reporting.String()
		w.Start(name)
	}
	return w
}

func (w *World) addOrchestrator(name, host string, peers []orchestrator.Peer) {
	p := &process{w: w, name: name, host: host, disk: vfs.NewCrashableMem(), rng: w.stream("crash of " + name)}
	p.run = func(in *instance) (func(), error) {
		cfg := orchestrator.Defaults()
		cfg.Name, cfg.DataDir, cfg.Peers = name, "data", peers
		cfg.Listen, cfg.AdminListen, cfg.GossipListen, cfg.RaftListen = host+":7390", host+":7391", host+":7392", host+":7393"
		cfg.Bootstrap.FoundingNodes, cfg.Bootstrap.Vnodes = w.cfg.Nodes, w.cfg.Vnodes
		cfg.Bootstrap.HealthChecks = orchestrator.HealthChecks{Interval: time.Second, Timeout: 500 * time.Millisecond, HealthyThreshold: 2, UnhealthyThreshold: 3}
		if w.cfg.MaxHints > 0 {
			cfg.Bootstrap.MaxHints = w.cfg.MaxHints
		}
		cfg.ElectionTimeout, cfg.Recovery = 500*time.Millisecond, p.recovery
		if w.cfg.fleet != nil {
			w.cfg.fleet.configure(&cfg, in)
		}
		cfg.Logger, cfg.Software, cfg.Fatal = w.logger(name), "sim", in.fatal
		cfg.Seams = orchestrator.Seams{
			FS: newFaultyDisk(p.disk, &p.trouble), Listen: in.listen, Dial: in.dial, WallClock: p.wall, BootClock: p.boot.now,
			Gossip: func(bind string) (memberlist.Transport, error) { return newGossipTransport(in, bind) },
			Raft:   func(bind, _ string) (raft.StreamLayer, error) { return newRaftStreams(in, bind) },
		}
		o, err := orchestrator.Start(cfg)
		if err != nil {
			return nil, err
		}
		return o.Stop, nil
	}
	w.processes[name] = p
}

// AddOrchestrator adds one that does not run yet, of a control plane of its own.
func (w *World) AddOrchestrator(name string) {
	h := fmt.Sprintf("10.0.1.%d", len(w.processes)+1)
	w.orchestrators = append(w.orchestrators, h+":7390")
	w.addOrchestrator(name, h, []orchestrator.Peer{{
		Name: name, Address: h + ":7390", AdminAddress: h + ":7391", GossipAddress: h + ":7392", RaftAddress: h + ":7393",
	}})
}

// Recover has an orchestrator that does not run start with a recovery.
func (w *World) Recover(name string, s *topology.State) { w.process(name).recovery = s }

// AddNode adds a node that does not run yet.
func (w *World) AddNode(name, zone string) {
	host := fmt.Sprintf("10.0.0.%d", len(w.processes)+1)
	p := &process{w: w, name: name, host: host, disk: vfs.NewCrashableMem(), rng: w.stream("crash of " + name), zone: zone, node: name}
	p.run = func(in *instance) (func(), error) {
		cfg := node.Defaults()
		cfg.Name, cfg.Zone, cfg.DataDir = p.node, p.zone, "data"
		if p.role != "" {
			cfg.Role = p.role
		}
		cfg.Listen, cfg.AdminListen, cfg.GossipListen = host+":7400", host+":7401", host+":7402"
		cfg.CacheBytes, cfg.RecordCacheBytes, cfg.MemTableBytes = 1<<20, 1<<20, 1<<20
		for i := range w.cfg.Orchestrators {
			cfg.Orchestrators = append(cfg.Orchestrators, fmt.Sprintf("10.0.1.%d:7390", i+1))
		}
		cfg.Orchestrators = append(cfg.Orchestrators, w.orchestrators...)
		cfg.Logger, cfg.Software, cfg.Fatal = w.logger(name), "sim", in.fatal
		cfg.Seams = node.Seams{
			FS: newFaultyDisk(p.disk, &p.trouble), Listen: in.listen, Dial: in.dial, WallClock: p.wall, BootClock: p.boot.now, SyncDelay: func() time.Duration { return w.syncDelay(name) },
			LeastFileBytes: 100, CPU: w.cpu(p),
			Gossip: func(bind string) (memberlist.Transport, error) { return newGossipTransport(in, bind) },
		}
		n, err := node.Start(in.starting, cfg)
		if err != nil {
			return nil, err
		}
		return n.Stop, nil
	}
	w.processes[name] = p
}

// Rezone has a node that does not run start in another zone.
func (w *World) Rezone(name, zone string) { w.processes[name].zone = zone }

// stream returns the numbers drawn for one purpose, whatever else is drawn.
func (w *World) stream(purpose string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(purpose))
	return rand.New(rand.NewPCG(w.cfg.Seed, h.Sum64()))
}

func (w *World) syncDelay(name string) time.Duration {
	if w.cfg.SyncDelay == nil {
		return 0
	}
	return w.cfg.SyncDelay(name)
}

// cpu returns what reads a node's CPU, or nil.
func (w *World) cpu(p *process) func() float64 {
	if w.cfg.fleet == nil {
		return nil
	}
	return func() float64 { return w.cfg.fleet.cpu(p.host) }
}

func (w *World) logger(name string) *slog.Logger { return w.cfg.Logger.With("process", name) }

func (p *process) wall() int64 { return time.Now().UnixMilli() + p.offset.Load() }

func (in *instance) listen(address string) (net.Listener, error) {
	if in.ended.Load() {
		return nil, net.ErrClosed
	}
	return in.p.w.Net.Listen(address)
}

func (in *instance) dial(ctx context.Context, address string) (net.Conn, error) {
	if in.ended.Load() {
		return nil, net.ErrClosed
	}
	return in.p.w.Net.Dial(ctx, in.p.host, address)
}

// begin starts a process without waiting for it.
func (w *World) begin(p *process) {
	if w.cfg.Starting != nil && p.started {
		w.cfg.Starting(p.name)
	}
	p.started = true
	in := &instance{p: p, ready: make(chan struct{}), died: make(chan struct{})}
	in.starting, in.cancel = context.WithCancel(context.Background())
	p.live = in
	go func() {
		defer close(in.ready)
		in.stop, in.err = p.run(in)
	}()
}

func (w *World) await(p *process) {
	w.t.Helper()
	select {
	case <-p.live.ready:
	case <-time.After(time.Minute):
		w.t.Fatalf("%s does not start within a minute", p.name)
	}
	if p.live.err != nil {
		w.t.Fatalf("%s does not start: %v", p.name, p.live.err)
	}
}

func (w *World) process(name string) *process {
	w.t.Helper()
	p := w.processes[name]
	if p == nil {
		w.t.Fatalf("there is no process %s", name)
	}
	return p
}

// Start starts a process that does not run and returns once it serves.
func (w *World) Start(name string) {
	w.t.Helper()
	p := w.process(name)
	w.begin(p)
	w.await(p)
}

// Crash is how a process ends against its will.
type Crash int

const (
	// Kill is kill −9: what was written stays, synced or not.
	Kill Crash = iota
	// PowerCut loses half of what was written and not synced.
	PowerCut
)

// Crash ends a process at once.
func (w *World) Crash(name string, how Crash) {
	w.t.Helper()
	p := w.process(name)
	in := p.live
	in.ended.Store(true)
	w.Net.Crash(p.host)
	unsynced := 100
	if how == PowerCut {
		unsynced = 50
	}
	// What the old instance still does happens on a disk and a network of the past.
	p.disk = p.disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: p.rng})
	p.live = nil
	w.end(in)
}

// Stop ends a process as SIGTERM does.
func (w *World) Stop(name string) {
	w.t.Helper()
	p := w.process(name)
	in := p.live
	p.live = nil
	w.end(in)
	in.ended.Store(true)
}

// end waits until an instance has ended.
func (w *World) end(in *instance) {
	in.cancel()
	<-in.ready
	if in.stop != nil {
		in.stop()
	}
}

// Wipe gives a process that does not run an empty disk.
func (w *World) Wipe(name string) { w.process(name).disk = vfs.NewCrashableMem() }

// Disk returns a process's disk.
func (w *World) Disk(name string) vfs.FS { return w.process(name).disk }

// SetClock sets how far ahead a process's wall clock is.
func (w *World) SetClock(name string, ahead time.Duration) {
	w.process(name).offset.Store(ahead.Milliseconds())
}

// SetRate sets how fast a process's boot-time clock goes, 1 being right.
func (w *World) SetRate(name string, rate float64) { w.process(name).boot.setRate(rate) }

// bootClock goes on at some rate whatever becomes of its process, and is never set.
type bootClock struct {
	mu   sync.Mutex
	at   time.Time
	sum  time.Duration
	rate float64 // 0: right
}

func (c *bootClock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.advance()
}

// REQUIRES: c.mu is held.
func (c *bootClock) advance() time.Duration {
	now := time.Now()
	if !c.at.IsZero() {
		rate := c.rate
		if rate == 0 {
			rate = 1
		}
		c.sum += time.Duration(float64(now.Sub(c.at)) * rate)
	}
	c.at = now
	return c.sum
}

func (c *bootClock) setRate(rate float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance()
	c.rate = rate
}

// Host returns the host a process runs on, for cuts.
func (w *World) Host(name string) string { return w.process(name).host }

// Isolate cuts a process off from all others, in both directions.
func (w *World) Isolate(name string) { w.eachOther(name, w.Net.Cut) }

// Reconnect undoes Isolate.
func (w *World) Reconnect(name string) { w.eachOther(name, w.Net.Heal) }

func (w *World) eachOther(name string, f func(from, to string)) {
	p := w.process(name)
	for _, o := range w.processes {
		if o != p {
			f(p.host, o.host)
			f(o.host, p.host)
		}
	}
}

// Endpoints returns the addresses of all nodes.
func (w *World) Endpoints() []string {
	if w.cfg.fleet != nil {
		return w.cfg.fleet.endpoints()
	}
	var out []string
	for i := range w.cfg.Nodes {
		out = append(out, w.process(fmt.Sprintf("node%d", i+1)).host+":7400")
	}
	return out
}

// Client connects a client on a host of its own.
func (w *World) Client(opts ...client.Option) *client.Client {
	w.t.Helper()
	w.clients++
	c, err := client.New(context.Background(), w.Endpoints(), append(opts, client.WithDialer(w.Net.Dialer(fmt.Sprintf("10.0.2.%d", w.clients))))...)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// Control returns the control service as a process serves it.
func (w *World) Control(name string) adminv1.ControlServiceClient {
	w.t.Helper()
	return adminv1.NewControlServiceClient(w.Conn(name))
}

// Conn returns a connection to a process's gRPC server from a host of its own. It
// ends with the world.
func (w *World) Conn(name string) *grpc.ClientConn {
	w.t.Helper()
	port := ":7400"
	if w.process(name).host[:7] == "10.0.1." {
		port = ":7390"
	}
	w.clients++
	cc, err := rpc.Transport{Dial: w.Net.Dialer(fmt.Sprintf("10.0.2.%d", w.clients))}.NewConn(w.process(name).host + port)
	if err != nil {
		w.t.Fatal(err)
	}
	w.conns = append(w.conns, cc)
	return cc
}

// TryStart is Start for processes that may refuse to.
func (w *World) TryStart(name string) error {
	p := w.process(name)
	w.begin(p)
	select {
	case <-p.live.ready:
	case <-time.After(time.Minute):
		return errors.New("does not start within a minute")
	}
	if err := p.live.err; err != nil {
		p.live = nil
		return err
	}
	return nil
}

// CopyDisk returns a copy of what a process has on disk.
func (w *World) CopyDisk(name string) *vfs.MemFS {
	return w.process(name).disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: w.rng})
}

// Mute has gossip lost between a node and hosts of which deaf reports true; nil undoes it.
func (w *World) Mute(name string, deaf func(host string) bool) {
	if deaf == nil {
		w.process(name).deafTo.Store(nil)
		return
	}
	w.process(name).deafTo.Store(&deaf)
}

// at returns the process that serves at an address.
func (w *World) at(address string) *process {
	for _, p := range w.processes {
		if strings.HasPrefix(address, p.host+":") {
			return p
		}
	}
	return nil
}

// SetDisk gives a process that does not run another disk.
func (w *World) SetDisk(name string, disk *vfs.MemFS) { w.process(name).disk = disk }

// Close ends every process, and gives what they leave behind the time to end too.
func (w *World) Close() {
	for _, cc := range w.conns {
		cc.Close()
	}
	for _, p := range w.processes {
		if p.live != nil {
			w.Stop(p.name)
		}
	}
	time.Sleep(time.Minute)
}
