package replica

import (
	"sync"
	"sync/atomic"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// Fence holds the topology that requests are served by, and knows when the last
// request that began under an older one has ended.
type Fence struct {
	current atomic.Pointer[lease]
	mu      struct {
		sync.Mutex
		old []*lease
		// changed is closed by the next topology.
		changed chan struct{}
	}
}

// lease is a topology with the number of requests that use it.
type lease struct {
	topology *topology.Topology
	users    atomic.Int64
}

// NewFence returns a fence that serves by t.
func NewFence(t *topology.Topology) *Fence {
	f := &Fence{}
	f.mu.changed = make(chan struct{})
	f.current.Store(&lease{topology: t})
	return f
}

// Topology returns the topology that new requests are served by.
func (f *Fence) Topology() *topology.Topology { return f.current.Load().topology }

// Advance makes new requests be served by t. It reports false, and changes nothing,
// unless t is newer.
func (f *Fence) Advance(t *topology.Topology) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	cur := f.current.Load()
	if t.Epoch <= cur.topology.Epoch {
		return false
	}
	f.mu.old = append(f.mu.old, cur)
	f.current.Store(&lease{topology: t})
	close(f.mu.changed)
	f.mu.changed = make(chan struct{})
	return true
}

// Changed returns a channel that is closed when new requests are served by another
// topology than now.
func (f *Fence) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.changed
}

// enter begins a request. The caller must call leave.
func (f *Fence) enter() *lease {
	for {
		l := f.current.Load()
		l.users.Add(1)
		if f.current.Load() == l {
			return l
		}
		// Replaced in between: whoever drains may not have seen this user.
		l.users.Add(-1)
	}
}

func (l *lease) leave() { l.users.Add(-1) }

// Drained returns the greatest epoch such that no request runs under an older one.
func (f *Fence) Drained() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.mu.old) > 0 && f.mu.old[0].users.Load() == 0 {
		f.mu.old = f.mu.old[1:]
	}
	if len(f.mu.old) > 0 {
		return f.mu.old[0].topology.Epoch
	}
	return f.current.Load().topology.Epoch
}
