// Package coordinator serves clients' requests: it sends a write to every slot of
// its vnode and answers at a quorum, asks as many replicas as a read needs and
// mends the stale ones, and merges scans. It holds no records; its own node's
// replica is one peer among others to it. Who owns what it takes from the
// topology, who is alive from the process it runs in.
package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Peers reaches replicas and says which are alive. Whether a node is alive decides
// only whom to ask, never who owns what. See rpc.Link.Go for what Go promises.
type Peers interface {
	Go(node uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error
	Alive(node uint64) bool
}

// Config holds what a coordinator is made of. Fields without a default are
// required.
type Config struct {
	Self  uint64
	Fence *replica.Fence
	Clock *replica.Clock
	Hints *replica.Hints
	Peers Peers
	// Refresh fetches a topology of at least an epoch, from a peer (0: from anybody).
	Refresh func(ctx context.Context, epoch, peer uint64) error
	// Evict asks for the eviction of a reporting replica that holds writes up. It does not
	// block, and is called again and again. Default: nobody is asked.
	Evict func(Laggard)
	// Refuse returns why the node must not serve now, or nil.
	Refuse func() *rpc.Error
	// Stalled returns for how long no commit has been let through because flushes or
	// compactions are behind, 0 when they are not.
	Stalled func() time.Duration
	Logger  *slog.Logger
	// Metrics registers the coordinator's metrics.
	Metrics prometheus.Registerer
	// RequestTimeout bounds a request whose caller names no deadline. Default 5 s.
	RequestTimeout time.Duration
	// WriteTimeout bounds how long a replica may take to acknowledge, whether the
	// client is still waiting or not. Default 5 s.
	WriteTimeout time.Duration
	// SlowRead is after how long another replica is asked whatever the hedging
	// budget says. Default 250 ms.
	SlowRead time.Duration
	// MaxInFlightBytes bounds the writes and repairs on their way. Default 256 MiB.
	MaxInFlightBytes int64
	// MaxRequests is what the bound of the requests being served starts from, and never
	// exceeds. Default 16384.
	MaxRequests int64
	// MaxScans bounds the scans being served. Default 32.
	MaxScans int64
}

func (c *Config) setDefaults() {
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 5 * time.Second
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = 5 * time.Second
	}
	if c.SlowRead == 0 {
		c.SlowRead = 250 * time.Millisecond
	}
	if c.MaxInFlightBytes == 0 {
		c.MaxInFlightBytes = 256 << 20
	}
	if c.MaxRequests == 0 {
		c.MaxRequests = 16384
	}
	if c.MaxScans == 0 {
		c.MaxScans = 32
	}
}

// maxEpochRetries bounds how often one request follows a changing topology.
const maxEpochRetries = 5

// Coordinator serves requests. It is safe for concurrent use.
type Coordinator struct {
	cfg      Config
	requests *semaphore.Weighted // for Drain
	load     *limiter
	commits  *limiter
	scans    *semaphore.Weighted
	inflight *semaphore.Weighted
	// writing is what inflight has handed out.
	writing atomic.Int64
	// background counts work that outlives its request.
	background sync.WaitGroup
	checks     *semaphore.Weighted // repair checks beyond R
	latency    latencies
	hot        hotKeys
	traces     traces
	stats      *Stats
	metrics    *metrics
}

// New returns a coordinator. Close must be called.
func New(cfg Config) *Coordinator {
	cfg.setDefaults()
	c := &Coordinator{
		cfg:      cfg,
		requests: semaphore.NewWeighted(cfg.MaxRequests),
		load:     newLimiter(processorTarget, cfg.MaxRequests),
		commits:  newLimiter(commitTarget, cfg.MaxRequests),
		scans:    semaphore.NewWeighted(cfg.MaxScans),
		inflight: semaphore.NewWeighted(cfg.MaxInFlightBytes),
		checks:   semaphore.NewWeighted(256),
		stats:    newStats(),
		metrics:  newMetrics(cfg.Metrics),
	}
	c.traces.byID = map[uint64]*trace{}
	cfg.Metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "kvasir", Subsystem: "coordinator", Name: "hottest_key_ratio", Help: "Share of the keys asked for that is one and the same key, over the last ten seconds or so.",
	}, c.hot.hottest))
	c.describeLimits(cfg.Metrics)
	return c
}

