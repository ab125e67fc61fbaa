package antientropy

import (
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// tableBytes returns the size of a directory's tables. Logs and the ballast take what
// the memtables' size says, however much is stored.
func tableBytes(t *testing.T, dir string) (sum int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(d.Name()) != ".sst" {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += info.Size()
		}
		return nil // compactions remove files meanwhile
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// What is removed leaves a real disk as well: of a store from which nine tenths were
// deleted, or have expired, at most a fifth is left.
func TestRemovedRecordsFreeTheDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 64 MiB")
	}
	const (
		records = 16_000
		size    = 4 << 10
		vnodes  = 4
	)
	dir := t.TempDir()
	logger := slog.New(slog.DiscardHandler)
	s, err := storage.Open(storage.Config{FS: vfs.Default, Dir: dir, MemTableBytes: 4 << 20, CacheBytes: 8 << 20, Logger: logger, Fatal: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	write := func(first, step int, rec record.Record) {
		t.Helper()
		for i := first; i < records; i += 256 * step {
			var lot []storage.Write
			for k := i; k < min(records, i+256*step); k += step {
				if rec.Kind == record.Value {
					rec.Payload = make([]byte, size)
					rand.Read(rec.Payload) // nothing to compress
				}
				lot = append(lot, storage.Write{Namespace: 1, Vnode: uint32(k % vnodes), Key: fmt.Appendf(nil, "%06d", k), Record: record.Encode(rec)})
			}
			c, err := s.Apply(lot, nil)
			if err == nil {
				err = c.Wait()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	value := record.Record{Version: record.Version{Time: hlc.At(10), Incarnation: 1}, Kind: record.Value}
	write(0, 1, value)
	full := tableBytes(t, dir)
	// Of ten records eight are deleted and one expires.
	for i := range 8 {
		write(i, 10, record.Record{Version: record.Version{Time: hlc.At(20), Incarnation: 1}, Kind: record.Tombstone})
	}
	value.Version.Time, value.ExpiresAt = hlc.At(20), 25
	write(8, 10, value)

	top := collectRing(t, 1, stableSlots(1)...)
	top.Ring = append(top.Ring, top.Ring[0], top.Ring[0], top.Ring[0])
	c := NewCollector(CollectorConfig{Self: 1, Store: s, Fence: replica.NewFence(top), Logger: logger, Metrics: prometheus.NewRegistry(), RemovalsPerSecond: 1 << 20})
	began := time.Now()
	for v := range uint32(vnodes) {
		if err := s.Promise(1, v, hlc.At(30)); err != nil {
			t.Fatal(err)
		}
		if err := s.Certify(1, v, hlc.At(30), []uint64{1}); err != nil {
			t.Fatal(err)
		}
		done, err := c.remove(context.Background(), storage.Place{Namespace: 1, Vnode: v})
		if err != nil || !done {
			t.Fatal(done, err)
		}
	}
	took := time.Since(began)
	if removed := s.Removals().Removed; removed != records*9/10 {
		t.Errorf("%d records were removed", removed)
	}
	var left int64
	for range 100 { // files that nobody needs are deleted in the background
		if left = tableBytes(t, dir); left <= full/5 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("%d MiB became %d MiB in %s", full>>20, left>>20, took.Round(time.Millisecond))
	if left > full/5 {
		t.Errorf("%d of %d bytes are left on disk", left, full)
	}
}
