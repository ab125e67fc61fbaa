package replica

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// HintBounds bound what is kept for all targets together.
type HintBounds struct {
	Bytes int64
	Count uint64
	Age   time.Duration
}

// HintBacklog is what is kept for one target.
type HintBacklog struct {
	Target uint64
	Count  uint64
	Bytes  int64
	// OldestMillis is a time, in milliseconds since 1970, before which none was kept.
	OldestMillis int64
}

// HintGroup is what is kept for one target of one vnode.
type HintGroup struct {
	HintBacklog
	storage.Place
}

// HintLoss is why a hint was not delivered.
type HintLoss int

// The reasons for which hints are lost. Up to LossRefused the target still has to
// have the record: its vnode is marked dirty.
const (
	LossBytes        HintLoss = iota // HintBounds.Bytes was reached
	LossCount                        // HintBounds.Count was reached
	LossQueue                        // too many waited to be written
	LossDisk                         // the disk did not take it
	LossExpired                      // it was older than HintBounds.Age
	LossBelowPromise                 // its target has promised to take nothing so old
	LossRefused                      // its target cannot read it
	LossNotOwner                     // its target is no owner of the vnode any more
	LossNamespace                    // the namespace was dropped
	hintLosses
)

// String returns the reason as metrics name it.
func (l HintLoss) String() string {
	return [hintLosses]string{"bytes", "count", "queue", "disk", "expired", "below_promise", "refused", "not_owner", "namespace_dropped"}[l]
}

// HintLosses returns all reasons.
func HintLosses() (out []HintLoss) {
	for l := range hintLosses {
		out = append(out, l)
	}
	return out
}

// Hints keeps records for replicas that could not be reached, within bounds of
// bytes, count and age.
//
// Invariant 15: a hint that finds no room, or is given up although its target needs
// it, leaves the mark of a dirty vnode, which is on disk before the hint is gone and
// before whoever wanted it kept forgets the write.
type Hints struct {
	store  *storage.Store
	wall   func() int64
	logger *slog.Logger
	wake   chan struct{} // holds a token when there is something to write
	mu     struct {
		sync.Mutex
		groups    map[hintPlace]*HintGroup
		bounds    HintBounds
		bytes     int64
		count     uint64
		kept      uint64
		delivered uint64
		losses    [hintLosses]uint64
		full      bool
		queue     hintQueue
	}
}

type hintPlace struct {
	target uint64
	storage.Place
}

func placeOf(w storage.Write) storage.Place {
	return storage.Place{Namespace: w.Namespace, Vnode: w.Vnode}
}

// LoadHints counts the hints that are kept already. Run must be called.
func LoadHints(store *storage.Store, wall func() int64, logger *slog.Logger) (*Hints, error) {
	h := &Hints{store: store, wall: wall, logger: logger, wake: make(chan struct{}, 1)}
	h.mu.groups = map[hintPlace]*HintGroup{}
	err := store.AllHints(func(hint storage.Hint) bool {
		if mutant.On("hint-lost-at-restart") {
			return false
		}
		h.add(hint)
		return true
	})
	return h, err
}

// SetBounds sets the bounds. What is kept beyond them stays, nothing is added.
func (h *Hints) SetBounds(b HintBounds) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.bounds = b
}

// Bounds returns what SetBounds set.
func (h *Hints) Bounds() HintBounds {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.bounds
}

// REQUIRES: h.mu is held, or h is not shared yet.
func (h *Hints) add(hint storage.Hint) {
	p := hintPlace{hint.Target, placeOf(hint.Write)}
	g := h.mu.groups[p]
	if g == nil {
		g = &HintGroup{Place: p.Place, HintBacklog: HintBacklog{Target: hint.Target, OldestMillis: hint.CreatedMillis}}
		h.mu.groups[p] = g
	}
	g.Count++
	g.Bytes += hint.SizeBytes()
	h.mu.count++
	h.mu.bytes += hint.SizeBytes()
}

// remove takes hints out of the accounts. Those of a group leave in the order in
// which they came.
// REQUIRES: h.mu is held.
func (h *Hints) remove(hints []storage.Hint) {
	for _, hint := range hints {
		p := hintPlace{hint.Target, placeOf(hint.Write)}
		g := h.mu.groups[p]
		if g == nil {
			continue
		}
		g.Count--
		g.Bytes -= hint.SizeBytes()
		h.mu.count--
		h.mu.bytes -= hint.SizeBytes()
		if g.Count == 0 {
			delete(h.mu.groups, p)
		}
	}
}

// Reserve makes hints of writes for a target and takes room for them. Settle must be
// called with the hints. Places of writes that found no room are lost: the caller
// marks them dirty before it forgets the writes.
func (h *Hints) Reserve(target uint64, writes []storage.Write) (hints []storage.Hint, lost []storage.Place) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reserve(target, writes)
}

