package topology

import (
	"cmp"
	"fmt"
	"slices"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"

	"github.com/kvasirdb/kvasir/internal/mutant"
)

// Change is one entry of the cluster's history.
type Change struct {
	// Number is one more than that of the change before.
	Number uint64
	Epoch  uint64
	// AtMillis is milliseconds since 1970 by the proposing orchestrator's clock.
	AtMillis            int64
	Subject, Name, What string
}

// boot is the last start of a node that the orchestrators know of.
type boot struct {
	count uint64
	id    string
}

// State is what the orchestrators agree on: the topology and what only they need
// to know. It is immutable, as a Topology is. A nil *State is the state before
// the cluster was founded.
//
// Invariant 10: nextIncarnation only grows, and every incarnation in the topology
// is below it.
type State struct {
	Topology *Topology
	// History holds the newest changes, oldest first.
	History []Change
	// Operations are the one that has not ended, if any, and the newest that have,
	// oldest first.
	Operations []Operation
	// Provisions are those that have not ended and the newest that have, oldest first.
	Provisions []Provision
	// Health is what the leader last found, of the nodes it found something of.
	Health []FoundHealth
	// SettingsVersions are the newest settings, oldest first; the last are those in use.
	SettingsVersions []SettingsVersion
	// Conditions are what holds at present.
	Conditions []Condition
	// ScaledUpMillis and ScaledDownMillis are when the number of nodes was last decided to be
	// more, and fewer, in milliseconds since 1970.
	ScaledUpMillis, ScaledDownMillis int64
	// Losses are what people gave up for lost, oldest first.
	Losses          []Loss
	heldBack        []uint64
	lastChange      uint64
	nextProvision   uint64
	lastNodeNumber  uint64
	nextIncarnation uint64
	nextNamespace   uint32
	nextOperation   uint64
	boots           map[uint64]boot
}

// Result tells the proposer of a command what came of it.
type Result struct {
	Epoch uint64
	// Incarnation is set by a registration.
	Incarnation uint64
	// Namespace is set by the creation or update of one.
	Namespace *Namespace
	// Operation is set where one was started or steered.
	Operation *Operation
	// Provision is set where one was asked for or steered.
	Provision *Provision
}

// Apply returns the state after a command. A command that is refused changes
// nothing; the error is a *Refusal. One without a mutation raises the epoch, and so has
// everybody check the topology that it has. Apply is deterministic.
func (s *State) Apply(cmd *topologyv1.Command) (*State, Result, error) {
	if s == nil {
		return foundFrom(cmd)
	}
	if want := cmd.GetExpectEpoch(); want != 0 && want != s.Topology.Epoch {
		return s, Result{}, refuse(Conflict, "EPOCH_CHANGED",
			fmt.Sprintf("the topology is at epoch %s, the change was made for epoch %s", EpochString(s.Topology.Epoch), EpochString(want)),
			"epoch", s.Topology.Epoch, "expected_epoch", want)
	}
	next := s.draft()
	d := draft{State: next, changed: len(cmd.GetMutations()) == 0}
	for _, m := range cmd.GetMutations() {
		if err := d.mutate(m, int64(cmd.GetChange().GetAtMs())); err != nil {
			return s, Result{}, err
		}
	}
	if !d.changed {
		next.Topology.Epoch = s.Topology.Epoch
	}
	if d.settings {
		next.keepSettings(int64(cmd.GetChange().GetAtMs()), cmd.GetChange().GetWhat())
	}
	if d.changed || d.noted {
		next.note(cmd.GetChange())
	}
	next.Topology.index()
	if err := next.Topology.validate(); err != nil {
		return s, Result{}, refuse(Invalid, "INVALID_TOPOLOGY", err.Error())
	}
	d.result.Epoch = next.Topology.Epoch
	if d.result.Namespace != nil {
		d.result.Namespace = next.Topology.NamespaceByID(d.result.Namespace.ID)
	}
	return next, d.result, nil
}

