// Package orchestrator is the control plane: a few processes that agree by Raft on
// nodes, vnode slots, namespaces and settings, watch the nodes' health, and hand
// the topology out. No query passes through it, and nodes serve without it.
package orchestrator

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/kvasirdb/kvasir/internal/boottime"
	"github.com/kvasirdb/kvasir/internal/consensus"
	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Orchestrator is a running orchestrator.
type Orchestrator struct {
	cfg       Config
	transport rpc.Transport
	started   time.Time
	machine   *machine
	raft      *consensus.Raft
	health    *probes
	scaling   scaling
	measuring measuring
	copies    copyWatch
	gossip    *gossip.Gossip

	listener, adminListener net.Listener
	server                  *grpc.Server
	healthServer            *health.Server
	registry                *prometheus.Registry

	// leading is the term in which this orchestrator, as its leader, came to know all
	// that was committed before. In another term it must ask again.
	leading atomic.Uint64
	// seen is the greatest epoch that a node of this cluster said it has.
	seen atomic.Uint64
	// saidBehind is the control loop's: the log tells of an older copy once.
	saidBehind bool
	// hurried, too, is the control loop's: when it last had the nodes probed early.
	hurried  time.Time
	stopping chan struct{}
	stopOnce sync.Once
	cancel   context.CancelFunc
	workers  sync.WaitGroup
}

// Start starts an orchestrator and returns once it takes part in Raft. Errors name
// what keeps it from starting.
func Start(cfg Config) (*Orchestrator, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	tlsConfig, err := cfg.TLS.Load()
	if err != nil {
		return nil, err
	}
	cfg.Seams.setDefaults(tlsConfig)
	o := &Orchestrator{
		cfg: cfg, transport: rpc.Transport{Dial: cfg.Seams.Dial, TLS: tlsConfig}, started: time.Now(),
		machine: newMachine(), stopping: make(chan struct{}), registry: rpc.NewRegistry(),
	}
	o.health = newProbes(o)
	o.measuring.o = o
	o.copies.clock = cfg.Seams.BootClock
	run, cancel := context.WithCancel(context.Background())
	o.cancel = cancel
	if err := o.open(run); err != nil {
		o.Stop()
		return nil, err
	}
	return o, nil
}

func (s *Seams) setDefaults(tlsConfig *tls.Config) {
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
	if s.Raft == nil {
		s.Raft = func(bind, advertise string) (raft.StreamLayer, error) {
			return consensus.NewTCPStreamLayer(bind, advertise, tlsConfig)
		}
	}
	if s.WallClock == nil {
		s.WallClock = func() int64 { return time.Now().UnixMilli() }
	}
	if s.BootClock == nil {
		s.BootClock = boottime.Now
	}
}

// open makes the parts in the order in which they need each other.
func (o *Orchestrator) open(run context.Context) error {
	var err error
	// Ports first: a busy one is told before anything is touched.
	if o.listener, err = o.cfg.Seams.Listen(o.cfg.Listen); err != nil {
		return err
	}
	if o.adminListener, err = o.cfg.Seams.Listen(o.cfg.AdminListen); err != nil {
		return err
	}
	if err := o.openRaft(); err != nil {
		return err
	}
	o.describe(o.registry)
	o.describeRing(o.registry)
	o.registry.MustRegister(clusterCollector{o})
	o.workers.Go(func() {
		if err := rpc.ServeAdmin(run, o.adminListener, o.registry, o.ready, rpc.Route{Pattern: "GET /targets", Handler: o.serveTargets}); err != nil {
			o.cfg.Fatal(err)
		}
	})
	o.workers.Go(func() { o.lead(run) })
	o.workers.Go(func() { o.joinMembers(run) })
	if o.cfg.Provisioner != nil {
		o.workers.Go(func() { newProvisioning(o).run(run) })
	}
	o.startServer()
	return nil
}

func (o *Orchestrator) openRaft() error {
	self, _ := o.cfg.self()
	streams, err := o.cfg.Seams.Raft(o.cfg.RaftListen, self.RaftAddress)
	if err != nil {
		return err
	}
	var servers []consensus.Server
	for _, p := range o.cfg.Peers {
		servers = append(servers, consensus.Server{Name: p.Name, Address: p.RaftAddress})
	}
	group := ""
	if r := o.cfg.Recovery; r != nil {
		group = r.Topology.Recovery
	}
	o.raft, err = consensus.Open(consensus.Config{
		Name: o.cfg.Name, Servers: servers, Group: group, FS: o.cfg.Seams.FS, Dir: o.cfg.DataDir, Streams: streams,
		HeartbeatTimeout: o.cfg.ElectionTimeout, ElectionTimeout: o.cfg.ElectionTimeout, LeaderLease: o.cfg.ElectionTimeout / 2,
		Logger: o.cfg.Logger, Fatal: o.cfg.Fatal,
	}, o.machine)
	if errors.Is(err, consensus.ErrOtherGroup) {
		return fmt.Errorf("recover: %s holds an orchestrator of another generation: give this one an empty data_dir, and keep the other one from being started: %w", o.cfg.DataDir, err)
	}
	return err
}

