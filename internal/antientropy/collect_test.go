package antientropy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// collecting is a few replicas of one vnode with their collectors, without processes
// and network.
type collecting struct {
	t       *testing.T
	nodes   []*collectNode // nodes[i] has incarnation i+1
	mu      sync.Mutex
	down    map[uint64]bool
	epoch   uint64
	syncing atomic.Pointer[func(from, to uint64)] // called when a comparison begins
}

type collectNode struct {
	c         *collecting
	id        uint64
	fs        *vfs.MemFS
	store     *storage.Store
	rep       *replica.Replica
	fence     *replica.Fence
	collector *Collector
	metrics   *prometheus.Registry
	stop      func()
}

// collectRing has one vnode on the slots given.
func collectRing(t *testing.T, epoch uint64, slots ...*topologyv1.Slot) *topology.Topology {
	t.Helper()
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: epoch, Vnodes: 1, Settings: topology.DefaultSettings().Proto(), Ring: []*topologyv1.Vnode{{Slots: slots}}}
	for i := uint64(1); i <= 4; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
	}
	ns := topology.FoundingNamespace(len(slots))
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

func stableSlots(nodes ...uint64) (out []*topologyv1.Slot) {
	for _, n := range nodes {
		out = append(out, &topologyv1.Slot{Node: n, Phase: topologyv1.Phase_PHASE_STABLE})
	}
	return out
}

func runCollecting(t *testing.T, test func(t *testing.T, c *collecting)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &collecting{t: t, down: map[uint64]bool{}, epoch: 5}
		for i := range uint64(4) {
			c.nodes = append(c.nodes, &collectNode{c: c, id: i + 1, fs: vfs.NewCrashableMem()})
		}
		for _, n := range c.nodes {
			n.start(collectRing(t, c.epoch, stableSlots(1, 2, 3)...))
		}
		test(t, c)
		for _, n := range c.nodes {
			n.stop()
		}
	})
}

func (n *collectNode) start(top *topology.Topology) {
	t, logger := n.c.t, slog.New(slog.DiscardHandler)
	var err error
	n.store, err = storage.Open(storage.Config{FS: n.fs, Dir: "data", MemTableBytes: 256 << 10, CacheBytes: 1 << 20, Logger: logger, Fatal: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	wall := func() int64 { return time.Now().UnixMilli() }
	hints, err := replica.LoadHints(n.store, wall, logger)
	if err != nil {
		t.Fatal(err)
	}
	n.fence = replica.NewFence(top)
	n.rep = replica.New(replica.Config{
		Self: n.id, Store: n.store, Clock: replica.NewClock(wall, n.store.Reserved(), n.store.ReserveClock, logger), Fence: n.fence, Hints: hints,
		Logger: logger, Refuse: func() *rpc.Error { return nil },
		CatchUp: func(context.Context, uint64, string) error { return errors.New("no") },
	})
	n.metrics = prometheus.NewRegistry()
	n.collector = NewCollector(CollectorConfig{
		Self: n.id, Store: n.store, Fence: n.fence, Peers: n, Logger: logger, Metrics: n.metrics,
		Sync: n.sync, Paused: func() bool { return false },
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { n.collector.Run(ctx) })
	n.stop = func() {
		cancel()
		wg.Wait()
		time.Sleep(time.Second) // for calls in flight
		if err := n.store.Close(); err != nil {
			t.Error(err)
		}
	}
}

// set makes nodes reachable or not.
func (c *collecting) set(down bool, ids ...uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		c.down[id] = down
	}
}

// move gives the vnode other slots.
func (c *collecting) move(slots ...*topologyv1.Slot) {
	c.t.Helper()
	c.epoch++
	for _, n := range c.nodes {
		top := collectRing(c.t, c.epoch, slots...)
		n.fence.Advance(top)
		if err := n.rep.VoidCertificates(top); err != nil {
			c.t.Fatal(err)
		}
	}
}

// Alive and Go make a node its own Peers.
func (n *collectNode) Alive(id uint64) bool {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	return id == n.id || !n.c.down[id] && !n.c.down[n.id]
}

func (n *collectNode) Go(id uint64, call *replicav1.Call, _ time.Time, done func(*replicav1.Reply, error)) error {
	if !n.Alive(id) {
		return errors.New("is cut off")
	}
	go n.c.nodes[id-1].rep.Handle(context.Background(), "", []*replicav1.Call{call}, func(reply *replicav1.Reply) {
		if e := reply.GetError(); e != nil {
			done(nil, rpc.ErrorFromProto(e))
			return
		}
		done(reply, nil)
	})
	return nil
}

// send has a node take records, and returns its refusal.
func (c *collecting) send(to uint64, source replicav1.Source, key string, rec record.Record) *rpc.Error {
	c.t.Helper()
	var err *rpc.Error
	c.nodes[to-1].rep.Handle(context.Background(), "", []*replicav1.Call{{
		Epoch: c.epoch, Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
			Namespace: 1, Source: source, Entries: []*replicav1.Entry{{Key: []byte(key), Record: record.Encode(rec)}},
		}},
	}}, func(reply *replicav1.Reply) { err = rpc.ErrorFromProto(reply.GetError()) })
	return err
}