// foundFrom applies the first command there is.
func foundFrom(cmd *topologyv1.Command) (*State, Result, error) {
	if len(cmd.GetMutations()) == 1 && cmd.GetMutations()[0].GetRecover() != nil {
		s, err := StateFromProto(cmd.GetMutations()[0].GetRecover().GetState())
		if err != nil {
			return nil, Result{}, refuse(Invalid, "INVALID_TOPOLOGY", err.Error())
		}
		return s, Result{Epoch: s.Topology.Epoch}, nil
	}
	if len(cmd.GetMutations()) != 1 || cmd.GetMutations()[0].GetFound() == nil {
		return nil, Result{}, refuse(Precondition, "NOT_FOUNDED", "the cluster has not been founded yet: its orchestrators have no majority so far")
	}
	f := cmd.GetMutations()[0].GetFound()
	s := &State{
		Topology: &Topology{
			ClusterID:     f.GetClusterId(),
			Epoch:         1,
			Vnodes:        f.GetVnodes(),
			FoundingNodes: int(f.GetFoundingNodes()),
			Settings:      settingsFromProto(f.GetSettings()),
		},
		nextIncarnation: 1,
		nextNamespace:   1,
		boots:           map[uint64]boot{},
	}
	s.Topology.Settings.Version = 1
	s.keepSettings(int64(cmd.GetChange().GetAtMs()), "as the cluster was founded")
	s.note(cmd.GetChange())
	s.Topology.index()
	if err := s.Topology.validate(); err != nil {
		return nil, Result{}, refuse(Invalid, "INVALID_TOPOLOGY", err.Error())
	}
	return s, Result{Epoch: 1}, nil
}

// draft returns a copy under the next epoch, deep enough to be changed.
func (s *State) draft() *State {
	t := *s.Topology
	t.holders = nil
	t.Epoch++
	t.Nodes = slices.Clone(t.Nodes)
	t.Ring = slices.Clone(t.Ring)
	t.Namespaces = slices.Clone(t.Namespaces)
	t.Orchestrators = slices.Clone(t.Orchestrators)
	next := *s
	next.Topology = &t
	next.History = slices.Clone(s.History)
	next.Operations = slices.Clone(s.Operations)
	for i := range next.Operations {
		next.Operations[i].Moves = slices.Clone(next.Operations[i].Moves)
	}
	next.Provisions = slices.Clone(s.Provisions)
	next.Health = slices.Clone(s.Health)
	next.SettingsVersions = slices.Clone(s.SettingsVersions)
	next.Conditions = slices.Clone(s.Conditions)
	next.Losses = slices.Clone(s.Losses)
	next.heldBack = slices.Clone(s.heldBack)
	next.boots = make(map[uint64]boot, len(s.boots)+1)
	for k, v := range s.boots {
		next.boots[k] = v
	}
	return &next
}

// SubjectMove is the subject of the many small changes that a change of the ring takes.
const SubjectMove = "move"

// How many changes are kept of moves, and of all others.
const (
	maxMoveChanges = 300
	maxChanges     = 1000
)

// note appends to the history and forgets the oldest of its like where there are too
// many: moves must not crowd out what led to them.
func (s *State) note(c *topologyv1.Change) {
	if c == nil {
		return
	}
	s.lastChange++
	s.History = append(s.History, Change{
		Number:   s.lastChange,
		Epoch:    s.Topology.Epoch,
		AtMillis: int64(c.GetAtMs()),
		Subject:  c.GetSubject(),
		Name:     c.GetName(),
		What:     c.GetWhat(),
	})
	moves, others := 0, 0
	for i := range s.History {
		if s.History[i].Subject == SubjectMove {
			moves++
		} else {
			others++
		}
	}
	if moves > maxMoveChanges || others > maxChanges {
		oldest := slices.IndexFunc(s.History, func(c Change) bool { return (c.Subject == SubjectMove) == (moves > maxMoveChanges) })
		s.History = slices.Delete(s.History, oldest, oldest+1)
	}
}

// draft is a state while a command is applied to it.
type draft struct {
	*State
	// changed is set when the topology differs from the one before, noted when only
	// what the orchestrators know does.
	changed, noted bool
	// settings is set when the settings do.
	settings bool
	result   Result
}

