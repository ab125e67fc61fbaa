package rpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// maxFrames bounds the frames of one stream that are being handled. Beyond it
// nothing is read, and flow control makes the sender wait.
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

// FrameHandler answers the calls of a frame. It calls reply once for every call,
// in any order and from any goroutine, before it returns.
type FrameHandler[C, R any] func(ctx context.Context, calls []C, reply func(R))

// MDUptime is the key of a greeting's metadata with the server's uptime, in
// milliseconds.
const MDUptime = "kvasir-uptime-ms"

// Serve greets the caller with md and answers its frames until the stream ends.
// It returns after every handler has.
func Serve[C, R any](stream ServerStream[C, R], md metadata.MD, size func(R) int, handle FrameHandler[C, R]) error {
	if err := stream.SendHeader(md); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	replies := newQueue[R]()
	var sender, handlers sync.WaitGroup
	sender.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-replies.wake:
			}
			if frame := replies.take(size); len(frame) > 0 {
				if stream.SendFrame(frame) != nil {
					return // the stream is broken, which RecvFrame sees too
				}
			}
		}
	})
	reply := func(r R) { replies.push(r) }
	slots := make(chan struct{}, maxFrames)
	var err error
	for {
		var calls []C
		if calls, err = stream.RecvFrame(); err != nil {
			break
		}
		slots <- struct{}{}
		handlers.Go(func() {
			handle(ctx, calls, reply)
			<-slots
		})
	}
	cancel()
	handlers.Wait()
	sender.Wait()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Loop is a link of a process to itself: calls are batched and handled as those of
// a peer are, without a stream between.
type Loop[C, R any] struct {
	proto   Protocol[C, R]
	handle  FrameHandler[C, R]
	queue   *queue[*pending[C, R]]
	cancel  context.CancelFunc
	stopped sync.WaitGroup
}

// NewLoop starts a loop. Close must be called.
func NewLoop[C, R any](proto Protocol[C, R], handle FrameHandler[C, R]) *Loop[C, R] {
	ctx, cancel := context.WithCancel(context.Background())
	l := &Loop[C, R]{proto: proto, handle: handle, queue: newQueue[*pending[C, R]](), cancel: cancel}
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
		handlers.Go(func() {
			l.handle(ctx, calls, func(r R) {
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
