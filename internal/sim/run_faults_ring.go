package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// spares is how many nodes beyond the founding ones a run with ring changes has.
const spares = 2

// nodes is how many nodes a run has.
func (r *run) nodes() int {
	if r.fleet == nil && (r.cfg.Faults == nil || slices.Contains(r.cfg.Faults, ringChanges)) {
		return r.report.Nodes + spares
	}
	return r.report.Nodes
}

// ringChanges is the name of the track that changes the ring.
const ringChanges = "ring-changes"

// addSpares starts the nodes beyond the founding ones, in order of incarnation.
func (r *run) addSpares() {
	if r.fleet != nil {
		r.fleet.addMachines(r.report.Nodes)
	}
	for i := r.report.Nodes; i < r.nodes(); i++ {
		name := fmt.Sprint("node", i+1)
		r.w.AddNode(name, "z1")
		r.w.Start(name)
	}
}

// ringQuestion is how long a track waits for the control plane.
const ringQuestion = 3 * time.Second

// changeRing begins an operation that changes the ring, or steers the one that is under
// way.
func (f *faults) changeRing(rng *rand.Rand) {
	names := f.names()
	by := f.r.controls[names[rng.IntN(len(names))]]
	ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
	defer cancel()
	if op, err := activeOperation(ctx, by); err != nil {
		return
	} else if op != nil {
		f.steer(ctx, rng, by, op)
		return
	}
	s, err := clusterStatus(ctx, by)
	if err != nil || s.GetTopology() == nil {
		return
	}
	t, err := topology.FromProto(s.GetTopology())
	if err != nil || !t.Formed() {
		return
	}
	healthy := map[uint64]bool{}
	for _, n := range s.GetNodes() {
		healthy[n.GetHealth().GetIncarnation()] = n.GetHealth().GetState() == topologyv1.NodeHealth_STATE_HEALTHY
	}
	if name := changingN(f.r.cfg.Seed); name != "" && rng.IntN(3) == 0 {
		f.changeN(ctx, rng, by, t, t.Namespace(name))
		return
	}
	if name := changingQuorums(f.r.cfg.Seed); name != "" && rng.IntN(2) == 0 {
		f.changeQuorums(ctx, rng, by, t.Namespace(name))
		return
	}
	op := f.planRing(rng, t, healthy)
	if op == nil {
		return
	}
	if op.GetKind() == "decommission" {
		f.decommission(rng, by, t, op)
		return
	}
	if f.begin(ctx, by, t, op) && rng.IntN(3) == 0 {
		m := op.GetMoves()[rng.IntN(len(op.GetMoves()))]
		f.cutNewcomer(rng, t.NodeName(m.GetTo()), t.NodeName(m.GetFrom()))
	}
}

// cutNewcomer cuts a node that is being filled off from all nodes but the one that it
// is filled from, for as long as a move or two take: half of what is written to its
// slots does not reach it, and it is read soon after.
func (f *faults) cutNewcomer(rng *rand.Rand, name, old string) {
	if !f.claimNode(name) {
		return
	}
	defer f.release(name)
	f.note("newcomer cut off", "%s, from all but %s", name, old)
	w := f.r.w
	each := func(do func(from, to string)) {
		for _, o := range f.names()[:f.r.nodes()] {
			if o != name && o != old {
				do(w.Host(o), w.Host(name))
				do(w.Host(name), w.Host(o))
			}
		}
	}
	each(w.Net.Cut)
	pause(rng, 4)
	each(w.Net.Heal)
	f.r.history.Note("%s is connected again", name)
}

func activeOperation(ctx context.Context, by adminv1.ControlServiceClient) (*topologyv1.Operation, error) {
	resp, err := by.ListOperations(ctx, &adminv1.ListOperationsRequest{})
	for _, o := range resp.GetOperations() {
		if !topology.OperationState(o.GetOperation().GetState()).Ended() {
			return o.GetOperation(), nil
		}
	}
	return nil, err
}

