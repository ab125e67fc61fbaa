package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// Invariant 10: nothing is issued or vouched for that is not reserved, and a restart
// goes on above it, whatever the wall clock does.
func TestClockReservesBeforeUse(t *testing.T) {
	var reserved hlc.Timestamp
	wall := int64(1_000_000)
	writes := 0
	reserve := func(ts hlc.Timestamp) error {
		if ts.Millis() > wall+600+reserveAhead {
			t.Fatalf("%d ms ahead are reserved", ts.Millis()-wall)
		}
		reserved, writes = max(reserved, ts), writes+1
		return nil
	}
	clock := func() *Clock {
		return NewClock(func() int64 { return wall }, reserved, reserve, slog.New(slog.DiscardHandler))
	}
	c := clock()
	var last hlc.Timestamp
	for i := range 2000 {
		ts, err := c.Tick()
		if err != nil {
			t.Fatal(err)
		}
		if ts <= last || ts > reserved {
			t.Fatalf("issued %s after %s, with %s reserved", ts, last, reserved)
		}
		last = ts
		switch {
		case i%100 == 0:
			wall++
		case i == 700:
			wall -= 5000
			c = clock() // a restart, with the clock set back
		case i == 1400:
			if err := c.Join(hlc.At(wall + 300)); err != nil {
				t.Fatal(err)
			}
			last = hlc.At(wall + 300)
			if last > reserved {
				t.Fatal("a joined timestamp is not reserved")
			}
			c = clock()
		}
	}
	if writes > 50 {
		t.Errorf("%d reservations for 2000 timestamps", writes)
	}
	failing := NewClock(func() int64 { return wall }, 0, func(hlc.Timestamp) error { return errors.New("disk") }, nil)
	if _, err := failing.Tick(); err == nil {
		t.Error("a timestamp that cannot be reserved is issued")
	}
}

// The reservation is extended in the background before it runs out.
func TestClockExtendsInTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		inline := false
		c := NewClock(func() int64 { return time.Now().UnixMilli() }, 0, func(hlc.Timestamp) error {
			mu.Lock()
			defer mu.Unlock()
			if inline {
				t.Error("a caller had to wait for a reservation")
			}
			return nil
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.Run(ctx) })
		for range 100 {
			mu.Lock()
			inline = true
			mu.Unlock()
			if c.Last() == 0 { // the first one has to wait
				mu.Lock()
				inline = false
				mu.Unlock()
			}
			if _, err := c.Tick(); err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			inline = false
			mu.Unlock()
			synctest.Wait()
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
		wg.Wait()
	})
}

func TestClockSkewLimits(t *testing.T) {
	wall := int64(1_000_000)
	c := NewClock(func() int64 { return wall }, 0, func(hlc.Timestamp) error { return nil }, slog.New(slog.DiscardHandler))
	if err := c.CheckAhead(hlc.At(wall + 500)); err != nil {
		t.Error(err)
	}
	if c.CheckAhead(hlc.At(wall+501)) == nil {
		t.Error("501 ms ahead passes")
	}
	c.Join(hlc.At(wall + 250))
	if err := c.MayCoordinate(); err != nil {
		t.Error(err)
	}
	c.Join(hlc.At(wall + 251))
	if err := c.MayCoordinate(); err == nil || err.Details["lead_ms"] != "251" || c.Problem() == "" {
		t.Errorf("a lead of 251 ms: %v", err)
	}
	if err := c.MayJudge(); err != nil {
		t.Errorf("a lead says that the wall clock is off: %v", err)
	}
}

// testClock returns a clock whose wall clock is ahead by what set sets. It is for
// synctest bubbles.
func testClock() (c *Clock, set func(ahead time.Duration)) {
	var ahead time.Duration
	c = NewClock(func() int64 { return time.Now().Add(ahead).UnixMilli() }, 0, func(hlc.Timestamp) error { return nil }, slog.New(slog.DiscardHandler))
	return c, func(d time.Duration) { ahead = d }
}

func TestClockAgainstItsPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := testClock()
		for i, tc := range []struct {
			ahead time.Duration // of a peer
			ok    bool
		}{
			{2 * time.Second, true}, {2 * time.Second, true}, {2 * time.Second, false}, // three opinions
			{0, false}, {0, false},
			{0, true}, // 3 against 3: this clock's own word counts
			{0, true},
		} {
			c.Observe(uint64(i), tc.ahead)
			if err := c.MayCoordinate(); (err == nil) != tc.ok || (c.MayJudge() == nil) != tc.ok {
				t.Errorf("after %d opinions: %v", i+1, err)
			}
		}
		time.Sleep(opinionAge + time.Second)
		c.Observe(99, time.Hour)
		if _, opinions := c.Offset(); opinions != 1 || c.MayCoordinate() != nil {
			t.Errorf("%d opinions: old ones count", opinions)
		}
		if p := c.Problem(); !strings.Contains(p, "too few to be sure") {
			t.Errorf("one opinion is told of as %q", p)
		}
	})
}

