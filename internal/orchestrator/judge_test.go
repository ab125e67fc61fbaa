package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

const (
	isUnknown   = topologyv1.NodeHealth_STATE_UNSPECIFIED
	isHealthy   = topologyv1.NodeHealth_STATE_HEALTHY
	isUnhealthy = topologyv1.NodeHealth_STATE_UNHEALTHY
)

// What each kind of evidence comes to.
func TestFind(t *testing.T) {
	reached := func(peers int, cannot ...string) hearsay { return hearsay{peers: peers, cannot: cannot} }
	for _, tc := range []struct {
		name string
		e    evidence
		want finding
	}{
		{"all is well", evidence{hearsay: reached(2)}, finding{passed: true}},
		{"nobody else was heard", evidence{}, finding{passed: true}},
		{"gossip alone does not condemn", evidence{gossip: gossipDead, hearsay: reached(2)}, finding{passed: true}},
		{"it refuses writes", evidence{said: "refuses writes, free space"}, finding{passed: true, words: "refuses writes, free space"}},
		{"a cut between two nodes", evidence{hearsay: hearsay{peers: 2, cannot: []string{"a"}, unreached: []string{"a"}}}, finding{passed: true}},
		{"the two of a cluster of two", evidence{hearsay: hearsay{peers: 1, cannot: []string{"a"}, unreached: []string{"a"}}}, finding{passed: true}},
		{"half of the nodes", evidence{hearsay: reached(4, "a", "b")}, finding{passed: true}},
		{"cut off from most", evidence{hearsay: reached(3, "a", "b")}, finding{words: "2 of 3 nodes cannot reach it: a, b"}},
		{"reaches few", evidence{hearsay: hearsay{peers: 3, unreached: []string{"a", "b"}}}, finding{words: "it cannot reach 2 of 3 nodes: a, b"}},
		{"stopping", evidence{answer: notServing, said: "it was told to stop", hearsay: reached(2)}, finding{words: "it does not serve: it was told to stop"}},
		{"disk", evidence{answer: stalled, said: "its disk has not finished a sync for 12s", hearsay: reached(2)}, finding{decisive: true, words: "it does not serve: its disk has not finished a sync for 12s"}},

		{"killed, not noticed yet", evidence{answer: refused, gossip: gossipAlive, hearsay: reached(2, "a", "b")},
			finding{words: "nobody listens at its address; 2 of 2 nodes cannot reach it either"}},
		{"killed", evidence{answer: refused, gossip: gossipDead, hearsay: reached(2, "a", "b")},
			finding{decisive: true, words: "nobody listens at its address; 2 of 2 nodes cannot reach it either; gossip has it dead"}},
		{"killed, others are late", evidence{answer: refused, gossip: gossipDead, hearsay: reached(2)},
			finding{decisive: true, words: "nobody listens at its address; gossip has it dead"}},
		{"never heard of", evidence{answer: refused}, finding{words: "nobody listens at its address"}},
		{"stopped by a signal", evidence{answer: silent, gossip: gossipDead, hearsay: reached(2, "a", "b")},
			finding{decisive: true, words: "it does not answer in time; 2 of 2 nodes cannot reach it either; gossip has it dead"}},
		{"TLS", evidence{answer: silent, said: "tls: bad certificate"}, finding{words: "it does not answer in time (tls: bad certificate)"}},
		{"overloaded", evidence{by: "orch1", answer: silent, gossip: gossipAlive, hearsay: reached(3, "a")},
			finding{passed: true, words: "slow: orch1 gets no answer in time, 2 of 3 nodes can"}},
		{"so overloaded that others cannot either", evidence{by: "orch1", answer: silent, gossip: gossipAlive, hearsay: reached(3, "a", "b")},
			finding{words: "it does not answer in time; 2 of 3 nodes cannot reach it either"}},
		{"a cut from the orchestrator", evidence{by: "orch1", answer: unconnected, gossip: gossipAlive, hearsay: reached(2)},
			finding{passed: true, words: "orch1 cannot reach it, 2 of 2 nodes can"}},
		{"a fence before it", evidence{by: "orch1", answer: refused, gossip: gossipAlive, hearsay: reached(2)},
			finding{passed: true, words: "orch1 cannot reach it, 2 of 2 nodes can"}},
		{"an orchestrator that reaches nobody", evidence{answer: unconnected, gossip: gossipDead},
			finding{decisive: true, words: "no connection to it comes about; gossip has it dead"}},
		{"another data directory", evidence{answer: strange, said: "#9 answers at its address", hearsay: reached(2)},
			finding{words: "#9 answers at its address"}},
	} {
		if got := tc.e.find(); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

// Only well nodes count that have spoken since.
func TestHear(t *testing.T) {
	now := time.Now()
	node := func(i uint64, well bool, age time.Duration, unreachable ...uint64) account {
		return account{i, fmt.Sprint("n", i), well, now.Add(-age), unreachable}
	}
	accounts := []account{
		node(1, false, 0, 2, 3, 4, 5, 6), node(2, true, 0, 1, 5), node(3, true, time.Second), node(4, true, 3*time.Second, 1), node(5, false, 0, 1), node(6, true, 0, 1),
	}
	got := hear(1, accounts, now.Add(-2*time.Second))
	if got.peers != 3 || strings.Join(got.cannot, " ") != "n2 n6" || strings.Join(got.unreached, " ") != "n2 n3 n6" {
		t.Errorf("%+v", got)
	}
	accounts[0].at = now.Add(-time.Minute)
	if got := hear(1, accounts, now.Add(-2*time.Second)); got.unreached != nil {
		t.Errorf("what it said a minute ago counts: %+v", got)
	}
}

func TestJudge(t *testing.T) {
	checks := topology.HealthChecks{HealthyThreshold: 2, UnhealthyThreshold: 3}
	good, odd, bad, dead := finding{passed: true}, finding{passed: true, words: "slow"}, finding{words: "timeout"}, finding{words: "refused", decisive: true}
	for _, tc := range []struct {
		name  string
		looks []finding
		want  topologyv1.NodeHealth_State
		why   string
	}{
		{"nothing known", nil, isUnknown, ""},
		{"first success", []finding{good}, isHealthy, ""},
		{"one failure", []finding{good, bad}, isHealthy, ""},
		{"failures below the threshold", []finding{good, bad, bad, good, bad, bad}, isHealthy, ""},
		{"failures at the threshold", []finding{good, bad, bad, bad}, isUnhealthy, "3 checks in a row failed: timeout"},
		{"one that is decisive", []finding{good, dead}, isUnhealthy, "refused"},
		{"one success is not enough to come back", []finding{good, dead, good}, isUnhealthy, "refused"},
		{"two are", []finding{good, dead, good, good}, isHealthy, ""},
		{"but only in a row", []finding{good, dead, good, bad, good}, isUnhealthy, "refused"},
		{"never answered", []finding{bad, bad}, isUnknown, ""},
		{"never answered for long", []finding{bad, bad, bad}, isUnhealthy, "3 checks in a row failed: timeout"},
		{"slow", []finding{good, odd}, isHealthy, "slow"},
		{"slow now and then", []finding{good, odd, good, odd, good}, isHealthy, "slow"},
		{"no longer slow", []finding{good, odd, good, good}, isHealthy, ""},
		{"slow, and then gone", []finding{good, odd, bad, bad, bad}, isUnhealthy, "3 checks in a row failed: timeout"},
		{"slow failures do not add up", []finding{good, bad, bad, odd, bad, bad}, isHealthy, "slow"},
		{"back, but slow", []finding{good, dead, odd, odd}, isHealthy, "slow"},
	} {
		var v verdict
		for _, f := range tc.looks {
			v = v.judge(f, checks, time.Now())
		}
		if v.state != tc.want || v.reason() != tc.why {
			t.Errorf("%s: %v %q, want %v %q", tc.name, v.state, v.reason(), tc.want, tc.why)
		}
	}
}

// A node that comes and goes is said to, and no longer once it has not for a while.
func TestFlapping(t *testing.T) {
	checks := topology.HealthChecks{HealthyThreshold: 1, UnhealthyThreshold: 1}
	now := time.Now()
	v := verdict{}.judge(finding{passed: true}, checks, now)
	for i, want := range []string{"late", "", "late", "flapping: 4 changes in 15m0s", "flapping: 5 changes in 15m0s; late"} {
		now = now.Add(time.Minute)
		f := finding{passed: true}
		if i%2 == 0 {
			f = finding{words: "late"}
		}
		if v = v.judge(f, checks, now); v.reason() != want {
			t.Errorf("after %d changes: %q, want %q", i+1, v.reason(), want)
		}
	}
	v = v.judge(finding{passed: true}, checks, now.Add(flappingWindow))
	if got := v.reason(); got != "" {
		t.Errorf("a quarter of an hour later: %q", got)
	}
}

var anyFinding = rapid.Custom(func(t *rapid.T) finding {
	return rapid.SampledFrom([]finding{{passed: true}, {passed: true, words: "odd"}, {words: "late"}, {words: "late"}, {words: "dead", decisive: true}}).Draw(t, "finding")
})

// The state changes only as the thresholds say, and what is unhealthy has a reason.
func TestVerdictKeepsToTheThresholds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checks := topology.HealthChecks{HealthyThreshold: rapid.IntRange(1, 4).Draw(t, "healthy"), UnhealthyThreshold: rapid.IntRange(1, 4).Draw(t, "unhealthy")}
		looks := rapid.SliceOfN(anyFinding, 1, 40).Draw(t, "looks")
		var v verdict
		now := time.Now()
		for i, f := range looks {
			before := v.state
			now = now.Add(30 * time.Second)
			v = v.judge(f, checks, now)
			inARow := 0
			for j := i; j >= 0 && looks[j].passed == f.passed; j-- {
				inARow++
			}
			want := before
			switch {
			case f.passed && (before == isUnknown || inARow >= checks.HealthyThreshold):
				want = isHealthy
			case !f.passed && (f.decisive || inARow >= checks.UnhealthyThreshold):
				want = isUnhealthy
			}
			if v.state != want {
				t.Fatalf("after %d looks: %v, want %v", i+1, v.state, want)
			}
			if v.state == isUnhealthy && v.reason() == "" {
				t.Fatalf("after %d looks it is unhealthy for no reason", i+1)
			}
		}
	})
}

