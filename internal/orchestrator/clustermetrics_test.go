package orchestrator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// knowing returns an orchestrator that knows a state, and of which nodes are healthy.
func knowing(s *topology.State, healthy ...uint64) *Orchestrator {
	o := &Orchestrator{machine: newMachine()}
	o.machine.set(s)
	o.health = newProbes(o)
	for _, n := range healthy {
		o.health.mu.nodes[n] = &observation{verdict: verdict{state: topologyv1.NodeHealth_STATE_HEALTHY}}
	}
	return o
}

func gather(t *testing.T, o *Orchestrator) (out []string) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(clusterCollector{o})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			line := f.GetName()
			for _, l := range m.GetLabel() {
				line += " " + l.GetValue()
			}
			out = append(out, fmt.Sprint(line, " = ", m.GetGauge().GetValue()))
		}
	}
	slices.Sort(out)
	return out
}

func TestClusterMetrics(t *testing.T) {
	s, _ := ringOf(t, 3)
	want := func(degraded, unwritable, unreadable int, nodes ...int) (out []string) {
		out = append(out,
			fmt.Sprint("kvasir_cluster_short_vnodes = ", unreadable), // with a majority of three the same
			fmt.Sprint("kvasir_cluster_degraded_vnodes = ", degraded),
			fmt.Sprint("kvasir_cluster_unreadable_vnodes default = ", unreadable),
			fmt.Sprint("kvasir_cluster_unwritable_vnodes default = ", unwritable))
		for i, healthy := range nodes {
			out = append(out, fmt.Sprintf("kvasir_cluster_node_healthy %d n%d = %d", i+1, i+1, healthy))
		}
		slices.Sort(out)
		return out
	}
	for _, test := range []struct {
		healthy []uint64
		want    []string
	}{
		{[]uint64{1, 2, 3}, want(0, 0, 0, 1, 1, 1)},
		{[]uint64{1, 2}, want(16, 0, 0, 1, 1, 0)},
		{[]uint64{3}, want(16, 16, 16, 0, 0, 1)},
	} {
		if diff := cmp.Diff(test.want, gather(t, knowing(s, test.healthy...))); diff != "" {
			t.Errorf("with %v healthy (-want +got):\n%s", test.healthy, diff)
		}
	}
	if got := gather(t, knowing(nil)); len(got) != 0 {
		t.Errorf("before the cluster is founded: %q", got)
	}
}

func TestTargets(t *testing.T) {
	cfg := testConfig(1)
	cfg.Bootstrap.FoundingNodes = 1
	s, _ := settle(t, nil, &cfg)
	s, _, err := s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
		Node: &topologyv1.Node{Name: "n1", Zone: "z1", Role: topologyv1.Role_ROLE_DATA, Address: "n1:1", AdminAddress: "n1:2", DataId: "d"}, Boot: 1,
	}}}}})
	if err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	knowing(s).serveTargets(rec, nil)
	var got []targetGroup
	if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, rec.Body)
	}
	want := []targetGroup{
		{[]string{"10.0.0.1:2"}, map[string]string{"cluster": "c1", "role": "orchestrator", "name": "orch1", "zone": ""}},
		{[]string{"n1:2"}, map[string]string{"cluster": "c1", "role": "data", "name": "n1", "zone": "z1"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// Prometheus takes no other type, and keeps what it has when it gets an error.
	if got := rec.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("type %q", got)
	}
	rec = httptest.NewRecorder()
	if knowing(nil).serveTargets(rec, nil); rec.Code != http.StatusServiceUnavailable {
		t.Errorf("code %d before the cluster is founded", rec.Code)
	}
}
