package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/simnet"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

type (
	call  = *kvv1.SessionCall
	reply = *kvv1.SessionReply
)

// echo is a node that answers gets with their key, after handle has had its way.
type echo struct {
	kvv1.UnimplementedKVServiceServer
	handle func(ctx context.Context, c call) *rpc.Error
	frames atomic.Int64
	calls  atomic.Int64
}

func (e *echo) Session(s grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]) error {
	if md, _ := metadata.FromIncomingContext(s.Context()); len(md["stranger"]) > 0 {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "go away").With("name", "echo")
	}
	return rpc.Serve(rpc.KVServerStream(s), metadata.Pairs("name", "echo"), rpc.KV, nil, e.frame)
}

func (e *echo) frame(ctx context.Context, _ time.Time, calls []call, reply func(reply)) {
	e.frames.Add(1)
	var wg sync.WaitGroup
	for _, c := range calls {
		wg.Go(func() {
			if c.GetPing() != nil {
				reply(&kvv1.SessionReply{Id: c.Id, Response: &kvv1.SessionReply_Ping{Ping: &kvv1.PingResponse{WallMs: uint64(time.Now().UnixMilli()) + 5000}}})
				return
			}
			e.calls.Add(1)
			if e.handle != nil {
				if err := e.handle(ctx, c); err != nil {
					reply(&kvv1.SessionReply{Id: c.Id, Error: err.Proto()})
					return
				}
			}
			reply(&kvv1.SessionReply{Id: c.Id, Response: &kvv1.SessionReply_Get{Get: &kvv1.GetResponse{Found: true, Value: c.GetGet().GetKey()}}})
		})
	}
	wg.Wait()
}

func get(key string) call {
	return &kvv1.SessionCall{Request: &kvv1.SessionCall_Get{Get: &kvv1.GetRequest{Key: []byte(key)}}}
}

// world is a server on a simulated network, and links to it.
type world struct {
	t   *testing.T
	net *simnet.Network
	srv *grpc.Server
}

func newWorld(t *testing.T) *world { return &world{t: t, net: simnet.New(1)} }

func (w *world) serve(e *echo) {
	w.t.Helper()
	l, err := w.net.Listen("server:1")
	if err != nil {
		w.t.Fatal(err)
	}
	w.srv = rpc.Transport{}.NewServer()
	kvv1.RegisterKVServiceServer(w.srv, e)
	go w.srv.Serve(l)
}

func (w *world) link(change func(*rpc.LinkConfig)) *rpc.Link[call, reply] {
	cfg := rpc.LinkConfig{
		Transport: rpc.Transport{Dial: w.net.Dialer("client")},
		Address:   "server:1",
		Peer:      "echo",
		WallClock: func() int64 { return time.Now().UnixMilli() },
	}
	if change != nil {
		change(&cfg)
	}
	return rpc.NewLink(cfg, rpc.KV)
}

func (w *world) end() {
	if w.srv != nil {
		w.srv.Stop()
	}
	time.Sleep(time.Minute) // lets transports finish in virtual time
}

func wantReason(t *testing.T, err error, reason string) *rpc.Error {
	t.Helper()
	var e *rpc.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("error = %v (%+v), want reason %s", err, e, reason)
	}
	return e
}

func TestLinkCarriesCallsInFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		e := &echo{}
		w.serve(e)
		l := w.link(nil)
		var wg sync.WaitGroup
		const callers, each = 64, 20
		for i := range callers {
			wg.Go(func() {
				for j := range each {
					key := fmt.Sprintf("%d/%d", i, j)
					r, err := l.Do(t.Context(), get(key))
					if err != nil || string(r.GetGet().GetValue()) != key {
						t.Errorf("get %s: %v, %v", key, r, err)
					}
				}
			})
		}
		wg.Wait()
		if e.calls.Load() != callers*each {
			t.Errorf("%d calls arrived, want %d", e.calls.Load(), callers*each)
		}
		if perFrame := float64(e.calls.Load()) / float64(e.frames.Load()); perFrame < 4 {
			t.Errorf("%.1f calls a frame: batching does not work", perFrame)
		}
		if n := l.Pending(); n > 1 { // a ping at most
			t.Errorf("%d calls are still pending", n)
		}
		l.Close()
		w.end()
	})
}

func TestLinkErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		block := make(chan struct{})
		e := &echo{handle: func(ctx context.Context, c call) *rpc.Error {
			switch string(c.GetGet().GetKey()) {
			case "refuse":
				return rpc.Errorf(codes.NotFound, "NAMESPACE_NOT_FOUND", "no such thing").With("namespace", "x")
			case "hang":
				<-block
			}
			return nil
		}}
		w.serve(e)
		l := w.link(nil)
		defer w.end()
		defer l.Close()

		_, err := l.Do(t.Context(), get("refuse"))
		if re := wantReason(t, err, "NAMESPACE_NOT_FOUND"); re.Code != codes.NotFound || re.Details["namespace"] != "x" {
			t.Errorf("error = %+v", re)
		}

		// A call that hangs does not hold up others, and ends at its deadline.
		done := make(chan error, 1)
		if err := l.Go(get("hang"), time.Now().Add(time.Second), func(_ reply, err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Do(t.Context(), get("a")); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		wantReason(t, <-done, rpc.ReasonDeadline)
		if waited := time.Since(start); waited > 2*time.Second {
			t.Errorf("the deadline of 1s was noticed after %s", waited)
		}
		if !l.Up() {
			t.Error("one late call took the link down")
		}

		// A call that was sent when the server dies has an unknown outcome.
		if err := l.Go(get("hang"), time.Now().Add(time.Hour), func(_ reply, err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		w.net.Crash("server")
		if re := wantReason(t, <-done, rpc.ReasonLinkBroken); re.NothingDone() {
			t.Error("an unknown outcome is reported as nothing done")
		}
		time.Sleep(10 * time.Millisecond)
		_, err = l.Do(t.Context(), get("a"))
		if re := wantReason(t, err, rpc.ReasonNotSent); !re.NothingDone() {
			t.Error("a call that was not sent must count as not done")
		}
		close(block)
		w.srv.Stop()

		// The link comes back by itself.
		w.serve(e)
		time.Sleep(3 * time.Second)
		if _, err := l.Do(t.Context(), get("a")); err != nil {
			t.Errorf("after the restart: %v", err)
		}
	})
}

func TestLinkToNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		l := w.link(nil)
		// Calls made while the first attempt runs wait for it.
		_, err := l.Do(t.Context(), get("a"))
		wantReason(t, err, rpc.ReasonNotSent)
		<-l.Ready()
		l.Close()
		w.end()
	})
}

// A sign that the peer is back ends the pause between attempts.
func TestLinkRetriesWhenTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		l := w.link(nil)
		time.Sleep(20 * time.Second) // pauses are at their longest
		w.serve(&echo{})
		l.Retry()
		time.Sleep(50 * time.Millisecond)
		if !l.Up() {
			t.Error("the link waits although it was told not to")
		}
		l.Close()
		w.end()
	})
}

func TestLinkNoticesASilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{})
		l := w.link(nil)
		if _, err := l.Do(t.Context(), get("a")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if !l.Up() {
			t.Fatal("an idle link went down")
		}
		w.net.Cut("server", "client") // the server hears us and is not heard
		start := time.Now()
		_, err := l.Do(t.Context(), get("b"))
		wantReason(t, err, rpc.ReasonLinkBroken)
		if took := time.Since(start); took < time.Second || took > 3*time.Second {
			t.Errorf("silence noticed after %s", took)
		}
		if l.Up() {
			t.Error("the link is still up")
		}
		w.net.Heal("server", "client")
		time.Sleep(3 * time.Second)
		if !l.Up() {
			t.Error("the link did not come back")
		}
		l.Close()
		w.end()
	})
}

