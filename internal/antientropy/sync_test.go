package antientropy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/antientropy"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// group is a few replicas with their repairers, without processes and network.
type group struct {
	t        testing.TB
	topology *topology.Topology
	members  []*member // members[i] has incarnation i+1
	calls    sync.WaitGroup
	mu       sync.Mutex
	down     map[uint64]bool
	traffic  traffic
	asked    func() // is called when a repairer asks who lives, if it is set
}

// traffic is what went between repairers and replicas, and among the replicas of one
// node too.
type traffic struct {
	digests, listed, applied, bytes int
}

type member struct {
	g        *group
	id       uint64
	store    *storage.Store
	rep      *replica.Replica
	repairer *antientropy.Repairer
	metrics  *prometheus.Registry
}

// place is the one of groups with one vnode.
var place = storage.Place{Namespace: 1}

// newGroup returns replicas of the vnodes given by their slots. open returns the file
// system and directory of each.
func newGroup(t testing.TB, open func(id uint64) (vfs.FS, string), vnodes ...[]*topologyv1.Slot) *group {
	t.Helper()
	g := &group{t: t, down: map[uint64]bool{}}
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 5, Vnodes: uint32(len(vnodes)), Settings: topology.DefaultSettings().Proto()}
	nodes := uint64(0)
	for _, slots := range vnodes {
		pb.Ring = append(pb.Ring, &topologyv1.Vnode{Slots: slots})
		for _, s := range slots {
			nodes = max(nodes, s.GetNode(), s.GetIncoming())
		}
	}
	ns := topology.FoundingNamespace(len(vnodes[0]))
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	for id := uint64(1); id <= nodes; id++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: id, Name: fmt.Sprint("n", id), Role: topologyv1.Role_ROLE_DATA})
	}
	var err error
	if g.topology, err = topology.FromProto(pb); err != nil {
		t.Fatal(err)
	}
	for id := uint64(1); id <= nodes; id++ {
		g.members = append(g.members, g.newMember(id, open))
	}
	return g
}

func memory(uint64) (vfs.FS, string) { return vfs.NewMem(), "data" }

func stable(nodes ...uint64) (out []*topologyv1.Slot) {
	for _, n := range nodes {
		out = append(out, &topologyv1.Slot{Node: n, Phase: topologyv1.Phase_PHASE_STABLE})
	}
	return out
}

func (g *group) newMember(id uint64, open func(uint64) (vfs.FS, string)) *member {
	logger := slog.New(slog.DiscardHandler)
	m := &member{g: g, id: id, metrics: prometheus.NewRegistry()}
	fs, dir := open(id)
	var err error
	m.store, err = storage.Open(storage.Config{
		FS: fs, Dir: dir, MemTableBytes: 1 << 20, CacheBytes: 1 << 20, Logger: logger, Fatal: func(err error) { panic(err) },
	})
	if err != nil {
		g.t.Fatal(err)
	}
	wall := func() int64 { return time.Now().UnixMilli() }
	hints, err := replica.LoadHints(m.store, wall, logger)
	if err != nil {
		g.t.Fatal(err)
	}
	fence := replica.NewFence(g.topology)
	clock := replica.NewClock(wall, m.store.Reserved(), m.store.ReserveClock, logger)
	m.rep = replica.New(replica.Config{
		Self: id, Store: m.store, Clock: clock, Fence: fence, Hints: hints, Logger: logger,
		Refuse:  func() *rpc.Error { return nil },
		CatchUp: func(context.Context, uint64, string) error { return errors.New("there is nothing newer") },
	})
	m.repairer = antientropy.New(antientropy.Config{
		Self: id, Store: m.store, Fence: fence, Peers: m, Logger: logger, Metrics: m.metrics,
		Clock: func() hlc.Timestamp { return hlc.At(clock.Now()) },
	})
	return m
}

func (g *group) close() {
	g.calls.Wait()
	for _, m := range g.members {
		if err := m.store.Close(); err != nil {
			g.t.Error(err)
		}
	}
}

