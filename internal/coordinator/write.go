package coordinator

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Put stores a value.
func (c *Coordinator) Put(ctx context.Context, r *kvv1.PutRequest) (*kvv1.PutResponse, error) {
	receipt, err := c.writeOne(ctx, request{r.GetNamespace(), r.GetEpoch(), r.GetToken(), r.GetTrace()}, r.GetWriteQuorum(),
		&kvv1.BatchOperation{Key: r.GetKey(), Value: r.GetValue(), TtlMs: r.GetTtlMs()})
	if err != nil {
		return nil, err
	}
	return &kvv1.PutResponse{Receipt: receipt}, nil
}

// Delete stores a tombstone.
func (c *Coordinator) Delete(ctx context.Context, r *kvv1.DeleteRequest) (*kvv1.DeleteResponse, error) {
	receipt, err := c.writeOne(ctx, request{r.GetNamespace(), r.GetEpoch(), r.GetToken(), r.GetTrace()}, r.GetWriteQuorum(),
		&kvv1.BatchOperation{Key: r.GetKey(), Delete: true})
	if err != nil {
		return nil, err
	}
	return &kvv1.DeleteResponse{Receipt: receipt}, nil
}

// writeOne writes one key.
func (c *Coordinator) writeOne(ctx context.Context, r request, w string, op *kvv1.BatchOperation) (_ *kvv1.Receipt, err error) {
	ctx, end, aerr := c.begin(ctx, opPut, r)
	if aerr != nil {
		return nil, aerr
	}
	defer func() { end(err) }()
	t, ns, nerr := c.namespaceRetry(ctx, r.namespace)
	if nerr != nil {
		return nil, nerr
	}
	if err := checkOperation(op, t); err != nil {
		return nil, err
	}
	c.hot.note(ns.ID, op.GetKey(), true)
	spec, qerr := quorumOf("write_quorum", w, ns)
	if qerr != nil {
		return nil, qerr
	}
	var entry *replicav1.Entry
	var version record.Version
	renew := func() (err *rpc.Error) {
		entry, version, err = c.entry(op, ns)
		return err
	}
	if err := renew(); err != nil {
		return nil, err
	}
	tr := c.traces.begin(r.trace, time.Now())
	if tr != nil {
		tr.add(kvv1.TraceEvent_KIND_RECEIVED, "", "%s of a key in vnode %d of namespace %s: W=%d of N=%d", verb(op), t.VnodeOf(op.GetKey()), ns.Name, ns.Writes(spec)[0].Need, ns.N)
	}
	var tries attempts
	werr := tries.follow(ctx, c, renew, func() (*write, *rpc.Error) {
		t, ns, err := c.namespace(r.namespace)
		if err != nil {
			return nil, err
		}
		return c.start(writeJob{
			topology: t, namespace: ns, vnode: t.VnodeOf(op.GetKey()), goals: ns.Writes(spec), trace: tr,
			entries: []*replicav1.Entry{entry}, source: replicav1.Source_SOURCE_FIRST_HAND, hints: ns.Hints,
		})
	})
	if werr != nil {
		if werr.Reason == rpc.ReasonOutcomeUnknown {
			c.metrics.unknown.Inc()
		}
		tr.add(kvv1.TraceEvent_KIND_ANSWERED, "", "error: %s", werr.Message)
		if len(tries) == 0 {
			tr.finish()
		}
		return nil, tr.mark(werr)
	}
	receipt := tries[len(tries)-1].receipt(version)
	receipt.Coordinator = t.NodeName(c.cfg.Self)
	receipt.TraceId = tr.identifier()
	if tr != nil {
		tr.add(kvv1.TraceEvent_KIND_ANSWERED, "", "version %s, %d of %d slots have it", version, receipt.GetAcknowledged(), receipt.GetN())
	}
	return receipt, nil
}

// attempts are the writes of one request: one, and one more for every newer topology
// that replicas told of and for every version that one of them does not take any more.
type attempts []*write

