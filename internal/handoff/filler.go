package handoff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// FillerConfig holds what a filler is made of. Fields without a default are required.
type FillerConfig struct {
	Self        uint64
	Store       *storage.Store
	Assignments *Assignments
	Fence       *replica.Fence
	Peers       Peers
	Logger      *slog.Logger
	Metrics     prometheus.Registerer
	// Drained asks a node for the epoch that is on its disk and that none of its
	// requests runs under an older one than.
	Drained func(ctx context.Context, node uint64) (uint64, error)
	// Changed returns a channel that is closed by the next topology.
	Changed func() <-chan struct{}
	// Interval is the pause before what could not be done is tried again. Default 300 ms.
	Interval time.Duration
	// BytesPerSecond bounds what is pulled, from all sources together, by a node that has
	// nothing else to do. Default 64 MiB. Less is pulled while commits take longer than
	// they have to by CommitDelay; 0: whatever they take.
	BytesPerSecond int
	CommitDelay    time.Duration
	// LeastFileBytes is what a sorted file is made of at least. Less comes in batches.
	// Default 256 KiB.
	LeastFileBytes int
	// Load returns how busy the node is, 0 to 1: filling gets slower with it. Default:
	// always 0.
	Load func() float64
	// Join has the node's clock take in a version that is about to be stored.
	Join func(hlc.Timestamp) error
	// Verify compares a place with a peer's, and returns when both hold the same.
	Verify func(ctx context.Context, t *topology.Topology, place storage.Place, peer uint64) error
	// Timeout bounds one call. Default 5 s.
	Timeout time.Duration
}

const (
	// fillWorkers is how many vnodes are worked on at a time.
	fillWorkers = 4
)

// Filler fills the vnodes that its node is incoming on: with what the old node of the
// slot holds, or, where that is dead, by joining what N−q+1 of the other voting slots
// hold, q being a majority: every write that a majority has acknowledged is in one of
// them.
type Filler struct {
	cfg     FillerConfig
	pacer   *pacer
	records prometheus.Counter
	bytes   prometheus.Counter
	mu      struct {
		sync.Mutex
		drained map[uint64]uint64 // by node; these epochs only grow
	}
}

// NewFiller returns a filler. Run does the work.
func NewFiller(cfg FillerConfig) *Filler {
	if cfg.Interval == 0 {
		cfg.Interval = 300 * time.Millisecond
	}
	if cfg.BytesPerSecond == 0 {
		cfg.BytesPerSecond = 64 << 20
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.LeastFileBytes == 0 {
		cfg.LeastFileBytes = 256 << 10
	}
	if cfg.Load == nil {
		cfg.Load = func() float64 { return 0 }
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvasir", Subsystem: "fill", Name: name, Help: help})
	}
	f := &Filler{
		cfg:     cfg,
		pacer:   newPacer(cfg.BytesPerSecond, cfg.CommitDelay, cfg.Store.CommitDelay),
		records: counter("records_total", "Records taken in from other replicas by a node that is being filled."),
		bytes:   counter("bytes_total", "Bytes of records taken in from other replicas by a node that is being filled."),
	}
	f.mu.drained = map[uint64]uint64{}
	cfg.Metrics.MustRegister(f.records, f.bytes, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "kvasir", Subsystem: "fill", Name: "pace_bytes_per_second", Help: "Bytes a second that a node takes in at most while it is being filled.",
	}, f.pacer.bytesPerSecond))
	return f
}

