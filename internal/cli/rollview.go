package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// rollView is the cluster as a roll looks at it: as the orchestrators see it, and what
// every node says itself at the same time.
type rollView struct {
	*clusterStatus
	operations []*adminv1.ObservedOperation
	said       []answered[nodeWord] // of nodes, in their order
}

// nodeWord is what a node says of itself.
type nodeWord struct {
	status *adminv1.NodeStatus
	repair *adminv1.GetRepairStatusResponse
}

// look asks the cluster and every node.
func (a *App) look(ctx context.Context) (*rollView, error) {
	s, err := a.status(ctx)
	if err != nil {
		return nil, err
	}
	v := &rollView{clusterStatus: s, said: make([]answered[nodeWord], len(s.nodes))}
	if !s.controlled {
		return v, nil
	}
	if v.operations, err = a.operations(ctx, 0); err != nil {
		return nil, err
	}
	for i := range s.nodes {
		v.said[i].Node = s.nodes[i].Node
	}
	return v, askAll(ctx, a, v.said, min(a.flags.timeout, connectTimeout), func(ctx context.Context, cc *grpc.ClientConn) (w nodeWord, err error) {
		resp, err := adminv1.NewStatusServiceClient(cc).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
		if err != nil {
			return w, err
		}
		w.status = resp.GetStatus()
		w.repair, err = adminv1.NewRepairServiceClient(cc).GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{})
		return w, err
	})
}

// leader returns the orchestrator that leads, or nil.
func (v *rollView) leader() *adminv1.ObservedOrchestrator {
	for _, o := range v.orchestrators {
		if o.GetReachable() && o.GetStatus().GetRaftState() == "leader" {
			return o
		}
	}
	return nil
}

// blocked returns why nothing may be restarted until somebody has seen to it, or "".
func (v *rollView) blocked() string {
	if !v.controlled {
		return "no orchestrator answers"
	}
	if err := checkFormed(v.topology); err != nil {
		return err.Error()
	}
	for _, o := range v.orchestrators {
		if !o.GetReachable() {
			return fmt.Sprintf("orchestrator %s does not answer", o.GetName())
		}
	}
	if v.leader() == nil {
		return "the orchestrators have no leader"
	}
	for i := range v.nodes {
		n, said := v.nodes[i], v.said[i]
		if e := rpc.AsError(said.err); e != nil {
			return fmt.Sprintf("node %s: %s", n.Name, e.Message)
		}
		n.status = said.answer.status
		if why := n.down(); why != "" {
			return fmt.Sprintf("node %s is down: %s", n.Name, strings.TrimSuffix(why, ": "))
		}
	}
	for _, o := range v.operations {
		op := o.GetOperation()
		// One that is paused on purpose may be in the way of nothing.
		if s := topology.OperationState(op.GetState()); !s.Ended() && s != topology.Paused {
			return fmt.Sprintf("operation %d is under way (%s): wait for it, or pause it with kvctl operation pause %d", op.GetId(), op.GetTitle(), op.GetId())
		}
	}
	return ""
}

// notReady returns why nothing may be restarted now, or "".
func (v *rollView) notReady() string {
	if why := v.blocked(); why != "" {
		return why
	}
	return v.behind()
}

// behind returns what the cluster has yet to catch up with, or "".
// REQUIRES: nothing is blocked.
func (v *rollView) behind() string {
	leader := v.leader().GetStatus()
	for _, o := range v.orchestrators {
		if st := o.GetStatus(); st.GetAppliedIndex() < leader.GetAppliedIndex() || st.GetEpoch() < v.topology.Epoch {
			return fmt.Sprintf("orchestrator %s catches up with the leader", o.GetName())
		}
	}
	for i, said := range v.said {
		// A leader that is new may not have asked it yet.
		if v.nodes[i].health != topologyv1.NodeHealth_STATE_HEALTHY {
			return fmt.Sprintf("node %s has not been heard of by the orchestrators", said.Name)
		}
		if why := v.behindOf(said.answer); why != "" {
			return fmt.Sprintf("node %s %s", said.Name, why)
		}
	}
	return ""
}

