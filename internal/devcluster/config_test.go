package devcluster

import (
	"bytes"
	"os"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
)

// TestProcessesTakeTheirConfiguration holds the written files against what kvnode
// and kvorch read.
func TestProcessesTakeTheirConfiguration(t *testing.T) {
	dir := t.TempDir()
	st := testState()
	read := func(name string, into any) {
		t.Helper()
		picked, err := st.pick([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if err := st.writeConfig(dir, "/opt", picked[0].member); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(configPath(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		dec := yaml.NewDecoder(bytes.NewReader(b))
		dec.KnownFields(true)
		if err := dec.Decode(into); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, b)
		}
	}

	n := node.Defaults()
	read("node2", &n)
	n.Complete()
	if err := n.Validate(); err != nil {
		t.Error(err)
	}
	if n.Name != "node2" || n.Zone != "z2" || n.Advertise != "127.0.0.1:7410" || n.Orchestrators[0] != "127.0.0.1:7390" {
		t.Errorf("node2 reads %+v", n)
	}

	if n.CPULimit != 0 {
		t.Errorf("node2 has %v cores, want all", n.CPULimit)
	}
	st.Settings.CPULimit = 0.5
	read("node2", &n)
	if n.CPULimit != 0.5 {
		t.Errorf("node2 has %v cores, want 0.5", n.CPULimit)
	}
	if got := (Settings{Nodes: 3, Autonomy: true}).allowance(6); got != 0.5 {
		t.Errorf("of 6 cores, one of up to 12 nodes has %v, want 0.5", got)
	}

	o := orchestrator.Defaults()
	read("orch1", &o)
	if err := o.Validate(); err != nil {
		t.Error(err)
	}
	if h := o.Bootstrap.HealthChecks; h.Interval != time.Second || h.Timeout != 500*time.Millisecond || h.HealthyThreshold != 2 || h.UnhealthyThreshold != 3 {
		t.Errorf("orch1 reads health checks %+v", h)
	}
	if o.Bootstrap.FoundingNodes != 2 || o.ElectionTimeout != 500*time.Millisecond || o.Peers[0].RaftAddress != "127.0.0.1:7393" {
		t.Errorf("orch1 reads %+v", o)
	}
}
