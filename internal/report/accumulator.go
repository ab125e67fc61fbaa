package report

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/kvasirdb/kvasir/internal/record"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// ErrTooLarge marks a report whose groups do not fit into the memory it may take.
var ErrTooLarge = errors.New("report is too large")

// The texts of an accumulator, which are the values of its groups, minima and maxima,
// take at most so many bytes a group, or minTextBytes if that is more.
const (
	textBytesPerGroup = 1 << 10
	minTextBytes      = 16 << 20
)

// Accumulator gathers the measures of a query that asks for an aggregate. It is not
// safe for concurrent use.
type Accumulator struct {
	q         *Query
	view      view
	maxGroups int
	groups    map[string]*group
	only      *group // the one group of a query without group_by
	textBytes int
	buf       []byte
	skipped   uint64
}

type group struct {
	id    string // the group's values, encoded
	keys  []value
	cells []cell
}

// NewAccumulator returns an empty accumulator that holds at most maxGroups groups.
// REQUIRES: the query asks for an aggregate, and maxGroups > 0.
func (q *Query) NewAccumulator(maxGroups int) *Accumulator {
	if !q.aggregate || maxGroups <= 0 {
		panic("report: accumulator of a query for rows, or without room for a group")
	}
	return &Accumulator{q: q, view: view{q: q}, maxGroups: maxGroups, groups: map[string]*group{}}
}

// Add takes a record in if the query wants it and reports whether it does. An error is
// ErrTooLarge; the accumulator is of no use afterwards.
func (a *Accumulator) Add(key []byte, rec record.Record, nowMillis int64) (match bool, err error) {
	v := &a.view
	v.reset(key, rec)
	if !a.q.matches(v, nowMillis) {
		return false, nil
	}
	g, err := a.groupOf(v)
	if err != nil {
		return true, err
	}
	growth := 0
	for i, m := range a.q.measures {
		c := &g.cells[i]
		if m.field == noField {
			c.count++
			continue
		}
		before := c.skipped
		growth += c.add(m, v.value(m.field))
		a.skipped += c.skipped - before
	}
	return true, a.grow(growth)
}

// Skipped returns how many values were left out of measures since the accumulator was
// made, as they were of the wrong type.
func (a *Accumulator) Skipped() uint64 { return a.skipped }

// groupOf returns the group of a record, which it adds if it is new.
func (a *Accumulator) groupOf(v *view) (*group, error) {
	if a.only != nil {
		return a.only, nil
	}
	a.buf = a.buf[:0]
	for _, at := range a.q.groupBy {
		a.buf = appendValue(a.buf, v.value(at))
	}
	if g, ok := a.groups[string(a.buf)]; ok {
		return g, nil
	}
	keys := make([]value, 0, len(a.q.groupBy))
	for _, at := range a.q.groupBy {
		keys = append(keys, v.value(at).kept())
	}
	return a.addGroup(keys)
}

// appendValue encodes a value of a group: type, length of the text, text.
func appendValue(dst []byte, v *value) []byte {
	start := len(dst)
	dst = append(dst, byte(v.kind), 0, 0, 0, 0)
	dst = v.appendText(dst)
	binary.BigEndian.PutUint32(dst[start+1:], uint32(len(dst)-start-valueHeader))
	return dst
}

const valueHeader = 1 + 4

// addGroup adds the group that a.buf encodes.
func (a *Accumulator) addGroup(keys []value) (*group, error) {
	if len(a.groups) >= a.maxGroups {
		return nil, fmt.Errorf("%w: it has more than %d groups: group by fields with fewer values, or narrow it by conditions", ErrTooLarge, a.maxGroups)
	}
	g := &group{id: string(a.buf), keys: keys, cells: make([]cell, len(a.q.measures))}
	a.groups[g.id] = g
	if len(a.q.groupBy) == 0 {
		a.only = g
	}
	return g, a.grow(2 * len(g.id))
}

