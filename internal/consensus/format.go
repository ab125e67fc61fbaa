package consensus

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// The store's keys, by their first byte. Numbers are big-endian, so that the
// order of the keys is that of the numbers.
//
//	f                          the format of the store, one byte
//	n                          the number of commits so far, this one included
//	g                          the group of the servers; absent where they have none
//	l index(8)                 a log entry
//	s name                     a value of Raft's stable store: term and vote
//	m index(8) term(8)         what a snapshot is
//	c index(8) term(8) n(4)    the nth part of a snapshot's content
const (
	prefixFormat   = 'f'
	prefixCommits  = 'n'
	prefixGroup    = 'g'
	prefixLog      = 'l'
	prefixStable   = 's'
	prefixSnapshot = 'm'
	prefixContent  = 'c'
)

// storeFormat is the layout written by this release, and the greatest one it reads.
const storeFormat = 1

// The versions of the values, their first byte.
const (
	entryVersion    = 1
	snapshotVersion = 1
)

// partBytes is the size of a part of a snapshot's content, the last one excepted.
const partBytes = 1 << 20

// span is a range of keys, from lower to below upper.
type span struct{ lower, upper []byte }

// prefixSpan covers the keys that begin with a prefix that does not end in 0xff.
func prefixSpan(prefix ...byte) span {
	upper := append([]byte(nil), prefix...)
	upper[len(upper)-1]++
	return span{prefix, upper}
}

func logKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{prefixLog}, index)
}

// logSpan covers the entries from first to last, both included.
func logSpan(first, last uint64) span {
	// One zero byte more is the least key above that of the last entry.
	return span{logKey(first), append(logKey(last), 0)}
}

func stableKey(name []byte) []byte {
	return append([]byte{prefixStable}, name...)
}

// snapshotID names a snapshot. There is one of each index and term: what is
// committed at an index is the same wherever and whenever it is written.
type snapshotID struct{ index, term uint64 }

// String writes an identifier the way Raft's own stores do, term first.
func (id snapshotID) String() string { return fmt.Sprintf("%d-%d", id.term, id.index) }

func (id snapshotID) compare(o snapshotID) int {
	return cmp.Or(cmp.Compare(id.index, o.index), cmp.Compare(id.term, o.term))
}

func (id snapshotID) key(prefix byte) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{prefix}, id.index), id.term)
}

func (id snapshotID) part(n uint32) []byte {
	return binary.BigEndian.AppendUint32(id.key(prefixContent), n)
}

// content covers the parts of a snapshot.
func (id snapshotID) content() span {
	return span{id.key(prefixContent), append(id.part(1<<32-1), 0)}
}

// parseSnapshotKey is the inverse of snapshotID.key.
func parseSnapshotKey(key []byte) (snapshotID, error) {
	if len(key) != 17 {
		return snapshotID{}, errMalformed
	}
	return snapshotID{binary.BigEndian.Uint64(key[1:]), binary.BigEndian.Uint64(key[9:])}, nil
}

// encodeEntry writes a log entry: version, type, term, time of its append in
// nanoseconds since 1970 (0 is none), length of the data, data, extensions. The
// index is in the key.
func encodeEntry(l *raft.Log) []byte {
	b := make([]byte, 0, 32+len(l.Data)+len(l.Extensions))
	b = append(b, entryVersion, byte(l.Type))
	b = binary.AppendUvarint(b, l.Term)
	var at int64
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.AppendVarint(b, at)
	b = appendBytes(b, l.Data)
	return append(b, l.Extensions...)
}

// decodeEntry reads what encodeEntry wrote. The entry shares memory with b.
func decodeEntry(b []byte) (raft.Log, error) {
	d := decoder{rest: b}
	d.version(entryVersion)
	l := raft.Log{Type: raft.LogType(d.byte())}
	l.Term = d.uvarint()
	if at := d.varint(); at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	l.Data = d.bytes()
	l.Extensions = d.rest
	if d.err != nil {
		return raft.Log{}, fmt.Errorf("log entry: %w", d.err)
	}
	return l, nil
}

// snapshotMeta is what is known of a snapshot besides its identifier.
type snapshotMeta struct {
	servers      raft.Configuration
	serversIndex uint64
	size         uint64
	// checksum is the CRC-32C of the content.
	checksum uint32
}

// encodeSnapshotMeta writes version, size, checksum, index of the configuration,
// number of servers, and each server's suffrage, name and address.
func encodeSnapshotMeta(m snapshotMeta) []byte {
	b := []byte{snapshotVersion}
	b = binary.AppendUvarint(b, m.size)
	b = binary.BigEndian.AppendUint32(b, m.checksum)
	b = binary.AppendUvarint(b, m.serversIndex)
	b = binary.AppendUvarint(b, uint64(len(m.servers.Servers)))
	for _, s := range m.servers.Servers {
		b = append(b, byte(s.Suffrage))
		b = appendBytes(b, []byte(s.ID))
		b = appendBytes(b, []byte(s.Address))
	}
	return b
}

// decodeSnapshotMeta reads what encodeSnapshotMeta wrote.
func decodeSnapshotMeta(b []byte) (snapshotMeta, error) {
	d := decoder{rest: b}
	d.version(snapshotVersion)
	m := snapshotMeta{size: d.uvarint(), checksum: d.uint32(), serversIndex: d.uvarint()}
	for n := d.uvarint(); n > 0 && d.err == nil; n-- {
		m.servers.Servers = append(m.servers.Servers, raft.Server{
			Suffrage: raft.ServerSuffrage(d.byte()),
			ID:       raft.ServerID(d.bytes()),
			Address:  raft.ServerAddress(d.bytes()),
		})
	}
	if d.err == nil && len(d.rest) > 0 {
		d.err = errMalformed
	}
	if d.err != nil {
		return snapshotMeta{}, fmt.Errorf("snapshot: %w", d.err)
	}
	return m, nil
}

var errMalformed = errors.New("malformed value")

// decoder takes values off the front of rest. After the first failure it returns
// zeros.
type decoder struct {
	rest []byte
	err  error
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.rest, d.err = nil, err
	}
}

func (d *decoder) take(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.fail(errMalformed)
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) version(known byte) {
	if v := d.byte(); d.err == nil && v != known {
		d.fail(fmt.Errorf("version %d is not known: it was written by another release", v))
	}
}

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 {
		d.fail(errMalformed)
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.rest)
	if n <= 0 {
		d.fail(errMalformed)
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

// bytes takes a length and as many bytes; none are nil.
func (d *decoder) bytes() []byte {
	if b := d.take(d.uvarint()); len(b) > 0 {
		return b
	}
	return nil
}

func appendBytes(b, value []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(value))), value...)
}
