// Package node is the process that holds records: it opens the data directory,
// makes itself known to the orchestrators, keeps the topology, and joins storage,
// replica, coordinator and handoff to a server. It decides nothing about records
// or the cluster itself.
package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/kvasirdb/kvasir/internal/antientropy"
	"github.com/kvasirdb/kvasir/internal/boottime"
	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/handoff"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Node is a running node.
type Node struct {
	cfg Config
	// processHash is that of cfg.
	processHash uint64
	transport   rpc.Transport
	started     time.Time

	store       *storage.Store
	id          identity
	seal        *adminv1.Seal // as it was on disk, or nil
	registrar   *registrar
	fence       *replica.Fence
	clock       *replica.Clock
	hints       *replica.Hints
	replica     *replica.Replica
	coordinator *coordinator.Coordinator
	replayer    *handoff.Replayer
	repairer    *antientropy.Repairer
	scrubber    *scrubber
	collector   *antientropy.Collector
	assignments *handoff.Assignments
	filler      *handoff.Filler
	joiner      *handoff.Joiner
	reporting   *reporting
	peers       *peers
	pool        *rpc.Pool
	loop        *rpc.Loop[*replicav1.Call, *replicav1.Reply]
	topologies  *topologies
	gossip      *gossip.Gossip
	process     *process

	listener, adminListener net.Listener
	server                  *grpc.Server
	health                  *health.Server
	registry                *prometheus.Registry

	// built is set once every part above is there.
	built atomic.Bool
	// removed is why the orchestrators turned this data directory away.
	removed atomic.Pointer[string]
	// stalled is why nothing is served until the disk goes on, or nil.
	stalled  atomic.Pointer[string]
	disk     atomic.Pointer[diskUse]
	stopping chan struct{} // closed when a stop begins
	stopOnce sync.Once
	cancel   context.CancelFunc
	workers  sync.WaitGroup
	// endHints ends the writing of hints, which outlives the other workers.
	endHints context.CancelFunc
	hinting  sync.WaitGroup
	// wrongEpoch is the epoch, if any, of which the disk had another topology than was agreed on.
	wrongEpoch uint64
	// namespaces are those that the topology had when the disk was last rid of others.
	namespaces []uint32
	watched    struct {
		sync.Mutex
		changed chan struct{} // closed and replaced when the health of a peer changes
		alive   map[uint64]bool
	}
}

// Start starts a node and returns once it serves, or, when it has not been
// registered yet, once it has. A node that was registered before starts without an
// orchestrator. Errors name what keeps it from starting.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	cfg.Complete()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Seams.setDefaults()
	tlsConfig, err := cfg.TLS.Load()
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, processHash: cfg.hash(), transport: rpc.Transport{Dial: cfg.Seams.Dial, TLS: tlsConfig},
		started: time.Now(), stopping: make(chan struct{}), registry: rpc.NewRegistry(),
	}
	n.watched.changed = make(chan struct{})
	run, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	if err := n.open(ctx, run); err != nil {
		n.Stop()
		return nil, err
	}
	return n, nil
}

func (s *Seams) setDefaults() {
	if s.FS == nil {
		s.FS = vfs.Default
	}
	if s.Listen == nil {
		s.Listen = rpc.Listen
	}
	if s.Dial == nil {
		s.Dial = rpc.NetDialer
	}
	if s.Gossip == nil {
		s.Gossip = func(string) (memberlist.Transport, error) { return nil, nil }
	}
	if s.WallClock == nil {
		s.WallClock = func() int64 { return time.Now().UnixMilli() }
	}
	if s.BootClock == nil {
		s.BootClock = boottime.Now
	}
}

// open makes the parts in the order in which they need each other.
func (n *Node) open(ctx, run context.Context) error {
	var err error
	// Ports first: a busy one is told before anything is touched.
	if n.listener, err = n.cfg.Seams.Listen(n.cfg.Listen); err != nil {
		return err
	}
	if n.adminListener, err = n.cfg.Seams.Listen(n.cfg.AdminListen); err != nil {
		return err
	}
	if err := n.openStore(); err != nil {
		return err
	}
	n.workers.Go(func() {
		if err := rpc.ServeAdmin(run, n.adminListener, n.registry, n.ready); err != nil {
			n.cfg.Fatal(err)
		}
	})
	if err := n.introduce(ctx); err != nil {
		return err
	}
	return n.serve(run)
}

