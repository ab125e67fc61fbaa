package node

import (
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func notServing(reason, name string, s adminv1.NodeStatus_State, why string) *rpc.Error {
	return rpc.Errorf(codes.Unavailable, reason, "node %s is %s: %s", name, stateName(s), why)
}

// describe registers the gauges of a node.
func (n *Node) describe(reg prometheus.Registerer) {
	gauge := func(subsystem, name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "kvasir", Subsystem: subsystem, Name: name, Help: help}, f))
	}
	gauge("node", "serving", "1 while the node serves.", func() float64 {
		if s, _ := n.state(); s == adminv1.NodeStatus_STATE_SERVING {
			return 1
		}
		return 0
	})
	gauge("node", "epoch", "Epoch of the topology in use.", func() float64 { return float64(n.fence.Topology().Epoch) })
	gauge("node", "cpu_utilization_ratio", "Process CPU over its allowance, mean of the last minute.", n.process.cpu)
	gauge("node", "memory_limit_bytes", "Memory that the process may take: of its control group, else of the machine.", func() float64 { return float64(n.process.memoryLimit) })
	gauge("node", "set_aside", "1 while a damaged data directory is set aside until the node has its records again.", func() float64 {
		if storage.HasAside(n.cfg.Seams.FS, n.cfg.DataDir) {
			return 1
		}
		return 0
	})
	gauge("node", "unreachable_peers", "Nodes of the topology that this node does not reach.", func() float64 { return float64(len(n.peers.unreachable())) })
	gauge("node", "replica_calls_pending", "Calls to other replicas without a reply.", func() float64 { return float64(n.peers.pending()) })
	gauge("clock", "offset_seconds", "This clock against the median of its peers.", func() float64 { d, _ := n.clock.Offset(); return d.Seconds() })
	gauge("clock", "lead_seconds", "How far the hybrid clock leads the wall clock.", func() float64 { return float64(n.clock.Lead()) / 1000 })
	n.describeHints(reg)
	reg.MustRegister(useCollector{n})
	n.scrubber.describe(reg)
	reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Namespace: "kvasir", Subsystem: "collect", Name: "refused_calls_total", Help: "Writes and hints that were at or below a promise of this node.",
	}, func() float64 { return float64(n.replica.RefusedBelowPromise()) }))
	gauge("storage", "disk_used_bytes", "Bytes the store takes on disk.", func() float64 { return float64(n.store.Metrics().DiskSpaceUsage()) })
	gauge("storage", "disk_available_bytes", "Free bytes of the store's file system.", func() float64 {
		available, _, err := n.store.DiskUsage()
		if err != nil {
			return 0
		}
		return float64(available)
	})
	gauge("storage", "disk_capacity_bytes", "Size of the store's file system.", func() float64 {
		_, capacity, err := n.store.DiskUsage()
		if err != nil {
			return 0
		}
		return float64(capacity)
	})
	gauge("storage", "refuses_writes", "1 while writes are refused for lack of space.", func() float64 {
		if n.store.RefusesRecords() != "" {
			return 1
		}
		return 0
	})
	reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Namespace: "kvasir", Subsystem: "storage", Name: "stalled_seconds_total", Help: "Time in which no commit was let through because flushes or compactions were behind.",
	}, func() float64 { return n.store.Stalled().Seconds() }))
	gauge("storage", "wal_bytes", "Size of the write-ahead log.", func() float64 { return float64(n.store.Metrics().WAL.Size) })
	gauge("storage", "memtable_bytes", "Size of the memtables.", func() float64 { return float64(n.store.Metrics().MemTable.Size) })
	for source, count := range map[string]func() uint64{
		"cache": func() uint64 { n, _ := n.store.Reads(); return n },
		"store": func() uint64 { _, n := n.store.Reads(); return n },
	} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "storage", Name: "reads_total", Help: "Reads of one record, by where it was: in the cache of records, or the store.",
			ConstLabels: prometheus.Labels{"source": source},
		}, func() float64 { return float64(count()) }))
	}
	gauge("storage", "read_amplification", "Levels a read may look into.", func() float64 { return float64(n.store.Metrics().ReadAmp()) })
	gauge("storage", "compaction_debt_bytes", "Bytes that compactions have yet to move.", func() float64 { return float64(n.store.Metrics().Compact.EstimatedDebt) })
}