// Single outcomes that alternate, below the thresholds, change nothing.
func TestAlternatingOutcomesChangeNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checks := topology.HealthChecks{HealthyThreshold: rapid.IntRange(2, 5).Draw(t, "healthy"), UnhealthyThreshold: rapid.IntRange(2, 5).Draw(t, "unhealthy")}
		start := rapid.SampledFrom([]topologyv1.NodeHealth_State{isHealthy, isUnhealthy}).Draw(t, "start")
		v := verdict{state: start, why: "dead"}
		for i := range rapid.IntRange(1, 50).Draw(t, "looks") {
			if v = v.judge(finding{passed: i%2 == 0, words: "late"}, checks, time.Now()); v.state != start {
				t.Fatalf("after %d looks it is %v", i+1, v.state)
			}
		}
	})
}

// Whoever else cannot reach a node, the finding does not get better; and a node that most
// reach is not taken for dead because an orchestrator does not, as long as gossip agrees.
func TestFindIsMonotonic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := evidence{
			answer: answer(rapid.IntRange(int(answered), int(strange)).Draw(t, "answer")), said: "x",
			gossip:  gossipWord(rapid.IntRange(0, 2).Draw(t, "gossip")),
			hearsay: hearsay{peers: rapid.IntRange(0, 9).Draw(t, "peers")},
		}
		passed := true
		for range e.peers + 1 {
			f := e.find()
			if f.passed && !passed {
				t.Fatalf("%+v passes, with one less it did not", e)
			}
			if most := 2*len(e.cannot) < e.peers; most && !f.passed && (e.answer == silent || e.answer == unconnected || e.answer == refused && e.gossip != gossipDead) {
				t.Fatalf("%+v does not pass", e)
			}
			if !f.passed && f.words == "" {
				t.Fatalf("%+v fails for no reason", e)
			}
			passed = f.passed
			e.cannot = append(slices.Clone(e.cannot), "n")
		}
	})
}

