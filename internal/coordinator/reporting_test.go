package coordinator_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/internal/coordinator"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reportingTo is the node that has the copies, of three data nodes and this one.
const reportingTo = 4

// runReporting runs a test with three data nodes and a reporting node whose copies of all
// vnodes are in a state.
func runReporting(t *testing.T, policy topology.ReportingPolicy, state topology.CopyState, test func(t *testing.T, c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c := &cluster{t: t, ways: map[[2]uint64]way{}, stop: cancel}
		c.form(3, nil)
		c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
			Node: &topologyv1.Node{Name: "r1", Zone: "z", Role: topologyv1.Role_ROLE_REPORTING, Address: "r1:1", DataId: "r1"},
			Boot: 1, BootId: "b",
		}}})
		ns := *c.state.Topology.Namespace("default")
		ns.Reporting = topology.ReportingRules{Policy: policy, Copies: 1, Timeout: topology.DefaultReportingTimeout}
		c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_UpdateNamespace{UpdateNamespace: &topologyv1.UpdateNamespace{Namespace: ns.Proto()}}})
		for s := topology.Filling; s <= state; s++ {
			c.setCopies(s)
		}
		for id := range uint64(reportingTo) {
			c.nodes = append(c.nodes, c.newNode(ctx, id+1))
		}
		defer c.close()
		test(t, c)
	})
}

// setCopies takes all copies into a state.
func (c *cluster) setCopies(s topology.CopyState) {
	c.t.Helper()
	m := &topologyv1.SetCopies{}
	for v := range uint32(vnodes) {
		m.Changes = append(m.Changes, &topologyv1.CopyChange{Vnode: v, Copy: topology.Copy{Namespace: 1, Node: reportingTo, State: s}.Proto()})
	}
	c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_SetCopies{SetCopies: m}})
}

// Invariant 13: what is acknowledged is on every reporting replica that writes wait for,
// and on the others as soon as they answer.
func TestWritesWaitForReportingReplicas(t *testing.T) {
	for state := topology.Filling; state <= topology.Evicting; state++ {
		runReporting(t, topology.ReportingBlock, state, func(t *testing.T, c *cluster) {
			c.set(slowly, reportingTo)
			began := time.Now()
			c.nodes[0].mustPut("k", "v", "")
			took := time.Since(began)
			has := c.nodes[reportingTo-1].own("k") != nil
			if state.Awaited() && (took < 100*time.Millisecond || !has) {
				t.Errorf("%s: acknowledged after %s, the reporting replica has it: %v", state, took, has)
			}
			if !state.Awaited() && took >= 100*time.Millisecond {
				t.Errorf("%s: acknowledged after %s", state, took)
			}
			time.Sleep(time.Second)
			if c.nodes[reportingTo-1].own("k") == nil {
				t.Errorf("%s: the reporting replica never gets it", state)
			}
		})
	}
}

// A write that cannot be acknowledged is refused before it is begun, where that is known.
func TestBlockedWritesSayWhy(t *testing.T) {
	runReporting(t, topology.ReportingBlock, topology.InSync, func(t *testing.T, c *cluster) {
		c.set(down, reportingTo)
		_, err := c.nodes[0].put("k", "v", "1")
		if e := rpc.AsError(err); e.Reason != rpc.ReasonNotEnoughReplicas || !strings.Contains(e.Message, "r1 is down") || !strings.Contains(e.Message, "--reporting degrade") {
			t.Errorf("error %v", err)
		}
		time.Sleep(time.Second)
		for _, n := range c.nodes {
			if n.own("k") != nil {
				t.Errorf("node %d has what was refused", n.id)
			}
		}
		c.set(hanging, reportingTo)
		_, err = c.nodes[0].put("k", "v", "1")
		if e := rpc.AsError(err); e.Reason != rpc.ReasonOutcomeUnknown || !strings.Contains(e.Message, "reporting replica r1 did not") {
			t.Errorf("error %v", err)
		}
		c.set(open, reportingTo)
		c.nodes[0].mustPut("k", "w", "1")
	})
}

