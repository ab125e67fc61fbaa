package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/provision"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Provisioner launches and ends nodes. Package provision tells the laws that it keeps.
type Provisioner interface {
	Launch(ctx context.Context, n provision.Node) error
	End(ctx context.Context, n provision.Node) error
	List(ctx context.Context) ([]provision.Instance, error)
}

// launchFor asks the provisioner for a node in a dead one's place, or says that one is
// on its way, or here and not known to be healthy yet. Where launches have failed lately,
// neither.
func launchFor(s *topology.State, d *topology.Node, v view) (_ *topologyv1.Command, wait bool) {
	failed := false
	for _, p := range s.Provisions {
		if p.Kind != topology.Launch || p.Replaces != d.Incarnation {
			continue
		}
		// One that has slots serves elsewhere: the dead node was back for a while.
		came := s.Topology.Node(p.Incarnation) != nil && !s.Topology.Names(p.Incarnation) && !v.dead(s.Topology, p.Incarnation)
		if !p.State.Ended() || came {
			return nil, true
		}
		failed = failed || p.State == topology.Failed
	}
	if failed && !mayLaunch(s, v) {
		return nil, false
	}
	return askLaunch(s, topology.Provision{Zone: d.Zone, Replaces: d.Incarnation, Why: fmt.Sprintf("in the place of %s, which is dead", d.Name)}, "recovery"), false
}

// askLaunch returns the command that asks for a node to be launched.
func askLaunch(s *topology.State, p topology.Provision, subject string) *topologyv1.Command {
	p.Kind = topology.Launch
	return noted(subject, "", fmt.Sprintf("a node is to be launched in zone %s: %s", p.Zone, p.Why), s, askProvision(p))
}

func askProvision(p topology.Provision) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_AskProvision{AskProvision: &topologyv1.AskProvision{Provision: p.Proto()}}}
}

// The time before another launch after some have failed in a row: it doubles each time.
const (
	firstBackoff = time.Minute
	lastBackoff  = 30 * time.Minute
)

// mayLaunch reports whether the last launches that failed are long enough ago for another
// one.
func mayLaunch(s *topology.State, v view) bool {
	wait, last := time.Duration(0), int64(0)
	for _, p := range s.Provisions {
		switch {
		case p.Kind != topology.Launch:
		case p.State == topology.Failed:
			wait, last = min(max(2*wait, firstBackoff), lastBackoff), p.ChangedMillis
		case p.State == topology.Provided:
			wait = 0
		}
	}
	return v.nowMillis-last >= wait.Milliseconds()
}

// noteProvisions notes which launched nodes have registered and which have not in time.
// What a launch in vain left is ended.
func noteProvisions(s *topology.State, v view) *topologyv1.Command {
	for i := range s.Provisions {
		p := &s.Provisions[i]
		if p.Kind != topology.Launch || p.State.Ended() {
			continue
		}
		if n := s.Topology.Resolve(p.Node); n != nil {
			return steered(s, p, topology.Provided, n.Incarnation, fmt.Sprintf("%s has registered, %s after it was asked for", p.Node, v.age(p)))
		}
		if v.provisions && v.nowMillis-p.AtMillis > v.launchTimeout.Milliseconds() {
			cmd := steered(s, p, topology.Failed, 0, fmt.Sprintf("%s did not register within %s, and what there may be of it is ended; %s", p.Node, v.launchTimeout, said(p)))
			cmd.Mutations = append(cmd.Mutations, askProvision(topology.Provision{Kind: topology.End, Node: p.Node, Zone: p.Zone, Why: "it did not register"}))
			return cmd
		}
	}
	return nil
}

// age is how long ago a provision was asked for.
func (v view) age(p *topology.Provision) time.Duration {
	return (time.Duration(v.nowMillis-p.AtMillis) * time.Millisecond).Round(100 * time.Millisecond)
}

// said is what a provisioner said of a launch, in words.
func said(p *topology.Provision) string {
	switch {
	case p.Problem != "":
		return "the provisioner said: " + p.Problem
	case p.State == topology.Launched:
		return "the provisioner launched it: see its log"
	}
	return "the provisioner has not answered"
}