// run lets all repairers work for some time.
func (g *group) run(d time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, m := range g.members {
		wg.Go(func() {
			if err := m.repairer.Run(ctx); err != nil {
				g.t.Error(err)
			}
		})
	}
	time.Sleep(d)
	cancel()
	wg.Wait()
	g.calls.Wait()
}

// cut makes a member unreachable, or reachable again.
func (g *group) cut(id uint64, down bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.down[id] = down
}

// Alive and Go make a member its own antientropy.Peers.
func (m *member) Alive(id uint64) bool {
	if m.g.asked != nil {
		m.g.asked()
	}
	m.g.mu.Lock()
	defer m.g.mu.Unlock()
	return id == m.id || !m.g.down[id] && !m.g.down[m.id]
}

func (m *member) Go(id uint64, call *replicav1.Call, _ time.Time, done func(*replicav1.Reply, error)) error {
	if !m.Alive(id) {
		return errors.New("is cut off")
	}
	g := m.g
	g.calls.Go(func() {
		g.members[id-1].rep.Handle(context.Background(), "", []*replicav1.Call{call}, func(reply *replicav1.Reply) {
			g.mu.Lock()
			if call.GetDigest() != nil {
				g.traffic.digests++
			}
			g.traffic.listed += len(reply.GetList().GetEntries())
			g.traffic.applied += len(call.GetApply().GetEntries())
			g.traffic.bytes += call.SizeVT() + reply.SizeVT()
			g.mu.Unlock()
			if e := reply.GetError(); e != nil {
				done(nil, rpc.ErrorFromProto(e))
				return
			}
			done(reply, nil)
		})
	})
	return nil
}

// passed returns the traffic since it was asked last.
func (g *group) passed() traffic {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.traffic
	g.traffic = traffic{}
	return was
}

// plant joins records into one member's store.
func (m *member) plant(records map[string]record.Record) {
	m.g.t.Helper()
	var writes []storage.Write
	flush := func() {
		c, err := m.store.Apply(writes, nil)
		if err == nil {
			err = c.Wait()
		}
		if err != nil {
			m.g.t.Fatal(err)
		}
		writes = writes[:0]
	}
	for k, rec := range records {
		writes = append(writes, storage.Write{Namespace: 1, Vnode: m.g.topology.VnodeOf([]byte(k)), Key: []byte(k), Record: record.Encode(rec)})
		if len(writes) == 500 {
			flush()
		}
	}
	flush()
}

// records returns all that a member holds, encoded.
func (m *member) records() map[string]string {
	m.g.t.Helper()
	var all []uint32
	for v := range m.g.topology.Ring {
		all = append(all, uint32(v))
	}
	out := map[string]string{}
	if err := m.store.Scan(1, all, nil, nil, func(_ uint32, key, rec []byte) bool {
		out[string(key)] = string(rec)
		return true
	}); err != nil {
		m.g.t.Fatal(err)
	}
	return out
}

// sync compares the first member with another one.
func (g *group) sync(peer uint64) antientropy.Outcome {
	g.t.Helper()
	out, err := g.members[0].repairer.Sync(context.Background(), g.topology, place, peer)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

func value(version uint64, payload string) record.Record {
	return record.Record{Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1}, Kind: record.Value, Payload: []byte(payload)}
}

// numbered returns n values under keys in order.
func numbered(n int) map[string]record.Record {
	out := map[string]record.Record{}
	for i := range n {
		out[fmt.Sprintf("key%06d", i)] = value(1, fmt.Sprint("value ", i))
	}
	return out
}

// Invariants 4 and 18: whatever the replicas hold, after two rounds all hold the join
// of it, so also no smaller record in the place of a greater one: values, deletions,
// expiries, equal versions that differ in bytes. The second round is for what the
// leader learns from the last replica it asks.
func TestReplicasComeToTheJoin(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testJoin(t, rand.New(rand.NewPCG(seed, 4))) })
		})
	}
}

