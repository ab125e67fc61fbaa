package topology

import (
	"fmt"
	"math"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
)

// NamespaceSettings is what a namespace can be given; nil fields keep their value,
// or take the default when the namespace is made.
type NamespaceSettings struct {
	N            *int
	W, R         *string
	ReadRepair   *ReadRepair
	RepairChance *float64
	Hints        *bool
	TTL          *time.Duration
	// Reporting is the policy; the other two are kept without one.
	Reporting        *ReportingPolicy
	ReportingCopies  *int
	ReportingTimeout *time.Duration
}

// defaultN is the N of a namespace that names none, where there are enough nodes.
const defaultN = 3

// NewNamespace decides what a new namespace is to be. Its identifier and epoch are
// filled in when it is created. The warnings are sentences for people. Errors are
// *Refusal.
func (t *Topology) NewNamespace(name string, set NamespaceSettings) (ns Namespace, warnings []string, err error) {
	if err := CheckName("namespace", name); err != nil {
		return ns, nil, refuse(Invalid, "BAD_NAME", err.Error(), "name", name)
	}
	if t.Namespace(name) != nil {
		return ns, nil, errNamespaceExists(name)
	}
	if !t.Formed() {
		return ns, nil, errNotFormed(t)
	}
	ns = defaultsOf(name, min(defaultN, len(t.Members())))
	if err := set.applyTo(&ns); err != nil {
		return ns, nil, err
	}
	if err := t.checkNamespace(&ns); err != nil {
		return ns, nil, err
	}
	ns.LeastWriteAcks = ns.W.Need(ns.N)
	return ns, ns.Warnings(), nil
}

func defaultsOf(name string, n int) Namespace {
	return Namespace{Name: name, N: n, W: quorum.Majority, R: quorum.Majority, ReadRepair: RepairBlocking, Hints: true, LeastWriteAcks: quorum.Majority.Need(n)}
}

// FoundingNamespace returns the namespace that is made when the ring forms.
func FoundingNamespace(n int) *Namespace {
	ns := defaultsOf(DefaultNamespace, n)
	return &ns
}

// Describe writes what a namespace is set to, for people.
func (ns *Namespace) Describe() string {
	hints, ttl := "off", "none"
	if ns.Hints {
		hints = "on"
	}
	if ns.TTL > 0 {
		ttl = ns.TTL.String()
	}
	return fmt.Sprintf("N=%d W=%s R=%s read repair %s (chance %g) hints %s TTL %s reporting %s", ns.N, ns.W, ns.R, ns.ReadRepair, ns.RepairChance, hints, ttl, ns.Reporting)
}

// ChangedNamespace decides what a namespace becomes at once under new settings, and what
// it is to be in the end: its N, and quorums that must not differ from one epoch to the
// next, are changed by an operation. Errors are *Refusal.
func (t *Topology) ChangedNamespace(name string, set NamespaceSettings, allowEventual bool) (ns, wanted Namespace, warnings []string, err error) {
	old := t.Namespace(name)
	if old == nil {
		return ns, wanted, nil, ErrNamespaceNotFound(name)
	}
	wanted = *old
	if err := set.applyTo(&wanted); err != nil {
		return ns, wanted, nil, err
	}
	ns = wanted
	ns.N = old.N
	for _, s := range []*Namespace{&ns, &wanted} {
		if err := t.checkNamespace(s); err != nil {
			return ns, wanted, nil, err
		}
	}
	n, quorums := wanted.N, ns.W != old.W || ns.R != old.R
	if old.AlsoN != 0 && (n != old.N || quorums) {
		return ns, wanted, nil, refuse(Precondition, "N_CHANGING",
			fmt.Sprintf("N, W or R of namespace %s are being changed: they can be set again when that is done (kvctl operation ls)", name), "namespace", name)
	}
	if n != old.N && old.Strength() == quorum.Strong && wanted.Strength() != quorum.Strong && !allowEventual {
		return ns, wanted, nil, refuse(Precondition, "WOULD_WEAKEN_READS",
			fmt.Sprintf("reads of namespace %s are strong, and would be %s with N=%d, W=%d, R=%d: set W and R to quorum, or allow it (--allow-eventual)",
				name, wanted.Strength(), n, wanted.W.Need(n), wanted.R.Need(n)), "namespace", name, "n", n)
	}
	if !old.atOnce(ns.W, ns.R) {
		if n != old.N {
			return ns, wanted, nil, refuse(Precondition, "ONE_AFTER_THE_OTHER",
				fmt.Sprintf("N of namespace %s and its W and R cannot change together: set one, and the other when that is done (--wait)", name), "namespace", name)
		}
		ns.W, ns.R = old.W, old.R
	}
	ns.LeastWriteAcks = min(old.LeastWriteAcks, ns.W.Need(ns.N))
	return ns, wanted, wanted.Warnings(), nil
}

