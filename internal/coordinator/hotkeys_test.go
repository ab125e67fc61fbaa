package coordinator

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// Among many rare keys the popular ones are named, in order, with about their rates and never
// more; uniform traffic has none.
func TestHotKeys(t *testing.T) {
	var h hotKeys
	now := time.Unix(1_000_000, 0)
	rng := rand.New(rand.NewPCG(1, 1))
	draw := func(seconds int, popular bool) {
		for i := range seconds * 1000 { // what is drawn is a 16th of what is asked
			at := now.Add(time.Duration(i) * time.Millisecond)
			key, write := fmt.Sprint("rare ", rng.IntN(100_000)), false
			switch f := rng.Float64(); {
			case popular && f < 0.2:
				key = "first"
			case popular && f < 0.3:
				key, write = "second", true
			}
			h.draw(7, []byte(key), write, at)
		}
		now = now.Add(time.Duration(seconds) * time.Second)
	}
	draw(11, true)
	keys, perSecond, window := h.top(20, now)
	if len(keys) != 2 || string(keys[0].Key) != "first" || string(keys[1].Key) != "second" || keys[0].Namespace != 7 || keys[0].Bytes != 5 {
		t.Fatalf("hot keys %+v", keys)
	}
	if perSecond < 15_500 || perSecond > 16_500 || window < hotWindow || window > hotWindow+time.Second {
		t.Errorf("%.0f a second in %s", perSecond, window)
	}
	if k := keys[0]; k.ReadsPerSecond < 2_800 || k.ReadsPerSecond > 3_600 || k.WritesPerSecond != 0 {
		t.Errorf("the first has %+v", k)
	}
	if k := keys[1]; k.WritesPerSecond < 1_300 || k.WritesPerSecond > 1_900 || k.ReadsPerSecond != 0 {
		t.Errorf("the second has %+v", k)
	}
	if keys, _, _ := h.top(1, now); len(keys) != 1 {
		t.Errorf("%d keys, of one at most", len(keys))
	}
	if n := len(h.current.keys); n > hotCounters || len(h.current.index) != n {
		t.Errorf("%d keys are counted, %d in the index", n, len(h.current.index))
	}
	draw(21, false)
	if keys, _, _ := h.top(20, now); len(keys) != 0 {
		t.Errorf("uniform traffic has hot keys: %+v", keys)
	}
	if keys, perSecond, _ := h.top(20, now.Add(time.Hour)); len(keys) != 0 || perSecond != 0 {
		t.Errorf("an hour later: %+v, %.0f a second", keys, perSecond)
	}
}

// Long keys are cut, and are told apart all the same.
func TestLongHotKeys(t *testing.T) {
	var h hotKeys
	now := time.Unix(1_000_000, 0)
	long := make([]byte, 1000)
	for i := range 100 {
		long[999] = byte(i % 2)
		h.draw(1, long, false, now)
	}
	keys, _, _ := h.top(20, now)
	if len(keys) != 2 || len(keys[0].Key) != hotKeyBytes || keys[0].Bytes != 1000 {
		t.Errorf("hot keys %+v", keys)
	}
}
