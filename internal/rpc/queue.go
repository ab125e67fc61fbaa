package rpc

import (
	"runtime"
	"sync"
)

// Limits of one frame. The first item always fits.
const (
	maxFrameItems = 256
	maxFrameBytes = 1 << 20
)

// queue gathers items for one sender. While the sender is busy with a frame, the
// next one grows; that is all the batching there is, and it needs no timer.
type queue[T any] struct {
	mu struct {
		sync.Mutex
		items  []T
		closed bool
	}
	// wake holds a token when there may be items.
	wake chan struct{}
}

func newQueue[T any]() *queue[T] { return &queue[T]{wake: make(chan struct{}, 1)} }

// push appends an item and wakes the sender; it reports false when the queue is closed. The
// bound on its length is the caller's, who knows what is outstanding in all.
func (q *queue[T]) push(item T) bool {
	first, ok := q.add(item)
	if first {
		signal(q.wake)
	}
	return ok
}

// add is push for a caller that sends the item itself, or wakes the sender. first is
// whether nothing waited.
func (q *queue[T]) add(item T) (first, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.closed {
		return false, false
	}
	q.mu.items = append(q.mu.items, item)
	return len(q.mu.items) == 1, true
}

// turn is a lock that is held while something is sent, which may take long: the simulation's
// clock goes on while a channel is waited for, and stands still for a mutex.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take() { t <- struct{}{} }
func (t turn) give() { <-t }

// tryTake takes it if nobody has it.
func (t turn) tryTake() bool {
	select {
	case t <- struct{}{}:
		return true
	default:
		return false
	}
}

// signal puts a token into a channel that holds one, unless it is there.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// take returns up to one frame of items, after letting other goroutines that are
// about to push run first. It returns nil when woken without items.
func (q *queue[T]) take(size func(T) int) []T {
	// One yield before draining multiplies the items per frame under load and costs
	// nothing when alone.
	runtime.Gosched()
	q.mu.Lock()
	defer q.mu.Unlock()
	n, bytes := 0, 0
	for n < len(q.mu.items) && n < maxFrameItems {
		bytes += size(q.mu.items[n])
		if n > 0 && bytes > maxFrameBytes {
			break
		}
		n++
	}
	frame := q.mu.items[:n:n]
	if rest := q.mu.items[n:]; len(rest) > 0 {
		q.mu.items = rest
		signal(q.wake)
	} else {
		q.mu.items = nil
	}
	return frame
}

// close refuses further items and returns those that are left.
func (q *queue[T]) close() []T {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.closed = true
	rest := q.mu.items
	q.mu.items = nil
	return rest
}
