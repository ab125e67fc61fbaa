package coordinator

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Get reads a value.
func (c *Coordinator) Get(ctx context.Context, r *kvv1.GetRequest) (_ *kvv1.GetResponse, err error) {
	ctx, end, aerr := c.begin(ctx, opGet, request{r.GetNamespace(), r.GetEpoch(), r.GetToken(), r.GetTrace()})
	if aerr != nil {
		return nil, aerr
	}
	defer func() { end(err) }()
	if err := checkKey(r.GetKey()); err != nil {
		return nil, err
	}
	t, ns, nerr := c.namespaceRetry(ctx, r.GetNamespace())
	if nerr != nil {
		return nil, nerr
	}
	c.hot.note(ns.ID, r.GetKey(), false)
	if r.GetReplica() != "" {
		return c.getOwnCopy(ctx, r, t, ns)
	}
	if err := c.cfg.Clock.MayJudge(); err != nil {
		return nil, err
	}
	spec, qerr := quorumOf("read_quorum", r.GetReadQuorum(), ns)
	if qerr != nil {
		return nil, qerr
	}
	tr := c.traces.begin(r.GetTrace(), time.Now())
	if tr != nil {
		tr.add(kvv1.TraceEvent_KIND_RECEIVED, "", "get of a key in vnode %d of namespace %s: R=%d of N=%d", t.VnodeOf(r.GetKey()), ns.Name, spec.Or(ns.R).Need(ns.N), ns.N)
	}
	res, rerr := c.read(ctx, r.GetNamespace(), readJob{
		key: r.GetKey(), quorum: spec, repair: repairMode(r.GetReadRepair(), ns), trace: tr,
		least: record.Version{Time: hlc.Timestamp(r.GetMinVersion().GetTimestamp()), Incarnation: r.GetMinVersion().GetIncarnation()},
	})
	if rerr != nil {
		tr.add(kvv1.TraceEvent_KIND_ANSWERED, "", "error: %s", rerr.Message)
		tr.finish()
		return nil, tr.mark(rerr)
	}
	resp := &kvv1.GetResponse{Receipt: res.receipt(c.cfg.Self)}
	resp.Receipt.TraceId = tr.identifier()
	if res.winner.IsLive(max(c.cfg.Clock.Now(), hlc.Timestamp(r.GetToken()).Millis())) {
		resp.Found = true
		resp.Value = res.winner.Payload
		resp.ExpiresAtMs = uint64(res.winner.ExpiresAt)
	}
	if tr != nil {
		tr.add(kvv1.TraceEvent_KIND_ANSWERED, "", "%s", res.describe(resp.Found))
		if !res.background {
			tr.finish()
		}
	}
	return resp, nil
}

// repairMode returns what a request does about stale replicas.
func repairMode(r kvv1.ReadRepair, ns *topology.Namespace) topology.ReadRepair {
	if r == kvv1.ReadRepair_READ_REPAIR_UNSPECIFIED {
		return ns.ReadRepair
	}
	return topology.ReadRepair(r)
}

// readJob says what to read and how.
type readJob struct {
	key []byte
	// quorum is unset for the namespace's; need is what it asks for in the present epoch.
	quorum quorum.Spec
	need   int
	repair topology.ReadRepair
	// least is the version that the answer must not be older than.
	least record.Version
	trace *trace
}

// result is what a read found.
type result struct {
	job       readJob
	topology  *topology.Topology
	namespace *topology.Namespace
	vnode     uint32
	slots     []quorum.Slot
	// readAt is this node's clock before any slot was asked.
	readAt  hlc.Timestamp
	replies []answer
	// winner is the greatest record found; its kind is 0 when none was.
	winner   record.Record
	raw      []byte // winner's encoding; nil until its payload is here
	repaired int
	// background is set when something still goes on that finishes the trace.
	background bool
}

// answer is one slot's record.
type answer struct {
	slot int
	node uint64
	rec  record.Record // kind 0: absent
	raw  []byte
	full bool
	err  error
}

