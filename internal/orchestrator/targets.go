package orchestrator

import (
	"encoding/json"
	"net/http"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// targetGroup is an admin server as Prometheus' HTTP service discovery reads it.
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// targetsOf returns the admin servers of a cluster: its orchestrators and every
// registered node, so that what scaling adds and takes away is found.
func targetsOf(t *topology.Topology) []targetGroup {
	out := []targetGroup{}
	add := func(address, role, name, zone string) {
		out = append(out, targetGroup{[]string{address}, map[string]string{"cluster": t.ClusterID, "role": role, "name": name, "zone": zone}})
	}
	for _, o := range t.Orchestrators {
		add(o.AdminAddress, "orchestrator", o.Name, "") // Prometheus drops a label that is empty
	}
	for _, n := range t.Nodes {
		add(n.AdminAddress, n.Role.String(), n.Name, n.Zone)
	}
	return out
}

// serveTargets answers Prometheus. Before the cluster is founded it is an error, upon
// which Prometheus keeps the targets that it has.
func (o *Orchestrator) serveTargets(w http.ResponseWriter, _ *http.Request) {
	t := o.machine.topology()
	if t == nil {
		http.Error(w, "the cluster has not been founded", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(targetsOf(t)) // a client that has gone misses nothing
}
