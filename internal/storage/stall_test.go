package storage

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// While no memtable can be flushed commits wait, and for how long is counted.
func TestStalled(t *testing.T) {
	var opened atomic.Bool
	release := make(chan struct{})
	s := open(t, errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if opened.Load() && op.Kind == errorfs.OpCreate && strings.HasSuffix(op.Path, ".sst") {
			<-release
		}
		return nil
	})))
	defer closeStore(t, s)
	opened.Store(true)
	if got := s.Stalled(); got != 0 {
		t.Errorf("%s at first", got)
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range 10 * stopWritesMemTables {
			put(t, s, write(fmt.Sprint("k", i), value(1, strings.Repeat("x", 100<<10))))
		}
	}()
	for s.Stalled() < 20*time.Millisecond { // it grows while the stall goes on
		time.Sleep(time.Millisecond)
	}
	close(release)
	<-written
	after := s.Stalled()
	if after < 20*time.Millisecond {
		t.Errorf("%s after flushes could go on", after)
	}
	time.Sleep(2 * time.Millisecond)
	if got := s.Stalled(); got != after {
		t.Errorf("%s, and then %s without a stall", after, got)
	}
}
