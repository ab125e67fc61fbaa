package replica

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// ring has one vnode, with the slots given, of a namespace 1 with that N.
func ring(t *testing.T, epoch uint64, slots ...*topologyv1.Slot) *topology.Topology {
	t.Helper()
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: epoch, Vnodes: 1, Settings: topology.DefaultSettings().Proto(), Ring: []*topologyv1.Vnode{{Slots: slots}}}
	for i := uint64(1); i <= 4; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
	}
	ns := topology.FoundingNamespace(len(slots))
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

func stable(n uint64) *topologyv1.Slot {
	return &topologyv1.Slot{Node: n, Phase: topologyv1.Phase_PHASE_STABLE}
}

// wall is the time of test replicas, in milliseconds.
const wall = 1_000_000

func newReplica(t *testing.T) *Replica {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	s, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "data", Logger: logger, Fatal: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	now := func() int64 { return wall }
	h, err := LoadHints(s, now, logger)
	if err != nil {
		t.Fatal(err)
	}
	return New(Config{
		Self: 1, Store: s, Clock: NewClock(now, 0, func(hlc.Timestamp) error { return nil }, logger), Hints: h, Logger: logger,
		Fence: NewFence(ring(t, 5, stable(1), stable(2), stable(3))), Refuse: func() *rpc.Error { return nil }, Open: func(uint32, uint32, uint64) bool { return true },
	})
}

// call has one call served.
func call(r *Replica, c *replicav1.Call) (res *replicav1.Reply) {
	c.Epoch = r.cfg.Fence.Topology().Epoch
	r.Handle(context.Background(), "", []*replicav1.Call{c}, func(reply *replicav1.Reply) { res = reply })
	return res
}

func collectCall(step replicav1.Collect_Step, ts hlc.Timestamp, endpoints ...uint64) *replicav1.Call {
	return &replicav1.Call{Operation: &replicav1.Call_Collect{Collect: &replicav1.Collect{
		Namespace: 1, Step: step, Timestamp: uint64(ts), Endpoints: endpoints,
	}}}
}

func applyCall(source replicav1.Source, key string, rec record.Record) *replicav1.Call {
	return &replicav1.Call{Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
		Namespace: 1, Source: source, Entries: []*replicav1.Entry{{Key: []byte(key), Record: record.Encode(rec)}},
	}}}
}

func tombstone(ts hlc.Timestamp) record.Record {
	return record.Record{Version: record.Version{Time: ts, Incarnation: 1}, Kind: record.Tombstone}
}

