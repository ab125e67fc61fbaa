package report

import (
	"bytes"
	"slices"
)

// narrow moves the bounds as far as a condition on the key allows.
func (q *Query) narrow(c condition) {
	if q.fields[c.field].source != fromKey {
		return
	}
	key := []byte(c.text)
	after := append(slices.Clone(key), 0)
	switch c.comparison {
	case opEQ:
		q.atLeast(key)
		q.below(after)
	case opGE:
		q.atLeast(key)
	case opGT:
		q.atLeast(after)
	case opLT:
		q.below(key)
	case opLE:
		q.below(after)
	case opPrefix:
		q.within(key)
	}
}

func (q *Query) atLeast(key []byte) {
	if bytes.Compare(key, q.lower) > 0 {
		q.lower = key
	}
}

func (q *Query) below(key []byte) {
	if q.upper == nil || bytes.Compare(key, q.upper) < 0 {
		q.upper = key
	}
}

func (q *Query) within(prefix []byte) {
	q.atLeast(prefix)
	if end := prefixEnd(prefix); end != nil {
		q.below(end)
	}
}

// prefixEnd returns the first key after all keys with a prefix; nil when there is
// none.
func prefixEnd(prefix []byte) []byte {
	end := slices.Clone(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return nil
}