// joinMembers starts gossip once the cluster has an identity, and health checks
// with it.
func (o *Orchestrator) joinMembers(run context.Context) {
	for o.machine.topology() == nil {
		changed := o.machine.changed()
		if o.machine.topology() != nil {
			break
		}
		select {
		case <-run.Done():
			return
		case <-changed:
		}
	}
	if err := o.startGossip(); err != nil {
		o.cfg.Fatal(err)
		return
	}
	o.workers.Go(func() {
		<-run.Done()
		o.gossip.Leave(time.Second) // best effort: the others notice anyway
		if err := o.gossip.Close(); err != nil {
			o.cfg.Logger.Warn("leaving the members", "err", err)
		}
	})
	o.health.run(run)
}

func (o *Orchestrator) startGossip() error {
	self, _ := o.cfg.self()
	// One of another generation under the same name is another member.
	name := "o." + o.cfg.Name
	if g := topology.Generation(o.machine.topology().Epoch); g > 0 {
		name += fmt.Sprintf(".%d", g)
	}
	transport, err := o.cfg.Seams.Gossip(o.cfg.GossipListen)
	if err != nil {
		return err
	}
	o.gossip, err = gossip.Start(gossip.Config{
		Name: name, Cluster: o.machine.topology().ClusterID, Bind: o.cfg.GossipListen, Advertise: self.GossipAddress,
		Transport: transport, Logger: o.cfg.Logger, Meta: gossipMeta(o.machine.topology()), SecretKey: o.cfg.gossipKey(),
		Seeds: func() []string {
			var out []string
			for _, p := range o.cfg.Peers {
				if p.Name != o.cfg.Name {
					out = append(out, p.GossipAddress)
				}
			}
			for _, n := range o.machine.topology().Nodes {
				out = append(out, n.GossipAddress)
			}
			return out
		},
	})
	return err
}

func (o *Orchestrator) startServer() {
	o.server = o.transport.NewServer()
	o.healthServer = health.NewServer()
	healthv1.RegisterHealthServer(o.server, o.healthServer)
	adminv1.RegisterControlServiceServer(o.server, controlService{o: o})
	adminv1.RegisterStatusServiceServer(o.server, statusService{o: o})
	adminv1.RegisterProcessServiceServer(o.server, rpc.Process{
		Name: o.cfg.Name, Software: o.cfg.Software, RunID: rand.Text(), Started: o.started, Ready: o.ready, Again: o.cfg.Restart,
	})
	topologyv1.RegisterTopologyServiceServer(o.server, topologyService{o: o})
	o.workers.Go(func() {
		if err := o.server.Serve(o.listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			o.cfg.Fatal(fmt.Errorf("serve %s: %w", o.cfg.Listen, err))
		}
	})
	o.cfg.Logger.Info("serving", "name", o.cfg.Name, "address", o.cfg.Listen, "orchestrators", len(o.cfg.Peers))
}

// leads reports whether this orchestrator leads and knows all that was agreed on.
func (o *Orchestrator) leads() bool {
	term := o.leading.Load()
	// The term is read last, and only grows: it was the same when IsLeader was asked.
	return term != 0 && o.raft.IsLeader() && o.raft.Status().Term == term
}

// leaderAddress returns where the leader serves, if there is one.
func (o *Orchestrator) leaderAddress() (string, bool) {
	name, ok := o.raft.Leader()
	for _, p := range o.cfg.Peers {
		if ok && p.Name == name && name != o.cfg.Name {
			return p.Address, true
		}
	}
	return "", false
}

// leadInterval is how often the leader looks for something to do without being
// told.
const leadInterval = 200 * time.Millisecond

// hurryInterval is how often the leader has so many nodes probed while it waits for
// what they say: of many less often.
func hurryInterval(nodes int) time.Duration {
	return max(200*time.Millisecond, time.Duration(nodes)*2*time.Millisecond)
}

// lead runs the leader's control loop whenever this orchestrator leads: observe,
// decide, propose.
func (o *Orchestrator) lead(run context.Context) {
	tick := time.NewTicker(leadInterval)
	defer tick.Stop()
	for {
		changed := o.machine.changed()
		switch {
		case !o.raft.IsLeader():
		case !o.leads():
			o.takeOver(run)
		default:
			o.step(run)
		}
		select {
		case <-run.Done():
			return
		case <-o.raft.LeaderChanges():
		case <-changed:
		case <-tick.C:
		}
	}
}

