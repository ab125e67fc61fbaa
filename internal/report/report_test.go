package report_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/report"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

const nowMillis = 1767225600000 // 2026-01-01T00:00:00Z

func valueRecord(text string) record.Record {
	return record.Record{Version: record.Version{Time: hlc.At(nowMillis - 1000), Incarnation: 1}, Kind: record.Value, Payload: []byte(text)}
}

func condition(t *testing.T, text string) *kvv1.ReportCondition {
	t.Helper()
	c, err := report.ParseCondition(text)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func rowsWhere(t *testing.T, where ...string) *report.Query {
	t.Helper()
	in := &kvv1.ReportQuery{What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}}
	for _, text := range where {
		in.Where = append(in.Where, condition(t, text))
	}
	q, err := report.Compile(in)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func aggregate(t testing.TB, groupBy []string, measures ...string) *kvv1.ReportQuery {
	t.Helper()
	what := &kvv1.ReportAggregate{GroupBy: groupBy}
	for _, text := range measures {
		m, err := report.ParseMeasure(text)
		if err != nil {
			t.Fatal(err)
		}
		what.Measures = append(what.Measures, m)
	}
	return &kvv1.ReportQuery{What: &kvv1.ReportQuery_Aggregate{Aggregate: what}}
}

func compile(t testing.TB, in *kvv1.ReportQuery) *report.Query {
	t.Helper()
	q, err := report.Compile(in)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestConditions(t *testing.T) {
	const ann = `{"name":"Ann Lee","balance":100,"rate":0.10,"big":9007199254740993,"active":true,"gone":null,"zip":"01234","ten":"10",
		"address":{"city":"Bergen"},"tags":["red","blue"],"@type":"person","a.b":1,"huge":1e600,"e":1e2,"esc":"a\u00e9\n"}`
	for _, tc := range []struct {
		condition string
		want      bool
	}{
		{"balance == 100", true},
		{"balance == 100.0", true},
		{"balance == 1e2", true},
		{"e == 100", true},
		{"balance != 100", false},
		{"balance >= 100", true},
		{"balance > 99.999", true},
		{"balance > 9", true}, // as text it would not be
		{"balance < 100", false},
		{"balance <= -100", false},
		{`balance > "9"`, false}, // as text
		{`balance == "100"`, true},
		{"balance ~ 0", true},
		{"balance ^= 10", true},
		{"rate == 0.1", true},
		{`rate == "0.1"`, false}, // the text is 0.10
		{"big == 9007199254740992", false},
		{"big > 9007199254740992", true},
		{"big < 9007199254740993.5", true},
		{"active == true", true},
		{"active != false", true},
		{"gone == null", true},
		{"gone != null", false},
		{"gone != 5", true},
		{"gone > 5", false},
		{"gone < 5", false},
		{`gone == "null"`, false},
		{"name == null", false},
		{"name != null", true},
		{"zip == 01234", true},
		{"zip == 1234", false},
		{"ten > 9", false}, // text against a number: as text
		{"name == 'Ann Lee'", true},
		{`name == "Ann Lee"`, true},
		{"name ~ Lee", true},
		{"name ~ lee", false},
		{"name ^= Ann", true},
		{"name < B", true},
		{"esc == \"a\u00e9\\n\"", true},
		{"address.city == Bergen", true},
		{`address == '{"city":"Bergen"}'`, true},
		{"address != x", true},
		{"address > a", false},
		{"tags.1 == blue", true},
		{"tags.# == 2", true},
		{"tags.#>1", true},
		{"tags ~ red", true},
		{`\@type == person`, true},
		{`a\.b == 1`, true},
		{"huge > 5", false}, // beyond exact arithmetic, so text: 1e600 < 5
		{"exists(gone)", true},
		{"missing(gone)", false},
		{"exists(address.city)", true},
		{"missing( none )", true},
		{"exists(none)", false},
		{"none == 1", false},
		{"none != 1", false},
		{"none == null", false},
		{"none ~ a", false},
		{"@key == user/1", true},
		{"@key ^= user/", true},
		{"@key ^= user0", false},
		{"@key > user", true},
		{"@key ~ ser", true},
		{fmt.Sprintf("@size == %d", len(ann)), true},
		{"@size > 1e6", false},
		{"@written == 1767225599000", true},
		{"@written < 2026-01-01T00:00:00Z", true},
		{"@written >= 2026-01-01T01:00:00+01:00", false},
		{"@written == 2025-12-31T23:59:59Z", true},
		{"@written < 2025-12-31T23:59:59.0000001Z", true},
		{"@expires == 0", true},
		{"@value ~ Bergen", true},
	} {
		if got := rowsWhere(t, tc.condition).Match([]byte("user/1"), valueRecord(ann), nowMillis); got != tc.want {
			t.Errorf("%s: match = %t, want %t", tc.condition, got, tc.want)
		}
	}
}

func TestConditionsOnOtherValues(t *testing.T) {
	deep := strings.Repeat("[", 2_000_000) + strings.Repeat("]", 2_000_000)
	for _, tc := range []struct {
		value, condition string
		want             bool
	}{
		{"12", "@value == 12.0", true},
		{" 12 ", "@value >= 12", true},
		{`"x"`, "@value == x", true},
		{"plain text", "@value == 'plain text'", true},
		{"", `@value == ""`, true},
		{"", "missing(a)", true},
		{"true", "@value == true", true},
		{"null", "@value == null", true},
		{`{"a":1`, "exists(a)", false},
		{`{"a":1} x`, "exists(a)", false},
		{`"{\"a\":1}"`, "exists(a)", false},
		{`[{"a":1},{"a":2}]`, "#.a == [1,2]", true},
		{`[{"a":1},{"a":2}]`, "1.a == 2", true},
		{"\xff\xfe", "exists(a)", false},
		{deep, "exists(a)", false},
		{deep, "@size == 4000000", true},
	} {
		if got := rowsWhere(t, tc.condition).Match([]byte("k"), valueRecord(tc.value), nowMillis); got != tc.want {
			t.Errorf("value %.30q, %s: match = %t, want %t", tc.value, tc.condition, got, tc.want)
		}
	}
}

func TestOnlyLiveRecordsWithinBoundsMatch(t *testing.T) {
	q := compile(t, &kvv1.ReportQuery{Prefix: []byte("b"), Start: []byte("b2"), End: []byte("b4"), What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}})
	live := valueRecord("v")
	expiring := live
	expiring.ExpiresAt = nowMillis
	for _, tc := range []struct {
		key  string
		rec  record.Record
		now  int64
		want bool
	}{
		{"b2", live, nowMillis, true},
		{"b3", live, nowMillis, true},
		{"b1", live, nowMillis, false},
		{"b4", live, nowMillis, false},
		{"b3", expiring, nowMillis - 1, true},
		{"b3", expiring, nowMillis, false},
		{"b3", record.Record{Version: live.Version, Kind: record.Tombstone}, nowMillis, false},
	} {
		if got := q.Match([]byte(tc.key), tc.rec, tc.now); got != tc.want {
			t.Errorf("key %s at %d: match = %t, want %t", tc.key, tc.now, got, tc.want)
		}
	}
}

func TestBounds(t *testing.T) {
	for _, tc := range []struct {
		prefix, start, end string
		where              []string
		lower, upper       string
		possible           bool
	}{
		{possible: true},
		{prefix: "ab", lower: "ab", upper: "ac", possible: true},
		{prefix: "a\xff", lower: "a\xff", upper: "b", possible: true},
		{prefix: "\xff", lower: "\xff", possible: true},
		{prefix: "a", start: "a5", lower: "a5", upper: "b", possible: true},
		{prefix: "a", start: "b", lower: "b", upper: "b"},
		{prefix: "a", end: "a5", lower: "a", upper: "a5", possible: true},
		{where: []string{"@key ^= user/"}, lower: "user/", upper: "user0", possible: true},
		{where: []string{"@key >= b", "@key < d"}, lower: "b", upper: "d", possible: true},
		{where: []string{"@key > b", "@key <= d"}, lower: "b\x00", upper: "d\x00", possible: true},
		{where: []string{"@key == 5"}, lower: "5", upper: "5\x00", possible: true},
		{where: []string{"@key == b", "@key == c"}, lower: "c", upper: "b\x00"},
		{where: []string{`@key < ""`}},
		{where: []string{"@key != b", "name == c"}, possible: true},
	} {
		in := &kvv1.ReportQuery{Prefix: []byte(tc.prefix), Start: []byte(tc.start), End: []byte(tc.end), What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}}
		for _, text := range tc.where {
			in.Where = append(in.Where, condition(t, text))
		}
		lower, upper, possible := compile(t, in).Bounds()
		if string(lower) != tc.lower || string(upper) != tc.upper || possible != tc.possible {
			t.Errorf("%+v: bounds %q, %q, %t", tc, lower, upper, possible)
		}
	}
}

