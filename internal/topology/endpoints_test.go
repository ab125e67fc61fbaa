package topology

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEndpoints(t *testing.T) {
	stable := func(n uint64) Slot { return Slot{Node: n, Phase: Stable} }
	for _, c := range []struct {
		slots  []Slot
		n      int
		want   []uint64
		stable bool
	}{
		{[]Slot{stable(3), stable(1), stable(2)}, 3, []uint64{1, 2, 3}, true},
		{[]Slot{stable(3), stable(1), {Node: 1, Incoming: 4, Phase: WriteBothReadOld}}, 2, []uint64{1, 3}, true},
		{[]Slot{stable(3), {Node: 2, Incoming: 4, Phase: WriteBothReadNew}}, 2, []uint64{2, 3, 4}, false},
		{[]Slot{stable(3), {Node: 2, Incoming: 4, Phase: WriteNewReadNone}}, 2, []uint64{3, 4}, false},
	} {
		top := &Topology{Ring: []Vnode{{Slots: c.slots}}}
		top.index()
		got, st := top.Endpoints(0, &Namespace{N: c.n})
		if !slices.Equal(got, c.want) || st != c.stable {
			t.Errorf("%v, N=%d: %v, stable %v\n%s", c.slots, c.n, got, st, cmp.Diff(c.want, got))
		}
	}
}
