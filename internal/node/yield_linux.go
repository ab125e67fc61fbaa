package node

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// yield lets whatever waits for this core run first, of this process or of others: the
// thread of a long computation keeps a core for some milliseconds otherwise.
func yield() {
	unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	runtime.Gosched()
}
