package coordinator_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func createMutation(ns topology.Namespace) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_CreateNamespace{CreateNamespace: &topologyv1.CreateNamespace{Namespace: ns.Proto()}}}
}

func recordAt(ms int64, payload string) record.Record {
	r := record.Record{Version: record.Version{Time: hlc.At(ms), Incarnation: 1}, Kind: record.Value, Payload: []byte(payload)}
	if payload == "" {
		r.Kind, r.Payload = record.Tombstone, nil
	}
	return r
}

// Stale replicas are mended by reads: before the answer, after it, or not at all.
func TestReadRepair(t *testing.T) {
	for _, tc := range []struct {
		name      string
		payload   string // "" is a tombstone
		mode      kvv1.ReadRepair
		r         string
		atAnswer  int // replicas with the newest record when the answer leaves
		afterward int
	}{
		{"blocking", "new", kvv1.ReadRepair_READ_REPAIR_BLOCKING, "all", 1, 3},
		{"blocking quorum", "new", kvv1.ReadRepair_READ_REPAIR_BLOCKING, "quorum", 2, 2},
		{"blocking tombstone", "", kvv1.ReadRepair_READ_REPAIR_BLOCKING, "quorum", 2, 2},
		{"asynchronous", "new", kvv1.ReadRepair_READ_REPAIR_ASYNC, "all", 1, 3},
		{"asynchronous tombstone", "", kvv1.ReadRepair_READ_REPAIR_ASYNC, "quorum", 1, 2},
		{"off", "new", kvv1.ReadRepair_READ_REPAIR_OFF, "all", 1, 1},
		{"of the namespace", "new", kvv1.ReadRepair_READ_REPAIR_UNSPECIFIED, "quorum", 2, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				now := time.Now().UnixMilli()
				for _, n := range c.nodes {
					n.plant("k", recordAt(now-2, "old"))
				}
				c.nodes[0].plant("k", recordAt(now-1, tc.payload))
				count := func() (n int) {
					for _, node := range c.nodes {
						if node.own("k").Version.Time.Millis() == now-1 {
							n++
						}
					}
					return n
				}
				c.set(slowly, 2, 3)
				resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum, r.ReadRepair = tc.r, tc.mode })
				if err != nil {
					t.Fatal(err)
				}
				if got := string(resp.GetValue()); got != tc.payload || resp.GetFound() != (tc.payload != "") {
					t.Errorf("value %q, found %v", got, resp.GetFound())
				}
				if got := count(); got < tc.atAnswer {
					t.Errorf("%d replicas have it at the answer, want %d", got, tc.atAnswer)
				}
				time.Sleep(time.Second)
				if got := count(); got != tc.afterward {
					t.Errorf("%d replicas have it afterwards, want %d", got, tc.afterward)
				}
			})
		})
	}
}

// The newest record need not be where the whole record was asked for.
func TestWinnerIsFetchedFromItsHolder(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		now := time.Now().UnixMilli()
		c.nodes[1].plant("k", recordAt(now, "new"))
		c.nodes[2].plant("k", recordAt(now, "new"))
		if r := c.nodes[0].wantValue("k", "new"); r.GetRepaired() != 1 {
			t.Errorf("receipt %v, want one slot repaired", r)
		}
		if c.nodes[0].own("k") == nil {
			t.Error("the answer left before N−R+1 slots held it")
		}
	})
}

func TestBlockingRepairThatFails(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].plant("k", recordAt(time.Now().UnixMilli(), "new"))
		for _, n := range c.nodes[1:] {
			n.fill(true)
		}
		_, err := c.nodes[0].get("k", nil)
		wantError(t, err, codes.Unavailable, rpc.ReasonRepairFailed)
		resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadRepair = kvv1.ReadRepair_READ_REPAIR_ASYNC })
		if err != nil || string(resp.GetValue()) != "new" {
			t.Errorf("without blocking: %v, %v", resp, err)
		}
	})
}