// Run fills what there is to fill until ctx ends.
func (f *Filler) Run(ctx context.Context) error {
	tick := time.NewTicker(f.cfg.Interval)
	defer tick.Stop()
	for {
		f.pacer.adjust(time.Now()) // it has to know what commits take while nothing moves
		changed := f.cfg.Changed()
		t := f.cfg.Fence.Topology()
		jobs := f.jobs(t)
		if len(jobs) > 0 {
			f.askDrained(ctx, t, jobs)
			f.each(jobs, func(j job) error { return f.open(ctx, t, j) })
			f.each(jobs, func(j job) error {
				if j.Complete || !f.isOpen(t, j) || f.cfg.Fence.Topology() != t {
					return nil // what a newer topology assigns is opened first
				}
				return f.fill(ctx, t, j)
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// job is an assignment with the slot it is for, −1 for a reporting node's copy.
type job struct {
	assignment
	slot int
	// old is set when it is filled from the slot's old node alone.
	old bool
}

// jobs returns the assignments that hold under a topology, in ring order.
func (f *Filler) jobs(t *topology.Topology) []job {
	var out []job
	now := assigned(f.cfg.Self, t)
	for _, as := range inOrder(f.cfg.Assignments.all()) {
		if now[as.place()].Epoch != as.Epoch {
			continue
		}
		slot := slices.IndexFunc(t.Ring[as.Vnode].Slots, func(s topology.Slot) bool { return s.Incoming == f.cfg.Self })
		if as.Namespace != 0 {
			slot = slices.IndexFunc(t.Slots(as.Vnode, t.NamespaceByID(as.Namespace).Wide()), func(s quorum.Slot) bool {
				return s.Write[0] == f.cfg.Self || s.Write[1] == f.cfg.Self
			})
		}
		j := job{as, slot, false}
		j.old = f.fromOld(t, j)
		out = append(out, j)
	}
	return out
}

// each does something for every job, a few at a time, and notes what keeps one from
// going on.
func (f *Filler) each(jobs []job, do func(job) error) {
	each(jobs, func(j job) {
		if err := do(j); err != nil {
			f.cfg.Assignments.note(j.assignment, func(p *progress) { p.waitsFor = err.Error() })
		}
	})
}

// each does something for every job, a few at a time.
func each(jobs []job, do func(job)) {
	todo := make(chan job)
	var workers sync.WaitGroup
	for range fillWorkers {
		workers.Go(func() {
			for j := range todo {
				do(j)
			}
		})
	}
	for _, j := range jobs {
		todo <- j
	}
	close(todo)
	workers.Wait()
}

// namespaces returns the namespaces that use a job's slot.
func namespaces(t *topology.Topology, j job) []*topology.Namespace {
	if j.Namespace != 0 {
		return []*topology.Namespace{t.NamespaceByID(j.Namespace)}
	}
	var out []*topology.Namespace
	for i := range t.Namespaces {
		if ns := &t.Namespaces[i]; j.slot < ns.N {
			out = append(out, ns)
		}
	}
	return out
}

func (f *Filler) isOpen(t *topology.Topology, j job) bool {
	if j.Keep {
		return true
	}
	for _, ns := range namespaces(t, j) {
		if !f.cfg.Assignments.Open(ns.ID, j.Vnode, j.Epoch) {
			return false
		}
	}
	return true
}

// fromOld reports whether a job is the move of a slot whose old node lives: then that
// has all that the slot stands for. Where it was taken for dead and is back, it has
// what was written before, and what was written since is here already.
func (f *Filler) fromOld(t *topology.Topology, j job) bool {
	if j.slot < 0 {
		return false
	}
	s := t.Ring[j.Vnode].Slots[j.slot]
	if s.Incoming != f.cfg.Self || j.Epoch != s.Since || s.Node == f.cfg.Self {
		return false
	}
	back := s.Phase == topology.WriteNewReadNone && t.Node(s.Node) != nil && f.cfg.Peers.Alive(s.Node) && f.drained(s.Node) >= t.Ring[j.Vnode].ChangedEpoch
	return s.Phase == topology.WriteBothReadOld || back
}

// sourcesNeeded is N−q+1, or the old node alone. Where a namespace changes, what has been
// acknowledged or read by the quorums before must be met, this node's own copy included
// if it has one: N−W+1 slots meet every write's, and R the N−R+1 that reads leave.
//
// Where nodes of the vnode were given up for lost, all others may be fewer: then they are
// all there is.
func (f *Filler) sourcesNeeded(t *topology.Topology, j job, ns *topology.Namespace) int {
	if j.old {
		return 1
	}
	need := f.sourcesWanted(j, ns)
	left, lost := 0, false
	for i, s := range t.Slots(j.Vnode, ns.N) {
		lost = lost || t.Lost(t.Ring[j.Vnode].Slots[i].Node) || t.Lost(s.Read)
		if i != j.slot && s.Read != 0 && !t.Lost(s.Read) {
			left++
		}
	}
	if lost {
		need = min(need, left)
	}
	return need
}

func (f *Filler) sourcesWanted(j job, ns *topology.Namespace) int {
	if j.slot < 0 {
		return 1 // what it lacks then it is given when it joins
	}
	if j.Namespace != 0 {
		n := ns.N
		w := ns.W.Need(n)
		if ns.Change == topology.Leveling {
			w = ns.LeastWriteAcks
		}
		need := max(n-min(w, n/2+1)+1, min(ns.R.Need(n), n))
		if j.Keep {
			need--
		}
		return need
	}
	return ns.N - quorum.Majority.Need(ns.N) + 1
}

// askDrained asks the nodes that may be sources, and that are not known to have taken
// in the jobs' epochs, how far they are.
func (f *Filler) askDrained(ctx context.Context, t *topology.Topology, jobs []job) {
	ask := map[uint64]bool{}
	for _, j := range jobs {
		epoch := t.Ring[j.Vnode].ChangedEpoch
		for _, ns := range namespaces(t, j) {
			epoch = max(epoch, ns.ChangedEpoch)
		}
		for _, s := range t.Ring[j.Vnode].Slots {
			n := s.Quorum().Read
			if s.Phase == topology.WriteNewReadNone && t.Node(s.Node) != nil {
				n = s.Node // it may be back
			}
			if n != 0 && n != f.cfg.Self && f.drained(n) < epoch && f.cfg.Peers.Alive(n) {
				ask[n] = true
			}
		}
	}
	var asked sync.WaitGroup
	for n := range ask {
		asked.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
			defer cancel()
			if epoch, err := f.cfg.Drained(ctx, n); err == nil {
				f.mu.Lock()
				f.mu.drained[n] = max(f.mu.drained[n], epoch)
				f.mu.Unlock()
			}
		})
	}
	asked.Wait()
}

func (f *Filler) drained(node uint64) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.drained[node]
}

// sources returns the nodes that a vnode's records of a namespace can be pulled from,
// or why there are too few. What a source holds counts from after the barrier: when
// it has ended every request that ran under an epoch before the assignment's.
func (f *Filler) sources(t *topology.Topology, j job, ns *topology.Namespace, tired map[uint64]bool) ([]uint64, error) {
	var out []uint64
	var missing []string
	readable, need := 0, f.sourcesNeeded(t, j, ns)
	epoch := max(t.Ring[j.Vnode].ChangedEpoch, ns.ChangedEpoch)
	for i, s := range t.Slots(j.Vnode, ns.N) {
		n := s.Read
		if j.old {
			n = t.Ring[j.Vnode].Slots[i].Node
		}
		if (i == j.slot) != j.old || n == 0 || t.Lost(n) {
			continue
		}
		readable++
		switch name := t.NodeName(n); {
		case !f.cfg.Peers.Alive(n):
			missing = append(missing, name+" is down")
		case f.drained(n) < epoch:
			missing = append(missing, fmt.Sprintf("%s has not taken in epoch %s yet", name, topology.EpochString(epoch)))
		case tired[n]:
			missing = append(missing, name+" failed")
		default:
			out = append(out, n)
		}
	}
	switch {
	case len(missing) > 0 && j.old:
		return nil, errors.New(missing[0])
	case readable < need:
		return nil, fmt.Errorf("namespace %s has %d voting replicas of vnode %d left, %d are needed to rebuild another (N=%d): its records may be lost",
			ns.Name, readable, j.Vnode, need, ns.N)
	case len(out) < need:
		return nil, fmt.Errorf("%d of the voting replicas of vnode %d can be read, namespace %s needs %d: %s (if they are lost for good: kvctl recover --accept-loss)",
			len(out), j.Vnode, ns.Name, need, strings.Join(missing, ", "))
	case len(out) == 0:
		return nil, nil // nothing is left
	}
	// Neighbouring vnodes begin with different sources.
	turn := int(j.Vnode) % len(out)
	return append(out[turn:len(out):len(out)], out[:turn]...), nil
}

// open lets a vnode take records once its sources have taken in its epoch: the old
// node, which then makes no promise without this one any more, or N−q+1 of the other
// slots, so that no read quorum of an older epoch can be reached any more. First it
// takes over what they have promised to refuse.
func (f *Filler) open(ctx context.Context, t *topology.Topology, j job) error {
	if j.Keep {
		return nil // it has been open all the time
	}
	var errs []error
	for _, ns := range namespaces(t, j) {
		if f.cfg.Assignments.Open(ns.ID, j.Vnode, j.Epoch) {
			continue
		}
		sources, err := f.sources(t, j, ns, nil)
		if err == nil {
			err = f.adoptPromises(ctx, t, j, ns, sources[:f.sourcesNeeded(t, j, ns)])
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		f.cfg.Assignments.open(j.assignment, ns.ID)
	}
	return errors.Join(errs...)
}

// adoptPromises makes the highest promise of some sources this node's own.
func (f *Filler) adoptPromises(ctx context.Context, t *topology.Topology, j job, ns *topology.Namespace, sources []uint64) error {
	var promise hlc.Timestamp
	for _, n := range sources {
		reply, err := f.call(ctx, n, &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Collect{Collect: &replicav1.Collect{
			Namespace: ns.ID, Vnode: j.Vnode, Step: replicav1.Collect_STEP_STATE,
		}}})
		if err != nil {
			return fmt.Errorf("%s does not say what it has promised: %w", t.NodeName(n), err)
		}
		promise = max(promise, hlc.Timestamp(reply.GetCollect().GetPromise()))
	}
	if promise == 0 {
		return nil
	}
	return f.cfg.Store.Promise(ns.ID, j.Vnode, promise)
}

// fill pulls all that a vnode lacks, and notes when it is complete.
func (f *Filler) fill(ctx context.Context, t *topology.Topology, j job) error {
	f.cfg.Assignments.note(j.assignment, func(p *progress) { p.waitsFor = "" })
	for _, ns := range namespaces(t, j) {
		if err := f.fillNamespace(ctx, t, ns, j); err != nil {
			return err
		}
		if !j.old {
			continue
		}
		if slot := t.Ring[j.Vnode].Slots[j.slot]; slot.Phase == topology.WriteBothReadOld {
			if err := f.cfg.Verify(ctx, t, storage.Place{Namespace: ns.ID, Vnode: j.Vnode}, slot.Node); err != nil {
				return fmt.Errorf("compare with %s: %w", t.NodeName(slot.Node), err)
			}
		}
	}
	return f.cfg.Assignments.complete(j.assignment)
}

// localError is one that another source would not help against.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// fillNamespace joins what N−q+1 sources hold. One that fails is replaced by another.
func (f *Filler) fillNamespace(ctx context.Context, t *topology.Topology, ns *topology.Namespace, j job) error {
	done, tired := map[uint64]bool{}, map[uint64]bool{}
	var last error
	for len(done) < f.sourcesNeeded(t, j, ns) {
		sources, err := f.sources(t, j, ns, tired)
		if err != nil {
			return errors.Join(last, err)
		}
		next := sources[slices.IndexFunc(sources, func(n uint64) bool { return !done[n] })]
		if len(done) == 0 && !j.Keep {
			s := stream{Filler: f, topology: t, job: j, namespace: ns, source: next}
			err = s.run(ctx)
		} else {
			err = f.pull(ctx, t, j, ns, next)
		}
		var local localError
		switch {
		case err == nil:
			done[next] = true
		case ctx.Err() != nil || errors.As(err, &local):
			return err
		default:
			f.cfg.Logger.Warn("a source failed; another one is taken", "vnode", j.Vnode, "namespace", ns.Name, "source", t.NodeName(next), "err", err)
			last = fmt.Errorf("%s: %w", t.NodeName(next), err)
			tired[next] = true
		}
	}
	return nil
}

// pull joins what one source holds of a vnode and is not here yet, page by page.
func (f *Filler) pull(ctx context.Context, t *topology.Topology, j job, ns *topology.Namespace, source uint64) error {
	var start []byte
	for {
		reply, err := f.call(ctx, source, &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Scan{Scan: &replicav1.Scan{
			Namespace: ns.ID, HeaderVnodes: []uint32{j.Vnode}, Start: start, Limit: pageRecords, LimitBytes: pageBytes,
		}}})
		if err != nil {
			return err
		}
		headers := reply.GetScan().GetEntries()
		more := reply.GetScan().GetTruncated()
		if more && len(headers) == 0 {
			return errors.New("a page that ends early has no records")
		}
		if more {
			start = after(headers[len(headers)-1].GetKey())
		}
		entries, err := f.missing(ctx, t, j.Vnode, ns, source, headers)
		if err != nil {
			return err
		}
		if err := f.join(ctx, t, j, ns, entries); err != nil {
			return err
		}
		if !more {
			return nil
		}
	}
}

// missing fetches the records whose headers differ from those of the local ones.
func (f *Filler) missing(ctx context.Context, t *topology.Topology, vnode uint32, ns *topology.Namespace, source uint64, headers []*replicav1.Entry) ([]*replicav1.Entry, error) {
	var out []*replicav1.Entry
	for _, h := range headers {
		local, err := f.cfg.Store.Get(ns.ID, vnode, h.GetKey())
		if err != nil && !errors.Is(err, storage.ErrNotFound) && !errors.Is(err, storage.ErrCorrupt) {
			return nil, localError{err}
		}
		if rec, derr := record.Decode(local); err == nil && derr == nil && bytes.Equal(local[:len(local)-len(rec.Payload)], h.GetRecord()) {
			continue
		}
		reply, err := f.call(ctx, source, &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Read{Read: &replicav1.Read{
			Namespace: ns.ID, Vnode: vnode, Key: h.GetKey(),
		}}})
		if err != nil {
			return nil, err
		}
		if r := reply.GetRead(); r.GetFound() {
			out = append(out, &replicav1.Entry{Key: h.GetKey(), Record: r.GetRecord()})
		}
	}
	return out, nil
}