// With degrade a write waits until the topology lets go of the replica, and calls for that
// in time, and again, as nobody may have heard. Neither the eviction's beginning nor time is
// enough.
func TestWritesGoOnWithoutAnEvictedReplica(t *testing.T) {
	for _, w := range []way{down, hanging, mute} {
		runReporting(t, topology.ReportingDegrade, topology.InSync, func(t *testing.T, c *cluster) {
			var mu sync.Mutex
			var asked []string
			began := time.Now()
			c.evict = func(l coordinator.Laggard) {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, fmt.Sprintf("%d of vnode %d after %s", l.Node, l.Vnode, time.Since(began)))
			}
			c.set(w, reportingTo)
			done := make(chan error, 1)
			go func() {
				_, err := c.nodes[0].put("k", "v", "")
				done <- err
			}()
			time.Sleep(1200 * time.Millisecond)
			v := c.state.Topology.VnodeOf([]byte("k"))
			want := []string{fmt.Sprintf("4 of vnode %d after 500ms", v), fmt.Sprintf("4 of vnode %d after 1s", v)}
			mu.Lock()
			if !slices.Equal(asked, want) {
				t.Errorf("the eviction is asked for of %v, want %v", asked, want)
			}
			mu.Unlock()
			c.setCopies(topology.Evicting)
			c.publish()
			time.Sleep(time.Second)
			select {
			case err := <-done:
				t.Fatalf("answered before the replica was let go of: %v", err)
			default:
			}
			c.setCopies(topology.Behind)
			c.publish()
			synctest.Wait()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			default:
				t.Error("the write goes on waiting")
			}
			c.nodes[0].mustPut("k2", "v", "")
		})
	}
}

// Nobody lets go of the replica: the write fails and says what it waits for.
func TestWritesFailWhereNobodyEvicts(t *testing.T) {
	runReporting(t, topology.ReportingDegrade, topology.InSync, func(t *testing.T, c *cluster) {
		c.set(hanging, reportingTo)
		_, err := c.nodes[0].put("k", "v", "")
		if e := rpc.AsError(err); e.Reason != rpc.ReasonOutcomeUnknown || !strings.Contains(e.Message, "reporting replica r1 did not in time") {
			t.Errorf("error %v", err)
		}
	})
}

// A coordinator that does not know yet that writes have to wait for a replica is refused
// by those who know.
func TestStaleCoordinatorsLearnOfReportingReplicas(t *testing.T) {
	runReporting(t, topology.ReportingBlock, topology.Behind, func(t *testing.T, c *cluster) {
		c.setCopies(topology.Joining)
		c.publish(2, 3, reportingTo)
		c.set(slowly, reportingTo)
		began := time.Now()
		r := c.nodes[0].mustPut("k", "v", "")
		if took := time.Since(began); took < 100*time.Millisecond || c.nodes[reportingTo-1].own("k") == nil {
			t.Errorf("acknowledged after %s in epoch %d; the reporting replica has %v", took, r.GetEpoch(), c.nodes[reportingTo-1].own("k"))
		}
	})
}

// Reporting replicas count for no quorum and answer no client's read.
func TestReportingReplicasDoNotVote(t *testing.T) {
	runReporting(t, topology.ReportingBlock, topology.InSync, func(t *testing.T, c *cluster) {
		c.nodes[0].mustPut("k", "v", "")
		c.set(down, 2, 3)
		if _, err := c.nodes[0].put("k", "w", "2"); rpc.AsError(err).Reason != rpc.ReasonNotEnoughReplicas {
			t.Errorf("one data node and a reporting node take a write: %v", err)
		}
		if r, err := c.nodes[0].coord.Get(context.Background(), &kvv1.GetRequest{Key: []byte("k"), ReadQuorum: "2"}); rpc.AsError(err).Reason != rpc.ReasonNotEnoughReplicas {
			t.Errorf("they answer a read: %v, %v", r, err)
		}
		if r, err := c.nodes[0].coord.Get(context.Background(), &kvv1.GetRequest{Key: []byte("k"), Replica: "r1"}); rpc.AsError(err).Reason != rpc.ReasonNotOwner {
			t.Errorf("the reporting node's own copy: %v, %v", r, err)
		}
	})
}
