package antientropy

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// nodesOf makes a list of nodes from records, one a key that boundary says.
func nodesOf(records map[int]int, boundary func(int) bool) []*replicav1.DigestNode {
	out := []*replicav1.DigestNode{{}}
	for k := range 40 {
		v, ok := records[k]
		if !ok {
			continue
		}
		if boundary(k) {
			out = append(out, &replicav1.DigestNode{Start: fmt.Appendf(nil, "%02d", k)})
		}
		n := out[len(out)-1]
		n.Records++
		n.Hash = fmt.Append(n.Hash, k, "=", v, ";")
	}
	return out
}

// Whatever two replicas hold, every key they differ about lies in a stretch that is
// named, stretches are in order, and nothing is named where all is equal.
func TestDifferingFindsEveryDifference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.MapOf(rapid.IntRange(0, 39), rapid.IntRange(0, 3)).Draw(t, "a")
		b := map[int]int{}
		for k, v := range a {
			b[k] = v
		}
		for _, k := range rapid.SliceOfN(rapid.IntRange(0, 39), 0, 6).Draw(t, "changed") {
			if rapid.Bool().Draw(t, "gone") {
				delete(b, k)
			} else {
				b[k] = rapid.IntRange(0, 3).Draw(t, "value")
			}
		}
		starts := rapid.SliceOfN(rapid.IntRange(0, 39), 0, 15).Draw(t, "boundaries")
		boundary := func(k int) bool { return slices.Contains(starts, k) }
		spans := differing(nodesOf(a, boundary), nodesOf(b, boundary), span{})
		in := func(k int) bool {
			key := fmt.Appendf(nil, "%02d", k)
			return slices.ContainsFunc(spans, func(s span) bool {
				return bytes.Compare(key, s.start) >= 0 && (len(s.end) == 0 || bytes.Compare(key, s.end) < 0)
			})
		}
		equal := true
		for k := range 40 {
			va, oka := a[k]
			vb, okb := b[k]
			if va != vb || oka != okb {
				equal = false
				if !in(k) {
					t.Fatalf("key %d differs and is in none of %q", k, spans)
				}
			}
		}
		if equal && len(spans) > 0 {
			t.Fatalf("equal replicas differ in %q", spans)
		}
		for i := 1; i < len(spans); i++ {
			if compareEnds(spans[i-1].end, spans[i].start) >= 0 && !bytes.Equal(spans[i-1].end, spans[i].start) {
				t.Fatalf("stretches out of order: %q", spans)
			}
		}
	})
}

// Only the stretch with the difference is named.
func TestDifferingNamesNoMore(t *testing.T) {
	records := map[int]int{}
	for k := range 40 {
		records[k] = 1
	}
	every5 := func(k int) bool { return k%5 == 0 }
	other := map[int]int{}
	for k := range records {
		other[k] = 1
	}
	other[17] = 2
	spans := differing(nodesOf(records, every5), nodesOf(other, every5), span{})
	if len(spans) != 1 || string(spans[0].start) != "15" || string(spans[0].end) != "20" {
		t.Errorf("a difference at 17 is looked for in %q", spans)
	}
	delete(other, 20) // where a node begins
	spans = differing(nodesOf(records, every5), nodesOf(other, every5), span{})
	if len(spans) != 1 || string(spans[0].start) != "15" || string(spans[0].end) != "25" {
		t.Errorf("differences at 17 and 20 are looked for in %q", spans)
	}
}

// Invariant 18: the newer record wins in either direction, and what a certificate
// lets go does not come back.
func TestCompareHeaders(t *testing.T) {
	entry := func(key string, version uint64, kind record.Kind) *replicav1.Entry {
		return &replicav1.Entry{Key: []byte(key), Record: record.Encode(record.Record{
			Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1}, Kind: kind,
		})}
	}
	mine := []*replicav1.Entry{
		entry("equal", 5, record.Value), entry("gone", 3, record.Tombstone), entry("mine", 1, record.Value),
		entry("newer", 9, record.Tombstone), entry("older", 2, record.Value),
	}
	theirs := []*replicav1.Entry{
		entry("equal", 5, record.Value), entry("newer", 8, record.Value), entry("older", 4, record.Value),
		entry("theirs", 1, record.Value), entry("void", 4, record.Tombstone),
	}
	d, err := compare(mine, theirs, 4)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%s %s", d.push, d.pull); got != "[mine newer] [older theirs]" {
		t.Errorf("push and pull %s", got)
	}
	if _, err := compare([]*replicav1.Entry{{Key: []byte("k"), Record: []byte("junk")}}, nil, 0); err == nil {
		t.Error("junk passes for a header")
	}
}
