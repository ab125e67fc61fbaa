package storage

import (
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func TestCommitDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		delay := 10 * time.Millisecond
		s, err := Open(Config{FS: vfs.NewMem(), Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }, SyncDelay: func() time.Duration { return delay }})
		if err != nil {
			t.Fatal(err)
		}
		defer closeStore(t, s)
		if got := s.CommitDelay(); got != 0 {
			t.Errorf("%s before any commit", got)
		}
		commits := func(n int) {
			for i := range n {
				put(t, s, write("k", value(uint64(i+1), "x")))
			}
		}
		commits(3)
		if got := s.CommitDelay(); got != delay {
			t.Errorf("%s, want %s", got, delay)
		}
		delay = 50 * time.Millisecond
		commits(16)
		if got := s.CommitDelay(); got < 30*time.Millisecond || got >= delay {
			t.Errorf("%s after 16 commits of %s", got, delay)
		}
		time.Sleep(2 * time.Second)
		if got := s.CommitDelay(); got != 0 {
			t.Errorf("%s after two quiet seconds", got)
		}
	})
}

// gatedFS has the syncs of its mark wait while a gate is closed.
type gatedFS struct {
	vfs.FS
	gate func()
}

func (g gatedFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := g.FS.OpenReadWrite(name, c, opts...)
	if err == nil && strings.HasSuffix(name, markName) {
		f = gatedFile{f, g.gate}
	}
	return f, err
}

type gatedFile struct {
	vfs.File
	gate func()
}

func (g gatedFile) SyncData() error { g.gate(); return g.File.SyncData() }

// The age of the oldest sync shows a disk that hangs, under commits and without any.
func TestOldestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var delay atomic.Int64
		var gate atomic.Pointer[chan struct{}]
		s, err := Open(Config{
			FS: gatedFS{vfs.NewMem(), func() {
				if g := gate.Load(); g != nil {
					<-*g
				}
			}}, Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) },
			SyncDelay: func() time.Duration { return time.Duration(delay.Load()) },
		})
		if err != nil {
			t.Fatal(err)
		}
		defer closeStore(t, s)
		age := func(what string, want time.Duration) {
			t.Helper()
			if got := s.OldestSync(); got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		age("idle", 0)
		delay.Store(int64(20 * time.Second))
		slow, err := s.Apply([]Write{write("k", value(1, "x"))}, nil)
		if err != nil {
			t.Fatal(err)
		}
		age("applied, not yet waited for", 0)
		ended := make(chan error)
		go func() { ended <- slow.Wait() }()
		time.Sleep(time.Second)
		delay.Store(0)
		put(t, s, write("other", value(2, "x")))
		time.Sleep(11 * time.Second)
		age("a commit that hangs", 12*time.Second)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		age("a commit that has ended", 0)

		time.Sleep(time.Second)
		closed := make(chan struct{})
		gate.Store(&closed)
		time.Sleep(12 * time.Second)
		if got := s.OldestSync(); got < 6*time.Second || got > 8*time.Second {
			t.Errorf("an idle store whose disk has hung for 12s: %s", got)
		}
		close(closed)
		time.Sleep(time.Millisecond)
		age("a disk that goes on", 0)
	})
}
