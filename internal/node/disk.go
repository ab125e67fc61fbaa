package node

import (
	"context"
	"fmt"
	"time"
)

// diskUse is what was last found of the disk. Where it hangs, finding out may take for
// ever: whoever wants to know takes this instead of asking.
type diskUse struct{ used, available uint64 }

// watchDisk looks after the disk every second until ctx ends.
func (n *Node) watchDisk(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		n.store.CheckDisk()
		n.measureDisk()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (n *Node) measureDisk() {
	u := diskUse{used: n.store.Metrics().DiskSpaceUsage()}
	if available, _, err := n.store.DiskUsage(); err == nil {
		u.available = available
	}
	n.disk.Store(&u)
}

// noticeStall notes whether the disk finishes what it is given. A node whose disk does
// not serves nothing: what waits for the disk would be waited for in vain.
func (n *Node) noticeStall() {
	age := n.store.OldestSync()
	if age <= n.cfg.DiskStallAfter {
		if n.stalled.Swap(nil) != nil {
			n.cfg.Logger.Info("the disk goes on", "dir", n.cfg.DataDir)
		}
		return
	}
	why := fmt.Sprintf("its disk has not finished a sync for %s", age.Truncate(time.Second))
	if n.stalled.Swap(&why) == nil {
		n.cfg.Logger.Error("this node serves nothing until its disk goes on", "dir", n.cfg.DataDir, "reason", why)
	}
}