func (d *draft) mutate(m *topologyv1.Mutation, atMillis int64) error {
	switch m := m.GetKind().(type) {
	case *topologyv1.Mutation_Found, *topologyv1.Mutation_Recover:
		return refuse(Exists, "ALREADY_FOUNDED", "the cluster has been founded already")
	case *topologyv1.Mutation_Register:
		return d.register(m.Register)
	case *topologyv1.Mutation_SetRing:
		d.setRing(m.SetRing)
		return nil
	case *topologyv1.Mutation_CreateNamespace:
		return d.createNamespace(m.CreateNamespace)
	case *topologyv1.Mutation_UpdateNamespace:
		return d.updateNamespace(m.UpdateNamespace)
	case *topologyv1.Mutation_DropNamespace:
		return d.dropNamespace(m.DropNamespace)
	case *topologyv1.Mutation_SetOrchestrators:
		d.setOrchestrators(m.SetOrchestrators)
		return nil
	case *topologyv1.Mutation_SetVnodes:
		return d.setVnodes(m.SetVnodes)
	case *topologyv1.Mutation_SetCopies:
		return d.setCopies(m.SetCopies)
	case *topologyv1.Mutation_HoldBack:
		return d.holdBack(m.HoldBack)
	case *topologyv1.Mutation_RemoveNodes:
		return d.removeNodes(m.RemoveNodes)
	case *topologyv1.Mutation_StartOperation:
		return d.startOperation(m.StartOperation, atMillis)
	case *topologyv1.Mutation_SteerOperation:
		return d.steerOperation(m.SteerOperation, atMillis)
	case *topologyv1.Mutation_FindHealth:
		return d.findHealth(m.FindHealth, atMillis)
	case *topologyv1.Mutation_AskProvision:
		return d.askProvision(m.AskProvision, atMillis)
	case *topologyv1.Mutation_SteerProvision:
		return d.steerProvision(m.SteerProvision, atMillis)
	case *topologyv1.Mutation_NoteScaling:
		d.noteScaling(m.NoteScaling.GetUp(), atMillis)
		return nil
	case *topologyv1.Mutation_SetCondition:
		d.setCondition(m.SetCondition, atMillis)
		return nil
	case *topologyv1.Mutation_AcceptLoss:
		return d.acceptLoss(m.AcceptLoss, atMillis)
	case *topologyv1.Mutation_SetSettings:
		d.setSettings(m.SetSettings)
		return nil
	}
	return refuse(Invalid, "UNKNOWN_MUTATION", "the change is of a kind this software does not know: upgrade every orchestrator first")
}

// register makes a data directory a node, or notes a start of one.
func (d *draft) register(r *topologyv1.Register) error {
	n := nodeFromProto(r.GetNode())
	if err := CheckName("node", n.Name); err != nil {
		return refuse(Invalid, "BAD_NAME", err.Error(), "name", n.Name)
	}
	if err := CheckName("zone", n.Zone); err != nil {
		return refuse(Invalid, "BAD_NAME", err.Error(), "name", n.Zone)
	}
	i := slices.IndexFunc(d.Topology.Nodes, func(o Node) bool { return o.DataID == n.DataID })
	if i < 0 {
		return d.admit(n, r)
	}
	known := d.Topology.Nodes[i]
	if known.LostEpoch != 0 {
		return refuse(Precondition, "NODE_REMOVED",
			fmt.Sprintf("data directory #%d of node %s was given up for lost in epoch %s, and others hold its records now: start the node with an empty data directory to join again", known.Incarnation, known.Name, EpochString(known.LostEpoch)),
			"incarnation", known.Incarnation)
	}
	if n.Incarnation != 0 && n.Incarnation != known.Incarnation {
		return refuse(Precondition, "INCARNATION_MISMATCH",
			fmt.Sprintf("the data directory says it is #%d, the cluster knows it as #%d", n.Incarnation, known.Incarnation),
			"incarnation", known.Incarnation)
	}
	if n.Role != known.Role {
		return refuse(Precondition, "ROLE_CHANGED",
			fmt.Sprintf("node %s was registered with role %s and cannot become %s: use an empty data directory", known.Name, known.Role, n.Role),
			"role", known.Role)
	}
	b := d.boots[known.Incarnation]
	if r.GetBoot() < b.count || r.GetBoot() == b.count && r.GetBootId() != b.id {
		return refuse(Precondition, "BOOT_REGRESSION",
			fmt.Sprintf("start %d of node %s's data directory was registered before, by another run, and start %d was the last: this directory is an old copy, and serving it would undo acknowledged writes; start the node with an empty data directory", r.GetBoot(), known.Name, b.count),
			"boot", r.GetBoot(), "known_boot", b.count)
	}
	d.boots[known.Incarnation] = boot{r.GetBoot(), r.GetBootId()}
	n.Incarnation = known.Incarnation
	if n != known {
		d.Topology.Nodes[i] = n
		d.changed = true
	}
	d.result.Incarnation = n.Incarnation
	return nil
}

