package topology

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// ReportingPolicy is what becomes of a write that a reporting replica holds up.
type ReportingPolicy uint8

// The policies. Their numbers are those of the wire format.
const (
	// ReportingOff: the namespace has no reporting replicas.
	ReportingOff ReportingPolicy = iota
	// ReportingBlock: it fails.
	ReportingBlock
	// ReportingDegrade: the replica is evicted, then the write is acknowledged.
	ReportingDegrade
	// ReportingBestEffort: none is held up, as no replica is ever in sync.
	ReportingBestEffort
)

var reportingPolicies = []string{"off", "block", "degrade", "best_effort"}

// ParseReportingPolicy reads off, block, degrade or best_effort.
func ParseReportingPolicy(s string) (ReportingPolicy, error) {
	i := slices.Index(reportingPolicies, s)
	if i < 0 {
		return 0, fmt.Errorf("bad reporting policy %q: want off, block, degrade or best_effort", s)
	}
	return ReportingPolicy(i), nil
}

// String writes a policy as ParseReportingPolicy reads it.
func (p ReportingPolicy) String() string {
	if int(p) < len(reportingPolicies) {
		return reportingPolicies[p]
	}
	return fmt.Sprintf("reporting-policy(%d)", uint8(p))
}

// ReportingRules say which copies reporting nodes hold of a namespace; the zero value says
// none.
type ReportingRules struct {
	Policy ReportingPolicy
	// Copies is how many of each vnode.
	Copies int
	// Timeout is how long a write waits for a copy before its policy applies.
	Timeout time.Duration
}

// Bounds and defaults of ReportingRules.
const (
	MaxReportingCopies      = 3
	MinReportingTimeout     = 10 * time.Millisecond
	MaxReportingTimeout     = time.Minute
	DefaultReportingTimeout = 500 * time.Millisecond
)

// String writes rules for people.
func (r ReportingRules) String() string {
	if r == (ReportingRules{}) {
		return r.Policy.String()
	}
	return fmt.Sprintf("%s (copies %d, timeout %s)", r.Policy, r.Copies, r.Timeout)
}

// applyToReporting changes rules as is set.
func (set NamespaceSettings) applyToReporting(r *ReportingRules) error {
	if set.Reporting != nil {
		if *set.Reporting == ReportingOff {
			*r = ReportingRules{}
		} else if r.Policy = *set.Reporting; r.Copies == 0 {
			r.Copies, r.Timeout = 1, DefaultReportingTimeout
		}
	}
	if set.ReportingCopies == nil && set.ReportingTimeout == nil {
		return nil
	}
	if r.Policy == ReportingOff {
		return refuse(Invalid, "REPORTING_OFF", "reporting is off, so there are neither copies nor a timeout: set a policy with them (block, degrade or best_effort)", "field", "reporting")
	}
	if set.ReportingCopies != nil {
		r.Copies = *set.ReportingCopies
	}
	if set.ReportingTimeout != nil {
		r.Timeout = *set.ReportingTimeout
	}
	return nil
}

func (r ReportingRules) validate() error {
	switch {
	case r == (ReportingRules{}):
		return nil
	case r.Policy < ReportingBlock || r.Policy > ReportingBestEffort:
		return fmt.Errorf("unknown %s with %d copies", r.Policy, r.Copies)
	case r.Copies < 1 || r.Copies > MaxReportingCopies:
		return fmt.Errorf("%d reporting copies: want 1 to %d", r.Copies, MaxReportingCopies)
	case r.Timeout < MinReportingTimeout || r.Timeout > MaxReportingTimeout:
		return fmt.Errorf("a reporting timeout of %s: want %s to %s", r.Timeout, MinReportingTimeout, MaxReportingTimeout)
	}
	return nil
}

func reportingFromProto(pb *topologyv1.Reporting) ReportingRules {
	return ReportingRules{
		Policy:  ReportingPolicy(pb.GetPolicy()),
		Copies:  int(pb.GetCopies()),
		Timeout: time.Duration(pb.GetTimeoutMs()) * time.Millisecond,
	}
}

func (r ReportingRules) proto() *topologyv1.Reporting {
	if r == (ReportingRules{}) {
		return nil
	}
	return &topologyv1.Reporting{Policy: topologyv1.ReportingPolicy(r.Policy), Copies: uint32(r.Copies), TimeoutMs: uint64(r.Timeout / time.Millisecond)}
}

// CopyState is how far a reporting node's copy is.
type CopyState uint8

