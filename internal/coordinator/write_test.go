package coordinator_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

func TestPutGetDelete(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		for i := range 20 {
			key := fmt.Sprint("k", i)
			receipt := c.nodes[i%3].mustPut(key, "v1", "")
			if receipt.GetN() != 3 || receipt.GetNeeded() != 2 || receipt.GetAcknowledged() < 2 || receipt.GetStrength() != kvv1.Strength_STRENGTH_STRONG ||
				receipt.GetVersion().GetIncarnation() != uint64(i%3+1) || receipt.GetCoordinator() != fmt.Sprint("n", i%3+1) || receipt.GetEpoch() != c.state.Topology.Epoch {
				t.Fatalf("receipt %v", receipt)
			}
			c.nodes[(i+1)%3].wantValue(key, "v1")
			c.nodes[(i+2)%3].mustPut(key, "v2", "all")
			c.nodes[i%3].wantValue(key, "v2")
			if _, err := c.nodes[(i+1)%3].coord.Delete(context.Background(), &kvv1.DeleteRequest{Key: []byte(key), Token: c.token}); err != nil {
				t.Fatal(err)
			}
			c.nodes[i%3].wantValue(key, "")
			time.Sleep(time.Millisecond)
		}
	})
}

// 5 replicas at 40% answer after 2 acknowledgements, the others go on.
func TestFortyPercentOfFive(t *testing.T) {
	run(t, 5, nil, func(t *testing.T, c *cluster) {
		c.set(slowly, 3, 4, 5)
		start := time.Now()
		receipt := c.nodes[0].mustPut("k", "v", "40%")
		if took := time.Since(start); took >= 100*time.Millisecond {
			t.Errorf("answered after %s: it waited for the slow ones", took)
		}
		if receipt.GetNeeded() != 2 || receipt.GetAcknowledged() != 2 || receipt.GetStrength() != kvv1.Strength_STRENGTH_EVENTUAL {
			t.Errorf("receipt %v", receipt)
		}
		if n := c.holders("k", "v"); n != 2 {
			t.Errorf("%d replicas have it at the answer", n)
		}
		time.Sleep(time.Second)
		if n := c.holders("k", "v"); n != 5 {
			t.Errorf("%d replicas have it in the end, want all", n)
		}
	})
}

// Invariant 14: fewer live replicas than W are refused at once, and nothing is
// written anywhere.
func TestTooFewLiveReplicas(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.set(down, 2, 3)
		start := time.Now()
		_, err := c.nodes[0].put("k", "v", "")
		e := wantError(t, err, codes.Unavailable, rpc.ReasonNotEnoughReplicas)
		if !e.NothingDone() || e.Details["live"] != "1" || e.Details["needed"] != "2" || e.Details["down"] != "n2,n3" || !strings.Contains(e.Message, "1 of 3") {
			t.Errorf("error %+v", e)
		}
		if time.Since(start) > 0 {
			t.Error("the refusal took time")
		}
		if n := c.holders("k", "v"); n != 0 {
			t.Errorf("%d replicas have it", n)
		}
		// One acknowledgement is still to be had.
		c.nodes[0].mustPut("k", "v", "one")
		_, err = c.nodes[0].get("k", nil)
		wantError(t, err, codes.Unavailable, rpc.ReasonNotEnoughReplicas)
	})
}

func TestOutcomeUnknown(t *testing.T) {
	for name, w := range map[string]way{"no answer": hanging, "lost reply": mute} {
		t.Run(name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				c.set(w, 2, 3)
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				_, err := c.nodes[0].coord.Put(ctx, &kvv1.PutRequest{Key: []byte("k"), Value: []byte("v")})
				e := wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
				if e.NothingDone() || e.Details["acknowledged"] > "1" || e.Details["needed"] != "2" {
					t.Errorf("error %+v", e)
				}
			})
		})
	}
}