// TowardsN returns which of the two numbers of slots of a namespace whose N changes is
// nearer to a target.
func (ns *Namespace) TowardsN(target int) int {
	if least := min(ns.N, ns.AlsoN); target <= least {
		return least
	}
	return ns.Wide()
}

// StepN returns what a namespace becomes by the next step of a change of N, towards a
// target or back: the change begins; reads go by the other number of slots; it ends.
// REQUIRES: target is not N, or N is changing.
func (ns Namespace) StepN(target int) Namespace {
	switch {
	case ns.AlsoN == 0 && target > ns.N:
		ns.AlsoN, ns.Change = ns.N+1, Widening
	case ns.AlsoN == 0:
		ns.AlsoN, ns.Change = ns.N-1, Narrowing
	case ns.N == ns.TowardsN(target):
		ns.AlsoN, ns.Change = 0, 0
	default:
		// Of what default writes have left, as many slots as they need now have it all,
		// unless they needed fewer once.
		full := ns.LeastWriteAcks >= ns.W.Need(ns.N)
		ns.N, ns.AlsoN = ns.AlsoN, ns.N
		need := min(ns.W.Need(ns.N), ns.N)
		switch {
		case full:
			ns.LeastWriteAcks = need
		case ns.N < ns.AlsoN:
			ns.LeastWriteAcks = max(1, min(ns.LeastWriteAcks-1, need))
		}
	}
	return ns
}

// atOnce reports whether other default quorums may hold from one epoch to the next: they
// ask for as much as those before, or reads are eventual with both.
func (ns *Namespace) atOnce(w, r quorum.Spec) bool {
	n, other := ns.N, Namespace{N: ns.N, W: w, R: r}
	return w.Need(n) == ns.W.Need(n) && r.Need(n) == ns.R.Need(n) || ns.Strength() == quorum.Eventual && other.Strength() == quorum.Eventual
}

// StepQuorums returns what a namespace becomes by the next step of a change of its
// quorums, to others or back: the change begins, and writes need both quorums; reads go
// by the other one; it ends.
// REQUIRES: the quorums are not the namespace's, or are changing.
func (ns Namespace) StepQuorums(w, r quorum.Spec) Namespace {
	switch {
	case ns.AlsoN == 0:
		ns.AlsoN, ns.AlsoW, ns.AlsoR, ns.Change = ns.N, w, r, Requiring
		// What was acknowledged lies on LeastWriteAcks slots, what reads have returned on
		// N−R+1, by their repair.
		least := min(ns.LeastWriteAcks, ns.N-ns.R.Need(ns.N)+1)
		if next := r.Need(ns.N); least+next <= ns.N && w.Need(ns.N)+next > ns.N {
			ns.Change = Leveling
		}
	case ns.W == w && ns.R == r:
		ns.AlsoN, ns.AlsoW, ns.AlsoR, ns.Change = 0, quorum.Spec{}, quorum.Spec{}, 0
		ns.LeastWriteAcks = min(ns.LeastWriteAcks, ns.W.Need(ns.N))
	default:
		ns.W, ns.AlsoW = ns.AlsoW, ns.W
		ns.R, ns.AlsoR = ns.AlsoR, ns.R
		if ns.Change == Leveling {
			// What is older is on all slots now, and what is not needed both quorums.
			ns.LeastWriteAcks = ns.Writes(quorum.Spec{})[0].Need
		}
	}
	return ns
}

