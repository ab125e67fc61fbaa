package hlc_test

import (
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/hlc"
)

func TestTimestampParts(t *testing.T) {
	for _, tc := range []struct {
		millis int64
		want   hlc.Timestamp
	}{
		{0, 0},
		{-5, 0},
		{1, 1 << 16},
		{1767225600000, 1767225600000 << 16},
		{1<<48 - 1, (1<<48 - 1) << 16},
		{1 << 48, hlc.Max},
	} {
		if got := hlc.At(tc.millis); got != tc.want {
			t.Errorf("At(%d) = %d, want %d", tc.millis, got, tc.want)
		}
	}
	ts := hlc.At(1767225600000) + 3
	if ts.Millis() != 1767225600000 || ts.Counter() != 3 || ts.String() != "1767225600000.3" {
		t.Errorf("parts of %s are wrong", ts)
	}
}

// Whatever the wall clock does and whatever is joined, ticks strictly increase,
// exceed all that was joined, and never fall behind the wall clock.
func TestTickIsMonotonic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var c hlc.Clock
		var greatest hlc.Timestamp
		wall := rapid.Int64Range(0, 1<<40).Draw(t, "wall")
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			wall += rapid.Int64Range(-10_000, 10_000).Draw(t, "jump")
			if rapid.Bool().Draw(t, "join") {
				joined := hlc.At(wall + rapid.Int64Range(-1000, 100_000).Draw(t, "offset"))
				c.Join(joined)
				greatest = max(greatest, joined)
				continue
			}
			ts := c.Tick(wall)
			if ts <= greatest {
				t.Fatalf("tick %s is not above %s", ts, greatest)
			}
			if ts < hlc.At(wall) {
				t.Fatalf("tick %s is behind the wall clock %d", ts, wall)
			}
			greatest = ts
		}
		if c.Last() != greatest {
			t.Fatalf("Last() = %s, want %s", c.Last(), greatest)
		}
	})
}

func TestCounterCarriesIntoMillis(t *testing.T) {
	var c hlc.Clock
	c.Join(hlc.At(100) + 0xffff)
	if got := c.Tick(100); got != hlc.At(101) {
		t.Errorf("tick after an exhausted counter = %s, want %s", got, hlc.At(101))
	}
	if got := c.Lead(100); got != 1 {
		t.Errorf("Lead = %d, want 1", got)
	}
}

func TestConcurrentTicksAreDistinct(t *testing.T) {
	var c hlc.Clock
	const callers, each = 8, 1000
	results := make([][]hlc.Timestamp, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range each {
				results[i] = append(results[i], c.Tick(5))
			}
		})
	}
	wg.Wait()
	seen := make(map[hlc.Timestamp]bool, callers*each)
	for _, r := range results {
		for i, ts := range r {
			if seen[ts] {
				t.Fatalf("%s was issued twice", ts)
			}
			seen[ts] = true
			if i > 0 && ts <= r[i-1] {
				t.Fatalf("%s after %s", ts, r[i-1])
			}
		}
	}
}
