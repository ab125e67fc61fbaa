package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// LinkConfig says whom a link leads to and what it puts up with.
type LinkConfig struct {
	Transport Transport
	Address   string
	// Peer names the other side in errors.
	Peer string
	// Metadata is sent when the stream opens. May be nil.
	Metadata func() metadata.MD
	// Greeted checks the metadata the other side answers with. May be nil.
	Greeted func(metadata.MD) error
	// MaxPending bounds the calls without a reply; more are refused. Default 16384.
	MaxPending int
	// OpenTimeout bounds one attempt to connect. Default 1 s.
	OpenTimeout time.Duration
	// PingInterval is how often the other side is pinged; less than StallAfter, or its
	// silence is noticed late. Default 1 s.
	PingInterval time.Duration
	// StallAfter is how long the other side may owe replies without sending any,
	// before it counts as gone. Default 1.5 s.
	StallAfter time.Duration
	// StartWithin, when above zero, is how long after it was sent a call may begin at
	// the peer. It must be shorter than StallAfter.
	StartWithin time.Duration
	// WallClock returns milliseconds since 1970.
	WallClock func() int64
	// Offset, when set, is told how far the other side's wall clock is ahead, and the
	// round trip it was measured by.
	Offset func(ahead, roundTrip time.Duration)
}

func (c *LinkConfig) setDefaults() {
	if c.MaxPending == 0 {
		c.MaxPending = 16384
	}
	if c.OpenTimeout == 0 {
		c.OpenTimeout = time.Second
	}
	if c.PingInterval == 0 {
		c.PingInterval = time.Second
	}
	if c.StallAfter == 0 {
		c.StallAfter = 1500 * time.Millisecond
	}
}

// Backoff between attempts to connect, doubled from the first to the last.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = time.Second
)

// Link carries calls to one peer over one stream that it opens, watches and opens
// again. It is safe for concurrent use.
type Link[C, R any] struct {
	cfg   LinkConfig
	proto Protocol[C, R]
	// up is whether the other side answers at the moment.
	up atomic.Bool
	// born is when the peer's process began, by this process's clock in nanoseconds
	// since made; 0 while that is not known.
	born   atomic.Int64
	uptime uptime
	made   time.Time
	ready  chan struct{} // closed when the first attempt to connect has ended
	retry  chan struct{} // holds a token when the next attempt should not wait
	sooner chan struct{} // holds a token when watch should look before it meant to

	mu struct {
		sync.Mutex
		queue   *queue[*pending[C, R]] // nil while no stream is open or opening
		pending map[uint64]*pending[C, R]
		nextID  uint64
		conn    *grpc.ClientConn
		closed  bool
		lastErr error
		// stream is the open one, nil while there is none.
		stream ClientStream[C, R]
		// owed is how many replies the stream owes, also to calls that were given up.
		owed int
		// look is when watch means to look next at what is pending.
		look time.Time
	}
	// sending is held by whoever takes a frame off the queue until it is sent.
	sending turn
	cancel  context.CancelFunc
	stopped sync.WaitGroup
}

// pending is a call without a reply.
type pending[C, R any] struct {
	id       uint64
	call     C
	size     int
	deadline time.Time
	sentAt   time.Time // zero while in the queue
	done     func(R, error)
}

// NewLink starts a link. Close must be called.
func NewLink[C, R any](cfg LinkConfig, proto Protocol[C, R]) *Link[C, R] {
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	l := &Link[C, R]{cfg: cfg, proto: proto, cancel: cancel, made: time.Now(), sending: newTurn(), ready: make(chan struct{}), retry: make(chan struct{}, 1), sooner: make(chan struct{}, 1)}
	l.mu.pending = map[uint64]*pending[C, R]{}
	l.mu.queue = newQueue[*pending[C, R]]()
	l.stopped.Go(func() { l.run(ctx) })
	return l
}

// Up reports whether the other side answers at the moment.
func (l *Link[C, R]) Up() bool { return l.up.Load() }

// Ready is closed once the first attempt to connect has ended, well or not.
func (l *Link[C, R]) Ready() <-chan struct{} { return l.ready }

// Retry has a link that is down connect at once: there is a sign that the peer is
// back.
func (l *Link[C, R]) Retry() {
	if !l.Up() {
		signal(l.retry)
	}
}

// Address returns where the link leads to.
func (l *Link[C, R]) Address() string { return l.cfg.Address }

