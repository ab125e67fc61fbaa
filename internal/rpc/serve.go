package rpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Limits of one stream's answering end. At the first two nothing more is read, and
// flow control makes the sender wait; a Link never reaches the first.
const (
	// maxCalls bounds the calls whose replies have not been sent.
	maxCalls = 20 << 10
	// pauseBytes is the size of the replies that wait to be sent.
	pauseBytes = 8 << 20
	// refuseBytes is their size at which what was read is not kept for sending.
	refuseBytes = 64 << 20
	// maxFrameCalls bounds the calls of one frame.
	maxFrameCalls = 4096
)

// maxFrames bounds the frames of a loop that are being handled.
const maxFrames = 64

// ServerStream is the answering end of a stream of frames.
type ServerStream[C, R any] interface {
	Context() context.Context
	SendHeader(metadata.MD) error
	SendFrame(replies []R) error
	RecvFrame() ([]C, error)
}

// KVServerStream adapts a session's stream.
func KVServerStream(s grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]) ServerStream[*kvv1.SessionCall, *kvv1.SessionReply] {
	return kvServerStream{s}
}

type kvServerStream struct {
	grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]
}

func (s kvServerStream) SendFrame(replies []*kvv1.SessionReply) error {
	return s.Send(&kvv1.SessionResponse{Replies: replies})
}

func (s kvServerStream) RecvFrame() ([]*kvv1.SessionCall, error) {
	f, err := s.Recv()
	return f.GetCalls(), err
}

// ReplicaServerStream adapts a link's stream.
func ReplicaServerStream(s grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]) ServerStream[*replicav1.Call, *replicav1.Reply] {
	return replicaServerStream{s}
}

type replicaServerStream struct {
	grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]
}

func (s replicaServerStream) SendFrame(replies []*replicav1.Reply) error {
	return s.Send(&replicav1.LinkResponse{Replies: replies})
}

func (s replicaServerStream) RecvFrame() ([]*replicav1.Call, error) {
	f, err := s.Recv()
	return f.GetCalls(), err
}

// FrameHandler answers the calls of a frame, which was read at received. It calls reply
// once for every call, in any order and from any goroutine, before it returns.
type FrameHandler[C, R any] func(ctx context.Context, received time.Time, calls []C, reply func(R))

// MDUptime is the key of a greeting's metadata with the server's uptime, in
// milliseconds.
const MDUptime = "kvasir-uptime-ms"

// Serve greets the caller with md and answers its frames until the stream ends. It
// returns after every handler has. A caller that closes its sending half gets the
// replies that it is owed. Frames are handled by goroutines of pool, which may be nil.
func Serve[C, R any](stream ServerStream[C, R], md metadata.MD, proto Protocol[C, R], pool *Pool, handle FrameHandler[C, R]) error {
	if err := stream.SendHeader(md); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	o := &outbox[C, R]{proto: proto, queue: newQueue[outgoing[R]](), answered: make(chan struct{}), sending: newTurn()}
	o.room.L = &o.mu
	defer context.AfterFunc(ctx, o.end)()
	var sender, handlers sync.WaitGroup
	o.stream = stream
	sender.Go(func() { o.send(ctx) })
	var err error
	for {
		var calls []C
		if calls, err = stream.RecvFrame(); err != nil {
			break
		}
		if len(calls) == 0 {
			continue
		}
		if len(calls) > maxFrameCalls {
			err = Errorf(codes.InvalidArgument, ReasonBadRequest, "a frame of %d calls: the limit is %d", len(calls), maxFrameCalls)
			break
		}
		if !o.admit(len(calls)) {
			err = context.Cause(ctx)
			break
		}
		received := time.Now()
		pool.GoFor(&handlers, func() {
			f := answers[C, R]{outbox: o}
			f.left.Store(int64(len(calls)))
			handle(ctx, received, calls, f.reply)
			o.flush()
		})
	}
	if errors.Is(err, io.EOF) {
		err = nil
	} else {
		cancel()
	}
	handlers.Wait()
	close(o.answered)
	sender.Wait()
	return err
}

// answers are those of one frame. The last one is left to its handler to send, which is
// about to return: it saves waking the sender.
type answers[C, R any] struct {
	*outbox[C, R]
	left atomic.Int64
}

func (a *answers[C, R]) reply(r R) {
	g := a.bound(r)
	if a.left.Add(-1) > 0 {
		a.queue.push(g)
	} else {
		a.queue.add(g)
	}
}

// outbox holds the replies of a stream until they are sent, and bounds them.
type outbox[C, R any] struct {
	proto    Protocol[C, R]
	stream   ServerStream[C, R]
	queue    *queue[outgoing[R]]
	answered chan struct{} // closed after the last reply
	// sending is held by whoever takes a frame off the queue until it is sent.
	sending turn

	mu    sync.Mutex
	room  sync.Cond
	calls int // without a sent reply
	bytes int // of replies in the queue
	ended bool
}

type outgoing[R any] struct {
	reply R
	size  int
}

// admit waits until n more calls may be handled; it reports false when the stream
// has ended.
func (o *outbox[C, R]) admit(n int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.ended && (o.bytes > pauseBytes || o.calls > 0 && o.calls+n > maxCalls) {
		o.room.Wait()
	}
	o.calls += n
	return !o.ended
}