// checkNamespaceStep returns why a namespace's N, W and R must not change so.
//
// Invariant 8: in between, writes need quorums of both numbers of slots, or both quorums,
// so that reads of either meet them; and reads go by the other one only when what was
// written before, by quorums of the old one, lies on enough of the new one's slots.
func checkNamespaceStep(old, next *Namespace) error {
	type setting struct {
		n    int
		w, r quorum.Spec
	}
	was, is := setting{old.N, old.W, old.R}, setting{next.N, next.W, next.R}
	wasAlso, isAlso := setting{old.AlsoN, old.AlsoW, old.AlsoR}, setting{next.AlsoN, next.AlsoW, next.AlsoR}
	swapped := setting{old.AlsoN, old.AlsoW.Or(old.W), old.AlsoR.Or(old.R)}
	swappedAlso := setting{old.N, old.W, old.R}
	if old.AlsoN != old.N {
		swappedAlso.w, swappedAlso.r = quorum.Spec{}, quorum.Spec{}
	}
	begins := wasAlso == setting{} && isAlso != setting{} && was == is && (next.AlsoN > next.N) == (next.Change == Widening) && (next.AlsoN < next.N) == (next.Change == Narrowing)
	swaps := is == swapped && isAlso == swappedAlso && next.Change == old.Change
	ends := wasAlso != setting{} && isAlso == setting{} && was == is
	switch {
	case was == is && wasAlso == isAlso && old.Change == next.Change, begins, swaps, ends:
		return nil
	case wasAlso == setting{} && isAlso == setting{} && was.n == is.n && old.atOnce(next.W, next.R):
		return nil
	}
	return refuse(Precondition, "BAD_STEP", fmt.Sprintf("namespace %s cannot go from N=%d W=%s R=%s, also N=%d W=%s R=%s, to N=%d W=%s R=%s, also N=%d W=%s R=%s",
		old.Name, old.N, old.W, old.R, old.AlsoN, old.AlsoW, old.AlsoR, next.N, next.W, next.R, next.AlsoN, next.AlsoW, next.AlsoR), "namespace", old.Name)
}

// DroppableNamespace returns the namespace of a name if it may be dropped. Errors
// are *Refusal.
func (t *Topology) DroppableNamespace(name string) (*Namespace, error) {
	ns := t.Namespace(name)
	if ns == nil {
		return nil, ErrNamespaceNotFound(name)
	}
	if name == DefaultNamespace {
		return nil, refuse(Precondition, "DEFAULT_NAMESPACE", "namespace default cannot be dropped", "namespace", name)
	}
	return ns, nil
}

func (set NamespaceSettings) applyTo(ns *Namespace) error {
	if set.N != nil {
		ns.N = *set.N
	}
	for _, q := range []struct {
		field, flag string
		value       *string
		spec        *quorum.Spec
	}{{"write_quorum", "W", set.W, &ns.W}, {"read_quorum", "R", set.R, &ns.R}} {
		if q.value == nil {
			continue
		}
		spec, err := quorum.Parse(*q.value)
		if err == nil && spec.IsZero() {
			err = fmt.Errorf("bad quorum \"\": want a count (2), a percent (40%%), one, quorum or all")
		}
		if err != nil {
			return refuse(Invalid, "BAD_QUORUM", q.flag+": "+err.Error(), "field", q.field, "value", *q.value)
		}
		*q.spec = spec
	}
	if set.ReadRepair != nil {
		ns.ReadRepair = *set.ReadRepair
	}
	if set.RepairChance != nil {
		ns.RepairChance = *set.RepairChance
	}
	if set.Hints != nil {
		ns.Hints = *set.Hints
	}
	if set.TTL != nil {
		ns.TTL = *set.TTL
	}
	return set.applyToReporting(&ns.Reporting)
}