// Reads never go backwards once a value was seen, whatever replicas they meet: the
// schedule that breaks repairing only the stale among the R.
func TestReadsAreMonotonic(t *testing.T) {
	for _, q := range []struct{ n, w, r int }{{3, 2, 2}, {5, 3, 3}, {5, 4, 2}, {4, 3, 2}, {5, 1, 5}} {
		t.Run(fmt.Sprintf("N=%d W=%d R=%d", q.n, q.w, q.r), func(t *testing.T) {
			set := func(s *topology.NamespaceSettings) { s.W, s.R = ptr(fmt.Sprint(q.w)), ptr(fmt.Sprint(q.r)) }
			run(t, q.n, set, func(t *testing.T, c *cluster) {
				rng := rand.New(rand.NewPCG(7, uint64(q.n*100+q.w*10+q.r)))
				for i := range 40 {
					key := fmt.Sprint("k", i)
					now := time.Now().UnixMilli()
					for _, n := range c.nodes {
						n.plant(key, recordAt(now-2, "old"))
					}
					// A write that reached fewer replicas than it needed.
					for _, at := range rng.Perm(q.n)[:rng.IntN(q.w)] {
						c.nodes[at].plant(key, recordAt(now-1, "new"))
					}
					seen := false
					for range 12 {
						resp, err := c.nodes[rng.IntN(q.n)].get(key, nil)
						if err != nil {
							t.Fatal(err)
						}
						switch string(resp.GetValue()) {
						case "new":
							seen = true
						case "old":
							if seen {
								t.Fatalf("%s: the old value after the new one", key)
							}
						}
					}
				}
			})
		})
	}
}

// In every phase of a move reads find what was acknowledged in any earlier phase,
// also when the move is aborted.
func TestReadsDuringAMove(t *testing.T) {
	move := func(c *cluster, p topology.Phase, node uint64) {
		first := topology.Slot{Node: 1, Incoming: 4, Phase: p}
		if p == topology.Stable {
			first = topology.Slot{Node: node, Phase: p}
		}
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{first, {Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}}
		})
		c.publish()
	}
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		move(c, topology.Stable, 1)
		now := time.Now().UnixMilli()
		c.nodes[3].plant("k", recordAt(now, "partial")) // the incoming node only
		c.nodes[1].plant("k", recordAt(now, "partial"))
		move(c, topology.WriteBothReadNew, 0)
		// Read new and node 2 agree, yet the moving slot counts only with both nodes.
		c.set(down, 3)
		c.nodes[1].wantValue("k", "partial")
		if c.nodes[0].own("k") == nil {
			t.Fatal("the old node of the moving slot was not mended: an abort would lose what was read")
		}
		c.set(open, 3)
		move(c, topology.WriteBothReadOld, 0)
		move(c, topology.Stable, 1)
		c.set(down, 2)
		c.nodes[0].wantValue("k", "partial")
	})
}

func TestOneReplicaIsEnoughForR1(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("k", "v", "all")
		c.set(down, 2, 3)
		resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum = "one" })
		if err != nil || string(resp.GetValue()) != "v" || resp.GetReceipt().GetStrength() != kvv1.Strength_STRENGTH_EVENTUAL {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

func TestReadGoesRoundAFailingReplica(t *testing.T) {
	for name, w := range map[string]way{"refusing": refusing, "hanging": hanging, "losing replies": mute} {
		t.Run(name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				c.nodes[0].mustPut("k", "v", "all")
				c.set(w, 2)
				for range 10 {
					start := time.Now()
					c.nodes[0].wantValue("k", "v")
					if took := time.Since(start); took > time.Second {
						t.Errorf("took %s", took)
					}
				}
			})
		})
	}
}

// Hedged reads stay within their budget.
func TestHedgingIsBudgeted(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("k", "v", "all")
		for range 100 {
			c.nodes[0].wantValue("k", "v")
		}
		c.set(slowly, 2, 3)
		hedged := 0
		for range 100 {
			resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.Trace = true })
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range c.trace(c.nodes[0], resp.GetReceipt().GetTraceId()).GetEvents() {
				if e.GetKind() == kvv1.TraceEvent_KIND_HEDGE {
					hedged++
				}
			}
		}
		if hedged == 0 || hedged > 20 {
			t.Errorf("%d of 100 late reads were hedged, want a few", hedged)
		}
	})
}

