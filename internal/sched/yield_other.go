//go:build !linux

// Package sched gives way to other goroutines.
package sched

import "runtime"

// Yield lets whatever waits for a processor of this process run first.
func Yield() { runtime.Gosched() }
