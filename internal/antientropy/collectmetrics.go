package antientropy

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/storage"
)

// collectMetrics count what collecting dead records has come to.
type collectMetrics struct {
	certificates, compactions prometheus.Counter
	void                      *prometheus.CounterVec
}

func newCollectMetrics(r prometheus.Registerer, store *storage.Store) collectMetrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "kvasir", Subsystem: "collect", Name: name, Help: help}
	}
	m := collectMetrics{
		certificates: prometheus.NewCounter(opts("certificates_total", "Certificates that this node has issued as a leader.")),
		compactions:  prometheus.NewCounter(opts("compactions_total", "Vnodes compacted because much was removed from them.")),
		void:         prometheus.NewCounterVec(opts("void_rounds_total", "Rounds that came to no certificate, by reason."), []string{"reason"}),
	}
	r.MustRegister(m.certificates, m.compactions, m.void,
		prometheus.NewCounterFunc(opts("removed_records_total", "Dead records removed from this node's disk."),
			func() float64 { return float64(store.Removals().Removed) }),
		prometheus.NewCounterFunc(opts("skipped_records_total", "Late repairs that brought what had been removed already."),
			func() float64 { return float64(store.Removals().Skipped) }))
	return m
}
