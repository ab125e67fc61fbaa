package coordinator

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// maxTraces is how many timelines are kept for those who ask late, maxTraceWait how
// long a request for one may wait, maxTraceEvents how long one gets.
const (
	maxTraces      = 256
	maxTraceWait   = 5 * time.Second
	maxTraceEvents = 1000
)

// trace is the timeline of one request. A nil trace takes no notice.
type trace struct {
	id    uint64
	start time.Time
	done  chan struct{} // closed when all replicas are accounted for
	mu    struct {
		sync.Mutex
		events   []*kvv1.TraceEvent
		finished bool
	}
}

// traces keeps the newest timelines.
type traces struct {
	mu    sync.Mutex
	byID  map[uint64]*trace
	order []uint64
}

// begin returns a new trace, or nil when none is wanted.
func (t *traces) begin(wanted bool, start time.Time) *trace {
	if !wanted {
		return nil
	}
	tr := &trace{id: rand.Uint64() | 1, start: start, done: make(chan struct{})}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byID[tr.id] = tr
	if t.order = append(t.order, tr.id); len(t.order) > maxTraces {
		delete(t.byID, t.order[0])
		t.order = t.order[1:]
	}
	return tr
}

func (t *traces) get(id uint64) *trace {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

func (tr *trace) identifier() uint64 {
	if tr == nil {
		return 0
	}
	return tr.id
}

// mark returns an error that leads to the trace of its request.
func (tr *trace) mark(e *rpc.Error) *rpc.Error {
	if tr == nil {
		return e
	}
	return e.With(rpc.DetailTrace, tr.id)
}

// add notes an event. Callers that have to work for the text look whether the trace is nil
// before that.
func (tr *trace) add(kind kvv1.TraceEvent_Kind, node, format string, args ...any) {
	if tr == nil {
		return
	}
	at := time.Since(tr.start)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if len(tr.mu.events) < maxTraceEvents {
		tr.mu.events = append(tr.mu.events, &kvv1.TraceEvent{
			AtUs: uint64(at.Microseconds()), Kind: kind, Node: node, Detail: fmt.Sprintf(format, args...),
		})
	}
}

// finish says that every replica is accounted for.
func (tr *trace) finish() {
	if tr == nil {
		return
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if !tr.mu.finished {
		tr.mu.finished = true
		close(tr.done)
	}
}

func (tr *trace) snapshot() (events []*kvv1.TraceEvent, complete bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return append([]*kvv1.TraceEvent(nil), tr.mu.events...), tr.mu.finished
}
