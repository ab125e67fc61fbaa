package storage

import (
	"fmt"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func TestUse(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer closeStore(t, s)
	place := Place{1, 2}
	count := func(n int) (want Use) {
		var writes []Write
		for i := range n {
			w := treeWrite(fmt.Sprintf("key-%05d", i), 7, 1)
			want.Records++
			want.Bytes += uint64(len(w.Key) + len(w.Record))
			writes = append(writes, w)
		}
		applyAll(t, s, writes...)
		return want
	}
	if u := s.Use(place); u != (Use{}) {
		t.Errorf("an empty place: %+v", u)
	}
	few := count(useSample - 1)
	if u := s.Use(place); u != few {
		t.Errorf("few records: %+v, want %+v", u, few)
	}
	many := count(20_000)
	if u := s.Use(place); u.Records != useSample {
		t.Errorf("in memory only: %+v", u) // no table tells how much there is
	}
	if err := s.db.Flush(); err != nil {
		t.Fatal(err)
	}
	// What is on disk is compressed, and these keys compress well.
	if u := s.Use(place); u.Records < many.Records/10 || u.Records > many.Records*2 || u.Bytes < many.Bytes/10 || u.Bytes > many.Bytes*2 {
		t.Errorf("by the tables: %+v, there are %+v", u, many)
	}
	treeLevels(t, s, 0)
	if u := s.Use(place); u != many {
		t.Errorf("by the tree: %+v, want %+v", u, many)
	}
	applyAll(t, s, treeWrite("key-00001", 8, 1))
	if u := s.Use(place); u != many {
		t.Errorf("with a dirty leaf: %+v, want %+v", u, many)
	}
	if u := s.Use(Place{1, 3}); u != (Use{}) {
		t.Errorf("another vnode: %+v", u)
	}
}
