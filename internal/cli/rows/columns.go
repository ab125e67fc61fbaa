package rows

import (
	"bytes"
	"fmt"
)

// csvState is where in a comma-separated row a byte stands.
type csvState uint8

const (
	fieldStart csvState = iota
	plain
	quoted
	// quoteSeen: after a quote inside a quoted field, which ends the field or is the
	// first of two that stand for one.
	quoteSeen
	// returnSeen: after a carriage return behind a quoted field, where only the end of
	// the row may follow.
	returnSeen
	// broken: what follows cannot be told apart up to the next line break.
	broken
)

// next returns the state after a byte. A line break ends the row, unless the state
// is quoted; the caller sees to that.
func (s csvState) next(c byte) csvState {
	switch s {
	case fieldStart:
		switch c {
		case '"':
			return quoted
		case ',':
			return fieldStart
		}
		return plain
	case plain:
		if c == ',' {
			return fieldStart
		}
		return plain
	case quoted:
		if c == '"' {
			return quoteSeen
		}
		return quoted
	case quoteSeen:
		switch c {
		case '"':
			return quoted
		case ',':
			return fieldStart
		case '\r':
			return returnSeen
		}
	}
	return broken
}

// checkWhole returns an error unless bytes are exactly one row.
func (l Layout) checkWhole(row []byte) error {
	if l.Format == TSV {
		if bytes.IndexByte(row, '\n') >= 0 {
			return errLineBreak
		}
		return nil
	}
	state := fieldStart
	for _, c := range row {
		if c == '\n' && state != quoted {
			return errLineBreak
		}
		state = state.next(c)
	}
	if state == quoted || state == broken {
		return errMalformed
	}
	return nil
}

// span is where a field lies in a row.
type span struct{ start, end int }

// columns returns the fields of a row without its line end. An empty row has one,
// which is empty.
func (l Layout) columns(row []byte) []span {
	out := make([]span, 0, 8)
	start := 0
	state := fieldStart
	for i, c := range row {
		if l.Format == CSV && c == ',' && state != quoted || l.Format == TSV && c == '\t' {
			out = append(out, span{start, i})
			start = i + 1
		}
		state = state.next(c)
	}
	return append(out, span{start, len(row)})
}

// unquote returns the content of a field.
func (l Layout) unquote(field []byte) []byte {
	if !l.isQuoted(field) {
		return bytes.Clone(field)
	}
	return bytes.ReplaceAll(field[1:len(field)-1], []byte(`""`), []byte(`"`))
}

// quote appends a field with quotes.
func quote(dst, content []byte) []byte {
	dst = append(dst, '"')
	for _, c := range content {
		if c == '"' {
			dst = append(dst, '"')
		}
		dst = append(dst, c)
	}
	return append(dst, '"')
}

func (l Layout) isQuoted(field []byte) bool {
	return l.Format == CSV && len(field) >= 2 && field[0] == '"' && field[len(field)-1] == '"'
}

// needsQuotes reports whether a field's content is to be quoted.
func needsQuotes(content []byte) bool { return bytes.ContainsAny(content, "\",\r\n") }

// oddity says how a row differs from the one that its key and value make by
// default.
type oddity uint8

const (
	// otherLayout: the row is only the key; or, with the key in the last of several
	// columns, the carriage return at the end of the rest belongs to the column before
	// the key and not to the end of the row.
	otherLayout oddity = 1
	// otherQuotes: the key is quoted where it would not be, or the other way round.
	otherQuotes oddity = 2
)

// lineBreaks stand for an oddity at the end of a value: as many as its place among
// the oddities of the format.
const lineBreaks = "\n\n\n"

var (
	oddTSV = []oddity{0, otherLayout}
	oddCSV = []oddity{0, otherQuotes, otherLayout, otherQuotes | otherLayout}
)

func (l Layout) oddities() []oddity {
	if l.Format == CSV {
		return oddCSV
	}
	return oddTSV
}

func trimCR(row []byte) []byte { return bytes.TrimSuffix(row, []byte{'\r'}) }

// dissect returns a row's key, and the row without the key's column and one
// separator, with room for an oddity.
func (l Layout) dissect(row []byte) (key, rest []byte, err error) {
	if err := l.checkWhole(row); err != nil {
		return nil, nil, err
	}
	content := trimCR(row)
	fields := l.columns(content)
	if l.KeyColumn > len(fields) {
		return nil, nil, fmt.Errorf("the row has %d columns, and so no column %d", len(fields), l.KeyColumn)
	}
	f := fields[l.KeyColumn-1]
	if key = l.unquote(content[f.start:f.end]); len(key) == 0 {
		return nil, nil, errEmptyKey
	}
	before, after := max(f.start-1, 0), f.end
	if l.KeyColumn == 1 && len(fields) > 1 {
		after++
	}
	rest = make([]byte, 0, len(row)+len(lineBreaks))
	return key, append(append(rest, row[:before]...), row[after:]...), nil
}

// assemble appends the row that a key and the rest of a row make under an oddity. It
// is not ok when they make none.
func (l Layout) assemble(dst, key, rest []byte, o oddity) (row []byte, ok bool) {
	content := trimCR(rest)
	end := rest[len(content):]
	other := o&otherLayout != 0
	if l.KeyColumn == 1 {
		dst = l.appendKey(dst, key, content, o)
		if other {
			return append(dst, rest...), len(content) == 0
		}
		return append(append(dst, l.Format.separator()), rest...), true
	}
	fields := l.columns(content)
	switch {
	case len(fields) < l.KeyColumn-1:
		return dst, false
	case len(fields) >= l.KeyColumn:
		at := fields[l.KeyColumn-1].start
		dst = append(dst, content[:at]...)
		dst = l.appendKey(dst, key, content, o)
		dst = append(dst, l.Format.separator())
		return append(dst, rest[at:]...), !other
	}
	// The key is the last column.
	if other {
		dst = append(append(dst, rest...), l.Format.separator())
		return l.appendKey(dst, key, content, o), len(end) > 0
	}
	dst = append(append(dst, content...), l.Format.separator())
	return append(l.appendKey(dst, key, content, o), end...), true
}

// appendKey appends a key as it is written beside the rest of a row.
func (l Layout) appendKey(dst, key, rest []byte, o oddity) []byte {
	if l.Format != CSV {
		return append(dst, key...)
	}
	quotes := needsQuotes(key) || l.quotesAll(rest)
	if o&otherQuotes != 0 {
		quotes = !quotes
	}
	if quotes {
		return quote(dst, key)
	}
	return append(dst, key...)
}

// quotesAll reports whether all fields of a row seem to be quoted on principle.
func (l Layout) quotesAll(rest []byte) bool {
	onPrinciple := false
	for _, s := range l.columns(rest) {
		f := rest[s.start:s.end]
		if !l.isQuoted(f) {
			return false
		}
		onPrinciple = onPrinciple || !needsQuotes(l.unquote(f))
	}
	return onPrinciple
}
