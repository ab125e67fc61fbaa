package replica

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

var roomy = HintBounds{Bytes: 1 << 20, Count: 100_000, Age: time.Hour}

func openHints(t *testing.T, fs vfs.FS) (*storage.Store, *Hints) {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	s, err := storage.Open(storage.Config{FS: fs, Dir: "data", Logger: logger, Fatal: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	h, err := LoadHints(s, func() int64 { return 5_000 }, logger)
	if err != nil {
		t.Fatal(err)
	}
	h.SetBounds(roomy)
	return s, h
}

// write has hints write what is in their queue, and no more.
func writeQueue(h *Hints) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	h.Run(ctx)
}

func oneWrite(vnode uint32, size int) []storage.Write {
	return []storage.Write{{Namespace: 1, Vnode: vnode, Key: []byte("k"), Record: make([]byte, size)}}
}

// Hints survive a restart with their accounts, and what is delivered is forgotten.
func TestHintsSurviveARestart(t *testing.T) {
	fs := vfs.NewMem()
	s, h := openHints(t, fs)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { h.Run(ctx) })
	kept := make(chan bool, 100)
	for i := range 100 {
		h.Keep(uint64(2+i%2), []storage.Write{{Namespace: 1, Vnode: uint32(i % 3), Key: fmt.Append(nil, i), Record: []byte("r")}}, func(ok bool) { kept <- ok })
	}
	for range 100 {
		if !<-kept {
			t.Fatal("not all are kept")
		}
	}
	cancel()
	wg.Wait()
	before, groups := h.Backlog(), h.Groups()
	if len(before) != 2 || before[0].Count != 50 || before[0].OldestMillis != 5_000 || len(groups) != 6 {
		t.Fatalf("backlog %+v, groups %+v", before, groups)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, h = openHints(t, fs)
	defer s.Close()
	if after := h.Backlog(); !slices.Equal(after, before) || !slices.Equal(h.Groups(), groups) {
		t.Fatalf("backlog was %+v, is %+v", before, after)
	}
	got, err := h.Take(3, 0, 10, 1<<20)
	if err != nil || len(got) != 10 || string(got[0].Key) != "1" {
		t.Fatalf("%d hints, %v", len(got), err)
	}
	if few, err := h.Take(3, 0, 10, 1); err != nil || len(few) != 1 {
		t.Fatalf("%d hints of at most one byte, %v", len(few), err)
	}
	if err := h.Forget(got); err != nil {
		t.Fatal(err)
	}
	if b := h.Backlog(); b[1].Count != 40 {
		t.Errorf("backlog %+v", b)
	}
	if h.Expired(got[0]) {
		t.Error("a new hint has expired")
	}
	h.SetBounds(HintBounds{Age: time.Second})
	if h.Expired(got[0]) || !h.Expired(storage.Hint{CreatedMillis: 1}) {
		t.Error("age is judged wrongly")
	}
}

// A stopping node ends the writing of hints last: whatever was kept before that is on
// disk when Run returns, and those who wait have been told.
func TestHintQueueIsEmptiedAtTheEnd(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s, h := openHints(t, fs)
	told := 0
	for range 3000 { // more than one commit takes
		h.Keep(2, []storage.Write{{Namespace: 1, Vnode: 1, Key: []byte("k"), Record: make([]byte, 100)}}, func(ok bool) {
			if ok {
				told++
			}
		})
	}
	writeQueue(h)
	clone := fs.CrashClone(vfs.CrashCloneCfg{})
	s.Close()
	s, h = openHints(t, clone)
	defer s.Close()
	if n := h.Totals().Count; told != 3000 || n != 3000 {
		t.Errorf("%d were told of, %d are there after a power cut", told, n)
	}
}

// Invariant 15: each bound leads to the mark of a dirty vnode, which survives a power
// cut and is on disk when the one who wanted the hint kept is told.
func TestHintBoundsLeaveMarks(t *testing.T) {
	for name, tc := range map[string]struct {
		bounds  HintBounds
		waiting int
		loss    HintLoss
	}{
		"bytes": {HintBounds{Bytes: 500, Count: 100}, 0, LossBytes},
		"count": {HintBounds{Bytes: 1 << 20, Count: 1}, 0, LossCount},
		"queue": {roomy, hintQueueLots - 1, LossQueue},
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewCrashableMem()
			s, h := openHints(t, fs)
			h.SetBounds(tc.bounds)
			for range tc.waiting {
				h.Keep(2, oneWrite(1, 10), func(bool) {})
			}
			var clone vfs.FS
			h.Keep(2, oneWrite(1, 300), func(kept bool) {
				if !kept {
					t.Error("the first is not kept")
				}
			})
			h.Keep(3, oneWrite(7, 300), func(kept bool) {
				if kept {
					t.Error("one beyond the bound is kept")
				}
				clone = fs.CrashClone(vfs.CrashCloneCfg{})
			})
			if h.Queued() != tc.waiting+2 {
				t.Errorf("%d are queued", h.Queued())
			}
			writeQueue(h)
			if lost := h.Totals(); lost.Lost[tc.loss] != 1 || lost.Dropped() != 1 || lost.Kept != uint64(tc.waiting+1) {
				t.Errorf("totals %+v", lost)
			}
			s.Close()
			s, h = openHints(t, clone)
			defer s.Close()
			if d := s.Dirty(); len(d) != 1 || d[0].Place != (storage.Place{Namespace: 1, Vnode: 7}) {
				t.Errorf("dirty are %+v", d)
			}
			if n := h.Totals().Count; n != uint64(tc.waiting+1) {
				t.Errorf("%d hints after a power cut", n)
			}
		})
	}
}

