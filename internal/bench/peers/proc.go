package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// clockTick is the unit of CPU time in /proc: Linux shows users a hundredth of a second,
// whatever the kernel counts in.
const clockTick = 10 * time.Millisecond

// cpuTime returns what the servers have used, in user and kernel mode.
func cpuTime(servers []server) (time.Duration, error) {
	var total time.Duration
	for _, s := range servers {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.pid))
		if err != nil {
			return 0, fmt.Errorf("CPU time of %s: %w", s.name, err)
		}
		d, err := parseStat(string(b))
		if err != nil {
			return 0, fmt.Errorf("CPU time of %s: %w", s.name, err)
		}
		total += d
	}
	return total, nil
}

// parseStat returns utime and stime of /proc/PID/stat, its fields 14 and 15.
func parseStat(text string) (time.Duration, error) {
	// The name, field 2, may hold spaces and parentheses.
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const utime = 14 - 3
	if len(fields) < utime+2 {
		return 0, fmt.Errorf("unexpected content %q", text)
	}
	var ticks int64
	for _, field := range fields[utime : utime+2] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("unexpected content %q", text)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// memory is what a system's processes have resident, in bytes.
type memory struct {
	Total int64 `json:"total"`
	// Replica is the mean of those that hold data.
	Replica int64 `json:"replica"`
	// Each is by name.
	Each map[string]int64 `json:"each"`
}

func memoryOf(servers []server) (memory, error) {
	m := memory{Each: map[string]int64{}}
	var held, holders int64
	for _, s := range servers {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid))
		if err != nil {
			return m, fmt.Errorf("memory of %s: %w", s.name, err)
		}
		n, err := parseResident(string(b))
		if err != nil {
			return m, fmt.Errorf("memory of %s: %w", s.name, err)
		}
		m.Total += n
		m.Each[s.name] = n
		if s.replica {
			held += n
			holders++
		}
	}
	m.Replica = held / max(holders, 1)
	return m, nil
}

// parseResident returns VmRSS of /proc/PID/status.
func parseResident(text string) (int64, error) {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no VmRSS: the process has ended")
}

// activity is what a machine does.
type activity struct {
	// Busy is the part of all cores that is in use, 0 to 1.
	Busy    float64 `json:"cpu_busy"`
	Flushes float64 `json:"flushes_per_second"`
}

// String describes it.
func (a activity) String() string {
	return fmt.Sprintf("%.0f%% of its cores in use and %s flushes/s", 100*a.Busy, number(a.Flushes))
}

// watch returns what the machine does for a while.
func watch(ctx context.Context, d disk, wait time.Duration) (activity, error) {
	var idle, total, flushes [2]int64
	for i := range 2 {
		if i > 0 {
			if err := rest(ctx, wait); err != nil {
				return activity{}, err
			}
		}
		b, err := os.ReadFile("/proc/stat")
		if err != nil {
			return activity{}, err
		}
		if idle[i], total[i], err = parseCPU(string(b)); err != nil {
			return activity{}, err
		}
		if flushes[i], err = d.flushes(); err != nil {
			return activity{}, err
		}
	}
	return activity{
		Busy:    1 - float64(idle[1]-idle[0])/float64(max(total[1]-total[0], 1)),
		Flushes: float64(flushes[1]-flushes[0]) / wait.Seconds(),
	}, nil
}

// parseCPU returns the ticks of all cores from /proc/stat: those without work, and all.
func parseCPU(text string) (idle, total int64, err error) {
	line, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(line)
	const most = 9 // user, nice, system, idle, iowait, irq, softirq, steal; guests are users
	if len(fields) < most || fields[0] != "cpu" {
		return 0, 0, fmt.Errorf("/proc/stat: unexpected content %q", line)
	}
	for i, field := range fields[1:most] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/stat: unexpected content %q", line)
		}
		total += n
		if i == 3 || i == 4 {
			idle += n
		}
	}
	return idle, total, nil
}

// disk is the block device that data lie on.
type disk struct{ name string }

// diskOf finds the device of a directory. Data in memory would show nothing of what a
// synced write costs: such a directory is an error.
func diskOf(dir string) (disk, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return disk{}, fmt.Errorf("%s: %w", dir, err)
	}
	major, minor := (st.Dev>>8)&0xfff, st.Dev&0xff|(st.Dev>>12)&0xfff00
	link := fmt.Sprintf("/sys/dev/block/%d:%d", major, minor)
	path, err := filepath.EvalSymlinks(link)
	if err != nil {
		return disk{}, fmt.Errorf("%s lies on no disk (device %d:%d): name a directory that does, with DIR=", dir, major, minor)
	}
	// The kernel counts flushes of whole disks only.
	if _, err := os.Stat(filepath.Join(path, "partition")); err == nil {
		path = filepath.Dir(path)
	}
	return disk{filepath.Base(path)}, nil
}

// flushes returns how many flush requests the device has completed since the start.
func (d disk) flushes() (int64, error) {
	b, err := os.ReadFile("/proc/diskstats")
	if err != nil {
		return 0, err
	}
	return parseFlushes(string(b), d.name)
}

// parseFlushes reads /proc/diskstats, which has flush requests in field 19 since Linux 5.5.
func parseFlushes(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) > 2 && fields[2] == name {
			if len(fields) < 19 {
				return 0, fmt.Errorf("/proc/diskstats has no flush requests: want Linux 5.5 or later")
			}
			return strconv.ParseInt(fields[18], 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/diskstats has no %s", name)
}
