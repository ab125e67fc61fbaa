package quorum

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// writer writes all records of a namespace as a coordinator does, over the protocol of
// replicas, but for the messages that it loses: whom they were for is stale, and nobody
// keeps a hint.
type writer struct {
	topology  *topology.Topology
	namespace *topology.Namespace
	links     map[uint64]*rpc.Link[*replicav1.Call, *replicav1.Reply] // by incarnation
	rng       *rand.Rand
}

// newWriter returns a writer of a namespace, and has the nodes not compare their replicas by
// themselves from now on: what is stale stays so until it is read.
func newWriter(ctx context.Context, t *testing.T, c *cluster, namespace string) *writer {
	t.Helper()
	resp, err := adminv1.NewControlServiceClient(c.conn(t, 0)).GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{links: map[uint64]*rpc.Link[*replicav1.Call, *replicav1.Reply]{}, rng: rand.New(rand.NewPCG(1, 1))}
	if w.topology, err = topology.FromProto(resp.GetTopology()); err != nil {
		t.Fatal(err)
	}
	if w.namespace = w.topology.Namespace(namespace); w.namespace == nil {
		t.Fatalf("epoch %s has no namespace %s", topology.EpochString(w.topology.Epoch), namespace)
	}
	for i := range replicas {
		if _, err := adminv1.NewRepairServiceClient(c.conn(t, i)).PauseRepair(ctx, &adminv1.PauseRepairRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range w.topology.Nodes {
		link := rpc.NewLink(rpc.LinkConfig{
			Transport: rpc.Transport{Dial: rpc.NetDialer}, Address: n.Address, Peer: n.Name, WallClock: func() int64 { return time.Now().UnixMilli() },
			Metadata: func() metadata.MD {
				return metadata.Pairs("kvasir-cluster", w.topology.ClusterID, "kvasir-target", strconv.FormatUint(n.Incarnation, 10))
			},
		}, rpc.Replica)
		t.Cleanup(link.Close)
		<-link.Ready()
		w.links[n.Incarnation] = link
	}
	return w
}

func keyOf(i int) []byte { return fmt.Appendf(nil, "user%08d", i) }

// write writes all records anew. Each replica of each record misses that with a chance.
func (w *writer) write(chance float64) error {
	type place struct {
		vnode uint32
		node  uint64
	}
	entries := map[place][]*replicav1.Entry{}
	version := record.Version{Time: hlc.At(time.Now().UnixMilli()), Incarnation: w.topology.Nodes[0].Incarnation}
	for i := range records {
		key, value := keyOf(i), make([]byte, valueBytes)
		for j := range value {
			value[j] = byte(w.rng.Uint32())
		}
		e := &replicav1.Entry{Key: key, Record: record.Encode(record.Record{Version: version, Kind: record.Value, Payload: value})}
		v := w.topology.VnodeOf(key)
		for _, s := range w.topology.Slots(v, w.namespace.N) {
			if w.rng.Float64() >= chance {
				p := place{v, s.Write[0]}
				entries[p] = append(entries[p], e)
			}
		}
	}
	var writing sync.WaitGroup
	failed := make(chan error, len(entries))
	deadline := time.Now().Add(30 * time.Second)
	for p, es := range entries {
		writing.Add(1)
		done := func(_ *replicav1.Reply, err error) { failed <- err; writing.Done() }
		call := &replicav1.Call{Epoch: w.topology.Epoch, Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
			Namespace: w.namespace.ID, Vnode: p.vnode, Source: replicav1.Source_SOURCE_FIRST_HAND, Entries: es,
		}}}
		if err := w.links[p.node].Go(call, deadline, done); err != nil {
			done(nil, err)
		}
	}
	writing.Wait()
	close(failed)
	var err error
	for e := range failed {
		err = errors.Join(err, e)
	}
	return err
}

// once is a store of which every record is read once: who reads again may find mended what
// was stale.
type once struct {
	client       *client.Client
	opts         []client.CallOption
	next, mended atomic.Int64
}

func (o *once) Read(ctx context.Context, _ []byte) error {
	v, err := o.client.Get(ctx, keyOf(int(o.next.Add(1)-1)), o.opts...)
	if v.Receipt.Repaired > 0 {
		o.mended.Add(1)
	}
	return err
}
func (*once) Write(context.Context, []byte, []byte) error    { panic("not used") }
func (*once) Scan(context.Context, []byte, int) error        { panic("not used") }
func (*once) Load(context.Context, [][]byte, [][]byte) error { panic("not used") }

// stale measures gets that meet stale replicas.
func stale(ctx context.Context, t *testing.T, c *cluster, p plan, out *results) {
	t.Helper()
	const namespace = "stale"
	c.namespace(ctx, t, namespace, "quorum", "quorum")
	cl := c.client(ctx, t, false)
	w := newWriter(ctx, t, c, namespace)
	for round := range p.Rounds {
		for _, chance := range []float64{0, 0.01, 0.1} {
			for _, how := range staleGets.series {
				for _, l := range loads {
					row := fmt.Sprintf("%g%%", 100*chance)
					progress("round %d of %d: %s stale, repair %s, %s", round+1, p.Rounds, row, how, l.name)
					if err := w.write(chance); err != nil {
						t.Fatal(err)
					}
					store := &once{client: cl, opts: []client.CallOption{client.Namespace(namespace), client.Repair(repairs[how])}}
					took := measure(ctx, t, l, bench.Config{Stores: []bench.Store{store}, Workload: bench.Mix(1, bench.Uniform), Duration: p.Duration, Operations: records})
					out.add(staleGets, row, how, l, took).Mended += store.mended.Load()
				}
			}
		}
	}
}