// However the links between nodes are cut, those that the orchestrator reaches are not
// all taken for unhealthy by what they say of each other, in whatever order it looks.
func TestSomeNodesStay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 7).Draw(t, "nodes")
		accounts := make([]account, n)
		for i := range accounts {
			accounts[i] = account{incarnation: uint64(i), name: fmt.Sprint("n", i), well: true, at: time.Now()}
		}
		for i := range n {
			for j := range i {
				if rapid.Bool().Draw(t, "cut") {
					accounts[i].unreachable = append(accounts[i].unreachable, uint64(j))
					accounts[j].unreachable = append(accounts[j].unreachable, uint64(i))
				}
			}
		}
		for range 3 {
			for _, i := range rapid.Permutation(slices.Collect(func(yield func(int) bool) {
				for i := range n {
					if !yield(i) {
						return
					}
				}
			})).Draw(t, "order") {
				accounts[i].well = evidence{hearsay: hear(uint64(i), accounts, time.Time{})}.find().passed
			}
			if !slices.ContainsFunc(accounts, func(a account) bool { return a.well }) {
				t.Fatalf("none is left: %+v", accounts)
			}
		}
	})
}

// What an error of the call leaves open, the dialer tells.
func TestFailedProbes(t *testing.T) {
	late, broken := rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "late"), rpc.Errorf(codes.Unavailable, rpc.ReasonLinkBroken, `error: desc = "transport: authentication handshake failed: tls: bad certificate"`)
	for _, tc := range []struct {
		err               *rpc.Error
		connected, nobody bool
		want              reply
	}{
		{late, false, false, reply{answer: unconnected}},
		{late, true, false, reply{answer: silent}},
		{rpc.AsError(context.Canceled), false, true, reply{answer: refused}},
		{rpc.AsError(context.Canceled), true, true, reply{answer: refused}}, // it ended between two attempts
		{broken, true, false, reply{silent, "tls: bad certificate"}},
		{rpc.Errorf(codes.Unimplemented, "", "unknown service"), true, false, reply{strange, "unknown service"}},
	} {
		if got := failed(tc.err, tc.connected, tc.nobody); got != tc.want {
			t.Errorf("%v, connected %v, nobody %v: %+v, want %+v", tc.err, tc.connected, tc.nobody, got, tc.want)
		}
	}
}
