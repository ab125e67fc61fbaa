package cli

import (
	"context"
	"encoding/json"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func (n *fakeNode) ListHints(_ context.Context, r *adminv1.ListHintsRequest) (*adminv1.ListHintsResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	resp := &adminv1.ListHintsResponse{}
	if h := n.f.mu.hints[n.incarnation]; h != nil {
		resp = proto.CloneOf(h)
	}
	resp.MaxBytes, resp.MaxCount, resp.MaxAgeMs, resp.SampledAtMs = 1<<30, 1_000_000, 3*3600_000, 1772366400000
	resp.Groups = slices.DeleteFunc(resp.Groups, func(g *adminv1.HintGroup) bool { return r.GetTarget() != 0 && g.GetTarget() != r.GetTarget() })
	return resp, nil
}

func TestHintsLs(t *testing.T) {
	f := newFake(t, 3)
	f.run("hints", "ls").want(t, 0, "node3")
	f.mu.Lock()
	f.mu.hints[1] = &adminv1.ListHintsResponse{Count: 1600, Bytes: 5 << 20, Dropped: 12, Expired: 3, Groups: []*adminv1.HintGroup{
		{Target: 2, Namespace: "default", Vnode: 4, Count: 100, Bytes: 100 << 10, OldestMs: 1772366400000 + 5},
		{Target: 3, Namespace: "default", Vnode: 1, Count: 1400, Bytes: 4 << 20, OldestMs: 1772366400000 - 90_000},
		{Target: 3, Vnode: 7, Count: 100, Bytes: 100 << 10, OldestMs: 1772366400000 - 1500},
	}}
	f.mu.Unlock()
	golden(t, "hints-ls", f.run("hints", "ls").want(t, 0).stdout)
	golden(t, "hints-ls-target-json", f.run("hints", "ls", "node1", "--target", "#3", "-o", "json").want(t, 0).stdout)
	f.run("hints", "ls", "nobody").want(t, 3, "nobody")
	f.run("hints", "ls", "--target", "nobody").want(t, 3, "nobody")
	f.run("hints", "ls", "node1", "node2").want(t, 2, "unexpected argument")
	// A node that does not answer is named; the others are listed.
	f.nodes[2].server.Stop()
	r := f.run("hints", "ls", "-o", "json").want(t, 0, "node3: cannot be reached")
	var docs []hintListDoc
	if err := json.Unmarshal([]byte(r.stdout), &docs); err != nil || len(docs) != 2 {
		t.Errorf("%d nodes are listed, %v", len(docs), err)
	}
	f.run("hints", "ls", "node3").want(t, 4, "node3")
}