// Close waits for the work that outlives its requests. Every replica call has a
// deadline, so this ends.
// REQUIRES: no request is running or follows.
func (c *Coordinator) Close() { c.background.Wait() }

// Stats returns the rates and latencies of requests.
func (c *Coordinator) Stats() *Stats { return c.stats }

// Drain waits until no request is being served, or ctx ends.
func (c *Coordinator) Drain(ctx context.Context) error {
	if err := c.requests.Acquire(ctx, c.cfg.MaxRequests); err != nil {
		return fmt.Errorf("requests are still being served: %w", err)
	}
	c.requests.Release(c.cfg.MaxRequests)
	return nil
}

// request is what all requests have in common.
type request struct {
	namespace string
	epoch     uint64
	token     uint64
	trace     bool
}

// begin admits a request. The caller must call end with its outcome.
func (c *Coordinator) begin(ctx context.Context, op operation, r request) (_ context.Context, end func(error), _ *rpc.Error) {
	if err := c.cfg.Refuse(); err != nil {
		return nil, nil, err
	}
	start := time.Now()
	leave, err := c.admit(ctx, op, start)
	if err != nil {
		c.metrics.refused.Inc()
		return nil, nil, err
	}
	cancel := func() {}
	if _, ok := ctx.Deadline(); !ok {
		ctx, cancel = context.WithTimeout(ctx, c.cfg.RequestTimeout)
	}
	end = func(err error) {
		cancel()
		leave()
		took := time.Since(start)
		c.stats.record(op, took, err)
		c.metrics.observe(op, took, err)
	}
	if err := c.arrive(ctx, r); err != nil {
		end(err)
		return nil, nil, err
	}
	return ctx, end, nil
}

// arrive catches up with what the client knows: its epoch and its token.
func (c *Coordinator) arrive(ctx context.Context, r request) *rpc.Error {
	if have := c.cfg.Fence.Topology().Epoch; r.epoch > have {
		if err := c.cfg.Refresh(ctx, r.epoch, 0); err != nil {
			return rpc.Errorf(codes.Unavailable, rpc.ReasonEpochAhead, "this node is at epoch %s and cannot catch up with the client's epoch %s: %s",
				topology.EpochString(have), topology.EpochString(r.epoch), err)
		}
	}
	if r.token == 0 || mutant.On("token-ignored") {
		return nil
	}
	if err := c.cfg.Clock.CheckAhead(hlc.Timestamp(r.token)); err != nil {
		err.Code = codes.InvalidArgument
		return err.With("field", "token")
	}
	if err := c.cfg.Clock.Join(hlc.Timestamp(r.token)); err != nil {
		return rpc.AsError(err)
	}
	return nil
}

// namespace finds a namespace and its topology.
func (c *Coordinator) namespace(name string) (*topology.Topology, *topology.Namespace, *rpc.Error) {
	t := c.cfg.Fence.Topology()
	if !t.Formed() {
		return nil, nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady,
			"the ring has not formed yet: %d of %d founding nodes have registered", t.DataNodes(), t.FoundingNodes)
	}
	if name == "" {
		name = topology.DefaultNamespace
	}
	ns := t.Namespace(name)
	if ns == nil {
		return nil, nil, rpc.AsError(topology.ErrNamespaceNotFound(name))
	}
	return t, ns, nil
}

