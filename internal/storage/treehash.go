package storage

import (
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// leafHasher makes leaves from records in order of their keys.
type leafHasher struct {
	certificate hlc.Timestamp
	// from is where the first leaf begins, if that key is there.
	from    string
	leaves  []leaf
	sum     hash.Hash
	scratch []byte
	bytes   uint64
}

// add takes the next record. One that the certificate lets go neither counts nor
// begins a leaf, as if it had been removed.
func (h *leafHasher) add(key, encoded []byte) error {
	h.bytes += uint64(len(key) + len(encoded))
	rec, err := record.Decode(encoded)
	if err != nil {
		return fmt.Errorf("%w: record of key %q: %w", ErrCorrupt, key, err)
	}
	l := &h.leaves[len(h.leaves)-1]
	at, dies := DeadAt(rec)
	if dies && at <= h.certificate {
		l.gone++
		return nil
	}
	if begins, _ := startsLeaf(key); begins {
		if string(key) != h.from {
			h.end()
			h.leaves = append(h.leaves, leaf{})
			l = &h.leaves[len(h.leaves)-1]
		}
		l.start = string(key)
	}
	l.records++
	l.bytes += uint64(len(key) + len(encoded))
	if dies {
		if l.dead == 0 || at < l.oldestDead {
			l.oldestDead = at
		}
		l.dead++
	}
	h.scratch = binary.AppendUvarint(h.scratch[:0], uint64(len(key)))
	h.scratch = append(h.scratch, key...)
	h.scratch = binary.AppendUvarint(h.scratch, uint64(len(encoded)))
	h.sum.Write(h.scratch)
	h.sum.Write(encoded)
	return nil
}

// end closes the last leaf.
func (h *leafHasher) end() {
	l := &h.leaves[len(h.leaves)-1]
	if l.records > 0 {
		l.hash = TreeHash(h.sum.Sum(nil)[:16])
	}
	h.sum.Reset()
}
