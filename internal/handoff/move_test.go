package handoff

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// mover is a node that slots move from or to, with its store on the real disk.
type mover struct {
	replicav1.UnimplementedReplicaServiceServer
	id      uint64
	store   *storage.Store
	fence   *replica.Fence
	replica *replica.Replica
	loop    *rpc.Loop[*replicav1.Call, *replicav1.Reply]
	old     *rpc.Link[*replicav1.Call, *replicav1.Reply]
}

func (m *mover) Link(stream grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]) error {
	return rpc.Serve(rpc.ReplicaServerStream(stream), nil, rpc.Replica, nil, func(ctx context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
		m.replica.Handle(ctx, "peer", calls, reply)
	})
}

// Alive and Go make a mover its own Peers.
func (m *mover) Alive(uint64) bool { return true }

func (m *mover) Go(node uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error {
	if node == m.id {
		return m.loop.Go(call, deadline, done)
	}
	return m.old.Go(call, deadline, done)
}

func newMover(t testing.TB, id uint64, top *topology.Topology, open func(namespace, vnode uint32, since uint64) bool) *mover {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	m := &mover{id: id, fence: replica.NewFence(top)}
	var err error
	m.store, err = storage.Open(storage.Config{
		FS: vfs.Default, Dir: t.TempDir(), CacheBytes: 64 << 20, MemTableBytes: 32 << 20, Logger: logger, Fatal: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	wall := func() int64 { return time.Now().UnixMilli() }
	hints, err := replica.LoadHints(m.store, wall, logger)
	if err != nil {
		t.Fatal(err)
	}
	m.replica = replica.New(replica.Config{
		Self: id, Store: m.store, Clock: replica.NewClock(wall, m.store.Reserved(), m.store.ReserveClock, logger), Fence: m.fence, Hints: hints, Logger: logger,
		CatchUp: func(context.Context, uint64, string) error { return nil }, Refuse: func() *rpc.Error { return nil }, Open: open,
	})
	m.loop = rpc.NewLoop(rpc.Replica, nil, func(ctx context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
		m.replica.Handle(ctx, "self", calls, reply)
	})
	t.Cleanup(func() {
		m.loop.Close()
		if err := m.store.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// moving returns a topology in which node 4 is incoming on the slot of node 3, in both
// vnodes.
func moving(t testing.TB) *topology.Topology {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: 2, Settings: topology.DefaultSettings().Proto()}
	for i := uint64(1); i <= 4; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
	}
	for range 2 {
		pb.Ring = append(pb.Ring, &topologyv1.Vnode{ChangedEpoch: 9, Slots: []*topologyv1.Slot{
			{Node: 1, Phase: topologyv1.Phase_PHASE_STABLE}, {Node: 2, Phase: topologyv1.Phase_PHASE_STABLE},
			{Node: 3, Incoming: 4, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Since: 9},
		}})
	}
	ns := topology.FoundingNamespace(3)
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// move moves a vnode of so many records of 1 KiB from one node to another, over
// loopback, and returns both, the size, and how long it took.
func move(t testing.TB, count int) (from, to *mover, size int64, took time.Duration) {
	t.Helper()
	top := moving(t)
	from = newMover(t, 3, top, nil)
	to = newMover(t, 4, top, func(uint32, uint32, uint64) bool { return true })
	// In the order of their keys, as a vnode's records lie on disk after a while.
	var writes []storage.Write
	flush := func() {
		c, err := from.store.Apply(writes, nil)
		if err == nil {
			err = c.Wait()
		}
		if err != nil {
			t.Fatal(err)
		}
		writes = nil
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for i, n := 0, 0; n < count; i++ {
		key := fmt.Appendf(nil, "k%09d", i)
		if top.VnodeOf(key) != 0 {
			continue
		}
		n++
		payload := make([]byte, 1<<10)
		for j := range payload {
			payload[j] = byte(rng.Uint32())
		}
		rec := record.Encode(record.Record{Version: record.Version{Time: hlc.Timestamp(i + 1), Incarnation: 1}, Kind: record.Value, Payload: payload})
		size += int64(len(key) + len(rec))
		if writes = append(writes, storage.Write{Namespace: 1, Vnode: 0, Key: key, Record: rec}); len(writes) == 500 {
			flush()
		}
	}
	flush()

	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	transport := rpc.Transport{Dial: rpc.NetDialer}
	srv := transport.NewServer()
	replicav1.RegisterReplicaServiceServer(srv, from)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	to.old = rpc.NewLink(rpc.LinkConfig{Transport: transport, Address: lis.Addr().String(), Peer: "n3", WallClock: func() int64 { return time.Now().UnixMilli() }}, rpc.Replica)
	t.Cleanup(func() {
		to.old.Close()
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	<-to.old.Ready()

	a, err := LoadAssignments(to.store)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Prepare(4, top); err != nil {
		t.Fatal(err)
	}
	f := NewFiller(FillerConfig{
		Self: 4, Store: to.store, Assignments: a, Fence: to.fence, Peers: to, Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
		Drained: func(context.Context, uint64) (uint64, error) { return 9, nil }, Changed: func() <-chan struct{} { return nil },
		Join: func(hlc.Timestamp) error { return nil }, BytesPerSecond: 64 << 30, Interval: 5 * time.Millisecond,
		Verify: func(context.Context, *topology.Topology, storage.Place, uint64) error { return nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	began := time.Now()
	go func() { ended <- f.Run(ctx) }()
	for complete := 0; complete < 2; time.Sleep(2 * time.Millisecond) {
		complete = 0
		for _, p := range a.Fillings() {
			if p.Complete {
				complete++
			}
		}
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("not done: %+v", a.Fillings())
		}
	}
	took = time.Since(began)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	return from, to, size, took
}

// A vnode comes over a real link as sorted files, each record of it.
func TestAVnodeMovesAsFiles(t *testing.T) {
	from, to, size, _ := move(t, 3000)
	want := map[string]string{}
	scan := func(s *storage.Store, visit func(key, rec string)) {
		if err := s.Scan(1, []uint32{0}, nil, nil, func(_ uint32, key, rec []byte) bool { visit(string(key), string(rec)); return true }); err != nil {
			t.Fatal(err)
		}
	}
	scan(from.store, func(k, r string) { want[k] = r })
	got := 0
	scan(to.store, func(k, r string) {
		got++
		if want[k] != r {
			t.Errorf("record of %s differs", k)
		}
	})
	if got != 3000 || got != len(want) {
		t.Errorf("%d of %d records have come", got, len(want))
	}
	if m := to.store.Metrics(); m.Ingest.Count == 0 {
		t.Errorf("no file was taken in of %d bytes", size)
	}
}

// How fast a vnode moves, beside how fast its files can be built at all.
// KVASIR_MOVE_MIB says how much.
func TestMoveRate(t *testing.T) {
	mib, err := strconv.Atoi(os.Getenv("KVASIR_MOVE_MIB"))
	if err != nil {
		t.Skip("KVASIR_MOVE_MIB says how much to move; it asserts nothing")
	}
	for range 3 {
		from, _, size, moved := move(t, mib<<10)
		type kv struct{ key, rec []byte }
		var all []kv
		if err := from.store.Scan(1, []uint32{0}, nil, nil, func(_ uint32, key, rec []byte) bool {
			all = append(all, kv{append([]byte(nil), key...), append([]byte(nil), rec...)})
			return true
		}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var in *storage.Ingest
		for _, r := range all {
			if in == nil {
				if in, err = from.store.NewIngest(storage.Place{Namespace: 1, Vnode: 0}); err != nil {
					t.Fatal(err)
				}
			}
			if err := in.Add(r.key, r.rec); err != nil {
				t.Fatal(err)
			}
			if in.SizeBytes() >= fileBytes {
				if err := in.Finish(context.Background()); err != nil {
					t.Fatal(err)
				}
				in = nil
			}
		}
		if in != nil {
			if err := in.Finish(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		built := time.Since(began)
		t.Logf("%d MiB: moved in %s, %.0f MiB/s; built and taken in %s, %.0f MiB/s; ratio %.2f", size>>20, moved.Round(time.Millisecond),
			float64(size)/(1<<20)/moved.Seconds(), built.Round(time.Millisecond), float64(size)/(1<<20)/built.Seconds(), built.Seconds()/moved.Seconds())
	}
}
