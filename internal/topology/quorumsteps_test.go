package topology_test

import (
	"testing"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func countOf(n int) quorum.Spec { return must(quorum.Parse(string(rune('0' + n)))) }

// promised reports whether reads of a namespace meet its writes.
func promised(ns *topology.Namespace) bool { return ns.Strength() != quorum.Eventual }

// changesOfQuorums calls f with what a namespace is from one step to the next, for every
// pair of quorums of up to five slots, and every least write before: to the end, and
// aborted after each step.
func changesOfQuorums(f func(steps []topology.Namespace)) {
	for n := 1; n <= 5; n++ {
		for code := range n * n * n * n * n {
			draw := func() int {
				v := code%n + 1
				code /= n
				return v
			}
			ns := topology.Namespace{N: n, W: countOf(draw()), R: countOf(draw()), LeastWriteAcks: draw()}
			w, r := countOf(draw()), countOf(draw())
			if ns.LeastWriteAcks > ns.W.Need(n) || w == ns.W && r == ns.R {
				continue
			}
			for abortAt := 1; abortAt <= 3; abortAt++ {
				op := topology.Operation{Kind: topology.KindQuorums, State: topology.Running, TargetW: w, TargetR: r, FromW: ns.W, FromR: ns.R}
				steps := []topology.Namespace{ns}
				for last := ns; len(steps) == 1 || !op.Reached(&last); steps = append(steps, last) {
					if len(steps) > abortAt {
						op.State = topology.Aborting
					}
					last = op.Step(&last)
				}
				f(steps)
			}
		}
	}
}

// Invariant 8 while W and R change: whoever writes by one step's quorums is met by
// whoever reads by the same one's, the next one's or the one's before, wherever reads of
// both meet writes at all.
func TestQuorumsOfEpochsInUseMeet(t *testing.T) {
	pairs := 0
	changesOfQuorums(func(steps []topology.Namespace) {
		for i := range steps {
			for j := max(0, i-1); j <= min(i+1, len(steps)-1); j++ {
				a, b := &steps[i], &steps[j]
				if !promised(a) || !promised(b) {
					continue
				}
				pairs++
				if _, missed := missing(a, b); missed {
					t.Errorf("of N=%d W=%s R=%s to W=%s R=%s: a write of step %d is missed by a read of step %d: %+v", a.N,
						steps[0].W, steps[0].R, steps[1].AlsoW, steps[1].AlsoR, i, j, steps)
				}
			}
		}
		if n := len(steps); n > 5 || steps[n-1].AlsoN != 0 || steps[n-1].AlsoW != (quorum.Spec{}) {
			t.Errorf("%d steps: %+v", n, steps)
		}
	})
	t.Logf("%d pairs of epochs", pairs)
}

// Without the step between them, some of those epochs' quorums would not meet.
func TestQuorumsAtOnceMiss(t *testing.T) {
	missed := 0
	changesOfQuorums(func(steps []topology.Namespace) {
		a, b := &steps[0], &steps[len(steps)-1]
		if _, bad := missing(a, b); bad && promised(a) && promised(b) {
			missed++
		}
	})
	if missed == 0 {
		t.Error("from W=3, R=1 at once to W=1, R=3 a write should be missed")
	}
}

// What was written and what was read before the quorums changed is met by reads after:
// on all slots where these were leveled, else on as many as it was. LeastWriteAcks says
// no more than that, and in the end enough.
func TestOldRecordsMeetNewQuorums(t *testing.T) {
	changesOfQuorums(func(steps []topology.Namespace) {
		first, n := steps[0], steps[0].N
		written := first.LeastWriteAcks // on how many slots lies what was acknowledged
		read := n - first.R.Need(n) + 1 // and what a read has returned
		for i := 1; i < len(steps); i++ {
			ns, last := steps[i], steps[i-1]
			if i == 2 && ns.Change == topology.Leveling {
				written, read = n, n // the filling was waited for
			}
			if i < len(steps)-1 && ns.LeastWrites() > steps[i+1].Writes(quorum.Spec{})[0].Need {
				t.Fatalf("step %d counts on %d slots, writes of the next one reach fewer: %+v", i, ns.LeastWrites(), steps)
			}
			least := ns.R.Need(n)
			if ns.AlsoN != 0 {
				least = min(least, ns.AlsoR.Need(n))
			}
			written = min(written, last.Writes(quorum.Spec{})[0].Need, ns.Writes(quorum.Spec{})[0].Need)
			read = min(read, n-least+1)
			if ns.LeastWriteAcks > written {
				t.Fatalf("step %d says that %d slots have a write, %d do: %+v", i, ns.LeastWriteAcks, written, steps)
			}
		}
		ns := steps[len(steps)-1]
		if ns.W == first.W && ns.R == first.R || !promised(&ns) {
			return
		}
		if ns.LeastWriteAcks+ns.R.Need(n) <= n {
			t.Errorf("reads may miss what was written: %+v", steps)
		}
		if read+ns.R.Need(n) <= n {
			t.Errorf("reads may go back: %+v", steps)
		}
	})
}

// What the state takes for a step of W and R.
func TestChangingQuorums(t *testing.T) {
	c := formed(t)
	before := *c.state.Topology.Namespace("default")
	all := before
	all.W, all.R = quorum.All, quorum.One
	if _, err := c.apply(update(all)); err == nil {
		t.Error("from W=2, R=2 at once to W=3, R=1")
	}
	same := before
	same.W, same.R = countOf(2), countOf(2)
	c.must(update(same)) // asks for as much
	op := c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: &topologyv1.Operation{
		Kind: topology.KindQuorums, NamespaceId: before.ID, TargetWriteQuorum: "all", TargetReadQuorum: "one",
	}}}}).Operation
	if op.FromW != countOf(2) || op.FromR != countOf(2) {
		t.Errorf("operation %+v", op)
	}
	done := &topologyv1.Mutation{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: &topologyv1.SteerOperation{Id: op.ID, State: topologyv1.Operation_STATE_DONE}}}
	for i, want := range []struct{ writes, reads, least int }{{3, 2, 2}, {3, 1, 3}, {3, 1, 3}} {
		if _, err := c.apply(done); err == nil {
			t.Errorf("the operation ended before step %d", i)
		}
		ns := *c.state.Topology.Namespace("default")
		c.must(update(op.Step(&ns)))
		ns = *c.state.Topology.Namespace("default")
		if w := ns.Writes(quorum.Spec{})[0].Need; w != want.writes || ns.R.Need(3) != want.reads || ns.LeastWriteAcks != want.least {
			t.Errorf("step %d: writes need %d, %+v", i, w, ns)
		}
		if own := ns.Writes(quorum.One); own[0].Need != 1 {
			t.Errorf("a write that asks for one slot needs %v", own)
		}
		if back, err := topology.FromProto(c.state.Topology.Proto()); err != nil || *back.Namespace("default") != ns {
			t.Errorf("it survives no encoding: %+v, %v", ns, err)
		}
		if i < 2 {
			other := ns
			other.AlsoW = countOf(1)
			if _, err := c.apply(update(other)); err == nil {
				t.Error("another aim in the middle")
			}
			_, _, err := changed(c.state.Topology, "default", topology.NamespaceSettings{W: ptr("1")})
			wantRefusal(t, err, topology.Precondition, "N_CHANGING")
		}
	}
	c.must(done)
	if got := *c.state.Topology.Namespace("default"); got.W != quorum.All || got.R != quorum.One || got.Since != 0 {
		t.Errorf("in the end %+v", got)
	}
	_, _, _, err := c.state.Topology.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(2), W: ptr("2"), R: ptr("2")}, false)
	wantRefusal(t, err, topology.Precondition, "ONE_AFTER_THE_OTHER")
	_, wanted, _, err := c.state.Topology.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(2)}, false)
	if err != nil || wanted.N != 2 {
		t.Errorf("N alone: %+v, %v", wanted, err)
	}
	ns, wanted, _, err := c.state.Topology.ChangedNamespace("default", topology.NamespaceSettings{W: ptr("one"), R: ptr("one")}, false)
	if err != nil || ns.W != quorum.All || wanted.W != quorum.One {
		t.Errorf("at once %+v, in the end %+v, %v", ns, wanted, err)
	}
	bad := &topologyv1.Operation{Kind: topology.KindQuorums, NamespaceId: before.ID, TargetWriteQuorum: "4", TargetReadQuorum: "1"}
	_, err = c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: bad}}})
	wantRefusal(t, err, topology.Invalid, "QUORUM_ABOVE_N")
}