// proposeTimeout bounds one proposal of the control loop.
const proposeTimeout = 5 * time.Second

// takeOver waits until everything that was committed before is known here.
func (o *Orchestrator) takeOver(run context.Context) {
	ctx, cancel := context.WithTimeout(run, proposeTimeout)
	defer cancel()
	term := o.raft.Status().Term
	if err := o.raft.Barrier(ctx); err != nil {
		return // asked again at the next tick, if this one still leads
	}
	o.leading.Store(term)
	o.cfg.Logger.Info("leading", "term", term)
	o.step(run)
}

// noteEpoch takes in the epoch that a node has.
func (o *Orchestrator) noteEpoch(epoch uint64) {
	for {
		seen := o.seen.Load()
		if epoch <= seen || o.seen.CompareAndSwap(seen, epoch) {
			return
		}
	}
}

// behind returns an error when a node has a later epoch than this leader, whose
// state then is an older copy: a change could give out epochs, incarnations and
// namespace identifiers again.
func (o *Orchestrator) behind(ctx context.Context) error {
	late := func() bool {
		t := o.machine.topology()
		return t != nil && t.Epoch < o.seen.Load()
	}
	if !late() {
		return nil
	}
	if err := o.raft.Barrier(ctx); err != nil { // it may only be slow to apply
		return consensusError(err)
	}
	if !late() {
		return nil
	}
	if err := o.superseded(0); err != nil {
		return err
	}
	return rpc.Errorf(codes.DataLoss, "EPOCH_REGRESSION",
		"the orchestrators are at epoch %s, but a node has epoch %s: their data directories are older copies, and nothing can be changed; put newer ones back",
		topology.EpochString(o.machine.topology().Epoch), topology.EpochString(o.seen.Load()))
}

// superseded returns an error when a node is in a later generation: others were made
// orchestrators, and these are to be asked. Nobody follows what is agreed on here.
func (o *Orchestrator) superseded(known uint64) *rpc.Error {
	t := o.machine.topology()
	known = topology.Generation(max(known, o.seen.Load()))
	if t == nil || known <= topology.Generation(t.Epoch) {
		return nil
	}
	return rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader,
		"this orchestrator is of generation %d, and the cluster was recovered and is in generation %d: stop it, and start it with an empty directory and the recovery file where it is one of the new ones",
		topology.Generation(t.Epoch), known)
}

// unbegun returns an error while what was agreed on is a recovery, and nobody has brought
// the file that says of what.
func (o *Orchestrator) unbegun() error {
	if group := o.raft.Group(); o.machine.topology() == nil && group != "" && o.cfg.Recovery == nil {
		return fmt.Errorf("recovery %s has not begun yet: start the orchestrators with its file (--recover)", group)
	}
	return nil
}

// step proposes what is to be done next, if anything.
func (o *Orchestrator) step(run context.Context) {
	if err := o.unbegun(); err != nil {
		if !o.saidBehind {
			o.saidBehind = true
			o.cfg.Logger.Error("nothing can be agreed on", "err", err)
		}
		return
	}
	if err := o.behind(run); err != nil {
		if (rpc.AsError(err).Code == codes.DataLoss || o.superseded(0) != nil) && !o.saidBehind {
			o.saidBehind = true
			o.cfg.Logger.Error("this leader changes nothing: what it knows is old", "err", err)
		}
		return
	}
	if s := o.machine.state.Load(); (changing(s) || settling(s, o.health.view()) || copiesChange(s)) && time.Since(o.hurried) >= hurryInterval(len(s.Topology.Nodes)) {
		o.hurried = time.Now()
		o.health.hurryAll()
	}
	state, view := o.machine.state.Load(), o.health.view()
	view.held = func() holdings { return o.measuring.held(run, state.Topology) }
	if state != nil {
		o.copies.look(o.leading.Load(), state.Topology)
		view.copies = &o.copies
	}
	cmd, err := decide(state, &o.cfg, view, rand.Text())
	if err != nil {
		o.cfg.Logger.Error("cannot decide", "err", err)
		return
	}
	if cmd == nil && state != nil {
		cmd = o.scaling.next(state, view)
	}
	if cmd == nil {
		return
	}
	ctx, cancel := context.WithTimeout(run, proposeTimeout)
	defer cancel()
	var conflict *topology.Refusal
	switch _, err := o.propose(ctx, cmd); {
	case err == nil:
		o.cfg.Logger.Info("agreed", "subject", cmd.GetChange().GetSubject(), "what", cmd.GetChange().GetWhat())
	case errors.As(err, &conflict) && conflict.Kind == topology.Conflict:
		// Something else changed meanwhile; the next step sees it.
	default:
		o.cfg.Logger.Warn("could not agree", "subject", cmd.GetChange().GetSubject(), "what", cmd.GetChange().GetWhat(), "err", err)
	}
}

