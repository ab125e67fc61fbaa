package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

const (
	// leaseDuration is for how long a reporting node may answer for its copies in sync,
	// counted by its boot-time clock from when it asked.
	leaseDuration = 2 * time.Second
	// leaseEnds is how long the leader waits, by its own, before it takes a lease for over:
	// clocks may differ by a tenth in how fast they go.
	leaseEnds = leaseDuration + leaseDuration/10
	// rejoinPause is how long a copy that was let go of stays out, doubled by each time that
	// this happens again, up to longestPause; it is forgotten after twice that.
	rejoinPause  = 5 * time.Second
	longestPause = 5 * time.Minute
	// maxCopySteps bounds the copies that one command takes further.
	maxCopySteps = 4096
)

// changeCopies returns the next command that brings the copies on reporting nodes closer
// to what the namespaces' rules say, or nil.
func changeCopies(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	nodes := reportingNodes(s, v)
	steps := copySteps{t: t}
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		if ns.Reporting.Copies == 0 && !hasCopies(t, ns) {
			continue
		}
		want := v.placed(t, ns, nodes)
		if want == nil {
			continue
		}
		for vnode := range t.Ring {
			steps.vnode(s, ns, uint32(vnode), want[vnode], v)
		}
	}
	return steps.command()
}

// placed returns who is to have the copies of a namespace, as found out before for the same
// topology and nodes, for it takes a while where there are many vnodes; nil if nobody can.
func (v view) placed(t *topology.Topology, ns *topology.Namespace, nodes []placement.Node) placement.Assignment {
	find := func() placement.Assignment {
		want, err := placement.Copies(t, ns, nodes)
		if err != nil {
			return nil
		}
		return want
	}
	if v.copies == nil {
		return find()
	}
	w := v.copies
	if w.topology != t || !slices.Equal(w.nodes, nodes) {
		w.topology, w.nodes, w.placed = t, nodes, map[uint32]placement.Assignment{}
	}
	want, known := w.placed[ns.ID]
	if !known {
		want = find()
		w.placed[ns.ID] = want
	}
	return want
}

func hasCopies(t *topology.Topology, ns *topology.Namespace) bool {
	return slices.ContainsFunc(t.Ring, func(v topology.Vnode) bool {
		return slices.ContainsFunc(v.Copies, func(c topology.Copy) bool { return c.Namespace == ns.ID })
	})
}

// reportingNodes returns the nodes that copies are for: those that neither are dead, nor
// drained, nor leave.
func reportingNodes(s *topology.State, v view) (out []placement.Node) {
	t := s.Topology
	for i := range t.Nodes {
		if n := &t.Nodes[i]; n.Role == topology.Reporting && !v.lacksFor(t, n.Incarnation) && !leaves(s, n.Incarnation) {
			out = append(out, placement.Node{ID: n.Incarnation, Zone: n.Zone})
		}
	}
	return out
}

// lacksFor reports whether a reporting node's copies are not to be counted on any more: it
// is dead, or another data directory has its name.
func (v view) lacksFor(t *topology.Topology, incarnation uint64) bool {
	n := t.Node(incarnation)
	return n == nil || t.Lost(incarnation) || t.Resolve(n.Name) != n || v.dead(t, incarnation)
}

// leaves reports whether people have a node give its copies to others.
func leaves(s *topology.State, incarnation uint64) bool {
	op := s.Active()
	return s.HeldBack(incarnation) || op != nil && op.State == topology.Running && slices.Contains(op.Remove, incarnation)
}

// copySteps gathers what one command takes further.
type copySteps struct {
	t       *topology.Topology
	changes []*topologyv1.CopyChange
	what    map[string]int
	nodes   []string
}

