package antientropy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Dead records (tombstones and expired values) are removed under certificates only.
// See docs/adr/0013-certificates.md for why the steps are these, and
// TestCollectionModel for what breaks without them.
const (
	// collectAge is how far behind the endpoints' clocks a certificate stays: what is
	// younger may still be on its way.
	collectAge = 30 * time.Second
	// collectGrace is how long an endpoint waits before it removes under a certificate
	// that it has learned: longer than a read and its repair take.
	collectGrace = 15 * time.Second
	// collectInterval is how often the leader looks at a vnode.
	collectInterval = 30 * time.Second
	// recheckInterval is how often it asks the others although it has nothing dead.
	recheckInterval = 10 * time.Minute
	// roundTimeout bounds a round. Together with collectAge it is well below
	// storage.RepairHorizon.
	roundTimeout = time.Minute
	// stepTimeout bounds the answer to one step of it.
	stepTimeout = 10 * time.Second
	// collectReadBytes bounds what a second's looking for dead records reads.
	collectReadBytes = 32 << 20
	// removeBatch is how many records are removed between two looks at the topology.
	removeBatch = 256
	// compactAtLeast records must have been removed from a vnode, and a quarter of what
	// it held, before it is compacted.
	compactAtLeast = 128
)

// CollectorConfig holds what a collector is made of. Fields without a default are
// required.
type CollectorConfig struct {
	Self    uint64
	Store   *storage.Store
	Fence   *replica.Fence
	Peers   Peers
	Logger  *slog.Logger
	Metrics prometheus.Registerer
	// Sync has this node and another endpoint of a place hold the join of both, on disk;
	// see Repairer.Sync.
	Sync func(ctx context.Context, t *topology.Topology, place storage.Place, peer uint64) (Outcome, error)
	// Paused reports whether repair is paused on this node; then it begins no rounds.
	Paused func() bool
	// Interval is how often there is a look for something to do. Default 1 s.
	Interval time.Duration
	// RemovalsPerSecond bounds the removal. Default 20,000.
	RemovalsPerSecond int
}

// Collector leads the rounds that certify dead records as removable, and removes
// them from this node's store.
type Collector struct {
	cfg     CollectorConfig
	limiter *rate.Limiter // of removals
	reads   *rate.Limiter // of bytes read to look for something dead
	metrics collectMetrics
	mu      struct {
		sync.Mutex
		places map[storage.Place]*placeState
	}
}

// placeState is what a collector remembers of a vnode in one namespace.
type placeState struct {
	// looked is when this node last looked as its leader, asked when it last asked all.
	looked, asked time.Time
	// void is why the last round came to nothing, or "", voidSince when the first of those
	// ended that have come to nothing since one did not.
	void      string
	voidSince time.Time
	// learned is when the certificate was learned under which nothing was left to
	// remove, emptied when that was found.
	learned, emptied time.Time
	// removed counts records since the last compaction.
	removed uint64
}

// NewCollector returns a collector. Run does the work.
func NewCollector(cfg CollectorConfig) *Collector {
	if cfg.Interval == 0 {
		cfg.Interval = time.Second
	}
	if cfg.RemovalsPerSecond == 0 {
		cfg.RemovalsPerSecond = 20_000
	}
	c := &Collector{
		cfg: cfg, limiter: rate.NewLimiter(rate.Limit(cfg.RemovalsPerSecond), max(cfg.RemovalsPerSecond, removeBatch)),
		reads:   rate.NewLimiter(collectReadBytes, collectReadBytes),
		metrics: newCollectMetrics(cfg.Metrics, cfg.Store),
	}
	c.mu.places = map[storage.Place]*placeState{}
	cfg.Metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "kvasir", Subsystem: "collect", Name: "pinned_seconds", Help: "For how long the vnode that waits longest, of those that this node leads, has come to no certificate.",
	}, func() float64 { return c.pinned().Seconds() }))
	return c
}

