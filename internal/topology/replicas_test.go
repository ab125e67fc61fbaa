package topology_test

import (
	"fmt"
	"testing"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// walk returns what a namespace is on its way to another N.
func walk(ns topology.Namespace, target int) []topology.Namespace {
	out := []topology.Namespace{ns}
	for ns.N != target || ns.AlsoN != 0 {
		ns = ns.StepN(target)
		out = append(out, ns)
	}
	return out
}

// Invariant 8 while N changes: whoever writes by one step's quorums is met by whoever
// reads by the same one's, the next one's or the one's before.
func TestQuorumsMeetWhileNChanges(t *testing.T) {
	for _, spec := range []quorum.Spec{quorum.Majority, quorum.All, must(quorum.Parse("60%"))} {
		for from := 1; from <= 6; from++ {
			for to := 1; to <= 6; to++ {
				steps := walk(topology.Namespace{N: from, W: spec, R: quorum.Majority, LeastWriteAcks: spec.Need(from)}, to)
				if want := 1 + 3*abs(to-from); len(steps) != want {
					t.Fatalf("from %d to %d in %d steps, want %d: %+v", from, to, len(steps), want, steps)
				}
				for i := range steps {
					for j := max(0, i-1); j <= min(i+1, len(steps)-1); j++ {
						if w, missed := missing(&steps[i], &steps[j]); missed {
							t.Errorf("W=%s, from %d to %d: a write to %b of N=%d, also %d, is missed by a read of N=%d", spec, from, to, w, steps[i].N, steps[i].AlsoN, steps[j].N)
						}
					}
				}
				if last := steps[len(steps)-1]; last.LeastWriteAcks != spec.Need(to) {
					t.Errorf("W=%s, from %d to %d: at least %d slots have a write, want %d", spec, from, to, last.LeastWriteAcks, spec.Need(to))
				}
			}
		}
	}
}

// missing returns a set of slots that is enough for a write of one step, and that a
// read of the other may miss.
func missing(writes, reads *topology.Namespace) (int, bool) {
	slots := make([]quorum.Slot, writes.Wide())
	for set := range 1 << len(slots) {
		if !writes.Writes(quorum.Spec{}).Met(slots, func(slot int) bool { return set>>slot&1 == 1 }) {
			continue
		}
		lacking := 0
		for s := range reads.N {
			if set>>s&1 == 0 {
				lacking++
			}
		}
		if lacking >= reads.R.Need(reads.N) {
			return set, true
		}
	}
	return 0, false
}

func abs(x int) int { return max(x, -x) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// There, half way, back, and all the way: what the state takes for a step.
func TestChangingN(t *testing.T) {
	c := formed(t)
	c.must(register("n4", 0, 1, "d"))
	three := *c.state.Topology.Namespace("default")
	for _, bad := range []topology.Namespace{{N: 2}, {N: 4}, {N: 3, AlsoN: 5, Change: topology.Widening}, {N: 3, AlsoN: 2, Change: topology.Widening}, {N: 2, AlsoN: 3, Change: topology.Narrowing}} {
		ns := three
		ns.N, ns.AlsoN, ns.Change = bad.N, bad.AlsoN, bad.Change
		if _, err := c.apply(update(ns)); err == nil {
			t.Errorf("from N=3 at once to N=%d, also %d", ns.N, ns.AlsoN)
		}
	}
	if _, err := c.apply(update(three.StepN(4))); err == nil {
		t.Error("N was widened without slots for it")
	}
	next := three
	for _, target := range []int{2, 2, 3, 3, 2, 2, 2} {
		next = next.StepN(target)
		c.must(update(next))
		next = *c.state.Topology.Namespace("default")
		if (next.Since != 0) != (next.AlsoN != 0) || next.ChangedEpoch != c.state.Topology.Epoch {
			t.Errorf("namespace %+v in epoch %d", next, c.state.Topology.Epoch)
		}
	}
	if next.N != 2 || next.AlsoN != 0 {
		t.Errorf("in the end %+v", next)
	}
	_, wanted, _, err := c.state.Topology.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(3)}, false)
	if err != nil || wanted.N != 3 {
		t.Errorf("N to become %d, error %v", wanted.N, err)
	}
	_, _, _, err = c.state.Topology.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(4)}, false)
	wantRefusal(t, err, topology.Precondition, "N_ABOVE_NODES")
	weak := set2(c, "2")
	_, _, _, err = weak.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(3)}, false)
	if err != nil {
		t.Errorf("W=R=2 of 3: %v", err)
	}
	_, _, _, err = weak.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(1)}, false)
	wantRefusal(t, err, topology.Invalid, "QUORUM_ABOVE_N")
	weak = set2(c, "one")
	_, _, _, err = weak.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(1)}, false)
	if err != nil {
		t.Errorf("eventual before: %v", err)
	}
}

// set2 returns the topology with W and R of the namespace default set to a quorum.
func set2(c *cluster, q string) *topology.Topology { return withQuorums(c, q, q) }

func withQuorums(c *cluster, w, r string) *topology.Topology {
	pb := c.state.Topology.Proto()
	pb.Namespaces[0].WriteQuorum, pb.Namespaces[0].ReadQuorum = w, r
	return must(topology.FromProto(pb))
}

func TestWeakeningReadsNeedsAWord(t *testing.T) {
	c := formed(t)
	// Eventual at N=3: nothing to lose.
	_, _, _, err := withQuorums(c, "2", "1").ChangedNamespace("default", topology.NamespaceSettings{N: ptr(2)}, false)
	if err != nil {
		t.Error(err)
	}
	ns := topology.Namespace{ID: c.state.Topology.Namespace("default").ID, Name: "default", N: 1, W: countOf(1), R: countOf(1), ReadRepair: topology.RepairBlocking, LeastWriteAcks: 1}
	top := *c.state.Topology
	pb := top.Proto()
	pb.Namespaces = []*topologyv1.Namespace{ns.Proto()}
	one, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	_, _, _, err = one.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(3)}, false)
	if r := wantRefusal(t, err, topology.Precondition, "WOULD_WEAKEN_READS"); r.Details["n"] != fmt.Sprint(3) {
		t.Errorf("details %v", r.Details)
	}
	if _, wanted, _, err := one.ChangedNamespace("default", topology.NamespaceSettings{N: ptr(3)}, true); err != nil || wanted.N != 3 {
		t.Errorf("allowed: %+v, %v", wanted, err)
	}
}