// vnode takes the copies of a vnode further. wanted are the nodes that are to have one.
func (b *copySteps) vnode(s *topology.State, ns *topology.Namespace, vnode uint32, wanted []uint64, v view) {
	copies := b.t.Copies(vnode, ns.ID)
	covered := len(wanted) > 0
	for _, w := range wanted {
		c, _ := b.t.Copy(vnode, ns.ID, w)
		covered = covered && (c.State == topology.InSync || c.State >= topology.Behind && !ns.Reporting.Waits())
	}
	for _, c := range copies {
		in := slices.Contains(wanted, c.Node)
		goes := !in && mayGo(s, ns, c, len(wanted) > 0, covered, v)
		if next := nextCopy(ns, vnode, c, in, goes, v); next != c.State {
			b.add(ns, vnode, c, next)
		}
	}
	for _, w := range wanted {
		if _, has := b.t.Copy(vnode, ns.ID, w); !has && v.healthy(w) {
			b.add(ns, vnode, topology.Copy{Namespace: ns.ID, Node: w}, topology.Filling)
		}
	}
}

// mayGo reports whether a copy that is not wanted where it is can be done without: others
// have taken its place, or it is of no use and no write is to wait until they have.
func mayGo(s *topology.State, ns *topology.Namespace, c topology.Copy, others, covered bool, v view) bool {
	switch {
	case ns.Reporting.Policy == topology.ReportingOff, covered:
		return true
	case leaves(s, c.Node), s.Topology.Lost(c.Node):
		return !others
	}
	return v.lacksFor(s.Topology, c.Node) && ns.Reporting.Policy != topology.ReportingBlock
}

// nextCopy returns the state that a copy can go to, 0 if it is given up.
//
// Invariant 13: a copy is let go of by way of Evicting only, once its node has taken that
// in or any lease it may have is over.
func nextCopy(ns *topology.Namespace, vnode uint32, c topology.Copy, in, goes bool, v view) topology.CopyState {
	switch c.State {
	case topology.Filling:
		switch {
		case goes:
			return 0
		case copyFilling(vnode, c, v).GetComplete():
			return topology.Behind
		}
	case topology.Behind:
		switch {
		case goes:
			return 0
		case in && ns.Reporting.Waits() && v.healthy(c.Node) && v.pause(c) == 0:
			return topology.Joining
		}
	case topology.Joining:
		switch {
		case !in, !ns.Reporting.Waits(), !v.healthy(c.Node):
			return topology.Behind
		case copyProgress(vnode, c, v).GetJoined():
			return topology.InSync
		}
	case topology.InSync:
		if goes || !ns.Reporting.Waits() || ns.Reporting.Policy == topology.ReportingDegrade && v.unhealthy(c.Node) {
			return topology.Evicting
		}
	case topology.Evicting:
		if v.epoch(c.Node) >= c.Since || v.copyAge(vnode, c) >= leaseEnds || mutant.On("lease-not-awaited") {
			return topology.Behind
		}
	}
	return c.State
}

// copyFilling returns what a reporting node says of the filling of a copy, or nil.
func copyFilling(vnode uint32, c topology.Copy, v view) *adminv1.Filling {
	for _, f := range v.status(c.Node).GetFillings() {
		if f.GetVnode() == vnode && f.GetNamespaceId() == c.Namespace && f.GetAssignedEpoch() == c.Since {
			return f
		}
	}
	return nil
}

// copyProgress returns what a reporting node says of a copy as it is now, or nil.
func copyProgress(vnode uint32, c topology.Copy, v view) *adminv1.CopyProgress {
	for _, p := range v.status(c.Node).GetCopies() {
		if p.GetVnode() == vnode && p.GetNamespaceId() == c.Namespace && p.GetSinceEpoch() == c.Since {
			return p
		}
	}
	return nil
}

// add takes a copy to a state.
func (b *copySteps) add(ns *topology.Namespace, vnode uint32, c topology.Copy, next topology.CopyState) {
	if len(b.changes) == maxCopySteps {
		return
	}
	if b.what == nil {
		b.what = map[string]int{}
	}
	name := b.t.NodeName(c.Node)
	c.State = next
	b.changes = append(b.changes, &topologyv1.CopyChange{Vnode: vnode, Copy: c.Proto()})
	b.nodes = append(b.nodes, name)
	is := next.String()
	if next == 0 {
		is = "given up"
	}
	b.what[fmt.Sprintf("namespace %s on %s: %%d copies %s", ns.Name, name, is)]++
}

