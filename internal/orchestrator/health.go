package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// verdict is what is known of a node's health. The zero verdict knows nothing.
type verdict struct {
	state  topologyv1.NodeHealth_State
	reason string
	// good and bad count the probes of one outcome in a row.
	good, bad int
}

// judge returns the verdict after one more probe. A probe that failed while gossip
// has the node dead is believed at once; otherwise it takes as many in a row as the
// thresholds say. The first probe of all that succeeds is enough.
func (v verdict) judge(failure string, gossipDead bool, h topology.HealthChecks) verdict {
	if failure == "" {
		v.good, v.bad = v.good+1, 0
		if v.good >= h.HealthyThreshold || v.state == topologyv1.NodeHealth_STATE_UNSPECIFIED {
			v.state, v.reason = topologyv1.NodeHealth_STATE_HEALTHY, ""
		}
		return v
	}
	v.good, v.bad = 0, v.bad+1
	if v.bad >= h.UnhealthyThreshold || gossipDead {
		v.state = topologyv1.NodeHealth_STATE_UNHEALTHY
		v.reason = fmt.Sprintf("%d probes failed: %s", v.bad, failure)
		if gossipDead {
			v.reason += "; gossip has it dead"
		}
	}
	return v
}

// observation is a node as it was last seen.
type observation struct {
	verdict verdict
	changed time.Time           // when its state changed last
	status  *adminv1.NodeStatus // nil when it never answered
	at      time.Time           // of status
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
		h.probe(ctx, incarnation, hurry)
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

// probe probes one node until ctx ends.
func (h *probes) probe(ctx context.Context, incarnation uint64, hurry <-chan struct{}) {
	for {
		t := h.o.machine.topology()
		if n := t.Node(incarnation); n != nil {
			status, err := h.ask(ctx, n, t.Settings.HealthChecks.Timeout)
			if ctx.Err() != nil {
				return
			}
			h.note(n, status, err, t.Settings.HealthChecks)
		}
		select {
		case <-ctx.Done():
			return
		case <-hurry:
		case <-time.After(t.Settings.HealthChecks.Interval):
		}
	}
}

// ask asks a node for its status and checks that it is the node that was meant.
func (h *probes) ask(ctx context.Context, n *topology.Node, timeout time.Duration) (*adminv1.NodeStatus, error) {
	cc, err := h.o.transport.NewConn(n.Address)
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(cc).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return nil, err
	}
	if got := resp.GetStatus().GetIncarnation(); got != n.Incarnation {
		return nil, fmt.Errorf("#%d answers at its address", got)
	}
	h.o.noteEpoch(resp.GetStatus().GetEpoch())
	return resp.GetStatus(), nil
}

// note takes in the outcome of one probe.
func (h *probes) note(n *topology.Node, status *adminv1.NodeStatus, err error, checks topology.HealthChecks) {
	failure := ""
	switch {
	case err != nil:
		failure = rpc.AsError(err).Message
	case status.GetState() != adminv1.NodeStatus_STATE_SERVING && h.o.machine.topology().Formed():
		failure = "it does not serve: " + status.GetReason()
	}
	dead := false
	if h.o.gossip != nil {
		alive, known := h.o.gossip.Alive(gossipName(n.Incarnation))
		dead = known && !alive
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	obs := h.mu.nodes[n.Incarnation]
	if obs == nil {
		return
	}
	if status != nil {
		obs.status, obs.at = status, time.Now()
	}
	before := obs.verdict.state
	obs.verdict = obs.verdict.judge(failure, dead, checks)
	if obs.verdict.state == before {
		return
	}
	obs.changed = time.Now()
	h.o.cfg.Logger.Info("node health changed", "node", n.Name, "incarnation", n.Incarnation,
		"healthy", obs.verdict.state == topologyv1.NodeHealth_STATE_HEALTHY, "reason", obs.verdict.reason)
	close(h.mu.changed)
	h.mu.changed = make(chan struct{})
}

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

// status returns what a node last said of itself, or nil.
func (h *probes) status(incarnation uint64) *adminv1.NodeStatus { return h.of(incarnation).status }

// healthy reports whether a node passed its last probes.
func (h *probes) healthy(incarnation uint64) bool {
	return h.state(incarnation) == topologyv1.NodeHealth_STATE_HEALTHY
}

// view returns what is known of the nodes now.
func (h *probes) view() view {
	var stale time.Duration
	if t := h.o.machine.topology(); t != nil {
		c := t.Settings.HealthChecks
		stale = 2*c.Interval + c.Timeout
	}
	return view{
		state: h.state, status: h.status,
		reason: func(incarnation uint64) string { return h.of(incarnation).verdict.reason },
		down: func(incarnation uint64) time.Duration {
			if obs := h.of(incarnation); obs.verdict.state == topologyv1.NodeHealth_STATE_UNHEALTHY {
				return time.Since(obs.changed)
			}
			return 0
		},
		fresh: func(incarnation uint64) bool {
			obs := h.of(incarnation)
			return obs.status != nil && time.Since(obs.at) <= stale
		},
		held:       func() holdings { return nil },
		nowMillis:  h.o.cfg.Seams.WallClock(),
		provisions: h.o.cfg.Provisioner != nil, launchTimeout: h.o.cfg.Provision.LaunchTimeout,
	}
}

func (obs observation) proto(incarnation uint64) *topologyv1.NodeHealth {
	return &topologyv1.NodeHealth{Incarnation: incarnation, State: obs.verdict.state, Reason: obs.verdict.reason}
}

// gossipMeta is what an orchestrator says of itself.
func gossipMeta(t *topology.Topology) gossip.Meta {
	if t == nil {
		return gossip.Meta{}
	}
	return gossip.Meta{Epoch: t.Epoch}
}
