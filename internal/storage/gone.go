package storage

import (
	"bytes"
	"context"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvasirdb/kvasir/internal/record"
)

// GoneKeys returns the keys of a vnode in [start, end) whose records its certificate
// lets go, at most limit of them; next is where to look on, or nil. An empty end
// means no end.
func (s *Store) GoneKeys(namespace, vnode uint32, start, end []byte, limit int) (keys [][]byte, next []byte, err error) {
	certificate := s.Collection(namespace, vnode).Certificate
	lower, upper := vnodeRange(namespace, vnode, start, end)
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return nil, nil, readError(err)
	}
	defer it.Close()
	for valid := it.First(); valid; valid = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return nil, nil, readError(err)
		}
		key := it.Key()[recordPrefixLen:]
		rec, err := record.Decode(value)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: record of key %q: %w", ErrCorrupt, key, err)
		}
		if !deadAt(rec, certificate) {
			continue
		}
		if len(keys) == limit {
			return keys, bytes.Clone(key), nil
		}
		keys = append(keys, bytes.Clone(key))
	}
	if err := it.Error(); err != nil {
		return nil, nil, readError(err)
	}
	return keys, nil, nil
}

// Compact rewrites a vnode's records so that what was removed of them leaves the
// disk, which Pebble on its own may put off for ever.
func (s *Store) Compact(ctx context.Context, namespace, vnode uint32) error {
	lower, upper := vnodeRange(namespace, vnode, nil, nil)
	if err := s.db.Compact(ctx, lower, upper, false); err != nil {
		return fmt.Errorf("compact vnode %d of namespace %d: %w", vnode, namespace, err)
	}
	return nil
}
