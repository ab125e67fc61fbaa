package boottime

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("boottime: %v", err)) // Linux has had the clock since 2.6.39
	}
	return time.Duration(ts.Nano())
}
