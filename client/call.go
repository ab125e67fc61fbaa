package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Pauses between rounds over all candidates, doubled from the first to the last.
const (
	minPause = 20 * time.Millisecond
	maxPause = 400 * time.Millisecond
)

// request is one call on its way through attempts.
type request struct {
	// make returns a fresh message for an attempt; messages are not shared.
	make func(epoch, token uint64) *kvv1.SessionCall
	// key routes; nil goes to any node.
	key       []byte
	namespace string
	// retry allows a second attempt when the first may have had an effect.
	retry bool
	// hedge allows a second attempt while the first is under way.
	hedge bool
	// writes tells that a failed attempt may leave something behind.
	writes bool
	// only, when set, is the one address to ask.
	only string
	// replica, when set, is the node whose own copy is read, whoever passes it on.
	replica string
}

// answered is a reply with where it came from.
type answered struct {
	reply   *kvv1.SessionReply
	address string
	// maybeDone tells that an earlier attempt may have written something.
	maybeDone bool
}

// withDeadline gives a context that has no deadline the client's.
func (c *Client) withDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.cfg.timeout)
}

// do runs a request until it succeeds, fails for good, or its time is over.
func (c *Client) do(ctx context.Context, req request) (answered, error) {
	ctx, cancel := c.withDeadline(ctx)
	defer cancel()
	c.budget.earn()
	var failure *rpc.Error
	var failedAt string // who said so
	maybeDone := false  // an attempt may have written something
	pause := minPause
	began := time.Now()
	for {
		refused := 0 // for want of live replicas, in this round
		for _, address := range c.candidates(req) {
			a, err := c.attempt(ctx, req, address)
			if err == nil {
				a.maybeDone = maybeDone
				return a, nil
			}
			if err == ErrClosed {
				if maybeDone {
					err = fmt.Errorf("%w: %w", ErrClosed, ErrOutcomeUnknown)
				}
				return answered{}, err
			}
			e := rpc.AsError(err)
			maybeDone = maybeDone || req.writes && mayHaveWritten(e)
			if telling(e) >= telling(failure) {
				failure, failedAt = e, address
			}
			if e.Reason == rpc.ReasonNotEnoughReplicas {
				refused++
			}
			if ctx.Err() != nil {
				return answered{}, c.timedOut(ctx, failure, failedAt, maybeDone)
			}
			// Asking again makes no owner of a node that is named.
			final := req.replica != "" && e.Reason == rpc.ReasonNotOwner
			if final || !retriable(e, req.retry) || !c.budget.spend() {
				return answered{}, publicError(failure, failedAt, maybeDone)
			}
			if e.RetryAfter > 0 {
				break // the node says when, not where
			}
		}
		if refused > 0 && failure.Reason == rpc.ReasonNotEnoughReplicas && time.Since(began) >= c.cfg.patience {
			return answered{}, publicError(failure, failedAt, maybeDone)
		}
		wait := pause/2 + rand.N(pause)
		if failure != nil {
			wait = max(wait, failure.RetryAfter)
		}
		pause = min(2*pause, maxPause)
		select {
		case <-ctx.Done():
			return answered{}, c.timedOut(ctx, failure, failedAt, maybeDone)
		case <-time.After(wait):
		}
	}
}

// telling ranks failures by how much they say about the request.
func telling(e *rpc.Error) int {
	switch {
	case e == nil:
		return 0
	case e.Reason == rpc.ReasonNotSent, e.Reason == rpc.ReasonLinkBroken, e.Reason == rpc.ReasonWrongPeer:
		return 1 // also of an endpoint that is no data node of the cluster
	case e.Reason == rpc.ReasonNotReady, e.Reason == rpc.ReasonStopping:
		return 2
	}
	return 3
}

// timedOut is the error of a request whose time is over: what failed last, and that
// there was no time for more.
func (c *Client) timedOut(ctx context.Context, failure *rpc.Error, failedAt string, maybeDone bool) error {
	e := rpc.AsError(ctx.Err())
	if failure != nil && failure.Code != codes.DeadlineExceeded && failure.Code != codes.Canceled {
		last := *failure
		last.Message = e.Message + "; last failure: " + failure.Message
		e = &last
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return publicError(e, failedAt, maybeDone, context.Canceled)
	}
	return publicError(e, failedAt, maybeDone, ErrTimeout, context.DeadlineExceeded)
}

// mayHaveWritten reports whether a write that failed may have left something behind.
func mayHaveWritten(e *rpc.Error) bool {
	return !e.NothingDone() && e.Code != codes.InvalidArgument && e.Code != codes.NotFound
}

// retriable reports whether another attempt may be made after a failure.
func retriable(e *rpc.Error, idempotent bool) bool {
	switch e.Code {
	case codes.InvalidArgument:
		// A token may be ahead of one node's clock and not of another's.
		return e.Reason == rpc.ReasonClockSkew
	case codes.NotFound, codes.FailedPrecondition, codes.Canceled, codes.AlreadyExists, codes.Unimplemented:
		return e.NothingDone()
	case codes.DataLoss, codes.Internal:
		return idempotent && e.Reason == rpc.ReasonCorrupt
	}
	return idempotent || e.NothingDone()
}