// Bytes and count are taken when hints are made, and given back when they are not
// written or forgotten.
func TestHintRoomIsGivenBack(t *testing.T) {
	s, h := openHints(t, vfs.NewMem())
	defer s.Close()
	h.SetBounds(HintBounds{Bytes: 1000, Count: 1})
	first, lost := h.Reserve(2, oneWrite(1, 900))
	if len(first) != 1 || lost != nil {
		t.Fatalf("%d reserved, lost %v", len(first), lost)
	}
	if more, lost := h.Reserve(2, oneWrite(1, 900)); len(more) != 0 || len(lost) != 1 {
		t.Fatalf("%d reserved, lost %v", len(more), lost)
	}
	h.Settle(first, false)
	again, _ := h.Reserve(2, oneWrite(1, 900))
	if len(again) != 1 {
		t.Fatal("the room was not given back")
	}
	h.Settle(again, true)
	if err := h.Discard(LossNotOwner, again); err != nil {
		t.Fatal(err)
	}
	if n := h.Totals(); n.Count != 0 || n.Bytes != 0 || len(h.Groups()) != 0 {
		t.Errorf("totals %+v, groups %+v", n, h.Groups())
	}
}

// A replica that carries hints marks the vnode before it acknowledges a write whose
// hint finds no room.
func TestCarrierMarksBeforeItAcknowledges(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s, h := openHints(t, fs)
	h.SetBounds(HintBounds{})
	r := carrier(t, s, h)
	var clone vfs.FS
	apply := applyOf(replicav1.Source_SOURCE_FIRST_HAND, 10)
	apply.GetApply().HintTargets = []uint64{2}
	r.Handle(context.Background(), "other:1", []*replicav1.Call{apply}, func(reply *replicav1.Reply) {
		if reply.GetError() != nil || reply.GetApply().GetCreditBytes() != 0 {
			t.Errorf("reply %+v", reply)
		}
		clone = fs.CrashClone(vfs.CrashCloneCfg{})
	})
	s.Close()
	s, _ = openHints(t, clone)
	defer s.Close()
	if d := s.Dirty(); len(d) != 1 || d[0].Place != (storage.Place{Namespace: 1}) {
		t.Errorf("dirty are %+v", d)
	}
}

