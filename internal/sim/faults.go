package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Pause is what others see of SIGSTOP: nothing that the process sends leaves it, it
// gets nothing that it is sent, clients' bytes too, and its connections stay. A process
// in a bubble cannot be stopped itself: its timers go on, so it finds out that it hears
// nobody, where a stopped one would find out when it goes on. Config.SyncDelay
// can hold its disk.
func (w *World) Pause(name string) { w.Net.Freeze(w.process(name).host) }

// Resume undoes Pause.
func (w *World) Resume(name string) { w.Net.Thaw(w.process(name).host) }

// Partition cuts processes off from all that are not among them, in both directions.
// Clients reach everybody.
func (w *World) Partition(names []string) { w.acrossBorder(names, w.Net.Cut) }

// Join undoes Partition.
func (w *World) Join(names []string) { w.acrossBorder(names, w.Net.Heal) }

func (w *World) acrossBorder(names []string, f func(from, to string)) {
	inside := map[string]bool{}
	for _, n := range names {
		inside[n] = true
	}
	for _, a := range w.processes {
		for _, b := range w.processes {
			if inside[a.name] != inside[b.name] {
				f(a.host, b.host)
			}
		}
	}
}

// errNothing is returned where a disk holds nothing to damage.
var errNothing = errors.New("nothing to damage")

// FlipBit flips a bit of one of a node's tables on disk, whether the node runs or not,
// and says where. What is in memory stays as it is.
func (w *World) FlipBit(name string, rng *rand.Rand) (string, error) {
	disk := w.process(name).disk
	path, size, err := chooseFile(disk, rng, ".sst")
	if err != nil {
		return "", err
	}
	f, err := disk.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return "", err
	}
	w.process(name).trouble.rotten.Store(true)
	at, bit := rng.Int64N(size), rng.IntN(8)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	if err == nil {
		b[0] ^= 1 << bit
		_, err = f.WriteAt(b, at)
	}
	return fmt.Sprintf("bit %d of byte %d of %d of %s", bit, at, size, path), errors.Join(err, f.Sync(), f.Close())
}

// LoseTail takes at least half of the newest write-ahead log of a node that does not run, or
// zeroes it, synced or not, and says how much is left. What was written within about
// a second before the node ended may go unnoticed.
func (w *World) LoseTail(name string, rng *rand.Rand) (string, error) {
	disk := w.process(name).disk
	names, err := disk.List("data")
	if err != nil {
		return "", err
	}
	newest := ""
	for _, n := range names {
		if strings.HasSuffix(n, ".log") && n > newest {
			newest = n
		}
	}
	if newest == "" {
		return "", errNothing
	}
	path := filepath.Join("data", newest)
	f, err := disk.Open(path)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	b = bytes.TrimRight(b, "\x00") // allocated ahead
	if len(b) == 0 {
		return "", errNothing
	}
	keep := rng.IntN(len(b)/2 + 1)
	how := "cut"
	rest := b[:keep]
	if rng.IntN(2) == 0 {
		how = "zeroed"
		clear(b[keep:])
		rest = b
	}
	out, err := disk.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return "", err
	}
	_, err = out.Write(rest)
	return fmt.Sprintf("%s %s after byte %d of %d", path, how, keep, len(b)), errors.Join(err, out.Sync(), out.Close())
}

// chooseFile draws one of the files in a node's directory that is not empty.
func chooseFile(disk vfs.FS, rng *rand.Rand, suffix string) (path string, size int64, err error) {
	names, err := disk.List("data")
	if err != nil {
		return "", 0, err
	}
	slices.Sort(names)
	for _, i := range rng.Perm(len(names)) {
		path := filepath.Join("data", names[i])
		if !strings.HasSuffix(path, suffix) {
			continue
		}
		info, err := disk.Stat(path)
		if err != nil {
			return "", 0, err
		}
		if info.Size() > 0 {
			return path, info.Size(), nil
		}
	}
	return "", 0, errNothing
}
