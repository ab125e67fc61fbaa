package storage

import (
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/record"
)

// mergerName is stored in every table; Pebble refuses tables of another one.
const mergerName = "kvasir.join.v1"

// joinMerger makes Pebble's merge the join of records, so that no order of
// delivery, flush or compaction can lose the greater one.
var joinMerger = &pebble.Merger{
	Name: mergerName,
	Merge: func(key, value []byte) (pebble.ValueMerger, error) {
		m := joiners.Get().(*joiner)
		if err := m.join(value); err != nil {
			m.Close()
			return nil, fmt.Errorf("joining records of storage key %x: %w", key, err)
		}
		return m, nil
	},
}

// joiners are used again: a scan needs one for each record that was written lately.
var joiners = sync.Pool{New: func() any { return &joiner{} }}

// maxKeptWinner bounds the memory that a joiner keeps for its next use.
const maxKeptWinner = 64 << 10

// joiner holds the join of the operands so far. Order does not matter to it.
type joiner struct {
	winner []byte
	rec    record.Record
	holds  bool // there was an operand
}

func (m *joiner) join(value []byte) error {
	rec, err := record.Decode(value)
	if err != nil {
		return err
	}
	if !m.holds || record.Compare(rec, m.rec) > 0 {
		// The caller keeps value; the winner's memory is reused when it suffices.
		m.winner = append(m.winner[:0], value...)
		m.holds = true
		m.rec, err = record.Decode(m.winner)
	}
	return err
}

func (m *joiner) MergeNewer(value []byte) error { return m.join(value) }
func (m *joiner) MergeOlder(value []byte) error { return m.join(value) }

// Finish returns the join, which is valid until Close.
func (m *joiner) Finish(bool) ([]byte, io.Closer, error) { return m.winner, m, nil }

// Close gives the joiner, and the memory of its result, to another join.
func (m *joiner) Close() error {
	kept := m.winner[:0]
	if cap(kept) > maxKeptWinner {
		kept = nil
	}
	*m = joiner{winner: kept}
	joiners.Put(m)
	return nil
}
