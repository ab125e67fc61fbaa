package replica

import (
	"context"

	"github.com/kvasirdb/kvasir/internal/storage"
)

const (
	// hintQueueLots is how many lots of hints may wait to be written on their own. Past
	// it their vnodes are marked dirty in their place.
	hintQueueLots = 4096
	// hintCommitBytes is the size at which a commit of hints takes no more of them.
	hintCommitBytes = 4 << 20
)

// hintQueue holds what Run has to write, in order. Lots beyond hintQueueLots hold
// marks only; as many of them wait as there are writes that wait for their done.
type hintQueue struct {
	lots []hintLot
	full int // lots with hints
}

// hintLot is what one call of Keep left to be written.
type hintLot struct {
	hints []storage.Hint
	lost  []storage.Place
	done  func(kept bool)
}

// Keep has writes kept for a target, in a commit of their own. It does not block.
// done is called by Run, and must not block, once the hints, or the marks in place of
// those that are not kept, are on disk; it is told whether all are kept.
func (h *Hints) Keep(target uint64, writes []storage.Write, done func(kept bool)) {
	h.mu.Lock()
	lot := hintLot{done: done}
	lot.hints, lot.lost = h.reserve(target, writes)
	q := &h.mu.queue
	if len(lot.hints) > 0 && q.full >= hintQueueLots {
		h.remove(lot.hints)
		lot.lost = h.lose(LossQueue, lot.lost, lot.hints...)
		lot.hints = nil
	}
	if len(lot.hints) > 0 {
		q.full++
	}
	q.lots = append(q.lots, lot)
	h.mu.Unlock()
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// Run writes what Keep was given, until ctx ends and nothing is left to write.
func (h *Hints) Run(ctx context.Context) error {
	for {
		if lots := h.next(); len(lots) > 0 {
			h.write(lots)
			continue
		}
		select {
		case <-h.wake:
		case <-ctx.Done():
			if h.Queued() == 0 {
				return nil
			}
		}
	}
}

// next takes from the queue what goes into one commit.
func (h *Hints) next() []hintLot {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := &h.mu.queue
	n, size := 0, int64(0)
	for ; n < len(q.lots) && size < hintCommitBytes; n++ {
		for _, hint := range q.lots[n].hints {
			size += hint.SizeBytes()
		}
		if len(q.lots[n].hints) > 0 {
			q.full--
		}
	}
	lots := q.lots[:n:n]
	if q.lots = q.lots[n:]; len(q.lots) == 0 {
		q.lots = nil
	}
	return lots
}

// write makes lots durable and tells those who wait for them. Hints that the disk
// does not take are lost; marks are small, and taken as long as anything is.
func (h *Hints) write(lots []hintLot) {
	var hints []storage.Hint
	var lost []storage.Place
	for _, l := range lots {
		hints = append(hints, l.hints...)
		lost = append(lost, l.lost...)
	}
	var err error
	if len(hints) > 0 {
		if err = h.commit(hints); err != nil {
			h.mu.Lock()
			lost = h.lose(LossDisk, lost, hints...)
			h.mu.Unlock()
		}
		h.Settle(hints, err == nil)
	}
	if len(lost) > 0 {
		if err := h.store.MarkDirty(h.wall(), lost...); err != nil {
			h.logger.Error("cannot note that vnodes are dirty", "err", err)
		}
	}
	for _, l := range lots {
		l.done(len(l.lost) == 0 && (len(l.hints) == 0 || err == nil))
	}
}

func (h *Hints) commit(hints []storage.Hint) error {
	c, err := h.store.Apply(nil, hints)
	if err != nil {
		return err
	}
	return c.Wait()
}

// Queued returns how many lots wait to be written on their own.
func (h *Hints) Queued() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.mu.queue.lots)
}