// maxPromiseRetries bounds how often one request gets a new version.
const maxPromiseRetries = 3

// follow starts one attempt after the other and waits for it. renew gives what is
// written a new version. A version that was refused is never acknowledged: what some
// replicas have taken of it counts for nothing.
func (a *attempts) follow(ctx context.Context, c *Coordinator, renew func() *rpc.Error, start func() (*write, *rpc.Error)) *rpc.Error {
	err := a.followEpochs(ctx, c, start)
	for range maxPromiseRetries {
		if err == nil || err.Reason != rpc.ReasonBelowPromise || ctx.Err() != nil {
			break
		}
		c.metrics.belowPromise.Inc()
		if rerr := c.above(err); rerr != nil {
			err = rerr
			break
		}
		if err = renew(); err == nil {
			err = a.followEpochs(ctx, c, start)
		}
	}
	if err == nil || err.Reason == rpc.ReasonOutcomeUnknown {
		return err
	}
	// The last attempt did nothing; that is not the whole truth.
	for _, w := range *a {
		if w.mayHaveHappened() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.mu.lastErr = err
			return w.unknownOutcome("in an earlier attempt")
		}
	}
	return err
}

// followEpochs starts one attempt after the other for newer topologies.
func (a *attempts) followEpochs(ctx context.Context, c *Coordinator, start func() (*write, *rpc.Error)) *rpc.Error {
	return c.follow(ctx, func() (uint64, uint64, *rpc.Error) {
		w, err := start()
		if err != nil {
			return 0, 0, err
		}
		*a = append(*a, w)
		return w.wait(ctx)
	})
}

// above has the clock pass the promise that a write was refused for.
func (c *Coordinator) above(refusal *rpc.Error) *rpc.Error {
	var promise uint64
	if _, err := fmt.Sscan(refusal.Details["promise"], &promise); err != nil {
		return refusal
	}
	if err := c.cfg.Clock.CheckAhead(hlc.Timestamp(promise)); err != nil {
		return err
	}
	return rpc.AsError(c.cfg.Clock.Join(hlc.Timestamp(promise)))
}

func verb(op *kvv1.BatchOperation) string {
	if op.GetDelete() {
		return "delete"
	}
	return "put"
}

func checkOperation(op *kvv1.BatchOperation, t *topology.Topology) *rpc.Error {
	if err := checkKey(op.GetKey()); err != nil {
		return err
	}
	if ttl := op.GetTtlMs(); ttl > uint64(maxTTL.Milliseconds()) {
		return rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "TTL of %d ms is above %s", ttl, maxTTL).
			With("field", "ttl_ms").With("limit", maxTTL.Milliseconds())
	}
	return checkValue(op.GetValue(), t.Settings.MaxValueBytes)
}

// maxTTL keeps expiries within the range of timestamps.
const maxTTL = 100 * 365 * 24 * time.Hour

// entry gives an operation its version and encodes its record.
func (c *Coordinator) entry(op *kvv1.BatchOperation, ns *topology.Namespace) (*replicav1.Entry, record.Version, *rpc.Error) {
	if err := c.cfg.Clock.MayCoordinate(); err != nil {
		return nil, record.Version{}, err
	}
	ts, err := c.cfg.Clock.Tick()
	if err != nil {
		return nil, record.Version{}, rpc.AsError(err)
	}
	rec := record.Record{Version: record.Version{Time: ts, Incarnation: c.cfg.Self}, Kind: record.Tombstone}
	if !op.GetDelete() {
		rec.Kind = record.Value
		rec.Payload = op.GetValue()
		ttl := time.Duration(op.GetTtlMs()) * time.Millisecond
		if ttl == 0 {
			ttl = ns.TTL
		}
		if ttl > 0 {
			rec.ExpiresAt = ts.Millis() + max(1, ttl.Milliseconds())
		}
	}
	return &replicav1.Entry{Key: op.GetKey(), Record: record.Encode(rec)}, rec.Version, nil
}