// steered returns the command that notes what has come of a provision.
func steered(s *topology.State, p *topology.Provision, state topology.ProvisionState, incarnation uint64, what string) *topologyv1.Command {
	return noted("provision", p.Node, what, s, &topologyv1.Mutation{Kind: &topologyv1.Mutation_SteerProvision{SteerProvision: &topologyv1.SteerProvision{
		Id: p.ID, State: topologyv1.Provision_State(state), Incarnation: incarnation, Failures: uint32(p.Failures), Problem: p.Problem,
	}}})
}

// endRemoved returns the mutations that have a provisioner end the nodes that an operation
// of the leader's own removes.
func endRemoved(s *topology.State, op *topology.Operation, removed []uint64) (ms []*topologyv1.Mutation) {
	if op.Kind != kindRecover && op.Kind != kindShrink {
		return nil
	}
	for _, inc := range removed {
		n := s.Topology.Node(inc)
		ms = append(ms, askProvision(topology.Provision{Kind: topology.End, Node: n.Name, Zone: n.Zone, Incarnation: inc, Why: op.Title}))
	}
	return ms
}

// kindShrink is the kind of the operations that take the slots of nodes that are not
// needed any more.
const kindShrink = "shrink"

// Bounds of the calls to a provisioner.
const (
	maxProvisionCalls  = 4
	firstProvisionWait = time.Second
	lastProvisionWait  = time.Minute
	// strayInterval is how often it is looked for nodes that were given up and are there.
	strayInterval = time.Minute
)

// provisioning asks the provisioner for what was agreed on, on the leader. A call that
// fails is made again, later each time; one that is cut off by a change of leader is made
// again by the next.
type provisioning struct {
	o  *Orchestrator
	mu struct {
		sync.Mutex
		calls map[uint64]provisionCall // under way, by provision
		again map[uint64]time.Time     // when a failed one may be made again
	}
}

// provisionCall is a call under way, and the name of the node that it launches, if any.
type provisionCall struct {
	cancel   context.CancelFunc
	launches string
}

func newProvisioning(o *Orchestrator) *provisioning {
	p := &provisioning{o: o}
	p.mu.calls = map[uint64]provisionCall{}
	p.mu.again = map[uint64]time.Time{}
	return p
}

// run makes the calls until ctx ends.
func (p *provisioning) run(ctx context.Context) {
	var calls sync.WaitGroup
	defer calls.Wait()
	calls.Go(func() { p.watchStrays(ctx) })
	tick := time.NewTicker(leadInterval)
	defer tick.Stop()
	for {
		changed := p.o.machine.changed()
		if p.o.leads() && p.o.informed() || mutant.On("followers-provision") {
			for _, due := range p.due() {
				p.start(ctx, &calls, due)
			}
		} else {
			p.cancel()
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// informed reports whether the nodes do not know better than this leader what there is to
// be. One that was lost and came back when others had taken over ends nobody's node.
func (o *Orchestrator) informed() bool {
	t := o.machine.topology()
	return t != nil && t.Epoch >= o.seen.Load() && (!t.Formed() || o.health.view().knows(t))
}

// due returns the provisions that the provisioner is to be asked for now. A node is not
// ended while a call that launches it is under way: the call could take effect last.
func (p *provisioning) due() (due []topology.Provision) {
	s := p.o.machine.state.Load()
	if s == nil {
		return nil // no ring was founded yet
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	launching := map[string]bool{}
	for _, c := range p.mu.calls {
		launching[c.launches] = true
	}
	maps.DeleteFunc(p.mu.again, func(id uint64, _ time.Time) bool {
		now := s.Provision(id)
		return now == nil || now.State != topology.Wanted
	})
	for _, now := range s.Provisions {
		_, called := p.mu.calls[now.ID]
		if now.State == topology.Wanted && !called && !time.Now().Before(p.mu.again[now.ID]) &&
			!(now.Kind == topology.End && launching[now.Node]) && len(p.mu.calls)+len(due) < maxProvisionCalls {
			due = append(due, now)
		}
	}
	return due
}

// cancel ends the calls under way: another orchestrator leads.
func (p *provisioning) cancel() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.mu.calls {
		c.cancel()
	}
	clear(p.mu.again)
}

func (p *provisioning) start(ctx context.Context, calls *sync.WaitGroup, was topology.Provision) {
	ctx, cancel := context.WithCancel(ctx)
	under := provisionCall{cancel: cancel}
	if was.Kind == topology.Launch {
		under.launches = was.Node
	}
	p.mu.Lock()
	p.mu.calls[was.ID] = under
	p.mu.Unlock()
	calls.Go(func() {
		defer cancel()
		p.call(ctx, was)
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.mu.calls, was.ID)
	})
}

// watchStrays looks for strays until ctx ends.
func (p *provisioning) watchStrays(ctx context.Context) {
	var seen []uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(strayInterval):
		}
		if p.o.leads() {
			seen = p.endStrays(ctx, seen)
		} else {
			seen = nil
		}
	}
}

