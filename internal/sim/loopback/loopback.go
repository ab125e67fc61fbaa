// Package loopback finds free ports for tests that run real servers on this
// machine.
package loopback

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
)

// Ports below the range from which the system takes those of outgoing connections,
// which may take a free port between our looking and a server's listening.
const (
	lowest  = 10_000
	highest = 30_000
)

// Base returns a port such that it and the count-1 ports after it are free, for TCP
// and UDP.
func Base(t testing.TB, count int) int {
	if t != nil {
		t.Helper()
	}
	for range 1000 {
		base := lowest + rand.IntN(highest-lowest-count)
		if free(base, count) {
			return base
		}
	}
	panic(fmt.Sprintf("no %d free ports in a row", count))
}

// Addresses returns free addresses.
func Addresses(t testing.TB, count int) []string {
	base := Base(t, count)
	out := make([]string, count)
	for i := range out {
		out[i] = address(base + i)
	}
	return out
}

func address(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

func free(base, count int) bool {
	for port := base; port < base+count; port++ {
		l, err := net.Listen("tcp", address(port))
		if err != nil {
			return false
		}
		l.Close()
		p, err := net.ListenPacket("udp", address(port))
		if err != nil {
			return false
		}
		p.Close()
	}
	return true
}
