// Package topology is the value the orchestrators agree on: nodes, vnodes with
// their slots, namespaces and settings, under an epoch. A Topology is immutable;
// every change makes a new one. The package decides which changes are allowed and
// never talks to anybody: agreement, distribution and health live elsewhere.
package topology

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/ring"
)

// Role is what a node is for.
type Role uint8

// The roles. Their numbers are those of the wire format.
const (
	Data Role = iota + 1
	Reporting
)

// String names a role.
func (r Role) String() string {
	switch r {
	case Data:
		return "data"
	case Reporting:
		return "reporting"
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// Node is a registered data directory with the process that serves it.
type Node struct {
	// Incarnation identifies the data directory; it is never reused.
	Incarnation uint64
	Name        string
	Zone        string
	Role        Role
	// Address is the host:port of the gRPC server, AdminAddress that of the admin
	// HTTP server, GossipAddress that of the gossip listener.
	Address       string
	AdminAddress  string
	GossipAddress string
	// DataID is drawn once when the data directory is made.
	DataID string
	// LostEpoch is the epoch in which the node was given up for lost, or 0.
	LostEpoch uint64
}

// Phase is how far the move of a slot has come.
type Phase uint8

// The phases. Their numbers are those of the wire format.
const (
	// Stable: no move; the slot's node is written and read.
	Stable Phase = iota + 1
	// WriteBothReadOld: the incoming node is being filled.
	WriteBothReadOld
	// WriteBothReadNew: the incoming node is complete.
	WriteBothReadNew
	// WriteNewReadNone: the old node is dead and the incoming one is being filled.
	WriteNewReadNone
)

// String names a phase.
func (p Phase) String() string {
	switch p {
	case Stable:
		return "stable"
	case WriteBothReadOld:
		return "write both, read old"
	case WriteBothReadNew:
		return "write both, read new"
	case WriteNewReadNone:
		return "write new, read none"
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// Slot is one replica position of a vnode. Nodes are incarnations; Incoming and Since
// are 0 unless the phase is a move's.
type Slot struct {
	Node     uint64
	Incoming uint64
	Phase    Phase
	// Since is the epoch in which the incoming node became one. It stays while the phase
	// changes, and so tells one assignment from a later one.
	Since uint64
}

// Quorum returns the slot as requests see it.
func (s Slot) Quorum() quorum.Slot {
	switch s.Phase {
	case Stable:
		return quorum.Slot{Write: [2]uint64{s.Node}, Read: s.Node}
	case WriteBothReadOld:
		if mutant.On("wrong-phase-read") {
			return quorum.Slot{Write: [2]uint64{s.Node, s.Incoming}, Read: s.Incoming}
		}
		return quorum.Slot{Write: [2]uint64{s.Node, s.Incoming}, Read: s.Node}
	case WriteBothReadNew:
		return quorum.Slot{Write: [2]uint64{s.Node, s.Incoming}, Read: s.Incoming}
	case WriteNewReadNone:
		return quorum.Slot{Write: [2]uint64{s.Incoming}}
	}
	panic(fmt.Sprintf("topology: slot in %s (invariant 7)", s.Phase))
}

// Vnode is a slice of the ring with its replicas.
type Vnode struct {
	// Slots is ordered; a namespace of N replicas uses the first N.
	Slots []Slot
	// ChangedEpoch is the epoch in which the slots last changed, or the copies that requests
	// have to know of.
	ChangedEpoch uint64
	// Copies is what reporting nodes hold, in order of namespace and node.
	Copies []Copy
	// What index makes of the above: the slots as requests see them, and the vnode's part
	// in the topology's checksum.
	quorum []quorum.Slot
	sum    uint64
}

// ReadRepair is what a read does about stale replicas.
type ReadRepair uint8

// The settings of read repair. Their numbers are those of the wire format.
const (
	RepairBlocking ReadRepair = iota + 1
	RepairAsync
	RepairOff
)

// ParseReadRepair reads blocking, async or off.
func ParseReadRepair(s string) (ReadRepair, error) {
	for _, r := range []ReadRepair{RepairBlocking, RepairAsync, RepairOff} {
		if s == r.String() {
			return r, nil
		}
	}
	return 0, fmt.Errorf("bad read repair %q: want blocking, async or off", s)
}

// String writes a setting as ParseReadRepair reads it.
func (r ReadRepair) String() string {
	switch r {
	case RepairBlocking:
		return "blocking"
	case RepairAsync:
		return "async"
	case RepairOff:
		return "off"
	}
	return fmt.Sprintf("read-repair(%d)", uint8(r))
}

// Namespace is a set of keys with its own replication.
type Namespace struct {
	// ID is never reused, so a namespace made under a dropped one's name is empty.
	ID   uint32
	Name string
	N    int
	// W and R are the default quorums.
	W, R       quorum.Spec
	ReadRepair ReadRepair
	// RepairChance, 0 to 1, is how often a read also compares the replicas beyond R.
	RepairChance float64
	Hints        bool
	// TTL is the default time to live; 0 means for ever.
	TTL time.Duration
	// LeastWriteAcks is the fewest slots a default write has needed since the
	// namespace was made; reads are judged against it.
	LeastWriteAcks int
	ChangedEpoch   uint64
	// While N changes, by one, reads go by N and writes by AlsoN as well; Since is the
	// epoch in which the change began. Otherwise all three are 0. See StepN.
	AlsoN  int
	Change NChange
	Since  uint64
	// While W and R change, AlsoN is N, reads go by R and writes by AlsoW as well; AlsoR is
	// the other R. Otherwise both are unset. See StepQuorums.
	AlsoW, AlsoR quorum.Spec
	Reporting    ReportingRules
}

// NChange says which way N changes, or that W and R do.
type NChange uint8

// The ways. Their numbers are those of the wire format.
const (
	// Widening: the nodes of one more slot are filled.
	Widening NChange = iota + 1
	// Narrowing: the nodes of the other slots take over what the last one has.
	Narrowing
	// Requiring: N stays, W and R become others.
	Requiring
	// Leveling: so they do, and the nodes of all slots take over from each other what reads
	// by the new R could miss otherwise.
	Leveling
)

// Filled reports whether a change has the nodes of a slot filled, and whether these keep
// what they have.
func (ns *Namespace) Filled(slot int) (filled, keep bool) {
	last := slot == ns.Wide()-1
	switch ns.Change {
	case Widening:
		return last, false
	case Narrowing:
		return !last, true
	case Leveling:
		return true, true
	}
	return false, false
}

// Wide returns how many slots of a vnode hold records of the namespace.
func (ns *Namespace) Wide() int { return max(ns.N, ns.AlsoN) }

// Writes returns how many slots must have a write for which a quorum was asked; the
// unset one stands for the namespace's.
func (ns *Namespace) Writes(asked quorum.Spec) quorum.Goals {
	spec := asked.Or(ns.W)
	goals := quorum.Goals{{N: ns.N, Need: min(spec.Need(ns.N), ns.N)}}
	switch {
	case ns.AlsoN == ns.N:
		goals[0].Need = max(goals[0].Need, min(asked.Or(ns.AlsoW).Need(ns.N), ns.N))
	case ns.AlsoN > 0:
		goals[1] = quorum.Goal{N: ns.AlsoN, Need: min(spec.Need(ns.AlsoN), ns.AlsoN)}
	}
	return goals
}

// LeastWrites is the fewest slots that may have a default write now, in any epoch that is
// in use: while W changes, the next one may take it further down.
func (ns *Namespace) LeastWrites() int {
	if ns.AlsoW.IsZero() {
		return ns.LeastWriteAcks
	}
	return min(ns.LeastWriteAcks, ns.W.Need(ns.N))
}

// Limits that are not settings.
const (
	MaxKeyBytes      = 4 << 10
	HardMaxValue     = 16 << 20
	HardMaxBatch     = 32 << 20
	generationShift  = 48
	maxNameBytes     = 63
	DefaultNamespace = "default"
)

// Orchestrator is one process of the control plane.
type Orchestrator struct {
	Name, Address, AdminAddress, GossipAddress string
}

// Topology is an immutable agreement about the cluster. Make one with FromProto
// or by applying commands to a State.
//
// Invariant 9: every vnode has as many slots as the largest N in use, on distinct
// nodes.
type Topology struct {
	ClusterID     string
	Epoch         uint64
	Vnodes        uint32
	FoundingNodes int
	// Nodes is in order of incarnation, Ring in ring order and empty until the ring
	// has formed, Namespaces in order of identifier.
	Nodes         []Node
	Ring          []Vnode
	Namespaces    []Namespace
	Settings      Settings
	Orchestrators []Orchestrator
	// Recovery names the recovery of the control plane that began the epoch's generation;
	// it is empty in the first one.
	Recovery string

	byIncarnation map[uint64]*Node
	byName        map[string]*Namespace
	byID          map[uint32]*Namespace
	// holders is shared by all who have this very topology, and nil while it is changed.
	holders *holders
	// ringSum and restSum make up the checksum; see sum.
	ringSum, restSum uint64
}

// EpochString writes an epoch as people read it: its number, behind its
// generation when the control plane has been recovered.
func EpochString(epoch uint64) string {
	number := epoch & (1<<generationShift - 1)
	if g := Generation(epoch); g > 0 {
		return fmt.Sprintf("%d.%d", g, number)
	}
	return strconv.FormatUint(number, 10)
}

// index builds what lookups need. It is called once, before the value is shared, and
// leaves vnodes alone that another topology has indexed at the same place of its ring.
func (t *Topology) index() {
	t.indexRest()
	t.ringSum = 0
	for i := range t.Ring {
		v := &t.Ring[i]
		if v.quorum == nil {
			v.index(i)
		}
		t.ringSum += v.sum
	}
}

// indexRest builds what lookups of anything but vnodes need.
func (t *Topology) indexRest() {
	t.holders = &holders{}
	t.byIncarnation = make(map[uint64]*Node, len(t.Nodes))
	for i := range t.Nodes {
		t.byIncarnation[t.Nodes[i].Incarnation] = &t.Nodes[i]
	}
	t.byName = make(map[string]*Namespace, len(t.Namespaces))
	t.byID = make(map[uint32]*Namespace, len(t.Namespaces))
	for i := range t.Namespaces {
		t.byName[t.Namespaces[i].Name] = &t.Namespaces[i]
		t.byID[t.Namespaces[i].ID] = &t.Namespaces[i]
	}
	t.restSum = t.sumRest()
}

// index builds what is kept of the vnode at a place of the ring.
func (v *Vnode) index(at int) {
	v.quorum = make([]quorum.Slot, len(v.Slots))
	for j, s := range v.Slots {
		v.quorum[j] = s.Quorum()
	}
	v.sum = v.sumAt(at)
}

// Formed reports whether the vnodes have slots.
func (t *Topology) Formed() bool { return len(t.Ring) > 0 }

// Node returns the node of an incarnation, or nil.
func (t *Topology) Node(incarnation uint64) *Node { return t.byIncarnation[incarnation] }

// NodeName returns the name of an incarnation, or "#17" when it is unknown.
func (t *Topology) NodeName(incarnation uint64) string {
	if n := t.Node(incarnation); n != nil {
		return n.Name
	}
	return "#" + strconv.FormatUint(incarnation, 10)
}

// Resolve finds a node by its name, or by its incarnation written "#17". Of
// several nodes with one name it returns the newest. It returns nil when there
// is none.
func (t *Topology) Resolve(name string) *Node {
	if digits, ok := strings.CutPrefix(name, "#"); ok {
		inc, err := strconv.ParseUint(digits, 10, 64)
		if err != nil {
			return nil
		}
		return t.Node(inc)
	}
	for i := len(t.Nodes) - 1; i >= 0; i-- {
		if t.Nodes[i].Name == name {
			return &t.Nodes[i]
		}
	}
	return nil
}

// Namespace returns the namespace of a name, or nil.
func (t *Topology) Namespace(name string) *Namespace { return t.byName[name] }

// NamespaceByID returns the namespace of an identifier, or nil.
func (t *Topology) NamespaceByID(id uint32) *Namespace { return t.byID[id] }

// VnodeOf returns the vnode of a key.
// REQUIRES: t.Formed().
func (t *Topology) VnodeOf(key []byte) uint32 {
	return ring.VnodeOf(ring.TokenOf(key), t.Vnodes)
}

// Slots returns the slots that a namespace of n replicas uses of a vnode. The
// result is shared and must not be changed.
// REQUIRES: t.Formed(), and n is the N of one of t's namespaces.
func (t *Topology) Slots(vnode uint32, n int) []quorum.Slot {
	return t.Ring[vnode].quorum[:n:n]
}

// Owns reports whether a node has to hold a vnode's records of a namespace with
// n replicas, as old or incoming node of a slot.
func (t *Topology) Owns(incarnation uint64, vnode uint32, n int) bool {
	if int(vnode) >= len(t.Ring) {
		return false
	}
	v := &t.Ring[vnode]
	for _, s := range v.quorum[:min(n, len(v.quorum))] {
		if s.Write[0] == incarnation || s.Write[1] == incarnation || s.Read == incarnation {
			return true
		}
	}
	return false
}

// DataNodes returns how many data nodes are registered.
func (t *Topology) DataNodes() int {
	n := 0
	for i := range t.Nodes {
		if t.Nodes[i].Role == Data {
			n++
		}
	}
	return n
}

// Members returns the data nodes that have a slot, in order of incarnation. The
// others are spares.
func (t *Topology) Members() []*Node {
	h := t.findHolders()
	var out []*Node
	for i := range t.Nodes {
		if h.has[t.Nodes[i].Incarnation] {
			out = append(out, &t.Nodes[i])
		}
	}
	return out
}

// Names reports whether an incarnation has a slot, or is to have one, or has a copy.
func (t *Topology) Names(incarnation uint64) bool {
	h := t.findHolders()
	return h.has[incarnation] || h.gets[incarnation]
}

// holders is who has slots and who else is to have records. It is found when first asked for.
type holders struct {
	once      sync.Once
	has, gets map[uint64]bool
}

func (h *holders) find(ring []Vnode) {
	h.has, h.gets = map[uint64]bool{}, map[uint64]bool{}
	for i := range ring {
		for _, s := range ring[i].Slots {
			h.has[s.Node] = true
			if s.Incoming != 0 {
				h.gets[s.Incoming] = true
			}
		}
		for _, c := range ring[i].Copies {
			h.gets[c.Node] = true
		}
	}
}

// findHolders returns who has slots, as of now while t is changed.
func (t *Topology) findHolders() *holders {
	h := t.holders
	if h == nil {
		h = &holders{}
	}
	h.once.Do(func() { h.find(t.Ring) })
	return h
}

// Width returns the largest N in use, and at least one once the ring has formed.
func (t *Topology) Width() int {
	w := 0
	for i := range t.Namespaces {
		w = max(w, t.Namespaces[i].Wide())
	}
	return w
}

// SlotCounts returns how many of the first n slots of all vnodes each node has.
func (t *Topology) SlotCounts(n int) map[uint64]int {
	counts := make(map[uint64]int, len(t.Nodes))
	for i := range t.Ring {
		for _, s := range t.Ring[i].Slots[:min(n, len(t.Ring[i].Slots))] {
			counts[s.Node]++
		}
	}
	return counts
}

// Imbalance returns how much more than its fair share the node with most slots has: 1
// is even, 0 means that there is no ring. Spares do not count.
func (t *Topology) Imbalance() float64 {
	sum, most := 0, 0
	counts := t.SlotCounts(quorum.MaxN)
	for _, n := range counts {
		sum, most = sum+n, max(most, n)
	}
	if sum == 0 {
		return 0
	}
	return float64(most*len(counts)) / float64(sum)
}

// validate returns an error that names the first broken rule.
func (t *Topology) validate() error {
	if err := t.validateRest(); err != nil {
		return err
	}
	width := t.Width()
	for i := range t.Ring {
		if err := t.validateVnode(i, width); err != nil {
			return err
		}
	}
	return nil
}

// validateRest checks everything but the vnodes.
func (t *Topology) validateRest() error {
	if err := ring.CheckVnodes(t.Vnodes); err != nil {
		return err
	}
	if err := t.Settings.Validate(); err != nil {
		return err
	}
	if !slices.IsSortedFunc(t.Nodes, func(a, b Node) int { return cmp.Compare(a.Incarnation, b.Incarnation) }) {
		return fmt.Errorf("nodes are not in order of incarnation")
	}
	if len(t.Ring) != 0 && len(t.Ring) != int(t.Vnodes) {
		return fmt.Errorf("ring has %d vnodes, want %d", len(t.Ring), t.Vnodes)
	}
	for i := range t.Namespaces {
		if err := t.Namespaces[i].validate(); err != nil {
			return err
		}
	}
	return nil
}

// validateVnode checks invariant 9 for one vnode.
func (t *Topology) validateVnode(i, width int) error {
	slots := t.Ring[i].Slots
	if len(slots) < width || len(slots) > quorum.MaxN {
		return fmt.Errorf("vnode %d has %d slots, want at least %d (invariant 9)", i, len(slots), width)
	}
	var seen []uint64
	for j, s := range slots {
		moving := s.Phase == WriteBothReadOld || s.Phase == WriteBothReadNew || s.Phase == WriteNewReadNone
		if !moving && s.Phase != Stable {
			return fmt.Errorf("vnode %d slot %d: unknown %s", i, j, s.Phase)
		}
		if moving != (s.Incoming != 0) || moving != (s.Since != 0) {
			return fmt.Errorf("vnode %d slot %d: phase %q with incoming node %d since epoch %d", i, j, s.Phase, s.Incoming, s.Since)
		}
		for _, n := range []uint64{s.Node, s.Incoming} {
			if n == 0 && n == s.Incoming {
				continue
			}
			node := t.Node(n)
			dead := n == s.Node && s.Phase == WriteNewReadNone
			if node == nil && !dead {
				return fmt.Errorf("vnode %d slot %d: node #%d is not registered", i, j, n)
			}
			if node != nil && node.Role != Data {
				return fmt.Errorf("vnode %d slot %d: node %s is not a data node", i, j, node.Name)
			}
			if dead && s.Node == s.Incoming {
				continue // it comes back, empty, to the slot it had
			}
			if slices.Contains(seen, n) {
				return fmt.Errorf("vnode %d: node #%d has two slots (invariant 9)", i, n)
			}
			seen = append(seen, n)
		}
	}
	return t.validateCopies(i)
}

func (ns *Namespace) validate() error {
	if err := CheckName("namespace", ns.Name); err != nil {
		return err
	}
	switch {
	case ns.N < 1 || ns.N > quorum.MaxN:
		return fmt.Errorf("namespace %s: N is %d: want 1 to %d", ns.Name, ns.N, quorum.MaxN)
	case ns.W.IsZero() || ns.R.IsZero():
		return fmt.Errorf("namespace %s: W and R must be set", ns.Name)
	case !(ns.RepairChance >= 0 && ns.RepairChance <= 1):
		return fmt.Errorf("namespace %s: repair chance is %v: want 0 to 1", ns.Name, ns.RepairChance)
	case ns.TTL < 0:
		return fmt.Errorf("namespace %s: TTL is %s: want 0 (none) or more", ns.Name, ns.TTL)
	case ns.ReadRepair < RepairBlocking || ns.ReadRepair > RepairOff:
		return fmt.Errorf("namespace %s: unknown %s", ns.Name, ns.ReadRepair)
	}
	if err := ns.Reporting.validate(); err != nil {
		return fmt.Errorf("namespace %s: %w", ns.Name, err)
	}
	changing, others := ns.AlsoN != 0, ns.Change >= Requiring
	if changing != (ns.Since != 0) || changing != (ns.Change != 0) || ns.Change > Leveling ||
		changing && (ns.AlsoN < 1 || others != (ns.AlsoN == ns.N) || ns.AlsoN-ns.N > 1 || ns.N-ns.AlsoN > 1) {
		return fmt.Errorf("namespace %s: N is %d and also %d, change %d since epoch %d", ns.Name, ns.N, ns.AlsoN, ns.Change, ns.Since)
	}
	if others == ns.AlsoW.IsZero() || others == ns.AlsoR.IsZero() {
		return fmt.Errorf("namespace %s: W and R are also %q and %q, change %d", ns.Name, ns.AlsoW, ns.AlsoR, ns.Change)
	}
	for i, q := range []quorum.Spec{ns.W, ns.R, ns.AlsoW, ns.AlsoR} {
		if err := q.Check(ns.N); err != nil {
			return fmt.Errorf("namespace %s: %s %w", ns.Name, []string{"write", "read"}[i%2], err)
		}
	}
	return nil
}

// CheckName returns an error unless a name of the given kind of thing is 1 to 63
// letters, digits, dots, dashes or underscores and begins with a letter or digit.
func CheckName(kind, name string) error {
	ok := len(name) >= 1 && len(name) <= maxNameBytes
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '.' || c == '-' || c == '_')
	}
	if !ok {
		return fmt.Errorf("bad %s name %q: want 1 to %d letters, digits, dots, dashes or underscores, beginning with a letter or digit", kind, name, maxNameBytes)
	}
	return nil
}
