package report

import (
	"cmp"
	"math"
	"strconv"
	"strings"

	"github.com/shopspring/decimal"
	"github.com/tidwall/gjson"
)

// A number that is written with more characters or a greater exponent than these is
// text to a report: exact arithmetic on it would take memory without bound.
const (
	maxNumberBytes    = 512
	maxNumberExponent = 512
)

// A sum of such numbers, written out: both exponents, and the digits that 2^64
// additions carry.
const maxSumBytes = maxNumberBytes + 2*maxNumberExponent + 32

// number is an exact decimal. Integers of 64 bits are always in whole, so that most
// numbers need no allocation.
type number struct {
	whole   int64
	decimal *decimal.Decimal // nil when whole is the number
}

// parseNumber reads a number as JSON writes it. It is not ok for anything else.
func parseNumber(text string) (n number, ok bool) {
	if len(text) == 0 || len(text) > maxNumberBytes || (text[0] != '-' && !isDigit(text[0])) {
		return number{}, false
	}
	if !gjson.Valid(text) || !isDigit(text[len(text)-1]) {
		return number{}, false
	}
	return readNumber(text)
}

// readNumber reads a number that is known to be well-formed.
func readNumber(text string) (n number, ok bool) {
	if len(text) <= len("-9223372036854775808") && !strings.ContainsAny(text, ".eE") {
		if whole, err := strconv.ParseInt(text, 10, 64); err == nil {
			return number{whole: whole}, true
		}
	}
	if len(text) > maxNumberBytes {
		return number{}, false
	}
	return readDecimal(text)
}

func readDecimal(text string) (n number, ok bool) {
	d, err := decimal.NewFromString(text)
	if err != nil {
		return number{}, false
	}
	if e := d.Exponent(); e < -maxNumberExponent || e > maxNumberExponent {
		return number{}, false
	}
	return fromDecimal(d), true
}

// fromDecimal returns a decimal in the one form that its number has.
func fromDecimal(d decimal.Decimal) number {
	if d.IsInteger() {
		if whole := d.BigInt(); whole.IsInt64() {
			return number{whole: whole.Int64()}
		}
	}
	return number{decimal: &d}
}

func (n number) exact() decimal.Decimal {
	if n.decimal == nil {
		return decimal.NewFromInt(n.whole)
	}
	return *n.decimal
}

func (n number) compare(o number) int {
	if n.decimal == nil && o.decimal == nil {
		return cmp.Compare(n.whole, o.whole)
	}
	return n.exact().Cmp(o.exact())
}

// appendText appends the number without an exponent and without needless zeros:
// equal numbers are equal texts.
func (n number) appendText(dst []byte) []byte {
	if n.decimal == nil {
		return strconv.AppendInt(dst, n.whole, 10)
	}
	return append(dst, n.decimal.String()...)
}

func (n number) text() string { return string(n.appendText(nil)) }

// sum adds numbers without error. Its value is whole + rest.
type sum struct {
	whole int64
	rest  decimal.Decimal
}

func (s *sum) add(n number) {
	if n.decimal != nil {
		s.rest = s.rest.Add(*n.decimal)
		return
	}
	if (n.whole > 0 && s.whole > math.MaxInt64-n.whole) || (n.whole < 0 && s.whole < math.MinInt64-n.whole) {
		s.rest = s.rest.Add(decimal.NewFromInt(s.whole))
		s.whole = 0
	}
	s.whole += n.whole
}

func (s *sum) total() number {
	return fromDecimal(s.rest.Add(decimal.NewFromInt(s.whole)))
}

// parseSum reads the text of a sum.
func parseSum(text string) (n number, ok bool) {
	if len(text) == 0 || len(text) > maxSumBytes {
		return number{}, false
	}
	return readDecimal(text)
}

// minAveragePlaces is the fewest decimal places to which an average is rounded.
const minAveragePlaces = 16

// average returns a sum over a count, rounded half away from zero.
// REQUIRES: count > 0.
func average(total number, count uint64) number {
	// A number's text has no needless zeros, so that its places are those of the sum
	// and not of how it came about.
	d := decimal.RequireFromString(total.text())
	places := max(minAveragePlaces, -d.Exponent())
	return fromDecimal(d.DivRound(decimal.NewFromUint64(count), places))
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
