package devcluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/internal/capacity"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// A load that rises and falls is followed from three nodes to five and back, within the
// rules, and no operation fails. Nothing but what the nodes measure of themselves tells the
// orchestrator.
func TestE2ECapacityFollowsTheLoad(t *testing.T) {
	if !full {
		t.Skip("in make e2e; the simulation scales clusters in every run")
	}
	const fewest, most = 3, 5
	r := startWith(t, devcluster.Settings{Nodes: fewest, Orchestrators: 1, Zones: 1, Autonomy: true, CPULimit: 0.2})
	r.kvctl("config", "set", "auto_scaling_group.max_capacity", fmt.Sprint(most))
	data := large{r: r, c: r.client(), keys: 20_000, size: 1 << 10}
	data.each(data.keys, data.put)
	l := loadOn(t, data.c, 50)
	calm := &scalingWatch{r: r, began: time.Now(), fewest: fewest, most: most}
	r.eventually(4*time.Minute, func() string { return calm.calm() })
	since, began := r.lastChange(), time.Now()

	up := &scalingWatch{r: r, began: began, fewest: fewest, most: most}
	r.eventually(8*time.Minute, func() string {
		l.raise(up.cpu, 8000)
		return up.reached(most)
	})
	t.Logf("load asked for more nodes first after %.1f s; a node that was launched had registered %.1f s after that", up.breach.Seconds(), (up.came - up.breach).Seconds())
	l.pace.SetLimit(50)
	down := &scalingWatch{r: r, began: began, fewest: fewest, most: most}
	r.eventually(12*time.Minute, func() string { return down.reached(fewest) })
	l.end()
	t.Logf("what happened:\n%s", r.timeline(since, began))
	r.within(since)
	r.equal(data, fewest, r.named(devcluster.RoleData))
}

// raise makes the load a little more, within a bound, while the nodes use less than they have.
// What an operation costs depends on the machine, and on what else runs on it.
func (l *load) raise(cpu float64, most rate.Limit) {
	if now := l.pace.Limit(); cpu < 1 && time.Since(l.raised) > 5*time.Second {
		l.raised = time.Now()
		l.pace.SetLimit(min(most, max(500, now*5/4)))
	}
}

// scalingWatch follows the number of nodes and what the orchestrator says about it.
type scalingWatch struct {
	r            *rig
	began        time.Time
	fewest, most int
	// breach is when a signal first asked for more nodes than there were, came when there
	// were more.
	breach, came time.Duration
	cpu          float64 // mean of the nodes
	said         string
}

// reached returns what is missing until there are so many nodes, all of which have slots
// and all their data.
func (w *scalingWatch) reached(nodes int) string {
	w.r.t.Helper()
	c, err := w.r.control("orch1").GetCapacity(context.Background(), &adminv1.GetCapacityRequest{})
	if err != nil {
		return err.Error()
	}
	w.explain(c)
	for _, s := range c.GetSignals() {
		if s.GetName() == capacity.CPU {
			w.cpu = s.GetMean()
		}
		if int(s.GetWants()) > len(c.GetNodes()) && w.breach == 0 {
			w.breach = time.Since(w.began)
		}
	}
	top := w.r.topology()
	if w.breach != 0 && w.came == 0 && top.DataNodes() > w.fewest {
		w.came = time.Since(w.began)
	}
	if n := top.DataNodes(); n < w.fewest || n > w.most {
		w.r.t.Errorf("%d data nodes, want %d to %d", n, w.fewest, w.most)
	}
	if slices.ContainsFunc(top.Ring, func(v topology.Vnode) bool { return v.Moving() >= 0 }) {
		return "slots are moving"
	}
	if members, all := len(top.Members()), top.DataNodes(); members != nodes || all != nodes || len(w.r.named(devcluster.RoleData)) != nodes {
		return fmt.Sprintf("%d nodes, %d with slots, want %d: %s", all, members, nodes, w.said)
	}
	return ""
}

// calm returns what is missing until load is judged, and asks for nothing. Nodes that have
// just come are not judged until what they report tells of the time since.
func (w *scalingWatch) calm() string {
	w.r.t.Helper()
	if time.Since(w.began) < time.Minute {
		return "the nodes have not been there for a minute"
	}
	c, err := w.r.control("orch1").GetCapacity(context.Background(), &adminv1.GetCapacityRequest{})
	switch {
	case err != nil:
		return err.Error()
	case len(c.GetSignals()) == 0 || len(c.GetWaits()) > 0:
		return strings.Join(c.GetWaits(), "; ")
	}
	for _, s := range c.GetSignals() {
		if int(s.GetWants()) > w.fewest {
			return c.GetWhy()
		}
	}
	return ""
}