func TestRow(t *testing.T) {
	rec := valueRecord("v")
	rec.ExpiresAt = nowMillis + 5
	want := &kvv1.ReportRow{
		Key: []byte("k"), Value: []byte("v"), ExpiresAtMs: nowMillis + 5,
		Version: &kvv1.Version{Timestamp: uint64(rec.Version.Time), Incarnation: 1},
	}
	if got := rowsWhere(t).Row([]byte("k"), rec); !proto.Equal(got, want) {
		t.Errorf("row %v, want %v", got, want)
	}
	q := compile(t, &kvv1.ReportQuery{What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{KeysOnly: true, Limit: 7}}})
	want.Value = nil
	if got := q.Row([]byte("k"), rec); !proto.Equal(got, want) {
		t.Errorf("row %v, want %v", got, want)
	}
	if q.Limit() != 7 || q.IsAggregate() {
		t.Errorf("limit %d, aggregate %t", q.Limit(), q.IsAggregate())
	}
}

func TestCompileRefuses(t *testing.T) {
	rows := &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}
	where := func(c *kvv1.ReportCondition) *kvv1.ReportQuery {
		return &kvv1.ReportQuery{What: rows, Where: []*kvv1.ReportCondition{c}}
	}
	eq := kvv1.ReportComparison_REPORT_COMPARISON_EQ
	on := func(field string) *kvv1.ReportQuery {
		return where(&kvv1.ReportCondition{Field: field, Comparison: eq, Literal: []byte("1")})
	}
	measure := func(f kvv1.ReportMeasure_Function, field string) *kvv1.ReportQuery {
		return &kvv1.ReportQuery{What: &kvv1.ReportQuery_Aggregate{Aggregate: &kvv1.ReportAggregate{Measures: []*kvv1.ReportMeasure{{Function: f, Field: field}}}}}
	}
	for _, tc := range []struct {
		query *kvv1.ReportQuery
		want  string
	}{
		{&kvv1.ReportQuery{}, "want rows or an aggregate"},
		{&kvv1.ReportQuery{What: rows, Start: []byte("b"), End: []byte("b")}, `end "b": want a key after start "b"`},
		{&kvv1.ReportQuery{What: rows, Where: make([]*kvv1.ReportCondition, 65)}, "65 conditions: the limit is 64"},
		{on(""), "condition 1: the field is empty"},
		{on("@kye"), "field @kye: want one of @key"},
		{on("a..b"), "one name is empty"},
		{on("..0"), "one name is empty"},
		{on("a."), "one name is empty"},
		{on("a|@pretty"), `want \| where | is part of a name`},
		{on("a.@reverse"), `want \@ where @ is part`},
		{on("{a,b}"), `want \{`},
		{on("!1"), `want \!`},
		{on("a.#x"), "# stands for all elements"},
		{on("\xff"), "want UTF-8"},
		{on(strings.Repeat("a", 1025)), "1025 bytes: the limit is 1024"},
		{where(&kvv1.ReportCondition{Field: "a"}), "on field a: comparison 0: want =="},
		{where(&kvv1.ReportCondition{Field: "a", Comparison: eq, Literal: make([]byte, 64<<10+1)}), "the literal has 65537 bytes"},
		{where(condition(t, "a < null")), "null is neither less nor greater"},
		{where(condition(t, "@size == many")), `on field @size: literal "many": want a number of bytes`},
		{where(condition(t, "@written > yesterday")), "want milliseconds since 1970 or a time such as"},
		{where(condition(t, "@expires ~ 5")), "it is a number"},
		{where(condition(t, "exists(@key)")), "every record has it"},
		{where(&kvv1.ReportCondition{Field: "a", Comparison: kvv1.ReportComparison_REPORT_COMPARISON_MISSING, Literal: []byte("1")}), "take none"},
		{aggregate(t, nil), "measures: there is none"},
		{aggregate(t, []string{"a", ""}, "count"), "group_by 2: the field is empty"},
		{aggregate(t, make([]string, 17), "count"), "17 fields: the limit is 16"},
		{measure(0, "a"), "measure 1: function 0: want count"},
		{measure(kvv1.ReportMeasure_FUNCTION_SUM, ""), "measure 1: sum: the field is empty"},
		{measure(kvv1.ReportMeasure_FUNCTION_AVG, "@key"), "avg(@key): a key is text"},
		{measure(kvv1.ReportMeasure_FUNCTION_MAX, "@kye"), "max(@kye): field @kye"},
	} {
		if _, err := report.Compile(tc.query); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want one with %q", err, tc.want)
		}
	}
}

