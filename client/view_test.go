package client

import (
	"errors"
	"sync"
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
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

// A node that is cut off from the others takes them for unhealthy. A client that it
// still reaches must not avoid those for that.
func TestClientLeavesTheOpinionOfACutOffNode(t *testing.T) {
	health := func(nodes int, unhealthy ...uint64) *topologyv1.WatchTopologyResponse {
		r := &topologyv1.WatchTopologyResponse{}
		for i := range uint64(nodes) {
			r.Health = append(r.Health, &topologyv1.NodeHealth{Incarnation: i + 1, State: topologyv1.NodeHealth_STATE_HEALTHY})
		}
		for _, u := range unhealthy {
			r.Health[u-1].State = topologyv1.NodeHealth_STATE_UNHEALTHY
		}
		return r
	}
	for _, tc := range []struct {
		name   string
		answer *topologyv1.WatchTopologyResponse
		left   bool
	}{
		{"all is well", health(5), false},
		{"two are gone", health(5, 2, 4), false},
		{"most are gone", health(5, 2, 4, 5), true},
		{"half are gone", health(4, 2, 4), true},
		{"one of two is gone", health(2, 2), false},
	} {
		c := &Client{}
		c.view.Store(&view{topology: &topology.Topology{}, unhealthy: map[uint64]bool{1: true}})
		err := c.learn(tc.answer)
		if left := errors.Is(err, errCutOff); left != tc.left || !left && err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if kept := c.view.Load().unhealthy[1]; kept != tc.left {
			t.Errorf("%s: the old opinion was kept: %v", tc.name, kept)
		}
	}
}