// begin starts an operation. Whoever gets slots by it may have had them before, and has
// been wiped since; so has whoever was taken for dead, and gets them back by an abort. It
// returns false if the operation has not begun; if that is not known, true.
func (f *faults) begin(ctx context.Context, by adminv1.ControlServiceClient, t *topology.Topology, op *topologyv1.Operation) bool {
	for _, m := range op.GetMoves() {
		f.r.checker.Moves(m.GetTo(), m.GetVnode())
		f.r.checker.Moves(m.GetFrom(), m.GetVnode())
	}
	resp, err := by.StartOperation(ctx, &adminv1.StartOperationRequest{Epoch: t.Epoch, Operation: op})
	if err != nil {
		f.r.history.Note("operation refused: %s: %v", op.GetTitle(), err)
		code := rpc.AsError(err).Code
		return code == codes.Unavailable || code == codes.DeadlineExceeded
	}
	f.note("operation "+op.GetKind(), "%d, %s, %d moves", resp.GetOperation().GetId(), op.GetTitle(), len(op.GetMoves()))
	return true
}

// changingN returns the namespace whose N changes in the run of a seed, or "".
func changingN(seed uint64) string {
	if seed%4 == 3 {
		return "default"
	}
	return ""
}

// changeN begins to give the keys of a namespace another number of replicas.
func (f *faults) changeN(ctx context.Context, rng *rand.Rand, by adminv1.ControlServiceClient, t *topology.Topology, ns *topology.Namespace) {
	n := uint32(3 + rng.IntN(3))
	if int(n) == ns.N {
		return
	}
	for i := range t.Nodes { // any of them may get the new slots
		for v := range t.Vnodes {
			f.r.checker.Moves(t.Nodes[i].Incarnation, v)
		}
	}
	resp, err := by.UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: ns.Name, Settings: &adminv1.NamespaceSettings{N: &n}})
	if err != nil {
		f.r.history.Note("operation refused: N of %s from %d to %d: %v", ns.Name, ns.N, n, err)
		return
	}
	f.note("operation replicas", "%d, N of %s from %d to %d", resp.GetOperation().GetId(), ns.Name, ns.N, n)
}

// changingQuorums returns the namespace whose default quorums change in the run of a
// seed, or "".
func changingQuorums(seed uint64) string {
	if seed%4 == 1 {
		return "default"
	}
	return ""
}

// changeQuorums begins to give a namespace other default quorums. With each of them reads
// meet writes.
func (f *faults) changeQuorums(ctx context.Context, rng *rand.Rand, by adminv1.ControlServiceClient, ns *topology.Namespace) {
	q := [][2]string{{"quorum", "quorum"}, {"all", "one"}, {"one", "all"}}[rng.IntN(3)]
	if q[0] == ns.W.String() {
		return
	}
	resp, err := by.UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: ns.Name, Settings: &adminv1.NamespaceSettings{WriteQuorum: &q[0], ReadQuorum: &q[1]}})
	if err != nil {
		f.r.history.Note("operation refused: quorums of %s to W=%s R=%s: %v", ns.Name, q[0], q[1], err)
		return
	}
	f.note("operation quorums", "%d, of %s from W=%s R=%s to W=%s R=%s", resp.GetOperation().GetId(), ns.Name, ns.W, ns.R, q[0], q[1])
}

// steer pauses, resumes or aborts an operation, or leaves it alone.
func (f *faults) steer(ctx context.Context, rng *rand.Rand, by adminv1.ControlServiceClient, op *topologyv1.Operation) {
	next := topology.OperationState(0)
	switch state := topology.OperationState(op.GetState()); {
	case state == topology.Paused && rng.IntN(2) == 0:
		next = topology.Running
	case state == topology.Running && rng.IntN(4) == 0:
		next = topology.Paused
	case state != topology.Aborting && rng.IntN(3) == 0:
		next = topology.Aborting
	default:
		return
	}
	_, err := by.SteerOperation(ctx, &adminv1.SteerOperationRequest{Id: op.GetId(), State: topologyv1.Operation_State(next)})
	f.note("operation "+next.String(), "%d: %v", op.GetId(), err)
}

