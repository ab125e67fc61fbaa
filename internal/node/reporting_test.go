package node

import (
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
)

func TestLease(t *testing.T) {
	now := time.Hour
	n := &Node{cfg: Config{Seams: Seams{BootClock: func() time.Duration { return now }}}}
	r := newReporting(n)
	at := func(epoch uint64) *topology.Topology { return &topology.Topology{Epoch: epoch} }
	inSync := topology.Copy{State: topology.InSync}
	if r.leased(at(5), inSync) {
		t.Error("it is leased before anything was granted")
	}
	r.mu.epoch, r.mu.until = 5, now+2*time.Second
	nextGeneration := uint64(1)<<48 + 5
	for what, c := range map[string]struct {
		epoch uint64
		copy  topology.Copy
		want  bool
	}{
		"as granted":       {5, inSync, true},
		"in a later epoch": {6, inSync, true},
		"in an earlier one, which may lack evictions": {4, inSync, false},
		"in a later generation":                       {nextGeneration, inSync, false},
		"not in sync":                                 {5, topology.Copy{State: topology.Behind}, false},
		"being evicted":                               {5, topology.Copy{State: topology.Evicting}, false},
		"joining":                                     {5, topology.Copy{State: topology.Joining}, false},
	} {
		if got := r.leased(at(c.epoch), c.copy); got != c.want {
			t.Errorf("%s: leased is %t", what, got)
		}
	}
	now += 2 * time.Second
	if r.leased(at(5), inSync) {
		t.Error("a lease that is over holds")
	}
}

// What was checked must be what the snapshot holds: in between a copy may have been given up
// and its records removed, or begun anew.
func TestAReportKeepsTheCopiesThatWereChecked(t *testing.T) {
	with := func(copies ...topology.Copy) *topology.Topology {
		return &topology.Topology{Ring: []topology.Vnode{{Copies: copies}}}
	}
	c := &chosen{namespace: 1, vnodes: []uint32{0}, since: []uint64{7}}
	if !c.kept(with(topology.Copy{Namespace: 1, Node: 4, State: topology.InSync, Since: 7}), 4) {
		t.Error("the copy is as it was")
	}
	for what, now := range map[string]*topology.Topology{
		"given up":                               with(),
		"elsewhere":                              with(topology.Copy{Namespace: 1, Node: 5, State: topology.InSync, Since: 7}),
		"begun anew":                             with(topology.Copy{Namespace: 1, Node: 4, State: topology.Filling, Since: 9}),
		"in sync again, after it was begun anew": with(topology.Copy{Namespace: 1, Node: 4, State: topology.InSync, Since: 12}),
	} {
		if c.kept(now, 4) {
			t.Errorf("a copy that was %s is taken for what was checked", what)
		}
	}
}