// explain logs what is decided and why, when that changes.
func (w *scalingWatch) explain(c *adminv1.GetCapacityResponse) {
	var signals []string
	for _, s := range c.GetSignals() {
		if s.GetTarget() > 0 {
			signals = append(signals, fmt.Sprintf("%s %.0f%% of %.0f%%", s.GetName(), 100*s.GetMean(), 100*s.GetTarget()))
		}
	}
	said := strings.Join(append([]string{c.GetWhy()}, c.GetWaits()...), "; waits: ")
	if said != w.said && c.GetChange() != 0 {
		w.r.t.Logf("%6.1f s  %+d: %s (%s)", time.Since(w.began).Seconds(), c.GetChange(), said, strings.Join(signals, ", "))
	}
	w.said = said
}

// within fails unless the scalings after a change are as far from each other as the
// rules say, and each says why.
func (r *rig) within(after uint64) {
	r.t.Helper()
	resp, err := r.control("orch1").ListChanges(context.Background(), &adminv1.ListChangesRequest{After: after})
	if err != nil {
		r.t.Fatal(err)
	}
	group := r.topology().Settings.AutoScalingGroup
	last := time.Time{}
	for _, c := range resp.GetChanges() {
		if what := c.GetWhat(); !strings.Contains(what, "to be launched, for") && !strings.Contains(what, "as fewer nodes are enough (") {
			continue
		}
		at := time.UnixMilli(int64(c.GetAtMs()))
		if wait := min(group.ScaleUpCooldown, group.ScaleDownCooldown); at.Sub(last) < wait {
			r.t.Errorf("%s after the last scaling, within the cooldown of %s: %s", at.Sub(last), wait, c.GetWhat())
		}
		if !strings.Contains(c.GetWhat(), "cpu") {
			r.t.Errorf("a scaling that does not tell its reason: %s", c.GetWhat())
		}
		last = at
	}
	if last.IsZero() {
		r.t.Error("there was no scaling")
	}
}

// With every orchestrator dead for longer than a dead node is waited for, operations go on;
// when they are back, nobody is taken for dead.
func TestE2ENoOrchestratorForAWhile(t *testing.T) {
	besideOthers(t)
	r := startWith(t, devcluster.Settings{Nodes: 3, Orchestrators: 3, Zones: 3, Autonomy: true, CPULimit: 2})
	l := loadOn(t, r.client(), scale(200.0, 1000.0))
	before, since := r.topology(), r.lastChange()
	orchestrators := r.named(devcluster.RoleOrchestrator)
	for range scale(1, 3) {
		r.kill(orchestrators...)
		done, began := l.done.Load(), time.Now()
		down := before.Settings.ReplaceAfter + 5*time.Second
		r.eventually(2*down, func() string {
			if time.Since(began) < down || l.done.Load() < done+1000 {
				return "not down for long enough"
			}
			return ""
		})
		r.up(orchestrators...)
		back := time.Now() // a false alarm would have come to something by then
		r.eventually(2*down, func() string {
			if time.Since(back) < down {
				return "not back for long enough"
			}
			return ""
		})
	}
	l.end()
	t.Logf("what happened:\n%s", r.timeline(since, l.began))
	after := r.topology()
	if len(after.Nodes) != 3 || len(r.named(devcluster.RoleData)) != 3 {
		t.Errorf("the nodes are %+v", after.Nodes)
	}
	for i, n := range after.Nodes {
		if n.Incarnation != before.Nodes[i].Incarnation || !after.Names(n.Incarnation) {
			t.Errorf("%s is #%d, and was #%d", n.Name, n.Incarnation, before.Nodes[i].Incarnation)
		}
	}
	resp, err := r.control(r.leader()).ListChanges(context.Background(), &adminv1.ListChangesRequest{After: since})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range resp.GetChanges() {
		if s := c.GetSubject(); s == "recovery" || s == "provision" || s == topology.SubjectMove || strings.Contains(c.GetWhat(), "unhealthy") {
			t.Errorf("%s: %s", s, c.GetWhat())
		}
	}
}
