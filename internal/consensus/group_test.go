package consensus

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Servers that are founded anew, as another group, hear nothing of one of those before them:
// its log is longer and its term greater, and it would lead them, or undo their terms.
func TestGroupsAreStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 8, Config{})
		defer c.stop()
		c.mustPropose(1, 50)
		for range 3 {
			old := c.leader()
			c.crash(old)
			c.leader() // of a greater term
			c.start(old)
		}
		c.waitEqual()
		for _, name := range []string{"a", "b", "c"} {
			c.crash(name)
		}
		c.config.Group = "second"
		for _, name := range []string{"a", "b"} {
			c.members[name].fs = vfs.NewCrashableMem()
			c.start(name)
		}
		c.mustPropose(101, 105)
		term := c.members["a"].r.Status().Term
		c.config.Group = "" // what a store has
		c.start("c")
		time.Sleep(30 * time.Second)
		if got := c.members["a"].r.Status(); got.Term != term || got.Leader == "c" || got.Leader == "" {
			t.Errorf("the old server disturbs the new ones: term %d, now %+v", term, got)
		}
		if s := c.members["c"].r.Status(); s.Leader != "" || c.members["c"].r.Group() != "" {
			t.Errorf("the old server has a leader: %+v", s)
		}
		c.mustPropose(106, 110)

		// With an empty directory it joins them.
		c.crash("c")
		c.members["c"].fs = vfs.NewCrashableMem()
		c.config.Group = "second"
		c.start("c")
		if got := c.waitEqual(); !slices.Equal(got, numbers(101, 110)) {
			t.Errorf("commands %v", got)
		}
		// A store keeps its group without being told, and takes no other.
		c.crash("a")
		c.config.Group = ""
		c.start("a")
		c.mustPropose(111, 112)
		if got := c.waitEqual(); !slices.Equal(got, numbers(101, 112)) || c.members["a"].r.Group() != "second" {
			t.Errorf("group %q, commands %v", c.members["a"].r.Group(), got)
		}
		c.crash("a")
		cfg := c.config
		cfg.Name, cfg.Group, cfg.FS, cfg.Streams = "a", "third", c.members["a"].fs, c.net.listen("a:1")
		if _, err := Open(cfg, &ledger{}); !errors.Is(err, ErrOtherGroup) {
			t.Errorf("opened as another group: %v", err)
		}
	})
}