// command returns what takes all further, or nil if there is nothing.
func (b *copySteps) command() *topologyv1.Command {
	if len(b.changes) == 0 {
		return nil
	}
	var what []string
	for _, w := range slices.Sorted(maps.Keys(b.what)) {
		what = append(what, fmt.Sprintf(w, b.what[w]))
	}
	return &topologyv1.Command{
		ExpectEpoch: b.t.Epoch,
		Change:      &topologyv1.Change{Subject: "reporting", Name: eventName(b.nodes), What: strings.Join(what, "; ")},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetCopies{SetCopies: &topologyv1.SetCopies{Changes: b.changes}}}},
	}
}

// copiesChange reports whether copies are on their way from one state to another.
func copiesChange(s *topology.State) bool {
	return s != nil && slices.ContainsFunc(s.Topology.Ring, func(v topology.Vnode) bool {
		return slices.ContainsFunc(v.Copies, func(c topology.Copy) bool { return c.State != topology.InSync && c.State != topology.Behind })
	})
}

// countCopies returns how many copies are in sync, and how many are not that are to be.
func countCopies(t *topology.Topology) (inSync, out int) {
	for i := range t.Ring {
		for _, c := range t.Ring[i].Copies {
			switch {
			case c.State == topology.InSync:
				inSync++
			case t.NamespaceByID(c.Namespace).Reporting.Waits():
				out++
			}
		}
	}
	return inSync, out
}

// ofNode is a namespace's copies on a node, or the one of a vnode.
type ofNode struct {
	namespace, vnode uint32
	node             uint64
}

// seenCopy is a copy with when it was first seen in its state.
type seenCopy struct {
	topology.Copy
	at time.Duration
}

// strike is how often copies were let go of, and when last.
type strike struct {
	times int
	last  time.Duration
}

// copyWatch is what a leader remembers of the copies: since when it has seen each in its
// state, and which were let go of. Another leader begins anew, and so takes leases for
// over later, never sooner.
type copyWatch struct {
	clock func() time.Duration
	// placed is by namespace, for a topology and nodes. Only the control loop uses the three.
	placed   map[uint32]placement.Assignment
	topology *topology.Topology
	nodes    []placement.Node
	mu       struct {
		sync.Mutex
		term    uint64
		looked  *topology.Topology
		seen    map[ofNode]seenCopy
		strikes map[ofNode]strike // of all vnodes
	}
}

// look takes in the topology as the leader of a term has it.
func (w *copyWatch) look(term uint64, t *topology.Topology) {
	now := w.clock()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.mu.term != term:
		w.mu.term, w.mu.seen, w.mu.strikes = term, nil, map[ofNode]strike{}
	case w.mu.looked == t:
		return
	}
	w.mu.looked = t
	seen := make(map[ofNode]seenCopy, len(w.mu.seen))
	struck := map[ofNode]bool{}
	for i := range t.Ring {
		for _, c := range t.Ring[i].Copies {
			of := ofNode{c.Namespace, uint32(i), c.Node}
			was := w.mu.seen[of]
			if was.Copy == c {
				seen[of] = was
				continue
			}
			seen[of] = seenCopy{c, now}
			if c.State == topology.Evicting || c.State == topology.Behind && was.State == topology.Joining {
				struck[ofNode{c.Namespace, 0, c.Node}] = true
			}
		}
	}
	w.mu.seen = seen
	for of := range struck {
		s := w.mu.strikes[of]
		if now-s.last > 2*longestPause {
			s.times = 0
		}
		w.mu.strikes[of] = strike{s.times + 1, now}
	}
}

// age returns for how long a copy has been seen in its state.
func (w *copyWatch) age(vnode uint32, c topology.Copy) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.mu.seen[ofNode{c.Namespace, vnode, c.Node}]; s.Copy == c {
		return w.clock() - s.at
	}
	return 0
}

// copyAge returns for how long a copy has been seen in its state.
func (v view) copyAge(vnode uint32, c topology.Copy) time.Duration {
	if v.copies == nil {
		return 0
	}
	return v.copies.age(vnode, c)
}

// pause returns for how long a copy that was let go of is to stay out.
func (v view) pause(c topology.Copy) time.Duration {
	if v.copies == nil {
		return 0
	}
	return v.copies.pause(c)
}

