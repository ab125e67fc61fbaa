// Package antientropy makes the replicas of a vnode equal again after anything that
// hints and reads have missed: it compares hash trees, vnode by vnode, and exchanges
// only what differs. It never decides who owns what, and joins records like everybody
// else. DESIGN.md beside it has the protocol.
package antientropy

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Peers reaches replicas and says which are alive. See rpc.Link.Go for what Go
// promises.
type Peers interface {
	Go(node uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error
	Alive(node uint64) bool
}

// Config holds what a repairer is made of. Fields without a default are required.
type Config struct {
	Self    uint64
	Fence   *replica.Fence
	Store   *storage.Store
	Peers   Peers
	Logger  *slog.Logger
	Metrics prometheus.Registerer
	// Clock is this node's hybrid clock.
	Clock func() hlc.Timestamp
	// Cycle is how long a round over all vnodes takes when nothing differs. Default
	// 60 s; at least 20 ms a vnode.
	Cycle time.Duration
	// BytesPerSecond bounds what is read for hash trees, listed and mended. Default
	// 32 MiB.
	BytesPerSecond int
}

// leastStep is the least time from one vnode to the next in a round.
const leastStep = 20 * time.Millisecond

// Repairer compares the vnodes that this node leads with their other replicas, round
// after round.
type Repairer struct {
	cfg     Config
	limiter *rate.Limiter
	metrics *metrics
	// paid is how many of the bytes read for hash trees, for others too, have been
	// waited for. Run's.
	paid uint64
	// wake holds a token when there is a reason not to wait.
	wake chan struct{}
	mu   struct {
		sync.Mutex
		paused bool
		// hurried: the present round does not pause between vnodes.
		hurried        bool
		places         map[storage.Place]*PlaceStatus
		rounds         uint64
		sent, received uint64
		// began is when the present round did, ended and took are the last one's.
		began, ended time.Time
		took         time.Duration
	}
}

// New returns a repairer. Run does the work.
func New(cfg Config) *Repairer {
	if cfg.Cycle == 0 {
		cfg.Cycle = time.Minute
	}
	if cfg.BytesPerSecond == 0 {
		cfg.BytesPerSecond = 32 << 20
	}
	r := &Repairer{
		cfg:     cfg,
		limiter: rate.NewLimiter(rate.Limit(cfg.BytesPerSecond), max(cfg.BytesPerSecond, 4<<20)),
		metrics: newMetrics(cfg.Metrics, cfg.Store),
		wake:    make(chan struct{}, 1),
	}
	r.mu.places = map[storage.Place]*PlaceStatus{}
	return r
}

// pace returns when so many bytes may travel.
func (r *Repairer) pace(ctx context.Context, bytes int) error {
	for ; bytes > 0; bytes -= r.limiter.Burst() {
		if err := r.limiter.WaitN(ctx, min(bytes, r.limiter.Burst())); err != nil {
			return err
		}
	}
	return nil
}

// payReads waits for what has been read for hash trees since it did so last: after a
// start that is all that is stored.
func (r *Repairer) payReads(ctx context.Context) {
	read := r.cfg.Store.TreeBytesRead()
	due := read - r.paid
	r.paid = read
	r.pace(ctx, int(due)) // fails when ctx ends, which Run sees
}

// Start ends a pause and begins a round at once, without waiting between vnodes.
func (r *Repairer) Start() { r.set(false, true) }

// Pause stops comparing, after the vnode that is being compared, until Start or the
// next start of the process.
func (r *Repairer) Pause() { r.set(true, false) }

func (r *Repairer) set(paused, hurried bool) {
	r.mu.Lock()
	r.mu.paused, r.mu.hurried = paused, hurried
	r.mu.Unlock()
	r.Wake()
}

// Paused reports whether comparing is paused.
func (r *Repairer) Paused() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.paused
}

