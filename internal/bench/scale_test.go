package bench_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// TestScale measures what grows with nodes, for docs/scale.md.
func TestScale(t *testing.T) {
	if os.Getenv("KVASIR_SCALE") == "" {
		t.Skip("KVASIR_SCALE=1 measures what grows with nodes; it asserts nothing")
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nnodes\tvnodes\tplan the ring\tplan a tenth more\tslots moved, of the least\ttopology, bytes\ta move's delta, bytes\ttaken in\tin memory, bytes\t\n")
	for _, size := range []struct{ nodes, vnodes int }{{10, 256}, {100, 4096}, {1000, 1 << 16}, {10_000, 1 << 16}} {
		scaleRing(t, w, size.nodes, size.vnodes)
	}
	w.Flush()
	t.Log(b.String())
	const links = 500
	t.Logf("a link takes %d bytes, both ends together", memoryOfLinks(t, links)/links)
}

// scaleRing plans a ring and the next tenth of its nodes, and weighs its topology.
func scaleRing(t *testing.T, w *tabwriter.Writer, nodes, vnodes int) {
	t.Helper()
	const n = 3
	all := make([]placement.Node, nodes+nodes/10)
	for i := range all {
		all[i] = placement.Node{ID: uint64(i + 1), Zone: fmt.Sprint("z", i%3)}
	}
	empty := make(placement.Assignment, vnodes)
	for i := range empty {
		empty[i] = make([]uint64, n)
	}
	began := time.Now()
	ring, err := placement.Even(empty, all[:nodes], []int{n})
	if err != nil {
		t.Fatal(err)
	}
	founded := time.Since(began)
	began = time.Now()
	more, err := placement.Even(ring, all, []int{n})
	if err != nil {
		t.Fatal(err)
	}
	grown, moved := time.Since(began), 0
	for v := range ring {
		for s := range ring[v] {
			if !slices.Contains(ring[v], more[v][s]) {
				moved++
			}
		}
	}
	least := float64(vnodes*n) * float64(len(all)-nodes) / float64(len(all))

	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	pb := ringProto(all[:nodes], ring)
	encoded, err := proto.Marshal(pb)
	if err != nil {
		t.Fatal(err)
	}
	next := proto.CloneOf(pb)
	next.Epoch++
	next.Ring[0].ChangedEpoch = next.Epoch
	next.Ring[0].Slots[0].Incoming, next.Ring[0].Slots[0].Phase, next.Ring[0].Slots[0].Since = free(ring[0], all[:nodes]), topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, next.Epoch
	following, err := topology.FromProto(next)
	if err != nil {
		t.Fatal(err)
	}
	next, pb = nil, nil
	runtime.GC()
	runtime.ReadMemStats(&before)
	began = time.Now()
	received := &topologyv1.Topology{}
	if err := proto.Unmarshal(encoded, received); err != nil {
		t.Fatal(err)
	}
	old, err := topology.FromProto(received)
	if err != nil {
		t.Fatal(err)
	}
	taken := time.Since(began)
	received = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	delta := proto.Size(topology.Diff(old, following))
	fmt.Fprintf(w, "%d\t%d\t%s\t%s\t%.3f\t%d\t%d\t%s\t%d\t\n", nodes, vnodes, founded.Round(time.Millisecond), grown.Round(time.Millisecond), float64(moved)/least,
		len(encoded), delta, taken.Round(100*time.Microsecond), after.HeapAlloc-min(before.HeapAlloc, after.HeapAlloc))
	runtime.KeepAlive(old)
}

// free returns a node without a slot of a vnode.
func free(slots []uint64, nodes []placement.Node) uint64 {
	return nodes[slices.IndexFunc(nodes, func(n placement.Node) bool { return !slices.Contains(slots, n.ID) })].ID
}

func ringProto(nodes []placement.Node, ring placement.Assignment) *topologyv1.Topology {
	pb := &topologyv1.Topology{ClusterId: "scale", Epoch: 9, Vnodes: uint32(len(ring)), FoundingNodes: 3, Settings: topology.DefaultSettings().Proto()}
	for _, n := range nodes {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{
			Incarnation: n.ID, Name: fmt.Sprint("node", n.ID), Zone: n.Zone, Role: topologyv1.Role_ROLE_DATA, DataId: fmt.Sprintf("%016x", rand.Uint64()),
			Address: fmt.Sprintf("node%d.kvasir.example:7400", n.ID), AdminAddress: fmt.Sprintf("node%d.kvasir.example:7401", n.ID), GossipAddress: fmt.Sprintf("node%d.kvasir.example:7402", n.ID),
		})
	}
	for _, slots := range ring {
		v := &topologyv1.Vnode{ChangedEpoch: 3}
		for _, s := range slots {
			v.Slots = append(v.Slots, &topologyv1.Slot{Node: s, Phase: topologyv1.Phase_PHASE_STABLE})
		}
		pb.Ring = append(pb.Ring, v)
	}
	ns := topology.FoundingNamespace(3)
	ns.ID = 1
	pb.Namespaces = []*topologyv1.Namespace{ns.Proto()}
	return pb
}

// memoryOfLinks returns what so many links take that have carried a call each.
func memoryOfLinks(t *testing.T, links int) uint64 {
	t.Helper()
	address := serve(t, func(s *grpc.Server) { replicav1.RegisterReplicaServiceServer(s, linked{}) })
	held := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := held()
	for range links {
		l := rpc.NewLink(rpc.LinkConfig{
			Transport: rpc.Transport{Dial: rpc.NetDialer}, Address: address, Peer: "echo", PingInterval: time.Minute, WallClock: func() int64 { return time.Now().UnixMilli() },
		}, rpc.Replica)
		t.Cleanup(l.Close)
		<-l.Ready()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if _, err := l.Do(ctx, readCall()); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	time.Sleep(time.Second) // until what the calls took is let go of
	after := held()
	return uint64(math.Max(0, float64(after)-float64(before)))
}
