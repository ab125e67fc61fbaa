package topology_test

import (
	"slices"
	"testing"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
)

func TestService(t *testing.T) {
	all := must(quorum.Parse("all"))
	whole := stable(3)
	for name, test := range map[string]struct {
		third    topology.Slot // of vnode 0
		w        quorum.Spec
		down     []uint64
		want     topology.Service
		degraded int
	}{
		"all are up":                    {third: whole, want: topology.Service{FewestWriting: 3}},
		"one is down":                   {third: whole, down: []uint64{3}, want: topology.Service{FewestWriting: 2}, degraded: 4},
		"one is down and W is all":      {third: whole, w: all, down: []uint64{1}, want: topology.Service{NotWritable: 4, FewestWriting: 2}, degraded: 4},
		"two are down":                  {third: whole, down: []uint64{1, 2}, want: topology.Service{NotWritable: 4, NotReadable: 4, FewestWriting: 1}, degraded: 4},
		"a slot moves":                  {third: moving(3, 4, topology.WriteBothReadOld), want: topology.Service{FewestWriting: 3}},
		"a slot moves to one that died": {third: moving(3, 4, topology.WriteBothReadOld), down: []uint64{4}, want: topology.Service{FewestWriting: 2}},
		"a slot is filled anew":         {third: replacing(3, 4), want: topology.Service{FewestWriting: 3}, degraded: 1},
	} {
		c := formed(t)
		c.must(register("n4", 0, 1, "d"))
		if test.third != whole {
			slots := slices.Clone(c.state.Topology.Ring[0].Slots)
			slots[2] = test.third
			c.must(setVnode(0, slots...))
		}
		top := c.state.Topology
		ns := *top.Namespace("default")
		ns.W = test.w.Or(ns.W)
		up := func(node uint64) bool { return !slices.Contains(test.down, node) }
		if got := top.Service(&ns, up); got != test.want {
			t.Errorf("%s: %+v, want %+v", name, got, test.want)
		}
		if got := top.Degraded(up); got != test.degraded {
			t.Errorf("%s: %d vnodes are degraded, want %d", name, got, test.degraded)
		}
	}
}

// While N grows, a new slot counts as a replica once reads may use it, and writes need
// both quorums.
func TestServiceWhileNGrows(t *testing.T) {
	c := formed(t)
	c.must(register("n4", 0, 1, "d"))
	ns := c.state.Topology.Namespace("default").StepN(4)
	c.must(setRing(4, 1, 2, 3, 4), update(ns))
	top := c.state.Topology
	for _, test := range []struct {
		up       uint64 // the last node that is
		want     topology.Service
		degraded int
	}{
		{3, topology.Service{FewestWriting: 3}, 0},
		{2, topology.Service{NotWritable: 4, FewestWriting: 2}, 4}, // two of three, but not three of four
	} {
		up := func(node uint64) bool { return node <= test.up }
		if got := top.Service(&ns, up); got != test.want {
			t.Errorf("with %d nodes: %+v, want %+v", test.up, got, test.want)
		}
		if got := top.Degraded(up); got != test.degraded {
			t.Errorf("with %d nodes: %d vnodes are degraded, want %d", test.up, got, test.degraded)
		}
	}
}
