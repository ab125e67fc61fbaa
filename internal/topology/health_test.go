package topology_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Whoever follows the news knows all that is said of the nodes that there are, and is told
// nothing twice.
func TestHealthNews(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	told := map[uint64]*topologyv1.NodeHealth{}
	var known map[uint64]*topologyv1.NodeHealth
	said := map[uint64]*topologyv1.NodeHealth{}
	next := uint64(1)
	for range 1000 {
		changed := map[uint64]bool{}
		change := func(inc uint64) {
			changed[inc] = true
			said[inc] = &topologyv1.NodeHealth{Incarnation: inc, State: topologyv1.NodeHealth_State(1 + rng.IntN(2)), Reason: fmt.Sprint(rng.IntN(3)), SinceMs: rng.Uint64()}
		}
		for inc := range maps.Clone(said) {
			switch rng.IntN(20) {
			case 0:
				delete(said, inc)
			case 1:
				change(inc)
			}
		}
		for ; len(said) < 5; next++ {
			change(next)
		}
		pb := &topologyv1.Topology{ClusterId: "c", Epoch: 1, Vnodes: 2, Settings: topology.DefaultSettings().Proto()}
		var all []*topologyv1.NodeHealth
		for _, inc := range slices.Sorted(maps.Keys(said)) {
			pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: inc, Name: fmt.Sprint("n", inc)})
			all = append(all, proto.CloneOf(said[inc]))
		}
		top, err := topology.FromProto(pb)
		if err != nil {
			t.Fatal(err)
		}
		news := topology.HealthNews(told, all)
		for _, h := range news {
			if !changed[h.GetIncarnation()] {
				t.Fatalf("%v is told again", h)
			}
		}
		before := maps.Clone(known)
		old := known
		known = topology.HealthAfter(known, news, top)
		if !maps.Equal(old, before) {
			t.Fatal("what others may be reading was changed")
		}
		if !maps.EqualFunc(known, said, func(a, b *topologyv1.NodeHealth) bool { return proto.Equal(a, b) }) {
			t.Fatalf("%v is known, %v was said", known, said)
		}
	}
}
