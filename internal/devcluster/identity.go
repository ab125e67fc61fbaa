package devcluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// States of a process.
const (
	Running = "running"
	Paused  = "paused"
	Stopped = "stopped"
)

// errNotRunning: the process that was started is gone, whatever its PID means now.
var errNotRunning = errors.New("is not running")

// state tells what became of the process. One that has ended and was not reaped yet
// is stopped.
func (p *process) state() string {
	if p.PID == 0 {
		return Stopped
	}
	st, err := readStat(p.PID)
	if err != nil || st.startTicks != p.StartTicks || st.ended() {
		return Stopped
	}
	// A process that is about to end has no executable any more, and still its ports.
	if executable, err := executableOf(p.PID); err == nil && executable != p.Executable {
		return Stopped
	}
	if st.letter == 'T' {
		return Paused
	}
	return Running
}

// signal sends a signal to the process and to no other: the handle is taken before
// the identity is checked, and on Linux it stays with the process it was taken for,
// so that a PID that is reused in between is not hit either.
func (p *process) signal(sig syscall.Signal) error {
	if p.PID == 0 {
		return errNotRunning
	}
	handle, err := os.FindProcess(p.PID)
	if err != nil {
		return errNotRunning
	}
	defer handle.Release()
	if p.state() == Stopped {
		return errNotRunning
	}
	err = handle.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		return errNotRunning
	}
	if err != nil {
		return fmt.Errorf("(process %d) cannot be sent %q: %w", p.PID, sig, err)
	}
	return nil
}

// stat is what is used of /proc/PID/stat.
type stat struct {
	// letter is the state of the process's first thread.
	letter byte
	// threads is how many there are, a first one that has ended included.
	threads int
	// startTicks is when the process started, in clock ticks since boot.
	startTicks uint64
}

// ended tells that the process has ended, reaped or not. After its first thread the
// others may live on for a moment, and with them its ports.
func (s stat) ended() bool { return (s.letter == 'Z' || s.letter == 'X') && s.threads <= 1 }

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// Fields of /proc/PID/stat, counted from the one after the command's name; proc(5)
// counts from 1 and calls them 3, 20 and 22.
const (
	statState      = 0
	statThreads    = 17
	statStartTicks = 19
)

// parseStat parses /proc/PID/stat. The command's name stands in parentheses and may
// itself hold spaces and parentheses.
func parseStat(b []byte) (stat, error) {
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return stat{}, errors.New("no command name in stat")
	}
	fields := strings.Fields(string(b[end+1:]))
	if len(fields) <= statStartTicks || len(fields[statState]) != 1 {
		return stat{}, errors.New("too few fields in stat")
	}
	threads, err := strconv.Atoi(fields[statThreads])
	if err != nil {
		return stat{}, fmt.Errorf("threads in stat: %w", err)
	}
	startTicks, err := strconv.ParseUint(fields[statStartTicks], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("start time in stat: %w", err)
	}
	return stat{fields[statState][0], threads, startTicks}, nil
}

// executableOf returns the path of what a process runs. A rebuilt binary leaves the
// old one unlinked, which the kernel marks; it is the same path.
func executableOf(pid int) (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return strings.TrimSuffix(path, " (deleted)"), err
}
