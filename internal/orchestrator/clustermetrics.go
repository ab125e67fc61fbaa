package orchestrator

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// clusterCollector tells Prometheus what can be served with the nodes that this
// orchestrator finds healthy, counted anew for every scrape. There is nothing to tell
// before the ring has formed.
type clusterCollector struct{ *Orchestrator }

var (
	nodeHealthyDesc = prometheus.NewDesc("kvasir_cluster_node_healthy", "1 for a registered node that this orchestrator takes for healthy, else 0.", []string{"node", "incarnation"}, nil)
	degradedDesc    = prometheus.NewDesc("kvasir_cluster_degraded_vnodes", "Vnodes with fewer live replicas than the largest N.", nil, nil)
	shortDesc       = prometheus.NewDesc("kvasir_cluster_short_vnodes", "Vnodes with so few live voting replicas that a lost one cannot be rebuilt: N−q+1, q a majority.", nil, nil)
	unwritableDesc  = prometheus.NewDesc("kvasir_cluster_unwritable_vnodes", "Vnodes with too few live replicas for the namespace's default W.", []string{"namespace"}, nil)
	unreadableDesc  = prometheus.NewDesc("kvasir_cluster_unreadable_vnodes", "Vnodes with too few live replicas for the namespace's default R.", []string{"namespace"}, nil)
)

func (c clusterCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{nodeHealthyDesc, degradedDesc, shortDesc, unwritableDesc, unreadableDesc} {
		out <- d
	}
}

func (c clusterCollector) Collect(out chan<- prometheus.Metric) {
	t := c.machine.topology()
	if t == nil || !t.Formed() {
		return
	}
	gauge := func(d *prometheus.Desc, value int, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
	}
	healthy := make(map[uint64]bool, len(t.Nodes))
	for _, n := range t.Nodes {
		value := 0
		if healthy[n.Incarnation] = c.health.healthy(n.Incarnation); healthy[n.Incarnation] {
			value = 1
		}
		gauge(nodeHealthyDesc, value, n.Name, strconv.FormatUint(n.Incarnation, 10))
	}
	up := func(incarnation uint64) bool { return healthy[incarnation] }
	gauge(degradedDesc, t.Degraded(up))
	short, _ := topology.SortedVnodes(t.Short(up))
	gauge(shortDesc, len(short))
	for i := range t.Namespaces {
		s := t.Service(&t.Namespaces[i], up)
		gauge(unwritableDesc, max(s.NotWritable, s.HeldUp), t.Namespaces[i].Name)
		gauge(unreadableDesc, s.NotReadable, t.Namespaces[i].Name)
	}
}
