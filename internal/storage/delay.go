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

// syncing notes that a commit's sync begins.
func (s *Store) syncing(c *Commit) {
	s.inflight.Lock()
	defer s.inflight.Unlock()
	if _, ok := s.inflight.commits[c]; ok {
		s.inflight.commits[c] = time.Now()
	}
}

// OldestSync returns for how long the oldest sync under way has been, 0 where none is:
// of commits, and of the mark. Commits that wait for flushes and compactions are not
// looked at: a disk that is slow still finishes its syncs. It never waits for the disk.
func (s *Store) OldestSync() time.Duration {
	now := time.Now()
	oldest := now
	if began := s.mark.writing.Load(); began != nil {
		oldest = *began
	}
	s.inflight.Lock()
	defer s.inflight.Unlock()
	for _, began := range s.inflight.commits {
		if !began.IsZero() && began.Before(oldest) {
			oldest = began
		}
	}
	return now.Sub(oldest)
}
