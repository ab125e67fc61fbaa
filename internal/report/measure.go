package report

import (
	"fmt"
	"strconv"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

const (
	funcCount = kvv1.ReportMeasure_FUNCTION_COUNT
	funcSum   = kvv1.ReportMeasure_FUNCTION_SUM
	funcMin   = kvv1.ReportMeasure_FUNCTION_MIN
	funcMax   = kvv1.ReportMeasure_FUNCTION_MAX
	funcAvg   = kvv1.ReportMeasure_FUNCTION_AVG
)

// noField is the field of a count of records.
const noField = -1

type measure struct {
	function kvv1.ReportMeasure_Function
	field    int
}

func (m measure) adds() bool { return m.function == funcSum || m.function == funcAvg }

func (q *Query) compileMeasure(in *kvv1.ReportMeasure) (measure, error) {
	m := measure{function: in.GetFunction(), field: noField}
	if m.function < funcCount || m.function > funcAvg {
		return m, fmt.Errorf("function %d: want count, sum, min, max or avg", m.function)
	}
	if m.function == funcCount && in.GetField() == "" {
		return m, nil
	}
	at, err := q.fieldNamed(in.GetField())
	if err != nil {
		return m, fmt.Errorf("%s: %w", FormatMeasure(in), err)
	}
	if m.field = at; m.adds() && q.fields[at].source == fromKey {
		return m, fmt.Errorf("%s: a key is text: want a field that holds numbers", FormatMeasure(in))
	}
	return m, nil
}

// cell is a measure of a group while it is being gathered.
type cell struct {
	count, skipped uint64
	sum            sum
	extreme        value // of min and max, when count > 0
}

// add takes a value into the measure and returns by how many bytes the texts it holds
// have grown.
func (c *cell) add(m measure, v *value) (growth int) {
	switch {
	case v.kind == Missing:
	case m.function == funcCount:
		if v.kind != Null {
			c.count++
		}
	case m.adds() && v.kind == Number:
		c.count++
		c.sum.add(v.number)
	case !m.adds() && v.isMeasurable():
		c.count++
		return c.improve(m, v)
	default:
		c.skipped++
	}
	return 0
}

// improve makes v the extreme if it is beyond the one so far. v is counted already.
func (c *cell) improve(m measure, v *value) (growth int) {
	if c.extreme.kind != 0 {
		if order := v.compare(&c.extreme); order == 0 || (order < 0) != (m.function == funcMin) {
			return 0
		}
	}
	before := c.extreme.size()
	c.extreme = v.kept()
	return c.extreme.size() - before
}

func (c *cell) partial(m measure) *kvv1.ReportPartial {
	p := &kvv1.ReportPartial{Count: c.count, Skipped: c.skipped}
	switch {
	case m.adds():
		p.Sum = c.sum.total().text()
	case c.extreme.kind == 0:
	case m.function == funcMin:
		p.Min = c.extreme.message()
	case m.function == funcMax:
		p.Max = c.extreme.message()
	}
	return p
}

// merge takes in what another node gathered.
func (c *cell) merge(m measure, p *kvv1.ReportPartial) (growth int, err error) {
	switch m.function {
	case funcSum, funcAvg:
		n, ok := parseSum(p.GetSum())
		if !ok {
			return 0, fmt.Errorf("sum %q is no number", p.GetSum())
		}
		c.sum.add(n)
	case funcMin:
		growth, err = c.mergeExtreme(m, p.GetMin())
	case funcMax:
		growth, err = c.mergeExtreme(m, p.GetMax())
	}
	c.count += p.GetCount()
	c.skipped += p.GetSkipped()
	return growth, err
}

func (c *cell) mergeExtreme(m measure, in *kvv1.ReportValue) (growth int, err error) {
	if in == nil {
		return 0, nil
	}
	v, err := valueFrom(in)
	if err != nil {
		return 0, err
	}
	return c.improve(m, &v), nil
}

// result returns the measure's value: 0 for the sum of nothing, and Missing for the
// minimum, maximum and average of nothing.
func (c *cell) result(m measure) Value {
	switch {
	case m.function == funcCount:
		return Value{Number, strconv.FormatUint(c.count, 10)}
	case m.function == funcSum:
		return Value{Number, c.sum.total().text()}
	case c.count == 0:
		return Value{Type: Missing}
	case m.function == funcAvg:
		return Value{Number, average(c.sum.total(), c.count).text()}
	}
	return c.extreme.result()
}
