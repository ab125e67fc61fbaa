package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// metaVersion is the version of the encoding of Meta, its first byte. Later releases
// may append fields without a new one: what follows the known fields is ignored.
const metaVersion = 1

var errBadMeta = errors.New("gossip: malformed metadata")

// Meta is what a process says of itself. Its meaning is the caller's.
type Meta struct {
	// Incarnation is that of a node, 0 for an orchestrator.
	Incarnation uint64
	// Epoch is that of the topology the process has.
	Epoch uint64
	State byte
}

// encode writes version, state, incarnation and epoch, in at most 22 bytes.
func (m Meta) encode() []byte {
	b := []byte{metaVersion, m.State}
	b = binary.AppendUvarint(b, m.Incarnation)
	return binary.AppendUvarint(b, m.Epoch)
}

// decodeMeta reads what encode wrote.
func decodeMeta(b []byte) (Meta, error) {
	if len(b) < 2 {
		return Meta{}, errBadMeta
	}
	if b[0] != metaVersion {
		return Meta{}, fmt.Errorf("gossip: metadata of version %d is not known", b[0])
	}
	m := Meta{State: b[1]}
	b = b[2:]
	for _, field := range []*uint64{&m.Incarnation, &m.Epoch} {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return Meta{}, errBadMeta
		}
		*field, b = v, b[n:]
	}
	return m, nil
}