// A jump shows at once, in both directions, though no peer was heard since.
func TestClockJumpShowsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, jump := range []time.Duration{10 * time.Minute, -10 * time.Minute, 251 * time.Millisecond, -251 * time.Millisecond} {
			c, set := testClock()
			for p := range uint64(3) {
				c.Observe(p, 0)
			}
			time.Sleep(time.Second)
			if err := c.MayCoordinate(); err != nil {
				t.Fatal(err)
			}
			set(jump)
			if offset, _ := c.Offset(); offset != jump || c.MayJudge() == nil {
				t.Errorf("after a jump of %s the offset is %s: %v", jump, offset, c.MayJudge())
			}
			set(0)
			if err := c.MayJudge(); err != nil {
				t.Errorf("after a jump of %s and back: %v", jump, err)
			}
		}
	})
}

// Of three nodes the one that is off is found by the other two, and finds it itself.
// Its own replica takes no more than theirs do, and so nothing that would stop them.
func TestOneOfThreeClocksIsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, _ := testClock()
		good.Observe(2, 0)
		good.Observe(3, 10*time.Minute)
		if p := good.Problem(); p != "" {
			t.Errorf("a good clock's problem: %s", p)
		}
		bad, set := testClock()
		set(10 * time.Minute)
		bad.Observe(1, -10*time.Minute)
		now := hlc.At(bad.Wall())
		if err := bad.CheckAhead(now); err != nil {
			t.Errorf("one peer makes a replica refuse: %v", err)
		}
		bad.Observe(2, -10*time.Minute)
		if offset, _ := bad.Offset(); offset != 10*time.Minute || bad.MayCoordinate() != nil || bad.Problem() == "" {
			t.Errorf("offset %s, %v, problem %q", offset, bad.MayCoordinate(), bad.Problem())
		}
		if bad.CheckAhead(now) == nil {
			t.Error("it takes what both peers refuse")
		}
		if err := bad.CheckAhead(hlc.At(time.Now().UnixMilli() + 500)); err != nil {
			t.Errorf("it refuses what its peers take: %v", err)
		}
		// One that is behind goes by its own clock: its peers take what it takes.
		set(-10 * time.Minute)
		if bad.CheckAhead(hlc.At(time.Now().UnixMilli())) == nil {
			t.Error("a timestamp 10 minutes ahead of a clock that is behind passes")
		}
	})
}

func TestFence(t *testing.T) {
	at := func(e uint64) *topology.Topology { return &topology.Topology{Epoch: e} }
	f := NewFence(at(1))
	first := f.enter()
	if !f.Advance(at(3)) || f.Advance(at(3)) || f.Advance(at(2)) {
		t.Fatal("a fence advances to newer topologies only")
	}
	second := f.enter()
	if first.topology.Epoch != 1 || second.topology.Epoch != 3 {
		t.Fatalf("requests run under epochs %d and %d", first.topology.Epoch, second.topology.Epoch)
	}
	if got := f.Drained(); got != 1 {
		t.Errorf("drained is %d while a request runs under epoch 1", got)
	}
	f.Advance(at(4))
	second.leave()
	if got := f.Drained(); got != 1 {
		t.Errorf("drained is %d while a request runs under epoch 1", got)
	}
	first.leave()
	if got := f.Drained(); got != 4 {
		t.Errorf("drained is %d, want 4", got)
	}
}

// However requests and topologies race, a request never runs under an epoch below
// the one that is drained.
func TestFenceUnderRaces(t *testing.T) {
	f := NewFence(&topology.Topology{Epoch: 1})
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				l := f.enter()
				if d := f.Drained(); d > l.topology.Epoch {
					t.Errorf("epoch %d is drained while a request runs under %d", d, l.topology.Epoch)
				}
				l.leave()
			}
		})
	}
	for e := uint64(2); e < 3000; e++ {
		f.Advance(&topology.Topology{Epoch: e})
	}
	close(stop)
	wg.Wait()
}

func TestStoreErrors(t *testing.T) {
	for err, reason := range map[error]string{
		storage.ErrDiskFull:                            rpc.ReasonDiskFull,
		fmt.Errorf("x: %w", storage.ErrCorrupt):        rpc.ReasonCorrupt,
		errors.New("something the disk said just now"): rpc.ReasonInternal,
	} {
		if e := storeError(err); e.Reason != reason || !strings.Contains(e.Message, err.Error()) {
			t.Errorf("%v becomes %+v", err, e)
		}
	}
	if _, err := header([]byte("junk")); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("header of junk: %v", err)
	}
	if b, err := header([]byte("\x01\x01\x00\x00\x00\x00\x00\x00\x00\x01\x01payload")); err != nil || bytes.Contains(b, []byte("payload")) {
		t.Errorf("header %x, %v", b, err)
	}
}
