package topology_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func setCopy(vnode uint32, node uint64, state topology.CopyState) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetCopies{SetCopies: &topologyv1.SetCopies{
		Changes: []*topologyv1.CopyChange{{Vnode: vnode, Copy: topology.Copy{Namespace: 1, Node: node, State: state}.Proto()}},
	}}}
}

// reporting returns a cluster with a reporting node, #4, and rules for its one namespace.
func reporting(t *testing.T, policy topology.ReportingPolicy) *cluster {
	t.Helper()
	c := formed(t)
	m := register("r1", 0, 1, "a")
	m.GetRegister().Node.Role = topologyv1.Role_ROLE_REPORTING
	c.must(m)
	ns := *c.state.Topology.Namespace("default")
	ns.Reporting = topology.ReportingRules{Policy: policy, Copies: 1, Timeout: topology.DefaultReportingTimeout}
	c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}})
	return c
}

// paths is how a copy gets into each state, 0 being none.
var paths = map[topology.CopyState][]topology.CopyState{
	0:                 nil,
	topology.Filling:  {topology.Filling},
	topology.Behind:   {topology.Filling, topology.Behind},
	topology.Joining:  {topology.Filling, topology.Behind, topology.Joining},
	topology.InSync:   {topology.Filling, topology.Behind, topology.Joining, topology.InSync},
	topology.Evicting: {topology.Filling, topology.Behind, topology.Joining, topology.InSync, topology.Evicting},
}

// Invariant 13: between any two states exactly these steps are allowed. One that is in sync
// is let go of by way of eviction only, and gets there only by joining.
func TestCopiesGoStepByStep(t *testing.T) {
	allowed := map[topology.CopyState][]topology.CopyState{
		0:                 {topology.Filling},
		topology.Filling:  {topology.Behind, 0},
		topology.Behind:   {topology.Filling, topology.Joining, 0},
		topology.Joining:  {topology.InSync, topology.Behind},
		topology.InSync:   {topology.Evicting},
		topology.Evicting: {topology.Behind},
	}
	for from, path := range paths {
		for to := range paths {
			c := reporting(t, topology.ReportingBlock)
			for _, s := range path {
				c.must(setCopy(2, 4, s))
			}
			before := c.state.Topology
			_, err := c.apply(setCopy(2, 4, to))
			now := c.state.Topology
			if from == to {
				if err != nil || now.Epoch != before.Epoch {
					t.Errorf("%s again: %v in epoch %d, was %d", from, err, now.Epoch, before.Epoch)
				}
				continue
			}
			if !slices.Contains(allowed[from], to) {
				wantRefusal(t, err, topology.Precondition, "BAD_STEP")
				continue
			}
			if err != nil {
				t.Errorf("%s to %s: %v", from, to, err)
				continue
			}
			copies := now.Copies(2, 1)
			if to == 0 && len(copies) != 0 || to != 0 && (len(copies) != 1 || copies[0] != topology.Copy{Namespace: 1, Node: 4, State: to, Since: now.Epoch}) {
				t.Errorf("%s to %s: %+v in epoch %d", from, to, copies, now.Epoch)
			}
			// Requests that may not know that there is a copy, or that it must be waited for,
			// are refused from here on; others go on.
			fenced := to == topology.Filling || to == topology.Joining
			if got := now.Ring[2].ChangedEpoch == now.Epoch; got != fenced {
				t.Errorf("%s to %s: requests of earlier epochs are refused: %v", from, to, got)
			}
			if now.Ring[1].ChangedEpoch == now.Epoch || len(now.Copies(1, 1)) != 0 || len(now.Copies(2, 2)) != 0 {
				t.Errorf("%s to %s: changes elsewhere too", from, to)
			}
			if d := topology.Diff(before, now); len(d.GetVnodes()) != 1 {
				t.Errorf("%s to %s: the difference is %v", from, to, d)
			} else if next, err := topology.Patch(before, d); err != nil || !slices.Equal(next.Copies(2, 1), copies) {
				t.Errorf("%s to %s: patched to %v, %v", from, to, next, err)
			}
		}
	}
}

// Writes never wait for copies of a namespace whose policy says so.
func TestCopiesOfBestEffortNeverJoin(t *testing.T) {
	for _, policy := range []topology.ReportingPolicy{topology.ReportingBlock, topology.ReportingDegrade, topology.ReportingBestEffort} {
		c := reporting(t, policy)
		c.must(setCopy(0, 4, topology.Filling))
		c.must(setCopy(0, 4, topology.Behind))
		_, err := c.apply(setCopy(0, 4, topology.Joining))
		if policy == topology.ReportingBestEffort {
			wantRefusal(t, err, topology.Precondition, "REPORTING_NEVER_WAITS")
		} else if err != nil {
			t.Errorf("%s: %v", policy, err)
		}
	}
}