// Silence is noticed by pings where nothing else is asked: a while after the first one that
// is not answered, whenever the silence began. A link that is idle asks no more than that.
func TestLinkNoticesSilenceWhileIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		e := &echo{}
		w.serve(e)
		l := w.link(nil)
		<-l.Ready()
		const interval, stall = time.Second, 1500 * time.Millisecond // the defaults
		for phase := time.Duration(0); phase < interval; phase += 130 * time.Millisecond {
			before := e.frames.Load()
			time.Sleep(30 * time.Second)
			if n := e.frames.Load() - before; n < 29 || n > 31 {
				t.Fatalf("an idle link sent %d frames in 30 s", n)
			}
			time.Sleep(phase)
			w.net.Cut("server", "client")
			cut := time.Now()
			for l.Up() {
				time.Sleep(time.Millisecond)
			}
			// A frame that was under way when the silence began was the last one heard.
			if took := time.Since(cut); took < stall-100*time.Millisecond || took > interval+stall+100*time.Millisecond {
				t.Errorf("silence that began after %s was noticed after %s", phase, took)
			}
			w.net.Heal("server", "client")
			for !l.Up() {
				time.Sleep(time.Millisecond)
			}
		}
		l.Close()
		w.end()
	})
}

// Calls are given up soon after their deadline, also on a link that was idle, and with
// deadlines that are closer than the next ping.
func TestCallsAreGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		block := make(chan struct{})
		w.serve(&echo{handle: func(context.Context, call) *rpc.Error { <-block; return nil }})
		l := w.link(nil)
		<-l.Ready()
		time.Sleep(10*time.Second + 10*time.Millisecond) // just after a ping
		began := time.Now()
		type end struct {
			after time.Duration
			err   error
		}
		ends := map[time.Duration]chan end{}
		for _, d := range []time.Duration{700, 300, 50, 3000, 301} {
			d *= time.Millisecond
			c := make(chan end, 1)
			ends[d] = c
			if err := l.Go(get("a"), began.Add(d), func(_ reply, err error) { c <- end{time.Since(began), err} }); err != nil {
				t.Fatal(err)
			}
		}
		for d, c := range ends {
			e := <-c
			wantReason(t, e.err, rpc.ReasonDeadline)
			if e.after < d || e.after > d+250*time.Millisecond {
				t.Errorf("a call with a deadline after %s was given up after %s", d, e.after)
			}
		}
		if n := l.Pending(); n > 1 { // a ping may be
			t.Errorf("%d calls are pending", n)
		}
		close(block)
		l.Close()
		w.end()
	})
}

func TestLinkRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{})
		stranger := w.link(func(c *rpc.LinkConfig) {
			c.Metadata = func() metadata.MD { return metadata.Pairs("stranger", "yes") }
		})
		_, err := stranger.Do(t.Context(), get("a"))
		if e := wantReason(t, err, rpc.ReasonNotSent); !strings.Contains(e.Message, "go away") {
			t.Errorf("message %q does not say why", e.Message)
		}
		picky := w.link(func(c *rpc.LinkConfig) {
			c.Greeted = func(md metadata.MD) error { return fmt.Errorf("I wanted another than %s", md["name"]) }
		})
		_, err = picky.Do(t.Context(), get("a"))
		if e := wantReason(t, err, rpc.ReasonNotSent); !strings.Contains(e.Message, "another than [echo]") {
			t.Errorf("message %q does not say why", e.Message)
		}
		stranger.Close()
		picky.Close()
		w.end()
	})
}

