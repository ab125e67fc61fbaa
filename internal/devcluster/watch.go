package devcluster

import (
	"context"
	"errors"
	"time"
)

// watchEvery is how often Watch looks. The end of a child wakes it at once.
const watchEvery = 250 * time.Millisecond

// ErrStopped: every process was asked to stop and has ended.
var ErrStopped = errors.New("the cluster was stopped")

// Watch notices what happens to the processes, also to those that other runs
// start, until ctx is done (nil) or the cluster is stopped (ErrStopped). It restarts
// nothing: a failure is what a development cluster is there to show. It is for one
// caller at a time.
func (c *Cluster) Watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var before map[string]sighting
	for {
		st, err := loadState(c.dir)
		if err != nil {
			return err
		}
		now := map[string]sighting{}
		over := true
		for i := range st.Processes {
			p := &st.Processes[i]
			s := sighting{p.PID, p.StartTicks, p.state()}
			now[p.Name] = s
			over = over && s.state == Stopped && p.Stopping
			if b, known := before[p.Name]; !known || b != s {
				c.noticeChange(p, b, s, before == nil)
			}
		}
		if over {
			return ErrStopped
		}
		before = now
		select {
		case <-tick.C:
		case <-c.exited:
		case <-ctx.Done():
			return nil
		}
	}
}

// sighting is what was seen of a process.
type sighting struct {
	pid        int
	startTicks uint64
	state      string
}

// noticeChange says what happened between two sightings; the earlier one is zero
// when the process was not known. first tells the first look at all.
func (c *Cluster) noticeChange(p *process, before, now sighting, first bool) {
	started := now.pid != before.pid || now.startTicks != before.startTicks
	switch {
	case now.state == Stopped && (p.PID == 0 || p.Stopping):
		// Planned and not started yet, or asked to stop.
	case now.state == Stopped:
		c.noticef("%s died: %s\n%s\nStart it again with: kvctl dev start %s",
			p.Name, c.howEnded(p.PID), quoteLog(tail(logPath(c.dir, p.Name), p.LogOffset), logPath(c.dir, p.Name)), p.Name)
	case first && now.state == Running:
		// As it should be.
	case started && (before.state == Running || before.state == Paused):
		c.noticef("%s died (%s) and was started again (process %d)", p.Name, c.howEnded(before.pid), p.PID)
	case started && now.state == Running:
		c.noticef("%s was started (process %d)", p.Name, p.PID)
	case now.state == Paused:
		c.noticef("%s is paused; let it go on with: kvctl dev resume %s", p.Name, p.Name)
	default:
		c.noticef("%s goes on", p.Name)
	}
}
