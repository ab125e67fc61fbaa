package devcluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A child is a process that this one started and has to reap.
type child struct {
	process process
	done    chan struct{}
	// err says how it ended; nil after exit code 0. To be read after done.
	err error
}

// Start starts those processes of the names that are stopped, all without names,
// orchestrators first, and returns the names of those it started, also with an error.
// It does not wait until they are ready. Nothing is started when an executable is
// missing, a port is taken or one of the processes is paused.
func (c *Cluster) Start(ctx context.Context, names ...string) (started []string, err error) {
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
	toStart, err := c.stopped(picked)
	if err != nil {
		return nil, err
	}
	members := make([]member, len(toStart))
	for i, p := range toStart {
		members[i] = p.member
	}
	if err := checkBinaries(c.opts.BinDir, members); err != nil {
		return nil, err
	}
	if err := checkPorts(members); err != nil {
		return nil, err
	}
	binDir, err := filepath.Abs(c.opts.BinDir)
	if err != nil {
		return nil, err
	}
	for _, p := range toStart {
		if err := ctx.Err(); err != nil {
			return started, err
		}
		if err := st.writeConfig(c.dir, binDir, p.member); err != nil {
			return started, err
		}
		if err := c.spawn(p); err != nil {
			return started, err
		}
		started = append(started, p.Name)
		// After each one, as a process that is not in the file could not be stopped.
		if err := st.save(c.dir); err != nil {
			return started, err
		}
	}
	return started, nil
}

// Recover has orchestrators start with a file of kvctl recover from now on.
func (c *Cluster) Recover(file string) (err error) {
	if c.recovery, err = filepath.Abs(file); err != nil {
		return err
	}
	_, err = os.Stat(c.recovery)
	return err
}

// stopped returns those of the processes that are stopped.
func (c *Cluster) stopped(picked []*process) ([]*process, error) {
	var out []*process
	var errs []error
	for _, p := range picked {
		switch p.state() {
		case Stopped:
			out = append(out, p)
		case Paused:
			errs = append(errs, fmt.Errorf("%s is paused: let it go on with `kvctl dev resume %s`", p.Name, p.Name))
		default:
			c.noticef("%s is already running (process %d)", p.Name, p.PID)
		}
	}
	return out, errors.Join(errs...)
}

// spawn starts a process and records it in p. It has a session of its own: a signal
// that the terminal sends to the foreground must not reach it, as the order of a
// stop matters, and it may outlive this process.
func (c *Cluster) spawn(p *process) error {
	binary, err := filepath.Abs(filepath.Join(c.opts.BinDir, p.binary()))
	if err != nil {
		return fmt.Errorf("find %s: %w", p.binary(), err)
	}
	log, offset, err := openLog(logPath(c.dir, p.Name))
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"--config", configPath(c.dir, p.Name)}
	switch {
	case p.Role != RoleOrchestrator:
		args = append(args, c.opts.NodeArgs...)
	case c.recovery != "":
		args = append(args, "--recover", c.recovery)
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.dir, log, log
	cmd.Env = childEnviron(c.opts.Environ)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	// It cannot have vanished: it stays in /proc until it is reaped, below.
	st, err := readStat(cmd.Process.Pid)
	if err != nil {
		return errors.Join(fmt.Errorf("%s cannot be told from other processes (is this Linux, with /proc?): %w", p.Name, err), cmd.Process.Kill(), ignoreExit(cmd.Wait()))
	}
	executable, err := executableOf(cmd.Process.Pid)
	if err != nil {
		executable = binary // it has ended already, so that it does not matter
	}
	p.PID, p.StartTicks, p.Executable, p.LogOffset, p.Stopping = cmd.Process.Pid, st.startTicks, executable, offset, false
	ch := &child{process: *p, done: make(chan struct{})}
	c.mu.Lock()
	c.mu.children[p.PID] = ch
	c.mu.Unlock()
	go func() {
		ch.err = cmd.Wait()
		close(ch.done)
		select {
		case c.exited <- struct{}{}:
		default: // Watch is about to look anyway
		}
	}()
	return nil
}

// ignoreExit drops the error that says how a process ended.
func ignoreExit(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// reapPatience bounds the wait for a child that has ended.
const reapPatience = time.Second

// howEnded waits until a process that has ended is reaped, if it is a child of this
// one, and tells how it ended, as far as is known.
func (c *Cluster) howEnded(pid int) string {
	c.mu.Lock()
	ch := c.mu.children[pid]
	c.mu.Unlock()
	if ch == nil {
		return "it is not running"
	}
	select {
	case <-ch.done:
	case <-time.After(reapPatience):
		return "it is not the process it was"
	}
	if ch.err == nil {
		return "exit status 0"
	}
	return ch.err.Error()
}

// childEnviron returns the environment of a process. Settings do not stay in it: they would
// override each process's file, and make one of the others.
func childEnviron(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(v string) bool {
		return strings.HasPrefix(v, "KVNODE_") || strings.HasPrefix(v, "KVORCH_")
	})
}

// maxLogBytes is the size from which a log is set aside at the next start. One
// earlier log is kept.
const maxLogBytes = 32 << 20

// openLog opens a log to append to, and returns its length so far.
func openLog(path string) (f *os.File, offset int64, err error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxLogBytes {
		err = os.Rename(path, path+".old")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("open log: %w", err)
	}
	f, err = os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, 0, fmt.Errorf("open log: %w", err)
	}
	offset, err = f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("open log: %w", err), f.Close())
	}
	return f, offset, nil
}

// Lines and bytes of a log that are shown when a process failed.
const (
	tailLines = 15
	tailBytes = 8 << 10
)

// tail returns the last lines that a process wrote since it was started.
func tail(path string, offset int64) []string {
	f, err := os.Open(path)
	if err != nil {
		return []string{fmt.Sprintf("(%v)", err)}
	}
	defer f.Close()
	cut := false
	if end, err := f.Seek(0, io.SeekEnd); err == nil && end-offset > tailBytes {
		offset, cut = end-tailBytes, true
	}
	b, err := io.ReadAll(io.NewSectionReader(f, offset, tailBytes))
	if err != nil {
		return []string{fmt.Sprintf("(%v)", err)}
	}
	if len(b) == 0 {
		return []string{"(it wrote nothing)"}
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	if cut && len(lines) > 1 {
		lines = lines[1:] // the first one is likely only an end
	}
	return lines[max(0, len(lines)-tailLines):]
}
