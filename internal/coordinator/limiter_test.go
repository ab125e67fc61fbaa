package coordinator

import (
	"testing"
	"time"
)

// A limit follows what is under way down while waits are long, and rises again while they
// are short.
func TestLimiter(t *testing.T) {
	l := newLimiter(10*time.Millisecond, 1000)
	now := time.Unix(1_000_000, 0)
	window := func(waited time.Duration, samples int) int64 {
		for range samples {
			now = now.Add(limitWindow / time.Duration(samples-1))
			l.observe(now, waited)
		}
		return l.limit.Load()
	}
	for range 500 {
		l.enter(1000)
	}
	l.observe(now, 0) // the first window begins
	if got := window(20*time.Millisecond, 20); got != 400 {
		t.Errorf("with 500 under way that wait too long the limit became %d, want 400", got)
	}
	if l.enter(l.limit.Load()) {
		t.Error("more than the limit were let in")
	}
	if got := l.wait(now); got < 19*time.Millisecond || got > 20*time.Millisecond {
		t.Errorf("the wait is %s", got)
	}
	if got := window(20*time.Millisecond, limitSamples/2); got != 400 {
		t.Errorf("a few samples changed the limit to %d", got)
	}
	for range 50 {
		window(20*time.Millisecond, 20)
	}
	if got := l.limit.Load(); got != leastLimit {
		t.Errorf("the limit fell to %d, want %d", got, leastLimit)
	}
	window(5*time.Millisecond, 20) // the present one has waits of before
	if got := window(5*time.Millisecond, 20); got <= leastLimit {
		t.Errorf("with short waits the limit is still %d", got)
	}
	for range 100 {
		window(5*time.Millisecond, 20)
	}
	if got := l.limit.Load(); got != 1000 {
		t.Errorf("after ten seconds of short waits the limit is %d, want 1000", got)
	}
	if now = now.Add(2 * time.Second); l.wait(now) != 0 {
		t.Error("a wait of long ago counts")
	}
}
