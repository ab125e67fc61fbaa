package replica

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
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
	// minWitnesses is how many peers it takes to judge what this node's own replica may
	// take; see CheckAhead.
	minWitnesses = 2
	// opinionAge is after how long a peer's opinion counts no more.
	opinionAge = 30 * time.Second
)

// Clock issues the versions' timestamps of one node.
//
// Invariant 10: every timestamp is durably reserved before it is issued or the
// record that carries it is acknowledged, so a restarted node continues above it.
type Clock struct {
	wall    func() int64
	reserve func(hlc.Timestamp) error
	logger  *slog.Logger
	// began and wallBegan are the times at which the clock was made, by the clock that
	// nobody sets and by the wall clock.
	began     time.Time
	wallBegan int64

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
	median atomic.Pointer[median]
}

// opinion is a peer's drift when it was last heard: what drift is for this node's own
// wall clock. Both are against a clock that nobody sets, so that a jump of the wall
// clock shows at once, and not when the peers are heard the next time.
type opinion struct {
	drift time.Duration
	at    time.Time
}

// median is the middle of the peers' drifts; the middle pair, of an even number.
type median struct {
	low, high time.Duration
	opinions  int
}

// NewClock returns a clock that continues above what has been reserved. wall
// returns milliseconds since 1970; reserve returns when a timestamp is durable.
// Run must be called.
func NewClock(wall func() int64, reserved hlc.Timestamp, reserve func(hlc.Timestamp) error, logger *slog.Logger) *Clock {
	c := &Clock{wall: wall, reserve: reserve, logger: logger, extend: make(chan struct{}, 1), began: time.Now(), wallBegan: wall()}
	c.peers.opinions = map[uint64]opinion{}
	c.median.Store(&median{})
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

// CheckAhead refuses a timestamp that is too far ahead of the wall clock; or of the
// peers' clocks, where they agree that this one is ahead. They refuse what this node
// coordinates then. Were its own replica to take it, it would spread from there, and
// stop every node whose clock is right.
func (c *Clock) CheckAhead(ts hlc.Timestamp) *rpc.Error {
	now := c.wall()
	if offset, opinions := c.Offset(); opinions >= minWitnesses && beyond(offset) {
		now -= max(0, offset.Milliseconds())
	}
	ahead := ts.Millis() - now
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
	return c.MayJudge()
}

// MayJudge returns why this node must not judge by its wall clock what has expired, or
// nil. What versions it has seen does not matter to that.
func (c *Clock) MayJudge() *rpc.Error {
	if offset, opinions := c.Offset(); opinions >= minOpinions && beyond(offset) {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonClockSkew,
			"this node's clock is off by %s against the median of %d peers, the limit is %d ms: check its time synchronisation", offset.Round(time.Millisecond), opinions, MaxOffset).
			With("offset_ms", offset.Milliseconds()).With("limit_ms", MaxOffset)
	}
	return nil
}

// Problem returns in words what is wrong with the clock, also where the peers are too
// few to stop the node, or "".
func (c *Clock) Problem() string {
	offset, opinions := c.Offset()
	if err := c.MayCoordinate(); err != nil {
		return strings.Replace(err.Message, "this node's", "its", 1)
	}
	if opinions > 0 && beyond(offset) {
		return fmt.Sprintf("its clock is off by %s against %d of its peers, too few to be sure whose is wrong (it takes %d): check their time synchronisation",
			offset.Round(time.Millisecond), opinions, minOpinions)
	}
	return ""
}

func beyond(offset time.Duration) bool { return offset.Abs() > MaxOffset*time.Millisecond }

// drift returns how far the wall clock has moved away from a clock that nobody sets,
// since it was made.
func (c *Clock) drift() time.Duration {
	return time.Duration(c.wall()-c.wallBegan)*time.Millisecond - time.Since(c.began)
}

// Observe notes how far a peer's wall clock is ahead of this node's.
func (c *Clock) Observe(peer uint64, ahead time.Duration) {
	c.peers.Lock()
	defer c.peers.Unlock()
	now := time.Now()
	c.peers.opinions[peer] = opinion{c.drift() + ahead, now}
	var all []time.Duration
	for p, o := range c.peers.opinions {
		if now.Sub(o.at) > opinionAge {
			delete(c.peers.opinions, p)
			continue
		}
		all = append(all, o.drift)
	}
	slices.Sort(all)
	c.median.Store(&median{low: all[(len(all)-1)/2], high: all[len(all)/2], opinions: len(all)})
	offset, opinions := c.Offset()
	if bad := beyond(offset); bad != c.peers.warned {
		c.peers.warned = bad
		if bad {
			c.logger.Warn("clock is off against its peers", "offset", offset, "opinions", opinions,
				"stops_coordinating", opinions >= minOpinions)
		} else {
			c.logger.Info("clock agrees with its peers again", "offset", offset)
		}
	}
}

// Offset returns how far this clock is ahead of the median of so many peers. Of an even
// number the nearer one of the middle pair counts, or none when this clock lies between
// the two: so of three nodes the one that is off is found, and not the other two.
func (c *Clock) Offset() (ahead time.Duration, opinions int) {
	m := c.median.Load()
	if m.opinions == 0 {
		return 0, 0
	}
	own := c.drift()
	return own - min(max(own, m.low), m.high), m.opinions
}

// Lead returns how many milliseconds the hybrid clock leads the wall clock.
func (c *Clock) Lead() int64 { return c.hlc.Lead(c.wall()) }
