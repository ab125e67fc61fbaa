package rpc

import (
	"sync"
	"sync/atomic"
)

// maxIdle is how many goroutines of a pool wait for work.
const maxIdle = 64

// Pool runs functions in goroutines that it keeps for the next ones: a new goroutine has a
// small stack, which grows, by being copied, in every request that it is made for. A nil Pool
// keeps none. It is safe for concurrent use.
type Pool struct {
	work    chan func()
	idle    atomic.Int64
	running sync.WaitGroup
}

// NewPool returns a pool. Close must be called.
func NewPool() *Pool { return &Pool{work: make(chan func())} }

// Go runs f in a goroutine of its own.
func (p *Pool) Go(f func()) {
	if p == nil {
		go f()
		return
	}
	select {
	case p.work <- f:
	default:
		p.running.Go(func() { p.run(f) })
	}
}

// GoFor is Go for a function that a group waits for.
func (p *Pool) GoFor(group *sync.WaitGroup, f func()) {
	group.Add(1)
	p.Go(func() {
		defer group.Done()
		f()
	})
}

func (p *Pool) run(f func()) {
	for ok := true; ok; {
		f()
		if f = nil; p.idle.Add(1) <= maxIdle {
			f, ok = <-p.work
		} else {
			ok = false
		}
		p.idle.Add(-1)
	}
}

// Close ends the goroutines that wait for work, and returns when all have ended.
// REQUIRES: Go is not called any more.
func (p *Pool) Close() {
	close(p.work)
	p.running.Wait()
}
