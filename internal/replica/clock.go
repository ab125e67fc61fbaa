package replica

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/rpc"
)

// Limits of clocks, in milliseconds.
const (
	// reserveAhead is how far ahead timestamps are made durable.
	reserveAhead = 100
	// MaxFirstHandAhead is how far a first-hand write or a client's token may be ahead
	// of the wall clock.
	MaxFirstHandAhead = 500
	// MaxLead is how far the hybrid clock may lead the wall clock of a node that
	// coordinates.
	MaxLead = 250
	// MaxOffset is how far a coordinating node's clock may be from the median of its
	// peers.
	MaxOffset = 250
	// minOpinions is how many peers it takes to stop a node; fewer only make it warn.
	minOpinions = 3
	// opinionAge is after how many milliseconds a peer's opinion counts no more.
	opinionAge = 30_000
)

// Clock issues the versions' timestamps of one node.
//
// Invariant 10: every timestamp is durably reserved before it is issued or the
// record that carries it is acknowledged, so a restarted node continues above it.
type Clock struct {
	wall    func() int64
	reserve func(hlc.Timestamp) error
	logger  *slog.Logger

	hlc      hlc.Clock
	reserved atomic.Uint64
	extend   chan struct{} // holds a token when the reservation runs out soon
	mu       struct {
		sync.Mutex // held while a reservation is written
	}
	peers struct {
		sync.Mutex
		opinions map[uint64]opinion
		warned   bool
	}
	// refusal is why the node does not coordinate, or nil.
	offset atomic.Pointer[offsetState]
}

// opinion is how far a peer's clock was ahead when it was last heard.
type opinion struct {
	ahead    time.Duration
	atMillis int64
}

type offsetState struct {
	// offset is how far this clock is ahead of the median of the peers.
	offset   time.Duration
	opinions int
}

// NewClock returns a clock that continues above what has been reserved. wall
// returns milliseconds since 1970; reserve returns when a timestamp is durable.
// Run must be called.
func NewClock(wall func() int64, reserved hlc.Timestamp, reserve func(hlc.Timestamp) error, logger *slog.Logger) *Clock {
	c := &Clock{wall: wall, reserve: reserve, logger: logger, extend: make(chan struct{}, 1)}
	c.peers.opinions = map[uint64]opinion{}
	c.offset.Store(&offsetState{})
	c.hlc.Join(reserved)
	c.reserved.Store(uint64(reserved))
	return c
}

// Run extends the reservation before it runs out, until ctx ends or the disk fails.
func (c *Clock) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.extend:
			if err := c.extendTo(max(c.hlc.Last(), hlc.At(c.wall()))); err != nil {
				return err
			}
		}
	}
}

// Wall returns the wall clock, in milliseconds since 1970.
func (c *Clock) Wall() int64 { return c.wall() }

// Now returns the later of the hybrid clock and the wall clock, in milliseconds: the
// time by which expiry is judged.
func (c *Clock) Now() int64 { return max(c.hlc.Last().Millis(), c.wall()) }

// Last returns the greatest timestamp issued or seen.
func (c *Clock) Last() hlc.Timestamp { return c.hlc.Last() }

// Tick issues a timestamp. Errors are those of the disk.
func (c *Clock) Tick() (hlc.Timestamp, error) {
	ts := c.hlc.Tick(c.wall())
	return ts, c.cover(ts)
}

// Join takes in a timestamp that was seen, and returns when a restart would know
// of it too.
func (c *Clock) Join(ts hlc.Timestamp) error {
	c.hlc.Join(ts)
	return c.cover(ts)
}

// cover returns when ts is reserved.
func (c *Clock) cover(ts hlc.Timestamp) error {
	reserved := hlc.Timestamp(c.reserved.Load())
	if reserved.Millis()-ts.Millis() < reserveAhead/2 && !mutant.On("clock-not-durable") {
		select {
		case c.extend <- struct{}{}:
		default:
		}
	}
	if ts <= reserved || mutant.On("clock-not-durable") {
		return nil
	}
	return c.extendTo(ts)
}

// extendTo makes the reservation cover ts and a little more.
func (c *Clock) extendTo(ts hlc.Timestamp) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	want := hlc.At(ts.Millis() + reserveAhead)
	if uint64(want) <= c.reserved.Load() {
		return nil
	}
	if err := c.reserve(want); err != nil {
		return fmt.Errorf("reserve clock: %w", err)
	}
	c.reserved.Store(uint64(want))
	return nil
}

// CheckAhead refuses a timestamp that is too far ahead of the wall clock.
func (c *Clock) CheckAhead(ts hlc.Timestamp) *rpc.Error {
	ahead := ts.Millis() - c.wall()
	if ahead <= MaxFirstHandAhead {
		return nil
	}
	return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonClockSkew,
		"timestamp is %d ms ahead of this node's clock, the limit is %d ms", ahead, MaxFirstHandAhead).
		With("ahead_ms", ahead).With("limit_ms", MaxFirstHandAhead)
}

// MayCoordinate returns why this node must not issue versions now, or nil.
func (c *Clock) MayCoordinate() *rpc.Error {
	if lead := c.hlc.Lead(c.wall()); lead > MaxLead {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonClockSkew,
			"this node's clock is %d ms behind versions it has seen, the limit is %d ms: check its time synchronisation", lead, MaxLead).
			With("lead_ms", lead).With("limit_ms", MaxLead)
	}
	if o := c.offset.Load(); o.opinions >= minOpinions && o.beyond() {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonClockSkew,
			"this node's clock is off by %s against the median of %d peers, the limit is %d ms: check its time synchronisation", o.offset, o.opinions, MaxOffset).
			With("offset_ms", o.offset.Milliseconds()).With("limit_ms", MaxOffset)
	}
	return nil
}

func (o *offsetState) beyond() bool { return o.offset.Abs() > MaxOffset*time.Millisecond }

// Observe notes how far a peer's wall clock is ahead of this node's.
func (c *Clock) Observe(peer uint64, ahead time.Duration) {
	now := c.wall()
	c.peers.Lock()
	defer c.peers.Unlock()
	c.peers.opinions[peer] = opinion{ahead, now}
	var all []time.Duration
	for p, o := range c.peers.opinions {
		if age := now - o.atMillis; age > opinionAge || age < -opinionAge {
			delete(c.peers.opinions, p)
			continue
		}
		all = append(all, o.ahead)
	}
	slices.Sort(all)
	// With an even number the middle pair's mean.
	median := (all[(len(all)-1)/2] + all[len(all)/2]) / 2
	next := &offsetState{offset: -median, opinions: len(all)}
	c.offset.Store(next)
	if bad := next.beyond(); bad != c.peers.warned {
		c.peers.warned = bad
		if bad {
			c.logger.Warn("clock is off against its peers", "offset", next.offset, "opinions", next.opinions,
				"stops_coordinating", next.opinions >= minOpinions)
		} else {
			c.logger.Info("clock agrees with its peers again", "offset", next.offset)
		}
	}
}

// Offset returns how far this clock is ahead of the median of so many peers.
func (c *Clock) Offset() (ahead time.Duration, opinions int) {
	o := c.offset.Load()
	return o.offset, o.opinions
}

// Lead returns how many milliseconds the hybrid clock leads the wall clock.
func (c *Clock) Lead() int64 { return c.hlc.Lead(c.wall()) }
