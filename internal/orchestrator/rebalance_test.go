package orchestrator

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// uneven returns a ring of which n4 has far less than the others.
func uneven(t *testing.T) (*topology.State, *Config) {
	s, cfg, moves := four(t)
	s = start(t, s, "apply", moves[:8])
	s = runOn(t, s, cfg, nil)
	return s, cfg
}

func TestRebalance(t *testing.T) {
	s, cfg := uneven(t)
	calm := func(o *observed) { o.now = time.Hour }
	if _, did := play(t, s, cfg, calm); len(did) != 0 {
		t.Fatalf("with the policy accept: %q", did)
	}
	s = setSettings(t, s, func(set *topology.Settings) { set.Rebalance.Policy = topology.RebalanceAuto })
	for name, busy := range map[string]func(*observed){
		"busy":     func(o *observed) { o.now, o.cpu = time.Hour, 0.41 },
		"degraded": func(o *observed) { o.now, o.dead = time.Hour, []uint64{2} },
		"unknown":  func(o *observed) { o.now, o.unknown = time.Hour, []uint64{3} },
	} {
		if _, did := play(t, s, cfg, busy); len(did) != 0 {
			t.Errorf("%s: %q", name, did)
		}
	}
	s, did := play(t, s, cfg, calm)
	happened(t, did, "slots are spread better", "operation 2 is done")
	if n := s.Topology.SlotCounts(3)[4]; n != 48 {
		t.Errorf("n4 has %d slots, want 48", n)
	}
	// It has come to rest.
	if _, did := play(t, s, cfg, func(o *observed) { o.now = 10 * time.Hour }); len(did) != 0 {
		t.Errorf("it goes on: %q", did)
	}
}

// An operation that was aborted can leave vnodes with two replicas in one zone.
func TestRebalanceSpreadsOverZones(t *testing.T) {
	cfg := testConfig(1)
	cfg.Bootstrap.FoundingNodes, cfg.Bootstrap.Vnodes = 6, 64
	s, _ := settle(t, nil, &cfg)
	for i := range 6 {
		s = registerNode(t, s, fmt.Sprint("n", i+1), fmt.Sprint("z", i%3))
	}
	s, _ = settle(t, s, &cfg)
	ring := s.Topology.Ring[0].Slots
	var moves []*topologyv1.Move
	for to := uint64(1); to <= 6 && len(moves) == 0; to++ { // to the zone of the second slot
		if n := s.Topology.Node(to); to != ring[1].Node && n.Zone == s.Topology.Node(ring[1].Node).Zone {
			moves = append(moves, &topologyv1.Move{From: ring[0].Node, To: to})
		}
	}
	s = runOn(t, start(t, s, "apply", moves), &cfg, nil)
	calm := func(o *observed) { o.now = time.Hour }
	if n := crowded(s.Topology, placement.Of(s.Topology)); n != 1 {
		t.Fatalf("%d vnodes are crowded", n)
	}
	if _, did := play(t, s, &cfg, calm); len(did) != 0 {
		t.Fatalf("with the policy accept: %q", did)
	}
	s = setSettings(t, s, func(set *topology.Settings) { set.Rebalance.Policy = topology.RebalanceAuto })
	s, did := play(t, s, &cfg, calm)
	happened(t, did, "1 vnodes have replicas in fewer zones than they could, and 0 after", "operation 2 is done")
	if n := crowded(s.Topology, placement.Of(s.Topology)); n != 0 {
		t.Errorf("%d vnodes are crowded", n)
	}
	if _, did := play(t, s, &cfg, func(o *observed) { o.now = 10 * time.Hour }); len(did) != 0 {
		t.Errorf("it goes on: %q", did)
	}
}

func TestRebalanceCoolsDown(t *testing.T) {
	s, cfg := uneven(t)
	s = setSettings(t, s, func(set *topology.Settings) { set.Rebalance.Policy = topology.RebalanceAuto })
	at := func(now time.Duration) func(*observed) { return func(o *observed) { o.now = now } }
	s, did := play(t, s, cfg, at(time.Hour))
	happened(t, did, "slots are spread better")
	s = start(t, s, "apply", movesTo(t, s, 1, 2, 3)) // somebody takes it all back
	s = runOn(t, s, cfg, nil)
	s = start(t, s, "apply", movesTo(t, s, 1, 2, 3, 4)[:8])
	s = runOn(t, s, cfg, nil)
	if _, did := play(t, s, cfg, at(time.Hour+59*time.Minute)); len(did) != 0 {
		t.Errorf("within the cooldown: %q", did)
	}
	_, did = play(t, s, cfg, at(time.Hour+61*time.Minute))
	happened(t, did, "slots are spread better")
}

func TestRebalanceByBytes(t *testing.T) {
	s, cfg := ringOfVnodes(t, 4, 64)
	s = setSettings(t, s, func(set *topology.Settings) {
		set.Rebalance.Policy, set.Placement = topology.RebalanceAuto, topology.PlaceWeighted
	})
	held := make(holdings, 1)
	for v := range s.Topology.Ring {
		bytes := uint64(1 << 20)
		if s.Topology.Ring[v].Slots[0].Node == 1 {
			bytes = 16 << 20
		}
		held[0] = append(held[0], bytes)
	}
	if _, did := play(t, s, cfg, func(o *observed) { o.now = time.Hour }); len(did) != 0 {
		t.Fatalf("before it is known what vnodes hold: %q", did)
	}
	before := excess(s.Topology, placement.Of(s.Topology), held)
	s, did := play(t, s, cfg, func(o *observed) { o.now, o.held = time.Hour, held })
	happened(t, did, "slots are spread better")
	if after := excess(s.Topology, placement.Of(s.Topology), held); before < 0.2 || after > before/2 {
		t.Errorf("a node has %.2f above the mean, and had %.2f: %s", after, before, strings.Join(did, "\n"))
	}
}
