// Package boottime reads a clock that is never set and that goes on while the machine is
// suspended: the one to count leases by. What Go's time package measures with stands
// still meanwhile on Linux.
package boottime

import "time"

// Now returns the time since some moment before the process began. Differences between
// two readings of one process are all that it is good for.
func Now() time.Duration { return now() }
