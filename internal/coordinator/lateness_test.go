package coordinator

import (
	"testing"
	"testing/synctest"
	"time"
)

// Another replica is asked at both times, whichever comes first, and the one of SlowRead is
// told from the one that takes from the budget.
func TestLateness(t *testing.T) {
	for _, tc := range []struct {
		typical, slow time.Duration
		want          []bool // whether SlowRead's
		at            []time.Duration
	}{
		{10 * time.Millisecond, 250 * time.Millisecond, []bool{false, true}, []time.Duration{30 * time.Millisecond, 250 * time.Millisecond}},
		{200 * time.Millisecond, 250 * time.Millisecond, []bool{true, false}, []time.Duration{250 * time.Millisecond, 600 * time.Millisecond}},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := &Coordinator{cfg: Config{SlowRead: tc.slow}}
			c.latency.observe(1, tc.typical)
			g := c.newGather(&result{}, []int{0})
			l := lateness{Timer: time.NewTimer(0), late: c.latency.late(1), slow: tc.slow}
			<-l.C
			l.Reset(min(l.late, l.slow))
			for i, want := range tc.want {
				<-l.C
				if at := time.Since(g.began); at != tc.at[i] {
					t.Errorf("typical %s: time %d is after %s, want %s", tc.typical, i, at, tc.at[i])
				}
				if slow := l.again(g); slow != want {
					t.Errorf("typical %s: time %d is SlowRead's: %v", tc.typical, i, slow)
				}
			}
			time.Sleep(time.Minute)
			select {
			case <-l.C:
				t.Errorf("typical %s: there is a third time", tc.typical)
			default:
			}
		})
	}
}
