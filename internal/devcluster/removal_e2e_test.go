package devcluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// large is a namespace of which every tenth key is kept.
type large struct {
	r          *rig
	c          *client.Client
	keys, size int
}

func (l large) key(i int) []byte { return fmt.Appendf(nil, "k%07d", i) }

func (l large) kept(i int) bool { return i%10 == 0 }

// value does not compress.
func (l large) value(i int) []byte {
	v := make([]byte, l.size)
	src := rand.NewPCG(uint64(i), 1)
	for j := 0; j+8 <= len(v); j += 8 {
		for b, x := 0, src.Uint64(); b < 8; b, x = b+1, x>>8 {
			v[j+b] = byte(x)
		}
	}
	return v
}

// each calls do for the keys up to a bound, several at a time.
func (l large) each(below int, do func(i int) error) {
	l.r.t.Helper()
	var wg sync.WaitGroup
	const callers = 32
	for w := range callers {
		wg.Go(func() {
			for i := w; i < below; i += callers {
				if err := do(i); err != nil {
					l.r.t.Errorf("key %s: %v", l.key(i), err)
					return
				}
			}
		})
	}
	wg.Wait()
	if l.r.t.Failed() {
		l.r.t.FailNow()
	}
}

// insist repeats a write that is safe to repeat until it succeeds.
func insist(write func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := write(try)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

func (l large) put(i int) error {
	return insist(func(ctx context.Context) error {
		_, err := l.c.Put(ctx, l.key(i), l.value(i))
		return err
	})
}

// drop deletes a key unless it is kept.
func (l large) drop(i int) error {
	if l.kept(i) {
		return nil
	}
	return insist(func(ctx context.Context) error {
		_, err := l.c.Delete(ctx, l.key(i))
		return err
	})
}

// scan fails unless a scan shows what was kept and nothing else.
func (l large) scan() {
	l.r.t.Helper()
	next := 0
	for rec, err := range l.c.Scan(context.Background(), client.Range{}) {
		switch {
		case err != nil:
			l.r.t.Fatal(err)
		case !bytes.Equal(rec.Key, l.key(next)):
			l.r.t.Fatalf("a scan shows %s, want %s", rec.Key, l.key(next))
		case !bytes.Equal(rec.Value, l.value(next)):
			l.r.t.Fatalf("a scan shows a wrong value of %s", rec.Key)
		}
		next += 10
	}
	if next < l.keys {
		l.r.t.Fatalf("a scan ends before %s", l.key(next))
	}
}

// copies waits until each node's own copy is what was kept and nothing else. Repair may
// still be on its way to a node that was down; what came back under a removed
// tombstone stays, as nothing is left that would delete it.
func (l large) copies() {
	l.r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), scale(3*time.Minute, 10*time.Minute))
	defer cancel()
	for _, node := range l.r.named(devcluster.RoleData) {
		l.each(l.keys, func(i int) error {
			for {
				v, err := l.c.Get(context.Background(), l.key(i), client.FromReplica(node))
				if l.kept(i) && err == nil && bytes.Equal(v.Value, l.value(i)) || !l.kept(i) && errors.Is(err, client.ErrNotFound) {
					return nil
				}
				select {
				case <-ctx.Done():
					return fmt.Errorf("kept %t, %s's own copy has %d bytes, error %v", l.kept(i), node, len(v.Value), err)
				case <-time.After(200 * time.Millisecond):
				}
			}
		})
	}
}

// disks returns the bytes in each node's data directory, without the ballast, whose
// size does not depend on what is stored. Of a short run, which stores little more
// than write-ahead logs take, it counts the tables alone.
func (l large) disks() map[string]int64 {
	l.r.t.Helper()
	out := map[string]int64{}
	for _, node := range l.r.named(devcluster.RoleData) {
		err := filepath.WalkDir(filepath.Join(l.r.cluster.Dir(), node), func(_ string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // compactions remove files meanwhile
			}
			if err != nil || d.IsDir() || d.Name() == "BALLAST" || !full && filepath.Ext(d.Name()) != ".sst" {
				return err
			}
			if info, err := d.Info(); err == nil {
				out[node] += info.Size()
			}
			return nil
		})
		if err != nil {
			l.r.t.Fatal(err)
		}
	}
	return out
}

// hints returns how many a node keeps.
func (l large) hints(node string) uint64 {
	l.r.t.Helper()
	kept, err := adminv1.NewRepairServiceClient(l.r.conn(node)).ListHints(context.Background(), &adminv1.ListHintsRequest{})
	if err != nil {
		l.r.t.Fatal(err)
	}
	return kept.GetCount()
}

// restart kills all nodes and starts them again, which also moves what is in their
// logs to tables.
func (l large) restart() {
	nodes := l.r.named(devcluster.RoleData)
	l.r.kill(nodes...)
	l.r.up(nodes...)
}

// Nine tenths of a large namespace are deleted while nodes are killed and paused, and
// while hints with older values are still on their way. At most a fifth of the bytes
// stays on each disk, and nothing comes back.
func TestE2ERemovedRecordsFreeTheDisks(t *testing.T) {
	besideOthers(t)
	r := start(t, 3, 1)
	l := large{r: r, c: r.client(), keys: scale(50_000, 140_000), size: scale(1<<10, 4<<10)}
	began := time.Now()
	l.each(l.keys, l.put)
	l.restart()
	sizes := l.disks()
	// All nodes hold the same; some still have files that were merged into others.
	before := slices.Min(slices.Collect(maps.Values(sizes)))
	t.Logf("filled after %s: %v bytes", time.Since(began).Round(time.Second), sizes)

	// A node goes down with hints for node 3 and comes back when the deletes are done.
	ctx := context.Background()
	if err := r.cluster.Pause(ctx, "node3"); err != nil {
		t.Fatal(err)
	}
	l.each(2000, l.put)
	keeper, hinted := "", uint64(0)
	r.eventually(20*time.Second, func() string {
		for _, node := range []string{"node1", "node2"} {
			if n := l.hints(node); n >= 500 {
				keeper, hinted = node, n
				return ""
			}
		}
		return "no node keeps 500 hints for node3"
	})
	r.kill(keeper)
	if err := r.cluster.Resume(ctx, "node3"); err != nil {
		t.Fatal(err)
	}
	l.each(2000, l.drop)
	r.up(keeper)
	t.Logf("%d late hints of %s", hinted, keeper)

	done := make(chan struct{})
	go func() {
		defer close(done)
		l.each(l.keys, l.drop)
	}()
	nodes := r.named(devcluster.RoleData)
	for faults, deleting := 0, true; deleting || faults < 4; faults++ {
		r.disturb(nodes[r.rng.IntN(len(nodes))])
		select {
		case <-done:
			deleting = false
		case <-time.After(time.Second):
		}
	}
	<-done
	t.Logf("deleted after %s", time.Since(began).Round(time.Second))
	l.scan()

	restarted := time.Now()
	r.eventually(scale(4*time.Minute, 15*time.Minute), func() string {
		if time.Since(restarted) > 20*time.Second { // removal is interrupted as well
			r.disturb(nodes[r.rng.IntN(len(nodes))])
			restarted = time.Now()
		}
		if now := l.disks(); slices.Max(slices.Collect(maps.Values(now))) > before/5 {
			return fmt.Sprintf("of %d bytes %v are left", before, now)
		}
		return ""
	})
	t.Logf("of %d bytes %v are left after %s", before, l.disks(), time.Since(began).Round(time.Second))
	l.restart()
	l.scan()
	l.copies()
	l.scan()
}
