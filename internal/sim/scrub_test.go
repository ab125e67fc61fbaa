package sim_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// rotMiddle changes a byte in the middle of a disk's largest table, where records are,
// and returns which table that is.
func rotMiddle(t *testing.T, disk vfs.FS) string {
	t.Helper()
	path, content := "", []byte(nil)
	var walk func(dir string)
	walk = func(dir string) {
		names, err := disk.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			p := disk.PathJoin(dir, n)
			info, err := disk.Stat(p)
			if err != nil {
				t.Fatal(err)
			}
			if info.IsDir() {
				walk(p)
				continue
			}
			if !strings.HasSuffix(n, ".sst") || info.Size() <= int64(len(content)) {
				continue
			}
			f, err := disk.Open(p)
			if err != nil {
				t.Fatal(err)
			}
			path, content = p, make([]byte, info.Size())
			if _, err := f.ReadAt(content, 0); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
	}
	walk("/")
	if len(content) < 8<<10 {
		t.Fatalf("the largest table, %s, has %d bytes", path, len(content))
	}
	content[len(content)/2] ^= 0x01
	f, err := disk.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// Invariant 18: a byte that flips on one node's disk is found, never served, and what
// it took comes back from the others, while another node is written to and read.
func TestBitRotIsFoundAndFilledAgain(t *testing.T) {
	world(t, sim.Config{Seed: 31, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		ctx := context.Background()
		c := w.Client()
		defer c.Close()
		const keys = 400
		text := func(i int) string { return fmt.Sprint("value ", i, " ", strings.Repeat(fmt.Sprint(i*7919), 20)) }
		for i := range keys {
			put(t, c, fmt.Sprint("k", i), text(i))
		}
		// The certificates of every vnode are above these records: repairs that are older
		// than a certificate are skipped, these must not be.
		for i := range 100 {
			if _, err := c.Delete(ctx, fmt.Append(nil, "gone", i)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(90 * time.Second)
		// What was in the log is in a table after a start.
		w.Stop("node3")
		w.Start("node3")
		time.Sleep(2 * time.Second)
		w.Stop("node3")
		path := rotMiddle(t, w.Disk("node3"))
		w.Start("node3")
		time.Sleep(2 * time.Second)
		repair := adminv1.NewRepairServiceClient(w.Conn("node3"))
		if _, err := repair.StartRepair(ctx, &adminv1.StartRepairRequest{Scrub: true}); err != nil {
			t.Fatal(err)
		}
		for i := range keys {
			want(t, c, fmt.Sprint("k", i), text(i))
		}
		time.Sleep(time.Minute)
		s, err := repair.GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if s.GetCorruptions() == 0 || s.GetScrubRounds() == 0 {
			t.Errorf("%d corruptions in %d rounds", s.GetCorruptions(), s.GetScrubRounds())
		}
		for i := range keys {
			for _, name := range []string{"node1", "node2", "node3"} {
				want(t, c, fmt.Sprint("k", i), text(i), client.FromReplica(name))
			}
		}
		if _, err := w.Disk("node3").Stat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	})
}
