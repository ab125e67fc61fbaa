package rpc_test

import (
	"bytes"
	"context"
	"io"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// session opens a stream as a client in another language would.
func (w *world) session() grpc.BidiStreamingClient[kvv1.SessionRequest, kvv1.SessionResponse] {
	w.t.Helper()
	cc, err := rpc.Transport{Dial: w.net.Dialer("client")}.NewConn("server:1")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cc.Close() })
	s, err := kvv1.NewKVServiceClient(cc).Session(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func TestServeOddFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{})
		defer w.end()
		s := w.session()
		for _, frame := range []*kvv1.SessionRequest{{}, {Calls: []call{get("a")}}} {
			if err := s.Send(frame); err != nil {
				t.Fatal(err)
			}
		}
		if f, err := s.Recv(); err != nil || len(f.GetReplies()) != 1 {
			t.Fatalf("after an empty frame: %v, %v", f, err)
		}
		if err := s.Send(&kvv1.SessionRequest{Calls: make([]call, 5000)}); err != nil {
			t.Fatal(err)
		}
		_, err := s.Recv()
		if e := rpc.AsError(err); e.Code != codes.InvalidArgument {
			t.Errorf("a frame of 5000 calls: %v", err)
		}
	})
}

// A caller that has said all it will say still gets its replies.
func TestServeHalfClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{handle: func(ctx context.Context, _ call) *rpc.Error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return rpc.AsError(ctx.Err())
			}
		}})
		defer w.end()
		s := w.session()
		if err := s.Send(&kvv1.SessionRequest{Calls: []call{get("a"), get("b")}}); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		replies := 0
		for {
			f, err := s.Recv()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range f.GetReplies() {
				if r.GetError() != nil {
					t.Errorf("reply: %v", r.GetError())
				}
				replies++
			}
		}
		if replies != 2 {
			t.Errorf("%d replies, want 2", replies)
		}
	})
}

// A caller that takes nothing off its stream is not served for ever, and what was
// read for it does not pile up.
func TestServeBoundsReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		release := make(chan struct{})
		e := &echo{handle: func(context.Context, call) *rpc.Error { <-release; return nil }}
		w.serve(e)
		defer w.end()
		s := w.session()
		key := string(bytes.Repeat([]byte("k"), 1<<20))
		go func() {
			for range 200 {
				if s.Send(&kvv1.SessionRequest{Calls: []call{get(key)}}) != nil {
					return
				}
			}
		}()
		time.Sleep(time.Minute)
		if n := e.calls.Load(); n != 200 {
			t.Fatalf("%d calls in the house, want 200", n)
		}
		close(release)
		time.Sleep(time.Minute)
		// All at once they are more than may wait; now nothing more is taken in.
		if err := s.Send(&kvv1.SessionRequest{Calls: []call{get("late")}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if n := e.calls.Load(); n != 200 {
			t.Errorf("a call was begun while 64 MiB of replies wait")
		}
		kept, refused := 0, 0
		for kept+refused < 201 {
			f, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range f.GetReplies() {
				if r.GetError() == nil {
					kept++
				} else if e := rpc.ErrorFromProto(r.GetError()); e.Reason == rpc.ReasonOverloaded && e.RetryAfter > 0 {
					refused++
				} else {
					t.Fatalf("reply: %v", e)
				}
			}
		}
		if kept < 60 || kept > 80 {
			t.Errorf("%d replies of 1 MiB kept, %d refused, want about 64 kept", kept, refused)
		}
	})
}

// Calls that take long do not hold up those behind them.
func TestServeHasNoHeadOfLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{handle: func(ctx context.Context, c call) *rpc.Error {
			if string(c.GetGet().GetKey()) == "slow" {
				<-ctx.Done()
			}
			return nil
		}})
		defer w.end()
		l := w.link(nil)
		defer l.Close()
		for range 500 {
			if err := l.Go(get("slow"), time.Now().Add(time.Hour), func(reply, error) {}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // a frame each
		}
		start := time.Now()
		if _, err := l.Do(t.Context(), get("quick")); err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(start); waited > 100*time.Millisecond {
			t.Errorf("waited %s behind slow calls", waited)
		}
		time.Sleep(10 * time.Second)
		if !l.Up() {
			t.Error("slow calls took the link down")
		}
	})
}

