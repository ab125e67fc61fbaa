// Package hlc is a hybrid logical clock: timestamps that follow the wall clock
// where they can and the order of events where they must (Kulkarni et al.,
// "Logical Physical Clocks and Consistent Snapshots in Globally Distributed
// Databases", 2014). It never reads a clock itself; callers pass the wall time,
// and callers decide how far a clock may lead and what must be durable.
package hlc

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"
)

// counterBits is the width of the logical counter below the milliseconds.
const counterBits = 16

// Timestamp is 48 bits of milliseconds since 1970 followed by a 16-bit counter.
// The zero Timestamp is below every issued one.
type Timestamp uint64

// Max is the greatest timestamp there is, in the year 10889.
const Max = Timestamp(math.MaxUint64)

// At returns the first timestamp of a millisecond. Milliseconds outside the
// range of 48 bits are clamped to it.
func At(millis int64) Timestamp {
	switch {
	case millis < 0:
		return 0
	case millis >= 1<<48:
		return Max
	}
	return Timestamp(millis) << counterBits
}

// Millis returns the physical part, in milliseconds since 1970.
func (t Timestamp) Millis() int64 { return int64(t >> counterBits) }

// Counter returns the logical part.
func (t Timestamp) Counter() uint16 { return uint16(t) }

// Time returns the physical part as a time in UTC.
func (t Timestamp) Time() time.Time { return time.UnixMilli(t.Millis()).UTC() }

// String writes a timestamp as milliseconds and counter, for example
// 1767225600000.3.
func (t Timestamp) String() string { return fmt.Sprintf("%d.%d", t.Millis(), t.Counter()) }

// Clock issues timestamps. Its zero value has issued none. It is safe for
// concurrent use.
//
// Invariant 10: what Tick returns strictly increases, and exceeds everything
// that was joined before.
type Clock struct {
	last atomic.Uint64
}

// Tick returns a new timestamp: the wall clock's, or the one after the last
// where the wall clock is not ahead of it. An exhausted counter carries into the
// milliseconds, so the clock runs ahead of the wall rather than repeat itself.
func (c *Clock) Tick(wallMillis int64) Timestamp {
	for {
		last := c.last.Load()
		if last == uint64(Max) {
			panic("hlc: clock exhausted (invariant 10)")
		}
		next := max(last+1, uint64(At(wallMillis)))
		if c.last.CompareAndSwap(last, next) {
			return Timestamp(next)
		}
	}
}

// Join makes sure that later ticks exceed t.
func (c *Clock) Join(t Timestamp) {
	for {
		last := c.last.Load()
		if uint64(t) <= last || c.last.CompareAndSwap(last, uint64(t)) {
			return
		}
	}
}

// Last returns the greatest timestamp issued or joined.
func (c *Clock) Last() Timestamp { return Timestamp(c.last.Load()) }

// Lead returns by how many milliseconds the clock is ahead of the wall clock;
// zero when it is not.
func (c *Clock) Lead(wallMillis int64) int64 {
	return max(0, c.Last().Millis()-wallMillis)
}
