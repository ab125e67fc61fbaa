package replica

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/storage"
)

const (
	// hintQueue is how many lots of hints may wait to be written on their own.
	hintQueue = 4096
	// hintCommitBytes is the size at which a commit of hints takes no more of them.
	hintCommitBytes = 4 << 20
)

// HintBacklog is what is kept for one target.
type HintBacklog struct {
	Target uint64
	Count  uint64
	Bytes  int64
	// OldestMillis is when the oldest was kept, in milliseconds since 1970.
	OldestMillis int64
}

// Hints keeps records for replicas that could not be reached, within bounds of
// bytes and age. What finds no room is counted and left to repair.
type Hints struct {
	store  *storage.Store
	wall   func() int64
	logger *slog.Logger
	queue  chan []storage.Hint
	mu     struct {
		sync.Mutex
		backlog  map[uint64]*HintBacklog
		bytes    int64
		maxBytes int64
		dropped  uint64
		full     bool
	}
	changed chan struct{}
}

// LoadHints counts the hints that are kept already. Run must be called.
func LoadHints(store *storage.Store, wall func() int64, logger *slog.Logger) (*Hints, error) {
	h := &Hints{store: store, wall: wall, logger: logger, queue: make(chan []storage.Hint, hintQueue), changed: make(chan struct{}, 1)}
	h.mu.backlog = map[uint64]*HintBacklog{}
	err := store.AllHints(func(hint storage.Hint) bool {
		h.add(hint)
		return true
	})
	return h, err
}

// SetMaxBytes bounds the bytes kept for all targets together.
func (h *Hints) SetMaxBytes(n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.maxBytes = n
}

// REQUIRES: h.mu is held, or h is not shared yet.
func (h *Hints) add(hint storage.Hint) {
	b := h.mu.backlog[hint.Target]
	if b == nil {
		b = &HintBacklog{Target: hint.Target, OldestMillis: hint.CreatedMillis}
		h.mu.backlog[hint.Target] = b
	}
	b.Count++
	b.Bytes += hint.SizeBytes()
	h.mu.bytes += hint.SizeBytes()
}

// REQUIRES: h.mu is held.
func (h *Hints) remove(hint storage.Hint) {
	b := h.mu.backlog[hint.Target]
	if b == nil {
		return
	}
	b.Count--
	b.Bytes -= hint.SizeBytes()
	h.mu.bytes -= hint.SizeBytes()
	if b.Count == 0 {
		delete(h.mu.backlog, hint.Target)
	}
}

// Reserve makes hints of writes for a target and takes room for them. It returns
// fewer, or none, when there is no room. Settle must be called with the result.
func (h *Hints) Reserve(target uint64, writes []storage.Write) []storage.Hint {
	now := h.wall()
	out := make([]storage.Hint, 0, len(writes))
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range writes {
		hint := storage.Hint{Target: target, CreatedMillis: now, Write: w}
		if h.mu.bytes+hint.SizeBytes() > h.mu.maxBytes {
			h.drop(1)
			continue
		}
		hint.Seq = h.store.NextHintSeq()
		h.add(hint)
		out = append(out, hint)
	}
	return out
}

// drop counts hints that found no room, and says so once until there is room again.
// REQUIRES: h.mu is held.
func (h *Hints) drop(n int) {
	h.mu.dropped += uint64(n)
	if !h.mu.full {
		h.mu.full = true
		h.logger.Warn("no room for hints: replicas that are down will be mended by reads and repair only",
			"bytes", h.mu.bytes, "max_bytes", h.mu.maxBytes)
	}
}

// Settle says whether reserved hints are on disk. Those that are not give their
// room back.
func (h *Hints) Settle(hints []storage.Hint, kept bool) {
	if len(hints) == 0 {
		return
	}
	if kept {
		select {
		case h.changed <- struct{}{}:
		default:
		}
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, hint := range hints {
		h.remove(hint)
	}
	h.drop(len(hints))
}

// Keep takes room for writes to be kept for a target, and hands them to Run. It does
// not block; it reports false when there is no room for all, or the queue is full,
// and counts those that are not kept.
func (h *Hints) Keep(target uint64, writes []storage.Write) bool {
	hints := h.Reserve(target, writes)
	if len(hints) == 0 {
		return false
	}
	select {
	case h.queue <- hints:
		return len(hints) == len(writes)
	default:
		h.Settle(hints, false)
		return false
	}
}

// Run writes what Keep was given, until ctx ends and the queue is empty.
func (h *Hints) Run(ctx context.Context) error {
	for {
		var hints []storage.Hint
		select {
		case hints = <-h.queue:
		case <-ctx.Done():
			select {
			case hints = <-h.queue:
			default:
				return nil
			}
		}
		// What has gathered meanwhile goes into the same commit.
		size, counted := int64(0), 0
		for more := true; more; {
			for ; counted < len(hints); counted++ {
				size += hints[counted].SizeBytes()
			}
			if size >= hintCommitBytes {
				break
			}
			select {
			case lot := <-h.queue:
				hints = append(hints, lot...)
			default:
				more = false
			}
		}
		c, err := h.store.Apply(nil, hints)
		if err == nil {
			err = c.Wait()
		}
		h.Settle(hints, err == nil)
	}
}

// Changed holds a token when hints have been added.
func (h *Hints) Changed() <-chan struct{} { return h.changed }

// Backlog returns what is kept, by target.
func (h *Hints) Backlog() []HintBacklog {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]HintBacklog, 0, len(h.mu.backlog))
	for _, b := range h.mu.backlog {
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b HintBacklog) int { return cmp.Compare(a.Target, b.Target) })
	return out
}

// Queued returns how many wait to be written on their own.
func (h *Hints) Queued() int { return len(h.queue) }

// Dropped returns how many hints found no room so far.
func (h *Hints) Dropped() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.dropped
}

// Take returns up to limit of a target's hints with numbers above after, oldest
// first.
func (h *Hints) Take(target, after uint64, limit int, limitBytes int64) (hints []storage.Hint, err error) {
	size := int64(0)
	err = h.store.Hints(target, after, func(hint storage.Hint) bool {
		size += hint.SizeBytes()
		if len(hints) > 0 && size > limitBytes {
			return false
		}
		hints = append(hints, hint)
		return len(hints) < limit
	})
	return hints, err
}

// Forget removes hints that were delivered, expired or have no target any more.
func (h *Hints) Forget(hints []storage.Hint) error {
	if err := h.store.DeleteHints(hints); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, hint := range hints {
		h.remove(hint)
		if b := h.mu.backlog[hint.Target]; b != nil {
			b.OldestMillis = max(b.OldestMillis, hint.CreatedMillis)
		}
	}
	h.mu.full = false
	return nil
}

// Expired reports whether a hint is older than maxAge.
func (h *Hints) Expired(hint storage.Hint, maxAge time.Duration) bool {
	return h.wall()-hint.CreatedMillis > maxAge.Milliseconds()
}
