package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// loops judges what the control loops do, by what was agreed on and by the calls that the
// provisioner got. It asks no loop what it thinks.
//
//   - What was agreed on is one log, wherever it is read, and nothing is added to it while
//     no majority of the orchestrators reach each other (invariant 12); no call is made then either.
//   - A call is of a provision that was agreed on, that has not ended, and of one orchestrator at a time (12).
//   - Nothing that could do harm begins while more than max(1, 30%) of the members are
//     unhealthy, as was agreed on before that; no operation takes out more nodes than
//     that, and there is one at a time.
//   - No policy goes outside min_capacity and max_capacity.
//   - A node is ended only once it has no slot any more, and has left (1).
//   - A node that answers probes is not given up, whatever gossip says of it.
//   - After faults end all of it comes to rest, within the rules.
type loops struct {
	r  *run
	h  *History
	mu struct {
		sync.Mutex
		changes    map[uint64]*topologyv1.Change // by number
		recent     []*topologyv1.Change          // too new for alone
		last       uint64
		unhealthy  map[uint64]bool // as was agreed on
		ops        map[uint64]*topologyv1.Operation
		provisions map[uint64]*topologyv1.Provision
		living     map[uint64]int // incarnations that may not be given up
		// headless are the times without a majority; the last may be under way.
		headless []headless
	}
}

// headless is a time without a majority of orchestrators.
type headless struct {
	from, to time.Time // to is when it was last seen to be so
	over     bool
}

// Slack of what is observed from outside.
const (
	// leaderGone is how long a leader may go on without a majority.
	leaderGone = 2 * time.Second
	// seenLate is how long what has changed may go unseen.
	seenLate = time.Second
	// callsEnd is how long a call of an old leader may go on, or be begun, beside those of the next.
	callsEnd = time.Second
	// sampleHeads is the time between two looks at who reaches whom.
	sampleHeads = 200 * time.Millisecond
)

func newLoops(r *run) *loops {
	l := &loops{r: r, h: r.history}
	l.mu.changes, l.mu.unhealthy = map[uint64]*topologyv1.Change{}, map[uint64]bool{}
	l.mu.ops, l.mu.provisions = map[uint64]*topologyv1.Operation{}, map[uint64]*topologyv1.Provision{}
	l.mu.living = map[uint64]int{}
	return l
}

// watch judges until ctx ends.
func (l *loops) watch(ctx context.Context) {
	var watching sync.WaitGroup
	for _, name := range l.r.orchestrators() {
		watching.Go(func() { l.stream(ctx, name) })
	}
	watching.Go(func() { l.sample(ctx) })
	rng := l.r.w.stream("control loops")
	for ctx.Err() == nil {
		l.follow(ctx, rng)
		time.Sleep(100 * time.Millisecond)
	}
	watching.Wait()
}