func TestMinVersion(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		now := time.Now().UnixMilli()
		for _, n := range c.nodes {
			n.plant("k", recordAt(now-1, "old"))
		}
		c.nodes[2].plant("k", recordAt(now, "mine"))
		least := &kvv1.Version{Timestamp: uint64(hlc.At(now)), Incarnation: 1}
		resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum, r.MinVersion = "one", least })
		if err != nil || string(resp.GetValue()) != "mine" {
			t.Errorf("%v, %v", resp, err)
		}
		c.set(down, 3)
		c.nodes[1].plant("k2", recordAt(now-1, "old"))
		_, err = c.nodes[0].get("k2", func(r *kvv1.GetRequest) { r.ReadQuorum, r.MinVersion = "one", least })
		wantError(t, err, codes.Unavailable, rpc.ReasonReadFailed)
	})
}

func TestRepairChanceComparesTheRest(t *testing.T) {
	set := func(s *topology.NamespaceSettings) { s.RepairChance, s.R = ptr(1.0), ptr("one") }
	run(t, 3, set, func(t *testing.T, c *cluster) {
		now := time.Now().UnixMilli()
		c.nodes[0].plant("k", recordAt(now, "new"))
		c.nodes[0].wantValue("k", "new")
		c.nodes[2].plant("k2", recordAt(now, "new")) // the one that answers is the stale one
		c.nodes[0].wantValue("k2", "")
		time.Sleep(time.Second)
		for _, key := range []string{"k", "k2"} {
			if n := c.holders(key, "new"); n != 3 {
				t.Errorf("%s: %d replicas have it, want all", key, n)
			}
		}
	})
}

func TestOwnCopy(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		c.setRing(func(int) []topology.Slot {
			return []topology.Slot{{Node: 1, Phase: topology.Stable}, {Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}}
		})
		c.publish()
		c.nodes[1].plant("k", recordAt(time.Now().UnixMilli(), "mine"))
		own := func(node string) (*kvv1.GetResponse, error) {
			return c.nodes[3].get("k", func(r *kvv1.GetRequest) { r.Replica = node })
		}
		if resp, err := own("n2"); err != nil || string(resp.GetValue()) != "mine" {
			t.Errorf("%v, %v", resp, err)
		}
		if resp, err := own("#1"); err != nil || resp.GetFound() {
			t.Errorf("%v, %v", resp, err)
		}
		_, err := own("n4")
		wantError(t, err, codes.FailedPrecondition, rpc.ReasonNotOwner)
		if c.nodes[0].own("k") != nil {
			t.Error("reading a copy mended another")
		}
	})
}

func (c *cluster) trace(n *node, id uint64) *kvv1.TraceResponse {
	c.t.Helper()
	resp, err := n.coord.Trace(context.Background(), &kvv1.TraceRequest{TraceId: id, WaitMs: 5000})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp
}

// timeline writes a trace as words: kind:node.
func timeline(r *kvv1.TraceResponse) []string {
	var out []string
	for _, e := range r.GetEvents() {
		word := strings.ToLower(strings.TrimPrefix(e.GetKind().String(), "KIND_"))
		if e.GetNode() != "" {
			word += ":" + e.GetNode()
		}
		out = append(out, word)
	}
	return out
}