func TestCopiesAreOnReportingNodes(t *testing.T) {
	c := reporting(t, topology.ReportingBlock)
	_, err := c.apply(setCopy(0, 1, topology.Filling))
	wantRefusal(t, err, topology.Invalid, "INVALID_TOPOLOGY")
	_, err = c.apply(setCopy(9, 4, topology.Filling))
	wantRefusal(t, err, topology.Invalid, "UNKNOWN_VNODE")
	twice := setCopy(0, 4, topology.Filling)
	twice.GetSetCopies().Changes = append(twice.GetSetCopies().Changes, twice.GetSetCopies().Changes[0])
	_, err = c.apply(twice)
	wantRefusal(t, err, topology.Invalid, "COPY_TWICE")

	c.must(setCopy(0, 4, topology.Filling))
	top := c.state.Topology
	if !top.Names(4) || len(top.Members()) != 3 {
		t.Errorf("a node with a copy: named %v, members %v", top.Names(4), top.Members())
	}
	_, err = c.apply(remove(4))
	wantRefusal(t, err, topology.Precondition, "NODE_HAS_SLOTS")
	c.must(setCopy(0, 4, 0))
	c.must(remove(4))
}

func TestOnlyReportingNodesAreDrainedAtOnce(t *testing.T) {
	c := reporting(t, topology.ReportingBlock)
	hold := func(node uint64, held bool) *topologyv1.Mutation {
		return &topologyv1.Mutation{Kind: &topologyv1.Mutation_HoldBack{HoldBack: &topologyv1.HoldBack{Incarnation: node, Held: held}}}
	}
	_, err := c.apply(hold(1, true))
	wantRefusal(t, err, topology.Invalid, "NODE_HAS_SLOTS")
	_, err = c.apply(hold(99, true))
	wantRefusal(t, err, topology.NotFound, "NODE_NOT_FOUND")
	epoch, notes := c.state.Topology.Epoch, len(c.state.History)
	for _, held := range []bool{true, true, false, false} {
		c.must(hold(4, held))
		if c.state.HeldBack(4) != held {
			t.Errorf("drained: %v, want %v", !held, held)
		}
	}
	// It concerns nobody but the leader, and is in the history once each way.
	if c.state.Topology.Epoch != epoch || len(c.state.History) != notes+2 {
		t.Errorf("epoch %d, was %d; %d changes, were %d", c.state.Topology.Epoch, epoch, len(c.state.History), notes)
	}
	// Copies do not make it forgotten, as slots do of a data node.
	c.must(setCopy(0, 4, topology.Filling))
	c.must(hold(4, true))
	op := c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_StartOperation{StartOperation: &topologyv1.StartOperation{Operation: &topologyv1.Operation{
		Kind: "decommission", Remove: []uint64{4},
	}}}}).Operation
	c.must(&topologyv1.Mutation{Kind: &topologyv1.Mutation_SteerOperation{SteerOperation: &topologyv1.SteerOperation{Id: op.ID, State: topologyv1.Operation_STATE_DONE}}})
	if !c.state.HeldBack(4) {
		t.Error("forgotten")
	}
}

// What becomes of copies when slots move, when their namespace goes, and in a new
// generation.
func TestCopiesStayWithTheirVnodes(t *testing.T) {
	c := reporting(t, topology.ReportingBlock)
	for vnode, state := range []topology.CopyState{topology.Filling, topology.Behind, topology.Joining, topology.InSync} {
		for _, s := range paths[state] {
			c.must(setCopy(uint32(vnode), 4, s))
		}
	}
	before := c.state.Topology
	c.must(wiped("n1", 2))
	c.must(setVnode(3, replacing(1, 5), stable(2), stable(3)))
	if got := c.state.Topology.Copies(3, 1); !slices.Equal(got, before.Copies(3, 1)) {
		t.Errorf("after a slot moved: %+v, was %+v", got, before.Copies(3, 1))
	}

	s, err := topology.Recovery{ID: "r", Generation: 1, Newest: before}.State()
	if err != nil {
		t.Fatal(err)
	}
	for vnode, want := range []topology.CopyState{topology.Filling, topology.Behind, topology.Evicting, topology.Evicting} {
		if got := s.Topology.Copies(uint32(vnode), 1); len(got) != 1 || got[0].State != want {
			t.Errorf("vnode %d in a new generation: %+v, want it %s", vnode, got, want)
		}
	}

	c.must(drop(1))
	for vnode := range uint32(4) {
		if got := c.state.Topology.Ring[vnode].Copies; len(got) != 0 {
			t.Errorf("vnode %d after its namespace was dropped: %+v", vnode, got)
		}
	}
}

func TestReportingRules(t *testing.T) {
	for _, p := range []topology.ReportingPolicy{topology.ReportingOff, topology.ReportingBlock, topology.ReportingDegrade, topology.ReportingBestEffort} {
		if got, err := topology.ParseReportingPolicy(p.String()); err != nil || got != p {
			t.Errorf("%s is read as %s, %v", p, got, err)
		}
	}
	if _, err := topology.ParseReportingPolicy("on"); err == nil {
		t.Error("there is no policy on")
	}
	for i, r := range []topology.ReportingRules{
		{Policy: topology.ReportingBlock, Timeout: time.Second},
		{Policy: topology.ReportingBlock, Copies: topology.MaxReportingCopies + 1, Timeout: time.Second},
		{Policy: topology.ReportingDegrade, Copies: 1, Timeout: time.Hour},
		{Policy: topology.ReportingDegrade, Copies: 1, Timeout: time.Millisecond},
		{Policy: 9, Copies: 1, Timeout: time.Second},
		{Copies: 1},
	} {
		c := formed(t)
		ns := *c.state.Topology.Namespace("default")
		ns.Reporting = r
		_, err := c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}})
		if err == nil {
			t.Error(fmt.Sprint(i), "bad rules are taken")
		}
	}
}
