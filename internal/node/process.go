package node

import (
	"bytes"
	"context"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// sampleInterval is how often the process is measured, cpuWindow over how many
// samples its CPU is averaged.
const (
	sampleInterval = time.Second
	cpuWindow      = 60
)

// process measures the process it runs in.
type process struct {
	allowance float64 // cores that count as full use
	// simulated returns what cpu does, where that is not measured.
	simulated func() float64
	// memoryLimit is how many bytes the process may take, 0 where that is unknown.
	memoryLimit uint64
	mu          struct {
		sync.Mutex
		// used holds the CPU time at the newest samples, oldest first.
		used []cpuSample
	}
}

type cpuSample struct {
	at   time.Time
	used time.Duration
}

// newProcess takes a limit in cores; 0 takes the control group's quota, or else the
// machine's cores.
func newProcess(limit float64) *process {
	if limit == 0 {
		limit = cgroupQuota()
	}
	if limit == 0 {
		limit = float64(runtime.NumCPU())
	}
	p := &process{allowance: limit, memoryLimit: memoryLimit()}
	p.sample()
	return p
}

// cgroupQuota returns the cores that the control group allows, 0 when it sets no
// limit.
func cgroupQuota() float64 {
	b, err := os.ReadFile("/sys/fs/cgroup/cpu.max")
	if err != nil {
		return 0
	}
	return parseQuota(b)
}

// parseQuota reads "max 100000" or "150000 100000": microseconds per period.
func parseQuota(b []byte) float64 {
	f := bytes.Fields(b)
	if len(f) != 2 {
		return 0
	}
	quota, err1 := strconv.ParseFloat(string(f[0]), 64)
	period, err2 := strconv.ParseFloat(string(f[1]), 64)
	if err1 != nil || err2 != nil || quota <= 0 || period <= 0 {
		return 0
	}
	return quota / period
}

func (p *process) run(ctx context.Context, every func()) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.sample()
			every()
		}
	}
}

func (p *process) sample() {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return
	}
	s := cpuSample{time.Now(), time.Duration(u.Utime.Nano() + u.Stime.Nano())}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.used = append(p.mu.used, s)
	if extra := len(p.mu.used) - cpuWindow - 1; extra > 0 {
		p.mu.used = p.mu.used[extra:]
	}
}

// cpu returns the process's CPU over its allowance, 0 to about 1, mean of the last
// minute.
func (p *process) cpu() float64 {
	if p.simulated != nil {
		return p.simulated()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	first, last := p.mu.used[0], p.mu.used[len(p.mu.used)-1]
	span := last.at.Sub(first.at)
	if span <= 0 {
		return 0
	}
	return (last.used - first.used).Seconds() / span.Seconds() / p.allowance
}

// memoryLimit returns the bytes that the machine has, or that the control group allows
// where that is less; 0 when neither can be read.
func memoryLimit() uint64 {
	group, _ := os.ReadFile("/sys/fs/cgroup/memory.max")
	machine, _ := os.ReadFile("/proc/meminfo")
	return parseMemoryLimit(group, machine)
}

// parseMemoryLimit reads "max" or bytes, and "MemTotal: 8038476 kB" and more.
func parseMemoryLimit(group, machine []byte) (limit uint64) {
	if f := bytes.Fields(machine); len(f) > 2 && string(f[0]) == "MemTotal:" && string(f[2]) == "kB" {
		if kib, err := strconv.ParseUint(string(f[1]), 10, 53); err == nil {
			limit = kib << 10
		}
	}
	if allowed, err := strconv.ParseUint(string(bytes.TrimSpace(group)), 10, 64); err == nil && (limit == 0 || allowed < limit) {
		limit = allowed
	}
	return limit
}

// memory returns the process's resident memory in bytes.
func memory() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err == nil {
		if f := bytes.Fields(b); len(f) > 1 {
			if pages, err := strconv.ParseUint(string(f[1]), 10, 64); err == nil {
				return pages * uint64(os.Getpagesize())
			}
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Sys
}