// openStore opens the data directory. One that lacks records it had acknowledged, or
// that cannot be read, is set aside: it must not vote again, and what it held is
// pulled from its peers by the new directory that takes its place.
func (n *Node) openStore() error {
	err := n.readDirectory()
	reason := ""
	switch {
	case errors.Is(err, storage.ErrCorrupt):
		reason = err.Error()
	case err != nil:
		return err
	default:
		reason = n.store.LostTail()
		if mutant.On("lost-tail-unnoticed") {
			reason = ""
		}
	}
	if reason == "" {
		return nil
	}
	if n.store != nil {
		if err := n.store.Close(); err != nil {
			n.cfg.Logger.Warn("closing the damaged data directory", "err", err)
		}
		n.store = nil
	}
	path, err := storage.SetAside(n.cfg.Seams.FS, n.cfg.DataDir, time.UnixMilli(n.cfg.Seams.WallClock()).UTC().Format("20060102T150405Z"))
	if err != nil {
		return fmt.Errorf("the data directory is damaged (%s) and cannot be set aside: %w", reason, err)
	}
	n.cfg.Logger.Error("the data directory is damaged and was set aside: the node joins anew and is filled from its peers; what was set aside is deleted once it is",
		"reason", reason, "set_aside", path)
	return n.readDirectory()
}

// readDirectory opens the store and reads what the node keeps about itself.
func (n *Node) readDirectory() error {
	var err error
	n.store, err = storage.Open(storage.Config{
		FS: n.cfg.Seams.FS, Dir: n.cfg.DataDir, CacheBytes: n.cfg.CacheBytes, RecordCacheBytes: n.cfg.RecordCacheBytes, MemTableBytes: uint64(n.cfg.MemTableBytes),
		MinFreeBytes: uint64(n.cfg.MinFreeDiskBytes), Logger: n.cfg.Logger, Fatal: n.cfg.Fatal,
		SyncDelay: n.cfg.Seams.SyncDelay,
	})
	if err != nil {
		return err
	}
	if n.id, err = loadIdentity(n.store); err != nil {
		return err
	}
	known, err := loadTopology(n.store)
	if err != nil {
		return err
	}
	n.fence = replica.NewFence(known)
	if n.seal, err = loadSeal(n.store); err != nil {
		return err
	}
	n.assignments, err = handoff.LoadAssignments(n.store)
	return err
}

