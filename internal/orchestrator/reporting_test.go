package orchestrator

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reportingRig is a ring of three nodes (1 to 3) with reporting nodes from 4 on, as its
// leader sees it.
type reportingRig struct {
	t     *testing.T
	s     *topology.State
	cfg   *Config
	clock time.Duration
	watch copyWatch
	dead  []uint64
	// lost are those among the dead that have been so for long.
	lost []uint64
	// asleep take in no epoch; unfilled and unjoined get nowhere.
	asleep             []uint64
	unfilled, unjoined bool
	taken              map[uint64]uint64
}

func newReportingRig(t *testing.T, nodes int, policy topology.ReportingPolicy, copies int) *reportingRig {
	r := &reportingRig{t: t, taken: map[uint64]uint64{}, clock: time.Hour}
	r.s, r.cfg = ringOfVnodes(t, 3, 16)
	r.watch.clock = func() time.Duration { return r.clock }
	for i := range nodes {
		r.register(fmt.Sprint("r", i+4))
	}
	r.set(topology.NamespaceSettings{Reporting: &policy, ReportingCopies: &copies})
	return r
}

// register registers a data directory of a reporting node.
func (r *reportingRig) register(name string) {
	r.t.Helper()
	r.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
		Node: &topologyv1.Node{Name: name, Zone: "z", Role: topologyv1.Role_ROLE_REPORTING, Address: name + ":1", DataId: fmt.Sprint(name, len(r.s.Topology.Nodes))}, Boot: 1,
	}}})
}

func (r *reportingRig) apply(ms ...*topologyv1.Mutation) {
	r.t.Helper()
	s, _, err := r.s.Apply(&topologyv1.Command{Mutations: ms})
	if err != nil {
		r.t.Fatal(err)
	}
	r.s = s
}

func (r *reportingRig) set(set topology.NamespaceSettings) {
	r.t.Helper()
	cmd, _, err := updateNamespace(r.s.Topology, topology.DefaultNamespace, set, false)
	if err != nil {
		r.t.Fatal(err)
	}
	r.apply(cmd.GetMutations()...)
}

func (r *reportingRig) ns() *topology.Namespace {
	return r.s.Topology.Namespace(topology.DefaultNamespace)
}

// view is what the leader sees: all that is alive and not asleep has taken in the epoch, and
// is filled and has joined as far as it is to.
func (r *reportingRig) view() view {
	t := r.s.Topology
	o := everywhere(r.s, r.dead...)
	o.lost = r.lost
	r.watch.look(1, t)
	for inc, e := range o.epochs {
		if !slices.Contains(r.asleep, inc) {
			r.taken[inc] = e
		}
	}
	v := o.view()
	status := v.status
	v.copies = &r.watch
	v.status = func(inc uint64) *adminv1.NodeStatus {
		s := status(inc)
		s.Epoch = r.taken[inc]
		for i := range t.Ring {
			for _, c := range t.Ring[i].Copies {
				if c.Node != inc || c.Since > r.taken[inc] {
					continue
				}
				if c.State == topology.Filling {
					s.Fillings = append(s.Fillings, &adminv1.Filling{Vnode: uint32(i), NamespaceId: c.Namespace, AssignedEpoch: c.Since, Complete: !r.unfilled})
				}
				s.Copies = append(s.Copies, &adminv1.CopyProgress{Vnode: uint32(i), NamespaceId: c.Namespace, SinceEpoch: c.Since, Joined: c.State == topology.Joining && !r.unjoined})
			}
		}
		return s
	}
	return v
}

// run lets the leader decide until it has nothing more to do, and returns what it did.
func (r *reportingRig) run() (what []string) {
	r.t.Helper()
	for range 100 {
		s, did := next(r.t, r.s, r.cfg, r.view())
		r.s = s
		if did == "" {
			return what
		}
		what = append(what, did)
	}
	r.t.Fatalf("no end: %s", strings.Join(what, "\n"))
	return nil
}

// wants fails unless a node has so many copies in a state, and no others.
func (r *reportingRig) wants(node uint64, state topology.CopyState, count int) {
	r.t.Helper()
	have := map[topology.CopyState]int{}
	for i := range r.s.Topology.Ring {
		if c, ok := r.s.Topology.Copy(uint32(i), r.ns().ID, node); ok {
			have[c.State]++
		}
	}
	want := map[topology.CopyState]int{state: count}
	if count == 0 {
		want = map[topology.CopyState]int{}
	}
	if len(have) != len(want) || have[state] != want[state] {
		r.t.Fatalf("copies on #%d: %v, want %v", node, have, want)
	}
}