// Where no replica took the write, the error says so, and a retry is safe.
func TestRefusedByAll(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		for _, n := range c.nodes {
			n.fill(true)
		}
		_, err := c.nodes[0].put("k", "v", "")
		if e := wantError(t, err, codes.ResourceExhausted, rpc.ReasonDiskFull); e.RetryAfter <= 0 {
			t.Errorf("error %+v", e)
		}
	})
}

func TestHintsForThoseThatAreDown(t *testing.T) {
	for name, w := range map[string]way{"down": down, "failing": hanging, "refusing": refusing} {
		t.Run(name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				c.set(w, 3)
				c.nodes[0].mustPut("k", "v", "")
				time.Sleep(3 * time.Second)
				var hints []storage.Hint
				for _, n := range c.nodes {
					if err := n.store.AllHints(func(h storage.Hint) bool { hints = append(hints, h); return true }); err != nil {
						t.Fatal(err)
					}
				}
				if len(hints) != 1 || hints[0].Target != 3 || string(hints[0].Key) != "k" {
					t.Fatalf("hints %+v, want one for n3", hints)
				}
				if b := c.nodes[0].hints.Backlog(); len(b) != 1 || b[0].Target != 3 || b[0].Count != 1 {
					t.Errorf("backlog %+v", b)
				}
			})
		})
	}
	t.Run("off", func(t *testing.T) {
		run(t, 3, func(s *topology.NamespaceSettings) { s.Hints = ptr(false) }, func(t *testing.T, c *cluster) {
			c.set(down, 3)
			c.nodes[0].mustPut("k", "v", "")
			time.Sleep(3 * time.Second)
			if b := c.nodes[0].hints.Backlog(); len(b) != 0 {
				t.Errorf("backlog %+v", b)
			}
		})
	})
}

// Invariant 15.
func TestHintsAreBounded(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].hints.SetBounds(replica.HintBounds{Bytes: 1000, Count: 100})
		c.set(down, 3)
		for i := range 50 {
			c.nodes[0].mustPut(fmt.Sprint(i), "v", "")
		}
		totals := c.nodes[0].hints.Totals()
		if totals.Count == 0 || totals.Bytes > 1000 || totals.Count+totals.Dropped() != 50 {
			t.Errorf("totals %+v", totals)
		}
		if len(c.nodes[0].store.Dirty()) == 0 {
			t.Error("no vnode is dirty")
		}
	})
}

// A write lasts, with the room it takes, until the hints of those that failed are on
// disk: what a stop waits for.
func TestWriteLastsUntilItsHintsAreKept(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.set(refusing, 3)
		c.nodes[0].mustPut("k", "v", "")
		c.nodes[0].coord.Close()
		if n := c.nodes[0].hints.Totals(); n.Kept != 1 || c.nodes[0].coord.InFlight().WriteBytes != 0 {
			t.Errorf("totals %+v, %+v in flight", n, c.nodes[0].coord.InFlight())
		}
		// So does one whose hint finds no room: its vnode is dirty by then.
		c.nodes[0].hints.SetBounds(replica.HintBounds{})
		c.nodes[0].mustPut("k", "w", "")
		c.nodes[0].coord.Close()
		if d := c.nodes[0].store.Dirty(); len(d) != 1 || d[0].Vnode != c.state.Topology.VnodeOf([]byte("k")) {
			t.Errorf("dirty are %+v", d)
		}
	})
}

// A slot that moves acknowledges only when both its nodes have, whichever it is.
func TestWriteDuringAMove(t *testing.T) {
	for _, tc := range []struct {
		name  string
		phase topology.Phase
		down  uint64
		ok    bool
	}{
		{"incoming node down", topology.WriteBothReadOld, 4, true}, // the other two slots do
		{"old node down", topology.WriteBothReadNew, 1, true},
		{"incoming node and another down", topology.WriteBothReadOld, 4, false},
		{"dead old node", topology.WriteNewReadNone, 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
				c.setRing(func(int) []topology.Slot {
					return []topology.Slot{
						{Node: 1, Incoming: 4, Phase: tc.phase},
						{Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable},
					}
				})
				c.publish()
				c.set(down, tc.down)
				if !tc.ok {
					c.set(down, 3)
				}
				receipt, err := c.nodes[1].put("k", "v", "")
				if !tc.ok {
					wantError(t, err, codes.Unavailable, rpc.ReasonNotEnoughReplicas)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if receipt.GetNeeded() != 2 || receipt.GetN() != 3 {
					t.Errorf("receipt %v", receipt)
				}
				c.nodes[1].wantValue("k", "v")
			})
		})
	}
}