// Wake has dirty vnodes looked for at once.
func (r *Repairer) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run compares until ctx ends.
func (r *Repairer) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		places := r.led()
		step := max(leastStep, r.cfg.Cycle/time.Duration(max(1, len(places))))
		r.begin(places)
		ended := true
		for _, p := range places {
			if ended = r.wait(ctx, step); !ended {
				break
			}
			r.pass(ctx, p)
		}
		if len(places) == 0 {
			r.calm() // what Start began has ended: there is nothing to compare
			r.wait(ctx, time.Second)
		} else if ended {
			r.end()
		}
	}
	return nil
}

// wait returns when the next vnode's turn has come; dirty ones take theirs meanwhile.
// It reports false when the round is to begin anew or ctx has ended.
func (r *Repairer) wait(ctx context.Context, step time.Duration) bool {
	timer := time.NewTimer(step)
	defer timer.Stop()
	for {
		r.mu.Lock()
		paused, hurried := r.mu.paused, r.mu.hurried
		r.mu.Unlock()
		if !paused {
			r.cleanse(ctx)
			if hurried {
				return ctx.Err() == nil
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			if !paused {
				return true
			}
			timer.Reset(step)
		case <-r.wake:
			r.mu.Lock()
			restart := r.mu.hurried && !hurried
			r.mu.Unlock()
			if restart {
				return false
			}
		}
	}
}

// led returns the places whose comparison is this node's to do, those that waited
// longest first.
func (r *Repairer) led() []storage.Place {
	t := r.cfg.Fence.Topology()
	var out []storage.Place
	for i := range t.Namespaces {
		for v := range t.Ring {
			if r.leader(t, uint32(v), &t.Namespaces[i]) == r.cfg.Self {
				out = append(out, storage.Place{Namespace: t.Namespaces[i].ID, Vnode: uint32(v)})
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	at := func(p storage.Place) time.Time {
		if s := r.mu.places[p]; s != nil {
			return s.At
		}
		return time.Time{}
	}
	slices.SortStableFunc(out, func(a, b storage.Place) int { return at(a).Compare(at(b)) })
	return out
}

// leader returns which of a vnode's endpoints compares it with the others: the first
// that lives, beginning at another one for every vnode. Two that both think they lead
// do no harm.
func (r *Repairer) leader(t *topology.Topology, vnode uint32, ns *topology.Namespace) uint64 {
	nodes, _ := t.Endpoints(vnode, ns)
	for i := range nodes {
		if e := nodes[(i+int(vnode))%len(nodes)]; r.cfg.Peers.Alive(e) {
			return e
		}
	}
	return 0
}

// cleanse compares the places that are marked dirty, whoever leads them: the mark is
// this node's.
func (r *Repairer) cleanse(ctx context.Context) {
	for _, d := range r.cfg.Store.Dirty() {
		t := r.cfg.Fence.Topology()
		ns := t.NamespaceByID(d.Namespace)
		switch {
		case ctx.Err() != nil || !t.Formed():
			return
		case ns == nil || !t.Holds(r.cfg.Self, d.Vnode, ns):
			// Those who hold the vnode compare it in their rounds.
			r.metrics.foreign.Inc()
		case !r.due(d.Place) || !r.pass(ctx, d.Place):
			continue
		}
		if err := r.cfg.Store.ClearDirty(d); err != nil {
			r.cfg.Logger.Warn("cannot clear a dirty mark", "err", err)
		}
	}
}

// retryDirty is how long a dirty place that could not be compared with all its
// replicas waits for the next try.
const retryDirty = 5 * time.Second

// due reports whether a dirty place may be tried again.
func (r *Repairer) due(p storage.Place) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.mu.places[p]
	return s == nil || s.State != Failed || time.Since(s.At) >= retryDirty
}

// pass compares a place with every other endpoint, and reports whether all of them
// were compared. It returns when the next may be begun.
func (r *Repairer) pass(ctx context.Context, p storage.Place) (complete bool) {
	defer r.payReads(ctx)
	t := r.cfg.Fence.Topology()
	ns := t.NamespaceByID(p.Namespace)
	if ns == nil || !t.Holds(r.cfg.Self, p.Vnode, ns) {
		return false
	}
	r.note(p, func(s *PlaceStatus) { s.State = Running })
	nodes, _ := t.Endpoints(p.Vnode, ns)
	state, reason, differences, records := Equal, "", 0, uint64(0)
	for _, peer := range nodes {
		if peer == r.cfg.Self {
			continue
		}
		if !r.cfg.Peers.Alive(peer) {
			state, reason = Failed, t.NodeName(peer)+" is down"
			continue
		}
		out, err := r.Sync(ctx, t, p, peer)
		differences += out.Sent + out.Received
		records = max(records, out.Records)
		switch {
		case err != nil:
			state, reason = Failed, err.Error()
			r.metrics.failed.Inc()
			r.cfg.Logger.Debug("comparing replicas failed", "namespace", ns.Name, "vnode", p.Vnode, "peer", t.NodeName(peer), "err", err)
		case !out.Equal && state == Equal:
			state = Mended
		}
		if out.Sent+out.Received > 0 {
			r.cfg.Logger.Info("replicas mended", "namespace", ns.Name, "vnode", p.Vnode, "peer", t.NodeName(peer), "sent", out.Sent, "received", out.Received)
		}
	}
	r.metrics.passes.Inc()
	r.note(p, func(s *PlaceStatus) {
		s.State, s.Reason, s.Records, s.At = state, reason, records, time.Now()
		s.Differences += uint64(differences)
	})
	return state != Failed
}

// begin notes that a round begins, and forgets places that this node does not lead
// any more.
func (r *Repairer) begin(places []storage.Place) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.began = time.Now()
	led := make(map[storage.Place]bool, len(places))
	for _, p := range places {
		led[p] = true
		if r.mu.places[p] == nil {
			r.mu.places[p] = &PlaceStatus{Place: p, State: Waiting}
		}
	}
	for p := range r.mu.places {
		if !led[p] {
			delete(r.mu.places, p)
		}
	}
}

// mended counts records that were sent and received.
func (r *Repairer) mended(sent, received int) {
	r.metrics.sent.Add(float64(sent))
	r.metrics.received.Add(float64(received))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.sent += uint64(sent)
	r.mu.received += uint64(received)
}

func (r *Repairer) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.rounds++
	r.mu.hurried = false
	r.mu.ended = time.Now()
	r.mu.took = r.mu.ended.Sub(r.mu.began)
}

func (r *Repairer) calm() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.hurried = false
}

