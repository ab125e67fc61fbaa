package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// envRotSeeds is how many seeds TestAnyRot tries.
const envRotSeeds = "KVASIR_ROT_SEEDS"

// Whatever the shape of the tables, when and wherever bytes flip: nothing wrong is ever
// read, and the store becomes whole by itself or is given up.
func TestAnyRot(t *testing.T) {
	seeds := 40
	if n, err := strconv.Atoi(os.Getenv(envRotSeeds)); err == nil {
		seeds = n
	}
	var met, gaveUp int
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			r := newRotten(t, seed)
			r.run()
			if r.s.Corruptions() > 0 {
				met++
			}
			if t.Failed() {
				t.Errorf("seed %d", seed)
			}
			if d := r.s.Damage(); d != "" {
				gaveUp++
				t.Logf("seed %d: given up: %s", seed, d)
			}
		})
	}
	t.Logf("%d of %d seeds met damage, %d gave up", met, seeds, gaveUp)
}

// rotten is a store whose disk fails.
type rotten struct {
	t      *testing.T
	rng    *rand.Rand
	disk   *vfs.MemFS
	s      *Store
	rounds []int // how often each record was written
	snaps  []*pebble.Snapshot
}

const rottenKeys = 600

func newRotten(t *testing.T, seed uint64) *rotten {
	r := &rotten{t: t, rng: rand.New(rand.NewPCG(seed, 18)), disk: vfs.NewMem(), rounds: make([]int, rottenKeys)}
	r.open()
	return r
}

