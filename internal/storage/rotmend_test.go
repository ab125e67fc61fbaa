package storage

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Invariant 18: wherever a bit of a table flips while the store is read and written, or
// before it is opened, it is whole again in bounded time, or says that it is damaged
// beyond that. A compaction that fails again and again must not keep it from that.
func TestRotIsMendedWhileServing(t *testing.T) {
	seeds := 300
	if testing.Short() {
		seeds = 30
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) {
			(&rotting{t: t, rng: rand.New(rand.NewPCG(uint64(seed), 7)), disk: vfs.NewCrashableMem()}).run(seed)
		})
	}
}

// rotting is a store on a disk of which a bit flips.
type rotting struct {
	t       *testing.T
	rng     *rand.Rand
	disk    *vfs.MemFS
	s       *Store
	version uint64
}

func (r *rotting) key() (namespace, vnode uint32, key []byte) {
	i := r.rng.IntN(300)
	return uint32(1 + i%3), uint32(i % 16), fmt.Appendf(nil, "key%03d", i)
}

func (r *rotting) write(n int) {
	writes := map[string]Write{}
	for range n {
		r.version++
		namespace, vnode, key := r.key()
		writes[string(key)] = Write{Namespace: namespace, Vnode: vnode, Key: key, Record: value(r.version+1, strings.Repeat("v", r.rng.IntN(30)))}
	}
	var list []Write
	for _, w := range writes {
		list = append(list, w)
	}
	put(r.t, r.s, list...)
}

// fill makes tables on several levels.
func (r *rotting) fill() {
	for range 3 + r.rng.IntN(20) {
		r.write(40)
		var err error
		switch r.rng.IntN(5) {
		case 0, 1, 2:
			err = r.s.db.Flush()
		case 3:
			err = r.s.db.Compact(r.t.Context(), []byte{kindRecord}, []byte{kindDirty}, false)
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
}

// flip changes a bit of some table, and tells of which.
func (r *rotting) flip() string {
	names, err := r.disk.List("data")
	if err != nil {
		r.t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".sst") })
	if len(names) == 0 {
		return "no table"
	}
	path := "data/" + names[r.rng.IntN(len(names))]
	f, err := r.disk.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return "no table any more"
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return "an empty table"
	}
	at, b := r.rng.Int64N(info.Size()), make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		r.t.Fatal(err)
	}
	b[0] ^= 1 << r.rng.IntN(8)
	if _, err := f.WriteAt(b, at); err != nil {
		r.t.Fatal(err)
	}
	return fmt.Sprintf("byte %d of %d of %s", at, info.Size(), path)
}

// mend does what a node does about bit rot, but for filling in what was lost.
func (r *rotting) mend(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.s.Damaged():
			return
		case <-r.s.Attention():
		}
		err := r.s.Inspect(ctx, anyKey)
		if err == nil {
			err = r.s.Cut(ctx)
		}
		for _, q := range r.s.Quarantines() {
			err = errors.Join(err, r.s.Lift(q.ID))
		}
		if err != nil && ctx.Err() == nil {
			r.t.Errorf("mend: %v", err)
		}
	}
}

func (r *rotting) run(seed int) {
	r.s = open(r.t, r.disk)
	r.fill()
	var flipped string
	switch r.rng.IntN(3) {
	case 0: // while it is served
		flipped = r.flip()
	case 1: // before it is opened
		closeStore(r.t, r.s)
		flipped = r.flip()
		r.s = nil
	case 2: // it is found, and then the power is cut
		flipped = r.flip()
		if _, err := r.s.Scrub(r.t.Context(), freely, anyKey); err != nil {
			r.t.Fatal(err)
		}
		disk := r.disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: r.rng.IntN(101), RNG: r.rng})
		r.s.Close() // may fail, the store is damaged
		r.disk, r.s = disk, nil
	}
	if r.s == nil {
		var err error
		if r.s, err = Open(testConfig(r.t, r.disk)); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				r.t.Errorf("seed %d, %s: %v", seed, flipped, err)
			}
			return
		}
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.mend(ctx)
	}()
	if !r.whole(ctx) {
		r.t.Errorf("seed %d, %s: the store is not whole: quarantines %v", seed, flipped, r.s.Quarantines())
	}
	cancel()
	<-ended
	r.s.Close() // may fail, the store is damaged
	time.Sleep(time.Minute)
}

// whole reads, writes and scrubs until three scrubs in a row find nothing, or the store is
// given up.
func (r *rotting) whole(ctx context.Context) bool {
	for clean, rounds := 0, 0; rounds < 60; rounds++ {
		found := r.s.Corruptions()
		if _, err := r.s.Scrub(ctx, freely, anyKey); err != nil {
			r.t.Errorf("scrub: %v", err)
		}
		for range 10 {
			time.Sleep(time.Second)
			if r.s.Damage() != "" {
				return true
			}
			r.write(5)
			for range 10 {
				namespace, vnode, key := r.key()
				r.s.Get(namespace, vnode, key) // may be corrupt
			}
		}
		if r.s.Corruptions() == found && r.s.QuarantineCount() == 0 {
			clean++
		} else {
			clean = 0
		}
		if clean == 3 {
			return true
		}
	}
	return false
}
