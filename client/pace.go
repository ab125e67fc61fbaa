package client

import (
	"math"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// link is what the client has of one address.
type link struct {
	*rpc.Link[*kvv1.SessionCall, *kvv1.SessionReply]
	paces [classes]pace
}

// class tells requests apart that take unlike times.
type class int

const (
	unpaced class = iota
	aGet
	aWrite
	classes
)

// pace is how long an address takes to answer: a mean in which an answer counts the more
// the longer ago the last one was. It is forgotten with time, so that an address that was slow
// is tried again (as in the "peak EWMA" of Finagle's load balancer).
type pace struct {
	mu   sync.Mutex
	mean float64 // ns
	at   time.Time
}

// The time constants by which earlier answers count, and what is known is forgotten.
const (
	paceMean   = 250 * time.Millisecond
	paceMemory = 2 * time.Second
)

// paced returns the class, if an answer over the link in its present state tells of the
// address: no connection has to be made first.
func (l *link) paced(c class) class {
	if !l.Up() {
		return unpaced
	}
	return c
}

// note takes in that a request was answered after so long, or is not yet.
func (l *link) note(c class, took time.Duration) {
	if c == unpaced {
		return
	}
	p, now := &l.paces[c], time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mean = float64(took) + (p.mean-float64(took))*math.Exp(-float64(now.Sub(p.at))/float64(paceMean))
	p.at = now
}

// now returns the pace in nanoseconds, 0 when none is known.
func (p *pace) now(now time.Time) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mean == 0 {
		return 0
	}
	return p.mean * math.Exp(-float64(now.Sub(p.at))/float64(paceMemory))
}

// weigh has those candidates that are more than twice as slow as the fastest count as if
// they had as many times more to do.
func weigh(all []candidate) {
	fastest := math.Inf(1)
	for _, c := range all {
		if c.pace > 0 {
			fastest = min(fastest, c.pace)
		}
	}
	for i, c := range all {
		if slow := c.pace / fastest; slow > 2 {
			all[i].load = (c.load + 1) * slow
		}
	}
}
