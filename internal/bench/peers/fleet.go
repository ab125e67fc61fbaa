package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// fleet is the server processes of a system.
type fleet struct{ procs []*proc }

// proc is a process that was started here. ended is closed when it has ended, and why is
// set before.
type proc struct {
	name, log string
	cmd       *exec.Cmd
	ended     chan struct{}
	why       error
}

// launch starts a process that writes its log to dir. A Ctrl-C of the terminal does not
// reach it, for it is stopped by stop; and it dies with the thread that started it, so that
// nothing runs on after this process was killed.
func (f *fleet) launch(dir, name, path string, args ...string) error {
	p := &proc{name: name, log: filepath.Join(dir, name+".log"), cmd: exec.Command(path, args...), ended: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close() // the process has its own
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	f.procs = append(f.procs, p)
	go func() { // ends with the process, which stop waits for
		p.why = p.cmd.Wait()
		close(p.ended)
	}()
	return nil
}

func (f *fleet) servers() []server {
	out := make([]server, len(f.procs))
	for i, p := range f.procs {
		out[i] = server{name: p.name, pid: p.cmd.Process.Pid, replica: true}
	}
	return out
}

func (f *fleet) check() error {
	for _, p := range f.procs {
		select {
		case <-p.ended:
			why := "exit status 0"
			if p.why != nil {
				why = p.why.Error()
			}
			return fmt.Errorf("%s has ended (%s); the end of its log:\n%s", p.name, why, tail(p.log))
		default:
		}
	}
	return nil
}

// stop kills the processes: nothing of theirs is kept, so none needs to end in order.
func (f *fleet) stop() error {
	var errs []error
	for _, p := range f.procs {
		if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, fmt.Errorf("stop %s, process %d: %w", p.name, p.cmd.Process.Pid, err))
			continue
		}
		<-p.ended
	}
	f.procs = nil
	return errors.Join(errs...)
}

// startTimeout is how long servers may take until they serve.
const startTimeout = 90 * time.Second

// ready returns when probe succeeds, or an error when a process ends or time is up.
func (f *fleet) ready(ctx context.Context, probe func(context.Context) error) error {
	deadline := time.Now().Add(startTimeout)
	for {
		if err := f.check(); err != nil {
			return err
		}
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := probe(try)
		cancel()
		if err == nil {
			return nil
		}
		if err := rest(ctx, 100*time.Millisecond); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			text := fmt.Sprintf("not ready within %v: %v", startTimeout, err)
			for _, p := range f.procs {
				text += fmt.Sprintf("\nthe end of the log of %s:\n%s", p.name, tail(p.log))
			}
			return errors.New(text)
		}
	}
}

// tail returns the last lines of a file, indented.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "  " + err.Error()
	}
	return lastLines(string(b))
}

func lastLines(text string) string {
	const most = 15
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return "  " + strings.Join(lines[max(0, len(lines)-most):], "\n  ")
}

// rest waits, unless ctx ends.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// moduleVersion returns which release of a module a Go program was built from.
func moduleVersion(path string) (string, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w (`make bench-peers` builds it)", path, err)
	}
	for _, dep := range append(info.Deps, &info.Main) {
		if info.Path == dep.Path || strings.HasPrefix(info.Path, dep.Path+"/") {
			return dep.Version, nil
		}
	}
	return "unknown", nil
}