// read runs a quorum read, following a changing topology.
func (c *Coordinator) read(ctx context.Context, namespace string, job readJob) (*result, *rpc.Error) {
	var res *result
	err := c.follow(ctx, func() (uint64, uint64, *rpc.Error) {
		t, ns, err := c.namespace(namespace)
		if err != nil {
			return 0, 0, err
		}
		v := t.VnodeOf(job.key)
		job.need = min(job.quorum.Or(ns.R).Need(ns.N), ns.N)
		res = &result{job: job, topology: t, namespace: ns, vnode: v, slots: t.Slots(v, ns.N), readAt: hlc.At(c.cfg.Clock.Now())}
		return c.readOnce(ctx, res)
	})
	if err == nil {
		err = c.see(res.winner.Version.Time)
	}
	return res, err
}

// readOnce asks replicas under one topology, and mends what it finds stale.
func (c *Coordinator) readOnce(ctx context.Context, res *result) (stale, by uint64, _ *rpc.Error) {
	order := c.readOrder(res.slots)
	ask := res.slotsToAsk()
	if len(order) < ask {
		c.metrics.notEnough.Inc()
		return 0, 0, notEnough(len(order), ask, res.slots, res.topology, c.cfg.Peers.Alive)
	}
	g := c.newGather(res, order)
	if epoch, by, err := g.run(ctx, ask); err != nil {
		return epoch, by, err
	}
	if mutant.On("least-version-ignored") {
		res.job.least = record.Version{}
	}
	if res.decide(); res.winner.Version.Compare(res.job.least) < 0 {
		// The client knows of a newer record: ask everybody.
		epoch, by := g.runAll(ctx)
		if res.decide(); res.winner.Version.Compare(res.job.least) < 0 {
			return epoch, by, rpc.Errorf(codes.Unavailable, rpc.ReasonReadFailed, "no replica that answered has version %s or a newer one", res.job.least)
		}
	}
	if err := g.fetch(ctx); err != nil {
		return 0, 0, err
	}
	if epoch, by, err := c.mend(ctx, res); err != nil {
		return epoch, by, err
	}
	if rest := order[min(g.asked, len(order)):]; len(rest) > 0 && res.job.repair != topology.RepairOff && c.chance(res.namespace.RepairChance) {
		c.compareRest(res, rest)
	}
	return 0, 0, nil
}

// see has the clock follow a version that a reader is about to see, so that what
// this node writes afterwards is newer.
func (c *Coordinator) see(ts hlc.Timestamp) *rpc.Error {
	if c.cfg.Clock.CheckAhead(ts) != nil {
		return nil // the replica that took it had another clock; nothing can be newer than it yet
	}
	if err := c.cfg.Clock.Join(ts); err != nil {
		return rpc.AsError(err)
	}
	return nil
}

// slotsToHold is how many slots must hold what a read returns, so that later reads
// do not go back: N−R+1, with the smallest R that those reads have, or will.
func (r *result) slotsToHold() int {
	if mutant.On("repair-only-stale") {
		return len(r.replies)
	}
	return r.slotsToHoldOf(r.namespace.N)
}

// slotsToHoldOf is slotsToHold where n slots are read.
func (r *result) slotsToHoldOf(n int) int {
	least := min(r.job.quorum.Or(r.namespace.R).Need(n), n)
	for _, spec := range []quorum.Spec{r.namespace.R, r.namespace.AlsoR.Or(r.namespace.R)} {
		if usual := min(spec.Need(n), n); usual > 1 {
			least = min(least, usual)
		}
	}
	return n - least + 1
}

// goals are the slots that must hold what is mended: while N changes, for reads of
// either number of slots.
func (r *result) goals() quorum.Goals {
	goals := quorum.Goals{{N: r.namespace.N, Need: r.slotsToHold()}}
	if n := r.namespace.AlsoN; n > 0 {
		goals[1] = quorum.Goal{N: n, Need: r.slotsToHoldOf(n)}
	}
	return goals
}

// slotsToAsk is how many slots must answer. Where reads promise never to go back
// (R+W>N and R>1, with blocking repair) slotsToHold of them must be known to hold
// what is returned, even if the first R agree; with majorities that is no more.
func (r *result) slotsToAsk() int {
	n, need := r.namespace.N, r.job.need
	if mutant.On("repair-only-stale") {
		return need
	}
	if r.job.repair == topology.RepairBlocking && need > 1 && quorum.StrengthOf(n, r.namespace.LeastWrites(), need) != quorum.Eventual {
		return max(need, r.slotsToHold())
	}
	return need
}

// readOrder returns the slots that can be read now, the preferred ones first: those
// that do not move, since a moving slot counts only with both its nodes; then this
// node; then those that answer fastest.
func (c *Coordinator) readOrder(slots []quorum.Slot) []int {
	order := make([]int, 0, len(slots))
	for i, s := range slots {
		if s.Read != 0 && c.cfg.Peers.Alive(s.Read) {
			order = append(order, i)
		}
	}
	rank := func(i int) (moving int, typical time.Duration) {
		s := slots[i]
		switch {
		case !s.Live(c.cfg.Peers.Alive):
			moving = 2
		case s.Write[1] != 0:
			moving = 1
		}
		if s.Read == c.cfg.Self {
			return moving, -1
		}
		return moving, c.latency.typical(s.Read)
	}
	slices.SortStableFunc(order, func(a, b int) int {
		am, at := rank(a)
		bm, bt := rank(b)
		return cmp.Or(cmp.Compare(am, bm), cmp.Compare(at, bt))
	})
	return order
}

// decide finds the winner among the replies.
func (r *result) decide() {
	r.winner, r.raw = record.Record{}, nil
	for _, a := range r.replies {
		if a.rec.Kind == 0 {
			continue
		}
		if r.winner.Kind == 0 || record.CompareHeaders(a.rec, r.winner) > 0 {
			r.winner, r.raw = a.rec, nil
		}
		if a.full && record.CompareHeaders(a.rec, r.winner) == 0 {
			r.winner, r.raw = a.rec, a.raw
		}
	}
}

// holders returns the nodes known to hold the winner; stale the nodes that answered
// with less.
func (r *result) holders() (holders, stale []uint64) {
	for _, a := range r.replies {
		if a.rec.Kind == r.winner.Kind && (r.winner.Kind == 0 || record.CompareHeaders(a.rec, r.winner) == 0) {
			holders = append(holders, a.node)
		} else {
			stale = append(stale, a.node)
		}
	}
	return holders, stale
}

func (r *result) describe(found bool) string {
	switch {
	case found:
		return "version " + r.winner.Version.String()
	case r.winner.Kind == 0:
		return "not found"
	case r.winner.Kind == record.Tombstone:
		return "not found: deleted by version " + r.winner.Version.String()
	}
	return "not found: version " + r.winner.Version.String() + " has expired"
}

// receipt says what the answer rests on.
func (r *result) receipt(self uint64) *kvv1.Receipt {
	ns := r.namespace
	return &kvv1.Receipt{
		Epoch: r.topology.Epoch, N: uint32(ns.N), Needed: uint32(r.job.need), Acknowledged: uint32(len(r.replies)),
		Strength: kvv1.Strength(quorum.StrengthOf(ns.N, ns.LeastWrites(), r.job.need)),
		Version:  versionProto(r.winner.Version), Vnode: r.vnode,
		Coordinator: r.topology.NodeName(self), Repaired: uint32(r.repaired),
	}
}

// gather collects the answers of slots.
type gather struct {
	c     *Coordinator
	res   *result
	order []int
	// asked is how many of order have been asked, pending how many of those owe an
	// answer.
	asked, pending int
	fullAsked      bool
	answers        chan answer
	began          time.Time
}

func (c *Coordinator) newGather(res *result, order []int) *gather {
	return &gather{c: c, res: res, order: order, answers: make(chan answer, len(order)), began: time.Now()}
}

// run asks until so many slots have answered.
func (g *gather) run(ctx context.Context, want int) (stale, by uint64, _ *rpc.Error) {
	var lastErr error
	g.c.latency.earn()
	var late lateness
	defer late.stop()
	for len(g.res.replies) < want {
		for len(g.res.replies)+g.pending < want && g.asked < len(g.order) {
			g.ask(ctx, g.fullAsked)
		}
		if len(g.res.replies)+g.pending < want {
			return 0, 0, readFailed(len(g.res.replies), want, len(g.res.slots), lastErr)
		}
		var a answer
		select {
		case a = <-g.answers: // this node's own is often here already
		default:
			late.start(g, want)
			select {
			case a = <-g.answers:
			case <-late.C:
				if slow := late.again(g); g.asked < len(g.order) && (slow || g.c.latency.spend()) {
					g.hedge(ctx)
				}
				continue
			case <-ctx.Done():
				return 0, 0, readFailed(len(g.res.replies), want, len(g.res.slots), ctx.Err())
			}
		}
		g.pending--
		if a.err != nil {
			lastErr = a.err
			if epoch := refusedEpoch(a.err); epoch > 0 {
				return epoch, a.node, readFailed(len(g.res.replies), want, len(g.res.slots), a.err)
			}
			g.fullAsked = g.fullAsked && !a.full
			continue
		}
		g.res.replies = append(g.res.replies, a)
	}
	return 0, 0, nil
}