// admit gives a data directory its incarnation.
func (d *draft) admit(n Node, r *topologyv1.Register) error {
	if n.Incarnation != 0 {
		return refuse(Precondition, "NODE_REMOVED",
			fmt.Sprintf("data directory #%d is not part of this cluster any more: start the node with an empty data directory to join again", n.Incarnation),
			"incarnation", n.Incarnation)
	}
	if n.DataID == "" || n.Address == "" || n.Role != Data && n.Role != Reporting {
		return refuse(Invalid, "BAD_REGISTRATION", "a registration needs a data identity, an address and a role")
	}
	n.Incarnation = d.nextIncarnation
	d.nextIncarnation++
	if i := slices.IndexFunc(d.Topology.Nodes, func(o Node) bool { return o.Name == n.Name }); i >= 0 && mutant.On("duplicate-incarnation") {
		n.Incarnation = d.Topology.Nodes[i].Incarnation
		d.Topology.Nodes[i] = n
	} else {
		d.Topology.Nodes = append(d.Topology.Nodes, n)
	}
	d.boots[n.Incarnation] = boot{r.GetBoot(), r.GetBootId()}
	d.result.Incarnation = n.Incarnation
	d.changed = true
	return nil
}

// setRing replaces the slots of every vnode, keeping the epoch of those that stay.
func (d *draft) setRing(r *topologyv1.SetRing) {
	old := d.Topology.Ring
	d.Topology.Ring = make([]Vnode, 0, len(r.GetRing()))
	for i, pb := range r.GetRing() {
		v := vnodeFromProto(pb)
		v.ChangedEpoch = d.Topology.Epoch
		for j := range v.Slots {
			if s := &v.Slots[j]; s.Incoming != 0 && s.Since == 0 {
				s.Since = d.Topology.Epoch
			}
		}
		if i < len(old) {
			v.Copies = old[i].Copies
		}
		if i < len(old) && slices.Equal(old[i].Slots, v.Slots) {
			v = old[i]
		} else {
			d.changed = true
		}
		d.Topology.Ring = append(d.Topology.Ring, v)
	}
}

func (d *draft) createNamespace(c *topologyv1.CreateNamespace) error {
	ns, err := NamespaceFromProto(c.GetNamespace())
	if err != nil {
		return refuse(Invalid, "BAD_NAMESPACE", err.Error())
	}
	if slices.ContainsFunc(d.Topology.Namespaces, func(o Namespace) bool { return o.Name == ns.Name }) {
		return errNamespaceExists(ns.Name)
	}
	ns.ID = d.nextNamespace
	d.nextNamespace++
	ns.ChangedEpoch = d.Topology.Epoch
	d.Topology.Namespaces = append(d.Topology.Namespaces, ns)
	d.result.Namespace = &ns
	d.changed = true
	return nil
}

func (d *draft) updateNamespace(u *topologyv1.UpdateNamespace) error {
	ns, err := NamespaceFromProto(u.GetNamespace())
	if err != nil {
		return refuse(Invalid, "BAD_NAMESPACE", err.Error())
	}
	i, err := d.namespaceIndex(ns.ID)
	if err != nil {
		return err
	}
	old := d.Topology.Namespaces[i]
	d.result.Namespace = &old
	if err := checkNamespaceStep(&old, &ns); err != nil {
		return err
	}
	ns.ChangedEpoch = old.ChangedEpoch
	switch {
	case ns.AlsoN == 0:
		ns.Since = 0
	case old.AlsoN == 0:
		ns.Since = d.Topology.Epoch
	default:
		ns.Since = old.Since
	}
	if ns == old {
		return nil
	}
	ns.ChangedEpoch = d.Topology.Epoch
	d.Topology.Namespaces[i] = ns
	d.changed = true
	return nil
}

func (d *draft) dropNamespace(u *topologyv1.DropNamespace) error {
	i, err := d.namespaceIndex(u.GetId())
	if err != nil {
		return err
	}
	d.Topology.Namespaces = slices.Delete(d.Topology.Namespaces, i, i+1)
	d.dropCopies(u.GetId())
	d.changed = true
	return nil
}

func (d *draft) namespaceIndex(id uint32) (int, error) {
	i, ok := slices.BinarySearchFunc(d.Topology.Namespaces, id, func(n Namespace, id uint32) int { return cmp.Compare(n.ID, id) })
	if !ok {
		return 0, refuse(NotFound, "NAMESPACE_NOT_FOUND", fmt.Sprintf("there is no namespace with identifier %d", id))
	}
	return i, nil
}

func (d *draft) setOrchestrators(s *topologyv1.SetOrchestrators) {
	var next []Orchestrator
	for _, o := range s.GetOrchestrators() {
		next = append(next, orchestratorFromProto(o))
	}
	if !slices.Equal(next, d.Topology.Orchestrators) {
		d.Topology.Orchestrators = next
		d.changed = true
	}
}

