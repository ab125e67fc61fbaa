package node

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/replica"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// load returns how much of what this node lets its clients ask for at once is used,
// 0 to 1.
func (n *Node) load() float64 {
	f := n.coordinator.InFlight()
	return max(float64(f.Requests)/float64(f.MaxRequests), float64(f.WriteBytes)/float64(f.MaxWriteBytes))
}

// listHints describes what this node keeps for a target, or for all when it is 0.
func (n *Node) listHints(target uint64) *adminv1.ListHintsResponse {
	t := n.fence.Topology()
	bounds, totals := n.hints.Bounds(), n.hints.Totals()
	resp := &adminv1.ListHintsResponse{
		Bytes: uint64(totals.Bytes), MaxBytes: uint64(bounds.Bytes), MaxCount: bounds.Count, MaxAgeMs: uint64(bounds.Age.Milliseconds()),
		Dropped: totals.Dropped(), Expired: totals.Lost[replica.LossExpired], Count: totals.Count, SampledAtMs: uint64(n.clock.Wall()),
	}
	for _, g := range n.hints.Groups() {
		if target != 0 && g.Target != target {
			continue
		}
		name := ""
		if ns := t.NamespaceByID(g.Namespace); ns != nil {
			name = ns.Name
		}
		resp.Groups = append(resp.Groups, &adminv1.HintGroup{
			Target: g.Target, Namespace: name, Vnode: g.Vnode, Count: g.Count, Bytes: uint64(g.Bytes), OldestMs: uint64(g.OldestMillis),
		})
	}
	return resp
}

// describeHints registers what is known of hints: those kept for others, and those
// taken from others.
func (n *Node) describeHints(reg prometheus.Registerer) {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "kvasir", Subsystem: "hints", Name: name, Help: help}
	}
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts(name, help)), f))
	}
	counter := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts(opts(name, help)), f))
	}
	gauge("pending", "Hints kept for replicas that could not be reached.", func() float64 { return float64(n.hints.Totals().Count) })
	gauge("pending_bytes", "Bytes of the hints kept.", func() float64 { return float64(n.hints.Totals().Bytes) })
	gauge("limit_bytes", "Bytes of hints that are kept at most.", func() float64 { return float64(n.hints.Bounds().Bytes) })
	gauge("queued", "Lots of hints that wait to be written.", func() float64 { return float64(n.hints.Queued()) })
	counter("kept_total", "Hints that were written to disk.", func() float64 { return float64(n.hints.Totals().Kept) })
	counter("delivered_total", "Hints that their target has taken.", func() float64 { return float64(n.hints.Totals().Delivered) })
	for _, why := range replica.HintLosses() {
		o := prometheus.CounterOpts(opts("lost_total", "Hints that were not kept or given up, by reason."))
		o.ConstLabels = prometheus.Labels{"reason": why.String()}
		reg.MustRegister(prometheus.NewCounterFunc(o, func() float64 { return float64(n.hints.Totals().Lost[why]) }))
	}
	gauge("credit_bytes", "What the targets that get hints now would take in a second.", func() float64 { return float64(n.replayer.Credits()) })
	gauge("granted_bytes", "The credit that this node gave last to one that brought it hints.", func() float64 {
		_, granted := n.replica.HintIntake()
		return float64(granted)
	})
	counter("taken_bytes_total", "Bytes of hints that others have brought.", func() float64 {
		taken, _ := n.replica.HintIntake()
		return float64(taken)
	})
	gauge("dirty_vnodes", "Vnodes that repair has to compare because hints for them were lost.", func() float64 { return float64(len(n.store.Dirty())) })
}