func (r *rotten) open() {
	cfg := testConfig(r.t, r.disk)
	cfg.Logger = slog.New(failures{slog.DiscardHandler, new(atomic.Int64)})
	s, err := Open(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.s = s
}

func (r *rotten) value(i, round int) []byte {
	return value(uint64(round), strings.Repeat(fmt.Sprint(i), 10+i%20))
}

func (r *rotten) write(from, n int, repair bool) {
	var writes []Write
	for i := from; i < min(from+n, rottenKeys); i++ {
		v, k := rotKey(i)
		if !repair {
			r.rounds[i]++
		}
		if r.rounds[i] > 0 {
			writes = append(writes, Write{Namespace: 1, Vnode: v, Key: k, Record: r.value(i, r.rounds[i]), Repair: repair})
		}
	}
	if len(writes) > 0 {
		put(r.t, r.s, writes...)
	}
}

// ingest takes a file in with records that are there already.
func (r *rotten) ingest() {
	v := uint32(r.rng.IntN(8))
	in, err := r.s.NewIngest(Place{1, v})
	if err != nil {
		r.t.Fatal(err)
	}
	from := r.rng.IntN(rottenKeys)
	for i := range rottenKeys {
		if vnode, k := rotKey(i); vnode == v && i >= from && r.rounds[i] > 0 {
			if err := in.Add(k, r.value(i, r.rounds[i])); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	if err := in.Finish(r.t.Context()); err != nil && !errors.Is(err, ErrCorrupt) {
		r.t.Fatal(err)
	}
}

// shape does what gives tables their shapes.
func (r *rotten) shape() {
	at := func() []byte {
		v, k := rotKey(r.rng.IntN(rottenKeys))
		return appendRecordKey(nil, 1, v, k)
	}
	a, b := at(), at()
	if bytes.Compare(a, b) > 0 {
		a, b = b, a
	}
	b = append(b, 0)
	var err error
	switch r.rng.IntN(7) {
	case 6:
		r.ingest()
	case 0, 1:
		r.write(r.rng.IntN(rottenKeys), 1+r.rng.IntN(300), false)
	case 2:
		err = r.s.db.Flush()
	case 3:
		err = r.s.db.Compact(r.t.Context(), a, b, false)
	case 4:
		if len(r.snaps) < 5 {
			r.snaps = append(r.snaps, r.s.db.NewSnapshot())
		}
	case 5: // what is left are parts of tables; some records of them are dropped and written again
		if r.rng.IntN(2) == 0 {
			b = append(bytes.Clone(a), 1)
		}
		if err = r.s.db.Flush(); err == nil {
			err = r.s.db.Excise(r.t.Context(), pebble.KeyRange{Start: a, End: b})
		}
		r.write(0, rottenKeys, true)
	}
	if err != nil && !errors.Is(err, pebble.ErrCorruption) {
		r.t.Fatal(err)
	}
}

// flip changes a bit of some table where it lies.
func (r *rotten) flip() {
	names, err := r.disk.List("data")
	if err != nil {
		r.t.Fatal(err)
	}
	var tables []string
	for _, n := range names {
		if strings.HasSuffix(n, ".sst") {
			tables = append(tables, "data/"+n)
		}
	}
	if len(tables) == 0 {
		return
	}
	f, err := r.disk.OpenReadWrite(tables[r.rng.IntN(len(tables))], vfs.WriteCategoryUnspecified)
	if errors.Is(err, fs.ErrNotExist) {
		return // a compaction has just replaced it
	}
	if err != nil {
		r.t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		r.t.Fatal(err)
	}
	at, b := r.rng.Int64N(max(1, info.Size())), make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) { // it has just been created
		r.t.Fatal(err)
	}
	b[0] ^= 1 << r.rng.IntN(8)
	if _, err := f.WriteAt(b, at); err != nil {
		r.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// mend does what a node does, with peers that have everything.
func (r *rotten) mend(ctx context.Context) {
	var loops sync.WaitGroup
	defer loops.Wait()
	filled := make(chan struct{}, 1)
	loops.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-filled:
			}
			list := r.s.Quarantines()
			r.write(0, rottenKeys, true)
			for _, q := range list {
				if err := r.s.Lift(q.ID); err != nil {
					r.t.Error(err)
				}
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.s.Damaged():
			return
		case <-r.s.Attention():
		case <-time.After(5 * time.Second): // the last try may have failed
		}
		if err := r.s.Inspect(ctx, anyKey); err != nil {
			if ctx.Err() == nil {
				r.t.Error(err)
			}
			return
		}
		if r.s.Cut(ctx) == nil && r.s.Damage() == "" && len(r.s.Quarantines()) > 0 {
			select {
			case filled <- struct{}{}:
			default:
			}
		}
	}
}

// read returns how many reads were refused.
func (r *rotten) read() (refused int) {
	for i := range rottenKeys {
		v, k := rotKey(i)
		reading := r.s.Reading()
		got, err := r.s.Get(1, v, k)
		switch {
		case r.s.Read(reading, 1, v) != nil || errors.Is(err, ErrCorrupt):
			refused++
		case r.rounds[i] == 0 && errors.Is(err, ErrNotFound):
		case err != nil || !bytes.Equal(got, r.value(i, r.rounds[i])):
			r.t.Fatalf("%s is %q, %v; it was written %d times", k, got, err, r.rounds[i])
		}
	}
	return refused
}

func (r *rotten) run() {
	ctx, cancel := context.WithCancel(r.t.Context())
	for range 10 + r.rng.IntN(30) {
		r.shape()
	}
	mended := make(chan struct{})
	go func() {
		defer close(mended)
		r.mend(ctx)
	}()
	flips := 1 + r.rng.IntN(2)
	for second := 1; second <= 60; second++ {
		if flips > 0 && r.rng.IntN(5) == 0 {
			flips--
			r.flip()
		}
		if second < 30 {
			r.read()
		}
		if r.rng.IntN(3) == 0 {
			r.ingest()
		}
		if second%10 == 0 {
			if _, err := r.s.Scrub(ctx, freely, anyKey); err != nil {
				r.t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
	}
	if r.s.Damage() == "" {
		synctest.Wait()
		if n := r.read(); n > 0 {
			r.t.Errorf("%d reads are refused at the end; quarantines: %v", n, r.s.quarantines.load())
		}
		found := r.s.Corruptions()
		if _, err := r.s.Scrub(ctx, freely, anyKey); err != nil || r.s.Corruptions() != found {
			r.t.Errorf("the last scrub finds damage, or %v", err)
		}
	}
	cancel()
	<-mended
	for _, s := range r.snaps {
		s.Close()
	}
	if err := r.s.Close(); err != nil && r.s.Damage() == "" {
		r.t.Error(err)
	}
	time.Sleep(time.Minute) // what still waits ends
}