// write has nodes take a client's write of now; a nil value deletes.
func (c *collecting) write(key string, value []byte, expires time.Duration, to ...uint64) record.Record {
	c.t.Helper()
	now := time.Now()
	rec := record.Record{Version: record.Version{Time: hlc.At(now.UnixMilli()), Incarnation: 1}, Kind: record.Value, Payload: value}
	if value == nil {
		rec.Kind = record.Tombstone
	}
	if expires > 0 {
		rec.ExpiresAt = now.Add(expires).UnixMilli()
	}
	for _, id := range to {
		if err := c.send(id, replicav1.Source_SOURCE_FIRST_HAND, key, rec); err != nil {
			c.t.Fatal(err)
		}
	}
	time.Sleep(time.Millisecond)
	return rec
}

// sync is what anti-entropy does, without trees: it joins all of both into both,
// leaving out what a certificate lets go.
func (n *collectNode) sync(_ context.Context, _ *topology.Topology, _ storage.Place, peer uint64) (out Outcome, err error) {
	if !n.Alive(peer) {
		return out, errors.New("is cut off")
	}
	if syncing := n.c.syncing.Load(); syncing != nil {
		(*syncing)(n.id, peer)
	}
	other := n.c.nodes[peer-1]
	certificate := max(n.store.Collection(1, 0).Certificate, other.store.Collection(1, 0).Certificate)
	mine, theirs := n.records(certificate), other.records(certificate)
	for k, rec := range mine {
		if o, ok := theirs[k]; !ok || record.Compare(rec, o) > 0 {
			n.c.send(peer, replicav1.Source_SOURCE_REPAIR, k, rec)
		}
	}
	for k, rec := range theirs {
		if o, ok := mine[k]; !ok || record.Compare(rec, o) > 0 {
			n.c.send(n.id, replicav1.Source_SOURCE_REPAIR, k, rec)
		}
	}
	return out, nil
}

// records returns what a node has on disk but for what is dead at or below a
// certificate.
func (n *collectNode) records(certificate hlc.Timestamp) map[string]record.Record {
	out := map[string]record.Record{}
	err := n.store.Scan(1, []uint32{0}, nil, nil, func(_ uint32, key, b []byte) bool {
		rec, err := record.Decode(append([]byte(nil), b...))
		if err != nil {
			n.c.t.Error(err)
		}
		if from, ok := storage.DeadAt(rec); !ok || from > certificate {
			out[string(key)] = rec
		}
		return true
	})
	if err != nil {
		n.c.t.Error(err)
	}
	return out
}

