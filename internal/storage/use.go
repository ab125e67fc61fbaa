package storage

import "github.com/cockroachdb/pebble/v2"

// Use is about how much a place holds.
type Use struct {
	// Records counts tombstones too; Bytes are of keys and encoded records.
	Records, Bytes uint64
}

// useSample is how many records of a place are read at most to tell what it holds.
const useSample = 64

// Use returns about how much a place holds, at a cost that does not grow with it: what
// its hash tree has counted, which may lack what was written since, or else what a few
// of its records and the space of its tables tell. A place that cannot be read counts
// with what was.
func (s *Store) Use(p Place) Use {
	if t := s.trees.of(vnodeID{p.Namespace, p.Vnode}); t != nil {
		if u, ok := t.use(); ok {
			return u
		}
	}
	sample, all := s.sample(p)
	if all || sample.Bytes == 0 {
		return sample
	}
	lower, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
	disk, err := s.db.EstimateDiskUsage(lower, upper)
	if err != nil || disk <= sample.Bytes {
		return sample
	}
	return Use{Records: uint64(float64(disk) / float64(sample.Bytes) * float64(sample.Records)), Bytes: disk}
}

// use returns what a tree has counted, and whether it has counted all leaves at some
// time.
func (t *tree) use() (u Use, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.mu.leaves {
		l := &t.mu.leaves[i]
		if l.dirty && l.records == 0 {
			return Use{}, false
		}
		u.Records += uint64(l.records)
		u.Bytes += l.bytes
	}
	return u, true
}

// sample counts the first records of a place, and reports whether those are all.
func (s *Store) sample(p Place) (u Use, all bool) {
	lower, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return u, true
	}
	defer it.Close()
	for valid := it.First(); valid; valid = it.Next() {
		if u.Records == useSample {
			return u, false
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return u, false
		}
		u.Records++
		u.Bytes += uint64(len(it.Key()) - recordPrefixLen + len(value))
	}
	return u, it.Error() == nil
}