func TestCopiesComeIntoSyncByThemselves(t *testing.T) {
	r := newReportingRig(t, 2, topology.ReportingBlock, 1)
	r.unfilled = true
	r.run()
	r.wants(4, topology.Filling, 8) // spread over both
	r.wants(5, topology.Filling, 8)
	r.unfilled, r.unjoined = false, true
	r.run()
	r.wants(4, topology.Joining, 8)
	r.unjoined = false
	r.run()
	r.wants(4, topology.InSync, 8)
	r.wants(5, topology.InSync, 8)
	policy := topology.ReportingBestEffort
	r.set(topology.NamespaceSettings{Reporting: &policy})
	r.run()
	r.wants(4, topology.Behind, 8) // no write waits for them any more, and they are kept
	policy = topology.ReportingOff
	r.set(topology.NamespaceSettings{Reporting: &policy})
	r.run()
	r.wants(4, topology.InSync, 0)
}

// A copy is let go of when its node has said so, or its lease is over by the leader's clock:
// not sooner, and never by another leader's.
func TestALeaseIsWaitedFor(t *testing.T) {
	r := newReportingRig(t, 1, topology.ReportingDegrade, 1)
	r.run()
	r.wants(4, topology.InSync, 16)
	r.dead, r.asleep = []uint64{4}, []uint64{4}
	r.run()
	r.wants(4, topology.Evicting, 16)
	r.clock += leaseDuration
	r.run()
	r.wants(4, topology.Evicting, 16)
	r.watch.look(2, r.s.Topology) // another leader comes, and goes
	r.clock += leaseEnds - leaseDuration
	r.run()
	r.wants(4, topology.Evicting, 16)
	r.clock += leaseEnds
	r.run()
	r.wants(4, topology.Behind, 16)
	// Back, it joins again by itself, after a pause.
	r.dead, r.asleep = nil, nil
	r.run()
	r.wants(4, topology.Behind, 16)
	r.clock += rejoinPause
	r.run()
	r.wants(4, topology.InSync, 16)
}

func TestANodeThatHasTakenTheEvictionInHasNoLease(t *testing.T) {
	r := newReportingRig(t, 1, topology.ReportingDegrade, 1)
	r.run()
	cmd, err := evict(r.s.Topology, &adminv1.EvictCopiesRequest{NamespaceId: r.ns().ID, Incarnation: 4, HeldUp: 1})
	if err != nil || !strings.Contains(cmd.GetChange().GetWhat(), "a write at n1 has waited for longer than 500ms") {
		t.Fatalf("%v, %v", cmd, err)
	}
	r.apply(cmd.GetMutations()...)
	r.wants(4, topology.Evicting, 16)
	if _, err := evict(r.s.Topology, &adminv1.EvictCopiesRequest{NamespaceId: r.ns().ID, Incarnation: 4, HeldUp: 1}); err != errNothingToEvict {
		t.Errorf("once more: %v", err)
	}
	r.run()
	r.wants(4, topology.Behind, 16) // without a wait, and the pause has not passed
	// The pause doubles each time.
	for _, pause := range []time.Duration{rejoinPause, 2 * rejoinPause, 4 * rejoinPause} {
		r.clock += pause - time.Second
		r.run()
		r.wants(4, topology.Behind, 16)
		r.clock += time.Second
		r.run()
		r.wants(4, topology.InSync, 16)
		if cmd, err = evict(r.s.Topology, &adminv1.EvictCopiesRequest{NamespaceId: r.ns().ID, Incarnation: 4, HeldUp: 1}); err != nil {
			t.Fatal(err)
		}
		r.apply(cmd.GetMutations()...)
		r.run()
	}
}

func TestBlockNeverEvictsWhatHoldsWritesUp(t *testing.T) {
	r := newReportingRig(t, 1, topology.ReportingBlock, 1)
	r.run()
	r.dead, r.lost, r.asleep = []uint64{4}, []uint64{4}, []uint64{4}
	r.run()
	r.clock += time.Hour
	r.run()
	r.wants(4, topology.InSync, 16)
	var e *rpc.Error
	if _, err := evict(r.s.Topology, &adminv1.EvictCopiesRequest{NamespaceId: r.ns().ID, Incarnation: 4}); !errors.As(err, &e) || e.Reason != "REPORTING_BLOCKS" {
		t.Errorf("%v", err)
	}
	// Another node takes its place, and only then it is let go of: no write is ever
	// acknowledged that no report would have.
	r.register("r5")
	r.unjoined = true
	r.run()
	r.wants(4, topology.InSync, 16)
	r.wants(5, topology.Joining, 16)
	r.unjoined = false
	r.run()
	r.wants(5, topology.InSync, 16)
	r.wants(4, topology.Evicting, 16)
	r.clock += leaseEnds
	r.run()
	r.wants(4, topology.InSync, 0)
}