// metric returns the sum of a metric of collection.
func (n *collectNode) metric(name string) (sum float64) {
	families, err := n.metrics.Gather()
	if err != nil {
		n.c.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "kvasir_collect_"+name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// wantOnDisk checks how many records nodes have on disk.
func (c *collecting) wantOnDisk(want int, ids ...uint64) {
	c.t.Helper()
	for _, id := range ids {
		if r := c.nodes[id-1].records(0); len(r) != want {
			c.t.Errorf("n%d has %d records on disk, want %d: %.300s", id, len(r), want, fmt.Sprint(r))
		}
	}
}

// What is deleted leaves the disks, and only that.
func TestDeadRecordsLeaveTheDisks(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		for i := range 500 {
			c.write(fmt.Sprint("k", i), []byte("v"), 0, 1, 2, 3)
		}
		for i := range 490 {
			c.write(fmt.Sprint("k", i), nil, 0, 1, 2, 3)
		}
		c.wantOnDisk(500, 1, 2, 3)
		time.Sleep(collectAge - time.Second)
		c.wantOnDisk(500, 1, 2, 3)
		time.Sleep(3 * time.Minute)
		c.wantOnDisk(10, 1, 2, 3)
		certificates, compactions := 0.0, 0.0
		for _, n := range c.nodes {
			certificates += n.metric("certificates_total")
			compactions += n.metric("compactions_total")
		}
		if certificates == 0 || certificates > 3 || compactions != 3 {
			t.Errorf("%v certificates, %v compactions", certificates, compactions)
		}
		time.Sleep(time.Hour)
		c.wantOnDisk(10, 1, 2, 3)
	})
}

// Invariant 5: a replica that is down keeps the others from removing what it has not
// heard of, and brings nothing back when it returns, whoever writes late.
func TestAReplicaThatIsDownBlocksTheCollection(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		old := c.write("k", []byte("v"), 0, 1, 2, 3)
		c.set(true, 3)
		hint := c.write("k", nil, 0, 1, 2)
		time.Sleep(30 * time.Minute)
		c.wantOnDisk(1, 1, 2, 3)
		if c.nodes[2].records(0)["k"].Kind != record.Value {
			t.Fatal("the node that was down has heard of the deletion")
		}
		c.set(false, 3)
		time.Sleep(3 * time.Minute)
		c.wantOnDisk(0, 1, 2, 3)
		// Late hints and writes are refused, repairs of dead records skipped.
		for id := uint64(1); id <= 3; id++ {
			for _, source := range []replicav1.Source{replicav1.Source_SOURCE_HINT, replicav1.Source_SOURCE_FIRST_HAND} {
				for _, rec := range []record.Record{old, hint} {
					if err := c.send(id, source, "k", rec); err == nil || err.Reason != rpc.ReasonBelowPromise {
						t.Errorf("%s of %v: %v", source, rec, err)
					}
				}
			}
			if err := c.send(id, replicav1.Source_SOURCE_REPAIR, "k", hint); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(3 * time.Minute)
		c.wantOnDisk(0, 1, 2, 3)
	})
}

// Expired values go like deleted ones, from a replica that lagged too.
func TestExpiredRecordsLeaveTheDisks(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		rec := c.write("k", []byte("v"), 15*time.Minute, 1, 2)
		c.write("older", []byte("v"), 0, 1, 2, 3)
		c.set(true, 3)
		c.write("older", []byte("w"), time.Minute, 1, 2)
		time.Sleep(9 * time.Minute)
		c.wantOnDisk(2, 1, 2)
		c.set(false, 3)
		time.Sleep(3 * time.Minute)
		c.wantOnDisk(1, 1, 2, 3) // k lives
		time.Sleep(7 * time.Minute)
		c.wantOnDisk(0, 1, 2, 3)
		c.send(3, replicav1.Source_SOURCE_REPAIR, "k", rec)
		time.Sleep(5 * time.Minute)
		c.wantOnDisk(0, 1, 2, 3)
	})
}

// For how long a vnode has been pinned is told by the node that leads it.
func TestPinnedVnodesAreTold(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		c.set(true, 3)
		c.write("k", nil, 0, 1, 2)
		time.Sleep(10 * time.Minute)
		if got := c.nodes[0].metric("pinned_seconds"); got < 500 || got > 600 {
			t.Errorf("%v seconds after ten minutes", got)
		}
		if got := c.nodes[1].metric("pinned_seconds"); got != 0 {
			t.Errorf("%v seconds of a vnode that another node leads", got)
		}
		c.set(false, 3)
		time.Sleep(3 * time.Minute)
		if got := c.nodes[0].metric("pinned_seconds"); got != 0 {
			t.Errorf("%v seconds after a certificate", got)
		}
	})
}