// A newcomer that does not take records yet is asked again, so that a move costs no
// write although another replica is down.
func TestWriteWaitsForANewcomer(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{{Node: 1, Incoming: 4, Phase: topology.WriteBothReadOld}, {Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}}
		})
		c.publish()
		c.set(down, 3)
		c.nodes[3].closed.Store(true)
		time.AfterFunc(300*time.Millisecond, func() { c.nodes[3].closed.Store(false) })
		c.nodes[1].mustPut("k", "v", "")
		if c.nodes[3].own("k") == nil {
			t.Error("the newcomer has no record")
		}
		c.nodes[3].closed.Store(true)
		_, err := c.nodes[1].put("k", "w", "")
		wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
	})
}

// A replica ahead refuses what matters to it; the coordinator follows.
func TestCoordinatorFollowsTheTopology(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{{Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}, {Node: 4, Phase: topology.Stable}}
		})
		c.publish(2, 3, 4) // node 1 sleeps
		receipt := c.nodes[0].mustPut("k", "v", "all")
		if receipt.GetEpoch() != c.state.Topology.Epoch {
			t.Errorf("served in epoch %d, want %d", receipt.GetEpoch(), c.state.Topology.Epoch)
		}
		if n := c.holders("k", "v"); n < 3 || c.nodes[3].own("k") == nil {
			t.Errorf("%d nodes have the record, want the three owners", n)
		}
		// The other way round: a replica behind catches up before it serves.
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{{Node: 1, Phase: topology.Stable}, {Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}}
		})
		c.publish(4)
		c.nodes[3].mustPut("k2", "v", "all")
		if c.nodes[0].own("k2") == nil || c.nodes[0].fence.Topology().Epoch != c.state.Topology.Epoch {
			t.Error("the replica did not catch up")
		}
	})
}

// A change elsewhere does not disturb: the epoch is refused only where it matters.
func TestUnrelatedEpochsAreServed(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		ns, _, err := c.state.Topology.NewNamespace("other", topology.NamespaceSettings{})
		if err != nil {
			t.Fatal(err)
		}
		c.createNamespace(ns)
		c.publish(2, 3)
		if receipt := c.nodes[0].mustPut("k", "v", "all"); receipt.GetEpoch() >= c.state.Topology.Epoch {
			t.Errorf("served in epoch %d", receipt.GetEpoch())
		}
	})
}

func TestBatch(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("gone", "v", "all")
		req := &kvv1.BatchRequest{}
		for i := range 100 {
			req.Operations = append(req.Operations, &kvv1.BatchOperation{Key: fmt.Append(nil, "k", i), Value: []byte("v")})
		}
		req.Operations = append(req.Operations, &kvv1.BatchOperation{Key: []byte("gone"), Delete: true})
		resp, err := c.nodes[1].coord.Batch(context.Background(), req)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetResults()) != 101 {
			t.Fatalf("%d results", len(resp.GetResults()))
		}
		last := uint64(0)
		for i, r := range resp.GetResults() {
			if r.GetError() != nil || r.GetVersion().GetTimestamp() <= last {
				t.Fatalf("result %d: %v", i, r)
			}
			last = r.GetVersion().GetTimestamp()
		}
		c.nodes[2].wantValue("k99", "v")
		c.nodes[2].wantValue("gone", "")
	})
}