func testJoin(t *testing.T, rng *rand.Rand) {
	g := newGroup(t, memory, stable(1, 2, 3), stable(2, 3, 1), stable(3, 1, 2), stable(1, 3, 2))
	defer g.close()
	want := map[string]record.Record{}
	keys := 1 + rng.IntN(3000)
	share := rng.Float64()
	for _, m := range g.members {
		records := map[string]record.Record{}
		for i := range keys {
			k := fmt.Sprint("k", i)
			rec := value(1, "common")
			if rng.Float64() < share*share {
				rec = value(uint64(1+rng.IntN(3)), fmt.Sprint(rng.IntN(3)))
				switch rng.IntN(4) {
				case 0:
					rec.Kind, rec.Payload = record.Tombstone, nil
				case 1:
					rec.ExpiresAt = int64(1 + rng.IntN(3))
				case 2:
					continue
				}
			}
			records[k] = rec
			if old, ok := want[k]; !ok || record.Compare(rec, old) > 0 {
				want[k] = rec
			}
		}
		m.plant(records)
	}
	g.run(2*time.Minute + 5*time.Second)
	encoded := map[string]string{}
	for k, rec := range want {
		encoded[k] = string(record.Encode(rec))
	}
	for _, m := range g.members {
		if d := cmp.Diff(encoded, m.records()); d != "" {
			t.Errorf("n%d differs from the join of all:\n%.600s", m.id, d)
		}
		for _, p := range m.repairer.Status().Places {
			if p.State == antientropy.Failed {
				t.Errorf("vnode %d: %s", p.Vnode, p.Reason)
			}
		}
	}
	g.passed()
	g.run(time.Minute + 5*time.Second)
	if again := g.passed(); again.applied != 0 || again.listed != 0 || again.digests == 0 {
		t.Errorf("among equal replicas: %+v", again)
	}
}

// Nothing but two roots is exchanged when nothing differs; what is exchanged
// otherwise follows the differences.
func TestOnlyWhatDiffersTravels(t *testing.T) {
	g := newGroup(t, memory, stable(1, 2))
	defer g.close()
	const keys = 10_000
	for _, m := range g.members {
		m.plant(numbered(keys))
	}
	if out := g.sync(2); !out.Equal || out.Records != keys {
		t.Errorf("equal replicas: %+v", out)
	}
	if was := g.passed(); was.digests != 2 || was.listed+was.applied != 0 || was.bytes > 300 {
		t.Errorf("equal replicas exchange %+v", was)
	}
	g.members[0].plant(map[string]record.Record{"key000777": value(2, "newer here")})
	g.members[1].plant(map[string]record.Record{"key005000": value(2, "newer there"), "key007500": value(2, "newer there")})
	if out := g.sync(2); out.Equal || out.Sent != 1 || out.Received != 2 {
		t.Errorf("three differences: %+v", out)
	}
	// Three leaves of 128 records in the mean; the longest of 10,000 keys' leaves are
	// several times that.
	if was := g.passed(); was.applied != 3 || was.listed > keys/4 {
		t.Errorf("three differences exchange %+v", was)
	}
	if out := g.sync(2); !out.Equal {
		t.Errorf("after mending: %+v", out)
	}
}

// One replica has everything, the other nothing: in many lots, in either direction,
// with records that fill a lot alone.
func TestEmptyReplicaIsFilled(t *testing.T) {
	for _, full := range []int{0, 1} {
		g := newGroup(t, memory, stable(1, 2))
		records := numbered(20_000)
		for i := range 6 {
			records[fmt.Sprint("key00000", i, "-large")] = value(1, strings.Repeat("x", 300<<10))
		}
		g.members[full].plant(records)
		out := g.sync(2)
		if out.Sent+out.Received != len(records) {
			t.Errorf("member %d was full: %+v", full, out)
		}
		if d := cmp.Diff(g.members[0].records(), g.members[1].records()); d != "" {
			t.Errorf("member %d was full:\n%.600s", full, d)
		}
		if out := g.sync(2); !out.Equal {
			t.Errorf("after filling: %+v", out)
		}
		g.close()
	}
}