// Invariant 15: what waits is bounded, and what is too much is refused.
func TestLinkIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		block := make(chan struct{})
		w.serve(&echo{handle: func(context.Context, call) *rpc.Error { <-block; return nil }})
		l := w.link(func(c *rpc.LinkConfig) { c.MaxPending = 100 })
		var done atomic.Int64
		refused := 0
		for range 150 {
			if err := l.Go(get("x"), time.Now().Add(time.Hour), func(reply, error) { done.Add(1) }); err != nil {
				if e := wantReason(t, err, rpc.ReasonOverloaded); e.Code != codes.ResourceExhausted || e.RetryAfter <= 0 || !e.NothingDone() {
					t.Fatalf("error = %+v", e)
				}
				refused++
			}
		}
		if refused < 50 {
			t.Errorf("%d calls refused, want at least 50", refused)
		}
		close(block)
		l.Close()
		if int(done.Load()) != 150-refused {
			t.Errorf("%d calls accepted, %d answered", 150-refused, done.Load())
		}
		w.end()
	})
}

// Work past its deadline is dropped before it is sent.
func TestLateCallsAreNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		e := &echo{}
		w.serve(e)
		l := w.link(nil)
		<-l.Ready()
		done := make(chan error, 1)
		if err := l.Go(get("late"), time.Now().Add(-time.Millisecond), func(_ reply, err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
		wantReason(t, <-done, rpc.ReasonNotSent)
		if e.calls.Load() != 0 {
			t.Error("the late call was sent")
		}
		l.Close()
		w.end()
	})
}

// Whoever makes a call may hold what its end needs: it is not told from within the call.
func TestTooLateIsToldLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{})
		l := w.link(nil)
		<-l.Ready()
		time.Sleep(900 * time.Millisecond) // the first ping is answered, and so close to the next nobody looks for late calls
		var mu sync.Mutex
		told := make(chan error, 1)
		mu.Lock()
		err := l.Go(get("a"), time.Now().Add(-time.Millisecond), func(_ reply, err error) {
			mu.Lock()
			defer mu.Unlock()
			told <- err
		})
		mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if e := rpc.AsError(<-told); e.Reason != rpc.ReasonNotSent {
			t.Errorf("the end is %v", e)
		}
		l.Close()
		w.end()
	})
}

func TestClockOffset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve(&echo{}) // whose clock is 5 s ahead
		offsets := make(chan time.Duration, 100)
		l := w.link(func(c *rpc.LinkConfig) {
			c.Offset = func(ahead, _ time.Duration) {
				select {
				case offsets <- ahead:
				default:
				}
			}
		})
		if off := (<-offsets).Round(10 * time.Millisecond); off != 5*time.Second {
			t.Errorf("offset = %s, want 5s", off)
		}
		l.Close()
		w.end()
	})
}

func TestLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &echo{handle: func(_ context.Context, c call) *rpc.Error {
			if string(c.GetGet().GetKey()) == "refuse" {
				return rpc.Errorf(codes.NotFound, "X", "no")
			}
			return nil
		}}
		l := rpc.NewLoop(rpc.KV, nil, e.frame)
		errs := make(chan error, 100)
		for i := range 100 {
			key := "a"
			if i%2 == 0 {
				key = "refuse"
			}
			if err := l.Go(get(key), time.Now().Add(time.Second), func(_ reply, err error) { errs <- err }); err != nil {
				t.Fatal(err)
			}
		}
		refused := 0
		for range 100 {
			if <-errs != nil {
				refused++
			}
		}
		if refused != 50 {
			t.Errorf("%d refused, want 50", refused)
		}
		if e.frames.Load() > 20 {
			t.Errorf("%d frames for 100 calls", e.frames.Load())
		}
		l.Close()
		if err := l.Go(get("a"), time.Now().Add(time.Second), nil); err == nil {
			t.Error("a closed loop took a call")
		}
	})
}

