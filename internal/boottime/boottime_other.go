//go:build !linux

package boottime

import "time"

var began = time.Now()

func now() time.Duration { return time.Since(began) }