// REQUIRES: h.mu is held.
func (h *Hints) reserve(target uint64, writes []storage.Write) (hints []storage.Hint, lost []storage.Place) {
	now := h.wall()
	hints = make([]storage.Hint, 0, len(writes))
	for _, w := range writes {
		hint := storage.Hint{Target: target, CreatedMillis: now, Write: w}
		switch {
		case h.mu.bytes+hint.SizeBytes() > h.mu.bounds.Bytes:
			lost = h.lose(LossBytes, lost, hint)
		case h.mu.count >= h.mu.bounds.Count:
			lost = h.lose(LossCount, lost, hint)
		default:
			hint.Seq = h.store.NextHintSeq()
			h.add(hint)
			hints = append(hints, hint)
		}
	}
	return hints, lost
}

// lose counts hints that are not kept, adds their places to lost, and says so once
// until there is room again.
// REQUIRES: h.mu is held.
func (h *Hints) lose(why HintLoss, lost []storage.Place, hints ...storage.Hint) []storage.Place {
	h.mu.losses[why] += uint64(len(hints))
	for _, hint := range hints {
		if p := placeOf(hint.Write); !slices.Contains(lost, p) {
			lost = append(lost, p)
		}
	}
	if !h.mu.full {
		h.mu.full = true
		h.logger.Warn("hints find no room: replicas that are down will be mended by reads and repair only",
			"bound", why, "bytes", h.mu.bytes, "max_bytes", h.mu.bounds.Bytes, "count", h.mu.count, "max_count", h.mu.bounds.Count)
	}
	return lost
}

// Settle says whether reserved hints are on disk. Those that are not give their
// room back; whoever wanted them kept has to look after them.
func (h *Hints) Settle(hints []storage.Hint, kept bool) {
	if len(hints) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if kept {
		h.mu.kept += uint64(len(hints))
	} else {
		h.remove(hints)
	}
}

// Take returns up to limit of a target's hints with numbers above after, oldest
// first, and no more than limitBytes of them unless the first is larger.
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

// Forget removes hints that their target has on disk.
func (h *Hints) Forget(hints []storage.Hint) error {
	if err := h.store.DeleteHints(hints); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.delivered += uint64(len(hints))
	h.forgotten(hints)
	return nil
}

// Discard removes hints that will not be delivered.
func (h *Hints) Discard(why HintLoss, hints []storage.Hint) error {
	var err error
	if why <= LossRefused {
		err = h.store.DropHints(hints, h.wall())
	} else {
		err = h.store.DeleteHints(hints)
	}
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.losses[why] += uint64(len(hints))
	h.forgotten(hints)
	return nil
}

// REQUIRES: h.mu is held.
func (h *Hints) forgotten(hints []storage.Hint) {
	h.remove(hints)
	for _, hint := range hints {
		if g := h.mu.groups[hintPlace{hint.Target, placeOf(hint.Write)}]; g != nil {
			g.OldestMillis = max(g.OldestMillis, hint.CreatedMillis)
		}
	}
	h.mu.full = false
}

// Expired reports whether a hint is older than its age may be.
func (h *Hints) Expired(hint storage.Hint) bool {
	return h.wall()-hint.CreatedMillis > h.Bounds().Age.Milliseconds()
}

// Groups returns what is kept, by target, namespace and vnode.
func (h *Hints) Groups() []HintGroup {
	h.mu.Lock()
	out := make([]HintGroup, 0, len(h.mu.groups))
	for _, g := range h.mu.groups {
		out = append(out, *g)
	}
	h.mu.Unlock()
	slices.SortFunc(out, func(a, b HintGroup) int {
		return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Vnode, b.Vnode))
	})
	return out
}

// Backlog returns what is kept, by target.
func (h *Hints) Backlog() (out []HintBacklog) {
	for _, g := range h.Groups() {
		if n := len(out); n == 0 || out[n-1].Target != g.Target {
			out = append(out, g.HintBacklog)
			continue
		}
		b := &out[len(out)-1]
		b.Count += g.Count
		b.Bytes += g.Bytes
		b.OldestMillis = min(b.OldestMillis, g.OldestMillis)
	}
	return out
}

// HintTotals are sums over all targets: what is kept now, and what became of hints
// since the process started.
type HintTotals struct {
	Count           uint64
	Bytes           int64
	Kept, Delivered uint64
	Lost            [hintLosses]uint64 // by HintLoss
}

// Totals returns the sums.
func (h *Hints) Totals() HintTotals {
	h.mu.Lock()
	defer h.mu.Unlock()
	return HintTotals{Count: h.mu.count, Bytes: h.mu.bytes, Kept: h.mu.kept, Delivered: h.mu.delivered, Lost: h.mu.losses}
}

// Dropped returns how many hints were not kept.
func (t HintTotals) Dropped() uint64 {
	return t.Lost[LossBytes] + t.Lost[LossCount] + t.Lost[LossQueue] + t.Lost[LossDisk]
}