// Each operation of a batch has its own fate.
func TestBatchResultsArePerKey(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		// Vnodes 0 to 3 lie on nodes 1 to 3, the others on 2 to 4.
		c.setRing(func(v int) []topology.Slot {
			first := uint64(1 + v/4)
			return []topology.Slot{{Node: first, Phase: topology.Stable}, {Node: first + 1, Phase: topology.Stable}, {Node: first + 2, Phase: topology.Stable}}
		})
		c.publish()
		c.set(down, 1, 3)
		req := &kvv1.BatchRequest{}
		for i := range 40 {
			req.Operations = append(req.Operations, &kvv1.BatchOperation{Key: fmt.Append(nil, "k", i)})
		}
		resp, err := c.nodes[1].coord.Batch(context.Background(), req)
		if err != nil {
			t.Fatal(err)
		}
		good, bad := 0, 0
		for i, r := range resp.GetResults() {
			reachable := c.state.Topology.VnodeOf(req.Operations[i].Key) >= 4
			if reachable != (r.GetError() == nil) {
				t.Errorf("operation %d: %v", i, r)
			}
			if r.GetError() == nil {
				good++
			} else if bad++; r.GetError().GetReason() != rpc.ReasonNotEnoughReplicas {
				t.Errorf("operation %d: %v", i, r)
			}
		}
		if good == 0 || bad == 0 {
			t.Errorf("%d good, %d bad: the test needs both", good, bad)
		}
	})
}

// Invariant 14.
func TestBadInput(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		co := c.nodes[0].coord
		ctx := context.Background()
		big := make([]byte, 1<<20+1)
		long := make([]byte, 4097)
		put := func(r *kvv1.PutRequest) error { _, err := co.Put(ctx, r); return err }
		get := func(r *kvv1.GetRequest) error { _, err := co.Get(ctx, r); return err }
		batch := func(ops ...*kvv1.BatchOperation) error {
			_, err := co.Batch(ctx, &kvv1.BatchRequest{Operations: ops})
			return err
		}
		scan := func(r *kvv1.ScanRequest) error { _, err := co.Scan(ctx, r); return err }
		k := []byte("k")
		var many []*kvv1.BatchOperation
		for i := range 9 {
			many = append(many, &kvv1.BatchOperation{Key: fmt.Append(nil, i), Value: big[1:]})
		}
		for _, tc := range []struct {
			name   string
			err    error
			code   codes.Code
			reason string
			detail string
			value  string
		}{
			{"empty key", put(&kvv1.PutRequest{}), codes.InvalidArgument, rpc.ReasonBadRequest, "limit", "4096"},
			{"long key", put(&kvv1.PutRequest{Key: long}), codes.InvalidArgument, rpc.ReasonBadRequest, "size", "4097"},
			{"large value", put(&kvv1.PutRequest{Key: k, Value: big}), codes.InvalidArgument, rpc.ReasonBadRequest, "limit", "1048576"},
			{"W 0%", put(&kvv1.PutRequest{Key: k, WriteQuorum: "0%"}), codes.InvalidArgument, "BAD_QUORUM", "value", "0%"},
			{"W 101%", put(&kvv1.PutRequest{Key: k, WriteQuorum: "101%"}), codes.InvalidArgument, "BAD_QUORUM", "field", "write_quorum"},
			{"W -1", put(&kvv1.PutRequest{Key: k, WriteQuorum: "-1"}), codes.InvalidArgument, "BAD_QUORUM", "value", "-1"},
			{"W abc", put(&kvv1.PutRequest{Key: k, WriteQuorum: "abc"}), codes.InvalidArgument, "BAD_QUORUM", "value", "abc"},
			{"W above N", put(&kvv1.PutRequest{Key: k, WriteQuorum: "4"}), codes.InvalidArgument, "BAD_QUORUM", "n", "3"},
			{"R above N", get(&kvv1.GetRequest{Key: k, ReadQuorum: "4"}), codes.InvalidArgument, "BAD_QUORUM", "field", "read_quorum"},
			{"unknown namespace", put(&kvv1.PutRequest{Key: k, Namespace: "nope"}), codes.NotFound, "NAMESPACE_NOT_FOUND", "namespace", "nope"},
			{"endless TTL", put(&kvv1.PutRequest{Key: k, TtlMs: 1 << 60}), codes.InvalidArgument, rpc.ReasonBadRequest, "field", "ttl_ms"},
			{"token from the future", put(&kvv1.PutRequest{Key: k, Token: uint64(time.Now().Add(time.Hour).UnixMilli()) << 16}), codes.InvalidArgument, rpc.ReasonClockSkew, "field", "token"},
			{"epoch from the future", put(&kvv1.PutRequest{Key: k, Epoch: 999}), codes.Unavailable, rpc.ReasonEpochAhead, "", ""},
			{"unknown node", get(&kvv1.GetRequest{Key: k, Replica: "n9"}), codes.NotFound, "NODE_NOT_FOUND", "node", "n9"},
			{"empty batch", batch(), codes.InvalidArgument, rpc.ReasonBadRequest, "limit", "10000"},
			{"duplicate key", batch(&kvv1.BatchOperation{Key: k}, &kvv1.BatchOperation{Key: k, Delete: true}), codes.InvalidArgument, "DUPLICATE_KEY", "operation", "1"},
			{"empty key in a batch", batch(&kvv1.BatchOperation{Key: k}, &kvv1.BatchOperation{}), codes.InvalidArgument, rpc.ReasonBadRequest, "operation", "1"},
			{"large batch", batch(many...), codes.InvalidArgument, rpc.ReasonBadRequest, "limit", "8388608"},
			{"long prefix", scan(&kvv1.ScanRequest{Prefix: long}), codes.InvalidArgument, rpc.ReasonBadRequest, "field", "prefix"},
			{"strange resume token", scan(&kvv1.ScanRequest{ResumeToken: []byte("junk")}), codes.InvalidArgument, rpc.ReasonBadRequest, "field", "resume_token"},
		} {
			e := wantError(t, tc.err, tc.code, tc.reason)
			if tc.detail != "" && e.Details[tc.detail] != tc.value {
				t.Errorf("%s: details %v, want %s=%s", tc.name, e.Details, tc.detail, tc.value)
			}
		}
		for _, n := range c.nodes {
			if ids, err := n.store.Namespaces(); err != nil || len(ids) != 0 {
				t.Errorf("refused input left records in namespaces %v, %v", ids, err)
			}
		}
	})
}

