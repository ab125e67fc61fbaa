package storage

import (
	"sync"
	"time"
)

// stalls is how long commits have waited for flushes or compactions.
type stalls struct {
	mu struct {
		sync.Mutex
		ended time.Duration // of all that have ended
		began time.Time     // of the present one, or zero
	}
}

func (s *stalls) begin(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.began = now
}

func (s *stalls) end(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.ended += now.Sub(s.mu.began)
	s.mu.began = time.Time{}
}

func (s *stalls) total(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.began.IsZero() {
		return s.mu.ended
	}
	return s.mu.ended + now.Sub(s.mu.began)
}

// present returns how long the present stall has lasted, 0 where there is none.
func (s *stalls) present(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.began.IsZero() {
		return 0
	}
	return now.Sub(s.mu.began)
}

// Stalling returns for how long no commit has been let through now because flushes or
// compactions are behind, 0 when they are not.
func (s *Store) Stalling() time.Duration { return s.stalls.present(time.Now()) }

// Stalled returns for how long in all, since the store was opened, no commit was let
// through because flushes or compactions were behind.
func (s *Store) Stalled() time.Duration { return s.stalls.total(time.Now()) }