// writeJob says what to write where.
type writeJob struct {
	topology  *topology.Topology
	namespace *topology.Namespace
	vnode     uint32
	entries   []*replicav1.Entry
	source    replicav1.Source
	// readAt is when a repair's records were read.
	readAt hlc.Timestamp
	// goals are how many slots must have the records, holders the nodes that are known
	// to have them already, and targets, when not nil, the nodes to send them to
	// (otherwise: every endpoint).
	goals   quorum.Goals
	holders []uint64
	targets []uint64
	hints   bool
	trace   *trace
}

// write is a job under way. It lives until every target has answered or been
// given up, whether anybody waits for it or not.
type write struct {
	writeJob
	c     *Coordinator
	slots []quorum.Slot
	// copies are the reporting replicas that get it, too.
	copies []topology.Copy
	size   int64
	// hinted are the targets known to be down whose hints travel with the carrier's
	// commit.
	hinted  []uint64
	carrier uint64
	// progress holds a token when there is something for wait to look at.
	progress chan struct{}
	mu       struct {
		sync.Mutex
		counter quorum.Counter
		acked   []uint64
		failed  []uint64
		waiting int
		// keeping is how many lots of hints are on their way to the disk.
		keeping int
		stale   uint64 // epoch of the newest refusal, and who refused
		staleBy uint64
		// below is the refusal of a replica that has promised to take no such version.
		below *rpc.Error
		// applied is set when a target has the records, unknown when one failed in a way
		// that leaves its outcome open.
		applied, unknown bool
		// unhinted are the failed targets that get hints once the records are known to
		// be somewhere, or may be: a write that never happened must not be seen later.
		unhinted  []uint64
		lastErr   error
		reached   bool
		abandoned bool
	}
}

// start sends a job's records to its targets. Nothing is sent when fewer slots than
// needed are live.
func (c *Coordinator) start(job writeJob) (*write, *rpc.Error) {
	w := &write{writeJob: job, c: c, progress: make(chan struct{}, 1)}
	w.slots = job.topology.Slots(job.vnode, job.namespace.Wide())
	if mutant.On("one-ack-too-few") && job.source == replicav1.Source_SOURCE_FIRST_HAND {
		w.goals[0].Need = max(1, w.goals[0].Need-1)
	}
	w.mu.counter = quorum.NewCounter(w.slots, w.goals)
	for _, h := range job.holders {
		w.mu.counter.Ack(h)
	}
	for _, goal := range job.goals {
		slots := w.slots[:goal.N]
		if live := quorum.LiveSlots(slots, c.cfg.Peers.Alive); live < goal.Need && job.source == replicav1.Source_SOURCE_FIRST_HAND {
			c.metrics.notEnough.Inc()
			return nil, notEnough(live, goal.Need, slots, job.topology, c.cfg.Peers.Alive)
		}
	}
	if err := w.findCopies(); err != nil {
		return nil, err
	}
	for _, e := range job.entries {
		w.size += int64(len(e.GetKey())+len(e.GetRecord())) + 512
	}
	if !c.inflight.TryAcquire(w.size) {
		c.metrics.refused.Inc()
		return nil, overloaded(c.cfg.MaxInFlightBytes, "%d bytes of writes are on their way, as many as it keeps", c.cfg.MaxInFlightBytes)
	}
	c.writing.Add(w.size)
	c.background.Add(1)
	w.send()
	return w, nil
}

// notEnough is the error of a request that too few live replicas can serve.
func notEnough(live, need int, slots []quorum.Slot, t *topology.Topology, alive func(uint64) bool) *rpc.Error {
	var down []string
	for _, n := range endpoints(slots) {
		if !alive(n) {
			down = append(down, t.NodeName(n))
		}
	}
	slices.Sort(down)
	return rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas, "%d of %d replicas are live, %d are needed; down: %s",
		live, len(slots), need, strings.Join(down, ", ")).
		With("live", live).With("needed", need).With("n", len(slots)).With("down", strings.Join(down, ","))
}

