package storage

import (
	"sync"
	"time"
)

// Commits count for commitWindow: with less and less weight, then not at all.
const (
	commitWeight = 1.0 / 16
	commitWindow = time.Second
)

// delays is how long commits take.
type delays struct {
	mu struct {
		sync.Mutex
		mean time.Duration // moving, exponential
		last time.Time
	}
}

func (d *delays) note(took time.Duration, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Sub(d.mu.last) > commitWindow {
		d.mu.mean = took
	}
	d.mu.mean += time.Duration(commitWeight * float64(took-d.mu.mean))
	d.mu.last = now
}

// CommitDelay returns how long commits have lately taken from Apply until they were on
// disk: a moving mean of about the last sixteen, 0 where the last second has had none.
func (s *Store) CommitDelay() time.Duration {
	d := &s.delays
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.mu.last) > commitWindow {
		return 0
	}
	return d.mu.mean
}