// Pending returns how many calls wait for a reply.
func (l *Link[C, R]) Pending() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.mu.pending)
}

// Conn returns the connection the link uses now, for unary calls to the same peer,
// or nil.
func (l *Link[C, R]) Conn() *grpc.ClientConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.conn
}

// Go sends a call and returns at once. When it returns nil, done is called exactly
// once, from a goroutine of the link: it must not block. Errors, whether returned
// or given to done, are *Error; ReasonNotSent and ReasonOverloaded mean that the
// peer never saw the call.
func (l *Link[C, R]) Go(call C, deadline time.Time, done func(R, error)) error {
	_, err := l.Start(call, deadline, done)
	return err
}

// Start is Go; it returns the call's number, for Forget.
func (l *Link[C, R]) Start(call C, deadline time.Time, done func(R, error)) (uint64, error) {
	p := &pending[C, R]{call: call, size: l.proto.Size(call), deadline: deadline, done: done}
	l.mu.Lock()
	q := l.mu.queue
	switch {
	case q == nil:
		err := l.mu.lastErr
		l.mu.Unlock()
		return 0, l.notSent(err)
	case len(l.mu.pending) >= l.cfg.MaxPending:
		l.mu.Unlock()
		return 0, &Error{
			Code: codes.ResourceExhausted, Reason: ReasonOverloaded, RetryAfter: 50 * time.Millisecond,
			Message: fmt.Sprintf("%d calls to %s wait for replies already", l.cfg.MaxPending, l.cfg.Peer),
			Details: map[string]string{"limit": fmt.Sprint(l.cfg.MaxPending), "peer": l.cfg.Peer},
		}
	}
	l.mu.nextID++
	p.id = l.mu.nextID
	l.mu.pending[p.id] = p
	sooner := deadline.Add(giveUpAfter).Before(l.mu.look)
	// The only call of a stream that owes nothing has the connection to itself: it cannot
	// be held up, and there is nothing it might travel with.
	stream := l.mu.stream
	if len(l.mu.pending) > 1 || l.mu.owed > 0 || p.size > maxInline {
		stream = nil
	}
	l.mu.Unlock()
	if sooner {
		signal(l.sooner)
	}
	ok := false
	if stream != nil {
		_, ok = q.add(p)
		l.flush(stream, q)
	} else {
		ok = q.push(p)
	}
	if !ok {
		// The stream ended in between, and failed all pending calls, this one too
		// unless it came too late for that.
		if l.Forget(p.id) {
			return 0, l.notSent(nil)
		}
	}
	return p.id, nil
}

// Do sends a call and waits for its reply, at most until ctx ends.
func (l *Link[C, R]) Do(ctx context.Context, call C) (R, error) {
	type result struct {
		reply R
		err   error
	}
	var zero R
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(defaultTimeout)
	}
	c := make(chan result, 1)
	id, err := l.Start(call, deadline, func(r R, err error) { c <- result{r, err} })
	if err != nil {
		return zero, err
	}
	select {
	case r := <-c:
		return r.reply, r.err
	case <-ctx.Done():
		l.Forget(id)
		return zero, AsError(ctx.Err())
	}
}

// defaultTimeout bounds a call whose context has no deadline.
const defaultTimeout = 10 * time.Second

func (l *Link[C, R]) notSent(cause error) *Error {
	e := Errorf(codes.Unavailable, ReasonNotSent, "%s at %s is not reachable", l.cfg.Peer, l.cfg.Address)
	if cause != nil {
		e.Message += ": " + AsError(cause).Message
	}
	return e.With("peer", l.cfg.Peer)
}

// Forget gives up a call that nobody waits for any more: its done is not called, unless
// it is being called already, when Forget reports false.
func (l *Link[C, R]) Forget(id uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.mu.pending[id]
	delete(l.mu.pending, id)
	return ok
}

// Close fails what is pending and waits until the link's goroutines have ended.
func (l *Link[C, R]) Close() {
	l.mu.Lock()
	l.mu.closed = true
	l.mu.Unlock()
	l.cancel()
	l.stopped.Wait()
}