// The states. Their numbers are those of the wire format.
const (
	// Filling: it is being filled.
	Filling CopyState = iota + 1
	// Behind: it is filled and gets every write, but nobody waits for it.
	Behind
	// Joining: writes wait for it already, while it is compared with what was written
	// before.
	Joining
	// InSync: it has every acknowledged write.
	InSync
	// Evicting: writes wait for it until its lease is over.
	Evicting
)

// String names a state.
func (s CopyState) String() string {
	switch s {
	case Filling:
		return "filling"
	case Behind:
		return "behind"
	case Joining:
		return "joining"
	case InSync:
		return "in sync"
	case Evicting:
		return "evicting"
	}
	return fmt.Sprintf("copy-state(%d)", uint8(s))
}

// Awaited reports whether no write may be acknowledged that the copy does not have.
func (s CopyState) Awaited() bool { return s == Joining || s == InSync || s == Evicting }

// Copy is what a reporting node holds of a vnode's records of one namespace. It votes in
// no quorum.
type Copy struct {
	Namespace uint32
	Node      uint64
	State     CopyState
	// Since is the epoch in which it came into this state.
	Since uint64
}

func compareCopies(a, b Copy) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Node, b.Node))
}

// Copies returns the copies of a vnode's records of a namespace, in order of their nodes.
// The result is shared and must not be changed.
// REQUIRES: t.Formed().
func (t *Topology) Copies(vnode uint32, namespace uint32) []Copy {
	all := t.Ring[vnode].Copies
	from, _ := slices.BinarySearchFunc(all, namespace, func(c Copy, ns uint32) int { return cmp.Compare(c.Namespace, ns) })
	to := from
	for to < len(all) && all[to].Namespace == namespace {
		to++
	}
	return all[from:to:to]
}

// Copy returns a node's copy of a vnode's records of a namespace, if it has one.
// REQUIRES: t.Formed().
func (t *Topology) Copy(vnode, namespace uint32, node uint64) (Copy, bool) {
	all := t.Ring[vnode].Copies
	i, ok := slices.BinarySearchFunc(all, Copy{Namespace: namespace, Node: node}, compareCopies)
	if !ok {
		return Copy{}, false
	}
	return all[i], true
}

// Holds reports whether a node is an endpoint of a vnode of a namespace: by a slot, or by
// a copy for reports.
func (t *Topology) Holds(incarnation uint64, vnode uint32, ns *Namespace) bool {
	if t.Owns(incarnation, vnode, ns.Wide()) {
		return true
	}
	if int(vnode) >= len(t.Ring) {
		return false
	}
	_, ok := t.Copy(vnode, ns.ID, incarnation)
	return ok
}

// Fills reports whether a node has a copy that is being filled.
func (t *Topology) Fills(incarnation uint64) bool {
	return slices.ContainsFunc(t.Ring, func(v Vnode) bool {
		return slices.ContainsFunc(v.Copies, func(c Copy) bool { return c.Node == incarnation && c.State == Filling })
	})
}

// copyStep is a change of a copy's state; 0 is that there is none.
type copyStep struct{ from, to CopyState }

// copySteps are those that are allowed, with whether requests of earlier epochs must be
// refused from there on: a copy is filled, or joins, with the records of enough slots that
// have answered the last request of an epoch in which it was not known.
//
// Invariant 13: a copy is in sync after it has joined, and is let go of by way of Evicting
// only, in which the leader waits for the end of its lease.
var copySteps = map[copyStep]bool{
	{0, Filling}:       true,
	{Filling, Behind}:  false,
	{Behind, Filling}:  true, // what it had is gone
	{Behind, Joining}:  true,
	{Joining, InSync}:  false,
	{Joining, Behind}:  false, // it never had a lease
	{InSync, Evicting}: false,
	{Evicting, Behind}: false,
	{Filling, 0}:       false,
	{Behind, 0}:        false,
}

// setCopies takes copies a step further.
func (d *draft) setCopies(m *topologyv1.SetCopies) error {
	seen := map[uint32][]Copy{}
	for _, pb := range m.GetChanges() {
		i, next := pb.GetVnode(), copyFromProto(pb.GetCopy())
		if int(i) >= len(d.Topology.Ring) {
			return refuse(Invalid, "UNKNOWN_VNODE", fmt.Sprintf("there is no vnode %d: the ring has %d", i, len(d.Topology.Ring)), "vnode", i)
		}
		if slices.ContainsFunc(seen[i], func(o Copy) bool { return compareCopies(o, next) == 0 }) {
			return refuse(Invalid, "COPY_TWICE", fmt.Sprintf("the copy of vnode %d on node #%d is given twice", i, next.Node), "vnode", i)
		}
		seen[i] = append(seen[i], next)
		if err := d.stepCopy(i, next); err != nil {
			return err
		}
	}
	return nil
}