// Run leads rounds and removes dead records until ctx ends. One goroutine leads, one
// removes.
func (c *Collector) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { c.every(ctx, c.removeAll) })
	c.every(ctx, c.lead)
	wg.Wait()
	return nil
}

func (c *Collector) every(ctx context.Context, work func(context.Context)) {
	tick := time.NewTicker(c.cfg.Interval)
	defer tick.Stop()
	for {
		work(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// update changes what is remembered of a place, and returns it.
func (c *Collector) update(p storage.Place, change func(*placeState)) placeState {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.mu.places[p]
	if s == nil {
		s = &placeState{}
		c.mu.places[p] = s
	}
	change(s)
	return *s
}

// leads reports whether this node leads a vnode's rounds. All endpoints have to be
// there for one, so they need not agree on who is.
func (c *Collector) leads(t *topology.Topology, ns *topology.Namespace, vnode uint32) bool {
	endpoints, _ := t.Endpoints(vnode, ns)
	if mutant.On("gc-without-certificate") {
		return slices.Contains(endpoints, c.cfg.Self)
	}
	return endpoints[int(vnode)%len(endpoints)] == c.cfg.Self
}

// lead runs a round for every vnode that this node leads and that may need one.
func (c *Collector) lead(ctx context.Context) {
	t := c.cfg.Fence.Topology()
	if !t.Formed() || c.cfg.Paused() {
		return
	}
	c.forgetDropped(t)
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		for vnode := range uint32(len(t.Ring)) {
			if ctx.Err() != nil {
				return
			}
			if c.leads(t, ns, vnode) && c.due(ctx, ns.ID, vnode) {
				c.attempt(ctx, t, ns, vnode)
			}
		}
	}
}

// forgetDropped forgets what belongs to namespaces that are gone.
func (c *Collector) forgetDropped(t *topology.Topology) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for p := range c.mu.places {
		if t.NamespaceByID(p.Namespace) == nil {
			delete(c.mu.places, p)
		}
	}
}

// due reports whether it is time to ask the endpoints of a vnode: when it has
// something dead itself, and now and then in any case.
func (c *Collector) due(ctx context.Context, namespace, vnode uint32) bool {
	p, now, look := storage.Place{Namespace: namespace, Vnode: vnode}, time.Now(), false
	s := c.update(p, func(s *placeState) {
		if s.looked.IsZero() { // a node that starts has enough to do
			s.looked, s.asked = now, now
		}
		if look = now.Sub(s.looked) >= collectInterval; look {
			s.looked = now
		}
	})
	if !look {
		return false
	}
	if s.void != "" || now.Sub(s.asked) >= recheckInterval {
		return true
	}
	before := c.cfg.Store.TreeBytesRead()
	dead, err := c.cfg.Store.Dead(ctx, namespace, vnode, c.cfg.Store.Collection(namespace, vnode).Certificate)
	if read := c.cfg.Store.TreeBytesRead() - before; err == nil {
		err = c.reads.WaitN(ctx, int(min(read, collectReadBytes)))
	}
	if err != nil && ctx.Err() == nil {
		c.cfg.Logger.Warn("cannot look for dead records", "namespace_id", namespace, "vnode", vnode, "err", err)
	}
	return err == nil && dead.Records > 0
}

// errVoid is a round that came to nothing, with the reason for the metrics.
type errVoid struct {
	reason string
	cause  error
}

func (e *errVoid) Error() string { return fmt.Sprintf("%s: %v", e.reason, e.cause) }
func (e *errVoid) Unwrap() error { return e.cause }

func void(reason, format string, args ...any) *errVoid {
	return &errVoid{reason, fmt.Errorf(format, args...)}
}

// attempt runs one round and keeps how it ended.
func (c *Collector) attempt(ctx context.Context, t *topology.Topology, ns *topology.Namespace, vnode uint32) {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	r := round{c: c, t: t, namespace: ns, vnode: vnode}
	err := r.run(ctx)
	reason := ""
	if err != nil {
		reason = err.Error()
		c.metrics.void.WithLabelValues(err.reason).Inc()
		c.cfg.Logger.Debug("no certificate", "namespace", ns.Name, "vnode", vnode, "reason", err)
	}
	c.update(storage.Place{Namespace: ns.ID, Vnode: vnode}, func(s *placeState) {
		s.asked, s.void = time.Now(), reason
		if reason == "" {
			s.voidSince = time.Time{}
		} else if s.voidSince.IsZero() {
			s.voidSince = s.asked
		}
	})
}

// pinned returns for how long the rounds of a vnode have come to nothing: of the vnode
// that waits longest, of those that this node leads.
func (c *Collector) pinned() (longest time.Duration) {
	t := c.cfg.Fence.Topology()
	c.mu.Lock()
	defer c.mu.Unlock()
	for p, s := range c.mu.places {
		if ns := t.NamespaceByID(p.Namespace); ns != nil && !s.voidSince.IsZero() && c.leads(t, ns, p.Vnode) {
			longest = max(longest, time.Since(s.voidSince))
		}
	}
	return longest
}

// round is one try to certify that the dead records of a vnode may go.
type round struct {
	c         *Collector
	t         *topology.Topology
	namespace *topology.Namespace
	vnode     uint32
	endpoints []uint64
}

// run goes through the steps of a round.
//
// Invariant 5: between the two promises nothing at or below the timestamp was joined
// anywhere, first-hand or by a repair. So any two endpoints whose record of a key is
// still at or below it were compared, through this node, and were equal; all others
// hold newer ones.
func (r *round) run(ctx context.Context) *errVoid {
	var stable bool
	if r.endpoints, stable = r.t.Endpoints(r.vnode, r.namespace); !stable {
		return void("transition", "vnode %d is in transition", r.vnode)
	}
	if now := r.c.cfg.Fence.Topology(); mutant.On("gc-without-certificate") && now.Formed() {
		ts := hlc.At(time.Now().Add(-2 * time.Second).UnixMilli())
		if err := r.c.cfg.Store.Certify(r.namespace.ID, r.vnode, ts, r.endpoints); err != nil {
			return void("mutant", "%w", err)
		}
		return nil
	}
	for _, e := range r.endpoints {
		if !r.c.cfg.Peers.Alive(e) && !mutant.On("certificate-without-promises") {
			return void("unreachable", "%s is down", r.t.NodeName(e))
		}
	}
	states, err := r.ask(ctx, replicav1.Collect_STEP_STATE, 0)
	if err != nil {
		return err
	}
	ts, known := r.judge(states)
	if known > 0 {
		if err := r.certify(ctx, known); err != nil {
			return err
		}
	}
	if ts == 0 {
		return nil
	}
	first, err := r.ask(ctx, replicav1.Collect_STEP_PROMISE, ts)
	if err != nil {
		return err
	}
	for _, e := range r.endpoints {
		if e == r.c.cfg.Self || mutant.On("certificate-without-promises") && !r.c.cfg.Peers.Alive(e) {
			continue
		}
		if _, err := r.c.cfg.Sync(ctx, r.t, storage.Place{Namespace: r.namespace.ID, Vnode: r.vnode}, e); err != nil {
			return void("sync", "compare with %s: %w", r.t.NodeName(e), err)
		}
	}
	second, err := r.ask(ctx, replicav1.Collect_STEP_PROMISE, ts)
	if err != nil {
		return err
	}
	if err := r.confirm(ts, first, second); err != nil {
		return err
	}
	if !replica.ValidCertificate(r.c.cfg.Fence.Topology(), r.namespace.ID, r.vnode, r.endpoints) {
		return void("transition", "the endpoints of vnode %d have changed", r.vnode)
	}
	if err := r.certify(ctx, ts); err != nil {
		return err
	}
	r.c.metrics.certificates.Inc()
	return nil
}

// judge returns what a round is to be for, 0 where none is needed, and the certificate
// that some endpoint has and another has not heard of, 0 where all know the same.
func (r *round) judge(states []*replicav1.CollectResult) (ts, known hlc.Timestamp) {
	least, greatest := hlc.Max, hlc.Timestamp(0)
	for _, s := range states {
		least = min(least, hlc.Timestamp(s.GetClock()))
		greatest = max(greatest, hlc.Timestamp(s.GetCertificate()))
	}
	ts = hlc.At(least.Millis() - collectAge.Milliseconds())
	wanted := false
	for _, s := range states {
		if hlc.Timestamp(s.GetCertificate()) < greatest {
			known = greatest
		}
		oldest := hlc.Timestamp(s.GetOldestDead())
		wanted = wanted || oldest > greatest && oldest <= ts || oldest != 0 && oldest <= ts && greatest == 0
	}
	if !wanted || ts <= greatest {
		return 0, known
	}
	return ts, 0 // which is for all
}

// confirm compares what the endpoints said before and after the comparison.
func (r *round) confirm(ts hlc.Timestamp, first, second []*replicav1.CollectResult) *errVoid {
	for i, e := range r.endpoints {
		a, b := first[i], second[i]
		switch {
		case hlc.Timestamp(a.GetPromise()) < ts || hlc.Timestamp(b.GetPromise()) < ts:
			return void("promise", "%s has promised %s only", r.t.NodeName(e), hlc.Timestamp(a.GetPromise()))
		case a.GetRun() != b.GetRun():
			return void("restarted", "%s was restarted meanwhile", r.t.NodeName(e))
		case a.GetLateJoins() != b.GetLateJoins():
			return void("late_joins", "%d records up to %s were mended at %s meanwhile", b.GetLateJoins()-a.GetLateJoins(), ts, r.t.NodeName(e))
		}
	}
	return nil
}

func (r *round) certify(ctx context.Context, ts hlc.Timestamp) *errVoid {
	_, err := r.ask(ctx, replicav1.Collect_STEP_CERTIFY, ts)
	return err
}

// ask has all endpoints take a step, and returns their answers in order.
func (r *round) ask(ctx context.Context, step replicav1.Collect_Step, ts hlc.Timestamp) ([]*replicav1.CollectResult, *errVoid) {
	answers, errs := r.c.ask(ctx, r.t, r.namespace.ID, r.vnode, r.endpoints, step, ts)
	for i, err := range errs {
		if err != nil && mutant.On("certificate-without-promises") {
			answers[i], err = answers[slices.Index(r.endpoints, r.c.cfg.Self)], nil
		}
		if err != nil {
			return nil, void("unreachable", "%s: %w", r.t.NodeName(r.endpoints[i]), err)
		}
	}
	return answers, nil
}

// ask sends a step to endpoints and waits for all answers.
func (c *Collector) ask(ctx context.Context, t *topology.Topology, namespace, vnode uint32, endpoints []uint64, step replicav1.Collect_Step, ts hlc.Timestamp) ([]*replicav1.CollectResult, []error) {
	answers, errs := make([]*replicav1.CollectResult, len(endpoints)), make([]error, len(endpoints))
	deadline := time.Now().Add(stepTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	type answer struct {
		i     int
		reply *replicav1.Reply
		err   error
	}
	got := make(chan answer, len(endpoints))
	for i, e := range endpoints {
		call := &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Collect{Collect: &replicav1.Collect{
			Namespace: namespace, Vnode: vnode, Step: step, Timestamp: uint64(ts), Endpoints: endpoints,
		}}}
		err := c.cfg.Peers.Go(e, call, deadline, func(reply *replicav1.Reply, err error) { got <- answer{i, reply, err} })
		if err != nil {
			got <- answer{i, nil, err}
		}
	}
	for i := range errs {
		errs[i] = errNoAnswer
	}
	for range endpoints {
		select {
		case a := <-got:
			answers[a.i], errs[a.i] = a.reply.GetCollect(), a.err
		case <-ctx.Done():
			return answers, errs
		}
	}
	return answers, errs
}

// removeAll removes what this node's certificates let go.
func (c *Collector) removeAll(ctx context.Context) {
	type due struct {
		place storage.Place
		state storage.Collection
	}
	var all []due
	c.cfg.Store.Collections(func(namespace, vnode uint32, s storage.Collection) bool {
		if s.Certificate != 0 && time.Since(s.Learned) >= collectGrace {
			all = append(all, due{storage.Place{Namespace: namespace, Vnode: vnode}, s})
		}
		return true
	})
	slices.SortFunc(all, func(a, b due) int { return cmp.Compare(a.state.Certificate, b.state.Certificate) })
	for _, d := range all {
		s := c.update(d.place, func(*placeState) {})
		if s.learned.Equal(d.state.Learned) && time.Since(s.emptied) < recheckInterval || ctx.Err() != nil {
			continue
		}
		done, err := c.remove(ctx, d.place)
		if err != nil && ctx.Err() == nil {
			c.cfg.Logger.Warn("cannot remove dead records", "namespace_id", d.place.Namespace, "vnode", d.place.Vnode, "err", err)
		}
		if done {
			c.update(d.place, func(s *placeState) { s.learned, s.emptied = d.state.Learned, time.Now() })
		}
	}
}

// mayRemove reports whether a place's certificate is good under the topology.
func (c *Collector) mayRemove(p storage.Place) bool {
	return replica.ValidCertificate(c.cfg.Fence.Topology(), p.Namespace, p.Vnode, c.cfg.Store.Collection(p.Namespace, p.Vnode).Endpoints)
}

// remove removes a place's dead records, and reports whether nothing is left that its
// certificate lets go.
func (c *Collector) remove(ctx context.Context, p storage.Place) (done bool, err error) {
	if !c.mayRemove(p) {
		return false, nil
	}
	ranges, err := c.cfg.Store.GoneRanges(ctx, p.Namespace, p.Vnode, c.cfg.Store.Collection(p.Namespace, p.Vnode).Certificate)
	if err != nil {
		return false, err
	}
	for _, r := range ranges {
		for start := r[0]; start != nil; {
			var keys [][]byte
			if keys, start, err = c.cfg.Store.GoneKeys(p.Namespace, p.Vnode, start, r[1], removeBatch); err != nil {
				return false, err
			}
			if err := c.limiter.WaitN(ctx, len(keys)); err != nil {
				return false, err
			}
			if !c.mayRemove(p) {
				return false, nil
			}
			n, err := c.cfg.Store.Collect(p.Namespace, p.Vnode, keys)
			c.update(p, func(s *placeState) { s.removed += uint64(n) })
			if err != nil {
				return false, err
			}
		}
	}
	return true, c.compact(ctx, p)
}

// compact has the disk's space freed where much was removed.
func (c *Collector) compact(ctx context.Context, p storage.Place) error {
	removed := c.update(p, func(*placeState) {}).removed
	if removed < compactAtLeast {
		return nil
	}
	nodes, _, _, err := c.cfg.Store.Tree(ctx, p.Namespace, p.Vnode, 0, storage.Root, nil, nil, 1)
	if err != nil {
		return err
	}
	left := uint64(0)
	for _, n := range nodes {
		left += n.Records
	}
	if removed < (removed+left)/4 {
		return nil
	}
	if err := c.cfg.Store.Compact(ctx, p.Namespace, p.Vnode); err != nil {
		return err
	}
	c.metrics.compactions.Inc()
	c.update(p, func(s *placeState) { s.removed = 0 })
	return nil
}

// Void returns why this node's last round for a vnode came to nothing, or "".
func (c *Collector) Void(namespace, vnode uint32) string {
	return c.update(storage.Place{Namespace: namespace, Vnode: vnode}, func(*placeState) {}).void
}

var errNoAnswer = errors.New("did not answer in time")