// pause returns for how long a copy that was let go of is to stay out.
func (w *copyWatch) pause(c topology.Copy) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.mu.strikes[ofNode{c.Namespace, 0, c.Node}]
	if s.times == 0 {
		return 0
	}
	pause := rejoinPause
	for i := 1; i < s.times && pause < longestPause; i++ {
		pause *= 2
	}
	return max(0, s.last+min(pause, longestPause)-w.clock())
}

func (s controlService) GrantLease(ctx context.Context, r *adminv1.GrantLeaseRequest) (*adminv1.GrantLeaseResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.grantLease, adminv1.ControlServiceClient.GrantLease)
}

// grantLease answers with the epoch that is agreed on, once it is certain that nobody else
// had been elected after that was read: a copy whose eviction the lease does not know of was
// not being evicted yet when the node asked.
func (s controlService) grantLease(ctx context.Context, r *adminv1.GrantLeaseRequest) (*adminv1.GrantLeaseResponse, error) {
	t, err := s.ofCluster(r.GetClusterId())
	if err != nil {
		return nil, err
	}
	if n := t.Node(r.GetIncarnation()); n == nil || n.Role != topology.Reporting || t.Lost(n.Incarnation) {
		return nil, rpc.Errorf(codes.FailedPrecondition, "NO_REPORTING_NODE", "#%d is no reporting node of this cluster", r.GetIncarnation())
	}
	if err := s.o.raft.VerifyLeader(ctx); err != nil {
		return nil, noLeader()
	}
	return &adminv1.GrantLeaseResponse{Epoch: t.Epoch, DurationMs: uint64(leaseDuration.Milliseconds())}, nil
}

// ofCluster returns the topology if it is of the cluster that is meant.
func (s controlService) ofCluster(id string) (*topology.Topology, error) {
	t := s.o.machine.topology()
	if t == nil {
		return nil, noLeader()
	}
	if id != t.ClusterID {
		return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this is cluster %s, not %s", t.ClusterID, id)
	}
	return t, nil
}

func (s controlService) EvictCopies(ctx context.Context, r *adminv1.EvictCopiesRequest) (*adminv1.EvictCopiesResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.evictCopies, adminv1.ControlServiceClient.EvictCopies)
}

func (s controlService) evictCopies(ctx context.Context, r *adminv1.EvictCopiesRequest) (*adminv1.EvictCopiesResponse, error) {
	if _, err := s.ofCluster(r.GetClusterId()); err != nil {
		return nil, err
	}
	epoch := uint64(0)
	a, err := s.o.change(ctx, func(state *topology.State) (*topologyv1.Command, error) {
		epoch = state.Topology.Epoch
		return evict(state.Topology, r)
	})
	switch {
	case err == errNothingToEvict:
		return &adminv1.EvictCopiesResponse{Epoch: epoch}, nil
	case err != nil:
		return nil, err
	}
	return &adminv1.EvictCopiesResponse{Epoch: a.result.Epoch}, nil
}

// errNothingToEvict says that no write waits for the copies any more.
var errNothingToEvict = errors.New("no write waits for them")

// evict returns the command that lets go of a namespace's copies on a node: of all, for
// what holds up the writes of one vnode holds up those of the others.
func evict(t *topology.Topology, r *adminv1.EvictCopiesRequest) (*topologyv1.Command, error) {
	ns := t.NamespaceByID(r.GetNamespaceId())
	if ns == nil {
		return nil, errNothingToEvict
	}
	if ns.Reporting.Policy != topology.ReportingDegrade {
		return nil, rpc.Errorf(codes.FailedPrecondition, "REPORTING_BLOCKS", "reporting of namespace %s is %s: no copy is evicted because it holds writes up", ns.Name, ns.Reporting.Policy)
	}
	steps := copySteps{t: t}
	for i := range t.Ring {
		c, _ := t.Copy(uint32(i), ns.ID, r.GetIncarnation())
		switch c.State {
		case topology.InSync:
			steps.add(ns, uint32(i), c, topology.Evicting)
		case topology.Joining:
			steps.add(ns, uint32(i), c, topology.Behind)
		}
	}
	cmd := steps.command()
	if cmd == nil {
		return nil, errNothingToEvict
	}
	cmd.Change.What += fmt.Sprintf(": a write at %s has waited for longer than %s", t.NodeName(r.GetHeldUp()), ns.Reporting.Timeout)
	return cmd, nil
}
