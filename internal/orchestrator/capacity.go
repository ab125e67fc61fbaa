package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/capacity"
	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// scaling is what the leader keeps in mind of capacity from one look to the next. Another
// leader begins anew, with the times of the last scalings as they were agreed on, and so
// waits longer than this one would have.
type scaling struct {
	mu struct {
		sync.Mutex
		rules    capacity.Rules
		state    capacity.State
		seen     capacity.Observation
		decision capacity.Decision
	}
}

// lookEvery is how often capacity is looked at: often enough for its cooldowns.
func lookEvery(r capacity.Rules) time.Duration {
	return min(5*time.Second, max(time.Second, min(r.ScaleUpCooldown, r.ScaleDownCooldown)/10))
}

// next returns the command by which the number of nodes gets closer to what the rules and
// the load ask for, or nil.
func (c *scaling) next(s *topology.State, v view) *topologyv1.Command {
	c.mu.Lock()
	defer c.mu.Unlock()
	group := s.Topology.Settings.AutoScalingGroup
	if rules := capacity.Rules(group); rules != c.mu.rules { // load is judged anew
		c.mu.rules, c.mu.state, c.mu.seen, c.mu.decision = rules, capacity.State{}, capacity.Observation{}, capacity.Decision{}
	}
	if !group.On() || !s.Topology.Formed() || !v.knows(s.Topology) {
		return condition(s, topology.ConditionCapacity, "capacity", "", "nothing is recommended any more")
	}
	if v.nowMillis-c.mu.seen.AtMillis < lookEvery(c.mu.rules).Milliseconds() {
		return nil
	}
	v.grace = grace(s, v)
	c.mu.seen = observeLoad(s, v)
	c.mu.state.LastUpMillis, c.mu.state.LastDownMillis = s.ScaledUpMillis, s.ScaledDownMillis
	c.mu.state, c.mu.decision = capacity.Decide(c.mu.rules, c.mu.state, c.mu.seen)
	return c.carryOut(s, v)
}

// carryOut returns the command that a decision comes to.
func (c *scaling) carryOut(s *topology.State, v view) *topologyv1.Command {
	d := &c.mu.decision
	advice := ""
	switch {
	case d.Action == capacity.None:
	case !v.provisions:
		advice = fmt.Sprintf("%s to %d nodes is recommended, see kvctl capacity explain", d.Action, d.Desired)
	case d.Action == capacity.Up && !mayLaunch(s, v):
		d.Waits = append(d.Waits, "the last launch failed, and the next one is not due yet: see kvctl events --subject provision")
	case d.Action == capacity.Up:
		return launchAll(s, d)
	case d.Action == capacity.Down:
		if cmd := shrink(s, d, v); cmd != nil {
			return cmd
		}
	}
	return condition(s, topology.ConditionCapacity, "capacity", advice, "nothing is recommended any more")
}

// observeLoad returns the nodes and what is under way as capacity is judged by them.
func observeLoad(s *topology.State, v view) capacity.Observation {
	t := s.Topology
	o := capacity.Observation{
		AtMillis: v.nowMillis, Frozen: frozen(t, v) != "", Moving: changing(s), Whole: degraded(t, v) == "", LargestN: t.Width(),
	}
	op := s.Active()
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role != topology.Data || t.Resolve(n.Name) != n && !t.Names(n.Incarnation) {
			continue
		}
		st := v.status(n.Incarnation)
		o.Nodes = append(o.Nodes, capacity.Node{
			Incarnation: n.Incarnation, Zone: n.Zone, Member: t.Names(n.Incarnation) || s.HeldBack(n.Incarnation),
			Leaving: !o.Frozen && v.dead(t, n.Incarnation) || op != nil && slices.Contains(op.Remove, n.Incarnation),
			Known:   v.healthy(n.Incarnation) && v.fresh(n.Incarnation),
			CPU:     st.GetCpuUtilization(), DiskUsed: st.GetDiskUsedBytes(), DiskTotal: st.GetDiskUsedBytes() + st.GetDiskAvailableBytes(),
			Operations: st.GetGet().GetPerSecond() + st.GetPut().GetPerSecond() + st.GetScan().GetPerSecond(),
		})
	}
	for _, p := range s.Provisions {
		if p.Kind == topology.Launch && !p.State.Ended() {
			o.Launching = append(o.Launching, p.Zone)
		}
	}
	return o
}