// results writes an answer as lines: values | measures, skipped ones after a slash.
func results(groups []report.Group) []string {
	var lines []string
	for _, g := range groups {
		var parts []string
		for _, k := range g.Keys {
			parts = append(parts, strings.TrimPrefix(k.Type.String(), "TYPE_")+" "+k.Text)
		}
		parts = append(parts, "|")
		for _, m := range g.Measures {
			text := m.Value.Text
			if m.Skipped > 0 {
				text += fmt.Sprintf("/%d", m.Skipped)
			}
			parts = append(parts, text)
		}
		lines = append(lines, strings.Join(parts, " "))
	}
	return lines
}

func TestAggregates(t *testing.T) {
	for _, tc := range []struct {
		name     string
		groupBy  []string
		measures []string
		values   []string
		want     []string
	}{
		{"nothing", nil, []string{"count", "sum(a)", "min(a)", "max(a)", "avg(a)"}, nil, []string{"| 0 0   "}},
		{"nothing in groups", []string{"a"}, []string{"count"}, nil, nil},
		{
			"all functions", nil, []string{"count", "count(a)", "sum(a)", "min(a)", "max(a)", "avg(a)"},
			[]string{`{"a":1}`, `{"a":2.5}`, `{"a":-4}`, `{}`, `not JSON`},
			[]string{"| 5 3 -0.5 -4 2.5 -0.1666666666666667"},
		},
		{
			"skipped", nil, []string{"count(a)", "sum(a)", "min(a)", "max(a)", "avg(a)"},
			[]string{`{"a":1}`, `{"a":"x"}`, `{"a":null}`, `{"a":true}`, `{"a":[1]}`, `{}`},
			[]string{"| 4 1/4 1/3 x/3 1/4"},
		},
		{
			"integers beyond 2^53 and 2^63", nil, []string{"sum(a)", "avg(a)", "min(a)", "max(a)"},
			[]string{`{"a":9223372036854775807}`, `{"a":9223372036854775807}`, `{"a":1}`, `{"a":18446744073709551616}`},
			[]string{"| 36893488147419103231 9223372036854775807.75 1 18446744073709551616"},
		},
		{
			"below -2^63", nil, []string{"sum(a)"},
			[]string{`{"a":-9223372036854775808}`, `{"a":-1}`, `{"a":-9223372036854775808}`},
			[]string{"| -18446744073709551617"},
		},
		{
			"decimals that floats get wrong", nil, []string{"sum(a)"},
			[]string{`{"a":0.1}`, `{"a":0.2}`, `{"a":1e30}`, `{"a":-1e30}`, `{"a":1e-30}`},
			[]string{"| 0.300000000000000000000000000001"},
		},
		{
			"numbers beyond bounds are text", nil, []string{"sum(a)", "max(a)"},
			[]string{`{"a":1e512}`, `{"a":1e513}`, `{"a":-1e512}`, `{"a":0e9}`},
			[]string{"| 0/1 1e513"},
		},
		{
			"values of groups", []string{"a"}, []string{"count"},
			[]string{`{"a":1}`, `{"a":1.0}`, `{"a":"1"}`, `{"a":10}`, `{"a":9}`, `{"a":null}`, `{}`, `{"a":true}`, `{"a":false}`, `{"a":[1, 2]}`, `{"a":[1,2]}`, `x`},
			[]string{"MISSING  | 2", "NULL  | 1", "BOOLEAN false | 1", "BOOLEAN true | 1", "NUMBER 1 | 2", "NUMBER 9 | 1", "NUMBER 10 | 1", "TEXT 1 | 1", "JSON [1,2] | 2"},
		},
		{
			"several fields", []string{"a", "b"}, []string{"count", "sum(c)"},
			[]string{`{"a":"x","b":"yz","c":1}`, `{"a":"xy","b":"z","c":2}`, `{"a":"x","b":"yz","c":3}`},
			[]string{"TEXT x TEXT yz | 2 4", "TEXT xy TEXT z | 1 2"},
		},
		{"of records", nil, []string{"sum(@size)", "min(@key)", "max(@written)", "min(@expires)"}, []string{"ab", "c"}, []string{"| 3 k0 1767225599000 0"}},
		{"of bare values", nil, []string{"sum(@value)"}, []string{"1", "2", "x"}, []string{"| 3/1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := compile(t, aggregate(t, tc.groupBy, tc.measures...))
			a, merged := q.NewAccumulator(100), q.NewAccumulator(100)
			for i, v := range tc.values {
				if ok, err := a.Add(fmt.Appendf(nil, "k%d", i), valueRecord(v), nowMillis); !ok || err != nil {
					t.Fatal(ok, err)
				}
			}
			if diff := cmp.Diff(tc.want, results(a.Result())); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
			if err := merged.Merge(a.Partial()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, results(merged.Result())); diff != "" {
				t.Errorf("merged (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAddKeepsNothingOfTheRecord(t *testing.T) {
	q := compile(t, aggregate(t, []string{"a", "@key"}, "max(b)"))
	a := q.NewAccumulator(10)
	key, rec := []byte("key"), valueRecord(`{"a":"group","b":"text"}`)
	if _, err := a.Add(key, rec, nowMillis); err != nil {
		t.Fatal(err)
	}
	clear(key)
	clear(rec.Payload)
	if diff := cmp.Diff([]string{"TEXT group TEXT key | text"}, results(a.Result())); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
}

func TestAccumulatorsAreBounded(t *testing.T) {
	q := compile(t, aggregate(t, []string{"@key"}, "max(@value)"))
	add := func(a *report.Accumulator, size int) (err error) {
		for i := 0; err == nil && i < 1000; i++ {
			_, err = a.Add(fmt.Appendf(nil, "k%d", i), valueRecord(strings.Repeat("x", size)), nowMillis)
		}
		return err
	}
	err := add(q.NewAccumulator(999), 1)
	if !errors.Is(err, report.ErrTooLarge) || !strings.Contains(err.Error(), "more than 999 groups") {
		t.Errorf("error %v", err)
	}
	if err := add(q.NewAccumulator(1000), 1<<10); err != nil {
		t.Error(err)
	}
	err = add(q.NewAccumulator(1000), 1<<20)
	if !errors.Is(err, report.ErrTooLarge) || !strings.Contains(err.Error(), "more than 16777216 bytes") {
		t.Errorf("error %v", err)
	}
	all := q.NewAccumulator(1000)
	if err := add(all, 1); err != nil {
		t.Fatal(err)
	}
	if err := q.NewAccumulator(999).Merge(all.Partial()); !errors.Is(err, report.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
}

func TestMergeRefuses(t *testing.T) {
	q := compile(t, aggregate(t, []string{"a"}, "sum(b)", "min(b)"))
	key := []*kvv1.ReportValue{{Type: report.Text, Text: []byte("x")}}
	for _, tc := range []struct {
		group *kvv1.ReportGroup
		want  string
	}{
		{&kvv1.ReportGroup{}, "0 values and 0 measures: want 1 and 2"},
		{&kvv1.ReportGroup{Keys: []*kvv1.ReportValue{{}}, Measures: []*kvv1.ReportPartial{{}, {}}}, "unknown type 0"},
		{&kvv1.ReportGroup{Keys: key, Measures: []*kvv1.ReportPartial{{}, {}}}, `sum "" is no number`},
		{&kvv1.ReportGroup{Keys: key, Measures: []*kvv1.ReportPartial{{Sum: "1e999999"}, {}}}, "is no number"},
		{&kvv1.ReportGroup{Keys: key, Measures: []*kvv1.ReportPartial{{Sum: "1"}, {Min: &kvv1.ReportValue{Type: report.Number, Text: []byte("x")}}}}, `value "x" is no number`},
	} {
		if err := q.NewAccumulator(10).Merge([]*kvv1.ReportGroup{tc.group}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want one with %q", err, tc.want)
		}
	}
}

// A count of records reads no value and allocates nothing.
func TestCountReadsNoValue(t *testing.T) {
	a := compile(t, aggregate(t, nil, "count")).NewAccumulator(1)
	key, rec := []byte("k"), valueRecord(`{"a":1}`)
	if n := testing.AllocsPerRun(100, func() { _, _ = a.Add(key, rec, nowMillis) }); n != 0 {
		t.Errorf("%.0f allocations a record", n)
	}
}

func BenchmarkAdd(b *testing.B) {
	value, err := json.Marshal(map[string]any{"name": "Ann Lee", "city": "Bergen", "balance": 100, "rate": 12.75, "note": strings.Repeat("x", 900)})
	if err != nil {
		b.Fatal(err)
	}
	for _, bc := range []struct {
		name     string
		groupBy  []string
		measures []string
		where    []string
	}{
		{"count", nil, []string{"count"}, nil},
		{"size", nil, []string{"sum(@size)"}, nil},
		{"integers", nil, []string{"sum(balance)"}, nil},
		{"decimals", nil, []string{"sum(rate)"}, nil},
		{"groups", []string{"city"}, []string{"count", "sum(balance)", "max(name)"}, []string{"balance >= 100"}},
	} {
		b.Run(bc.name, func(b *testing.B) {
			in := aggregate(b, bc.groupBy, bc.measures...)
			for _, text := range bc.where {
				c, err := report.ParseCondition(text)
				if err != nil {
					b.Fatal(err)
				}
				in.Where = append(in.Where, c)
			}
			a := compile(b, in).NewAccumulator(1000)
			key, rec := []byte("user/1"), valueRecord(string(value))
			b.SetBytes(int64(len(value)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := a.Add(key, rec, nowMillis); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