// The timeline of a put at 40% of five with one replica that hangs: two
// acknowledgements, the answer, two late ones, and a hint for the fifth.
func TestTraceOfAPut(t *testing.T) {
	run(t, 5, nil, func(t *testing.T, c *cluster) {
		c.set(slowly, 3, 4)
		c.set(hanging, 5)
		resp, err := c.nodes[0].coord.Put(context.Background(), &kvv1.PutRequest{Key: []byte("k"), WriteQuorum: "40%", Trace: true})
		if err != nil {
			t.Fatal(err)
		}
		tr := c.trace(c.nodes[0], resp.GetReceipt().GetTraceId())
		if !tr.GetComplete() {
			t.Error("the trace is not complete")
		}
		got := timeline(tr)
		index := func(word string) int {
			i := slices.Index(got, word)
			if i < 0 {
				t.Fatalf("no %s in %v", word, got)
			}
			return i
		}
		order := []int{index("received"), index("sent:n5"), index("quorum_reached"), index("answered"), min(index("late:n3"), index("late:n4")), index("failed:n5"), index("hint:n5")}
		if !slices.IsSorted(order) {
			t.Errorf("order of events: %v", got)
		}
		if index("acknowledged:n1") > index("answered") || index("acknowledged:n2") > index("answered") {
			t.Errorf("the two acknowledgements come after the answer: %v", got)
		}
		for i, e := range tr.GetEvents()[1:] {
			if e.GetAtUs() < tr.GetEvents()[i].GetAtUs() {
				t.Errorf("times go back: %v", tr.GetEvents())
			}
		}
	})
}

func TestTraceOfARepair(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.nodes[0].plant("k", recordAt(time.Now().UnixMilli(), "new"))
		resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum, r.Trace = "all", true })
		if err != nil {
			t.Fatal(err)
		}
		got := timeline(c.trace(c.nodes[0], resp.GetReceipt().GetTraceId()))
		for _, want := range []string{"replied:n1", "replied:n2", "stale:n2", "stale:n3", "repair:n2", "repair:n3", "acknowledged:n2", "answered"} {
			if !slices.ContainsFunc(got, func(w string) bool { return w == want || w == strings.Replace(want, "acknowledged", "late", 1) }) {
				t.Errorf("no %s in %v", want, got)
			}
		}
		_, err = c.nodes[0].coord.Trace(context.Background(), &kvv1.TraceRequest{TraceId: 5})
		wantError(t, err, codes.NotFound, "TRACE_NOT_FOUND")
	})
}

// A node that returned a version writes newer ones from then on, though it holds no
// replica and its clock is behind.
func TestReadsMoveTheClock(t *testing.T) {
	read := map[string]func(*node){
		"get":  func(n *node) { n.wantValue("k", "first") },
		"scan": func(n *node) { n.coord.Scan(context.Background(), &kvv1.ScanRequest{}) },
	}
	for name, see := range read {
		t.Run(name, func(t *testing.T) {
			run(t, 2, func(s *topology.NamespaceSettings) { s.N = ptr(1) }, func(t *testing.T, c *cluster) {
				c.place(1)
				c.publish()
				c.nodes[0].offset.Store(200) // within all limits
				put := func(n *node, v string) {
					if _, err := n.coord.Put(context.Background(), &kvv1.PutRequest{Key: []byte("k"), Value: []byte(v)}); err != nil {
						t.Fatal(err)
					}
				}
				put(c.nodes[0], "first")
				see(c.nodes[1])
				put(c.nodes[1], "second")
				c.nodes[1].wantValue("k", "second")
			})
		})
	}
}

// All replicas go away while a background check mends.
func TestRepairWithNobodyLeft(t *testing.T) {
	set := func(s *topology.NamespaceSettings) { s.N, s.RepairChance, s.R = ptr(3), ptr(1.0), ptr("one") }
	run(t, 4, set, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3)
		c.publish()
		c.nodes[1].plant("k", recordAt(time.Now().UnixMilli(), "new"))
		c.set(slowly, 2, 3)
		time.AfterFunc(50*time.Millisecond, func() { c.set(down, 1, 2, 3) })
		c.nodes[3].wantValue("k", "")
		time.Sleep(time.Second)
	})
}

