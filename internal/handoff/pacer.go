package handoff

import (
	"context"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// paceInterval is the time between two changes of the pace.
	paceInterval = 250 * time.Millisecond
	// leastPace is kept up however long commits take, in bytes a second: a node that has
	// more to do than it can must be relieved some day.
	leastPace = 1 << 20
	// paceGain is by how much of itself the pace changes at once, at most.
	paceGain = 0.25
	// baseMinutes is for how long the least delay is remembered.
	baseMinutes = 10
)

// pacer is the pace at which a node takes records in. As in LEDBAT (RFC 6817) it is
// background work that keeps what others wait for it near a target: the pace grows
// while commits take less than that longer than they have to, and shrinks while they
// take more. What they have to take, on a slow disk, is the least that they took in the
// last minutes; where that is more than the target, they may take twice as long.
type pacer struct {
	limiter     *rate.Limiter
	least, most float64
	target      time.Duration        // 0: whatever commits take
	delay       func() time.Duration // of commits; 0: there are none
	mu          struct {
		sync.Mutex
		changed time.Time
		base    [baseMinutes]time.Duration // the least of a minute, 0 if unknown
		minute  int64                      // of the latest
	}
}

func newPacer(bytesPerSecond int, target time.Duration, delay func() time.Duration) *pacer {
	most := float64(bytesPerSecond)
	burst := min(max(bytesPerSecond/4, 64<<10), 1<<20)
	return &pacer{limiter: rate.NewLimiter(rate.Limit(most), burst), least: min(leastPace, most), most: most, target: target, delay: delay}
}

// wait waits until so many bytes may be taken in.
func (p *pacer) wait(ctx context.Context, size int) error {
	for left := size; left > 0; {
		p.adjust(time.Now())
		n := min(left, p.limiter.Burst())
		if err := p.limiter.WaitN(ctx, n); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// adjust changes the pace, if it is time to.
func (p *pacer) adjust(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.target == 0 || now.Sub(p.mu.changed) < paceInterval {
		return
	}
	p.mu.changed = now
	delay := p.delay()
	base := p.base(delay, now)
	off := max(-1, 1-float64(delay-base)/float64(max(p.target, base)))
	next := float64(p.limiter.Limit()) * (1 + paceGain*off)
	p.limiter.SetLimitAt(now, rate.Limit(math.Min(math.Max(next, p.least), p.most)))
}

// base notes a delay, and returns the least of the last minutes.
// REQUIRES: mu is held.
func (p *pacer) base(delay time.Duration, now time.Time) time.Duration {
	minute := now.Unix() / 60
	for ; p.mu.minute < minute; p.mu.minute++ {
		if p.mu.minute < minute-baseMinutes {
			p.mu.minute = minute - baseMinutes
		}
		p.mu.base[(p.mu.minute+1)%baseMinutes] = 0
	}
	least := delay
	for _, b := range p.mu.base {
		if b != 0 && (least == 0 || b < least) {
			least = b
		}
	}
	if b := &p.mu.base[minute%baseMinutes]; delay != 0 && (*b == 0 || delay < *b) {
		*b = delay
	}
	return min(least, delay)
}

// bytesPerSecond is the present pace.
func (p *pacer) bytesPerSecond() float64 { return float64(p.limiter.Limit()) }
