package devcluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// One of three nodes is killed and its disk removed, then one stands still: with no command
// given there are three again, every vnode has its replicas, and no operation fails.
func TestE2EAutonomy(t *testing.T) {
	besideOthers(t)
	r := startWith(t, devcluster.Settings{Nodes: 3, Orchestrators: 1, Zones: 3, Autonomy: true})
	data := large{r: r, c: r.client(), keys: scale(2_000, 50_000), size: 1 << 10}
	data.each(data.keys, data.put)
	l := loadOn(t, data.c, 200)
	breaches := []struct {
		what string
		do   func(name string)
	}{
		{"killed, and its disk removed", func(name string) {
			r.kill(name)
			if err := os.RemoveAll(filepath.Join(r.cluster.Dir(), name)); err != nil {
				t.Fatal(err)
			}
		}},
		{"stopped with SIGSTOP", func(name string) {
			if err := r.cluster.Pause(context.Background(), name); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, breach := range breaches[scale(1, 0):] { // a short run has the hung one only
		names := r.named(devcluster.RoleData)
		lost := names[r.rng.IntN(len(names))]
		since := r.lastChange()
		began := time.Now()
		breach.do(lost)
		r.eventually(4*time.Minute, func() string { return r.wholeWithout(lost, 3) })
		t.Logf("%s is %s; what followed in %s:\n%s", lost, breach.what, time.Since(began).Round(time.Second), r.timeline(since, began))
	}
	// To compare everything is a load that nodes would be launched for, and move vnodes
	// away from where they are looked for.
	if _, err := r.control("orch1").UpdateSettings(context.Background(), &adminv1.UpdateSettingsRequest{
		Values: map[string]string{"auto_scaling_group.max_capacity": "3"},
	}); err != nil {
		t.Fatal(err)
	}
	l.end()
	r.equal(data, 3, r.named(devcluster.RoleData))
}

// wholeWithout returns what is missing until there are so many healthy nodes with all
// replicas, and a node and its process are gone.
func (r *rig) wholeWithout(lost string, nodes int) string {
	resp, err := r.control("orch1").GetClusterStatus(context.Background(), &adminv1.GetClusterStatusRequest{})
	if err != nil {
		return err.Error()
	}
	for _, c := range resp.GetConditions() {
		return c.GetText()
	}
	t, err := topology.FromProto(resp.GetTopology())
	if err != nil {
		return err.Error()
	}
	healthy := 0
	for _, n := range resp.GetNodes() {
		if n.GetHealth().GetState() == topologyv1.NodeHealth_STATE_HEALTHY {
			healthy++
		}
	}
	switch {
	case t.Resolve(lost) != nil:
		return lost + " is still a node"
	case len(t.Members()) != nodes || healthy != nodes:
		return fmt.Sprintf("%d nodes have slots and %d are healthy, want %d", len(t.Members()), healthy, nodes)
	case slices.Contains(r.named(devcluster.RoleData), lost):
		return lost + " still has a process"
	}
	return ""
}

func (r *rig) lastChange() uint64 {
	r.t.Helper()
	resp, err := r.control("orch1").ListChanges(context.Background(), &adminv1.ListChangesRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	all := resp.GetChanges()
	return all[len(all)-1].GetNumber()
}

// timeline writes what happened after a change, with the time since something began.
func (r *rig) timeline(after uint64, began time.Time) string {
	r.t.Helper()
	resp, err := r.control("orch1").ListChanges(context.Background(), &adminv1.ListChangesRequest{After: after})
	if err != nil {
		r.t.Fatal(err)
	}
	var b strings.Builder
	for _, c := range resp.GetChanges() {
		if c.GetSubject() != topology.SubjectMove {
			fmt.Fprintf(&b, "%6.1f s  %-10s %s\n", time.UnixMilli(int64(c.GetAtMs())).Sub(began).Seconds(), c.GetSubject(), c.GetWhat())
		}
	}
	return b.String()
}
