package handoff

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// Records come in at the pace that is set, slower and slower while commits take too
// long, never slower than the least, and as fast as before when they do not.
func TestPaceFollowsCommits(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name        string
		target      time.Duration
		delay       time.Duration
		least, most float64 // MiB a second, after 20 s
	}{
		{"quick commits", 20 * time.Millisecond, time.Millisecond, 31, 32},
		{"slow commits", 20 * time.Millisecond, 100 * time.Millisecond, 0.9, 1.1},
		{"slow disk", 20 * time.Millisecond, 10 * time.Millisecond, 31, 32},
		{"nobody cares", 0, 100 * time.Millisecond, 31, 32},
	} {
		synctest.Test(t, func(t *testing.T) {
			delay := time.Millisecond
			p := newPacer(32*mib, c.target, func() time.Duration { return delay })
			taken := func(d time.Duration) float64 {
				ctx, cancel := context.WithTimeout(context.Background(), d)
				defer cancel()
				began, n := time.Now(), 0
				for p.wait(ctx, 2*mib) == nil {
					n += 2
				}
				return float64(n) / time.Since(began).Seconds()
			}
			if got := taken(10 * time.Second); got < 31 || got > 32.5 {
				t.Errorf("%s: %.1f MiB/s before", c.name, got)
			}
			delay = c.delay
			taken(20 * time.Second)
			if got := taken(20 * time.Second); got < c.least || got > c.most+0.5 {
				t.Errorf("%s: %.1f MiB/s, want %.1f to %.1f", c.name, got, c.least, c.most)
			}
			delay = time.Millisecond
			taken(20 * time.Second)
			if got := taken(10 * time.Second); got < 31 || got > 32.5 {
				t.Errorf("%s: %.1f MiB/s afterwards", c.name, got)
			}
		})
	}
	// What the disk takes in any case slows nothing, once it has been so for a while.
	synctest.Test(t, func(t *testing.T) {
		delay := time.Millisecond
		p := newPacer(32*mib, 20*time.Millisecond, func() time.Duration { return delay })
		for i := range 15 * 60 * 4 {
			p.adjust(time.Now())
			time.Sleep(paceInterval)
			if delay = 60 * time.Millisecond; i == 5*60*4 && p.bytesPerSecond() > 1.1*mib {
				t.Errorf("%.1f MiB/s after five minutes of slow commits", p.bytesPerSecond()/mib)
			}
		}
		if got := p.bytesPerSecond() / mib; got < 31 {
			t.Errorf("%.1f MiB/s after fifteen", got)
		}
	})
	// The pace settles where commits take what they may.
	synctest.Test(t, func(t *testing.T) {
		delay := time.Millisecond
		p := newPacer(64*mib, 20*time.Millisecond, func() time.Duration { return delay })
		for range 400 {
			p.adjust(time.Now())
			time.Sleep(paceInterval)
			delay = time.Millisecond + time.Duration(p.bytesPerSecond()/mib*float64(2*time.Millisecond))
		}
		if got := p.bytesPerSecond() / mib; got < 9 || got > 11 {
			t.Errorf("%.1f MiB/s where 10 make commits take 20 ms longer", got)
		}
	})
}