// grow accounts for texts.
func (a *Accumulator) grow(n int) error {
	a.textBytes += n
	if limit := max(minTextBytes, a.maxGroups*textBytesPerGroup); n > 0 && a.textBytes > limit {
		return fmt.Errorf("%w: the values of its groups, minima and maxima have more than %d bytes: group by shorter fields, or narrow it by conditions", ErrTooLarge, limit)
	}
	return nil
}

// sorted returns the groups in the order of their values.
func (a *Accumulator) sorted() []*group {
	all := make([]*group, 0, len(a.groups))
	for _, g := range a.groups {
		all = append(all, g)
	}
	slices.SortFunc(all, func(x, y *group) int {
		return slices.CompareFunc(x.keys, y.keys, func(p, q value) int { return p.compare(&q) })
	})
	return all
}

// Partial returns what was gathered, for Merge, in the order of the groups' values.
func (a *Accumulator) Partial() []*kvv1.ReportGroup {
	out := make([]*kvv1.ReportGroup, 0, len(a.groups))
	for _, g := range a.sorted() {
		m := &kvv1.ReportGroup{}
		for i := range g.keys {
			m.Keys = append(m.Keys, g.keys[i].message())
		}
		for i := range g.cells {
			m.Measures = append(m.Measures, g.cells[i].partial(a.q.measures[i]))
		}
		out = append(out, m)
	}
	return out
}

// Merge takes in groups that accumulators of the same query gathered, all or some of
// them, in any order. An error is ErrTooLarge, or says what is wrong with a group; the
// accumulator is of no use afterwards.
//
// Merge is commutative and associative: merging the parts of any split of the records
// gives the Result of adding them all.
func (a *Accumulator) Merge(groups []*kvv1.ReportGroup) error {
	for _, in := range groups {
		if err := a.mergeGroup(in); err != nil {
			return fmt.Errorf("merge a group: %w", err)
		}
	}
	return nil
}

func (a *Accumulator) mergeGroup(in *kvv1.ReportGroup) error {
	if len(in.GetKeys()) != len(a.q.groupBy) || len(in.GetMeasures()) != len(a.q.measures) {
		return fmt.Errorf("it has %d values and %d measures: want %d and %d", len(in.GetKeys()), len(in.GetMeasures()), len(a.q.groupBy), len(a.q.measures))
	}
	g, err := a.groupFrom(in.GetKeys())
	if err != nil {
		return err
	}
	for i, p := range in.GetMeasures() {
		growth, err := g.cells[i].merge(a.q.measures[i], p)
		if err == nil {
			err = a.grow(growth)
		}
		if err != nil {
			return err
		}
		a.skipped += p.GetSkipped()
	}
	return nil
}

func (a *Accumulator) groupFrom(in []*kvv1.ReportValue) (*group, error) {
	keys := make([]value, 0, len(in))
	a.buf = a.buf[:0]
	for _, m := range in {
		k, err := valueFrom(m)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k.kept())
		a.buf = appendValue(a.buf, &k)
	}
	if g, ok := a.groups[string(a.buf)]; ok {
		return g, nil
	}
	return a.addGroup(keys)
}

// Group is a group of an answer.
type Group struct {
	Keys     []Value  // in the order of group_by
	Measures []Result // in the order of the measures
}

// Result is a measure of a group. Missing is the minimum, maximum or average of
// nothing.
type Result struct {
	Value Value
	// Count is how many records or values count, and Skipped how many values were left
	// out as they were of the wrong type.
	Count, Skipped uint64
}

// Result returns the groups in the order of their values. A query without group_by
// has one group even when no record matched.
func (a *Accumulator) Result() []Group {
	all := a.sorted()
	if len(all) == 0 && len(a.q.groupBy) == 0 {
		all = append(all, &group{cells: make([]cell, len(a.q.measures))})
	}
	out := make([]Group, 0, len(all))
	for _, g := range all {
		r := Group{}
		for i := range g.keys {
			r.Keys = append(r.Keys, g.keys[i].result())
		}
		for i, m := range a.q.measures {
			c := &g.cells[i]
			r.Measures = append(r.Measures, Result{c.result(m), c.count, c.skipped})
		}
		out = append(out, r)
	}
	return out
}
