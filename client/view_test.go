package client

import (
	"sync"
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// A refresh and the watch take in topologies at once, in any order.
func TestTopologyOnlyGoesForward(t *testing.T) {
	const last = 200
	c := &Client{}
	c.view.Store(&view{topology: &topology.Topology{}})
	var learning sync.WaitGroup
	for epoch := uint64(1); epoch <= last; epoch++ {
		learning.Go(func() {
			c.advance(&topology.Topology{Epoch: epoch}, nil)
			if got := c.view.Load().topology.Epoch; got < epoch {
				t.Errorf("epoch %d after %d was taken in", got, epoch)
			}
		})
		learning.Go(func() { c.advance(nil, map[uint64]bool{1: true}) })
	}
	learning.Wait()
	if v := c.view.Load(); v.topology.Epoch != last || !v.unhealthy[1] {
		t.Errorf("epoch %d, unhealthy %v", v.topology.Epoch, v.unhealthy)
	}
}
