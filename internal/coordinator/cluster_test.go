package coordinator_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// vnodes is the number of vnodes of test clusters.
const vnodes = 8

// cluster is a few whole nodes without processes and network: real stores,
// replicas and coordinators, joined by loops that tests can cut.
type cluster struct {
	t     *testing.T
	nodes []*node // nodes[i] has incarnation i+1
	mu    sync.Mutex
	state *topology.State
	// ways says how a path from one node to another behaves.
	ways map[[2]uint64]way
	// token is the greatest timestamp put has seen; as in a client, it orders writes.
	token uint64
	evict func(coordinator.Laggard)
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

type way int

const (
	open     way = iota
	down         // known to be unreachable
	hanging      // calls arrive nowhere, which is noticed after 1.5 s
	mute         // calls arrive, replies do not
	slowly       // calls take 100 ms
	refusing     // calls are refused before anything is done
)

type node struct {
	c      *cluster
	id     uint64
	store  *storage.Store
	clock  *replica.Clock
	closed atomic.Bool // it takes no records of vnodes that it is incoming on
	fence  *replica.Fence
	hints  *replica.Hints
	rep    *replica.Replica
	coord  *coordinator.Coordinator
	loop   *rpc.Loop[*replicav1.Call, *replicav1.Reply]
	disk   *disk
	offset atomic.Int64 // of its wall clock, in milliseconds
	// stalled is for how long its store has taken no writes, as it says.
	stalled atomic.Int64
}

// disk is a disk that can be full.
type disk struct {
	vfs.FS
	full atomic.Bool
}

func (d *disk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	u := vfs.DiskUsage{TotalBytes: 1 << 20}
	if !d.full.Load() {
		u.AvailBytes = u.TotalBytes
	}
	return u, nil
}

// fill fills a node's disk, or frees it again.
func (n *node) fill(full bool) {
	n.disk.full.Store(full)
	n.store.CheckDisk()
}

// run runs a test with a cluster of n nodes in a bubble. change may alter the
// default namespace, whose N is n unless it says otherwise.
func run(t *testing.T, n int, change func(*topology.NamespaceSettings), test func(t *testing.T, c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c := &cluster{t: t, ways: map[[2]uint64]way{}, stop: cancel}
		c.form(n, change)
		for i := range n {
			c.nodes = append(c.nodes, c.newNode(ctx, uint64(i+1)))
		}
		defer c.close()
		test(t, c)
	})
}

func (c *cluster) close() {
	for _, n := range c.nodes {
		n.coord.Close()
	}
	c.stop()
	c.wg.Wait()
	for _, n := range c.nodes {
		n.loop.Close()
	}
	for _, n := range c.nodes {
		if err := n.store.Close(); err != nil {
			c.t.Error(err)
		}
	}
}

func (c *cluster) apply(ms ...*topologyv1.Mutation) {
	c.t.Helper()
	next, _, err := c.state.Apply(&topologyv1.Command{Mutations: ms})
	if err != nil {
		c.t.Fatal(err)
	}
	c.state = next
}

func (c *cluster) form(n int, change func(*topology.NamespaceSettings)) {
	c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Found{Found: &topologyv1.Found{
		ClusterId: "test", Vnodes: vnodes, FoundingNodes: uint32(n), Settings: topology.DefaultSettings().Proto(),
	}}})
	for i := range n {
		c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
			Node: &topologyv1.Node{Name: fmt.Sprint("n", i+1), Zone: "z", Role: topologyv1.Role_ROLE_DATA, Address: fmt.Sprint("n", i+1, ":1"), DataId: fmt.Sprint(i)},
			Boot: 1, BootId: "b",
		}}})
	}
	set := topology.NamespaceSettings{N: &n}
	if change != nil {
		change(&set)
	}
	c.setRing(func(v int) []topology.Slot {
		var slots []topology.Slot
		for i := range n {
			slots = append(slots, topology.Slot{Node: uint64((v+i)%n + 1), Phase: topology.Stable})
		}
		return slots
	})
	ns, _, err := c.state.Topology.NewNamespace("default", set)
	if err != nil {
		c.t.Fatal(err)
	}
	c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_CreateNamespace{CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()}}})
}

