package cli

import (
	"context"
	"testing"

	"github.com/kvasirdb/kvasir/internal/hlc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// fakeNow is when the fake cluster's records died.
const fakeNow = 1772366400000

// In a fake cluster node3 is down as far as the others can tell. A key dead is dead,
// one alive lives, others are not there.
func (n *fakeNode) ExplainCollection(_ context.Context, r *adminv1.ExplainCollectionRequest) (*adminv1.ExplainCollectionResponse, error) {
	resp := &adminv1.ExplainCollectionResponse{Vnode: r.GetVnode()}
	if r.GetKey() != nil {
		resp.Vnode = 4
	}
	state := func(name string, incarnation uint64) *adminv1.CollectionReplica {
		return &adminv1.CollectionReplica{
			Incarnation: incarnation, Name: name, Reachable: true, DeadRecords: 1600, OldestDead: uint64(hlc.At(fakeNow)),
			Promise: uint64(hlc.At(fakeNow - 1000)), Certificate: uint64(hlc.At(fakeNow - 2000)),
		}
	}
	resp.Replicas = []*adminv1.CollectionReplica{state("node1", 1), state("node2", 2), {Incarnation: 3, Name: "node3", Reason: "down: does not answer"}}
	switch key := string(r.GetKey()); key {
	case "alive":
		resp.Found = true
	case "dead":
		resp.Found, resp.Dead, resp.DeadSince = true, true, uint64(hlc.At(fakeNow))
		fallthrough
	case "":
		if resp.GetVnode() == 4 {
			resp.PinnedBy = []string{"node3 does not answer (down: does not answer): nothing is certified until it is back or removed from the cluster"}
		}
	}
	return resp, nil
}

func TestGCExplain(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.hints[1] = &adminv1.ListHintsResponse{Groups: []*adminv1.HintGroup{
		{Target: 3, Namespace: "default", Vnode: 4, Count: 7}, {Target: 3, Namespace: "default", Vnode: 5, Count: 8},
	}}
	f.mu.Unlock()
	golden(t, "gc-explain", f.run("gc", "explain", "dead").want(t, 0).stdout)
	golden(t, "gc-explain-json", f.run("gc", "explain", "dead", "-o", "json").want(t, 0).stdout)
	golden(t, "gc-explain-vnode-json", f.run("gc", "explain", "--vnode", "0", "-o", "json").want(t, 0).stdout)
	f.run("gc", "explain", "alive").want(t, 0, "neither deleted nor expired")
	f.run("gc", "explain", "nobody").want(t, 0, "no replica that answered has a record")
	f.run("gc", "explain", "--vnode", "4").want(t, 0, "dead records wait", "7 hints")
	f.run("gc", "explain", "--vnode", "0").want(t, 0, "nothing keeps its dead records")
	f.run("gc", "explain").want(t, 2, "either a key or --vnode")
	f.run("gc", "explain", "k", "--vnode", "1").want(t, 2, "either a key or --vnode")
	f.run("gc", "explain", "--vnode", "-1").want(t, 2, "vnode")
}