func TestTTL(t *testing.T) {
	run(t, 3, func(s *topology.NamespaceSettings) { s.TTL = ptr(time.Minute) }, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("default", "v", "all")
		if _, err := c.nodes[0].coord.Put(context.Background(), &kvv1.PutRequest{Key: []byte("short"), Value: []byte("v"), TtlMs: 1000}); err != nil {
			t.Fatal(err)
		}
		c.nodes[1].wantValue("short", "v")
		time.Sleep(2 * time.Second)
		c.nodes[1].wantValue("short", "")
		c.nodes[1].wantValue("default", "v")
		time.Sleep(time.Minute)
		c.nodes[1].wantValue("default", "")
		// A later write without a shorter life is served again.
		c.nodes[2].mustPut("short", "again", "")
		c.nodes[1].wantValue("short", "again")
	})
}

// A node whose clock is off stops coordinating once three others say so, and its
// versions stay monotonic.
func TestClockSkewStopsCoordination(t *testing.T) {
	run(t, 4, nil, func(t *testing.T, c *cluster) {
		n := c.nodes[0]
		first := n.mustPut("k", "v", "all")
		n.offset.Store(600_000)
		for _, peer := range []uint64{2, 3} {
			n.clock.Observe(peer, -10*time.Minute)
		}
		if err := n.clock.MayCoordinate(); err != nil {
			t.Errorf("two opinions must only warn: %v", err)
		}
		n.clock.Observe(4, -10*time.Minute)
		_, err := n.put("k", "ahead", "")
		if e := wantError(t, err, codes.Unavailable, rpc.ReasonClockSkew); !e.NothingDone() || e.Details["offset_ms"] != "600000" {
			t.Errorf("error %+v", e)
		}
		// It would take for expired what is not; what it holds itself may be looked at.
		_, err = n.get("k", nil)
		wantError(t, err, codes.Unavailable, rpc.ReasonClockSkew)
		_, err = n.coord.Scan(context.Background(), &kvv1.ScanRequest{})
		wantError(t, err, codes.Unavailable, rpc.ReasonClockSkew)
		if _, err := n.get("k", func(r *kvv1.GetRequest) { r.Replica = "n1" }); err != nil {
			t.Error(err)
		}
		// Others refuse its first-hand writes even if it does not notice.
		n.clock.Observe(2, 0)
		n.clock.Observe(3, 0)
		n.clock.Observe(4, 0)
		_, err = n.put("k", "ahead", "")
		wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown) // its own replica took it
		if got := c.nodes[1].own("k"); string(got.Payload) != "v" {
			t.Errorf("a write 10 minutes ahead reached another replica: %+v", got)
		}
		// Back in time: it waits until its clock has caught up with what it issued.
		n.offset.Store(0)
		for _, peer := range []uint64{2, 3, 4} {
			n.clock.Observe(peer, 0)
		}
		c.token = 0
		_, err = n.put("k", "back", "")
		wantError(t, err, codes.Unavailable, rpc.ReasonClockSkew)
		time.Sleep(10 * time.Minute)
		second := n.mustPut("k", "back", "")
		if second.GetVersion().GetTimestamp() <= first.GetVersion().GetTimestamp() {
			t.Error("versions went back")
		}
		c.nodes[2].wantValue("k", "back")
	})
}

