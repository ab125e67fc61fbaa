package antientropy

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/storage"
)

type metrics struct {
	passes, failed, sent, received, foreign prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, store *storage.Store) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvasir", Subsystem: "repair", Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "repair", Name: "tree_read_bytes_total", Help: "Bytes of records read to hash them.",
		}, func() float64 { return float64(store.TreeBytesRead()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "kvasir", Subsystem: "repair", Name: "tree_leaves", Help: "Leaves of hash trees in memory.",
		}, func() float64 { leaves, _ := store.TreeStats(); return float64(leaves) }),
	)
	return &metrics{
		passes:   counter("passes_total", "Comparisons of a vnode with all its replicas."),
		failed:   counter("failures_total", "Comparisons of two replicas that failed."),
		sent:     counter("sent_records_total", "Records that replicas lacked and were sent."),
		received: counter("received_records_total", "Records that this node lacked and has fetched."),
		foreign:  counter("foreign_marks_total", "Dirty marks of vnodes that this node holds no replica of."),
	}
}
