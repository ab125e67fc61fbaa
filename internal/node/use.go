package node

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// use visits what the node is an endpoint of, with about how much it holds of it. What
// it has handed over and not deleted yet is left out.
func (n *Node) use(visit func(storage.Place, storage.Use)) {
	t := n.fence.Topology()
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		for v := range t.Ring {
			if t.Holds(n.id.Incarnation, uint32(v), ns) {
				p := storage.Place{Namespace: ns.ID, Vnode: uint32(v)}
				visit(p, n.store.Use(p))
			}
		}
	}
}

// useCollector tells what a node holds, counted anew for every scrape.
type useCollector struct{ *Node }

var (
	slotsDesc   = prometheus.NewDesc("kvasir_node_slots", "Vnode slots of this node.", nil, nil)
	recordsDesc = prometheus.NewDesc("kvasir_node_records", "Records of the vnodes that this node is an endpoint of, tombstones included, about.", nil, nil)
	bytesDesc   = prometheus.NewDesc("kvasir_node_data_bytes", "Bytes of keys and records of the vnodes that this node is an endpoint of, about.", nil, nil)
)

func (c useCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{slotsDesc, recordsDesc, bytesDesc} {
		out <- d
	}
}

func (c useCollector) Collect(out chan<- prometheus.Metric) {
	var sum storage.Use
	c.use(func(_ storage.Place, u storage.Use) {
		sum.Records += u.Records
		sum.Bytes += u.Bytes
	})
	slots := c.fence.Topology().SlotCounts(quorum.MaxN)[c.id.Incarnation]
	for desc, value := range map[*prometheus.Desc]float64{slotsDesc: float64(slots), recordsDesc: float64(sum.Records), bytesDesc: float64(sum.Bytes)} {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
}