func TestErrorsSurviveTheWire(t *testing.T) {
	want := rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "key is too long").With("field", "key").With("limit", 4096)
	want.RetryAfter = 50 * time.Millisecond

	st := want.GRPCStatus()
	if diff := cmp.Diff(want, rpc.AsError(st.Err())); diff != "" {
		t.Errorf("over a status (-want +got):\n%s", diff)
	}
	var bad bool
	for _, d := range st.Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			bad = b.GetFieldViolations()[0].GetField() == "key"
		}
	}
	if !bad {
		t.Error("no BadRequest names the field")
	}
	if diff := cmp.Diff(want, rpc.ErrorFromProto(want.Proto())); diff != "" {
		t.Errorf("inside a stream (-want +got):\n%s", diff)
	}
	if rpc.AsError(nil) != nil || rpc.ErrorFromProto(nil) != nil || (*rpc.Error)(nil).Proto() != nil {
		t.Error("nil does not stay nil")
	}
}

func TestAsError(t *testing.T) {
	for _, tc := range []struct {
		in     error
		code   codes.Code
		reason string
	}{
		{fmt.Errorf("wrapped: %w", &topology.Refusal{Kind: topology.NotFound, Reason: "X"}), codes.NotFound, "X"},
		{&topology.Refusal{Kind: topology.Conflict, Reason: "X"}, codes.Aborted, "X"},
		{&topology.Refusal{Kind: topology.Precondition, Reason: "X"}, codes.FailedPrecondition, "X"},
		{&topology.Refusal{Kind: topology.Exists, Reason: "X"}, codes.AlreadyExists, "X"},
		{&topology.Refusal{Kind: topology.Invalid, Reason: "X"}, codes.InvalidArgument, "X"},
		{context.DeadlineExceeded, codes.DeadlineExceeded, rpc.ReasonDeadline},
		{context.Canceled, codes.Canceled, "CANCELED"},
		{status.Error(codes.Unavailable, "connection refused"), codes.Unavailable, rpc.ReasonLinkBroken},
		{errors.New("what?"), codes.Internal, rpc.ReasonInternal},
	} {
		if e := rpc.AsError(tc.in); e.Code != tc.code || e.Reason != tc.reason {
			t.Errorf("%v becomes %s %s, want %s %s", tc.in, e.Code, e.Reason, tc.code, tc.reason)
		}
	}
}

func TestTLSFiles(t *testing.T) {
	if cfg, err := (rpc.TLSFiles{}).Load(); cfg != nil || err != nil {
		t.Errorf("no files: %v, %v", cfg, err)
	}
	if _, err := (rpc.TLSFiles{Cert: "x"}).Load(); err == nil {
		t.Error("a certificate without a key passed")
	}
	if _, err := (rpc.TLSFiles{Cert: "nowhere.crt", Key: "nowhere.key", CA: "nowhere.ca"}).Load(); err == nil || !strings.Contains(err.Error(), "nowhere.crt") {
		t.Errorf("error = %v, want one that names the file", err)
	}
}

// Unary calls of the same service stay for other languages.
func (e *echo) Get(_ context.Context, r *kvv1.GetRequest) (*kvv1.GetResponse, error) {
	return &kvv1.GetResponse{Found: true, Value: r.GetKey()}, nil
}

func TestCheckAddress(t *testing.T) {
	for address, want := range map[string][2]bool{ // to listen on, to be reached at
		"127.0.0.1:7400": {true, true},
		"node1:7400":     {true, true},
		"[::1]:7400":     {true, true},
		"0.0.0.0:7400":   {true, false},
		":7400":          {true, false},
		"[::]:7400":      {true, false},
		"node1":          {false, false},
		"node1:0":        {false, false},
		"node1:65536":    {false, false},
		"node1:http":     {false, false},
	} {
		if got := [2]bool{rpc.CheckAddress(address, false) == nil, rpc.CheckAddress(address, true) == nil}; got != want {
			t.Errorf("%s: %v, want %v", address, got, want)
		}
	}
}

func TestListenOnABusyPort(t *testing.T) {
	l, err := rpc.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := rpc.Listen(l.Addr().String()); err == nil || !strings.Contains(err.Error(), l.Addr().String()) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error = %v", err)
	}
}