// planRing plans a change at random: nodes come, go, or take each other's place.
func (f *faults) planRing(rng *rand.Rand, t *topology.Topology, healthy map[uint64]bool) *topologyv1.Operation {
	slots := t.SlotCounts(t.Width())
	var members, idle []uint64
	for i := range t.Nodes {
		switch inc := t.Nodes[i].Incarnation; {
		case slots[inc] > 0:
			members = append(members, inc)
		case healthy[inc] && t.Resolve(t.Nodes[i].Name) == &t.Nodes[i]:
			idle = append(idle, inc)
		}
	}
	if len(idle) > 0 && rng.IntN(4) == 0 {
		return replacement(t, members[rng.IntN(len(members))], idle[rng.IntN(len(idle))])
	}
	rng.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
	rng.Shuffle(len(idle), func(i, j int) { idle[i], idle[j] = idle[j], idle[i] })
	op := &topologyv1.Operation{Kind: "apply"}
	coming := rng.IntN(len(idle) + 1)
	next := append(slices.Clone(members), idle[:coming]...)
	leaving := 0
	if most := len(next) - t.Width(); most > 0 {
		leaving = rng.IntN(min(most, len(members)-1) + 1)
	}
	gone := members[:leaving]
	next = next[leaving:]
	switch {
	case leaving > 0 && rng.IntN(2) == 0:
		op.Kind, op.Remove = "decommission", gone[:1]
	case leaving > 0:
		op.Kind = "drain"
	}
	var places []placement.Node
	for _, inc := range next {
		places = append(places, placement.Node{ID: inc, Zone: t.Node(inc).Zone})
	}
	var current placement.Assignment
	for _, v := range t.Ring {
		var row []uint64
		for _, s := range v.Slots {
			row = append(row, s.Node)
		}
		current = append(current, row)
	}
	var uses []int
	for i := range t.Namespaces {
		uses = append(uses, t.Namespaces[i].N)
	}
	place := placement.Even
	if rng.IntN(4) == 0 {
		place = placement.Split
	}
	after, err := place(current, places, uses)
	if err != nil {
		return nil
	}
	for v := range after {
		for s, n := range after[v] {
			if from := current[v][s]; n != from {
				op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(s), From: from, To: n})
			}
		}
	}
	if len(op.Moves) == 0 {
		return nil
	}
	op.Title = fmt.Sprintf("%d come, %v go", coming, gone)
	return op
}

// replacement gives all slots of a node to another one. The old one stays.
func replacement(t *topology.Topology, old, next uint64) *topologyv1.Operation {
	op := &topologyv1.Operation{Kind: "replace", Title: fmt.Sprintf("#%d for #%d", next, old)}
	for v := range t.Ring {
		for s, slot := range t.Ring[v].Slots {
			if slot.Node == old && slot.Phase == topology.Stable {
				op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(s), From: old, To: next})
			}
		}
	}
	if len(op.Moves) == 0 {
		return nil
	}
	return op
}

