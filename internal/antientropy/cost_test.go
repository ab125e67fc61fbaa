package antientropy_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/antientropy"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// A round over replicas in which nothing has changed since the last one reads and
// sends at most a hundredth of what they hold, one after a few changes not much more.
// KVASIR_REPAIR_MIB is the size of each replica's store in MiB, 8 by default.
func TestUnchangedRoundCostsLittle(t *testing.T) {
	mib := 8
	if s := os.Getenv("KVASIR_REPAIR_MIB"); s != "" {
		var err error
		if mib, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	g := newGroup(t, func(id uint64) (vfs.FS, string) { return vfs.Default, filepath.Join(dir, fmt.Sprint(id)) }, stable(1, 2))
	defer g.close()
	const valueBytes, seed = 1024, 1
	keys := mib << 20 / valueBytes
	for _, m := range g.members {
		rng := rand.New(rand.NewPCG(seed, 6)) // both get the same
		for i := 0; i < keys; {
			records := map[string]record.Record{}
			for range 2000 {
				if i < keys {
					payload := make([]byte, valueBytes)
					for j := range payload {
						payload[j] = byte(rng.Uint32())
					}
					records[fmt.Sprintf("user%09d", i)] = value(1, string(payload))
					i++
				}
			}
			m.plant(records)
		}
	}
	// round compares the two once and returns the bytes that took.
	round := func(what string) uint64 {
		t.Helper()
		g.passed()
		before, began := g.members[0].store.TreeBytesRead()+g.members[1].store.TreeBytesRead(), time.Now()
		out := g.sync(2)
		read := g.members[0].store.TreeBytesRead() + g.members[1].store.TreeBytesRead() - before
		sent := g.passed().bytes
		t.Logf("%-14s %10.3f ms, %11d bytes read, %9d sent, %d records mended", what, time.Since(began).Seconds()*1000, read, sent, out.Sent+out.Received)
		return read + uint64(sent)
	}
	full := round("first round:")
	if full < uint64(2*keys*valueBytes) {
		t.Fatalf("the first round took %d bytes of %d", full, 2*keys*valueBytes)
	}
	if again := round("nothing new:"); again > full/100 {
		t.Errorf("a round over unchanged replicas takes %d bytes, the first one took %d", again, full)
	}
	g.members[0].plant(map[string]record.Record{fmt.Sprintf("user%09d", keys/2): value(2, "new")})
	if one := round("one change:"); one > full/10 {
		t.Errorf("a round after one change takes %d bytes, the first one took %d", one, full)
	}
}

// Building the trees after a start takes as long as the pace says; later rounds do
// not wait for it.
func TestReadingForTreesIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t, memory, stable(1), stable(1))
		defer g.close()
		records := map[string]record.Record{}
		for i := range 120 {
			records[fmt.Sprint("key", i)] = value(1, strings.Repeat("x", 100<<10))
		}
		m := g.members[0]
		m.plant(records)
		m.repairer = antientropy.New(antientropy.Config{
			Self: 1, Store: m.store, Fence: replica.NewFence(g.topology), Peers: m, Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
			Clock: func() hlc.Timestamp { return 1 }, Cycle: time.Second, BytesPerSecond: 1 << 20,
		})
		// Somebody else leads, and has this node read.
		if _, _, _, err := m.store.Tree(t.Context(), 1, 0, 0, storage.Root, nil, nil, 0); err != nil {
			t.Fatal(err)
		}
		read := m.store.TreeBytesRead()
		if _, _, _, err := m.store.Tree(t.Context(), 1, 1, 0, storage.Root, nil, nil, 0); err != nil {
			t.Fatal(err)
		}
		if all := m.store.TreeBytesRead(); read == 0 || read == all || all < 11<<20 {
			t.Fatalf("%d and %d bytes are in the vnodes", read, all-read)
		}
		// The first 4 MiB go at once.
		g.run(5 * time.Second)
		if n := m.repairer.Status().Rounds; n != 0 {
			t.Errorf("%d rounds over 11 MiB ended within 5 s at 1 MiB a second", n)
		}
		g.run(20 * time.Second)
		if n := m.repairer.Status().Rounds; n < 10 {
			t.Errorf("%d rounds ended in 25 s", n)
		}
	})
}
