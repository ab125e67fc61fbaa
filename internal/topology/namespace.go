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
	return fmt.Sprintf("N=%d W=%s R=%s read repair %s (chance %g) hints %s TTL %s", ns.N, ns.W, ns.R, ns.ReadRepair, ns.RepairChance, hints, ttl)
}

// ChangedNamespace decides what a namespace becomes under new settings, and which N it
// is to have: that is not changed at once, but by an operation. Errors are *Refusal.
func (t *Topology) ChangedNamespace(name string, set NamespaceSettings, allowEventual bool) (ns Namespace, n int, warnings []string, err error) {
	old := t.Namespace(name)
	if old == nil {
		return ns, 0, nil, ErrNamespaceNotFound(name)
	}
	wanted := *old
	if err := set.applyTo(&wanted); err != nil {
		return ns, 0, nil, err
	}
	ns, n = wanted, wanted.N
	ns.N = old.N
	for _, s := range []*Namespace{&ns, &wanted} {
		if err := t.checkNamespace(s); err != nil {
			return ns, 0, nil, err
		}
	}
	if old.AlsoN != 0 && (n != old.N || ns.W != old.W || ns.R != old.R) {
		return ns, 0, nil, refuse(Precondition, "N_CHANGING",
			fmt.Sprintf("N of namespace %s is being changed: N, W and R can be set again when that is done (kvctl operation ls)", name), "namespace", name)
	}
	if n != old.N && old.Strength() == quorum.Strong && wanted.Strength() != quorum.Strong && !allowEventual {
		return ns, 0, nil, refuse(Precondition, "WOULD_WEAKEN_READS",
			fmt.Sprintf("reads of namespace %s are strong, and would be %s with N=%d, W=%d, R=%d: set W and R to quorum, or allow it (--allow-eventual)",
				name, wanted.Strength(), n, wanted.W.Need(n), wanted.R.Need(n)), "namespace", name, "n", n)
	}
	ns.LeastWriteAcks = min(old.LeastWriteAcks, ns.W.Need(ns.N))
	return ns, n, wanted.Warnings(), nil
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

// checkNStep returns why a namespace's N must not change so.
//
// Invariant 8: in between, writes need quorums of both numbers of slots, so that reads
// of either meet them; and reads go by another number only when what was written
// before, by quorums of the old one, lies on enough of the new one's slots.
func checkNStep(old, next *Namespace) error {
	same := old.N == next.N && old.AlsoN == next.AlsoN && old.Change == next.Change
	begins := old.AlsoN == 0 && next.AlsoN != 0 && next.N == old.N && (next.AlsoN > next.N) == (next.Change == Widening)
	swaps := next.N == old.AlsoN && next.AlsoN == old.N && next.Change == old.Change
	ends := old.AlsoN != 0 && next.AlsoN == 0 && next.N == old.N
	if same || begins || swaps || ends {
		return nil
	}
	return refuse(Precondition, "BAD_STEP", fmt.Sprintf("namespace %s cannot go from N=%d, also %d, to N=%d, also %d", old.Name, old.N, old.AlsoN, next.N, next.AlsoN), "namespace", old.Name)
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
	return nil
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