// decommission begins an operation after which a node leaves, and waits until it has.
// Its data directory is turned away then, and one that is empty joins.
func (f *faults) decommission(rng *rand.Rand, by adminv1.ControlServiceClient, t *topology.Topology, op *topologyv1.Operation) {
	inc := op.GetRemove()[0]
	name := t.NodeName(inc)
	if !f.claimNode(name) {
		return
	}
	defer f.release(name)
	ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
	defer cancel()
	if !f.begin(ctx, by, t, op) {
		return
	}
	gone := uint64(0) // an epoch without it
	for gone == 0 {
		time.Sleep(time.Second)
		if time.Now().After(f.until) {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
		active, err := activeOperation(ctx, by)
		if err == nil && active != nil && rng.IntN(20) == 0 {
			f.steer(ctx, rng, by, active)
		}
		if err == nil && active == nil {
			s, serr := clusterStatus(ctx, by)
			if serr == nil && s.GetControlPlaneAvailable() {
				f.r.topologies.see("the control plane", s.GetTopology())
				if slices.ContainsFunc(s.GetTopology().GetNodes(), func(n *topologyv1.Node) bool { return n.GetIncarnation() == inc }) {
					cancel()
					return // it was aborted
				}
				gone = s.GetTopology().GetEpoch()
			}
		}
		cancel()
	}
	f.note("node has left", "%s, #%d", name, inc)
	f.end(name, Crash(rng.IntN(2)))
	pause(rng, 3)
	if rng.IntN(2) == 0 {
		if err := f.r.w.TryStart(name); err == nil {
			if f.servesIn(name, inc, gone) {
				f.r.history.violate(7, "%s serves as incarnation %d, which has left, in epoch %d or later", name, inc, gone)
			}
			f.r.w.Crash(name, Kill)
		} else {
			f.r.history.Note("%s is turned away: %v", name, err)
		}
	}
	f.r.w.Wipe(name)
	f.start(name)
}

// hitMove ends the leader, or a node that is something to a move, in one of its phases.
func (f *faults) hitMove(rng *rand.Rand) {
	phase := []topology.Phase{topology.WriteBothReadOld, topology.WriteBothReadNew, topology.WriteNewReadNone}[rng.IntN(3)]
	what := []string{HitLeader, HitOld, HitNewcomer, HitOther}[rng.IntN(4)]
	how := Crash(rng.IntN(2))
	for range 200 {
		time.Sleep(100 * time.Millisecond)
		if time.Now().After(f.until) {
			return
		}
		name := f.r.inPhase(rng, phase, what)
		switch {
		case name == "" || f.ended(name):
			continue
		case what == HitLeader && f.claimOrchestrators(name):
			defer f.releaseOrchestrators(name)
		case what != HitLeader && f.claimNode(name):
			defer f.release(name)
		default:
			continue
		}
		f.note("move hit", "%s, %s: %s", name, what, phase)
		f.end(name, how)
		pause(rng, 8)
		f.start(name)
		return
	}
}

// inPhase returns a process that is something to a move in a phase, or "".
func (r *run) inPhase(rng *rand.Rand, phase topology.Phase, what string) string {
	t := r.present()
	if t == nil {
		return ""
	}
	for _, i := range rng.Perm(len(t.Ring)) {
		slots, j := t.Ring[i].Slots, t.Ring[i].Moving()
		if j < 0 || slots[j].Phase != phase {
			continue
		}
		switch what {
		case HitOld:
			return t.NodeName(slots[j].Node)
		case HitNewcomer:
			return t.NodeName(slots[j].Incoming)
		case HitOther:
			return t.NodeName(slots[(j+1+rng.IntN(len(slots)-1))%len(slots)].Node)
		}
		for i := range r.report.Orchestrators {
			if name := fmt.Sprint("orch", i+1); r.leads(name) {
				return name
			}
		}
	}
	return ""
}

// claimNode claims a node for one fault.
func (f *faults) claimNode(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.busy[name] || f.mu.down >= (f.r.report.Nodes-1)/2 {
		return false
	}
	f.mu.busy[name] = true
	f.mu.down++
	return true
}

// finishOperation waits until no operation is under way; one that is paused goes on.
func (r *run) finishOperation() bool {
	last := "nobody answers"
	for waited := time.Duration(0); waited < settleFor; waited += time.Second {
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
		op, err := activeOperation(ctx, r.control())
		switch {
		case err != nil:
			last = err.Error()
		case op == nil:
			cancel()
			return true
		default:
			last = fmt.Sprintf("operation %d is %s", op.GetId(), topology.OperationState(op.GetState()))
			if resp, err := r.control().ListOperations(ctx, &adminv1.ListOperationsRequest{Id: op.GetId()}); err == nil {
				for _, p := range resp.GetOperations()[0].GetMoving() {
					last += fmt.Sprintf("; vnode %d to #%d: %s", p.GetMove().GetVnode(), p.GetMove().GetTo(), p.GetWaitsFor())
				}
			}
			if topology.OperationState(op.GetState()) == topology.Paused {
				_, _ = r.control().SteerOperation(ctx, &adminv1.SteerOperationRequest{Id: op.GetId(), State: topologyv1.Operation_STATE_RUNNING})
			}
		}
		cancel()
	}
	r.history.violate(4, "%s after the last fault the ring still changes: %s", settleFor, last)
	return false
}