// introduce makes sure that the node has an incarnation, which takes an orchestrator
// the first time.
func (n *Node) introduce(ctx context.Context) error {
	n.registrar = &registrar{cfg: &n.cfg, store: n.store, dial: n.transport, bootID: rand.Text(), orchs: func() []string {
		return n.topologiesNow().orchestrators()
	}, admits: n.followable}
	for said := ""; ; {
		id, t, err := n.registrar.register(ctx, n.id)
		switch {
		case err == nil:
			n.id = id
			n.cfg.Logger.Info("registered", "incarnation", id.Incarnation, "cluster", id.ClusterID, "epoch", topology.EpochString(t.Epoch))
			return n.firstTopology(t)
		case refused(err):
			return fmt.Errorf("the orchestrators turned node %s away: %w", n.cfg.Name, err)
		case n.id.Incarnation != 0:
			n.cfg.Logger.Warn("no orchestrator answers: starting with the topology on disk", "reason", err)
			return nil
		}
		if text := err.Error(); text != said {
			n.cfg.Logger.Info("waiting for an orchestrator", "reason", text)
			said = text
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// followable returns why the orchestrators that agreed on a topology are not to be followed,
// or nil: their generation is over, or is not the one that the node waits for.
func (n *Node) followable(t *topology.Topology) *rpc.Error {
	now := n.topologiesNow()
	if cur := now.current(); topology.Generation(t.Epoch) < topology.Generation(cur.Epoch) {
		return rpc.Errorf(codes.Unavailable, "GENERATION_OVER", "its orchestrators are of generation %d, the cluster was recovered and is in generation %d", topology.Generation(t.Epoch), topology.Generation(cur.Epoch))
	}
	return now.admits(t)
}

// topologiesNow returns the node's topologies, while it is starting some that stand for what
// is on its disk.
func (n *Node) topologiesNow() *topologies {
	if n.topologies != nil {
		return n.topologies
	}
	return newTopologies(n.store, n.fence, n.seal, n.transport, n.id.ClusterID, n.cfg.Orchestrators, n.cfg.Logger)
}

// firstTopology keeps what a registration brought.
func (n *Node) firstTopology(t *topology.Topology) error {
	first := n.topologiesNow()
	first.adopted = func(*topology.Topology) {}
	first.prepare = func(t *topology.Topology) error { return n.assignments.Prepare(n.id.Incarnation, t) }
	first.settle = func(*topology.Topology) error { return nil }
	if cur := n.fence.Topology(); cur.Fails(t.Check()) {
		n.cfg.Logger.Warn("the topology on this node's disk is not the one that was agreed on: corrected",
			"epoch", topology.EpochString(cur.Epoch), "settings", topology.DescribeChanges(topology.DiffSettings(cur.Settings, t.Settings)))
		n.fence, n.wrongEpoch = replica.NewFence(t), t.Epoch // nothing has been served by it yet
		first.fence = n.fence
	}
	if err := first.adopt(t); err != nil {
		return err
	}
	if err := first.write(n.fence.Topology()); err != nil {
		n.cfg.Logger.Warn("cannot keep the topology on disk yet", "err", err) // it is tried again when the node serves
	}
	return nil
}

// serve builds the request path and starts everything that runs.
func (n *Node) serve(run context.Context) error {
	cfg := &n.cfg
	n.clock = replica.NewClock(cfg.Seams.WallClock, n.store.Reserved(), n.store.ReserveClock, cfg.Logger)
	n.process = newProcess(cfg.CPULimit)
	n.process.simulated = cfg.Seams.CPU
	var err error
	if n.hints, err = replica.LoadHints(n.store, cfg.Seams.WallClock, cfg.Logger); err != nil {
		return err
	}
	n.topologies = newTopologies(n.store, n.fence, n.seal, n.transport, n.id.ClusterID, cfg.Orchestrators, cfg.Logger)
	n.topologies.wrong.Store(n.wrongEpoch)
	n.topologies.adopted, n.topologies.prepare, n.topologies.settle = n.adopted, n.prepare, n.settle
	n.pool = rpc.NewPool()
	n.replica = replica.New(replica.Config{
		Self: n.id.Incarnation, Store: n.store, Clock: n.clock, Fence: n.fence, Hints: n.hints, Logger: cfg.Logger,
		CatchUp: func(ctx context.Context, epoch uint64, address string) error {
			return n.topologies.refresh(ctx, epoch, address)
		},
		Refuse: n.refuse, Load: n.load, Open: n.assignments.Open, Address: cfg.Advertise, Pool: n.pool,
	})
	n.loop = rpc.NewLoop(rpc.Replica, n.pool, func(ctx context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
		n.replica.Handle(ctx, cfg.Advertise, calls, reply)
	})
	n.peers = &peers{
		self: n.id.Incarnation, cluster: n.id.ClusterID, address: cfg.Advertise, clock: n.clock, loop: n.loop, cached: n.replica.ReadCached, health: n.topologies.observed,
		cfg: rpc.LinkConfig{Transport: n.transport, WallClock: cfg.Seams.WallClock},
	}
	n.peers.links.Store(&map[uint64]*replicaLink{})
	n.reporting = newReporting(n)
	n.coordinator = coordinator.New(coordinator.Config{
		Self: n.id.Incarnation, Fence: n.fence, Clock: n.clock, Hints: n.hints, Peers: n.peers, Logger: cfg.Logger,
		Refresh: func(ctx context.Context, epoch, peer uint64) error {
			if p := n.fence.Topology().Node(peer); p != nil {
				return n.topologies.refresh(ctx, epoch, p.Address)
			}
			return n.topologies.refresh(ctx, epoch)
		},
		Refuse: n.refuseClients, Stalled: n.store.Stalling, Metrics: n.registry, Evict: n.reporting.evict,
	})
	n.replayer = handoff.New(handoff.Config{Fence: n.fence, Hints: n.hints, Peers: n.peers, Logger: cfg.Logger})
	n.repairer = antientropy.New(antientropy.Config{
		Self: n.id.Incarnation, Fence: n.fence, Store: n.store, Peers: n.peers, Logger: cfg.Logger, Metrics: n.registry,
		Clock: func() hlc.Timestamp { return hlc.At(n.clock.Now()) },
	})
	n.collector = antientropy.NewCollector(antientropy.CollectorConfig{
		Self: n.id.Incarnation, Fence: n.fence, Store: n.store, Peers: n.peers, Logger: cfg.Logger, Metrics: n.registry,
		Sync: n.repairer.Sync, Paused: n.repairer.Paused,
	})
	n.filler = handoff.NewFiller(handoff.FillerConfig{
		Self: n.id.Incarnation, Store: n.store, Assignments: n.assignments, Fence: n.fence, Peers: n.peers, Logger: cfg.Logger, Metrics: n.registry,
		Drained: n.peers.drained, Changed: n.topologies.changed, BytesPerSecond: cfg.MoveBytesPerSecond, CommitDelay: cfg.MoveCommitDelay, LeastFileBytes: cfg.Seams.LeastFileBytes, Load: n.load, Join: n.clock.Join,
		Verify: func(ctx context.Context, t *topology.Topology, place storage.Place, peer uint64) error {
			_, err := n.repairer.Sync(ctx, t, place, peer)
			return err
		},
	})
	n.joiner = handoff.NewJoiner(handoff.JoinerConfig{Filler: n.filler, Leased: n.reporting.leased, Clock: cfg.Seams.BootClock})
	n.scrubber = newScrubber(n)
	n.measureDisk()
	n.describe(n.registry)
	n.adopted(n.fence.Topology())
	if err := n.startGossip(); err != nil {
		return err
	}
	n.built.Store(true)
	n.startServer()
	n.startWorkers(run)
	return nil
}

// adopted brings the parts up to date with a new topology.
func (n *Node) adopted(t *topology.Topology) {
	n.hints.SetBounds(replica.HintBounds{Bytes: t.Settings.MaxHintBytes, Count: uint64(t.Settings.MaxHints), Age: t.Settings.MaxHintAge})
	n.peers.update(t)
	n.announce()
	if t.Epoch > 0 && (t.Node(n.id.Incarnation) == nil || t.Lost(n.id.Incarnation)) {
		n.cfg.Logger.Error("this node is no part of the cluster any more", "reason", n.removedIn(t))
	}
}

// prepare has the disk ready for a topology. Certificates come first: where the node is
// filled there must be none.
func (n *Node) prepare(t *topology.Topology) error {
	if err := n.replica.VoidCertificates(t); err != nil {
		return err
	}
	return n.assignments.Prepare(n.id.Incarnation, t)
}

// settle has the disk forget what is over under a topology that is on it.
func (n *Node) settle(t *topology.Topology) error {
	if err := n.assignments.Settle(n.id.Incarnation, t); err != nil {
		return err
	}
	if ids := namespaceIDs(t); !slices.Equal(ids, n.namespaces) && n.dropNamespaces(t) {
		n.namespaces = ids
	}
	n.forgetAside(t)
	return nil
}

// forgetAside deletes what was set aside once the node has all it needs again.
func (n *Node) forgetAside(t *topology.Topology) {
	if len(t.Incoming(n.id.Incarnation)) > 0 || !t.Names(n.id.Incarnation) || t.Fills(n.id.Incarnation) {
		return
	}
	if err := storage.ForgetAside(n.cfg.Seams.FS, n.cfg.DataDir); err != nil {
		n.cfg.Logger.Error("cannot delete the data directory that was set aside", "err", err)
	}
}

func namespaceIDs(t *topology.Topology) (ids []uint32) {
	for i := range t.Namespaces {
		ids = append(ids, t.Namespaces[i].ID)
	}
	return ids
}

// dropNamespaces deletes the records of namespaces that are gone for good: identifiers
// are never used again. It reports whether none is left.
func (n *Node) dropNamespaces(t *topology.Topology) bool {
	if !t.Formed() {
		return true
	}
	ids, err := n.store.Namespaces()
	if err != nil {
		n.cfg.Logger.Error("cannot list the namespaces on disk", "err", err)
		return false
	}
	done := true
	for _, id := range ids {
		if t.NamespaceByID(id) != nil {
			continue
		}
		if err := n.store.DropNamespace(id); err != nil {
			n.cfg.Logger.Error("cannot delete a dropped namespace", "namespace_id", id, "err", err)
			done = false
			continue
		}
		n.cfg.Logger.Info("deleted a dropped namespace", "namespace_id", id)
	}
	return done
}

func (n *Node) startGossip() error {
	transport, err := n.cfg.Seams.Gossip(n.cfg.GossipListen)
	if err != nil {
		return err
	}
	n.gossip, err = gossip.Start(gossip.Config{
		Name: gossipName(n.id.Incarnation), Cluster: n.id.ClusterID, Bind: n.cfg.GossipListen, Advertise: n.cfg.GossipAdvertise,
		Transport: transport, Logger: n.cfg.Logger, Meta: n.meta(), SecretKey: n.cfg.gossipKey(),
		Seeds: func() []string {
			var out []string
			t := n.fence.Topology()
			for _, o := range t.Orchestrators {
				out = append(out, o.GossipAddress)
			}
			for _, p := range t.Nodes {
				if p.Incarnation != n.id.Incarnation {
					out = append(out, p.GossipAddress)
				}
			}
			return out
		},
	})
	if err != nil {
		return err
	}
	n.peers.gossip.Store(n.gossip)
	return nil
}

func (n *Node) meta() gossip.Meta {
	s, _ := n.state()
	return gossip.Meta{Incarnation: n.id.Incarnation, Epoch: n.fence.Topology().Epoch, State: byte(s)}
}

// announce tells the other members the node's state.
func (n *Node) announce() {
	if g := n.peers.gossip.Load(); g != nil {
		g.SetMeta(n.meta())
	}
}

func (n *Node) startServer() {
	n.server = n.transport.NewServer()
	n.health = health.NewServer()
	healthv1.RegisterHealthServer(n.server, n.health)
	kvv1.RegisterKVServiceServer(n.server, kvService{Coordinator: n.coordinator, node: n})
	replicav1.RegisterReplicaServiceServer(n.server, replicaService{node: n})
	if n.cfg.role() == topology.Reporting {
		kvv1.RegisterReportServiceServer(n.server, newReportService(n))
	}
	topologyv1.RegisterTopologyServiceServer(n.server, topologyService{node: n})
	adminv1.RegisterControlServiceServer(n.server, controlService{node: n})
	adminv1.RegisterStatusServiceServer(n.server, statusService{node: n})
	adminv1.RegisterRepairServiceServer(n.server, repairService{node: n})
	adminv1.RegisterRecoveryServiceServer(n.server, recoveryService{node: n})
	adminv1.RegisterProcessServiceServer(n.server, rpc.Process{
		Name: n.cfg.Name, Software: n.cfg.Software, RunID: n.registrar.bootID, Started: n.started, Ready: n.ready, Again: n.cfg.Restart,
	})
	n.updateHealth()
	n.workers.Go(func() {
		if err := n.server.Serve(n.listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			n.cfg.Fatal(fmt.Errorf("serve %s: %w", n.cfg.Listen, err))
		}
	})
	n.cfg.Logger.Info("serving", "name", n.cfg.Name, "incarnation", n.id.Incarnation, "address", n.cfg.Advertise)
}

func (n *Node) startWorkers(run context.Context) {
	must := func(ctx context.Context, work func(context.Context) error) func() {
		return func() {
			if err := work(ctx); err != nil && ctx.Err() == nil {
				n.cfg.Fatal(err)
			}
		}
	}
	hints, end := context.WithCancel(context.Background())
	n.endHints = end
	n.hinting.Go(must(hints, n.hints.Run))
	n.workers.Go(must(run, n.clock.Run))
	n.workers.Go(must(run, n.replayer.Run))
	n.workers.Go(must(run, n.repairer.Run))
	n.workers.Go(func() { n.scrubber.run(run) })
	n.workers.Go(func() { n.scrubber.mend(run) })
	n.workers.Go(must(run, n.collector.Run))
	n.workers.Go(must(run, n.filler.Run))
	n.workers.Go(func() { n.reporting.evictLaggards(run) })
	if n.cfg.role() == topology.Reporting {
		n.workers.Go(must(run, n.joiner.Run))
		n.workers.Go(func() { n.reporting.keepLease(run) })
	}
	n.workers.Go(func() { n.sweep(run) })
	n.workers.Go(func() { n.topologies.run(run) })
	n.workers.Go(func() { n.topologies.follow(run) })
	n.workers.Go(func() { n.process.run(run, n.everySecond) })
	n.workers.Go(func() { n.watchDisk(run) })
	n.workers.Go(func() { n.keepRegistered(run) })
}

// everySecond looks after what changes slowly. It must not wait for the disk.
func (n *Node) everySecond() {
	n.noticeStall()
	n.updateHealth()
	n.noticeHealth()
	n.announce()
}

// noticeHealth tells watchers when a peer came or went.
func (n *Node) noticeHealth() {
	alive := map[uint64]bool{}
	changed := false
	n.watched.Lock()
	defer n.watched.Unlock()
	for _, p := range n.fence.Topology().Nodes {
		alive[p.Incarnation] = n.peers.Alive(p.Incarnation)
		changed = changed || alive[p.Incarnation] != n.watched.alive[p.Incarnation]
	}
	n.watched.alive = alive
	if changed {
		close(n.watched.changed)
		n.watched.changed = make(chan struct{})
	}
}

func (n *Node) healthChanged() <-chan struct{} {
	n.watched.Lock()
	defer n.watched.Unlock()
	return n.watched.changed
}

// keepRegistered registers a node that had to start without an orchestrator, and
// thereby its new addresses.
func (n *Node) keepRegistered(run context.Context) {
	for said := ""; run.Err() == nil; {
		_, t, err := n.registrar.register(run, n.id)
		if err == nil {
			if err := n.topologies.adopt(t); err != nil {
				n.cfg.Logger.Error("cannot keep the topology", "err", err)
			}
			return
		}
		reason := err.Error()
		if expelled(err) {
			n.removed.Store(&reason)
			n.cfg.Logger.Error("the orchestrators turned this node away", "reason", reason)
			n.announce()
			return
		}
		if refused(err) && reason != said {
			n.cfg.Logger.Error("an orchestrator refuses the registration; the node goes on with the topology on disk", "reason", reason)
			said = reason
		}
		select {
		case <-run.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// ready returns why the node does not serve, or nil.
func (n *Node) ready() error {
	select {
	case <-n.stopping:
		return errors.New("stopping")
	default:
	}
	if !n.built.Load() {
		return errors.New("waits for an orchestrator")
	}
	if s, reason := n.state(); s != adminv1.NodeStatus_STATE_SERVING {
		return fmt.Errorf("%s: %s", stateName(s), reason)
	}
	if !n.peers.settled() {
		return errors.New("connects to its peers")
	}
	return nil
}

func (n *Node) updateHealth() {
	s := healthv1.HealthCheckResponse_SERVING
	if n.ready() != nil {
		s = healthv1.HealthCheckResponse_NOT_SERVING
	}
	n.health.SetServingStatus("", s)
	n.health.SetServingStatus(kvv1.KVService_ServiceDesc.ServiceName, s)
}

// Stop stops the node and returns when everything has ended. Requests being served
// are waited for, at most Config.DrainTimeout; nothing acknowledged is lost.
func (n *Node) Stop() {
	n.stopOnce.Do(func() {
		close(n.stopping)
		if n.server != nil {
			n.drain()
		}
		n.cancel()
		if n.gossip != nil {
			if err := n.gossip.Close(); err != nil {
				n.cfg.Logger.Warn("leaving the members", "err", err)
			}
		}
		if n.server != nil {
			n.server.Stop()
		}
		for _, l := range []net.Listener{n.listener, n.adminListener} {
			if l != nil {
				l.Close() // closed already where a server had it
			}
		}
		n.workers.Wait()
		// From here on nobody asks for anything: links, then what they call into, then
		// the disk.
		if n.coordinator != nil {
			n.coordinator.Close()
			if n.endHints != nil {
				n.endHints() // what the last writes left undone is kept by now
				n.hinting.Wait()
			}
			n.peers.close()
			n.loop.Close()
			n.pool.Close()
		}
		if n.store != nil {
			if err := n.store.Close(); err != nil {
				n.cfg.Logger.Error("closing the data directory", "err", err)
			}
		}
	})
}

// drain lets clients go elsewhere and finishes what has begun.
func (n *Node) drain() {
	n.updateHealth()
	n.announce()
	ctx, cancel := context.WithTimeout(context.Background(), n.cfg.DrainTimeout)
	defer cancel()
	if err := n.coordinator.Drain(ctx); err != nil {
		n.cfg.Logger.Warn("stopping before every request was served", "err", err)
	}
	n.gossip.Leave(time.Second) // best effort: the others notice anyway
}

// Run runs a node until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	n, err := Start(ctx, cfg)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to stop while it was starting
		}
		return err
	}
	<-ctx.Done()
	cfg.Logger.Info("stopping")
	n.Stop()
	cfg.Logger.Info("stopped")
	return nil
}