// behindOf returns what a node has yet to catch up with, or to bring to others, or "".
func (v *rollView) behindOf(w nodeWord) string {
	st := w.status
	switch {
	case st.GetEpoch() < v.topology.Epoch:
		return fmt.Sprintf("has epoch %s of %s", topology.EpochString(st.GetEpoch()), topology.EpochString(v.topology.Epoch))
	case len(st.GetUnreachable()) > 0:
		return "does not reach " + v.topology.NodeName(st.GetUnreachable()[0])
	case w.repair.GetDirtyVnodes() > 0:
		return "compares " + plural(w.repair.GetDirtyVnodes(), "vnode") + " that hints were lost for"
	case slices.ContainsFunc(st.GetFillings(), func(f *adminv1.Filling) bool { return !f.GetComplete() }):
		return "is being filled"
	}
	for _, h := range st.GetHints() {
		if h.GetCount() > 0 && v.topology.Node(h.GetTarget()) != nil {
			return fmt.Sprintf("keeps %s for %s", plural(h.GetCount(), "hint"), v.topology.NodeName(h.GetTarget()))
		}
	}
	return ""
}

// withoutOne names the namespaces that cannot be served in full while one of the
// processes is restarted.
func (v *rollView) withoutOne(all []*rolled) []string {
	var out []string
	for i := range v.topology.Namespaces {
		for _, r := range all {
			if r.Incarnation == 0 || r.spared {
				continue
			}
			d := namespaceHealth(v.topology, &v.topology.Namespaces[i], func(node uint64) bool { return node != r.Incarnation })
			if d.NotWritable+d.NotReadable+d.HeldUp > 0 {
				out = append(out, fmt.Sprintf("namespace %s needs %s: with W=%d and R=%d of N=%d some requests fail while it restarts", d.Name, r.Name, d.w, d.r, d.n))
				break
			}
		}
	}
	return out
}

func rollDocs(all []*rolled) []rollDoc {
	docs := []rollDoc{}
	for _, r := range all {
		docs = append(docs, r.doc)
	}
	return docs
}

// write says what became of a process that was restarted.
func (r *rolled) write(w io.Writer) {
	software := r.doc.Software
	if was := r.answer.GetSoftware(); was != software {
		software += ", was " + was
	}
	fmt.Fprintf(w, "%s  serving again after %s, converged after %s more (had been up %s; %s)\n", r.Name,
		durationText(time.Duration(r.doc.DowntimeMs)*time.Millisecond), durationText(time.Duration(r.doc.ConvergedMs)*time.Millisecond),
		durationText(millis(r.doc.UptimeMs)), software)
}

// writeRollPlan shows what would be restarted, and why not now, if so.
func writeRollPlan(w io.Writer, all []*rolled, why string) {
	tab := newTable("PROCESS", "ROLE", "ADDRESS", ">UPTIME", "RESTART", "VERSION")
	for _, r := range all {
		restart := "yes"
		if r.spared {
			restart = "started since"
		}
		tab.add(r.Name, r.role, r.Address, durationText(millis(r.doc.UptimeMs)), restart, r.doc.Software)
	}
	tab.write(w)
	if why != "" {
		fmt.Fprintf(w, "\nnot now: %s\n", why)
	}
}

// writeRollSum ends a roll.
func writeRollSum(w io.Writer, all []*rolled, took time.Duration) {
	restarted, spared := 0, 0
	for _, r := range all {
		switch {
		case r.doc.Restarted:
			restarted++
		case r.spared:
			spared++
		}
	}
	fmt.Fprintf(w, "%d of %d restarted in %s", restarted, len(all), durationText(took))
	if spared > 0 {
		fmt.Fprintf(w, ", %d spared", spared)
	}
	fmt.Fprintln(w)
}
