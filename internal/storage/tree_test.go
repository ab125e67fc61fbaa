package storage

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// treeLevels returns a vnode's tree on every level.
func treeLevels(t *testing.T, s *Store, certificate hlc.Timestamp) (out [3][]TreeNode) {
	t.Helper()
	for level := range out {
		for start, more := []byte(nil), true; more; more = start != nil {
			nodes, next, _, err := s.Tree(context.Background(), 1, 2, certificate, level, start, nil, 7)
			if err != nil {
				t.Fatal(err)
			}
			out[level] = append(out[level], nodes...)
			start = next
		}
	}
	return out
}

func treeWrite(key string, version uint64, kind record.Kind) Write {
	rec := record.Record{Version: record.Version{Time: hlc.Timestamp(version), Incarnation: 1}, Kind: kind}
	if kind == record.Value {
		rec.Payload = fmt.Append(nil, "value ", version)
	}
	return Write{Namespace: 1, Vnode: 2, Key: []byte(key), Record: record.Encode(rec)}
}

func applyAll(t *testing.T, s *Store, writes ...Write) {
	t.Helper()
	c, err := s.Apply(writes, nil)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Equal records give equal trees, whatever the order they came in, through flushes
// and restarts, and whether a tree was kept up to date or built at the end.
func TestTreesFollowTheRecords(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var writes []Write
		for i := range 6000 {
			kind := record.Value
			if rng.IntN(5) == 0 {
				kind = record.Tombstone
			}
			writes = append(writes, treeWrite(fmt.Sprint("key", rng.IntN(3000)), uint64(i+1), kind))
		}
		kept, built := open(t, vfs.NewMem()), open(t, vfs.NewMem())
		treeLevels(t, kept, 0)
		for i := 0; i < len(writes); {
			n := min(1+rng.IntN(200), len(writes)-i)
			for _, w := range writes[i : i+n] {
				applyAll(t, kept, w)
			}
			i += n
			if rng.IntN(4) == 0 {
				treeLevels(t, kept, hlc.Timestamp(rng.IntN(i)/4))
			}
			if rng.IntN(10) == 0 {
				if err := kept.db.Flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		rng.Shuffle(len(writes), func(i, j int) { writes[i], writes[j] = writes[j], writes[i] })
		for i, w := range writes {
			applyAll(t, built, w)
			if i%3 == 0 {
				applyAll(t, built, w) // delivered twice
			}
		}
		certificate := hlc.Timestamp(len(writes) / 3)
		a, b := treeLevels(t, kept, certificate), treeLevels(t, built, certificate)
		if d := cmp.Diff(a, b); d != "" {
			t.Fatalf("seed %d: trees of equal records differ:\n%s", seed, d)
		}
		if len(a[Leaves]) < 8 || len(a[Root]) != 1 || a[Root][0].Records < 2000 {
			t.Errorf("seed %d: %d leaves, root %+v", seed, len(a[Leaves]), a[Root])
		}
		applyAll(t, built, treeWrite("key1", 1_000_000, record.Value))
		c := treeLevels(t, built, certificate)
		if c[Root][0].Hash == a[Root][0].Hash {
			t.Errorf("seed %d: a changed record does not change the root", seed)
		}
		differing := 0
		for _, n := range c[Leaves] {
			if !slices.ContainsFunc(a[Leaves], func(o TreeNode) bool { return o.Hash == n.Hash }) {
				differing++
			}
		}
		if differing != 1 && differing != 2 {
			t.Errorf("seed %d: one changed record changes %d leaves", seed, differing)
		}
		kept.Close()
		built.Close()
	}
}

// Asking again costs what has changed, not what is stored.
func TestTreeCostFollowsChange(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer s.Close()
	for i := range 20_000 {
		applyAll(t, s, treeWrite(fmt.Sprintf("key%05d", i), 1, record.Value))
	}
	treeLevels(t, s, 0)
	full := s.TreeBytesRead()
	treeLevels(t, s, 0)
	if again := s.TreeBytesRead() - full; again != 0 {
		t.Errorf("an unchanged tree is read again: %d bytes", again)
	}
	applyAll(t, s, treeWrite("key07777", 2, record.Value))
	treeLevels(t, s, 0)
	if changed := s.TreeBytesRead() - full; changed == 0 || changed > full/20 {
		t.Errorf("one change reads %d of %d bytes", changed, full)
	}
	// Superseded records change nothing.
	before := s.TreeBytesRead()
	for range blindLimit + 2 {
		applyAll(t, s, treeWrite("key07777", 1, record.Value))
	}
	treeLevels(t, s, 0)
	applyAll(t, s, treeWrite("key07777", 1, record.Value))
	after := s.TreeBytesRead()
	treeLevels(t, s, 0)
	if s.TreeBytesRead() != after {
		t.Errorf("a superseded record makes a leaf be read again (%d bytes before)", after-before)
	}
}

// Removing what the certificate lets go leaves the tree as it is, also where a
// removed key began a leaf.
func TestTreeWithoutTheDead(t *testing.T) {
	with, without := open(t, vfs.NewMem()), open(t, vfs.NewMem())
	defer with.Close()
	defer without.Close()
	starts := 0
	for i := range 5000 {
		key := fmt.Sprint("key", i)
		kind, version := record.Value, uint64(100)
		if begins, _ := startsLeaf([]byte(key)); begins {
			kind, version = record.Tombstone, 50
			starts++
		}
		applyAll(t, with, treeWrite(key, version, kind))
		if kind == record.Value {
			applyAll(t, without, treeWrite(key, version, kind))
		}
	}
	if starts < 10 {
		t.Fatalf("%d keys begin leaves", starts)
	}
	ctx := context.Background()
	if d, err := with.Dead(ctx, 1, 2, 0); err != nil || d.Records != uint64(starts) || d.Oldest != 50 || d.Gone != 0 {
		t.Errorf("dead: %+v, %v", d, err)
	}
	if a, b := treeLevels(t, with, 49), treeLevels(t, without, 49); a[Root][0].Hash == b[Root][0].Hash {
		t.Error("dead records above the certificate are left out")
	}
	a, b := treeLevels(t, with, 50), treeLevels(t, without, 50)
	if d := cmp.Diff(a, b); d != "" {
		t.Errorf("trees differ by records that the certificate lets go:\n%s", d)
	}
	d, err := with.Dead(ctx, 1, 2, 0)
	if err != nil || d.Records != 0 || d.Gone != uint64(starts) {
		t.Errorf("dead: %+v, %v", d, err)
	}
	if ranges, err := with.GoneRanges(ctx, 1, 2, 0); err != nil || len(ranges) != 1 {
		t.Errorf("ranges with dead records: %q, %v", ranges, err)
	}
}

// However writers and readers race, a tree that has come to rest is that of the
// records.
func TestTreeUnderRaces(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer s.Close()
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 2))
			for i := range 1500 {
				applyAll(t, s, treeWrite(fmt.Sprint("key", rng.IntN(700)), uint64(i*4+w), record.Kind(1+rng.IntN(2))))
			}
		})
	}
	for r := range 2 {
		readers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, _, _, err := s.Tree(context.Background(), 1, 2, 0, Leaves, nil, nil, 0); err != nil {
					t.Error(err)
				}
				if r == 0 && i%50 == 0 {
					s.trees.forget(func(vnodeID) bool { return true })
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	kept := treeLevels(t, s, 0)
	s.trees.forget(func(vnodeID) bool { return true })
	if d := cmp.Diff(treeLevels(t, s, 0), kept); d != "" {
		t.Errorf("a tree kept up to date differs from one built anew:\n%s", d)
	}
}

// A tree that is dropped while somebody asks for it does not look empty: he would
// take it for equal to an empty replica's.
func TestDroppedTreeKeepsItsRecords(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer s.Close()
	const keys = 500
	for i := range keys {
		applyAll(t, s, treeWrite(fmt.Sprint("key", i), 1, record.Value))
	}
	treeLevels(t, s, 0)
	asked := s.trees.get(vnodeID{1, 2})
	s.trees.forget(func(vnodeID) bool { return true })
	records := uint32(0)
	for _, l := range asked.mu.leaves {
		records += l.records
	}
	if records != keys || s.trees.get(vnodeID{1, 2}) == asked {
		t.Errorf("the dropped tree has %d records of %d", records, keys)
	}
	if leaves, _ := s.TreeStats(); leaves != 1 {
		t.Errorf("%d leaves are counted, want that of the new tree", leaves)
	}
}

// meddling writes to a store whenever it is asked whether it has ended, a hundred
// times at most.
type meddling struct {
	context.Context
	write func(i int)
	times int
}

func (m *meddling) Err() error {
	if m.times++; m.times > 100 {
		return context.Canceled
	}
	m.write(m.times)
	return nil
}

// However fast others write, whoever asks for a tree gets an answer, after each
// record has been read once at most.
func TestTreeComesToAnEndUnderWrites(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer s.Close()
	const keys = 2000
	write := func(i, version int) {
		applyAll(t, s, treeWrite(fmt.Sprintf("key%04d", i), uint64(version), record.Value))
	}
	for i := range keys {
		write(i, 1)
	}
	treeLevels(t, s, 0)
	full := s.TreeBytesRead()
	ctx := &meddling{Context: context.Background(), write: func(i int) { write(i%3*700, i+1) }}
	if _, _, _, err := s.Tree(ctx, 1, 2, 0, Root, nil, nil, 0); err != nil {
		t.Fatalf("no tree between writes: %v", err)
	}
	if read := s.TreeBytesRead() - full; read == 0 || read > full {
		t.Errorf("%d bytes are read for a tree over %d", read, full)
	}
	kept := treeLevels(t, s, 0)
	s.trees.forget(func(vnodeID) bool { return true })
	if d := cmp.Diff(treeLevels(t, s, 0), kept); d != "" {
		t.Error(d)
	}
}

// A key written while leaves are read leaves its own leaf dirty and no other, unless
// there are too many to tell.
func TestOnlyTouchedLeavesStayDirty(t *testing.T) {
	for _, touched := range []int{1, maxTouched + 1} {
		s := open(t, vfs.NewMem())
		for i := range 3000 {
			applyAll(t, s, treeWrite(fmt.Sprint("key", i), 1, record.Value))
		}
		tr := s.trees.get(vnodeID{1, 2})
		tr.mu.Lock()
		tr.mu.reading = true
		tr.mu.Unlock()
		fresh, err := s.hashLeaves(context.Background(), tr.id, 0, "", "")
		if err != nil {
			t.Fatal(err)
		}
		for i := range touched {
			applyAll(t, s, treeWrite("key7", uint64(2+i), record.Value))
		}
		tr.mu.Lock()
		tr.replace(0, fresh, tr.mu.touched, &s.trees.leaves)
		dirty := 0
		for _, l := range tr.mu.leaves {
			if l.dirty {
				dirty++
			}
		}
		want := 1
		if touched > maxTouched {
			want = len(tr.mu.leaves)
		}
		if !tr.mu.leaves[tr.find("key7")].dirty || dirty != want || len(fresh) < 10 {
			t.Errorf("%d of %d leaves are dirty after %d writes of one key", dirty, len(fresh), touched)
		}
		tr.mu.reading, tr.mu.touched = false, nil
		tr.mu.Unlock()
		kept := treeLevels(t, s, 0)
		s.trees.forget(func(vnodeID) bool { return true })
		if d := cmp.Diff(treeLevels(t, s, 0), kept); d != "" {
			t.Error(d)
		}
		s.Close()
	}
}

// The trees of many vnodes keep to their bound.
func TestTreesAreBounded(t *testing.T) {
	s := open(t, vfs.NewMem())
	defer s.Close()
	s.trees.maxLeaves = 20
	ctx := context.Background()
	for v := range uint32(30) {
		for i := range 400 {
			w := treeWrite(fmt.Sprint("key", i), 1, record.Value)
			w.Vnode = v
			applyAll(t, s, w)
		}
	}
	var first []TreeNode
	for round := range 2 {
		for v := range uint32(30) {
			nodes, _, _, err := s.Tree(ctx, 1, v, 0, Root, nil, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			if v == 0 && round == 0 {
				first = nodes
			}
			if d := cmp.Diff(first, nodes); d != "" {
				t.Fatalf("vnode %d: %s", v, d)
			}
			if leaves, most := s.TreeStats(); leaves > most+10 {
				t.Fatalf("%d leaves, at most %d are allowed besides one tree", leaves, most)
			}
		}
	}
	counted := int64(0)
	for _, tr := range s.trees.byVnode {
		counted += int64(len(tr.mu.leaves))
	}
	if leaves, _ := s.TreeStats(); leaves != counted {
		t.Errorf("%d leaves are counted, %d are there", leaves, counted)
	}
	if err := s.DropNamespace(1); err != nil {
		t.Fatal(err)
	}
	nodes, _, _, err := s.Tree(ctx, 1, 3, 0, Root, nil, nil, 0)
	if err != nil || nodes[0].Records != 0 {
		t.Errorf("a dropped namespace has %+v, %v", nodes, err)
	}
}