// candidates returns the addresses to try, the best first: replicas of the key that
// answer, other nodes that do, then those of which nothing good is known.
func (c *Client) candidates(req request) []string {
	if req.only != "" {
		return []string{req.only}
	}
	v := c.view.Load()
	var out []candidate
	add := func(address string, distance int, unhealthy bool) {
		if slices.ContainsFunc(out, func(o candidate) bool { return o.address == address }) {
			return
		}
		cand := candidate{address: address, rank: distance, tie: rand.Uint32()}
		l := c.known(address)
		switch {
		case l == nil:
			cand.rank += 1 // unknown: worth a try, after a replica known to answer
		case l.Up():
			cand.load = l.Pending()
		default:
			select {
			case <-l.Ready():
				cand.rank += 8 // known not to answer
			default:
				cand.rank += 1
			}
		}
		if unhealthy {
			cand.rank += 4
		}
		out = append(out, cand)
	}
	t := v.topology
	if req.key != nil && t.Formed() {
		n := t.Width()
		if ns := t.Namespace(req.namespace); ns != nil {
			n = ns.N
		}
		for _, s := range t.Slots(t.VnodeOf(req.key), n) {
			if node := t.Node(s.Read); node != nil {
				add(node.Address, 0, v.unhealthy[node.Incarnation])
			}
		}
	}
	reporting := map[string]bool{}
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Role == topology.Reporting {
			reporting[n.Address] = true
			continue
		}
		add(n.Address, 2, v.unhealthy[n.Incarnation])
	}
	for _, e := range c.endpoints {
		if !reporting[e] {
			add(e, 3, false)
		}
	}
	slices.SortFunc(out, candidate.compare)
	addresses := make([]string, len(out))
	for i, o := range out {
		addresses[i] = o.address
	}
	return addresses
}

type candidate struct {
	address string
	rank    int
	load    int
	tie     uint32
}

func (a candidate) compare(b candidate) int {
	switch {
	case a.rank != b.rank:
		return a.rank - b.rank
	case a.load != b.load:
		return a.load - b.load
	case a.tie < b.tie:
		return -1
	}
	return 1
}

// hedgeAfter is how long a get may take before another node is asked too.
const hedgeAfter = 150 * time.Millisecond

// attempt sends a request to one address, and to a second one if it may and the
// first is late.
func (c *Client) attempt(ctx context.Context, req request, address string) (answered, error) {
	if !req.hedge {
		return c.send(ctx, req, address)
	}
	type outcome struct {
		answered
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	outcomes := make(chan outcome, 2)
	launch := func(address string) {
		a, err := c.send(ctx, req, address)
		outcomes <- outcome{a, err}
	}
	go launch(address)
	late := time.NewTimer(hedgeAfter)
	defer late.Stop()
	running := 1
	for {
		select {
		case o := <-outcomes:
			running--
			if o.err == nil || running == 0 {
				return o.answered, o.err
			}
		case <-late.C:
			others := c.candidates(req)
			i := slices.IndexFunc(others, func(a string) bool { return a != address })
			if i >= 0 && c.budget.spend() {
				running++
				go launch(others[i])
			}
		}
	}
}

// send sends a request to one address and takes in what the reply tells.
func (c *Client) send(ctx context.Context, req request, address string) (answered, error) {
	l, err := c.link(address)
	if err != nil {
		return answered{}, err
	}
	epoch := c.view.Load().topology.Epoch
	reply, err := l.Do(ctx, req.make(epoch, c.token.Load()))
	if err != nil {
		if unimplemented(err) {
			err = rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "%s serves no keys", address)
		}
		return answered{}, err
	}
	newer, seen := facts(reply)
	if newer > c.view.Load().topology.Epoch {
		c.refresh(address)
	}
	for {
		have := c.token.Load()
		if seen <= have || c.token.CompareAndSwap(have, seen) {
			break
		}
	}
	return answered{reply: reply, address: address}, nil
}

// facts returns the epoch a reply was served in and the greatest timestamp in it.
func facts(r *kvv1.SessionReply) (epoch, timestamp uint64) {
	var receipt *kvv1.Receipt
	switch m := r.GetResponse().(type) {
	case *kvv1.SessionReply_Put:
		receipt = m.Put.GetReceipt()
	case *kvv1.SessionReply_Get:
		receipt = m.Get.GetReceipt()
	case *kvv1.SessionReply_Delete:
		receipt = m.Delete.GetReceipt()
	case *kvv1.SessionReply_Batch:
		for _, res := range m.Batch.GetResults() {
			timestamp = max(timestamp, res.GetVersion().GetTimestamp())
		}
		return m.Batch.GetEpoch(), timestamp
	case *kvv1.SessionReply_Scan:
		for _, rec := range m.Scan.GetRecords() {
			timestamp = max(timestamp, rec.GetVersion().GetTimestamp())
		}
		return m.Scan.GetEpoch(), timestamp
	}
	return receipt.GetEpoch(), receipt.GetVersion().GetTimestamp()
}
