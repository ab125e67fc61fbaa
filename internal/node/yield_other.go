//go:build !linux

package node

import "runtime"

// yield lets whatever waits for a processor of this process run first.
func yield() { runtime.Gosched() }