// lateness tells when another replica is to be asked: once when an answer is late by what
// is known of those that were asked, which takes from the budget, and once after SlowRead.
// There is no timer before it is waited for.
type lateness struct {
	*time.Timer
	late, slow time.Duration // since the gather began; 0 once it is over
}

func (l *lateness) start(g *gather, want int) {
	if l.Timer == nil {
		l.late, l.slow = g.c.latency.late(g.next(want)), g.c.cfg.SlowRead
		l.Timer = time.NewTimer(min(l.late, l.slow) - time.Since(g.began))
	}
}

// again sets the timer for the other time, and reports whether this one was SlowRead's.
func (l *lateness) again(g *gather) (slow bool) {
	next := &l.late
	if slow = l.late == 0 || l.slow != 0 && l.slow <= l.late; slow {
		next = &l.slow
	}
	*next = 0
	if rest := l.late + l.slow; rest != 0 { // one of the two
		l.Reset(rest - time.Since(g.began))
	}
	return slow
}

func (l *lateness) stop() {
	if l.Timer != nil {
		l.Stop()
	}
}

// runAll asks all that have not been asked, and returns when everybody has answered
// or failed, or ctx ends; and the newest epoch by which one refused.
func (g *gather) runAll(ctx context.Context) (stale, by uint64) {
	for g.asked < len(g.order) {
		g.ask(ctx, g.fullAsked)
	}
	for ; g.pending > 0; g.pending-- {
		select {
		case a := <-g.answers:
			if epoch := refusedEpoch(a.err); epoch > stale {
				stale, by = epoch, a.node
			}
			if a.err == nil {
				g.res.replies = append(g.res.replies, a)
			}
		case <-ctx.Done():
			return stale, by
		}
	}
	return stale, by
}

// next returns the slowest of the nodes that are asked first.
func (g *gather) next(want int) uint64 {
	return g.res.slots[g.order[min(want, len(g.order))-1]].Read
}

// hedge asks one slot more than needed, for the whole record, since it may be the
// one that was asked for it that is late.
func (g *gather) hedge(ctx context.Context) {
	g.c.metrics.hedged.Inc()
	g.res.job.trace.add(kvv1.TraceEvent_KIND_HEDGE, g.name(g.res.slots[g.order[g.asked]].Read), "another replica is late")
	g.ask(ctx, false)
}

func (g *gather) name(node uint64) string { return g.res.topology.NodeName(node) }

// ask asks the next slot.
func (g *gather) ask(ctx context.Context, headerOnly bool) {
	slot := g.order[g.asked]
	g.asked++
	g.pending++
	g.fullAsked = g.fullAsked || !headerOnly
	node := g.res.slots[slot].Read
	g.send(ctx, node, headerOnly, func(rec record.Record, raw []byte, err error) {
		g.answers <- answer{slot: slot, node: node, rec: rec, raw: raw, full: !headerOnly, err: err}
	})
}

// send sends one read. done is called once and must not block.
func (g *gather) send(ctx context.Context, node uint64, headerOnly bool, done func(record.Record, []byte, error)) {
	if tr := g.res.job.trace; tr != nil {
		what := "record"
		if headerOnly {
			what = "header"
		}
		tr.add(kvv1.TraceEvent_KIND_SENT, g.name(node), "asks for its %s", what)
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(g.c.cfg.RequestTimeout)
	}
	call := &replicav1.Call{Epoch: g.res.topology.Epoch, Operation: &replicav1.Call_Read{Read: &replicav1.Read{
		Namespace: g.res.namespace.ID, Vnode: g.res.vnode, Key: g.res.job.key, HeaderOnly: headerOnly,
	}}}
	start := time.Now()
	finish := func(reply *replicav1.Reply, err error) {
		var rec record.Record
		raw := reply.GetRead().GetRecord()
		if err == nil && reply.GetRead().GetFound() {
			rec, err = record.Decode(raw)
		}
		if err == nil {
			g.c.latency.observe(node, time.Since(start))
		}
		if tr := g.res.job.trace; tr != nil && err == nil {
			tr.add(kvv1.TraceEvent_KIND_REPLIED, g.name(node), "%s", describe(rec))
		} else if tr != nil {
			tr.add(kvv1.TraceEvent_KIND_FAILED, g.name(node), "%s", err)
		}
		done(rec, raw, err)
	}
	if err := g.c.cfg.Peers.Go(node, call, deadline, finish); err != nil {
		finish(nil, err)
	}
}

