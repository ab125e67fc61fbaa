package storage

import (
	"bytes"
	"cmp"
	"context"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// scheduler is Pebble's own, one compaction at a time, but that the next one waits after
// one that found damage or no space: Pebble begins what failed anew at once.
type scheduler struct {
	*pebble.ConcurrencyLimitScheduler
	pause func()
}

func newScheduler(pause func()) scheduler {
	// What it would look for in periods is a change of how many may run at once.
	return scheduler{pebble.NewConcurrencyLimitSchedulerWithNoPeriodicGrantingForTest(), pause}
}

func (s scheduler) Register(goroutines int, db pebble.DBForCompaction) {
	s.ConcurrencyLimitScheduler.Register(goroutines, scheduled{db, s.pause})
}

func (s scheduler) TrySchedule() (bool, pebble.CompactionGrantHandle) {
	ok, h := s.ConcurrencyLimitScheduler.TrySchedule()
	return ok, grant{h, s.pause}
}

// scheduled is what the scheduler sees of Pebble.
type scheduled struct {
	pebble.DBForCompaction
	pause func()
}

func (s scheduled) Schedule(h pebble.CompactionGrantHandle) bool {
	return s.DBForCompaction.Schedule(grant{h, s.pause})
}

// grant lets one compaction run.
type grant struct {
	pebble.CompactionGrantHandle
	pause func()
}

// Done is called after a compaction, by a goroutine that holds no lock.
func (g grant) Done() {
	g.pause()
	g.CompactionGrantHandle.Done()
}

// rewrite has a table written anew, whatever its level, and returns an error if it is
// still there after that. It gives way where another compaction meets damage, which
// Pebble would try before this one, again and again.
func (s *Store) rewrite(ctx context.Context, info *pebble.SSTableInfo) error {
	select {
	case s.rewriting <- struct{}{}:
		defer func() { <-s.rewriting }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s.stopRewrite.Store(&stop)
	lower, upper := info.Smallest.UserKey, append(bytes.Clone(info.Largest.UserKey), 0)
	// Pebble leaves a table of the last level alone that nothing lies above. So something
	// does: a deletion of range keys, of which there are none.
	if err := s.commit(func() error { return s.db.RangeKeyDelete(lower, upper, pebble.NoSync) }); err != nil {
		return err
	}
	if err := s.db.Compact(ctx, lower, upper, false); err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	if s.live(info) {
		return fmt.Errorf("table %s is not written anew by a compaction", info.FileNum)
	}
	return nil
}

// live reports whether a table, or this part of one, still belongs to the store.
func (s *Store) live(info *pebble.SSTableInfo) bool {
	levels, err := s.db.SSTables()
	if err != nil {
		return true
	}
	for _, level := range levels {
		for i := range level {
			if level[i].FileNum == info.FileNum {
				return true
			}
		}
	}
	return false
}