// endpoints returns the distinct nodes that writes to slots go to, in order.
func endpoints(slots []quorum.Slot) []uint64 {
	out := make([]uint64, 0, len(slots)+1)
	for _, s := range slots {
		for _, n := range s.Write {
			if n != 0 && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out
}

// send sends the records to every target that is alive, and has hints kept for the
// others.
func (w *write) send() {
	targets := w.targets
	if targets == nil {
		targets = endpoints(w.slots)
		for _, c := range w.copies {
			targets = append(targets, c.Node)
		}
	}
	var live []uint64
	for _, n := range targets {
		switch {
		case w.c.cfg.Peers.Alive(n):
			live = append(live, n)
		case w.isCopy(n):
			w.trace.add(kvv1.TraceEvent_KIND_FAILED, w.name(n), "down: repair will bring this reporting replica up to date")
		case w.hints:
			w.hinted = append(w.hinted, n)
			w.trace.add(kvv1.TraceEvent_KIND_HINT, w.name(n), "down: a hint is kept for it")
		default:
			w.trace.add(kvv1.TraceEvent_KIND_FAILED, w.name(n), "down, and hints are off")
		}
	}
	// The hints for nodes that are down go into the commit of one that is not: this
	// node if it is a replica, so that nothing is synced twice.
	if len(live) > 0 {
		w.carrier = live[0]
		if slices.Contains(live, w.c.cfg.Self) {
			w.carrier = w.c.cfg.Self
		}
	}
	w.mu.Lock()
	w.mu.waiting = len(live) + 1
	w.mu.failed = slices.DeleteFunc(slices.Clone(targets), func(n uint64) bool { return slices.Contains(live, n) })
	w.mu.Unlock()
	deadline := time.Now().Add(w.c.cfg.WriteTimeout)
	for _, n := range live {
		w.trace.add(kvv1.TraceEvent_KIND_SENT, w.name(n), "")
		w.sendTo(n, deadline, openingPause)
	}
	w.settle() // for the sending itself
}

// A newcomer takes no records until it knows what its sources have promised, which is
// soon after it learnt of its vnode. It is asked again after these pauses, each twice
// as long as the one before.
const (
	openingPause    = 50 * time.Millisecond
	maxOpeningPause = 400 * time.Millisecond
)

// sendTo sends the records to a target, once more after a pause where it is not ready
// for the vnode.
func (w *write) sendTo(n uint64, deadline time.Time, pause time.Duration) {
	apply := &replicav1.Apply{Namespace: w.namespace.ID, Vnode: w.vnode, Source: w.source, Entries: w.entries, ReadAt: uint64(w.readAt)}
	if n == w.carrier {
		apply.HintTargets = w.hinted
	}
	call := &replicav1.Call{Epoch: w.topology.Epoch, Operation: &replicav1.Call_Apply{Apply: apply}}
	sent := time.Now()
	err := w.c.cfg.Peers.Go(n, call, deadline, func(_ *replicav1.Reply, err error) {
		if n == w.c.cfg.Self && w.source == replicav1.Source_SOURCE_FIRST_HAND {
			now := time.Now()
			w.c.commits.observe(now, now.Sub(sent))
		}
		if err != nil && rpc.AsError(err).Reason == rpc.ReasonNotReady && pause <= maxOpeningPause {
			time.AfterFunc(pause, func() { w.sendTo(n, deadline, 2*pause) })
			return
		}
		w.answered(n, err)
	})
	if err != nil {
		w.answered(n, err)
	}
}

// need is how many of the slots that reads go by must have the records.
func (w *write) need() int { return w.goals[0].Need }

func (w *write) name(node uint64) string { return w.topology.NodeName(node) }

// answered notes a target's answer. It runs on a link's goroutine and does not
// block.
func (w *write) answered(node uint64, err error) {
	w.mu.Lock()
	if err == nil {
		w.mu.applied = true
		w.mu.acked = append(w.mu.acked, node)
		if reached := w.mu.counter.Ack(node); w.mu.reached && w.trace != nil {
			w.trace.add(kvv1.TraceEvent_KIND_LATE, w.name(node), "acknowledged after the answer")
		} else {
			w.trace.add(kvv1.TraceEvent_KIND_ACKNOWLEDGED, w.name(node), "")
			if reached && w.trace != nil {
				w.trace.add(kvv1.TraceEvent_KIND_QUORUM_REACHED, "", "%d of %d slots", w.mu.counter.Acked(), w.goals[0].N)
			}
		}
		w.mu.reached = w.mu.counter.Reached()
	} else {
		w.mu.failed = append(w.mu.failed, node)
		w.mu.lastErr = err
		e := rpc.AsError(err)
		if !e.NothingDone() && e.Code != codes.InvalidArgument {
			w.mu.unknown = true
		}
		if e.Reason == rpc.ReasonBelowPromise {
			w.mu.below = e
		} else if e.Code != codes.InvalidArgument && !w.isCopy(node) {
			w.mu.unhinted = append(w.mu.unhinted, node)
		}
		if epoch := refusedEpoch(err); epoch > w.mu.stale {
			w.mu.stale, w.mu.staleBy = epoch, node
		}
		w.trace.add(kvv1.TraceEvent_KIND_FAILED, w.name(node), "%s", err)
	}
	targets := w.toHint()
	w.mu.keeping += len(targets)
	w.mu.Unlock()
	if len(targets) > 0 {
		w.keepHints(targets)
	}
	w.settle()
}

// toHint returns the targets that hints are to be kept for now: those that failed,
// and those whose hints they carried.
// REQUIRES: w.mu is held.
func (w *write) toHint() []uint64 {
	if !w.hints || w.mu.abandoned || !w.mu.applied && !w.mu.unknown {
		return nil
	}
	targets := w.mu.unhinted
	w.mu.unhinted = nil
	if slices.Contains(targets, w.carrier) {
		targets = append(targets, w.hinted...)
	}
	return targets
}

// keepHints has hints kept for targets. The write, and with it the room it takes,
// lasts until they are on disk.
func (w *write) keepHints(targets []uint64) {
	writes := make([]storage.Write, len(w.entries))
	for i, e := range w.entries {
		writes[i] = storage.Write{Namespace: w.namespace.ID, Vnode: w.vnode, Key: e.GetKey(), Record: e.GetRecord()}
	}
	for _, t := range targets {
		w.c.cfg.Hints.Keep(t, writes, func(kept bool) {
			text := "a hint is kept for it"
			if !kept {
				text = "no room for a hint: reads and repair will mend it"
			}
			w.trace.add(kvv1.TraceEvent_KIND_HINT, w.name(t), "%s", text)
			w.mu.Lock()
			w.mu.keeping--
			last := w.mu.waiting == 0 && w.mu.keeping == 0
			w.mu.Unlock()
			if last {
				w.end()
			}
		})
	}
}

// settle notes that one more target has answered, and ends the write with the last.
func (w *write) settle() {
	w.mu.Lock()
	w.mu.waiting--
	last := w.mu.waiting == 0 && w.mu.keeping == 0
	w.mu.Unlock()
	select {
	case w.progress <- struct{}{}:
	default:
	}
	if last {
		w.end()
	}
}

// end gives back what the write took.
func (w *write) end() {
	w.c.writing.Add(-w.size)
	w.c.inflight.Release(w.size)
	w.trace.finish()
	w.c.background.Done()
}

// wait returns when enough slots have the records, and all reporting replicas that it is to
// wait for, when that has become impossible,
// when a replica refused the epoch (which it returns), or when ctx ends.
func (w *write) wait(ctx context.Context) (stale, by uint64, _ *rpc.Error) {
	timeout, stop := w.laggards()
	defer stop()
	for {
		var changed <-chan struct{}
		if len(w.copies) > 0 {
			changed = w.c.cfg.Fence.Changed() // asked for before the judgement, which is of the present
		}
		if done, epoch, by, err := w.judge(); done {
			return epoch, by, err
		}
		select {
		case <-w.progress:
		case <-changed:
		case <-timeout:
			w.evict()
		case <-ctx.Done():
			w.mu.Lock()
			defer w.mu.Unlock()
			if lacking := w.lacking(); w.mu.reached && len(lacking) > 0 {
				return 0, 0, w.withoutCopies(lacking, inTime)
			}
			return 0, 0, w.unknownOutcome("in time")
		}
	}
}

// judge decides whether the write's outcome is settled.
func (w *write) judge() (done bool, stale, by uint64, _ *rpc.Error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	possible := w.goals.Met(w.slots, func(slot int) bool {
		return w.slots[slot].Live(func(n uint64) bool { return !slices.Contains(w.mu.failed, n) || slices.Contains(w.holders, n) })
	})
	switch {
	case w.mu.below != nil:
		// This version is never acknowledged; another is tried.
		w.mu.abandoned = true
		return true, 0, 0, w.mu.below
	case w.mu.reached || w.mu.counter.Reached():
		w.mu.reached = true
		return w.judgeCopies()
	case possible && w.mu.waiting > 0:
		return false, 0, 0, nil
	case w.mu.stale > 0:
		w.mu.abandoned = true
		return true, w.mu.stale, w.mu.staleBy, w.unknownOutcome("under this epoch")
	case w.mu.waiting == 0 && !w.mu.unknown && !w.mu.applied && w.mu.lastErr != nil:
		// Nobody took it: what the last one said is the truth for all.
		return true, 0, 0, rpc.AsError(w.mu.lastErr)
	case w.mu.waiting > 0 && !w.mu.applied && !w.mu.unknown:
		return false, 0, 0, nil // the others decide whether anything was done
	}
	return true, 0, 0, w.unknownOutcome("since replicas failed")
}

// holdersNow returns the nodes that are known to have the records.
func (w *write) holdersNow() []uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append(slices.Clone(w.holders), w.mu.acked...)
}

// mayHaveHappened reports whether any node has the records, or may get them yet.
func (w *write) mayHaveHappened() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.applied || w.mu.unknown || w.mu.waiting > 0
}

