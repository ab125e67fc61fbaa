package storage

import (
	"log/slog"
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