// stepCopy takes one copy a step further.
func (d *draft) stepCopy(vnode uint32, next Copy) error {
	v := &d.Topology.Ring[vnode]
	at, known := slices.BinarySearchFunc(v.Copies, next, compareCopies)
	from := CopyState(0)
	if known {
		from = v.Copies[at].State
	}
	if from == next.State {
		return nil
	}
	fenced, allowed := copySteps[copyStep{from, next.State}]
	if !allowed {
		return refuse(Precondition, "BAD_STEP", fmt.Sprintf("vnode %d: the copy on node #%d cannot go from %q to %q", vnode, next.Node, from.orNone(), next.State.orNone()), "vnode", vnode)
	}
	if next.State == Joining {
		if ns := d.namespace(next.Namespace); ns == nil || !ns.Reporting.Waits() {
			return refuse(Precondition, "REPORTING_NEVER_WAITS", fmt.Sprintf("namespace #%d has no writes wait for copies", next.Namespace), "vnode", vnode)
		}
	}
	next.Since = d.Topology.Epoch
	v.Copies = slices.Clone(v.Copies)
	switch {
	case next.State == 0:
		v.Copies = slices.Delete(v.Copies, at, at+1)
	case known:
		v.Copies[at] = next
	default:
		v.Copies = slices.Insert(v.Copies, at, next)
	}
	if fenced {
		v.ChangedEpoch = d.Topology.Epoch
	}
	v.quorum = nil // it is to be indexed anew
	d.changed = true
	return nil
}

// orNone names a state, or that there is no copy.
func (s CopyState) orNone() string {
	if s == 0 {
		return "none"
	}
	return s.String()
}

// Waits reports whether copies may be in sync.
func (r ReportingRules) Waits() bool {
	return r.Policy == ReportingBlock || r.Policy == ReportingDegrade
}

// namespace finds one that the draft has, by its identifier.
func (d *draft) namespace(id uint32) *Namespace {
	i := slices.IndexFunc(d.Topology.Namespaces, func(n Namespace) bool { return n.ID == id })
	if i < 0 {
		return nil
	}
	return &d.Topology.Namespaces[i]
}

// dropCopies gives up all copies of a namespace that was dropped.
func (d *draft) dropCopies(namespace uint32) {
	for i := range d.Topology.Ring {
		v := &d.Topology.Ring[i]
		of := func(c Copy) bool { return c.Namespace == namespace }
		if slices.ContainsFunc(v.Copies, of) {
			v.Copies = slices.DeleteFunc(slices.Clone(v.Copies), of)
			v.quorum = nil
		}
	}
}

// evicted returns the copies of a vnode as a new generation begins with them: leases that
// the generation before has granted may last, and some of what was joining may have been
// in sync by the end.
func evicted(copies []Copy, epoch uint64) []Copy {
	copies = slices.Clone(copies)
	for i := range copies {
		if copies[i].State.Awaited() {
			copies[i].State, copies[i].Since = Evicting, epoch
		}
	}
	return copies
}

// validateCopies checks the copies of one vnode.
func (t *Topology) validateCopies(i int) error {
	copies := t.Ring[i].Copies
	for j, c := range copies {
		if c.State < Filling || c.State > Evicting || c.Since == 0 {
			return fmt.Errorf("vnode %d: unknown %s since epoch %d", i, c.State, c.Since)
		}
		if j > 0 && compareCopies(copies[j-1], c) >= 0 {
			return fmt.Errorf("vnode %d: the copies are not in order of namespace and node", i)
		}
		if t.NamespaceByID(c.Namespace) == nil {
			return fmt.Errorf("vnode %d: a copy of namespace #%d, which there is not", i, c.Namespace)
		}
		if n := t.Node(c.Node); n == nil || n.Role != Reporting {
			return fmt.Errorf("vnode %d: a copy on #%d, which is no reporting node", i, c.Node)
		}
		if len(t.Copies(uint32(i), c.Namespace)) > quorum.MaxN {
			return fmt.Errorf("vnode %d: %d copies of namespace #%d, want at most %d", i, len(copies), c.Namespace, quorum.MaxN)
		}
	}
	return nil
}

func copyFromProto(pb *topologyv1.Copy) Copy {
	return Copy{Namespace: pb.GetNamespace(), Node: pb.GetNode(), State: CopyState(pb.GetState()), Since: pb.GetSince()}
}

// Proto converts a copy to its wire form.
func (c Copy) Proto() *topologyv1.Copy {
	return &topologyv1.Copy{Namespace: c.Namespace, Node: c.Node, State: topologyv1.CopyState(c.State), Since: c.Since}
}
