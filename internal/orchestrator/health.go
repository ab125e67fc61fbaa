package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// observation is a node as it was last seen.
type observation struct {
	verdict verdict
	changed time.Time // when its state changed last
	// sinceMillis is that in milliseconds since 1970.
	sinceMillis int64
	status      *adminv1.NodeStatus // nil when it never answered
	at          time.Time           // of status
	looks       []look              // the newest, oldest first; replaced, never changed
}

// look is what became of one look at a node.
type look struct {
	finding
	began time.Time
	took  time.Duration
}

// keepLooks is how many looks at a node are kept.
const keepLooks = 10

// well reports whether a node passed its last checks.
func (obs *observation) well() bool {
	return obs.verdict.state == topologyv1.NodeHealth_STATE_HEALTHY && obs.verdict.bad == 0
}

// probes probes every node of the topology. It runs on every orchestrator, so that
// whichever a node watches can tell it.
type probes struct {
	o  *Orchestrator
	mu struct {
		sync.Mutex
		nodes   map[uint64]*observation
		changed chan struct{} // closed and replaced when a state changes
		// hurry holds, by node, a channel that asks for a probe now.
		hurry map[uint64]chan struct{}
	}
}

func newProbes(o *Orchestrator) *probes {
	h := &probes{o: o}
	h.mu.nodes = map[uint64]*observation{}
	h.mu.hurry = map[uint64]chan struct{}{}
	h.mu.changed = make(chan struct{})
	return h
}

// run keeps one prober for each node until ctx ends.
func (h *probes) run(ctx context.Context) {
	var probers sync.WaitGroup
	defer probers.Wait()
	stops := map[uint64]context.CancelFunc{}
	var members <-chan struct{}
	if h.o.gossip != nil {
		members = h.o.gossip.Changed()
	}
	var checks topology.HealthChecks
	for {
		changed := h.o.machine.changed()
		t := h.o.machine.topology()
		known := map[uint64]bool{}
		if t != nil {
			if checks != t.Settings.HealthChecks {
				checks = t.Settings.HealthChecks
				h.hurryAll() // they wait as long as the ones before say
			}
			for _, n := range t.Nodes {
				known[n.Incarnation] = true
				if stops[n.Incarnation] == nil {
					stops[n.Incarnation] = h.start(ctx, &probers, n.Incarnation)
				}
			}
		}
		for inc, stop := range stops {
			if !known[inc] {
				stop()
				delete(stops, inc)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-members:
			h.hurry()
		}
	}
}

// start starts the prober of a node.
func (h *probes) start(ctx context.Context, probers *sync.WaitGroup, incarnation uint64) context.CancelFunc {
	ctx, cancel := context.WithCancel(ctx)
	hurry := make(chan struct{}, 1)
	h.mu.Lock()
	h.mu.nodes[incarnation] = &observation{}
	h.mu.hurry[incarnation] = hurry
	h.mu.Unlock()
	probers.Go(func() {
		h.watch(ctx, incarnation, hurry)
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.mu.nodes, incarnation)
		delete(h.mu.hurry, incarnation)
	})
	return cancel
}

// hurry has every node probed that gossip and the last verdict disagree about.
func (h *probes) hurry() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for inc, obs := range h.mu.nodes {
		healthy := obs.verdict.state == topologyv1.NodeHealth_STATE_HEALTHY
		if alive, known := h.o.gossip.Alive(gossipName(inc)); known && alive != healthy {
			h.probeNow(inc)
		}
	}
}

// hurryAll has every node probed.
func (h *probes) hurryAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for inc := range h.mu.hurry {
		h.probeNow(inc)
	}
}

// hurryOne has one node probed.
func (h *probes) hurryOne(incarnation uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probeNow(incarnation)
}

// probeNow asks a node's prober for a probe, unless one is asked for already.
// REQUIRES: h.mu is held.
func (h *probes) probeNow(incarnation uint64) {
	select {
	case h.mu.hurry[incarnation] <- struct{}{}:
	default:
	}
}

func gossipName(incarnation uint64) string { return fmt.Sprintf("n%d", incarnation) }

func (h *probes) changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.changed
}

// of returns a node as it was last seen.
func (h *probes) of(incarnation uint64) observation {
	h.mu.Lock()
	defer h.mu.Unlock()
	if obs := h.mu.nodes[incarnation]; obs != nil {
		return *obs
	}
	return observation{}
}

// state returns what is known of a node's health.
func (h *probes) state(incarnation uint64) topologyv1.NodeHealth_State {
	return h.of(incarnation).verdict.state
}

// healthy reports whether a node passed its last probes.
func (h *probes) healthy(incarnation uint64) bool {
	return h.state(incarnation) == topologyv1.NodeHealth_STATE_HEALTHY
}

// all returns every node as it was last seen.
func (h *probes) all() map[uint64]observation {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make(map[uint64]observation, len(h.mu.nodes))
	for incarnation, obs := range h.mu.nodes {
		all[incarnation] = *obs
	}
	return all
}

// view returns what is known of the nodes now. It does not change under those who decide.
func (h *probes) view() view {
	var stale time.Duration
	if t := h.o.machine.topology(); t != nil {
		c := t.Settings.HealthChecks
		stale = 2*c.Interval + c.Timeout
	}
	all := h.all()
	return view{
		state:  func(incarnation uint64) topologyv1.NodeHealth_State { return all[incarnation].verdict.state },
		status: func(incarnation uint64) *adminv1.NodeStatus { return all[incarnation].status },
		reason: func(incarnation uint64) string { return all[incarnation].verdict.reason() },
		down: func(incarnation uint64) time.Duration {
			if obs := all[incarnation]; obs.verdict.state == topologyv1.NodeHealth_STATE_UNHEALTHY {
				return time.Since(obs.changed)
			}
			return 0
		},
		fresh: func(incarnation uint64) bool {
			obs := all[incarnation]
			return obs.status != nil && time.Since(obs.at) <= stale
		},
		held:       func() holdings { return nil },
		nowMillis:  h.o.cfg.Seams.WallClock(),
		provisions: h.o.cfg.Provisioner != nil, launchTimeout: h.o.cfg.Provision.LaunchTimeout,
	}
}

func (obs observation) proto(incarnation uint64) *topologyv1.NodeHealth {
	return &topologyv1.NodeHealth{Incarnation: incarnation, State: obs.verdict.state, Reason: obs.verdict.reason(), SinceMs: uint64(obs.sinceMillis)}
}

// observed describes a node as it was last seen.
func (h *probes) observed(incarnation uint64) *adminv1.ObservedNode {
	obs := h.of(incarnation)
	on := &adminv1.ObservedNode{Health: obs.proto(incarnation), Status: obs.status, Gossip: h.word(incarnation).String()}
	if obs.status != nil {
		on.AgeMs = uint64(time.Since(obs.at).Milliseconds())
	}
	for _, l := range obs.looks {
		on.Checks = append(on.Checks, &adminv1.HealthCheck{
			AgeMs: uint64(time.Since(l.began).Milliseconds()), TookMs: uint64(l.took.Milliseconds()), Passed: l.passed, What: l.words,
		})
	}
	return on
}

// gossipMeta is what an orchestrator says of itself.
func gossipMeta(t *topology.Topology) gossip.Meta {
	if t == nil {
		return gossip.Meta{}
	}
	return gossip.Meta{Epoch: t.Epoch}
}
