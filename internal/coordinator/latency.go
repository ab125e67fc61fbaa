package coordinator

import (
	"sync"
	"sync/atomic"
	"time"
)

// Hedging budget: each read earns a twentieth of an extra one.
const (
	hedgeEarn = 1
	hedgeCost = 20
	hedgeMax  = 20 * hedgeCost
)

// unknownLate is after how long a node's answer is late of which nothing is known
// yet.
const unknownLate = 50 * time.Millisecond

// latencies estimates how long replicas take to answer reads, as TCP estimates
// round trips (Jacobson, "Congestion avoidance and control", 1988), and keeps the
// budget for asking another one.
type latencies struct {
	nodes  sync.Map // incarnation → *estimate
	budget atomic.Int64
}

type estimate struct {
	mu              sync.Mutex
	mean, deviation time.Duration
}

func (l *latencies) of(node uint64) *estimate {
	if e, ok := l.nodes.Load(node); ok {
		return e.(*estimate)
	}
	e, _ := l.nodes.LoadOrStore(node, &estimate{})
	return e.(*estimate)
}

func (l *latencies) observe(node uint64, took time.Duration) {
	e := l.of(node)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mean == 0 {
		e.mean, e.deviation = took, took/2
		return
	}
	diff := took - e.mean
	e.mean += diff / 8
	e.deviation += (diff.Abs() - e.deviation) / 4
}

// typical returns a node's mean, zero when nothing is known of it.
func (l *latencies) typical(node uint64) time.Duration {
	e := l.of(node)
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mean
}

// late returns after how long a node's answer is late: about its 95th percentile.
func (l *latencies) late(node uint64) time.Duration {
	e := l.of(node)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mean == 0 {
		return unknownLate
	}
	return max(e.mean+4*e.deviation, time.Millisecond)
}

func (l *latencies) earn() {
	if l.budget.Load() < hedgeMax {
		l.budget.Add(hedgeEarn)
	}
}

// spend takes an extra read from the budget, if there is one.
func (l *latencies) spend() bool {
	for {
		b := l.budget.Load()
		if b < hedgeCost {
			return false
		}
		if l.budget.CompareAndSwap(b, b-hedgeCost) {
			return true
		}
	}
}
