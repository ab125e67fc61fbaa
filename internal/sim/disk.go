package sim

import (
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// DiskFault is what is wrong with a process's disk.
type DiskFault int

const (
	// NoFault: the disk works.
	NoFault DiskFault = iota
	// LogBroken: what is written to a write-ahead log fails.
	LogBroken
	// DiskFull: nothing can be written, but for a little once the ballast is gone.
	DiskFull
)

// The space of a simulated disk. A ballast of a sixteenth is copied with every crash.
const (
	diskBytes     = 8 << 20
	diskFreeBytes = 6 << 20
	// ballastWrites is how many writes the space of a ballast takes.
	ballastWrites = 300
)

// trouble is the fault of a process's disk, through all its instances.
type trouble struct {
	fault atomic.Int32
	// left is how many writes a full disk still takes.
	left atomic.Int64
	// rotten is set while a flipped bit may be on it.
	rotten atomic.Bool
	// hits counts the operations that failed.
	hits atomic.Int64
}

func (d *trouble) set(f DiskFault) {
	d.left.Store(0)
	d.fault.Store(int32(f))
}

func (d *trouble) is(f DiskFault) bool { return DiskFault(d.fault.Load()) == f }

// fails decides whether an operation does.
func (d *trouble) fails(op errorfs.Op) error {
	switch DiskFault(d.fault.Load()) {
	case LogBroken:
		if strings.HasSuffix(op.Path, ".log") && writes(op.Kind) {
			d.hits.Add(1)
			return syscall.EIO
		}
	case DiskFull:
		if op.Kind == errorfs.OpRemove && strings.HasSuffix(op.Path, "BALLAST") {
			d.left.Store(ballastWrites)
			return nil
		}
		if takesSpace(op.Kind) && d.left.Add(-1) < 0 {
			d.hits.Add(1)
			return syscall.ENOSPC
		}
	}
	return nil
}

func writes(k errorfs.OpKind) bool {
	switch k {
	case errorfs.OpFileWrite, errorfs.OpFileWriteAt, errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
		return true
	}
	return false
}

func takesSpace(k errorfs.OpKind) bool {
	switch k {
	case errorfs.OpCreate, errorfs.OpFileWrite, errorfs.OpFilePreallocate:
		return true
	}
	return false
}

// faultyDisk is a disk with its process's trouble.
type faultyDisk struct {
	vfs.FS
	trouble *trouble
}

func newFaultyDisk(fs vfs.FS, t *trouble) vfs.FS {
	return faultyDisk{errorfs.Wrap(fs, errorfs.InjectorFunc(t.fails)), t}
}

func (d faultyDisk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	u := vfs.DiskUsage{TotalBytes: diskBytes, AvailBytes: diskFreeBytes}
	if d.trouble.is(DiskFull) {
		u.AvailBytes = 0
	}
	u.UsedBytes = u.TotalBytes - u.AvailBytes
	return u, nil
}

// Break gives a process's disk a fault, NoFault mends it. A process that cannot live
// with it ends; see Died.
func (w *World) Break(name string, f DiskFault) { w.process(name).trouble.set(f) }

// DiskErrors returns how many operations on a process's disk have failed.
func (w *World) DiskErrors(name string) int64 { return w.process(name).trouble.hits.Load() }

// Mended tells that no flipped bit is left on a process's disk.
func (w *World) Mended(name string) { w.process(name).trouble.rotten.Store(false) }

// Died returns a channel that is closed when the process has ended because of its
// disk. Crash and Start bring it back.
func (w *World) Died(name string) <-chan struct{} {
	if live := w.process(name).live; live != nil {
		return live.died
	}
	return nil // it does not run
}

// fatal ends the instance. That is the test's failure unless its disk has a fault.
func (in *instance) fatal(err error) {
	switch {
	case in.ended.Load():
	case in.p.trouble.is(NoFault) && !in.p.trouble.rotten.Load():
		in.p.w.t.Errorf("%s cannot go on: %v", in.p.name, err)
	case !in.dead.Swap(true):
		close(in.died)
	}
}