// endStrays ends again what was given up and ended, and is there at two looks in a row: its
// launch took effect after all. It returns what is there now.
func (p *provisioning) endStrays(ctx context.Context, before []uint64) (now []uint64) {
	ctx, cancel := context.WithTimeout(ctx, p.o.cfg.Provision.Timeout)
	defer cancel()
	all, err := p.o.cfg.Provisioner.List(ctx)
	if err != nil {
		if ctx.Err() == nil {
			p.o.cfg.Logger.Warn("the provisioner cannot list nodes", "err", err)
		}
		return nil
	}
	for _, stray := range strays(p.o.machine.state.Load(), all) {
		now = append(now, stray.ID)
		if slices.Contains(before, stray.ID) && p.o.leads() {
			err := p.o.cfg.Provisioner.End(ctx, provision.Node{Name: stray.Node, Zone: stray.Zone})
			p.o.cfg.Logger.Warn("a node that was given up was launched after all: it is ended again", "node", stray.Node, "err", err)
		}
	}
	return now
}

// strays returns the launches that were given up, and ended, of nodes that are there.
func strays(s *topology.State, all []provision.Instance) (launches []topology.Provision) {
	if s == nil {
		return nil
	}
	ended := func(name string) bool {
		return slices.ContainsFunc(s.Provisions, func(p topology.Provision) bool {
			return p.Kind == topology.End && p.State == topology.Provided && p.Node == name
		})
	}
	for _, p := range s.Provisions {
		if p.Kind == topology.Launch && p.State == topology.Failed && ended(p.Node) && s.Topology.Resolve(p.Node) == nil &&
			slices.ContainsFunc(all, func(i provision.Instance) bool { return i.Name == p.Node }) {
			launches = append(launches, p)
		}
	}
	return launches
}

// call makes one call and notes what came of it.
func (p *provisioning) call(ctx context.Context, was topology.Provision) {
	node := provision.Node{Name: was.Node, Zone: was.Zone, Incarnation: was.Incarnation}
	call, done := p.o.cfg.Provisioner.Launch, topology.Launched
	if was.Kind == topology.End {
		call, done = p.o.cfg.Provisioner.End, topology.Provided
	}
	bounded, cancel := context.WithTimeout(ctx, p.o.cfg.Provision.Timeout)
	defer cancel()
	err := call(bounded, node)
	if ctx.Err() != nil {
		return // whoever leads next calls again
	}
	if err == nil {
		p.note(ctx, was.ID, func(now *topology.Provision) (topology.ProvisionState, string) {
			now.Problem = ""
			if now.Kind == topology.End {
				return done, fmt.Sprintf("%s has ended", now.Node)
			}
			return done, fmt.Sprintf("%s is launched", now.Node)
		})
		return
	}
	wait := min(firstProvisionWait<<min(was.Failures, 10), lastProvisionWait)
	p.mu.Lock()
	p.mu.again[was.ID] = time.Now().Add(wait)
	p.mu.Unlock()
	p.note(ctx, was.ID, func(now *topology.Provision) (topology.ProvisionState, string) {
		now.Failures++
		now.Problem = err.Error()
		return topology.Wanted, fmt.Sprintf("the provisioner failed to %s %s, and is asked again in %s: %v", now.Kind, now.Node, wait, err)
	})
}

// note has it agreed on what came of a call, unless the provision has ended meanwhile.
func (p *provisioning) note(ctx context.Context, id uint64, outcome func(*topology.Provision) (topology.ProvisionState, string)) {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	_, err := p.o.change(ctx, func(s *topology.State) (*topologyv1.Command, error) {
		now := s.Provision(id)
		if now == nil || now.State.Ended() {
			return nil, errEnded
		}
		copied := *now
		state, what := outcome(&copied)
		return steered(s, &copied, state, now.Incarnation, what), nil
	})
	if err != nil && !errors.Is(err, errEnded) && ctx.Err() == nil {
		p.o.cfg.Logger.Warn("could not note what the provisioner did", "provision", id, "err", err)
	}
}

var errEnded = errors.New("the provision has ended")