func (c *cluster) createNamespace(ns topology.Namespace) {
	c.t.Helper()
	c.apply(createMutation(ns))
}

// The client's token orders its writes over coordinators with different clocks.
func TestTokenOrdersWrites(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].offset.Store(200)
		first := c.nodes[0].mustPut("a", "1", "")
		resp, err := c.nodes[1].coord.Put(context.Background(), &kvv1.PutRequest{
			Key: []byte("b"), Value: []byte("2"), Token: first.GetVersion().GetTimestamp(),
		})
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetReceipt().GetVersion().GetTimestamp() <= first.GetVersion().GetTimestamp() {
			t.Error("a later write of the same client has a lower version")
		}
	})
}

// A receipt is honest about quorums that do not overlap.
func TestReceiptStrength(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		for w, want := range map[string]kvv1.Strength{
			"one": kvv1.Strength_STRENGTH_EVENTUAL, "quorum": kvv1.Strength_STRENGTH_STRONG, "all": kvv1.Strength_STRENGTH_STRONG, "34%": kvv1.Strength_STRENGTH_STRONG,
		} {
			if got := c.nodes[0].mustPut("k", "v", w).GetStrength(); got != want {
				t.Errorf("W=%s is %s, want %s", w, got, want)
			}
		}
		for r, want := range map[string]kvv1.Strength{
			"one": kvv1.Strength_STRENGTH_EVENTUAL, "quorum": kvv1.Strength_STRENGTH_STRONG, "all": kvv1.Strength_STRENGTH_STRONG,
		} {
			resp, err := c.nodes[0].get("k", func(g *kvv1.GetRequest) { g.ReadQuorum = r })
			if err != nil {
				t.Fatal(err)
			}
			if got := resp.GetReceipt().GetStrength(); got != want {
				t.Errorf("R=%s is %s, want %s", r, got, want)
			}
		}
	})
	if kvv1.Strength(quorum.Strong) != kvv1.Strength_STRENGTH_STRONG || kvv1.Strength(quorum.Eventual) != kvv1.Strength_STRENGTH_EVENTUAL {
		t.Error("the wire's numbers of strengths differ from the package's")
	}
}

// Invariant 15: writes on their way are bounded.
func TestInFlightWritesAreBounded(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.set(hanging, 3)
		refused := 0
		for i := range 400 {
			_, err := c.nodes[0].coord.Put(context.Background(), &kvv1.PutRequest{Key: fmt.Append(nil, i), Value: make([]byte, 1<<20)})
			if err != nil {
				if e := wantError(t, err, codes.ResourceExhausted, rpc.ReasonOverloaded); e.RetryAfter <= 0 {
					t.Fatalf("error %+v", e)
				}
				refused++
			}
		}
		if refused == 0 {
			t.Error("400 MiB of writes that wait for a hanging replica were all taken")
		}
		time.Sleep(5 * time.Second)
		c.nodes[0].mustPut("after", "v", "")
	})
}

