// Package report answers reports over the records of one node: it tells which
// records a query wants, gathers counts, sums, minima, maxima and averages of them
// by group, and merges what several nodes gathered. It is pure; it neither knows
// where records are kept nor how pages travel, and it reads no clock.
//
// Sums are exact. Integers are added as 64-bit integers and, past their range, with
// all other numbers as decimals of any length (shopspring/decimal, which stands on
// math/big), never as floating point. Addition is therefore associative, and the
// answer is the same however the records are split and in whatever order the parts
// are merged.
package report

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/kvasirdb/kvasir/internal/record"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// The bounds of a query.
const (
	MaxConditions   = 64
	MaxGroupFields  = 16
	MaxMeasures     = 64
	MaxFieldBytes   = 1 << 10
	MaxLiteralBytes = 64 << 10
)

// Query is a checked query. It does not change and is safe for concurrent use.
type Query struct {
	lower, upper []byte // upper is nil when there is no end
	fields       []field
	where        []condition
	groupBy      []int // of fields
	measures     []measure
	aggregate    bool
	keysOnly     bool
	limit        uint64
}

// Compile checks a query. An error names the part that is wrong and what is wanted.
func Compile(in *kvv1.ReportQuery) (*Query, error) {
	q := &Query{}
	if err := q.compileBounds(in); err != nil {
		return nil, err
	}
	if err := q.compileWhere(in.GetWhere()); err != nil {
		return nil, err
	}
	switch what := in.GetWhat().(type) {
	case *kvv1.ReportQuery_Rows:
		q.keysOnly, q.limit = what.Rows.GetKeysOnly(), what.Rows.GetLimit()
		return q, nil
	case *kvv1.ReportQuery_Aggregate:
		q.aggregate = true
		return q, q.compileAggregate(what.Aggregate)
	}
	return nil, fmt.Errorf("what: want rows or an aggregate")
}

func (q *Query) compileBounds(in *kvv1.ReportQuery) error {
	start, end := in.GetStart(), in.GetEnd()
	if len(end) > 0 && bytes.Compare(start, end) >= 0 {
		return fmt.Errorf("end %q: want a key after start %q", end, start)
	}
	q.atLeast(start)
	if len(end) > 0 {
		q.below(end)
	}
	q.within(in.GetPrefix())
	return nil
}

func (q *Query) compileWhere(where []*kvv1.ReportCondition) error {
	if len(where) > MaxConditions {
		return fmt.Errorf("where: %d conditions: the limit is %d", len(where), MaxConditions)
	}
	for i, in := range where {
		c, err := compileCondition(in)
		if err == nil {
			c.field, err = q.fieldNamed(in.GetField())
		}
		if err != nil {
			return fmt.Errorf("condition %d: %w", i+1, err)
		}
		q.where = append(q.where, c)
		q.narrow(c)
	}
	return nil
}

func (q *Query) compileAggregate(in *kvv1.ReportAggregate) error {
	if n := len(in.GetGroupBy()); n > MaxGroupFields {
		return fmt.Errorf("group_by: %d fields: the limit is %d", n, MaxGroupFields)
	}
	for i, name := range in.GetGroupBy() {
		at, err := q.fieldNamed(name)
		if err != nil {
			return fmt.Errorf("group_by %d: %w", i+1, err)
		}
		q.groupBy = append(q.groupBy, at)
	}
	switch n := len(in.GetMeasures()); {
	case n == 0:
		return fmt.Errorf("measures: there is none: want one such as count or sum(balance)")
	case n > MaxMeasures:
		return fmt.Errorf("measures: %d of them: the limit is %d", n, MaxMeasures)
	}
	for i, m := range in.GetMeasures() {
		compiled, err := q.compileMeasure(m)
		if err != nil {
			return fmt.Errorf("measure %d: %w", i+1, err)
		}
		q.measures = append(q.measures, compiled)
	}
	return nil
}

// fieldNamed returns the index of a field, adding it if the query has not named it
// before.
func (q *Query) fieldNamed(name string) (int, error) {
	f, err := parseField(name)
	if err != nil {
		return 0, err
	}
	if i := slices.Index(q.fields, f); i >= 0 {
		return i, nil
	}
	q.fields = append(q.fields, f)
	return len(q.fields) - 1, nil
}

// IsAggregate reports whether the query asks for measures and not for rows.
func (q *Query) IsAggregate() bool { return q.aggregate }

// Limit returns the most rows wanted; 0 means no limit.
func (q *Query) Limit() uint64 { return q.limit }

// Bounds returns the first key that may match and the first one after all that may;
// nil means no end. Conditions on the key narrow them. Nothing is possible when no key
// can match.
func (q *Query) Bounds() (lower, upper []byte, possible bool) {
	return q.lower, q.upper, q.upper == nil || bytes.Compare(q.lower, q.upper) < 0
}

func (q *Query) contains(key []byte) bool {
	return bytes.Compare(key, q.lower) >= 0 && (q.upper == nil || bytes.Compare(key, q.upper) < 0)
}

// Match reports whether the query wants a record: one that is live at nowMillis,
// within the bounds, and meets all conditions.
func (q *Query) Match(key []byte, rec record.Record, nowMillis int64) bool {
	if len(q.where) == 0 {
		return rec.IsLive(nowMillis) && q.contains(key)
	}
	v := view{q: q}
	v.reset(key, rec)
	return q.matches(&v, nowMillis)
}

func (q *Query) matches(v *view, nowMillis int64) bool {
	if !v.rec.IsLive(nowMillis) || !q.contains(v.key) {
		return false
	}
	for i := range q.where {
		if !q.where[i].holds(v.value(q.where[i].field)) {
			return false
		}
	}
	return true
}

// Row returns a record as a row of the answer. Its bytes alias the record's.
func (q *Query) Row(key []byte, rec record.Record) *kvv1.ReportRow {
	row := &kvv1.ReportRow{
		Key:         key,
		Version:     &kvv1.Version{Timestamp: uint64(rec.Version.Time), Incarnation: rec.Version.Incarnation},
		ExpiresAtMs: uint64(rec.ExpiresAt),
	}
	if !q.keysOnly {
		row.Value = rec.Payload
	}
	return row
}