func (c *cluster) setRing(slots func(vnode int) []topology.Slot) {
	c.t.Helper()
	ring := make([]topology.Vnode, vnodes)
	for v := range ring {
		ring[v].Slots = slots(v)
	}
	c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_SetRing{SetRing: &topologyv1.SetRing{Ring: topology.RingProto(ring)}}})
}

// place puts every vnode's slots on the same nodes.
func (c *cluster) place(ids ...uint64) {
	c.t.Helper()
	c.setRing(func(int) (out []topology.Slot) {
		for _, id := range ids {
			out = append(out, topology.Slot{Node: id, Phase: topology.Stable})
		}
		return out
	})
}

// publish gives the present topology to some nodes, or to all.
func (c *cluster) publish(ids ...uint64) {
	for _, n := range c.nodes {
		for _, id := range ids {
			if n.id == id {
				n.fence.Advance(c.state.Topology)
			}
		}
		if len(ids) == 0 {
			n.fence.Advance(c.state.Topology)
		}
	}
}

func (c *cluster) newNode(ctx context.Context, id uint64) *node {
	logger := slog.New(slog.DiscardHandler)
	n := &node{c: c, id: id, disk: &disk{FS: vfs.NewMem()}}
	var err error
	n.store, err = storage.Open(storage.Config{
		FS: n.disk, Dir: "data", MemTableBytes: 256 << 10, CacheBytes: 1 << 20,
		Logger: logger, Fatal: func(err error) { panic(err) },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	wall := func() int64 { return time.Now().UnixMilli() + n.offset.Load() }
	n.clock = replica.NewClock(wall, n.store.Reserved(), n.store.ReserveClock, logger)
	n.fence = replica.NewFence(c.state.Topology)
	if n.hints, err = replica.LoadHints(n.store, wall, logger); err != nil {
		c.t.Fatal(err)
	}
	n.hints.SetBounds(replica.HintBounds{Bytes: 1 << 20, Count: 10_000, Age: time.Hour})
	refresh := func(_ context.Context, epoch uint64) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.state.Topology.Epoch < epoch {
			return errors.New("there is no such epoch")
		}
		n.fence.Advance(c.state.Topology)
		return nil
	}
	serve := func() *rpc.Error { return nil }
	n.rep = replica.New(replica.Config{
		Self: id, Store: n.store, Clock: n.clock, Fence: n.fence, Hints: n.hints, Logger: logger,
		CatchUp: func(ctx context.Context, epoch uint64, _ string) error { return refresh(ctx, epoch) },
		Refuse:  serve, Open: func(uint32, uint32, uint64) bool { return !n.closed.Load() },
	})
	n.loop = rpc.NewLoop(rpc.Replica, nil, func(ctx context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
		n.rep.Handle(ctx, "", calls, reply)
	})
	n.coord = coordinator.New(coordinator.Config{
		Self: id, Fence: n.fence, Clock: n.clock, Hints: n.hints, Peers: n, Logger: logger,
		Refresh: func(ctx context.Context, epoch, _ uint64) error { return refresh(ctx, epoch) },
		Refuse:  serve, Stalled: func() time.Duration { return time.Duration(n.stalled.Load()) },
		Metrics: prometheus.NewRegistry(), Evict: func(l coordinator.Laggard) {
			if c.evict != nil {
				c.evict(l)
			}
		},
	})
	c.wg.Go(func() { n.clock.Run(ctx) })
	c.wg.Go(func() { n.hints.Run(ctx) })
	return n
}

// way returns how the path from one node to another behaves.
func (c *cluster) way(from, to uint64) way {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ways[[2]uint64{from, to}]
}

// set makes the paths from all other nodes to some nodes behave in a way.
func (c *cluster) set(w way, ids ...uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.nodes {
		for _, id := range ids {
			if n.id != id {
				c.ways[[2]uint64{n.id, id}] = w
			}
		}
	}
}

// Go and Alive make a node its own coordinator.Peers.
func (n *node) Alive(id uint64) bool { return n.c.way(n.id, id) != down }

func (n *node) Go(id uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error {
	target := n.c.nodes[id-1].loop
	broken := rpc.Errorf(codes.Unavailable, rpc.ReasonLinkBroken, "the connection broke")
	switch n.c.way(n.id, id) {
	case down, refusing:
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "not reachable")
	case hanging:
		time.AfterFunc(1500*time.Millisecond, func() { done(nil, broken) })
		return nil
	case mute:
		return target.Go(call, deadline, func(*replicav1.Reply, error) { done(nil, broken) })
	case slowly:
		time.AfterFunc(100*time.Millisecond, func() {
			if err := target.Go(call, deadline, done); err != nil {
				done(nil, err)
			}
		})
		return nil
	}
	return target.Go(call, deadline, done)
}

// own returns a node's own copy of a key, or nil.
func (n *node) own(key string) *record.Record {
	n.c.t.Helper()
	t := n.c.state.Topology
	b, err := n.store.Get(1, t.VnodeOf([]byte(key)), []byte(key))
	if errors.Is(err, storage.ErrNotFound) {
		return nil
	}
	if err != nil {
		n.c.t.Fatal(err)
	}
	rec, err := record.Decode(b)
	if err != nil {
		n.c.t.Fatal(err)
	}
	return &rec
}

// plant joins a record into one node's store, past all coordinators.
func (n *node) plant(key string, rec record.Record) {
	n.c.t.Helper()
	t := n.c.state.Topology
	commit, err := n.store.Apply([]storage.Write{{Namespace: 1, Vnode: t.VnodeOf([]byte(key)), Key: []byte(key), Record: record.Encode(rec)}}, nil)
	if err == nil {
		err = commit.Wait()
	}
	if err != nil {
		n.c.t.Fatal(err)
	}
}

func (n *node) put(key, value, w string) (*kvv1.Receipt, error) {
	r, err := n.coord.Put(context.Background(), &kvv1.PutRequest{Key: []byte(key), Value: []byte(value), WriteQuorum: w, Token: n.c.token})
	n.c.token = max(n.c.token, r.GetReceipt().GetVersion().GetTimestamp())
	return r.GetReceipt(), err
}

func (n *node) mustPut(key, value, w string) *kvv1.Receipt {
	n.c.t.Helper()
	r, err := n.put(key, value, w)
	if err != nil {
		n.c.t.Fatalf("put %s: %v", key, err)
	}
	return r
}

func (n *node) get(key string, change func(*kvv1.GetRequest)) (*kvv1.GetResponse, error) {
	r := &kvv1.GetRequest{Key: []byte(key)}
	if change != nil {
		change(r)
	}
	return n.coord.Get(context.Background(), r)
}

// wantValue reads a key; "" means that it must not be found.
func (n *node) wantValue(key, want string) *kvv1.Receipt {
	n.c.t.Helper()
	r, err := n.get(key, nil)
	if err != nil {
		n.c.t.Fatalf("get %s: %v", key, err)
	}
	if string(r.GetValue()) != want || r.GetFound() != (want != "") {
		n.c.t.Fatalf("get %s = %q, found %v; want %q", key, r.GetValue(), r.GetFound(), want)
	}
	return r.GetReceipt()
}

// holders returns how many nodes have a value of a key of their own.
func (c *cluster) holders(key, value string) int {
	n := 0
	for _, node := range c.nodes {
		if r := node.own(key); r != nil && r.Kind == record.Value && string(r.Payload) == value {
			n++
		}
	}
	return n
}

func wantError(t *testing.T, err error, code codes.Code, reason string) *rpc.Error {
	t.Helper()
	var e *rpc.Error
	if !errors.As(err, &e) || e.Code != code || e.Reason != reason {
		t.Fatalf("error = %v (%+v), want %s %s", err, e, code, reason)
	}
	return e
}

func ptr[T any](v T) *T { return &v }