// join has this node's replica take records, at the pace that is allowed.
func (f *Filler) join(ctx context.Context, t *topology.Topology, j job, ns *topology.Namespace, entries []*replicav1.Entry) error {
	for chunk := range slices.Chunk(entries, 256) {
		size := 0
		for _, e := range chunk {
			size += len(e.GetKey()) + len(e.GetRecord())
		}
		if err := f.pace(ctx, size); err != nil {
			return localError{err}
		}
		if err := f.apply(ctx, t, j, ns, chunk); err != nil {
			return err
		}
		f.count(j, len(chunk), size)
	}
	return nil
}

// apply has this node's replica take records.
func (f *Filler) apply(ctx context.Context, t *topology.Topology, j job, ns *topology.Namespace, entries []*replicav1.Entry) error {
	_, err := f.call(ctx, f.cfg.Self, &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
		Namespace: ns.ID, Vnode: j.Vnode, Source: replicav1.Source_SOURCE_REPAIR, Entries: entries,
	}}})
	if err != nil {
		return localError{err}
	}
	return nil
}

// count notes what has been taken in.
func (f *Filler) count(j job, records, size int) {
	f.records.Add(float64(records))
	f.bytes.Add(float64(size))
	f.cfg.Assignments.note(j.assignment, func(p *progress) {
		p.records += uint64(records)
		p.bytes += uint64(size)
	})
}

// answer is what came of a call.
type answer struct {
	reply *replicav1.Reply
	err   error
}

// call makes one call and waits for its reply.
func (f *Filler) call(ctx context.Context, node uint64, call *replicav1.Call) (*replicav1.Reply, error) {
	got, err := f.send(node, call)
	if err != nil {
		return nil, err
	}
	return wait(ctx, got)
}

// send makes one call.
func (f *Filler) send(node uint64, call *replicav1.Call) (chan answer, error) {
	got := make(chan answer, 1)
	err := f.cfg.Peers.Go(node, call, time.Now().Add(f.cfg.Timeout), func(r *replicav1.Reply, err error) { got <- answer{r, err} })
	return got, err
}

func wait(ctx context.Context, got chan answer) (*replicav1.Reply, error) {
	select {
	case a := <-got:
		return a.reply, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Waiting returns, over all vnodes, the reasons for which filling does not go on,
// each once, in order.
func Waiting(fillings []Filling) []string {
	reasons := map[string]bool{}
	for _, f := range fillings {
		if f.WaitsFor != "" {
			reasons[f.WaitsFor] = true
		}
	}
	return slices.Sorted(maps.Keys(reasons))
}