// A read that must see what the client has seen asks everybody, whoever fails.
func TestMinVersionWithOneFailing(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3)
		c.publish()
		now := time.Now().UnixMilli()
		c.nodes[0].plant("k", recordAt(now-1, "old"))
		c.nodes[2].plant("k", recordAt(now, "mine"))
		c.set(refusing, 2)
		c.set(slowly, 3)
		least := &kvv1.Version{Timestamp: uint64(hlc.At(now)), Incarnation: 1}
		resp, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum, r.MinVersion = "one", least })
		if err != nil || string(resp.GetValue()) != "mine" {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

// Blocking repair makes up the number with live slots.
func TestRepairPrefersLiveSlots(t *testing.T) {
	run(t, 5, func(s *topology.NamespaceSettings) { s.W, s.R = ptr("2"), ptr("2") }, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3, 4, 5)
		c.publish()
		c.nodes[0].plant("k", recordAt(time.Now().UnixMilli(), "v"))
		c.set(down, 3)
		c.nodes[0].wantValue("k", "v")
	})
}

// A stale replica that cannot be mended fails no read for which the others vouch.
func TestRepairGoesRoundAFullDisk(t *testing.T) {
	for _, tc := range []struct {
		name  string
		third string // what the replica beyond R has
	}{{"the third has it", "new"}, {"the third is stale too", ""}} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, 3, nil, func(t *testing.T, c *cluster) {
				c.place(2, 1, 3)
				c.publish()
				now := time.Now().UnixMilli()
				c.nodes[0].plant("k", recordAt(now, "new"))
				if tc.third != "" {
					c.nodes[2].plant("k", recordAt(now, tc.third))
				}
				c.nodes[1].fill(true)
				c.set(slowly, 3) // so that node 2, which serves, asks node 1
				c.nodes[1].wantValue("k", "new")
				if c.nodes[2].own("k") == nil {
					t.Error("the answer left before N−R+1 slots held it")
				}
			})
		})
	}
}

// Invariant 3: what a read of all returned is seen by a read of a quorum after it.
func TestReadAllThenQuorum(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3)
		c.publish()
		c.nodes[0].plant("k", recordAt(time.Now().UnixMilli(), "v"))
		for _, n := range c.nodes[1:] {
			n.fill(true) // repairs fail
		}
		_, err := c.nodes[0].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum = "all" })
		wantError(t, err, codes.Unavailable, rpc.ReasonRepairFailed)
	})
}

// While W and R change, writes need both quorums, unless they ask for one themselves, and
// what reads return is left for those of the smaller R to come.
func TestQuorumsWhileTheyChange(t *testing.T) {
	run(t, 5, nil, func(t *testing.T, c *cluster) {
		op := topology.Operation{Kind: topology.KindQuorums, State: topology.Running}
		op.TargetW, _ = quorum.Parse("4")
		op.TargetR, _ = quorum.Parse("2")
		step := func() {
			ns := op.Step(c.state.Topology.Namespace("default"))
			c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}})
			c.publish()
		}
		step()
		now := time.Now().UnixMilli()
		for i := range 20 {
			key := fmt.Sprint("k", i)
			for _, n := range c.nodes[i%3:][:3] { // as many as R
				n.plant(key, recordAt(now-1, "new"))
			}
			resp, err := c.nodes[i%5].get(key, nil)
			if err != nil {
				t.Fatal(err)
			}
			if n := c.holders(key, "new"); string(resp.GetValue()) == "new" && n < 4 {
				t.Errorf("%s: %d replicas have what was read, reads of 2 may miss it", key, n)
			}
		}
		if r := c.nodes[0].mustPut("k", "v", ""); r.GetNeeded() != 4 || r.GetStrength() != kvv1.Strength_STRENGTH_STRONG {
			t.Errorf("receipt %v", r)
		}
		if r := c.nodes[0].mustPut("k", "v", "3"); r.GetNeeded() != 3 || r.GetStrength() != kvv1.Strength_STRENGTH_EVENTUAL {
			t.Errorf("of a write that asks for less than is to come: %v", r)
		}
		step()
		if r := c.nodes[0].mustPut("k", "v", ""); r.GetNeeded() != 4 {
			t.Errorf("then %v", r)
		}
		resp, err := c.nodes[0].get("k", nil)
		if err != nil || resp.GetReceipt().GetNeeded() != 2 || resp.GetReceipt().GetStrength() != kvv1.Strength_STRENGTH_STRONG_WHILE_NOT_REPLACED {
			t.Errorf("%v, %v", resp, err)
		}
	})
}
