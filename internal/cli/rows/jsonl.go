package rows

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"
)

// jsonFields are the names a JSON row may have. Each half is given as text, or in
// base64 when it is not UTF-8.
var jsonFields = []string{"key", "key_base64", "value", "value_base64"}

// splitJSON reads one JSON object. It is stricter than encoding/json, which takes
// names in any case, the last of several equal ones, and replaces what is not
// Unicode.
func splitJSON(row []byte) (key, value []byte, err error) {
	if !utf8.Valid(row) {
		return nil, nil, errors.New("malformed JSON: not UTF-8; give key_base64 or value_base64 instead")
	}
	if hasLoneSurrogate(row) {
		return nil, nil, errors.New("malformed JSON: half of a surrogate pair stands alone")
	}
	fields, err := readObject(row)
	if err != nil {
		return nil, nil, err
	}
	if key, err = half(fields, "key"); err != nil {
		return nil, nil, err
	}
	if len(key) == 0 {
		return nil, nil, errEmptyKey
	}
	value, err = half(fields, "value")
	return key, value, err
}

// readObject reads an object of strings with nothing behind it.
func readObject(row []byte) (map[string]string, error) {
	var checked json.RawMessage
	if err := json.Unmarshal(row, &checked); err != nil {
		return nil, fmt.Errorf("malformed JSON: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(row))
	if t, _ := dec.Token(); t != json.Delim('{') {
		return nil, errors.New("the row is no JSON object")
	}
	fields := map[string]string{}
	for dec.More() {
		// The syntax is known to be right, so that tokens come without errors.
		t, _ := dec.Token()
		name, _ := t.(string)
		if _, twice := fields[name]; twice {
			return nil, fmt.Errorf("the object has %q twice", name)
		}
		if !slices.Contains(jsonFields, name) {
			return nil, fmt.Errorf("unknown field %q: want key or key_base64, and value or value_base64", name)
		}
		t, _ = dec.Token()
		text, isText := t.(string)
		if !isText {
			return nil, fmt.Errorf("%q is not a string", name)
		}
		fields[name] = text
	}
	return fields, nil
}

// half returns the key or the value, in whichever form it is given.
func half(fields map[string]string, name string) ([]byte, error) {
	text, isText := fields[name]
	encoded, isEncoded := fields[name+"_base64"]
	switch {
	case isText && isEncoded:
		return nil, fmt.Errorf("both %s and %s_base64 are given", name, name)
	case isText:
		return []byte(text), nil
	case !isEncoded:
		return nil, fmt.Errorf("neither %s nor %s_base64 is given", name, name)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("%s_base64: %w", name, err)
	}
	return b, nil
}

// hasLoneSurrogate reports whether a \u escape names half of a surrogate pair
// without the other half, which encoding/json replaces without a word.
func hasLoneSurrogate(row []byte) bool {
	for i := 0; i < len(row); i++ {
		if row[i] != '\\' {
			continue
		}
		u, isU := unicodeEscape(row[i:])
		switch {
		case !isU:
			i++ // an escaped backslash begins no escape
		case u >= 0xd800 && u < 0xdc00:
			low, ok := unicodeEscape(row[i+6:])
			if !ok || low < 0xdc00 || low > 0xdfff {
				return true
			}
			i += 11
		case u >= 0xdc00 && u <= 0xdfff:
			return true
		default:
			i += 5
		}
	}
	return false
}

func unicodeEscape(b []byte) (u uint64, ok bool) {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0, false
	}
	u, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	return u, err == nil
}

// joinJSON appends a record as a JSON object.
func joinJSON(dst, key, value []byte) ([]byte, error) {
	if len(key) == 0 {
		return dst, errEmptyKey
	}
	dst = appendHalf(append(dst, '{'), "key", key)
	dst = appendHalf(append(dst, ','), "value", value)
	return append(dst, '}'), nil
}

func appendHalf(dst []byte, name string, content []byte) []byte {
	if utf8.Valid(content) {
		dst = append(dst, `"`+name+`":`...)
		return appendString(dst, string(content))
	}
	dst = append(dst, `"`+name+`_base64":"`...)
	dst = base64.StdEncoding.AppendEncode(dst, content)
	return append(dst, '"')
}

// appendString appends a JSON string that leaves <, > and & as they are.
func appendString(dst []byte, s string) []byte {
	buf := bytes.NewBuffer(dst)
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		panic("rows: encoding a string: " + err.Error())
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte{'\n'})
}