// Proto converts a state to the content of a snapshot.
func (s *State) Proto() *topologyv1.ControlState {
	pb := &topologyv1.ControlState{
		Topology:        s.Topology.Proto(),
		NextIncarnation: s.nextIncarnation,
		NextNamespace:   s.nextNamespace,
		NextOperation:   s.nextOperation,
		LastChange:      s.lastChange,
		NextProvision:   s.nextProvision,
		LastNodeNumber:  s.lastNodeNumber,
		HeldBack:        s.heldBack,
		ScaledUpMs:      uint64(s.ScaledUpMillis),
		ScaledDownMs:    uint64(s.ScaledDownMillis),
	}
	for _, n := range s.Topology.Nodes {
		b := s.boots[n.Incarnation]
		pb.Boots = append(pb.Boots, &topologyv1.Boot{Incarnation: n.Incarnation, Count: b.count, BootId: b.id})
	}
	for _, c := range s.History {
		pb.History = append(pb.History, c.Proto())
	}
	for i := range s.Operations {
		pb.Operations = append(pb.Operations, s.Operations[i].Proto())
	}
	for _, h := range s.Health {
		pb.Health = append(pb.Health, h.Proto())
	}
	for _, p := range s.Provisions {
		pb.Provisions = append(pb.Provisions, p.Proto())
	}
	for _, v := range s.SettingsVersions {
		pb.SettingsVersions = append(pb.SettingsVersions, v.Proto())
	}
	for _, c := range s.Conditions {
		pb.Conditions = append(pb.Conditions, c.Proto())
	}
	for _, l := range s.Losses {
		pb.Losses = append(pb.Losses, l.Proto())
	}
	return pb
}

// Proto converts a change to its wire form.
func (c Change) Proto() *topologyv1.Change {
	return &topologyv1.Change{Number: c.Number, Epoch: c.Epoch, AtMs: uint64(c.AtMillis), Subject: c.Subject, Name: c.Name, What: c.What}
}

// StateFromProto checks and converts the content of a snapshot.
func StateFromProto(pb *topologyv1.ControlState) (*State, error) {
	t, err := FromProto(pb.GetTopology())
	if err != nil {
		return nil, err
	}
	s := &State{
		Topology:        t,
		nextIncarnation: pb.GetNextIncarnation(),
		nextNamespace:   pb.GetNextNamespace(),
		nextOperation:   pb.GetNextOperation(),
		lastChange:      pb.GetLastChange(),
		nextProvision:   pb.GetNextProvision(),
		lastNodeNumber:  pb.GetLastNodeNumber(),
		heldBack:        pb.GetHeldBack(),

		ScaledUpMillis: int64(pb.GetScaledUpMs()), ScaledDownMillis: int64(pb.GetScaledDownMs()),
		boots: map[uint64]boot{},
	}
	for _, n := range t.Nodes {
		if n.Incarnation >= s.nextIncarnation {
			return nil, fmt.Errorf("control state: incarnation #%d is not below the next one, #%d (invariant 10)", n.Incarnation, s.nextIncarnation)
		}
	}
	for _, b := range pb.GetBoots() {
		s.boots[b.GetIncarnation()] = boot{b.GetCount(), b.GetBootId()}
	}
	for _, c := range pb.GetHistory() {
		s.History = append(s.History, Change{Number: c.GetNumber(), Epoch: c.GetEpoch(), AtMillis: int64(c.GetAtMs()), Subject: c.GetSubject(), Name: c.GetName(), What: c.GetWhat()})
	}
	for _, o := range pb.GetOperations() {
		op, err := operationFromProto(o)
		if err != nil {
			return nil, fmt.Errorf("control state: %w", err)
		}
		s.Operations = append(s.Operations, op)
	}
	for _, h := range pb.GetHealth() {
		s.Health = append(s.Health, foundHealthFromProto(h))
	}
	for _, p := range pb.GetProvisions() {
		s.Provisions = append(s.Provisions, provisionFromProto(p))
	}
	for _, v := range pb.GetSettingsVersions() {
		s.SettingsVersions = append(s.SettingsVersions, SettingsVersionFromProto(v))
	}
	for _, l := range pb.GetLosses() {
		s.Losses = append(s.Losses, LossFromProto(l))
	}
	for _, c := range pb.GetConditions() {
		s.Conditions = append(s.Conditions, Condition{c.GetKind(), c.GetText(), int64(c.GetSinceMs())})
	}
	return s, nil
}