// carrier returns node 1 of a ring of one vnode on nodes 1 and 2.
func carrier(t *testing.T, s *storage.Store, h *Hints) *Replica {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: 1, Settings: topology.DefaultSettings().Proto(), Ring: []*topologyv1.Vnode{{}}}
	for i := uint64(1); i <= 2; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
		pb.Ring[0].Slots = append(pb.Ring[0].Slots, &topologyv1.Slot{Node: i, Phase: topologyv1.Phase_PHASE_STABLE})
	}
	ns := topology.FoundingNamespace(2)
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	logger := slog.New(slog.DiscardHandler)
	return New(Config{
		Self: 1, Store: s, Clock: NewClock(func() int64 { return 5_000 }, 0, s.ReserveClock, logger), Fence: NewFence(top), Hints: h, Logger: logger,
		CatchUp: func(context.Context, uint64, string) error { return nil }, Refuse: func() *rpc.Error { return nil },
		HintBytesPerSecond: 1 << 20,
	})
}

func applyOf(source replicav1.Source, size int) *replicav1.Call {
	rec := record.Encode(record.Record{Version: record.Version{Time: 1, Incarnation: 1}, Kind: record.Value, Payload: make([]byte, size)})
	return &replicav1.Call{Epoch: 9, Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
		Namespace: 1, Source: source, Entries: []*replicav1.Entry{{Key: []byte("k"), Record: rec}},
	}}}
}

// A reply to hints carries a credit; no other does.
func TestHintsAreAnsweredWithACredit(t *testing.T) {
	s, h := openHints(t, vfs.NewMem())
	defer s.Close()
	r := carrier(t, s, h)
	send := func(source replicav1.Source) (credit uint64) {
		r.Handle(context.Background(), "other:1", []*replicav1.Call{applyOf(source, 1000)}, func(reply *replicav1.Reply) {
			if reply.GetError() != nil {
				t.Fatal(reply.GetError())
			}
			credit = reply.GetApply().GetCreditBytes()
		})
		return credit
	}
	if c := send(replicav1.Source_SOURCE_REPAIR); c != 0 {
		t.Errorf("a repair is answered with a credit of %d", c)
	}
	if c := send(replicav1.Source_SOURCE_HINT); c < 1<<19 || c > 1<<20 {
		t.Errorf("a hint is answered with a credit of %d", c)
	}
	r.cfg.Load = func() float64 { return 1 }
	if c := send(replicav1.Source_SOURCE_HINT); c != 0 {
		t.Errorf("under full load a hint is answered with a credit of %d", c)
	}
	if taken, granted := r.HintIntake(); taken < 2000 || granted != 0 {
		t.Errorf("%d bytes are taken, %d granted", taken, granted)
	}
}

// The credits of all senders together stay within the rate, and follow the load.
func TestIntake(t *testing.T) {
	const rate = 1 << 20
	now := time.Unix(1000, 0)
	i := newIntake(rate)
	if c := i.took("a", 1000, 0, now); c != rate {
		t.Errorf("an idle node grants %d", c)
	}
	if c := i.took("b", 1000, 0, now); c != rate/2 {
		t.Errorf("one of two senders gets %d", c)
	}
	if c := i.took("b", 1000, 0.5, now); c > rate/4 || c < rate/5 {
		t.Errorf("one of two senders gets %d of a node with half load", c)
	}
	if c := i.took("b", 3*rate, 0, now); c != 0 {
		t.Errorf("who sends thrice the rate gets %d", c)
	}
	now = now.Add(10 * time.Second)
	if c := i.took("b", 1000, 0, now); c != rate {
		t.Errorf("the only one left gets %d", c)
	}
	for n := range 10 * maxSenders {
		i.took(fmt.Sprint(n), 0, 0, now)
	}
	if n := len(i.mu.senders); n > maxSenders {
		t.Errorf("%d senders are told apart", n)
	}
	// A sender that keeps to its credit is granted the rate, and no more.
	i = newIntake(rate)
	sent := 0
	for at, end := now, now.Add(20*time.Second); at.Before(end); {
		c := i.took("a", rate/8, 0, at)
		sent += rate / 8
		at = at.Add(time.Duration(float64(rate/8) / float64(c) * float64(time.Second)))
	}
	if sent < 19*rate || sent > 21*rate {
		t.Errorf("%d KiB are taken in 20 s, the rate is %d KiB/s", sent>>10, rate>>10)
	}
}