// checkNamespace refuses what the namespace or the number of nodes does not allow.
func (t *Topology) checkNamespace(ns *Namespace) error {
	if ns.N < 1 || ns.N > quorum.MaxN {
		return refuse(Invalid, "BAD_N", fmt.Sprintf("N is %d: want 1 to %d", ns.N, quorum.MaxN), "field", "n", "value", ns.N, "limit", quorum.MaxN)
	}
	if nodes := len(t.Members()); ns.N > nodes {
		return refuse(Precondition, "N_ABOVE_NODES",
			fmt.Sprintf("N=%d needs %d active data nodes, the ring has %d", ns.N, ns.N, nodes), "n", ns.N, "data_nodes", nodes)
	}
	for flag, q := range map[string]quorum.Spec{"W": ns.W, "R": ns.R} {
		if err := q.Check(ns.N); err != nil {
			return refuse(Invalid, "QUORUM_ABOVE_N", flag+": "+err.Error(), "value", q, "n", ns.N, "limit", ns.N)
		}
	}
	if math.IsNaN(ns.RepairChance) || ns.RepairChance < 0 || ns.RepairChance > 1 {
		return refuse(Invalid, "BAD_REPAIR_CHANCE", fmt.Sprintf("repair chance is %v: want 0 to 1", ns.RepairChance), "field", "repair_chance", "value", ns.RepairChance)
	}
	if ns.TTL < 0 {
		return refuse(Invalid, "BAD_TTL", fmt.Sprintf("TTL is %s: want 0 (none) or more", ns.TTL), "field", "ttl_ms", "value", ns.TTL)
	}
	if err := ns.Reporting.validate(); err != nil {
		return refuse(Invalid, "BAD_REPORTING", err.Error(), "field", "reporting")
	}
	return nil
}

// Warnings returns sentences about what the namespace's quorums cost or leave open.
func (ns *Namespace) Warnings() []string {
	var out []string
	for _, q := range []struct {
		name string
		spec quorum.Spec
	}{{"W", ns.W}, {"R", ns.R}} {
		if w := q.spec.Warning(ns.N); w != "" {
			out = append(out, q.name+": "+w)
		}
	}
	if s := ns.Strength(); s != quorum.Strong {
		out = append(out, fmt.Sprintf("reads are %s: N=%d, W=%d, R=%d", s, ns.N, ns.W.Need(ns.N), ns.R.Need(ns.N)))
	}
	return out
}

// Strength judges the namespace's default reads against its default writes.
func (ns *Namespace) Strength() quorum.Strength {
	return quorum.StrengthOf(ns.N, ns.W.Need(ns.N), ns.R.Need(ns.N))
}

// ErrNamespaceNotFound returns the refusal of a request that names a namespace
// that does not exist.
func ErrNamespaceNotFound(name string) *Refusal {
	return refuse(NotFound, "NAMESPACE_NOT_FOUND", fmt.Sprintf("there is no namespace %q", name), "namespace", name)
}

func errNamespaceExists(name string) *Refusal {
	return refuse(Exists, "NAMESPACE_EXISTS", fmt.Sprintf("there is a namespace %q already", name), "namespace", name)
}

func errNotFormed(t *Topology) *Refusal {
	return refuse(Precondition, "RING_NOT_FORMED",
		fmt.Sprintf("the ring has not formed yet: %d of %d founding nodes have registered", t.DataNodes(), t.FoundingNodes),
		"data_nodes", t.DataNodes(), "founding_nodes", t.FoundingNodes)
}
