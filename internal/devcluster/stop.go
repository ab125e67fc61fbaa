package devcluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"
)

// signalPatience is how long the kernel may take to carry out a kill, pause or
// resume. A process that writes to a slow disk can take a while to die.
const signalPatience = 10 * time.Second

// Stop stops those processes of the names, all without names, that run or are
// paused, and returns the names of those. Nodes go first, so that each can still
// reach the orchestrators; then the orchestrators. Every process gets SIGTERM, and
// SIGKILL, which is noticed, when it has not ended in time or when ctx is done.
func (c *Cluster) Stop(ctx context.Context, names ...string) (stopped []string, err error) {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	st, err := loadState(c.dir)
	if err != nil {
		return nil, err
	}
	picked, err := st.pick(names)
	if err != nil {
		return nil, err
	}
	for _, p := range picked {
		p.Stopping = true
	}
	// Before the first signal: whoever watches must not take this for a failure.
	if err := st.save(c.dir); err != nil {
		return nil, err
	}
	return c.stopAll(ctx, picked)
}

// StopChildren is Stop for the processes that this run started, and for when the
// cluster's directory cannot be read or is gone.
func (c *Cluster) StopChildren(ctx context.Context) (stopped []string, err error) {
	var own []*process
	c.mu.Lock()
	for _, ch := range c.mu.children {
		own = append(own, &ch.process)
	}
	c.mu.Unlock()
	return c.stopAll(ctx, own)
}

func (c *Cluster) stopAll(ctx context.Context, processes []*process) (stopped []string, err error) {
	var errs []error
	for _, role := range []string{RoleData, RoleReporting, RoleOrchestrator} {
		group := slices.DeleteFunc(slices.Clone(processes), func(p *process) bool { return p.Role != role || p.state() == Stopped })
		errs = append(errs, c.stopGroup(ctx, group))
		stopped = append(stopped, namesOf(group)...)
	}
	return stopped, errors.Join(errs...)
}

// stopGroup stops processes together.
func (c *Cluster) stopGroup(ctx context.Context, group []*process) error {
	var errs []error
	for _, p := range group {
		// A paused process takes a SIGTERM only after it was resumed.
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGCONT} {
			if err := p.signal(sig); err != nil && !errors.Is(err, errNotRunning) {
				errs = append(errs, fmt.Errorf("%s %w", p.Name, err))
			}
		}
	}
	patience, cancel := context.WithTimeout(ctx, c.opts.StopTimeout)
	defer cancel()
	rest := c.awaitAll(patience, group, Stopped)
	if len(rest) == 0 {
		return errors.Join(errs...)
	}
	why := fmt.Sprintf("did not stop within %s", c.opts.StopTimeout)
	if ctx.Err() != nil {
		why = "had no time to stop"
	}
	c.noticef("%s %s: killing with SIGKILL", strings.Join(namesOf(rest), ", "), why)
	for _, p := range rest {
		if err := c.kill(p); err != nil && !errors.Is(err, errNotRunning) {
			errs = append(errs, fmt.Errorf("%s %w", p.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Kill kills processes with SIGKILL and returns when they are gone.
func (c *Cluster) Kill(ctx context.Context, names ...string) error {
	return c.change(ctx, names, c.kill)
}

func (c *Cluster) kill(p *process) error { return c.signalAndAwait(p, syscall.SIGKILL, Stopped) }

// Pause stops processes with SIGSTOP; they keep their memory and connections and do
// nothing. It returns when they stand still.
func (c *Cluster) Pause(ctx context.Context, names ...string) error {
	return c.change(ctx, names, func(p *process) error { return c.signalAndAwait(p, syscall.SIGSTOP, Paused) })
}

// Resume lets paused processes go on.
func (c *Cluster) Resume(ctx context.Context, names ...string) error {
	return c.change(ctx, names, func(p *process) error { return c.signalAndAwait(p, syscall.SIGCONT, Running) })
}

// change applies f to processes under the lock, so that none is started meanwhile.
func (c *Cluster) change(ctx context.Context, names []string, f func(*process) error) error {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	return c.each(names, f)
}

// signalAndAwait sends a signal and waits until it shows.
func (c *Cluster) signalAndAwait(p *process, sig syscall.Signal, want string) error {
	if err := p.signal(sig); err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(context.Background(), signalPatience)
	defer cancel()
	if len(c.awaitAll(patience, []*process{p}, want)) == 0 {
		return nil
	}
	if state := p.state(); state != want {
		return fmt.Errorf("is still %s %s after %s", state, signalPatience, sig)
	}
	return nil
}

// awaitAll waits until processes are in a state, and returns those that are not when
// ctx is done. A process that ends is not waited for any longer.
func (c *Cluster) awaitAll(ctx context.Context, processes []*process, want string) []*process {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	waiting := slices.Clone(processes)
	for {
		waiting = slices.DeleteFunc(waiting, func(p *process) bool {
			state := p.state()
			if state == Stopped && want == Stopped {
				c.howEnded(p.PID) // so that a child is no zombie when this returns
			}
			return state == want || state == Stopped
		})
		if len(waiting) == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return waiting
		}
	}
}
