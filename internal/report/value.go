package report

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/tidwall/gjson"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Type is the type of a value.
type Type = kvv1.ReportValue_Type

// The types, in the order in which values of different types sort.
const (
	Missing = kvv1.ReportValue_TYPE_MISSING
	Null    = kvv1.ReportValue_TYPE_NULL
	Boolean = kvv1.ReportValue_TYPE_BOOLEAN
	Number  = kvv1.ReportValue_TYPE_NUMBER
	Text    = kvv1.ReportValue_TYPE_TEXT
	JSON    = kvv1.ReportValue_TYPE_JSON
)

// Value is a value of an answer. Equal values have the same type and text.
type Value struct {
	Type Type
	// Text is true or false, a number without an exponent, the text itself, or JSON
	// without spaces; empty for Missing and Null.
	Text string
}

// value is a field of a record as it was read.
type value struct {
	kind Type
	// raw is the text as it stands; empty for numbers that the record does not write.
	raw    string
	number number // of a Number
}

func integer(n int64) value { return value{kind: Number, number: number{whole: n}} }

// valueOf returns what gjson read.
func valueOf(r gjson.Result) value {
	switch r.Type {
	case gjson.Null:
		if !r.Exists() {
			return value{kind: Missing}
		}
		return value{kind: Null}
	case gjson.False, gjson.True:
		return value{kind: Boolean, raw: strconv.FormatBool(r.Type == gjson.True)}
	case gjson.String:
		return value{kind: Text, raw: r.Str}
	case gjson.JSON:
		return value{kind: JSON, raw: r.Raw}
	}
	return numeral(r)
}

func numeral(r gjson.Result) value {
	raw := strings.TrimSpace(r.Raw) // gjson.Parse leaves what follows a lone number
	if raw == "" {
		raw = strconv.FormatInt(int64(r.Num), 10) // the count of an array
	}
	n, ok := readNumber(raw)
	if !ok {
		return value{kind: Text, raw: raw}
	}
	return value{kind: Number, raw: raw, number: n}
}

// text returns the value as conditions on text see it.
func (v *value) text() string {
	if v.kind == Number && v.raw == "" {
		v.raw = v.number.text()
	}
	return v.raw
}

// appendText appends the text that equal values share.
func (v *value) appendText(dst []byte) []byte {
	switch v.kind {
	case Number:
		return v.number.appendText(dst)
	case JSON:
		return append(dst, compact(v.raw)...)
	}
	return append(dst, v.raw...)
}

func compact(text string) []byte {
	var b bytes.Buffer
	if json.Compact(&b, []byte(text)) != nil {
		return []byte(text)
	}
	return b.Bytes()
}

// isMeasurable reports whether the value has a place in a minimum and a maximum.
func (v *value) isMeasurable() bool { return v.kind == Number || v.kind == Text }

// compare orders values: by type, numbers by size, all else by bytes.
func (v *value) compare(o *value) int {
	switch {
	case v.kind != o.kind:
		return cmp.Compare(v.kind, o.kind)
	case v.kind == Number:
		return v.number.compare(o.number)
	}
	return strings.Compare(v.raw, o.raw)
}

// kept returns the value in the form that equal values share, without an alias to the
// record.
func (v *value) kept() value {
	switch v.kind {
	case Number:
		return value{kind: Number, number: v.number}
	case JSON:
		return value{kind: JSON, raw: string(compact(v.raw))}
	}
	return value{kind: v.kind, raw: strings.Clone(v.raw)}
}

// size returns how many bytes the text of a kept value takes.
func (v *value) size() int { return len(v.raw) }

func (v *value) result() Value { return Value{v.kind, string(v.appendText(nil))} }

func (v *value) message() *kvv1.ReportValue {
	return &kvv1.ReportValue{Type: v.kind, Text: v.appendText(nil)}
}

// valueFrom reads a value that another node sent.
func valueFrom(m *kvv1.ReportValue) (value, error) {
	text := string(m.GetText())
	switch m.GetType() {
	case Missing, Null:
		return value{kind: m.GetType()}, nil
	case Boolean, Text, JSON:
		return value{kind: m.GetType(), raw: text}, nil
	case Number:
		if n, ok := parseSum(text); ok {
			return value{kind: Number, number: n}, nil
		}
		return value{}, fmt.Errorf("value %q is no number", text)
	}
	return value{}, fmt.Errorf("value %q has the unknown type %d", text, m.GetType())
}