// A round during which something old was mended is void; the next one is not.
func TestLateRepairsVoidARound(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		old := c.write("late", []byte("v"), 0, 1)
		c.write("k", nil, 0, 1, 2, 3)
		var repaired atomic.Bool
		syncing := func(_, to uint64) {
			if to == 3 && repaired.CompareAndSwap(false, true) { // a read repair while the pass is at n3
				c.send(2, replicav1.Source_SOURCE_REPAIR, "late", old)
			}
		}
		c.syncing.Store(&syncing)
		time.Sleep(5 * time.Minute)
		c.wantOnDisk(1, 1, 2, 3)
		if v := c.nodes[0].metric("void_rounds_total"); v != 1 {
			t.Errorf("%v void rounds", v)
		}
	})
}

// A certificate is for its endpoints: with others it is void, on disk too, and
// nothing is removed during a move. The promise stays.
func TestCertificatesNameTheirEndpoints(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		c.write("k", nil, 0, 1, 2, 3)
		for c.nodes[0].store.Collection(1, 0).Certificate == 0 {
			time.Sleep(time.Second)
		}
		promise := c.nodes[0].store.Collection(1, 0).Promise
		c.move(append(stableSlots(1, 2), &topologyv1.Slot{Node: 3, Incoming: 4, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Since: 1})...)
		time.Sleep(10 * time.Minute)
		c.wantOnDisk(1, 1, 2, 3)
		if s := c.nodes[0].store.Collection(1, 0); s.Certificate != 0 || s.Promise != promise {
			t.Errorf("state during a move: %+v", s)
		}
		c.move(stableSlots(1, 2, 4)...) // the newcomer is filled by the comparison
		time.Sleep(5 * time.Minute)
		c.wantOnDisk(0, 1, 2, 4)
	})
}

// An endpoint that was restarted during a round may have forgotten a repair.
func TestRestartsVoidARound(t *testing.T) {
	r := round{t: collectRing(t, 1, stableSlots(1, 2, 3)...), endpoints: []uint64{1, 2, 3}}
	state := func(promise, late, run uint64) []*replicav1.CollectResult {
		return []*replicav1.CollectResult{{Promise: 9, Run: 1}, {Promise: promise, LateJoins: late, Run: run}, {Promise: 9, Run: 3}}
	}
	for reason, second := range map[string][]*replicav1.CollectResult{
		"": state(9, 4, 2), "restarted": state(9, 4, 5), "late_joins": state(9, 5, 2), "promise": state(8, 4, 2),
	} {
		err := r.confirm(9, state(9, 4, 2), second)
		if (err == nil) != (reason == "") || err != nil && err.reason != reason {
			t.Errorf("want %q: %v", reason, err)
		}
	}
}

// An endpoint that did not hear of a certificate is told again.
func TestCertificatesAreToldAgain(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		c.write("k", nil, 0, 1, 2, 3)
		time.Sleep(5 * time.Minute)
		c.wantOnDisk(0, 1, 2, 3)
		// As if the last step had not come through to n3, and its disk kept the record.
		if err := c.nodes[2].store.VoidCertificates(storage.Place{Namespace: 1, Vnode: 0}); err != nil {
			t.Fatal(err)
		}
		commit, err := c.nodes[2].store.Apply([]storage.Write{{Namespace: 1, Key: []byte("x"), Record: record.Encode(record.Record{
			Version: record.Version{Time: 1, Incarnation: 1}, Kind: record.Tombstone,
		})}}, nil)
		if err != nil || commit.Wait() != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * recheckInterval)
		if s := c.nodes[2].store.Collection(1, 0); s.Certificate == 0 {
			t.Errorf("state is %+v", s)
		}
		c.wantOnDisk(0, 1, 2, 3)
	})
}

