package cli

import (
	"testing"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reports makes a fake's last nodes reporting nodes that share the copies of the namespace
// default.
func (f *fake) reports(nodes ...uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, inc := range nodes {
		f.mu.topology.Nodes[inc-1].Role = topologyv1.Role_ROLE_REPORTING
	}
	f.mu.topology.Namespaces[0].Reporting = &topologyv1.Reporting{Policy: topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE, Copies: 1, TimeoutMs: 500}
	for v, vnode := range f.mu.topology.GetRing() {
		vnode.Slots = nil
		for s := range uint64(3) {
			vnode.Slots = append(vnode.Slots, &topologyv1.Slot{Node: s + 1, Phase: topologyv1.Phase_PHASE_STABLE})
		}
		vnode.Copies = []*topologyv1.Copy{{Namespace: 1, Node: nodes[v%len(nodes)], State: topologyv1.CopyState_COPY_STATE_IN_SYNC, Since: 6}}
	}
}

func TestDrainAReportingNode(t *testing.T) {
	f := newFake(t, 5)
	f.reports(4, 5)
	f.run("node", "drain", "node4").want(t, 2, "--yes", "move the 4 copies of node4")
	f.run("node", "drain", "node4", "--undo", "--wait").want(t, 2, "at once")
	f.run("node", "drain", "node4", "--undo").want(t, 0, "is not drained")
	f.run("ring", "plan", "--remove", "node4").want(t, 2, "kvctl node drain node4")
	f.run("node", "replace", "node4", "node5").want(t, 2, "kvctl node drain node4")

	f.run("node", "drain", "node4", "--yes").want(t, 0, "node4 is drained: 4 copies to go")
	f.run("node", "drain", "node4", "--yes", "--wait").want(t, 0, "node4 is drained: it has no copies", "--undo")
	f.run("node", "status", "node4").want(t, 0, "copies", "0, drained")
	f.run("reporting", "status").want(t, 0, "node4 is drained: kvctl node drain node4 --undo")
	// Nobody is left to take those of the other one.
	f.run("node", "drain", "node5").want(t, 2, "give up the 4 copies of node5", "reports will be refused")
	if d := decode(t, f.run("node", "drain", "node5", "--yes", "--wait", "-o", "json").want(t, 0).stdout); d["drained"] != true || d["copies"] != 0.0 {
		t.Errorf("document %v", d)
	}
	f.run("reporting", "status").want(t, 0, "every reporting node is drained")
	f.run("node", "drain", "node5", "--undo").want(t, 0, "node5 is given copies again")
	if d := decode(t, f.run("reporting", "status", "-o", "json").want(t, 0).stdout); len(d["drained"].([]any)) != 1 {
		t.Errorf("document %v", d)
	}
}
