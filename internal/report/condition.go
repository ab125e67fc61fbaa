package report

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/shopspring/decimal"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Short names for the comparisons.
const (
	opEQ       = kvv1.ReportComparison_REPORT_COMPARISON_EQ
	opNE       = kvv1.ReportComparison_REPORT_COMPARISON_NE
	opLT       = kvv1.ReportComparison_REPORT_COMPARISON_LT
	opLE       = kvv1.ReportComparison_REPORT_COMPARISON_LE
	opGT       = kvv1.ReportComparison_REPORT_COMPARISON_GT
	opGE       = kvv1.ReportComparison_REPORT_COMPARISON_GE
	opContains = kvv1.ReportComparison_REPORT_COMPARISON_CONTAINS
	opPrefix   = kvv1.ReportComparison_REPORT_COMPARISON_PREFIX
	opExists   = kvv1.ReportComparison_REPORT_COMPARISON_EXISTS
	opMissing  = kvv1.ReportComparison_REPORT_COMPARISON_MISSING
)

type condition struct {
	field      int
	comparison kvv1.ReportComparison
	text       string // the literal
	kind       Type   // of the literal: Null, Number or Text
	number     number
}

func compileCondition(in *kvv1.ReportCondition) (condition, error) {
	c := condition{comparison: in.GetComparison(), text: string(in.GetLiteral()), kind: Text}
	f, err := parseField(in.GetField())
	if err != nil {
		return c, err
	}
	if err := c.compile(f.source, in.GetQuoted()); err != nil {
		return c, fmt.Errorf("on field %s: %w", in.GetField(), err)
	}
	return c, nil
}

func (c *condition) compile(s source, quoted bool) error {
	switch c.comparison {
	case opEQ, opNE, opLT, opLE, opGT, opGE:
	case opContains, opPrefix:
		if s.isNumber() {
			return fmt.Errorf("it is a number and has no text to look into: want ==, !=, <, <=, > or >=")
		}
		quoted = true
	case opExists, opMissing:
		return c.compilePresence(s)
	default:
		return fmt.Errorf("comparison %d: want ==, !=, <, <=, >, >=, ~, ^=, exists or missing", c.comparison)
	}
	if len(c.text) > MaxLiteralBytes {
		return fmt.Errorf("the literal has %d bytes: the limit is %d", len(c.text), MaxLiteralBytes)
	}
	return c.compileLiteral(s, quoted)
}

func (c *condition) compilePresence(s source) error {
	if s != fromJSON {
		return fmt.Errorf("every record has it: exists and missing are for fields of the value")
	}
	if c.text != "" {
		return fmt.Errorf("literal %q: exists and missing take none", c.text)
	}
	return nil
}

func (c *condition) compileLiteral(s source, quoted bool) error {
	n, isNumber := parseNumber(c.text)
	switch {
	case s.isTime() && !isNumber:
		var err error
		if n, err = parseTime(c.text); err != nil {
			return err
		}
		isNumber = true
	case s == fromSize && !isNumber:
		return fmt.Errorf("literal %q: want a number of bytes", c.text)
	case s.isNumber():
	case s == fromKey || quoted:
		return nil
	case c.text == "null":
		if c.comparison != opEQ && c.comparison != opNE {
			return fmt.Errorf("null is neither less nor greater than anything: want == or !=, or \"null\" for the text")
		}
		c.kind = Null
		return nil
	}
	if isNumber {
		c.kind, c.number = Number, n
	}
	return nil
}

// parseTime returns the milliseconds since 1970 of a time, exactly.
func parseTime(text string) (number, error) {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return number{}, fmt.Errorf("literal %q: want milliseconds since 1970 or a time such as 2026-01-31T12:00:00Z", text)
	}
	millis := decimal.New(t.Unix(), 3).Add(decimal.New(int64(t.Nanosecond()), -6))
	return fromDecimal(millis), nil
}

// holds reports whether a value meets the condition.
func (c *condition) holds(v *value) bool {
	switch c.comparison {
	case opExists, opMissing:
		return (v.kind == Missing) == (c.comparison == opMissing)
	case opContains:
		return v.kind > Null && strings.Contains(v.text(), c.text)
	case opPrefix:
		return v.kind > Null && strings.HasPrefix(v.text(), c.text)
	}
	switch {
	case v.kind == Missing:
		return false
	case v.kind == Null || c.kind == Null:
		return (v.kind == c.kind) == (c.comparison == opEQ) && c.comparison <= opNE
	case v.kind == JSON:
		return (string(compact(v.raw)) == c.text) == (c.comparison == opEQ) && c.comparison <= opNE
	case v.kind == Number && c.kind == Number:
		return c.accepts(v.number.compare(c.number))
	}
	return c.accepts(strings.Compare(v.text(), c.text))
}

// accepts reports whether the condition holds where its field compares so with its
// literal.
func (c *condition) accepts(order int) bool {
	switch c.comparison {
	case opEQ:
		return order == 0
	case opNE:
		return order != 0
	case opLT:
		return order < 0
	case opLE:
		return order <= 0
	case opGT:
		return order > 0
	}
	return order >= 0
}

// quotedField writes a field as ParseCondition and ParseMeasure read it.
func quotedField(name string) string {
	if isPlainField(name) {
		return name
	}
	return strconv.Quote(name)
}