func TestCollectSteps(t *testing.T) {
	r := newReplica(t)
	for _, ts := range []hlc.Timestamp{50, 60} {
		if e := call(r, applyCall(replicav1.Source_SOURCE_FIRST_HAND, fmt.Sprint(ts), tombstone(ts))).GetError(); e != nil {
			t.Fatal(e)
		}
	}
	state := call(r, collectCall(replicav1.Collect_STEP_STATE, 0)).GetCollect()
	if state.GetClock() != uint64(hlc.At(wall)) || state.GetOldestDead() != 50 || state.GetDeadRecords() != 2 || state.GetPromise() != 0 {
		t.Fatalf("state is %+v", state)
	}
	if e := call(r, collectCall(replicav1.Collect_STEP_CERTIFY, 55, 1, 2, 3)).GetError(); e.GetReason() != "CERTIFICATE_VOID" {
		t.Errorf("a certificate above the promise: %+v", e)
	}
	if e := call(r, collectCall(replicav1.Collect_STEP_PROMISE, hlc.At(wall+10_000))).GetError(); e.GetReason() != rpc.ReasonClockSkew {
		t.Errorf("a promise of the future: %+v", e)
	}
	if e := call(r, collectCall(replicav1.Collect_STEP_UNSPECIFIED, 0)).GetError(); e.GetReason() != rpc.ReasonBadRequest {
		t.Errorf("no step: %+v", e)
	}
	promised := call(r, collectCall(replicav1.Collect_STEP_PROMISE, 55, 1, 2, 3)).GetCollect()
	if promised.GetPromise() != 55 || promised.GetRun() == 0 || promised.GetLateJoins() != 0 {
		t.Fatalf("promised %+v", promised)
	}
	for source, refused := range map[replicav1.Source]bool{
		replicav1.Source_SOURCE_FIRST_HAND: true, replicav1.Source_SOURCE_HINT: true, replicav1.Source_SOURCE_REPAIR: false,
	} {
		e := call(r, applyCall(source, "late", tombstone(55))).GetError()
		if (e.GetReason() == rpc.ReasonBelowPromise) != refused || refused && e.GetDetails()["promise"] != "55" {
			t.Errorf("%s at the promise: %+v", source, e)
		}
		if e := call(r, applyCall(source, "new", tombstone(56))).GetError(); e != nil {
			t.Errorf("%s above the promise: %+v", source, e)
		}
	}
	if r.RefusedBelowPromise() != 2 {
		t.Errorf("%d refusals counted", r.RefusedBelowPromise())
	}
	if again := call(r, collectCall(replicav1.Collect_STEP_PROMISE, 55)).GetCollect(); again.GetLateJoins() != 1 || again.GetRun() != promised.GetRun() {
		t.Errorf("promised again: %+v", again)
	}
	if e := call(r, collectCall(replicav1.Collect_STEP_CERTIFY, 55, 1, 2, 4)).GetError(); e.GetReason() != "CERTIFICATE_VOID" {
		t.Errorf("a certificate for others: %+v", e)
	}
	certified := call(r, collectCall(replicav1.Collect_STEP_CERTIFY, 55, 1, 2, 3)).GetCollect()
	// 50 and 55 may go; 56 and 60 are left.
	if certified.GetCertificate() != 55 || certified.GetOldestDead() != 56 || certified.GetDeadRecords() != 4 {
		t.Fatalf("certified %+v", certified)
	}
	for _, next := range []*topology.Topology{
		ring(t, 6, stable(1), stable(2), stable(4)),
		ring(t, 7, stable(1), stable(2), &topologyv1.Slot{Node: 3, Incoming: 4, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Since: 7}),
	} {
		r.cfg.Fence.Advance(next)
		if state := call(r, collectCall(replicav1.Collect_STEP_STATE, 0)).GetCollect(); state.GetCertificate() != 0 || state.GetPromise() != 55 {
			t.Errorf("state in epoch %d: %+v", next.Epoch, state)
		}
		if err := r.VoidCertificates(next); err != nil {
			t.Fatal(err)
		}
		if c := r.cfg.Store.Collection(1, 0); c.Certificate != 0 || c.Promise != 55 {
			t.Errorf("kept in epoch %d: %+v", next.Epoch, c)
		}
		// What it would have let go is dead like the rest again.
		if state := call(r, collectCall(replicav1.Collect_STEP_STATE, 0)).GetCollect(); state.GetOldestDead() != 50 {
			t.Errorf("state in epoch %d: %+v", next.Epoch, state)
		}
	}
	if e := call(r, collectCall(replicav1.Collect_STEP_CERTIFY, 55, 1, 2, 3, 4)).GetError(); e.GetReason() != "CERTIFICATE_VOID" {
		t.Errorf("a certificate during a move: %+v", e)
	}
}

// Invariant 5: once a promise has been given, nothing at or below it appears that was
// not there, however writes race it.
func TestPromisesRaceWrites(t *testing.T) {
	r := newReplica(t)
	var issued atomic.Uint64
	issued.Store(100)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				select {
				case <-stop:
					return
				default:
				}
				// Some are late by a little, as on a slow way.
				ts := hlc.Timestamp(issued.Add(1) - uint64(i%16))
				call(r, applyCall(replicav1.Source_SOURCE_FIRST_HAND, fmt.Sprint("k", w, "-", i), record.Record{
					Version: record.Version{Time: ts, Incarnation: 1}, Kind: record.Value,
				}))
			}
		})
	}
	upTo := func(p hlc.Timestamp) (out []hlc.Timestamp) {
		err := r.cfg.Store.Scan(1, []uint32{0}, nil, nil, func(_ uint32, _, b []byte) bool {
			if rec, err := record.Decode(b); err != nil {
				t.Error(err)
			} else if rec.Version.Time <= p {
				out = append(out, rec.Version.Time)
			}
			return true
		})
		if err != nil {
			t.Error(err)
		}
		slices.Sort(out)
		return out
	}
	type promise struct {
		ts   hlc.Timestamp
		seen int
	}
	var given []promise
	for i := range uint64(40) {
		for issued.Load() < 100*(i+1) {
			runtime.Gosched()
		}
		p := hlc.Timestamp(issued.Load())
		if e := call(r, collectCall(replicav1.Collect_STEP_PROMISE, p)).GetError(); e != nil {
			t.Fatal(e)
		}
		given = append(given, promise{p, len(upTo(p))})
	}
	close(stop)
	wg.Wait()
	for _, g := range given {
		if n := len(upTo(g.ts)); n != g.seen {
			t.Errorf("after the promise %s there were %d records up to it, at the end %d", g.ts, g.seen, n)
		}
	}
	t.Logf("%d writes were late", r.RefusedBelowPromise())
}
