package handoff

import (
	"testing"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// What a slot takes over where a namespace changes meets every write that was acknowledged
// and everything that a read has returned, which may lie on as few as N−R+1 slots.
func TestSourcesMeetWhatWasReadAndWritten(t *testing.T) {
	spec := func(n int) quorum.Spec {
		s, err := quorum.Parse(string(rune('0' + n)))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	f := &Filler{}
	for n := 1; n <= 5; n++ {
		for w := 1; w <= n; w++ {
			for r := n - w + 1; r <= n; r++ {
				for least := 1; least <= w; least++ {
					for _, change := range []topology.NChange{topology.Widening, topology.Narrowing, topology.Leveling} {
						ns := &topology.Namespace{ID: 1, N: n, W: spec(w), R: spec(r), LeastWriteAcks: least, Change: change}
						keep := change != topology.Widening
						have := f.sourcesWanted(job{assignment: assignment{Namespace: 1, Keep: keep}}, ns)
						if keep {
							have++ // its own copy
						}
						written := w
						if change == topology.Leveling {
							written = least
						}
						if have+written <= n || have+n-r+1 <= n || have > n {
							t.Errorf("N=%d W=%d (least %d) R=%d, change %d: %d slots", n, w, least, r, change, have)
						}
					}
				}
			}
		}
	}
}
