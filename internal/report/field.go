package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"
	"unsafe"

	"github.com/tidwall/gjson"

	"github.com/kvasirdb/kvasir/internal/record"
)

// source says what of a record a field is.
type source uint8

const (
	fromJSON source = iota
	fromKey
	fromValue
	fromSize
	fromWritten
	fromExpires
)

var sources = map[string]source{
	"@key":     fromKey,
	"@value":   fromValue,
	"@size":    fromSize,
	"@written": fromWritten,
	"@expires": fromExpires,
}

// isTime reports whether the field is a time in milliseconds.
func (s source) isTime() bool { return s == fromWritten || s == fromExpires }

// isNumber reports whether the field is a number in every record.
func (s source) isNumber() bool { return s == fromSize || s.isTime() }

type field struct {
	source source
	path   string // of fromJSON
}

// parseField checks the name of a field.
func parseField(name string) (field, error) {
	switch {
	case name == "":
		return field{}, fmt.Errorf("the field is empty: want a path such as address.city, or one of @key, @value, @size, @written, @expires")
	case len(name) > MaxFieldBytes:
		return field{}, fmt.Errorf("the field has %d bytes: the limit is %d", len(name), MaxFieldBytes)
	case !utf8.ValidString(name):
		return field{}, fmt.Errorf("field %q: want UTF-8", name)
	case name[0] == '@':
		s, ok := sources[name]
		if !ok {
			return field{}, fmt.Errorf("field %s: want one of @key, @value, @size, @written, @expires, or a path that begins otherwise (\\@ for a name with @)", name)
		}
		return field{source: s}, nil
	}
	return field{path: name}, checkPath(name)
}

// checkPath admits the paths that cost no more than reading the value: names, array
// indexes, # for arrays, and wildcards. What else gjson knows (modifiers, queries,
// selections of several paths) may multiply a value without bound.
func checkPath(path string) error {
	start := 0 // of the name at i
	for i := 0; i <= len(path); i++ {
		if i == len(path) || path[i] == '.' {
			name := path[start:i]
			if name == "" {
				return fmt.Errorf("field %q: want names joined by dots, and one name is empty", path)
			}
			if strings.Contains(name, "#") && name != "#" {
				return fmt.Errorf("field %q: # stands for all elements of an array: want it alone between dots, or \\# in a name", path)
			}
			start = i + 1
			continue
		}
		switch c := path[i]; {
		case c == '\\':
			i++
		case strings.IndexByte("|!{}[]()", c) >= 0 || c == '@' && i == start:
			return fmt.Errorf("field %q: want \\%c where %c is part of a name", path, c, c)
		}
	}
	return nil
}

// view is a record as a query sees it. Each field is read when it is first asked
// for, so that a query that asks for none reads no value.
type view struct {
	q      *Query
	key    []byte
	rec    record.Record
	values []value
	read   []bool
	parsed bool
	root   value // the whole value; text when it is not JSON
}

func (v *view) reset(key []byte, rec record.Record) {
	v.key, v.rec, v.parsed = key, rec, false
	if v.values == nil {
		v.values, v.read = make([]value, len(v.q.fields)), make([]bool, len(v.q.fields))
	}
	clear(v.read)
}

// value returns a field of the record. Its text may alias the record.
func (v *view) value(at int) *value {
	if !v.read[at] {
		v.values[at] = v.load(v.q.fields[at])
		v.read[at] = true
	}
	return &v.values[at]
}

func (v *view) load(f field) value {
	switch f.source {
	case fromKey:
		return value{kind: Text, raw: alias(v.key)}
	case fromValue:
		return v.whole()
	case fromSize:
		return integer(int64(len(v.rec.Payload)))
	case fromWritten:
		return integer(v.rec.Version.Time.Millis())
	case fromExpires:
		return integer(v.rec.ExpiresAt)
	}
	if root := v.whole(); root.kind == JSON {
		return valueOf(gjson.Get(root.raw, f.path))
	}
	return value{kind: Missing}
}

// whole returns the record's value: what it is as JSON, or else its bytes as text.
func (v *view) whole() value {
	if v.parsed {
		return v.root
	}
	v.parsed = true
	v.root = value{kind: Text, raw: alias(v.rec.Payload)}
	if isJSON(v.rec.Payload) {
		v.root = valueOf(gjson.Parse(v.root.raw))
	}
	return v.root
}

// maxBrackets is how many brackets are surely not nested too deeply for gjson, which
// recurses into them; encoding/json refuses more than this depth.
const maxBrackets = 10000

func isJSON(b []byte) bool {
	if bytes.Count(b, []byte{'['})+bytes.Count(b, []byte{'{'}) > maxBrackets {
		return json.Valid(b)
	}
	return gjson.ValidBytes(b)
}

// alias returns b as a string without a copy.
// REQUIRES: b does not change while the string is in use.
func alias(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
