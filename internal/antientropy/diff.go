package antientropy

import (
	"bytes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/storage"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// span is a stretch of keys; an empty end means no end.
type span struct{ start, end []byte }

// differing returns the stretches of within in which two lists of nodes differ. A
// node counts as equal where the other list has one with the same start, end and
// hash; the shape of a tree follows from its keys, so equal records have equal nodes.
func differing(mine, theirs []*replicav1.DigestNode, within span) []span {
	var out []span
	open := false
	extend := func(start, end []byte) {
		if open && bytes.Equal(out[len(out)-1].end, start) && len(start) > 0 {
			out[len(out)-1].end = end
			return
		}
		out = append(out, span{start, end})
		open = true
	}
	i, j := 0, 0
	at := within.start
	for i < len(mine) || j < len(theirs) {
		a, aEnd := nodeAt(mine, i, within)
		b, bEnd := nodeAt(theirs, j, within)
		if a != nil && b != nil && sameStart(a, b, at) && bytes.Equal(aEnd, bEnd) && bytes.Equal(a.GetHash(), b.GetHash()) && a.GetRecords() == b.GetRecords() {
			at, i, j = aEnd, i+1, j+1
			continue
		}
		// Up to the next key at which both lists begin a node.
		end := within.end
		for i < len(mine) || j < len(theirs) {
			_, aEnd = nodeAt(mine, i, within)
			_, bEnd = nodeAt(theirs, j, within)
			c := compareEnds(aEnd, bEnd)
			if c <= 0 {
				i++
			}
			if c >= 0 {
				j++
			}
			if c == 0 {
				end = aEnd
				break
			}
		}
		extend(at, end)
		at = end
	}
	return out
}

// nodeAt returns the i-th node and where it ends; beyond the last, nil and the end.
func nodeAt(nodes []*replicav1.DigestNode, i int, within span) (*replicav1.DigestNode, []byte) {
	if i >= len(nodes) {
		return nil, within.end
	}
	if i+1 < len(nodes) {
		return nodes[i], nodes[i+1].GetStart()
	}
	return nodes[i], within.end
}

// sameStart reports whether two nodes begin at the same key. The first of a stretch
// may begin before it in one list.
func sameStart(a, b *replicav1.DigestNode, at []byte) bool {
	return bytes.Equal(a.GetStart(), b.GetStart()) && bytes.Compare(a.GetStart(), at) >= 0
}

// compareEnds orders ends of stretches; the empty one is the last.
func compareEnds(a, b []byte) int {
	switch {
	case len(a) == 0 && len(b) == 0:
		return 0
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return bytes.Compare(a, b)
}

// keyDiff says of two lists of headers which keys the other side has newer records of.
type keyDiff struct{ pull, push [][]byte }

// compare merges two lists of headers in order of keys. Records that the certificate
// lets go count as absent.
func compare(mine, theirs []*replicav1.Entry, certificate hlc.Timestamp) (d keyDiff, err error) {
	i, j := 0, 0
	for i < len(mine) || j < len(theirs) {
		c := 0
		switch {
		case i == len(mine):
			c = 1
		case j == len(theirs):
			c = -1
		default:
			c = bytes.Compare(mine[i].GetKey(), theirs[j].GetKey())
		}
		var a, b record.Record
		var key []byte
		if c <= 0 {
			key = mine[i].GetKey()
			if a, err = lasting(mine[i].GetRecord(), certificate); err != nil {
				return d, err
			}
			i++
		}
		if c >= 0 {
			key = theirs[j].GetKey()
			if b, err = lasting(theirs[j].GetRecord(), certificate); err != nil {
				return d, err
			}
			j++
		}
		switch h := record.CompareHeaders(a, b); {
		case h > 0:
			d.push = append(d.push, key)
		case h < 0:
			d.pull = append(d.pull, key)
		}
	}
	return d, nil
}

// lasting decodes a header, and returns none for a record that the certificate lets
// go.
func lasting(header []byte, certificate hlc.Timestamp) (record.Record, error) {
	rec, err := record.Decode(header)
	if err != nil {
		return rec, err
	}
	if at, dies := storage.DeadAt(rec); dies && at <= certificate {
		return record.Record{}, nil
	}
	return rec, nil
}