// launchAll returns the command that asks for the nodes that a decision wants.
func launchAll(s *topology.State, d *capacity.Decision) *topologyv1.Command {
	ms := []*topologyv1.Mutation{noteScaling(true)}
	for _, zone := range d.Zones {
		ms = append(ms, askProvision(topology.Provision{Kind: topology.Launch, Zone: zone, Why: d.Why}))
	}
	return noted("capacity", "", fmt.Sprintf("%s: %d to be launched, for %d nodes", d.Why, len(d.Zones), d.Desired), s, ms...)
}

func noteScaling(up bool) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_NoteScaling{NoteScaling: &topologyv1.NoteScaling{Up: up}}}
}

// shrink returns the command that begins to drain the nodes that a decision takes out, or
// nil where the others cannot take over.
func shrink(s *topology.State, d *capacity.Decision, v view) *topologyv1.Command {
	t := s.Topology
	var stay []placement.Node
	for _, n := range t.Members() {
		if !slices.Contains(d.Leave, n.Incarnation) {
			stay = append(stay, placement.Node{ID: n.Incarnation, Zone: n.Zone})
		}
	}
	held := holdings(nil)
	if t.Settings.Placement == topology.PlaceWeighted {
		if held = v.held(); held == nil {
			d.Waits = append(d.Waits, "nodes are being asked what their vnodes hold")
			return nil
		}
	}
	next, err := place(t, stay, held)
	if err != nil {
		d.Waits = append(d.Waits, err.Error())
		return nil
	}
	var names []string
	for _, inc := range d.Leave {
		names = append(names, t.NodeName(inc))
	}
	leave := "leave"
	if len(names) == 1 {
		leave = "leaves"
	}
	op := topology.Operation{Kind: kindShrink, Remove: d.Leave, Moves: placement.Moves(placement.Of(t), next),
		Title: strings.Join(names, ", ") + " " + leave + ", as fewer nodes are enough"}
	cmd := startOperation(s, op, "capacity", eventName(names), fmt.Sprintf("%s: %s (%d moves)", d.Why, op.Title, len(op.Moves)))
	cmd.Mutations = append(cmd.Mutations, noteScaling(false))
	return cmd
}

func (s controlService) GetCapacity(ctx context.Context, r *adminv1.GetCapacityRequest) (*adminv1.GetCapacityResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.getCapacity, adminv1.ControlServiceClient.GetCapacity)
}

func (s controlService) getCapacity(context.Context, *adminv1.GetCapacityRequest) (*adminv1.GetCapacityResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	c := &s.o.scaling
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &c.mu.decision
	resp := &adminv1.GetCapacityResponse{
		Settings: state.Topology.Settings.Proto(), Provisioner: s.o.cfg.Provision.Kind,
		LookedMs: uint64(c.mu.seen.AtMillis), Desired: uint32(d.Desired), Why: d.Why, Waits: d.Waits,
		ScaledUpMs: uint64(state.ScaledUpMillis), ScaledDownMs: uint64(state.ScaledDownMillis),
	}
	switch d.Action {
	case capacity.Up:
		resp.Change = int32(d.Count)
	case capacity.Down:
		resp.Change = -int32(d.Count)
	}
	for _, p := range state.Provisions {
		if p.Kind == topology.Launch && !p.State.Ended() {
			resp.Launching = append(resp.Launching, p.Proto())
		}
	}
	for _, n := range c.mu.seen.Nodes {
		resp.Nodes = append(resp.Nodes, &adminv1.CapacityNode{
			Incarnation: n.Incarnation, Member: n.Member, Leaving: n.Leaving, Known: n.Known, CpuUtilization: n.CPU,
			DiskUsedBytes: n.DiskUsed, DiskTotalBytes: n.DiskTotal, Operations: n.Operations,
		})
	}
	for _, sig := range d.Signals {
		resp.Signals = append(resp.Signals, &adminv1.CapacitySignal{
			Name: sig.Name, Mean: sig.Mean, Peak: sig.Peak, PeakNode: sig.PeakNode, Target: sig.Target, PeakLimit: sig.PeakLimit,
			Wants: uint32(sig.Wants), Enough: uint32(sig.Enough), HotSpot: sig.HotSpot,
		})
	}
	return resp, nil
}