func describe(rec record.Record) string {
	if rec.Kind == 0 {
		return "no record"
	}
	return rec.Kind.String() + " " + rec.Version.String()
}

func readFailed(got, want, n int, cause error) *rpc.Error {
	e := rpc.Errorf(codes.Unavailable, rpc.ReasonReadFailed, "%d of %d needed replicas answered", got, want)
	if cause != nil {
		e.Message += ": " + rpc.AsError(cause).Message
	}
	return e.With("answered", got).With("needed", want).With("n", n)
}

// fetch gets the winner's payload where only its header is known.
func (g *gather) fetch(ctx context.Context) *rpc.Error {
	res := g.res
	if res.winner.Kind == 0 || res.raw != nil {
		return nil
	}
	if res.winner.Kind == record.Tombstone {
		res.raw = record.Encode(res.winner)
		return nil
	}
	holders, _ := res.holders()
	var lastErr error
	for _, node := range holders {
		got := make(chan answer, 1)
		g.send(ctx, node, false, func(rec record.Record, raw []byte, err error) { got <- answer{rec: rec, raw: raw, err: err} })
		select {
		case a := <-got:
			// The replica may have a newer record by now; any that is not older will do.
			if a.err == nil && a.rec.Kind != 0 && record.CompareHeaders(a.rec, res.winner) >= 0 {
				res.supersede(node, a)
				return nil
			}
			lastErr = a.err
		case <-ctx.Done():
			return rpc.AsError(ctx.Err())
		}
	}
	return readFailed(0, 1, len(res.slots), lastErr)
}

// supersede makes what a holder returned the winner.
func (r *result) supersede(node uint64, a answer) {
	for i := range r.replies {
		if r.replies[i].node == node {
			r.replies[i].rec, r.replies[i].raw, r.replies[i].full = a.rec, a.raw, true
		}
	}
	r.winner, r.raw = a.rec, a.raw
}

// getOwnCopy reads one node's own copy, without quorum or repair.
func (c *Coordinator) getOwnCopy(ctx context.Context, r *kvv1.GetRequest, t *topology.Topology, ns *topology.Namespace) (*kvv1.GetResponse, error) {
	node := t.Resolve(r.GetReplica())
	if node == nil {
		return nil, rpc.Errorf(codes.NotFound, "NODE_NOT_FOUND", "there is no node %q", r.GetReplica()).With("node", r.GetReplica())
	}
	v := t.VnodeOf(r.GetKey())
	if !t.Owns(node.Incarnation, v, ns.Wide()) {
		return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotOwner, "node %s holds no replica of the key: it is in vnode %d", node.Name, v).
			With("node", node.Name).With("vnode", v)
	}
	res := &result{job: readJob{key: r.GetKey(), need: 1}, topology: t, namespace: ns, vnode: v, slots: t.Slots(v, ns.N)}
	g := c.newGather(res, nil)
	got := make(chan answer, 1)
	g.send(ctx, node.Incarnation, false, func(rec record.Record, raw []byte, err error) { got <- answer{rec: rec, raw: raw, err: err} })
	select {
	case a := <-got:
		if a.err != nil {
			return nil, rpc.AsError(a.err)
		}
		resp := &kvv1.GetResponse{Receipt: &kvv1.Receipt{
			Epoch: t.Epoch, N: uint32(ns.N), Needed: 1, Acknowledged: 1, Strength: kvv1.Strength_STRENGTH_EVENTUAL,
			Version: versionProto(a.rec.Version), Vnode: v, Coordinator: t.NodeName(c.cfg.Self),
		}}
		if a.rec.IsLive(c.cfg.Clock.Now()) {
			resp.Found, resp.Value, resp.ExpiresAtMs = true, a.rec.Payload, uint64(a.rec.ExpiresAt)
		}
		return resp, nil
	case <-ctx.Done():
		return nil, rpc.AsError(ctx.Err())
	}
}