// A node that dies while it joins is let go of at once, under any policy: it never had a lease.
func TestAJoinIsCancelled(t *testing.T) {
	r := newReportingRig(t, 1, topology.ReportingBlock, 1)
	r.unjoined = true
	r.run()
	r.wants(4, topology.Joining, 16)
	r.dead, r.asleep = []uint64{4}, []uint64{4}
	r.run()
	r.wants(4, topology.Behind, 16)
}

func TestCopiesMoveToNewNodesAndFromThoseThatLeave(t *testing.T) {
	r := newReportingRig(t, 1, topology.ReportingBlock, 1)
	r.run()
	r.register("r5")
	r.run()
	r.wants(4, topology.InSync, 8)
	r.wants(5, topology.InSync, 8)
	r.s = start(t, r.s, "decommission", nil, 4)
	r.run()
	r.wants(5, topology.InSync, 16)
	if r.s.Topology.Node(4) != nil || r.s.Active() != nil {
		t.Errorf("node 4 has not left: %+v", r.s.Operations)
	}
	// The last one leaves, too, if people say so.
	r.s = start(t, r.s, "decommission", nil, 5)
	r.run()
	if r.s.Topology.Node(5) != nil {
		t.Errorf("node 5 has not left: %+v", r.s.Operations)
	}
}

func TestADrainedReportingNodeHasNoCopies(t *testing.T) {
	hold := func(r *reportingRig, node uint64, held bool) {
		r.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_HoldBack{HoldBack: &topologyv1.HoldBack{Incarnation: node, Held: held}}})
	}
	for _, policy := range []topology.ReportingPolicy{topology.ReportingBlock, topology.ReportingDegrade, topology.ReportingBestEffort} {
		r := newReportingRig(t, 1, policy, 1)
		r.register("r5")
		r.run()
		state := topology.InSync
		if policy == topology.ReportingBestEffort {
			state = topology.Behind
		}
		r.wants(4, state, 8)
		// Its copies stay where they are until others are as good.
		hold(r, 4, true)
		r.unfilled = true
		r.run()
		r.wants(4, state, 8)
		r.unfilled = false
		r.run()
		r.wants(4, state, 0)
		r.wants(5, state, 16)
		// It is a node still, and stays without until people say so.
		r.run()
		r.wants(4, state, 0)
		hold(r, 4, false)
		r.clock += rejoinPause
		r.run()
		r.wants(4, state, 8)
		// There is nobody to take those of the last one.
		hold(r, 4, true)
		hold(r, 5, true)
		r.run()
		r.wants(4, state, 0)
		r.wants(5, state, 0)
		// One that leaves is not remembered.
		r.s = start(t, r.s, "decommission", nil, 4)
		r.run()
		if got := r.s.DrainedNodes(); r.s.Topology.Node(4) != nil || !slices.Equal(got, []uint64{5}) {
			t.Errorf("drained are %v", got)
		}
	}
}

// A node that comes back with an empty disk is another one of the same name: its copies are
// made anew, the old ones end with their lease, and nothing else waits for that.
func TestAReportingNodeThatLostItsDisk(t *testing.T) {
	for _, policy := range []topology.ReportingPolicy{topology.ReportingBlock, topology.ReportingDegrade} {
		r := newReportingRig(t, 1, policy, 1)
		r.run()
		r.dead, r.asleep = []uint64{4}, []uint64{4}
		r.register("r4") // #5
		r.unfilled = true
		r.run()
		if replacing(r.s.Topology) {
			t.Error("the ring waits for a reporting node")
		}
		r.clock += leaseEnds
		r.run()
		r.wants(5, topology.Filling, 16)
		if policy == topology.ReportingBlock {
			r.wants(4, topology.InSync, 16) // writes go on waiting
		} else {
			r.wants(4, topology.InSync, 0)
		}
		r.unfilled = false
		r.run()
		r.clock += leaseEnds
		r.run()
		r.wants(5, topology.InSync, 16)
		if r.s.Topology.Node(4) != nil {
			t.Errorf("%s: the old directory is still there", policy)
		}
	}
}
