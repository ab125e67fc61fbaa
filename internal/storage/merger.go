package storage

import (
	"fmt"
	"io"
	"slices"

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
		m := &joiner{}
		if err := m.join(value); err != nil {
			return nil, fmt.Errorf("joining records of storage key %x: %w", key, err)
		}
		return m, nil
	},
}

// joiner holds the join of the operands so far. Order does not matter to it.
type joiner struct {
	winner []byte
	rec    record.Record
}

func (m *joiner) join(value []byte) error {
	rec, err := record.Decode(value)
	if err != nil {
		return err
	}
	if m.winner == nil || record.Compare(rec, m.rec) > 0 {
		// The caller keeps value; the winner's memory is reused when it suffices.
		m.winner = append(slices.Grow(m.winner[:0], len(value)), value...)
		m.rec, err = record.Decode(m.winner)
	}
	return err
}

func (m *joiner) MergeNewer(value []byte) error { return m.join(value) }
func (m *joiner) MergeOlder(value []byte) error { return m.join(value) }

func (m *joiner) Finish(bool) ([]byte, io.Closer, error) { return m.winner, nil, nil }