// An incoming node is an endpoint like the others, in any phase of its slot; a node
// that is none is refused.
func TestIncomingNodesAreCompared(t *testing.T) {
	for _, phase := range []topologyv1.Phase{topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, topologyv1.Phase_PHASE_WRITE_BOTH_READ_NEW, topologyv1.Phase_PHASE_WRITE_NEW_READ_NONE} {
		slots := stable(1, 2)
		slots[1].Incoming, slots[1].Phase, slots[1].Since = 3, phase, 1
		g := newGroup(t, memory, slots, stable(4, 5))
		g.members[0].plant(map[string]record.Record{})
		records := map[string]record.Record{}
		for k, rec := range numbered(500) {
			if g.topology.VnodeOf([]byte(k)) == 0 {
				records[k] = rec
			}
		}
		g.members[0].plant(records)
		if out := g.sync(3); out.Sent != len(records) {
			t.Errorf("%s: %+v", phase, out)
		}
		if _, err := g.members[0].repairer.Sync(context.Background(), g.topology, place, 4); err == nil {
			t.Error("a node that is no endpoint was compared")
		}
		g.close()
	}
}

// A place marked dirty is compared at once by whoever has the mark; the mark goes
// when all replicas have been compared, or when the node holds none.
func TestDirtyPlacesGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, memory, stable(1, 2, 3), stable(1, 2, 4))
		defer g.close()
		last, others := g.members[2], g.members[:2]
		var key string
		for i := 0; key == ""; i++ {
			if k := fmt.Sprint("key", i); g.topology.VnodeOf([]byte(k)) == 0 {
				key = k
			}
		}
		others[0].plant(map[string]record.Record{key: value(7, "missed")})
		g.cut(2, true)
		if err := last.store.MarkDirty(1, storage.Place{Namespace: 1, Vnode: 0}, storage.Place{Namespace: 1, Vnode: 1}, storage.Place{Namespace: 9}); err != nil {
			t.Fatal(err)
		}
		g.run(time.Second)
		if got := last.records()[key]; got == "" {
			t.Error("a dirty vnode was not compared within a second")
		}
		if d := last.store.Dirty(); len(d) != 1 || d[0].Place != place {
			t.Errorf("with a replica down the marks are %v", d)
		}
		g.cut(2, false)
		g.run(10 * time.Second)
		if d := last.store.Dirty(); len(d) != 0 {
			t.Errorf("with all replicas up the marks are %v", d)
		}
		if others[1].records()[key] == "" {
			t.Error("the mark went although a replica was not mended")
		}
	})
}

// A node that compares nothing, as another one leads all it has, rests also when it is
// told to hurry.
func TestANodeThatLeadsNothingRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, memory, stable(1, 2, 3))
		defer g.close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var asked atomic.Int64
		g.asked = func() {
			if asked.Add(1) == 1000 {
				cancel() // else time would stand still
			}
		}
		var running sync.WaitGroup
		last := g.members[2].repairer
		running.Go(func() {
			if err := last.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		last.Start()
		select {
		case <-ctx.Done():
			t.Error("it never waits")
		case <-time.After(10 * time.Second):
		}
		cancel()
		running.Wait()
	})
}

// A replica that is down is named, does not keep the others from being compared, and
// is mended when it is back.
func TestDownReplicaIsMendedWhenItIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, memory, stable(1, 2, 3))
		defer g.close()
		g.members[0].plant(numbered(1000))
		g.cut(2, true)
		g.run(61 * time.Second)
		if n := len(g.members[2].records()); n != 1000 {
			t.Errorf("a replica beside one that is down has %d of 1000 records", n)
		}
		s := g.members[0].repairer.Status()
		if len(s.Places) != 1 || s.Places[0].State != antientropy.Failed || s.Places[0].Reason != "n2 is down" {
			t.Errorf("status: %+v", s)
		}
		g.cut(2, false)
		g.run(61 * time.Second)
		if n := len(g.members[1].records()); n != 1000 {
			t.Errorf("a replica that is back has %d of 1000 records", n)
		}
		// The first that lives leads: the second had led its own copy while it was cut off.
		if s := g.members[0].repairer.Status(); s.Sent != 2000 || s.Places[0].State != antientropy.Mended || s.Places[0].Differences != 2000 {
			t.Errorf("status: %+v", s)
		}
	})
}
