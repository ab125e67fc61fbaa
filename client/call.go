package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
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
	// class is of requests that take about as long, to compare addresses by.
	class class
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
		for address := range c.round(req) {
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
			c.avoid(address, e)
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
		if failure != nil && failure.RetryAfter > 0 {
			wait = max(wait, failure.RetryAfter+rand.N(failure.RetryAfter)) // not all that were refused come back at once
		}
		pause = min(2*pause, maxPause)
		select {
		case <-ctx.Done():
			return answered{}, c.timedOut(ctx, failure, failedAt, maybeDone)
		case <-time.After(wait):
		}
	}
}

// avoidFor is how long a node that says it does not serve is asked after all others. It
// refuses at once, so it has the fewest calls under way, and would be asked most.
const avoidFor = time.Second

// avoid notes what a failure says of whom to ask.
func (c *Client) avoid(address string, e *rpc.Error) {
	switch e.Reason {
	case rpc.ReasonStopping, rpc.ReasonNotReady:
		c.avoided.Store(address, time.Now().Add(avoidFor))
	case rpc.ReasonOverloaded:
		c.avoided.Store(address, time.Now().Add(e.RetryAfter))
	}
}

// avoids reports whether an address is to be asked after all others.
func (c *Client) avoids(address string) bool {
	until, ok := c.avoided.Load(address)
	return ok && time.Now().Before(until.(time.Time))
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

// round yields the addresses to try in turn. The first is mostly all that is needed, and the
// others are looked for only when it has failed.
func (c *Client) round(req request) iter.Seq[string] {
	return func(yield func(string) bool) {
		first := c.nearest(req)
		if first != "" && !yield(first) {
			return
		}
		for _, address := range c.candidates(req) {
			if address != first && !yield(address) {
				return
			}
		}
	}
}

// nearest returns the first of the candidates, if that is a replica of the key which is
// known to answer, or "".
func (c *Client) nearest(req request) (address string) {
	v := c.view.Load()
	if req.only != "" || req.key == nil || !v.topology.Formed() {
		return req.only
	}
	now := time.Now()
	var few [8]candidate
	all := few[:0]
	c.replicas(v, req, func(n *topology.Node) {
		l := c.known(n.Address)
		if l == nil && c.view.Load() == v {
			l, _ = c.link(n.Address) // all replicas share the load, those too that were not asked yet
		}
		if l == nil || !l.Up() || v.unhealthy[n.Incarnation] || c.avoids(n.Address) {
			return
		}
		all = append(all, candidate{address: n.Address, load: float64(l.Pending()), pace: l.paces[req.class].now(now), tie: rand.Uint32()})
	})
	if len(all) == 0 {
		return ""
	}
	weigh(all)
	return slices.MinFunc(all, candidate.compare).address
}

// replicas visits the nodes that are read for a key.
func (c *Client) replicas(v *view, req request, visit func(*topology.Node)) {
	t := v.topology
	n := t.Width()
	if ns := t.Namespace(req.namespace); ns != nil {
		n = ns.N
	}
	for _, s := range t.Slots(t.VnodeOf(req.key), n) {
		if node := t.Node(s.Read); node != nil {
			visit(node)
		}
	}
}

// candidates returns the addresses to try, the best first: replicas of the key that
// answer, other nodes that do, then those of which nothing good is known.
func (c *Client) candidates(req request) []string {
	if req.only != "" {
		return []string{req.only}
	}
	v := c.view.Load()
	now := time.Now()
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
			cand.load, cand.pace = float64(l.Pending()), l.paces[req.class].now(now)
		default:
			select {
			case <-l.Ready():
				cand.rank += 8 // known not to answer
			default:
				cand.rank += 1
			}
		}
		if unhealthy || c.avoids(address) {
			cand.rank += 4
		}
		out = append(out, cand)
	}
	t := v.topology
	if req.key != nil && t.Formed() {
		c.replicas(v, req, func(n *topology.Node) { add(n.Address, 0, v.unhealthy[n.Incarnation]) })
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
	weigh(out)
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
	load    float64 // calls under way
	pace    float64
	tie     uint32
}

func (a candidate) compare(b candidate) int {
	switch {
	case a.rank != b.rank:
		return a.rank - b.rank
	case a.load != b.load:
		return cmp.Compare(a.load, b.load)
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
	deadline, _ := ctx.Deadline()
	var t tries
	defer t.forget()
	if err := t.start(c, req, address, deadline); err != nil {
		return answered{}, err
	}
	late := time.NewTimer(hedgeAfter)
	defer late.Stop()
	for running := 1; ; {
		select {
		case o := <-t.outcomes:
			running--
			if o.err == nil || running == 0 {
				return c.take(o.reply, o.address, o.err)
			}
		case <-late.C:
			t.links[0].note(req.class, hedgeAfter) // at least; nobody may be there when it is known
			others := c.candidates(req)
			i := slices.IndexFunc(others, func(a string) bool { return a != address })
			if i >= 0 && c.budget.spend() && t.start(c, req, others[i], deadline) == nil {
				running++
			}
		case <-ctx.Done():
			return answered{}, rpc.AsError(ctx.Err())
		}
	}
}

// tries are the calls of one attempt, two at most.
type tries struct {
	outcomes chan outcome
	links    [2]*link
	calls    [2]uint64
	n        int
}

type outcome struct {
	reply   *kvv1.SessionReply
	address string
	err     error
}

func (t *tries) start(c *Client, req request, address string, deadline time.Time) error {
	l, err := c.link(address)
	if err != nil {
		return err
	}
	if t.outcomes == nil {
		t.outcomes = make(chan outcome, len(t.calls))
	}
	outcomes, began, class := t.outcomes, time.Now(), l.paced(req.class)
	id, err := l.Start(c.message(req), deadline, func(reply *kvv1.SessionReply, err error) {
		if err == nil {
			l.note(class, time.Since(began))
		}
		outcomes <- outcome{reply, address, err}
	})
	if err != nil {
		return err
	}
	t.links[t.n], t.calls[t.n] = l, id
	t.n++
	return nil
}

// forget gives up what has not been answered.
func (t *tries) forget() {
	for i := range t.n {
		t.links[i].Forget(t.calls[i])
	}
}

// message returns the message of an attempt.
func (c *Client) message(req request) *kvv1.SessionCall {
	return req.make(c.view.Load().topology.Epoch, c.token.Load())
}

// send sends a request to one address and takes in what the reply tells.
func (c *Client) send(ctx context.Context, req request, address string) (answered, error) {
	l, err := c.link(address)
	if err != nil {
		return answered{}, err
	}
	began, class := time.Now(), l.paced(req.class)
	reply, err := l.Do(ctx, c.message(req))
	if err == nil {
		l.note(class, time.Since(began))
	}
	return c.take(reply, address, err)
}

// take takes in what a reply tells.
func (c *Client) take(reply *kvv1.SessionReply, address string, err error) (answered, error) {
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
