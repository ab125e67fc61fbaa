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
)

// pacer is the pace at which a node takes records in. As in LEDBAT (RFC 6817) it is
// background work that keeps what others wait for it near a target: the pace grows
// while commits take less than that, and shrinks while they take more.
type pacer struct {
	limiter     *rate.Limiter
	least, most float64
	target      time.Duration        // 0: whatever commits take
	delay       func() time.Duration // of commits
	mu          struct {
		sync.Mutex
		changed time.Time
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
	off := max(-1, 1-float64(p.delay())/float64(p.target))
	next := float64(p.limiter.Limit()) * (1 + paceGain*off)
	p.limiter.SetLimitAt(now, rate.Limit(math.Min(math.Max(next, p.least), p.most)))
}

// bytesPerSecond is the present pace.
func (p *pacer) bytesPerSecond() float64 { return float64(p.limiter.Limit()) }
