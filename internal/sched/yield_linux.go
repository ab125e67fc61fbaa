// Package sched gives way: to other goroutines, and to other processes of the machine.
package sched

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Yield lets whatever waits for this core run first, of this process or of others: the
// thread of a long computation keeps a core for some milliseconds otherwise. Where nothing
// waits it returns at once.
func Yield() {
	unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	runtime.Gosched()
}