// young is a server that says how long it has been running, and refuses writes that
// come after their time.
type young struct {
	echo
	born  atomic.Int64 // in milliseconds since 1970
	delay time.Duration
}

func (y *young) uptime() time.Duration {
	return time.Duration(time.Now().UnixMilli()-y.born.Load()) * time.Millisecond
}

func (y *young) Session(s grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]) error {
	uptime := func() uint64 { return uint64(y.uptime().Milliseconds()) }
	md := metadata.Pairs(rpc.MDUptime, strconv.FormatUint(uptime(), 10))
	time.Sleep(y.delay)
	return rpc.Serve(rpc.KVServerStream(s), md, rpc.KV, nil, func(_ context.Context, _ time.Time, calls []call, answer func(reply)) {
		for _, c := range calls {
			r := &kvv1.SessionReply{Id: c.GetId(), Response: &kvv1.SessionReply_Ping{Ping: &kvv1.PingResponse{UptimeMs: uptime()}}}
			if c.GetPing() == nil && c.GetStartByMs() < uptime() {
				r.Error = rpc.Errorf(codes.Unavailable, rpc.ReasonTooLate, "too late").Proto()
			}
			answer(r)
		}
	})
}

// A greeting that was long on its way makes a peer look young, and calls too late,
// only until the next ping.
func TestSlowGreeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		y := &young{delay: 900 * time.Millisecond}
		y.born.Store(time.Now().Add(-time.Hour).UnixMilli())
		listener, err := w.net.Listen("server:1")
		if err != nil {
			t.Fatal(err)
		}
		w.srv = rpc.Transport{}.NewServer()
		kvv1.RegisterKVServiceServer(w.srv, y)
		go w.srv.Serve(listener)
		defer w.end()
		l := w.link(func(c *rpc.LinkConfig) { c.StartWithin = 600 * time.Millisecond })
		defer l.Close()
		<-l.Ready()
		time.Sleep(time.Second)
		for range 100 {
			if _, err := l.Do(t.Context(), get("a")); err != nil {
				t.Fatalf("after %s: %v", y.uptime()-time.Hour, err)
			}
			time.Sleep(time.Second)
		}
		// A peer that was suspended is younger than it was thought to be. Writes that wait
		// at it must not begin long after.
		y.born.Add(time.Minute.Milliseconds())
		time.Sleep(30 * time.Second)
		c := get("a")
		if _, err := l.Do(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if by := time.Duration(c.GetStartByMs()) * time.Millisecond; by > y.uptime()+time.Second {
			t.Errorf("the call might begin %s from now", by-y.uptime())
		}
	})
}

// What handlers use is closed after the server has stopped.
func TestStopWaitsForHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var left atomic.Bool
		entered := make(chan struct{})
		w.serve(&echo{handle: func(ctx context.Context, _ call) *rpc.Error {
			close(entered)
			<-ctx.Done()
			time.Sleep(time.Second)
			left.Store(true)
			return nil
		}})
		l := w.link(nil)
		if err := l.Go(get("a"), time.Now().Add(time.Hour), func(reply, error) {}); err != nil {
			t.Fatal(err)
		}
		<-entered
		w.srv.Stop()
		if !left.Load() {
			t.Error("Stop returned while a handler was running")
		}
		l.Close()
		w.end()
	})
}

// Calls that their callers gave up do not count against the bound.
func TestAbandonedCallsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{handle: func(ctx context.Context, _ call) *rpc.Error { <-ctx.Done(); return nil }})
		defer w.end()
		l := w.link(nil)
		defer l.Close()
		<-l.Ready()
		time.Sleep(10 * time.Millisecond)
		before := l.Pending()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Millisecond, cancel)
		if _, err := l.Do(ctx, get("a")); err == nil {
			t.Fatal("no error")
		}
		if n := l.Pending(); n != before {
			t.Errorf("%d calls pending, want %d", n, before)
		}
	})
}
