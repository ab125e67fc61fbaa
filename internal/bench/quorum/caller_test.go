package quorum

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// callerOf returns which of the processes has opened a connection of this machine's
// loopback, as all have the same address.
func callerOf(conn net.Conn, pids []int) (int, error) {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, err
	}
	inode := inodeOf(string(table), conn.RemoteAddr().(*net.TCPAddr).Port, conn.LocalAddr().(*net.TCPAddr).Port)
	for _, pid := range pids {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is well formed
		for _, fd := range fds {
			if target, err := os.Readlink(fd); err == nil && target == "socket:["+inode+"]" {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("none of the processes has opened %s", conn.RemoteAddr())
}

// inodeOf returns the inode of the socket that leads from a port to another in a table such
// as /proc/net/tcp, or "".
func inodeOf(table string, from, to int) string {
	const local, remote, inode = 1, 2, 9 // the columns
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) > inode && strings.HasSuffix(f[local], fmt.Sprintf(":%04X", from)) && strings.HasSuffix(f[remote], fmt.Sprintf(":%04X", to)) {
			return f[inode]
		}
	}
	return ""
}