// Everything that a replica stores is covered by the clock's reservation, so that
// no restart can issue a version below it.
func TestRestartedClockIsAboveWhatWasStored(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].offset.Store(200) // and never coordinates again
		receipt := c.nodes[0].mustPut("k", "v", "all")
		for _, n := range c.nodes[1:] {
			again := replica.NewClock(func() int64 { return time.Now().UnixMilli() - 60_000 }, n.store.Reserved(), n.store.ReserveClock, nil)
			ts, err := again.Tick()
			if err != nil {
				t.Fatal(err)
			}
			if uint64(ts) <= receipt.GetVersion().GetTimestamp() {
				t.Errorf("%s issues %s after a restart, and stores %d", fmt.Sprint("n", n.id), ts, receipt.GetVersion().GetTimestamp())
			}
		}
	})
}

func TestRecordsOnReplicasAreEqual(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("k", "v", "all")
		first := c.nodes[0].own("k")
		for _, n := range c.nodes[1:] {
			if record.Compare(*first, *n.own("k")) != 0 {
				t.Errorf("records differ: %+v, %+v", first, n.own("k"))
			}
		}
	})
}

// Invariant 17: an attempt under the old epoch was applied by one replica, and the
// one under the new epoch is refused before it begins. That is no definite failure.
func TestAnOlderAttemptIsNotForgotten(t *testing.T) {
	for name, write := range map[string]func(*node) error{
		"put": func(n *node) error { _, err := n.put("k", "v", ""); return err },
		"batch": func(n *node) error {
			r, err := n.coord.Batch(context.Background(), &kvv1.BatchRequest{Operations: []*kvv1.BatchOperation{{Key: []byte("k"), Value: []byte("v")}}})
			if err != nil {
				return err
			}
			return rpc.ErrorFromProto(r.GetResults()[0].GetError())
		},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				c.place(3, 2, 1)
				c.publish(2, 3) // node 1, replica and coordinator, is still behind
				c.set(slowly, 3)
				time.AfterFunc(50*time.Millisecond, func() { c.set(down, 2, 3) })
				err := write(c.nodes[0])
				if c.nodes[0].own("k") == nil {
					t.Fatal("the first attempt was to be applied by node 1")
				}
				wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
			})
		})
	}
}

// Invariant 17: the old node of a moving slot took the write, the incoming one did
// not. No slot has it, and yet it is readable.
func TestHalfASlotIsNotNothing(t *testing.T) {
	run(t, 2, func(s *topology.NamespaceSettings) { s.N = ptr(1) }, func(t *testing.T, c *cluster) {
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{{Node: 1, Incoming: 2, Phase: topology.WriteBothReadOld}}
		})
		c.publish()
		c.set(refusing, 2)
		_, err := c.nodes[0].put("k", "v", "")
		wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
	})
}

// Invariant 17: a write that failed for certain leaves no hints, which would have it
// seen later.
func TestDefiniteFailureLeavesNoHints(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3)
		c.publish()
		for _, n := range c.nodes[:3] {
			n.fill(true)
		}
		_, err := c.nodes[3].put("k", "v", "")
		wantError(t, err, codes.ResourceExhausted, rpc.ReasonDiskFull)
		time.Sleep(time.Second)
		if n := hintCount(c.nodes[3]); n != 0 {
			t.Errorf("%d hints", n)
		}
		// With one that took it, the others get hints.
		c.nodes[0].fill(false)
		_, err = c.nodes[3].put("k", "v", "")
		wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
		time.Sleep(time.Second)
		if n := hintCount(c.nodes[3]); n != 2 {
			t.Errorf("%d hints, want 2", n)
		}
	})
}

func hintCount(n *node) (count int) {
	for _, u := range n.hints.Backlog() {
		count += int(u.Count)
	}
	return count
}
