package storage

import (
	"encoding/binary"
	"fmt"
)

// Storage keys begin with their kind:
//
//	0x01 namespace(4) vnode(4) user key    a record; vnodes are contiguous ranges
//	0x02 target(8) sequence(8)             a hint for an incarnation
//	0x03 name                              what the node keeps about itself
//	0x04 namespace(4) vnode(4)             how far the collection of dead records is
//	0x05 namespace(4) vnode(4)             the mark of a dirty vnode
//
// Numbers are big-endian, so that byte order is number order.
const (
	kindRecord     byte = 0x01
	kindHint       byte = 0x02
	kindMeta       byte = 0x03
	kindCollection byte = 0x04
	kindDirty      byte = 0x05
)

const (
	recordPrefixLen  = 1 + 4 + 4
	hintKeyLen       = 1 + 8 + 8
	collectionKeyLen = 1 + 4 + 4
	dirtyKeyLen      = 1 + 4 + 4
)

func appendRecordPrefix(dst []byte, namespace, vnode uint32) []byte {
	dst = append(dst, kindRecord)
	dst = binary.BigEndian.AppendUint32(dst, namespace)
	return binary.BigEndian.AppendUint32(dst, vnode)
}

func appendRecordKey(dst []byte, namespace, vnode uint32, key []byte) []byte {
	return append(appendRecordPrefix(dst, namespace, vnode), key...)
}

// namespaceRange returns the bounds of a namespace's records.
func namespaceRange(namespace uint32) (lower, upper []byte) {
	lower = binary.BigEndian.AppendUint32([]byte{kindRecord}, namespace)
	return lower, successor(lower)
}

// vnodeRange returns the bounds of a vnode's records with keys in [start, end);
// an empty end means all that follow.
func vnodeRange(namespace, vnode uint32, start, end []byte) (lower, upper []byte) {
	prefix := appendRecordPrefix(nil, namespace, vnode)
	lower = append(prefix[:len(prefix):len(prefix)], start...)
	if len(end) == 0 {
		return lower, successor(prefix)
	}
	return lower, append(prefix[:len(prefix):len(prefix)], end...)
}

func hintKey(target, seq uint64) []byte {
	b := append(make([]byte, 0, hintKeyLen), kindHint)
	b = binary.BigEndian.AppendUint64(b, target)
	return binary.BigEndian.AppendUint64(b, seq)
}

func decodeHintKey(b []byte) (target, seq uint64, err error) {
	if len(b) != hintKeyLen || b[0] != kindHint {
		return 0, 0, fmt.Errorf("%w: hint key %x", ErrCorrupt, b)
	}
	return binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint64(b[9:]), nil
}

func collectionKey(namespace, vnode uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{kindCollection}, namespace)
	return binary.BigEndian.AppendUint32(b, vnode)
}

// collectionRange returns the bounds of a namespace's collection states.
func collectionRange(namespace uint32) (lower, upper []byte) {
	lower = binary.BigEndian.AppendUint32([]byte{kindCollection}, namespace)
	return lower, successor(lower)
}

func decodeCollectionKey(b []byte) (namespace, vnode uint32, err error) {
	if len(b) != collectionKeyLen || b[0] != kindCollection {
		return 0, 0, fmt.Errorf("%w: collection key %x", ErrCorrupt, b)
	}
	return binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:]), nil
}

func metaKey(name string) []byte { return append([]byte{kindMeta}, name...) }

func dirtyKey(p Place) []byte {
	b := append(make([]byte, 0, dirtyKeyLen), kindDirty)
	b = binary.BigEndian.AppendUint32(b, p.Namespace)
	return binary.BigEndian.AppendUint32(b, p.Vnode)
}

func decodeDirtyKey(b []byte) (Place, error) {
	if len(b) != dirtyKeyLen || b[0] != kindDirty {
		return Place{}, fmt.Errorf("%w: key of a dirty mark %x", ErrCorrupt, b)
	}
	return Place{binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:])}, nil
}

// successor returns the first key after all keys that begin with prefix.
// REQUIRES: some byte of prefix is below 0xff; the kind byte always is.
func successor(prefix []byte) []byte {
	out := append([]byte(nil), prefix...)
	for i := len(out) - 1; i >= 0; i-- {
		if out[i]++; out[i] != 0 {
			return out[:i+1]
		}
	}
	panic("storage: no key follows " + string(prefix))
}
