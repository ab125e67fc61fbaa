package report

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// operators are the comparisons between a field and a literal, those that begin
// another one after it.
var operators = []struct {
	text       string
	comparison kvv1.ReportComparison
}{
	{"==", opEQ}, {"!=", opNE}, {"<=", opLE}, {"<", opLT}, {">=", opGE}, {">", opGT}, {"~", opContains}, {"^=", opPrefix},
}

var presences = map[string]kvv1.ReportComparison{"exists": opExists, "missing": opMissing}

var functions = map[string]kvv1.ReportMeasure_Function{
	"count": kvv1.ReportMeasure_FUNCTION_COUNT,
	"sum":   kvv1.ReportMeasure_FUNCTION_SUM,
	"min":   kvv1.ReportMeasure_FUNCTION_MIN,
	"max":   kvv1.ReportMeasure_FUNCTION_MAX,
	"avg":   kvv1.ReportMeasure_FUNCTION_AVG,
}

// ParseCondition reads a condition as people write it:
//
//	balance >= 100    == != < <= > >= compare
//	name ~ ann        ~ contains, ^= begins with
//	exists(address.city), missing(address.city)
//
// A literal with spaces is quoted, 'so' or "so", the latter with Go's escapes; what is
// quoted is text even where it reads as a number. A field is quoted likewise where it
// holds spaces or operators.
func ParseCondition(s string) (*kvv1.ReportCondition, error) {
	s = strings.TrimSpace(s)
	if name, arg, ok := call(s); ok {
		if comparison, ok := presences[name]; ok {
			field, err := parseArgument(s, arg)
			return &kvv1.ReportCondition{Field: field, Comparison: comparison}, err
		}
	}
	field, rest, err := cutField(s)
	if err != nil {
		return nil, fmt.Errorf("condition %q: %w", s, err)
	}
	for _, op := range operators {
		literal, ok := strings.CutPrefix(rest, op.text)
		if !ok {
			continue
		}
		text, quoted, err := unquote(strings.TrimSpace(literal))
		if err != nil {
			return nil, fmt.Errorf("condition %q: literal: %w", s, err)
		}
		return &kvv1.ReportCondition{Field: field, Comparison: op.comparison, Literal: []byte(text), Quoted: quoted}, nil
	}
	return nil, fmt.Errorf("condition %q: want FIELD OPERATOR LITERAL with one of == != < <= > >= ~ ^= after the field, exists(FIELD) or missing(FIELD)", s)
}

// FormatCondition writes a condition as ParseCondition reads it.
func FormatCondition(c *kvv1.ReportCondition) string {
	field := quotedField(c.GetField())
	for name, comparison := range presences {
		if comparison == c.GetComparison() {
			return name + "(" + field + ")"
		}
	}
	literal := string(c.GetLiteral())
	if c.GetQuoted() || !isPlainLiteral(literal) {
		literal = strconv.Quote(literal)
	}
	for _, op := range operators {
		if op.comparison == c.GetComparison() {
			return field + " " + op.text + " " + literal
		}
	}
	return field + " ? " + literal
}

// ParseMeasure reads a measure as people write it: count, count(address.city),
// sum(balance), min, max and avg likewise.
func ParseMeasure(s string) (*kvv1.ReportMeasure, error) {
	s = strings.TrimSpace(s)
	name, arg, ok := call(s)
	if !ok {
		name = s
	}
	function, known := functions[strings.ToLower(name)]
	if !known {
		return nil, fmt.Errorf("measure %q: want count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD) or avg(FIELD)", s)
	}
	if arg = strings.TrimSpace(arg); function == kvv1.ReportMeasure_FUNCTION_COUNT && (arg == "" || arg == "*") {
		return &kvv1.ReportMeasure{Function: function}, nil
	}
	field, err := parseArgument(s, arg)
	if err != nil {
		return nil, err
	}
	return &kvv1.ReportMeasure{Function: function, Field: field}, nil
}

// FormatMeasure writes a measure as ParseMeasure reads it.
func FormatMeasure(m *kvv1.ReportMeasure) string {
	name := strings.ToLower(strings.TrimPrefix(m.GetFunction().String(), "FUNCTION_"))
	if m.GetField() == "" {
		return name
	}
	return name + "(" + quotedField(m.GetField()) + ")"
}

// call splits name(argument).
func call(s string) (name, arg string, ok bool) {
	name, rest, ok := strings.Cut(s, "(")
	if !ok || !strings.HasSuffix(rest, ")") {
		return "", "", false
	}
	return strings.TrimSpace(name), rest[:len(rest)-1], true
}

// parseArgument reads the field between the brackets of whole.
func parseArgument(whole, arg string) (string, error) {
	field := strings.TrimSpace(arg)
	if quoted, err := quotedPrefix(field); err == nil && quoted == field {
		field, _, _ = unquote(field)
	} else if !isPlainField(field) {
		return "", fmt.Errorf("%q: want a field in the brackets, quoted if it holds spaces, brackets or operators", whole)
	}
	if _, err := parseField(field); err != nil {
		return "", fmt.Errorf("%q: %w", whole, err)
	}
	return field, nil
}

// cutField splits a condition after its field; rest begins with what follows it.
func cutField(s string) (field, rest string, err error) {
	if quoted, err := quotedPrefix(s); err == nil {
		if field, _, err = unquote(quoted); err != nil {
			return "", "", err
		}
		rest = s[len(quoted):]
	} else {
		at := strings.IndexAny(s, operatorBytes)
		if at < 0 {
			at = len(s)
		}
		field, rest = strings.TrimSpace(s[:at]), s[at:]
		if field != "" && !isPlainField(field) {
			return "", "", fmt.Errorf("field %q: want a field before the operator, quoted if it holds spaces, brackets or operators", field)
		}
	}
	_, err = parseField(field)
	return field, strings.TrimSpace(rest), err
}

// quotedPrefix returns the quoted text that s begins with.
func quotedPrefix(s string) (string, error) {
	if strings.HasPrefix(s, "'") {
		if end := strings.IndexByte(s[1:], '\''); end >= 0 {
			return s[:end+2], nil
		}
	}
	if !strings.HasPrefix(s, `"`) {
		return "", strconv.ErrSyntax
	}
	return strconv.QuotedPrefix(s)
}

// unquote returns what is quoted; text without quotes must need none.
func unquote(s string) (text string, quoted bool, err error) {
	if s != "" && (s[0] == '\'' || s[0] == '"') {
		if all, err := quotedPrefix(s); err != nil || all != s {
			return "", false, fmt.Errorf("%s: want one quoted text, \"so\" or 'so', and nothing after it", s)
		}
		if s[0] == '\'' {
			return s[1 : len(s)-1], true, nil
		}
		text, err = strconv.Unquote(s)
		return text, true, err
	}
	if !isPlainLiteral(s) {
		return "", false, fmt.Errorf("%q: want a number, true, false, null or text, quoted if it is empty or holds spaces", s)
	}
	return s, false, nil
}

const operatorBytes = "=!<>~^"

// isPlainLiteral reports whether a literal can be written without quotes.
func isPlainLiteral(s string) bool {
	return s != "" && s[0] != '\'' && s[0] != '"' && utf8.ValidString(s) && !strings.ContainsFunc(s, isOdd)
}

// isPlainField reports whether a field can be written without quotes.
func isPlainField(s string) bool {
	return isPlainLiteral(s) && !strings.ContainsAny(s, operatorBytes+"()")
}

func isOdd(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }
