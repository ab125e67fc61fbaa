package report_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/report"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

func TestParseCondition(t *testing.T) {
	for _, tc := range []struct {
		text, field, op, literal string
		quoted                   bool
		canonical                string // empty: the text
	}{
		{text: "balance >= 100", field: "balance", op: "GE", literal: "100"},
		{text: " balance<=-1.5 ", field: "balance", op: "LE", literal: "-1.5", canonical: "balance <= -1.5"},
		{text: "a==b", field: "a", op: "EQ", literal: "b", canonical: "a == b"},
		{text: "a != b", field: "a", op: "NE", literal: "b"},
		{text: "a < b", field: "a", op: "LT", literal: "b"},
		{text: "a > b", field: "a", op: "GT", literal: "b"},
		{text: "a ~ b", field: "a", op: "CONTAINS", literal: "b"},
		{text: "a ^= b", field: "a", op: "PREFIX", literal: "b"},
		{text: "a == =b", field: "a", op: "EQ", literal: "=b"},
		{text: "a == f(x)", field: "a", op: "EQ", literal: "f(x)"},
		{text: `a == "b c"`, field: "a", op: "EQ", literal: "b c", quoted: true},
		{text: `a == 'b "c'`, field: "a", op: "EQ", literal: `b "c`, quoted: true, canonical: `a == "b \"c"`},
		{text: `a == ""`, field: "a", op: "EQ", quoted: true},
		{text: `a == "100"`, field: "a", op: "EQ", literal: "100", quoted: true},
		{text: `@key ^= "\xff\n"`, field: "@key", op: "PREFIX", literal: "\xff\n", quoted: true},
		{text: `"a b" == 1`, field: "a b", op: "EQ", literal: "1"},
		{text: `'a=b' == 1`, field: "a=b", op: "EQ", literal: "1", canonical: `"a=b" == 1`},
		{text: `"a" == 1`, field: "a", op: "EQ", literal: "1", canonical: "a == 1"},
		{text: "exists(a.b)", field: "a.b", op: "EXISTS"},
		{text: `missing( "a b" )`, field: "a b", op: "MISSING", canonical: `missing("a b")`},
	} {
		got, err := report.ParseCondition(tc.text)
		if err != nil {
			t.Errorf("%s: %v", tc.text, err)
			continue
		}
		want := &kvv1.ReportCondition{
			Field: tc.field, Literal: []byte(tc.literal), Quoted: tc.quoted,
			Comparison: kvv1.ReportComparison(kvv1.ReportComparison_value["REPORT_COMPARISON_"+tc.op]),
		}
		if !proto.Equal(got, want) {
			t.Errorf("%s: %v, want %v", tc.text, got, want)
		}
		if canonical := report.FormatCondition(got); canonical != tc.canonical && (tc.canonical != "" || canonical != tc.text) {
			t.Errorf("%s: written as %s", tc.text, canonical)
		}
	}
}

func TestParseConditionRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":              "the field is empty",
		"balance":       "want FIELD OPERATOR LITERAL",
		"a = 1":         "want FIELD OPERATOR LITERAL",
		"a ! 1":         "want FIELD OPERATOR LITERAL",
		"a ^ 1":         "want FIELD OPERATOR LITERAL",
		"a == ":         "literal",
		"a == b c":      "quoted if it is empty or holds spaces",
		`a == "b`:       "want one quoted text",
		`a == "b" c`:    "and nothing after it",
		"a == 'b' 'c'":  "and nothing after it",
		"== 1":          "the field is empty",
		"a b == 1":      "want a field before the operator",
		"a.#(b==1) > 2": "want a field before the operator",
		"@kye == 1":     "field @kye: want one of",
		"exists()":      "exists()",
		"exists(a b)":   "quoted if it holds spaces",
		"is(a)":         "want a field before the operator",
	} {
		if c, err := report.ParseCondition(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, error %v, want one with %q", text, c, err, want)
		}
	}
}

func TestParseMeasure(t *testing.T) {
	for _, tc := range []struct{ text, function, field, canonical string }{
		{"count", "COUNT", "", "count"},
		{"COUNT(*)", "COUNT", "", "count"},
		{"count()", "COUNT", "", "count"},
		{"count( a )", "COUNT", "a", "count(a)"},
		{"sum(balance)", "SUM", "balance", "sum(balance)"},
		{"min(@written)", "MIN", "@written", "min(@written)"},
		{"Max(a.0.b)", "MAX", "a.0.b", "max(a.0.b)"},
		{`avg("a b")`, "AVG", "a b", `avg("a b")`},
	} {
		got, err := report.ParseMeasure(tc.text)
		if err != nil {
			t.Errorf("%s: %v", tc.text, err)
			continue
		}
		if f := strings.TrimPrefix(got.GetFunction().String(), "FUNCTION_"); f != tc.function || got.GetField() != tc.field {
			t.Errorf("%s: %v", tc.text, got)
		}
		if canonical := report.FormatMeasure(got); canonical != tc.canonical {
			t.Errorf("%s: written as %s", tc.text, canonical)
		}
	}
	for text, want := range map[string]string{
		"":          "want count, count(FIELD)",
		"median(a)": "want count, count(FIELD)",
		"sum":       "want a field in the brackets",
		"sum()":     "want a field in the brackets",
		"sum(a b)":  "quoted if it holds",
		"sum(@kye)": "field @kye",
		"sum(a":     "want count, count(FIELD)",
	} {
		if m, err := report.ParseMeasure(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, error %v, want one with %q", text, m, err, want)
		}
	}
}

// FuzzParseCondition: what is parsed and written is parsed to the same.
func FuzzParseCondition(f *testing.F) {
	for _, text := range []string{"balance >= 100", `a == "b c"`, "'a=b' ~ x", "exists(a)", `missing("a b")`, `@key ^= "\xff"`, "a<=b", "a ^= '", `"\x00" == 1`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := report.ParseCondition(text)
		if err != nil {
			return
		}
		written := report.FormatCondition(c)
		again, err := report.ParseCondition(written)
		if err != nil || !proto.Equal(c, again) {
			t.Errorf("%q is %v, written as %q, which is %v, %v", text, c, written, again, err)
		}
		q, err := report.Compile(&kvv1.ReportQuery{Where: []*kvv1.ReportCondition{c}, What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}})
		if err == nil {
			q.Match([]byte("k"), valueRecord(`{"a":[1,"x",null,{"b":2.5}]}`), nowMillis) // must not panic
		}
	})
}