// ready returns why the orchestrator is of no use now, or nil.
func (o *Orchestrator) ready() error {
	if _, ok := o.raft.Leader(); !ok {
		return errors.New("no leader")
	}
	if err := o.unbegun(); err != nil {
		return err
	}
	if o.machine.topology() == nil {
		return errors.New("the cluster has not been founded")
	}
	if err := o.superseded(0); err != nil {
		return err
	}
	return nil
}

// describe registers the gauges of an orchestrator.
func (o *Orchestrator) describe(reg prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvasir", Subsystem: "orchestrator", Name: name, Help: help}, f))
	}
	gauge("leader", "1 while this orchestrator leads.", func() float64 {
		if o.leads() {
			return 1
		}
		return 0
	})
	gauge("term", "Raft term.", func() float64 { return float64(o.raft.Status().Term) })
	gauge("applied_index", "Last entry of the Raft log that was applied.", func() float64 { return float64(o.raft.Status().Applied) })
	gauge("epoch", "Epoch of the agreed topology.", func() float64 {
		if t := o.machine.topology(); t != nil {
			return float64(t.Epoch)
		}
		return 0
	})
	gauge("nodes", "Registered nodes.", func() float64 {
		if t := o.machine.topology(); t != nil {
			return float64(len(t.Nodes))
		}
		return 0
	})
	gauge("unhealthy_nodes", "Nodes that this orchestrator takes for unhealthy.", func() float64 {
		n := 0
		if t := o.machine.topology(); t != nil {
			for _, node := range t.Nodes {
				if !o.health.healthy(node.Incarnation) {
					n++
				}
			}
		}
		return float64(n)
	})
}

// describeRing registers the gauges of the ring as it was agreed on.
func (o *Orchestrator) describeRing(reg prometheus.Registerer) {
	gauge := func(name, help string, f func(*topology.State) float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvasir", Subsystem: "ring", Name: name, Help: help}, func() float64 {
			if s := o.machine.state.Load(); s != nil {
				return f(s)
			}
			return 0
		}))
	}
	gauge("imbalance_ratio", "Slots of the node that has most over the mean of the nodes that have some; 1 is even, 0 no ring.", func(s *topology.State) float64 {
		return s.Topology.Imbalance()
	})
	gauge("losses_total", "How often nodes were given up for lost with too few replicas left of some vnodes.", func(s *topology.State) float64 {
		return float64(len(s.Losses))
	})
	gauge("last_loss_timestamp_seconds", "When nodes were last given up for lost with too few replicas left, in seconds since 1970; 0: never.", func(s *topology.State) float64 {
		if n := len(s.Losses); n > 0 {
			return float64(s.Losses[n-1].AtMillis) / 1000
		}
		return 0
	})
	gauge("copies_in_sync", "Copies of vnodes on reporting nodes that are in sync.", func(s *topology.State) float64 {
		inSync, _ := countCopies(s.Topology)
		return float64(inSync)
	})
	gauge("copies_out_of_sync", "Copies of vnodes on reporting nodes that are not in sync, of namespaces whose writes wait for them.", func(s *topology.State) float64 {
		_, out := countCopies(s.Topology)
		return float64(out)
	})
	gauge("moves_left", "Moves of the operation under way that are not done.", func(s *topology.State) float64 {
		if op := s.Active(); op != nil {
			return float64(op.Left())
		}
		return 0
	})
}

// handOver has another orchestrator lead, if this one does: the others need not find
// out that it is gone.
func (o *Orchestrator) handOver() {
	if !o.raft.IsLeader() || len(o.cfg.Peers) == 1 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.cfg.ElectionTimeout)
	defer cancel()
	if err := o.raft.HandOver(ctx); err != nil {
		o.cfg.Logger.Warn("handing over leadership: the others elect a leader", "err", err)
	}
}

// Stop stops the orchestrator and returns when everything has ended.
func (o *Orchestrator) Stop() {
	o.stopOnce.Do(func() {
		close(o.stopping)
		if o.healthServer != nil {
			o.healthServer.Shutdown()
		}
		o.cancel()
		if o.server != nil {
			o.server.Stop()
		}
		for _, l := range []net.Listener{o.listener, o.adminListener} {
			if l != nil {
				l.Close() // closed already where a server had it
			}
		}
		// Raft first: the control loop may be waiting for it.
		if o.raft != nil {
			if err := o.raft.Close(); err != nil {
				o.cfg.Logger.Error("closing Raft", "err", err)
			}
		}
		o.workers.Wait()
	})
}

// Run runs an orchestrator until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	o, err := Start(cfg)
	if err != nil {
		return err
	}
	<-ctx.Done()
	cfg.Logger.Info("stopping")
	o.handOver()
	o.Stop()
	cfg.Logger.Info("stopped")
	return nil
}