// A certificate is on disk: whoever has learned of it goes on alone after a crash, but
// waits again for repairs that may be on their way.
func TestCertificatesSurviveACrash(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		c.write("k", nil, 0, 1, 2, 3)
		n := c.nodes[1]
		for n.store.Collection(1, 0).Certificate == 0 {
			time.Sleep(time.Second)
		}
		crashed := n.fs.CrashClone(vfs.CrashCloneCfg{})
		n.stop()
		c.set(true, 1, 3)
		n.fs = crashed
		n.start(collectRing(t, c.epoch, stableSlots(1, 2, 3)...))
		time.Sleep(collectGrace - time.Second)
		c.wantOnDisk(1, 2)
		time.Sleep(time.Minute)
		c.wantOnDisk(0, 2)
	})
}

func TestExplainCollection(t *testing.T) {
	runCollecting(t, func(t *testing.T, c *collecting) {
		explain := func(key string, hints ...replica.HintGroup) *adminv1.ExplainCollectionResponse {
			t.Helper()
			r := &adminv1.ExplainCollectionRequest{Target: &adminv1.ExplainCollectionRequest_Vnode{}}
			if key != "" {
				r.Target = &adminv1.ExplainCollectionRequest_Key{Key: []byte(key)}
			}
			res, err := c.nodes[3].collector.Explain(context.Background(), r, hints) // no endpoint itself
			if err != nil {
				t.Fatal(err)
			}
			return res
		}
		want := func(res *adminv1.ExplainCollectionResponse, texts ...string) {
			t.Helper()
			if len(res.GetPinnedBy()) != len(texts) {
				t.Errorf("pinned by %q, want %q", res.GetPinnedBy(), texts)
				return
			}
			for i, text := range texts {
				if !strings.Contains(res.GetPinnedBy()[i], text) {
					t.Errorf("pinned by %q, want %q", res.GetPinnedBy(), texts)
				}
			}
		}
		want(explain(""))
		c.write("alive", []byte("v"), 0, 1, 2, 3)
		if res := explain("alive"); !res.GetFound() || res.GetDead() {
			t.Errorf("%+v", res)
		}
		c.write("k", nil, 0, 1, 2, 3)
		want(explain("alive"))
		res := explain("k")
		want(res, "the record is 0s old: one is certified 30s")
		if !res.GetFound() || !res.GetDead() || res.GetDeadSince() == 0 || len(res.GetReplicas()) != 3 || res.GetReplicas()[1].GetDeadRecords() != 1 {
			t.Errorf("%+v", res)
		}
		want(explain(""), "the oldest dead record is 0s old")
		c.set(true, 3)
		want(explain("k", replica.HintGroup{HintBacklog: replica.HintBacklog{Target: 3, Count: 7}, Place: storage.Place{Namespace: 1}}), "n3 does not answer (down: is cut off)", "7 hints of this vnode for n3")
		time.Sleep(time.Minute)
		c.set(false, 3)
		want(explain(""), "n1 has not promised", "n2 has not promised", "n3 has not promised")
		c.move(append(stableSlots(1, 2), &topologyv1.Slot{Node: 3, Incoming: 4, Phase: topologyv1.Phase_PHASE_WRITE_BOTH_READ_OLD, Since: 1})...)
		if res := explain(""); !strings.Contains(res.GetPinnedBy()[0], "moving between nodes") {
			t.Errorf("%q", res.GetPinnedBy())
		}
		c.move(stableSlots(1, 2, 3)...)
		for c.nodes[0].store.Collection(1, 0).Certificate == 0 {
			time.Sleep(time.Second)
		}
		want(explain("k"), "certified: removal begins 15s")
		want(explain(""), "certified: removal begins 15s")
		time.Sleep(5 * time.Minute)
		want(explain(""))
		want(explain("k"))
		if _, err := c.nodes[0].collector.Explain(context.Background(), &adminv1.ExplainCollectionRequest{Namespace: "no"}, nil); rpc.AsError(err).Reason != "NAMESPACE_NOT_FOUND" {
			t.Error(err)
		}
	})
}