// unknownOutcome is the error of a write that may have happened.
// REQUIRES: w.mu is held.
func (w *write) unknownOutcome(why string) *rpc.Error {
	if mutant.On("unknown-called-failed") {
		return notEnough(w.mu.counter.Acked(), w.need(), w.slots, w.topology, w.c.cfg.Peers.Alive)
	}
	e := rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown,
		"%d of %d needed replicas acknowledged %s: the outcome is unknown, the write may be seen by reads and survive, or not",
		w.mu.counter.Acked(), w.need(), why)
	if w.mu.lastErr != nil {
		e.Message += fmt.Sprintf(" (last failure: %s)", w.mu.lastErr)
	}
	return e.With("acknowledged", w.mu.counter.Acked()).With("needed", w.need()).With("n", w.goals[0].N)
}

// receipt says what a successful write rests on.
func (w *write) receipt(v record.Version) *kvv1.Receipt {
	w.mu.Lock()
	acked := w.mu.counter.Acked()
	w.mu.Unlock()
	ns := w.namespace
	strength := quorum.Eventual
	least := ns.LeastWriteAcks
	if !ns.AlsoW.IsZero() { // reads by the new R count on both
		least = max(least, ns.Writes(quorum.Spec{})[0].Need)
	}
	if w.need() >= least {
		strength = quorum.StrengthOf(ns.N, w.need(), ns.R.Need(ns.N))
	}
	return &kvv1.Receipt{
		Epoch: w.topology.Epoch, N: uint32(ns.N), Needed: uint32(w.need()), Acknowledged: uint32(acked),
		Strength: kvv1.Strength(strength), Version: versionProto(v), Vnode: w.vnode,
	}
}

func versionProto(v record.Version) *kvv1.Version {
	if v.IsZero() {
		return nil
	}
	return &kvv1.Version{Timestamp: uint64(v.Time), Incarnation: v.Incarnation}
}