func (o *outbox[C, R]) end() {
	o.mu.Lock()
	o.ended = true
	o.mu.Unlock()
	o.room.Broadcast()
}

// bound counts a reply that is about to be queued. It never blocks: what was read for a
// caller that takes nothing off the stream is thrown away instead.
func (o *outbox[C, R]) bound(r R) outgoing[R] {
	size := o.proto.ReplySize(r)
	o.mu.Lock()
	full := o.bytes+size > refuseBytes
	if !full {
		o.bytes += size
	}
	o.mu.Unlock()
	if full {
		err := Errorf(codes.ResourceExhausted, ReasonOverloaded, "%d MiB of replies wait for the caller to take them", refuseBytes>>20)
		err.RetryAfter = 50 * time.Millisecond
		if refusal, ok := o.proto.Refusal(r, err); ok {
			r, size = refusal, o.proto.ReplySize(refusal)
		}
		o.mu.Lock()
		o.bytes += size
		o.mu.Unlock()
	}
	return outgoing[R]{r, size}
}

// send sends replies until the stream breaks, ctx ends, or the last is sent.
func (o *outbox[C, R]) send(ctx context.Context) {
	for last := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-o.queue.wake:
		case <-o.answered:
			last = true
		}
		o.sending.take()
		sent, err := o.sendFrame()
		o.sending.give()
		if err != nil || last && sent == 0 {
			return // a broken stream shows to RecvFrame, too
		}
	}
}

// flush sends what is in the queue, or leaves that to whoever sends already.
func (o *outbox[C, R]) flush() {
	if !o.sending.tryTake() {
		signal(o.queue.wake)
		return
	}
	defer o.sending.give()
	_, _ = o.sendFrame() // a broken stream shows to RecvFrame, too
}

// sendFrame sends one frame of what is in the queue, and returns of how many replies.
// REQUIRES: o.sending is held.
func (o *outbox[C, R]) sendFrame() (sent int, err error) {
	frame := o.queue.take(func(g outgoing[R]) int { return g.size })
	if len(frame) == 0 {
		return 0, nil
	}
	replies, bytes := make([]R, len(frame)), 0
	for i, g := range frame {
		replies[i], bytes = g.reply, bytes+g.size
	}
	if err := o.stream.SendFrame(replies); err != nil {
		return 0, err
	}
	o.mu.Lock()
	o.calls -= len(frame)
	o.bytes -= bytes
	o.mu.Unlock()
	o.room.Signal()
	return len(frame), nil
}

// Loop is a link of a process to itself: calls are batched and handled as those of
// a peer are, without a stream between.
type Loop[C, R any] struct {
	proto   Protocol[C, R]
	pool    *Pool
	handle  FrameHandler[C, R]
	queue   *queue[*pending[C, R]]
	cancel  context.CancelFunc
	stopped sync.WaitGroup
}

// NewLoop starts a loop whose frames are handled by goroutines of pool, which may be nil.
// Close must be called.
func NewLoop[C, R any](proto Protocol[C, R], pool *Pool, handle FrameHandler[C, R]) *Loop[C, R] {
	ctx, cancel := context.WithCancel(context.Background())
	l := &Loop[C, R]{proto: proto, pool: pool, handle: handle, queue: newQueue[*pending[C, R]](), cancel: cancel}
	l.stopped.Go(func() { l.run(ctx) })
	return l
}

// Up reports true: a process always reaches itself.
func (l *Loop[C, R]) Up() bool { return true }

// Go is Link.Go.
func (l *Loop[C, R]) Go(call C, deadline time.Time, done func(R, error)) error {
	p := &pending[C, R]{call: call, size: l.proto.Size(call), deadline: deadline, done: done}
	if !l.queue.push(p) {
		return AsError(context.Canceled)
	}
	return nil
}

func (l *Loop[C, R]) run(ctx context.Context) {
	slots := make(chan struct{}, maxFrames)
	var handlers sync.WaitGroup
	defer handlers.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.queue.wake:
		}
		frame := l.queue.take(func(p *pending[C, R]) int { return p.size })
		if len(frame) == 0 {
			continue
		}
		now := time.Now()
		calls := make([]C, len(frame))
		for i, p := range frame {
			calls[i] = p.call
			l.proto.Prepare(p.call, uint64(i), uint32(max(1, p.deadline.Sub(now).Milliseconds())), 0)
		}
		slots <- struct{}{}
		l.pool.GoFor(&handlers, func() {
			l.handle(ctx, now, calls, func(r R) {
				p := frame[l.proto.ReplyID(r)]
				if e := ErrorFromProto(l.proto.ReplyError(r)); e != nil {
					p.done(r, e)
				} else {
					p.done(r, nil)
				}
			})
			<-slots
		})
	}
}

// Close fails what is queued and waits for the loop's goroutines.
func (l *Loop[C, R]) Close() {
	rest := l.queue.close()
	l.cancel()
	l.stopped.Wait()
	var zero R
	for _, p := range rest {
		p.done(zero, AsError(context.Canceled))
	}
}
