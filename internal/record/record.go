// Package record defines what is stored for a key, its encoding, and the join:
// the one law by which two records of a key become one. It is pure; it neither
// knows where records are kept nor reads a clock.
package record

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
)

// Version orders the records of a key: by timestamp, then by the incarnation of
// the node that coordinated the write. No two writes share a version.
type Version struct {
	Time        hlc.Timestamp
	Incarnation uint64
}

// Compare returns -1, 0 or +1 as v is lower than, equal to or greater than o.
func (v Version) Compare(o Version) int {
	if c := cmp.Compare(v.Time, o.Time); c != 0 {
		return c
	}
	if mutant.On("reversed-tie") {
		return cmp.Compare(o.Incarnation, v.Incarnation)
	}
	return cmp.Compare(v.Incarnation, o.Incarnation)
}

// IsZero reports whether v is the version of no write.
func (v Version) IsZero() bool { return v == Version{} }

// String writes a version as timestamp@incarnation.
func (v Version) String() string { return fmt.Sprintf("%s@%d", v.Time, v.Incarnation) }

// Kind says whether a record holds a value or marks a deletion.
type Kind uint8

// The kinds of records. Their numbers are part of the format.
const (
	Value     Kind = 1
	Tombstone Kind = 2
)

// String names a kind.
func (k Kind) String() string {
	switch k {
	case Value:
		return "value"
	case Tombstone:
		return "tombstone"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Record is what is stored for a key.
type Record struct {
	Version Version
	Kind    Kind
	// ExpiresAt is the first millisecond since 1970 at which a value is no longer
	// served; 0 means never. Tombstones do not expire.
	ExpiresAt int64
	// Payload is the value's bytes. A decoded record's payload aliases the input.
	Payload []byte
}

// IsLive reports whether a reader whose clock stands at nowMillis is served the
// record: a value that has not expired.
func (r Record) IsLive(nowMillis int64) bool {
	return r.Kind == Value && (r.ExpiresAt == 0 || nowMillis < r.ExpiresAt || mutant.On("expired-served"))
}

// Header returns the record without its payload.
func (r Record) Header() Record {
	r.Payload = nil
	return r
}

// Compare orders the records of one key; the join keeps the greater. A greater
// version wins; between equal versions a tombstone wins, then the later expiry
// (never being the latest), then the greater bytes.
func Compare(a, b Record) int {
	if c := CompareHeaders(a, b); c != 0 {
		return c
	}
	return bytes.Compare(a.Payload, b.Payload)
}

// CompareHeaders is Compare without the payloads.
func CompareHeaders(a, b Record) int {
	if c := a.Version.Compare(b.Version); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Kind, b.Kind); c != 0 {
		return c
	}
	// Subtracting 1 makes "never" the greatest unsigned number.
	return cmp.Compare(uint64(a.ExpiresAt)-1, uint64(b.ExpiresAt)-1)
}

// Encoding, format 1:
//
//	byte 0     format, 0x01
//	byte 1     kind in the low 4 bits; 0x10 set when an expiry follows
//	bytes 2-9  timestamp, big-endian
//	uvarint    incarnation
//	uvarint    expiry in milliseconds, when flagged
//	rest       payload; empty for a tombstone
//
// Every record has exactly one encoding, so equal records are equal bytes.
const (
	format1     = 0x01
	kindMask    = 0x0f
	flagExpiry  = 0x10
	fixedHeader = 10
)

// ErrCorrupt marks bytes that are not a record.
var ErrCorrupt = errors.New("corrupt record")

// ErrNewerFormat marks a record written by newer software.
var ErrNewerFormat = errors.New("record format is newer than this software")

// MaxHeaderLen is the greatest length of an encoded record without its payload.
const MaxHeaderLen = fixedHeader + 2*binary.MaxVarintLen64

// Append appends the encoding of r to dst.
// REQUIRES: r is a Value with ExpiresAt >= 0, or a Tombstone with neither expiry
// nor payload.
func Append(dst []byte, r Record) []byte {
	kind := byte(r.Kind)
	if r.ExpiresAt != 0 {
		kind |= flagExpiry
	}
	dst = append(dst, format1, kind)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.Version.Time))
	dst = binary.AppendUvarint(dst, r.Version.Incarnation)
	if r.ExpiresAt != 0 {
		dst = binary.AppendUvarint(dst, uint64(r.ExpiresAt))
	}
	return append(dst, r.Payload...)
}

// Encode returns the encoding of r; see Append.
func Encode(r Record) []byte {
	return Append(make([]byte, 0, MaxHeaderLen+len(r.Payload)), r)
}

// Decode parses an encoded record. The payload aliases b. Errors are ErrCorrupt
// or ErrNewerFormat.
func Decode(b []byte) (Record, error) {
	if len(b) == 0 {
		return Record{}, fmt.Errorf("%w: empty", ErrCorrupt)
	}
	if b[0] != format1 {
		if b[0] > format1 {
			return Record{}, fmt.Errorf("%w: format %d", ErrNewerFormat, b[0])
		}
		return Record{}, fmt.Errorf("%w: format %d", ErrCorrupt, b[0])
	}
	if len(b) < fixedHeader+1 {
		return Record{}, fmt.Errorf("%w: %d bytes", ErrCorrupt, len(b))
	}
	r := Record{Kind: Kind(b[1] & kindMask)}
	r.Version.Time = hlc.Timestamp(binary.BigEndian.Uint64(b[2:]))
	rest := b[fixedHeader:]
	var ok bool
	if r.Version.Incarnation, rest, ok = uvarint(rest); !ok {
		return Record{}, fmt.Errorf("%w: bad incarnation", ErrCorrupt)
	}
	switch flags := b[1] &^ kindMask; flags {
	case 0:
	case flagExpiry:
		var at uint64
		if at, rest, ok = uvarint(rest); !ok || at == 0 || int64(at) < 0 {
			return Record{}, fmt.Errorf("%w: bad expiry", ErrCorrupt)
		}
		r.ExpiresAt = int64(at)
	default:
		return Record{}, fmt.Errorf("%w: unknown flags %#x", ErrCorrupt, flags)
	}
	switch {
	case r.Kind == Value:
		r.Payload = rest
	case r.Kind != Tombstone:
		return Record{}, fmt.Errorf("%w: unknown %s", ErrCorrupt, r.Kind)
	case len(rest) != 0 || r.ExpiresAt != 0:
		return Record{}, fmt.Errorf("%w: tombstone with a payload or expiry", ErrCorrupt)
	}
	return r, nil
}

// uvarint reads a minimally encoded varint.
func uvarint(b []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 || (n > 1 && b[n-1] == 0) {
		return 0, nil, false
	}
	return v, b[n:], true
}

// Join returns the greater of two encoded records of one key, which is one of
// its arguments.
//
// Invariant 6: Join is commutative, associative and idempotent.
func Join(a, b []byte) ([]byte, error) {
	ra, err := Decode(a)
	if err != nil {
		return nil, err
	}
	rb, err := Decode(b)
	if err != nil {
		return nil, err
	}
	if Compare(ra, rb) >= 0 {
		return a, nil
	}
	return b, nil
}