// run keeps a stream open until ctx ends.
func (l *Link[C, R]) run(ctx context.Context) {
	defer l.down(nil)
	backoff := minBackoff
	for first := true; ; first = false {
		opened, err := l.serve(ctx, first)
		l.down(err)
		if ctx.Err() != nil {
			return
		}
		if opened {
			backoff = minBackoff
		}
		// Jitter keeps the clients of a restarted node from returning in step.
		pause := backoff/2 + rand.N(backoff)
		backoff = min(2*backoff, maxBackoff)
		select {
		case <-ctx.Done():
			return
		case <-l.retry:
		case <-time.After(pause):
		}
	}
}

// down fails all pending calls and refuses new ones.
func (l *Link[C, R]) down(cause error) {
	l.up.Store(false)
	l.mu.Lock()
	if l.mu.queue != nil {
		l.mu.queue.close()
	}
	l.mu.queue, l.mu.stream = nil, nil
	l.mu.lastErr = cause
	failed := l.mu.pending
	l.mu.pending = map[uint64]*pending[C, R]{}
	l.mu.Unlock()
	var zero R
	for _, p := range failed {
		p.done(zero, l.lost(p, cause))
	}
}

// lost is the error of a call whose stream ended.
func (l *Link[C, R]) lost(p *pending[C, R], cause error) error {
	l.mu.Lock()
	sent := !p.sentAt.IsZero()
	l.mu.Unlock()
	if !sent {
		return l.notSent(cause)
	}
	e := Errorf(codes.Unavailable, ReasonLinkBroken, "the connection to %s at %s broke before it replied", l.cfg.Peer, l.cfg.Address)
	if cause != nil {
		e.Message += ": " + AsError(cause).Message
	}
	return e.With("peer", l.cfg.Peer)
}

// serve opens a stream and uses it until it ends. It reports whether the stream
// had been opened.
func (l *Link[C, R]) serve(ctx context.Context, first bool) (opened bool, err error) {
	signalReady := func() {
		if first {
			close(l.ready)
			first = false
		}
	}
	defer signalReady()
	cc, err := l.cfg.Transport.NewConn(l.cfg.Address)
	if err != nil {
		return false, err
	}
	// A new connection for each stream: one that hangs, because the peer is paused or
	// cut off, must not be waited for after it has healed.
	defer cc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q := l.opening(cc)
	if q == nil {
		return false, context.Canceled
	}
	stream, err := l.open(ctx, cancel, cc)
	if err != nil {
		return false, err
	}
	l.mu.Lock()
	l.mu.stream, l.mu.owed = stream, 0
	l.mu.Unlock()
	l.up.Store(true)
	signalReady()

	var wg sync.WaitGroup
	var heard atomic.Int64 // when the last frame came, in nanoseconds since start
	start := time.Now()
	var sendErr, recvErr error
	wg.Go(func() { sendErr = l.send(ctx, stream, q); cancel() })
	wg.Go(func() {
		recvErr = l.receive(stream, func() { heard.Store(int64(time.Since(start))) })
		cancel()
	})
	stalled := l.watch(ctx, func() time.Time { return start.Add(time.Duration(heard.Load())) })
	cancel()
	wg.Wait()
	switch {
	case stalled:
		return true, fmt.Errorf("no reply for %s", l.cfg.StallAfter)
	case recvErr != nil:
		return true, recvErr
	}
	return true, sendErr
}

// opening accepts calls for the stream that is about to be opened.
func (l *Link[C, R]) opening(cc *grpc.ClientConn) *queue[*pending[C, R]] {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.closed {
		return nil
	}
	if l.mu.queue == nil {
		l.mu.queue = newQueue[*pending[C, R]]()
	}
	l.mu.conn = cc
	return l.mu.queue
}

// open opens a stream and waits for the other side's greeting.
func (l *Link[C, R]) open(ctx context.Context, cancel context.CancelFunc, cc *grpc.ClientConn) (ClientStream[C, R], error) {
	timer := time.AfterFunc(l.cfg.OpenTimeout, cancel)
	defer timer.Stop()
	if l.cfg.Metadata != nil {
		ctx = metadata.NewOutgoingContext(ctx, l.cfg.Metadata())
	}
	stream, err := l.proto.Open(ctx, cc)
	var md metadata.MD
	if err == nil {
		md, err = stream.Header()
	}
	if err == nil && md == nil {
		// The other side refused the stream; Recv tells why.
		if _, err = stream.RecvFrame(); err == nil {
			err = errors.New("a reply before the greeting")
		}
	}
	if !timer.Stop() {
		return nil, fmt.Errorf("no greeting within %s", l.cfg.OpenTimeout)
	}
	if err == nil && l.cfg.Greeted != nil {
		err = l.cfg.Greeted(md)
	}
	l.greetedUptime(md)
	return stream, err
}

