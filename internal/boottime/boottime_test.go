package boottime

import "testing"

func TestNowGoesForward(t *testing.T) {
	last := Now()
	for range 10_000 {
		now := Now()
		if now < last {
			t.Fatalf("%s after %s", now, last)
		}
		last = now
	}
	for Now() == last { // bounded by the clock's resolution
	}
}