// namespaceRetry is namespace, asking for a newer topology before it gives up: the
// client may have made the namespace a moment ago.
func (c *Coordinator) namespaceRetry(ctx context.Context, name string) (*topology.Topology, *topology.Namespace, *rpc.Error) {
	t, ns, err := c.namespace(name)
	if err == nil || err.Code != codes.NotFound {
		return t, ns, err
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if c.cfg.Refresh(short, c.cfg.Fence.Topology().Epoch+1, 0) != nil {
		return nil, nil, err
	}
	return c.namespace(name)
}

// quorumOf returns the quorum that a request asks for, unset for the namespace's.
func quorumOf(field, q string, ns *topology.Namespace) (quorum.Spec, *rpc.Error) {
	spec, err := quorum.Parse(q)
	if err == nil {
		err = spec.Check(ns.N)
	}
	if err != nil {
		return quorum.Spec{}, rpc.Errorf(codes.InvalidArgument, "BAD_QUORUM", "%s", err).
			With("field", field).With("value", q).With("n", ns.N).With("namespace", ns.Name)
	}
	return spec, nil
}

func checkKey(key []byte) *rpc.Error {
	if len(key) == 0 || len(key) > topology.MaxKeyBytes {
		return badRequest("key", len(key), topology.MaxKeyBytes, "key has %d bytes: want 1 to %d", len(key), topology.MaxKeyBytes)
	}
	return nil
}

func checkValue(value []byte, limit int) *rpc.Error {
	if len(value) > limit {
		return badRequest("value", len(value), limit, "value has %d bytes: the limit is %d", len(value), limit)
	}
	return nil
}

func badRequest(field string, size, limit int, format string, args ...any) *rpc.Error {
	return rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, format, args...).
		With("field", field).With("size", size).With("limit", limit)
}

// follow runs one attempt after the other while replicas tell of a newer topology.
// attempt returns the newer epoch that a replica refused it by, and which replica
// that was, or zero.
func (c *Coordinator) follow(ctx context.Context, attempt func() (stale, by uint64, err *rpc.Error)) *rpc.Error {
	for tries := 0; ; tries++ {
		epoch, peer, err := attempt()
		if epoch == 0 || tries == maxEpochRetries {
			return err
		}
		c.metrics.staleEpoch.Inc()
		if rerr := c.cfg.Refresh(ctx, epoch, peer); rerr != nil {
			return err
		}
	}
}

// refusedEpoch returns the epoch by which a replica refused a call, or zero.
func refusedEpoch(err error) uint64 {
	var e *rpc.Error
	if !errors.As(err, &e) || e.Reason != rpc.ReasonStaleEpoch && e.Reason != rpc.ReasonNotOwner {
		return 0
	}
	var epoch uint64
	if _, err := fmt.Sscan(e.Details["epoch"], &epoch); err != nil {
		return 0
	}
	return epoch
}

func (c *Coordinator) chance(p float64) bool { return p > 0 && rand.Float64() < p }

// Trace returns the timeline of a traced request, after waiting for its late
// replicas.
func (c *Coordinator) Trace(ctx context.Context, r *kvv1.TraceRequest) (*kvv1.TraceResponse, error) {
	tr := c.traces.get(r.GetTraceId())
	if tr == nil {
		return nil, rpc.Errorf(codes.NotFound, "TRACE_NOT_FOUND", "there is no trace %x any more: this node keeps the newest %d", r.GetTraceId(), maxTraces)
	}
	wait := min(time.Duration(r.GetWaitMs())*time.Millisecond, maxTraceWait)
	select {
	case <-tr.done:
	case <-ctx.Done():
	case <-time.After(wait):
	}
	events, complete := tr.snapshot()
	return &kvv1.TraceResponse{Events: events, Complete: complete}, nil
}

// InFlight says how much a coordinator has to do, and its bounds.
type InFlight struct {
	Requests, MaxRequests     int64
	Limit                     int64 // of requests, at present
	WriteBytes, MaxWriteBytes int64
}

// InFlight returns what is being served now.
func (c *Coordinator) InFlight() InFlight {
	return InFlight{
		Requests: c.load.busy.Load(), MaxRequests: c.cfg.MaxRequests, Limit: c.load.limit.Load(),
		WriteBytes: c.writing.Load(), MaxWriteBytes: c.cfg.MaxInFlightBytes,
	}
}