// uptime estimates when a peer began. A message that was long on its way makes the
// peer look younger than it is, so the smallest estimate is the best; but not one
// from long ago, since clocks drift and suspended machines stand still.
// REQUIRES: used by one goroutine at a time.
type uptime struct {
	since             time.Duration // when the present window began
	present, previous time.Duration // the smallest estimates of two windows
}

const uptimeWindow = 10 * time.Second

// note takes an estimate made at now, and returns the best there is.
func (u *uptime) note(now, born time.Duration) time.Duration {
	if now-u.since > uptimeWindow {
		u.since, u.previous, u.present = now, u.present, born
	}
	u.present = min(u.present, born)
	return min(u.present, u.previous)
}

// greetedUptime takes the peer's uptime from its greeting.
func (l *Link[C, R]) greetedUptime(md metadata.MD) {
	l.born.Store(0)
	l.uptime = uptime{since: time.Since(l.made), present: math.MaxInt64, previous: math.MaxInt64}
	if v := md.Get(MDUptime); len(v) > 0 {
		ms, _ := strconv.ParseUint(v[0], 10, 48)
		l.noteUptime(ms)
	}
}

// noteUptime takes what the peer has just said of its uptime, 0 for nothing.
func (l *Link[C, R]) noteUptime(ms uint64) {
	if ms == 0 {
		return
	}
	now := time.Since(l.made)
	l.born.Store(int64(l.uptime.note(now, now-time.Duration(ms)*time.Millisecond)))
}

// startBy returns the peer's uptime by which a call that is sent now must have begun.
func (l *Link[C, R]) startBy(now time.Time) uint64 {
	born := l.born.Load()
	if l.cfg.StartWithin == 0 || born == 0 {
		return 0
	}
	uptime := now.Sub(l.made) - time.Duration(born)
	return uint64(max(1, (uptime + l.cfg.StartWithin).Milliseconds()))
}

// maxInline is the size of calls that whoever makes them may send: gRPC takes that much
// without waiting for the connection.
const maxInline = 16 << 10

// send drains the queue into frames until the stream or ctx ends.
func (l *Link[C, R]) send(ctx context.Context, stream ClientStream[C, R], q *queue[*pending[C, R]]) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-q.wake:
		}
		l.sending.take()
		late, err := l.sendFrame(stream, q)
		l.sending.give()
		l.tooLate(late)
		if err != nil {
			return nil // Recv tells why
		}
	}
}

// flush sends what is in the queue while the stream owes nothing, so that nothing can hold
// it up, and otherwise leaves that to send.
func (l *Link[C, R]) flush(stream ClientStream[C, R], q *queue[*pending[C, R]]) {
	if !l.sending.tryTake() {
		signal(q.wake)
		return
	}
	defer l.sending.give()
	l.mu.Lock()
	owed := l.mu.owed
	l.mu.Unlock()
	if owed > 0 {
		signal(q.wake)
		return
	}
	late, _ := l.sendFrame(stream, q) // Recv tells why
	if len(late) > 0 {
		l.stopped.Go(func() { l.tooLate(late) }) // the caller may hold what done needs
	}
}

// sendFrame sends one frame of what is in the queue, and returns the calls that are too late.
// REQUIRES: l.sending is held.
func (l *Link[C, R]) sendFrame(stream ClientStream[C, R], q *queue[*pending[C, R]]) (late []*pending[C, R], err error) {
	calls, late := l.prepare(q.take(func(p *pending[C, R]) int { return p.size }))
	if len(calls) > 0 {
		err = stream.SendFrame(calls)
	}
	return late, err
}

// prepare numbers the calls of a frame and drops those that nobody waits for, or not any more.
func (l *Link[C, R]) prepare(frame []*pending[C, R]) (calls []C, late []*pending[C, R]) {
	if len(frame) == 0 {
		return nil, nil
	}
	now := time.Now()
	startBy := l.startBy(now)
	calls = make([]C, 0, len(frame))
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range frame {
		if l.mu.pending[p.id] != p {
			continue // given up on
		}
		left := p.deadline.Sub(now)
		if left <= 0 {
			delete(l.mu.pending, p.id)
			late = append(late, p)
			continue
		}
		p.sentAt = now
		l.proto.Prepare(p.call, p.id, uint32(max(1, left.Milliseconds())), startBy)
		calls = append(calls, p.call)
	}
	l.mu.owed += len(calls)
	return calls, late
}