// stream sees every topology as an orchestrator gets it.
func (l *loops) stream(ctx context.Context, name string) {
	for ctx.Err() == nil {
		stream, err := topologyv1.NewTopologyServiceClient(l.r.conns[name]).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{})
		t := &topology.Topology{}
		for err == nil {
			var m *topologyv1.WatchTopologyResponse
			if m, err = stream.Recv(); err != nil {
				break
			}
			known := t.Epoch
			if t, err = topology.Updated(t, m); err == nil && t.Epoch != known {
				l.r.topologies.see(name, t.Proto())
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// sample notes when no majority of the orchestrators reach each other.
func (l *loops) sample(ctx context.Context) {
	for ctx.Err() == nil {
		time.Sleep(sampleHeads)
		has := l.majority()
		l.mu.Lock()
		n := len(l.mu.headless)
		lasts := n > 0 && !l.mu.headless[n-1].over
		switch {
		case has && lasts:
			l.mu.headless[n-1].over = true
		case lasts:
			l.mu.headless[n-1].to = time.Now()
		case !has:
			l.mu.headless = append(l.mu.headless, headless{from: time.Now(), to: time.Now()})
		}
		l.mu.Unlock()
	}
}

// majority reports whether so many orchestrators run and reach each other.
func (l *loops) majority() bool {
	names, w := l.r.orchestrators(), l.r.w
	ended := l.r.faults.down()
	for _, a := range names {
		reaches := 0
		for _, b := range names {
			if !ended[a] && !ended[b] && (a == b || w.Net.Reaches(w.Host(a), w.Host(b))) {
				reaches++
			}
		}
		if 2*reaches > len(names) {
			return true
		}
	}
	return false
}

// alone reports whether there was no majority at a time, nor for some time before and a
// little after. Of a time that is not as long ago it knows nothing yet.
// REQUIRES: l.mu is held.
func (l *loops) alone(at time.Time) bool {
	return slices.ContainsFunc(l.mu.headless, func(h headless) bool {
		return at.After(h.from.Add(leaderGone)) && at.Add(seenLate).Before(h.to)
	})
}

// alive has it judged that a node is not given up until what is returned is called.
func (l *loops) alive(incarnation uint64) (done func()) {
	add := func(n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.mu.living[incarnation] += n
	}
	add(1)
	return func() {
		time.Sleep(time.Second) // until what was begun by now has been seen
		add(-1)
	}
}

// registering reports whether a node was launched and has not registered.
func (l *loops) registering() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.mu.provisions {
		if topology.ProvisionState(p.GetState()) == topology.Launched {
			return true
		}
	}
	return false
}

// follow reads what was agreed on since, at any of the orchestrators, and judges it.
func (l *loops) follow(ctx context.Context, rng *rand.Rand) {
	names := l.r.orchestrators()
	control := l.r.controls[names[rng.IntN(len(names))]]
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	asked := time.Now()
	l.mu.Lock()
	after := l.mu.last
	l.mu.Unlock()
	changes, err := control.ListChanges(ctx, &adminv1.ListChangesRequest{After: max(after, 5) - 5})
	if err != nil {
		return
	}
	ops, err := control.ListOperations(ctx, &adminv1.ListOperationsRequest{})
	if err != nil {
		return
	}
	provisions, err := control.ListProvisions(ctx, &adminv1.ListProvisionsRequest{})
	if err != nil {
		return
	}
	calls := l.r.fleet.log()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range ops.GetOperations() {
		l.operation(o.GetOperation())
	}
	for _, p := range provisions.GetProvisions() {
		l.provision(p)
	}
	for _, c := range changes.GetChanges() {
		l.change(c)
	}
	for len(l.mu.recent) > 0 {
		c := l.mu.recent[0]
		at := time.UnixMilli(int64(c.GetAtMs()))
		if time.Since(at) < 2*seenLate {
			break
		}
		if l.alone(at) {
			l.h.violate(12, "without a majority of the orchestrators it was agreed on: %s", c.GetWhat())
		}
		l.mu.recent = l.mu.recent[1:]
	}
	for i := range calls {
		l.call(&calls[i], calls[:i], asked)
	}
}

// broke notes a broken rule of the control loops that is none of the design's invariants.
func (l *loops) broke(format string, args ...any) {
	l.h.violate(0, "control loops: "+format, args...)
}

// operation judges an operation that is seen for the first time.
// REQUIRES: l.mu is held.
func (l *loops) operation(op *topologyv1.Operation) {
	_, known := l.mu.ops[op.GetId()]
	l.mu.ops[op.GetId()] = op
	if known {
		return
	}
	l.r.count(l.r.report.Loops, "operation "+op.GetKind())
	for _, o := range l.mu.ops {
		if o.GetId() < op.GetId() && (o.GetEndedMs() == 0 || o.GetEndedMs() > op.GetStartedMs()) {
			l.broke("operation %d began while operation %d went on", op.GetId(), o.GetId())
		}
	}
	for _, inc := range op.GetRemove() {
		if l.mu.living[inc] > 0 {
			l.broke("operation %d (%s) gives up #%d, which answers probes", op.GetId(), op.GetTitle(), inc)
		}
	}
}

// provision judges a provision.
// REQUIRES: l.mu is held.
func (l *loops) provision(p *topologyv1.Provision) {
	_, known := l.mu.provisions[p.GetId()]
	l.mu.provisions[p.GetId()] = p
	if known {
		return
	}
	for _, o := range l.mu.provisions {
		if o == p || o.GetKind() != p.GetKind() {
			continue
		}
		if o.GetNode() == p.GetNode() && o.GetIncarnation() == p.GetIncarnation() || p.GetKind() == topologyv1.Provision_KIND_LAUNCH && o.GetNode() == p.GetNode() {
			l.broke("provisions %d and %d are both to %s %s", o.GetId(), p.GetId(), topology.ProvisionKind(p.GetKind()), p.GetNode())
		}
		ended := topology.ProvisionState(o.GetState()).Ended()
		if dead := p.GetReplaces(); dead != 0 && o.GetReplaces() == dead && o.GetId() < p.GetId() && (!ended || o.GetChangedMs() > p.GetAtMs()) {
			l.broke("provisions %d and %d are under way at once in the place of #%d", o.GetId(), p.GetId(), dead)
		}
	}
}

var (
	healthWords = regexp.MustCompile(`#(\d+), is (healthy|unhealthy)`)
	launchWords = regexp.MustCompile(`: (\d+) to be launched, for (\d+) nodes$`)
)

// change judges what was agreed on.
// REQUIRES: l.mu is held, and operations and provisions are known.
func (l *loops) change(c *topologyv1.Change) {
	if old := l.mu.changes[c.GetNumber()]; old != nil {
		if !proto.Equal(old, c) {
			l.h.violate(12, "change %d is %q, and was %q", c.GetNumber(), c.GetWhat(), old.GetWhat())
		}
		return
	}
	l.mu.changes[c.GetNumber()] = c
	l.mu.last = max(l.mu.last, c.GetNumber())
	at := time.UnixMilli(int64(c.GetAtMs()))
	if c.GetSubject() != topology.SubjectMove {
		l.h.Note("agreed at %s: %s %s: %s", at.Sub(l.h.began), c.GetSubject(), c.GetName(), c.GetWhat())
	}
	l.mu.recent = append(l.mu.recent, c)
	if c.GetSubject() == "health" {
		for _, m := range healthWords.FindAllStringSubmatch(c.GetWhat(), -1) {
			inc, _ := strconv.ParseUint(m[1], 10, 64)
			l.mu.unhealthy[inc] = m[2] == "unhealthy"
		}
		return
	}
	t := l.r.topologies.before(c.GetEpoch())
	if t == nil || !t.Formed() {
		return
	}
	var op *topologyv1.Operation // that it began
	for _, o := range l.mu.ops {
		if o.GetStartedMs() == c.GetAtMs() && strings.Contains(c.GetWhat(), o.GetTitle()) {
			op = o
		}
	}
	launches := launchWords.FindStringSubmatch(c.GetWhat())
	switch s := c.GetSubject(); {
	case op != nil && (s == "recovery" || s == "capacity" || s == "rebalance"):
		l.calm(t, c)
		l.limits(t, op)
	case s == "recovery" && strings.HasPrefix(c.GetWhat(), "a node is to be launched"):
		l.calm(t, c)
	case s == "capacity" && launches != nil:
		l.launched(t, c, launches[2])
	}
}

// calm checks that no more members are unhealthy than may be for something to begin.
func (l *loops) calm(t *topology.Topology, c *topologyv1.Change) {
	var bad []string
	members := t.Members()
	for _, n := range members {
		if l.mu.unhealthy[n.Incarnation] {
			bad = append(bad, n.Name)
		}
	}
	if len(bad) > mostSuspect(members) {
		l.broke("%v of %d members are unhealthy, and yet: %s", bad, len(members), c.GetWhat())
	}
}

// mostSuspect is how many members may be unhealthy, and how many may be taken out at once.
func mostSuspect(members []*topology.Node) int { return max(1, len(members)*3/10) }

// limits checks how many nodes an operation takes out, and how many stay.
func (l *loops) limits(t *topology.Topology, op *topologyv1.Operation) {
	if n := len(op.GetRemove()); n > mostSuspect(t.Members()) {
		l.broke("operation %d (%s) takes out %d of %d members", op.GetId(), op.GetTitle(), n, len(t.Members()))
	}
	if op.GetKind() != "shrink" {
		return
	}
	stay := 0
	for i := range t.Nodes {
		if n := &t.Nodes[i]; n.Role == topology.Data && t.Resolve(n.Name) == n && !slices.Contains(op.GetRemove(), n.Incarnation) {
			stay++
		}
	}
	if stay < loopsMin {
		l.broke("operation %d (%s) leaves %d nodes, min_capacity is %d", op.GetId(), op.GetTitle(), stay, loopsMin)
	}
}

// launched checks that a decision to launch nodes stays within max_capacity.
func (l *loops) launched(t *topology.Topology, c *topologyv1.Change, wanted string) {
	n := 0
	for i := range t.Nodes {
		if d := &t.Nodes[i]; d.Role == topology.Data && t.Resolve(d.Name) == d && !l.mu.unhealthy[d.Incarnation] {
			n++
		}
	}
	for _, p := range l.mu.provisions {
		under := p.GetAtMs() <= c.GetAtMs() && (!topology.ProvisionState(p.GetState()).Ended() || p.GetChangedMs() > c.GetAtMs())
		if p.GetKind() == topologyv1.Provision_KIND_LAUNCH && under {
			n++
		}
	}
	if want, err := strconv.Atoi(wanted); err != nil || want > loopsMax || n > loopsMax {
		l.broke("there come to be %d nodes, max_capacity is %d: %s", n, loopsMax, c.GetWhat())
	}
}

// call judges a call of the provisioner, given those before it, by what was asked after
// a time.
// REQUIRES: l.mu is held.
func (l *loops) call(c *call, before []call, asked time.Time) {
	if l.alone(c.began) {
		l.h.violate(12, "without a majority of the orchestrators: %s", c)
	}
	var p *topologyv1.Provision
	for _, o := range l.mu.provisions {
		if topology.ProvisionKind(o.GetKind()) == c.kind && o.GetNode() == c.node.Name && (c.kind == topology.Launch || o.GetIncarnation() == c.node.Incarnation) {
			p = o
		}
	}
	if p == nil {
		if c.began.Before(asked) {
			l.h.violate(12, "nobody agreed on the %s", c)
		}
		return
	}
	if ended := time.UnixMilli(int64(p.GetChangedMs())); topology.ProvisionState(p.GetState()).Ended() && c.began.After(ended.Add(callsEnd)) {
		l.h.violate(12, "the %s began %s after provision %d was %s", c, c.began.Sub(ended), p.GetId(), topology.ProvisionState(p.GetState()))
	}
	ends := 0
	for i := range before {
		b := &before[i]
		under := b.returned.IsZero() || b.returned.After(c.began.Add(callsEnd))
		if !under {
			continue
		}
		if b.kind == c.kind && b.node == c.node && b.by != c.by && (!b.returned.IsZero() || time.Since(c.began) > callsEnd) {
			l.h.violate(12, "the %s began while another went on: the %s", c, b)
		}
		if b.kind == topology.End && c.kind == topology.End {
			ends++
		}
	}
	if ends >= maxEnds {
		l.broke("%d nodes are being ended as the %s begins", ends, c)
	}
}

// maxEnds is how many calls to end nodes may be under way at once.
const maxEnds = 4

// ending judges a call to end a node, when it is made.
func (l *loops) ending(c *call) {
	if c.node.Incarnation == 0 {
		return // it never registered
	}
	for range 5 { // what the caller knew arrives
		if t := l.r.topologies.latest(); t.Node(c.node.Incarnation) == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t := l.r.topologies.latest()
	l.h.violate(1, "the %s, while epoch %d has it, with slots: %v", c, t.Epoch, t.Names(c.node.Incarnation))
}

// rest waits until the control loops have come to rest, and checks that they have within
// the rules.
func (l *loops) rest() bool {
	last := ""
	for waited := time.Duration(0); waited < settleFor; waited += time.Second {
		time.Sleep(time.Second)
		if last = l.unrest(); last == "" {
			l.r.fleet.setLoad(0) // it stays so
			return true
		}
		if len(l.h.Violations()) > 0 {
			return false
		}
	}
	l.broke("%s after the last fault: %s", settleFor, last)
	return false
}

// unrest says what is still under way or not as it should be, or "".
func (l *loops) unrest() string {
	ctx, cancel := context.WithTimeout(context.Background(), ringQuestion)
	defer cancel()
	control := l.r.control()
	if op, err := activeOperation(ctx, control); err != nil || op != nil {
		return fmt.Sprintf("operation %d (%s) is under way: %v", op.GetId(), op.GetTitle(), err)
	}
	provisions, err := control.ListProvisions(ctx, &adminv1.ListProvisionsRequest{})
	if err != nil {
		return err.Error()
	}
	for _, p := range provisions.GetProvisions() {
		if state := topology.ProvisionState(p.GetState()); !state.Ended() {
			return fmt.Sprintf("provision %d, the %s of %s, is %s: %s", p.GetId(), topology.ProvisionKind(p.GetKind()), p.GetNode(), state, p.GetProblem())
		}
	}
	s, err := clusterStatus(ctx, control)
	if err != nil {
		return err.Error()
	}
	for _, c := range s.GetConditions() {
		return c.GetKind() + ": " + c.GetText()
	}
	for _, n := range s.GetNodes() {
		if n.GetHealth().GetState() != topologyv1.NodeHealth_STATE_HEALTHY {
			return fmt.Sprintf("#%d is not healthy: %s", n.GetHealth().GetIncarnation(), n.GetHealth().GetReason())
		}
	}
	l.r.topologies.see("orch1", s.GetTopology())
	t := l.r.topologies.latest()
	if n := t.DataNodes(); n < loopsMin || n > loopsMax {
		return fmt.Sprintf("there are %d data nodes, and are to be %d to %d", n, loopsMin, loopsMax)
	}
	if why := l.r.fleet.enough(t.DataNodes()); why != "" {
		return why
	}
	for i := range t.Nodes {
		if !t.Names(t.Nodes[i].Incarnation) {
			return fmt.Sprintf("%s has no slot", t.Nodes[i].Name)
		}
	}
	if why := badZones(t); why != "" {
		return why
	}
	return l.r.fleet.differs(t)
}

// badZones says which vnode has replicas in fewer zones than its members allow, or "".
func badZones(t *topology.Topology) string {
	zones := map[string]bool{}
	for _, n := range t.Members() {
		zones[n.Zone] = true
	}
	for v := range t.Ring {
		for _, ns := range t.Namespaces {
			in := map[string]bool{}
			for _, s := range t.Ring[v].Slots[:ns.N] {
				in[t.Node(s.Node).Zone] = true
			}
			if len(in) < min(ns.N, len(zones)) {
				return fmt.Sprintf("the replicas of vnode %d in namespace %s lie in %d of %d zones", v, ns.Name, len(in), len(zones))
			}
		}
	}
	return ""
}

// differs says which processes there are that the topology lacks, or "".
func (fl *fleet) differs(t *topology.Topology) string {
	for _, m := range fl.machines {
		m.turn <- struct{}{}
		for _, p := range m.processes {
			if p.live != nil && !slices.ContainsFunc(t.Nodes, func(n topology.Node) bool { return hostOf(n.Address) == p.host }) {
				<-m.turn
				return fmt.Sprintf("%s runs, a process of %s that is none of the cluster", p.name, m.name)
			}
		}
		<-m.turn
	}
	return ""
}

func hostOf(address string) string {
	host, _, _ := net.SplitHostPort(address)
	return host
}