func (r *Repairer) note(p storage.Place, change func(*PlaceStatus)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.mu.places[p]
	if s == nil {
		s = &PlaceStatus{Place: p}
		r.mu.places[p] = s
	}
	change(s)
}

// State is how the last comparison of a place ended.
type State int

// The states of places.
const (
	Waiting State = iota + 1
	Running
	Equal
	Mended
	Failed
)

// PlaceStatus is what is known of a place that this node compares.
type PlaceStatus struct {
	storage.Place
	State  State
	Reason string
	// At is when the last comparison ended.
	At time.Time
	// Records is how many this node holds, Differences how many were mended since the
	// process started.
	Records, Differences uint64
}

// Status says how far repair has come.
type Status struct {
	Paused bool
	Rounds uint64
	// Ended is when the last round ended, Took how long it took.
	Ended time.Time
	Took  time.Duration
	// Sent and Received count the records that were mended since the process started.
	Sent, Received uint64
	// Places is in order.
	Places []PlaceStatus
}

// Status returns how far repair has come.
func (r *Repairer) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{Paused: r.mu.paused, Rounds: r.mu.rounds, Ended: r.mu.ended, Took: r.mu.took, Sent: r.mu.sent, Received: r.mu.received}
	for _, p := range r.mu.places {
		s.Places = append(s.Places, *p)
	}
	slices.SortFunc(s.Places, func(a, b PlaceStatus) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Vnode, b.Vnode))
	})
	return s
}