func (l *Link[C, R]) tooLate(calls []*pending[C, R]) {
	var zero R
	for _, p := range calls {
		p.done(zero, l.notSent(context.DeadlineExceeded))
	}
}

// receive hands replies out until the stream ends.
func (l *Link[C, R]) receive(stream ClientStream[C, R], heard func()) error {
	var found []*pending[C, R]
	for {
		replies, err := stream.RecvFrame()
		if err != nil {
			return err
		}
		heard()
		found = found[:0]
		l.mu.Lock()
		l.mu.owed -= len(replies)
		for _, r := range replies {
			id := l.proto.ReplyID(r)
			found = append(found, l.mu.pending[id])
			delete(l.mu.pending, id)
		}
		l.mu.Unlock()
		for i, p := range found {
			if p == nil {
				continue // given up on
			}
			if e := ErrorFromProto(l.proto.ReplyError(replies[i])); e != nil {
				p.done(replies[i], e)
			} else {
				p.done(replies[i], nil)
			}
		}
	}
}

// giveUpAfter is how long after its deadline a call is given up at the latest. Whoever made
// it mostly has a timer of his own, and many calls are given up at once.
const giveUpAfter = 250 * time.Millisecond

// watch pings the other side, gives up calls past their deadline, and returns true
// when the other side owes replies and sends none.
func (l *Link[C, R]) watch(ctx context.Context, heard func() time.Time) (stalled bool) {
	ping := time.Now() // when the next is due
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-l.sooner:
		case <-timer.C:
		}
		now := time.Now()
		if !now.Before(ping) {
			l.ping()
			ping = now.Add(l.cfg.PingInterval)
		}
		next, stalled := l.look(now, ping, heard())
		if stalled {
			return true
		}
		timer.Reset(next.Sub(now))
	}
}

func (l *Link[C, R]) ping() {
	sent, wall := time.Now(), l.cfg.WallClock()
	// A ping that cannot be sent is no news: the queue is full or the stream ends.
	_ = l.Go(l.proto.Ping(wall), sent.Add(10*l.cfg.StallAfter), func(r R, err error) {
		if err != nil {
			return
		}
		there, uptime := l.proto.Pong(r)
		l.noteUptime(uptime)
		if l.cfg.Offset != nil {
			trip := time.Since(sent)
			l.cfg.Offset(time.Duration(there-wall)*time.Millisecond-trip/2, trip)
		}
	})
}

// look gives up calls past their deadline, and tells whether the other side is silent: it
// owes replies for too long and has sent nothing since. Else next is when to look again, at
// the latest at the next ping.
func (l *Link[C, R]) look(now, ping, heard time.Time) (next time.Time, silent bool) {
	var late, unsent []*pending[C, R]
	var oldest time.Time // when the oldest call without a reply was sent
	next = ping
	l.mu.Lock()
	for id, p := range l.mu.pending {
		switch giveUp := p.deadline.Add(giveUpAfter); {
		case now.After(p.deadline) && p.sentAt.IsZero():
			unsent = append(unsent, p)
			delete(l.mu.pending, id)
		case now.After(p.deadline):
			late = append(late, p)
			delete(l.mu.pending, id)
		case giveUp.Before(next):
			next = giveUp
		}
		// A call given up still shows that the other side owes a reply.
		if !p.sentAt.IsZero() && (oldest.IsZero() || p.sentAt.Before(oldest)) {
			oldest = p.sentAt
		}
	}
	if !oldest.IsZero() {
		if heard.After(oldest) {
			oldest = heard
		}
		stall := oldest.Add(l.cfg.StallAfter)
		silent = !now.Before(stall)
		if stall.Before(next) {
			next = stall
		}
	}
	l.mu.look = next
	l.mu.Unlock()
	l.tooLate(unsent) // and never will be sent: prepare passes over them
	var zero R
	for _, p := range late {
		p.done(zero, Errorf(codes.DeadlineExceeded, ReasonDeadline, "%s did not reply in time", l.cfg.Peer).With("peer", l.cfg.Peer))
	}
	return next, silent
}
