package devcluster

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A listener is one port that a process needs.
type listener struct {
	Member, Purpose, Network string
	Port                     int
}

// PortsBusyError lists the ports that a start needs and cannot have.
type PortsBusyError struct{ Busy []string }

// Error implements error.
func (e *PortsBusyError) Error() string {
	return fmt.Sprintf("nothing was started, as ports are taken:\n  %s\nStop what uses them. A new cluster can have other ports (--port).",
		strings.Join(e.Busy, "\n  "))
}

// checkPorts tries every port that the members need, and says what holds those that
// are taken.
func checkPorts(members []member) error {
	var busy []busyPorts
	for _, m := range members {
		for _, l := range m.listeners() {
			err := tryListen(l.Network, address(l.Port))
			if err == nil {
				continue
			}
			why := err.Error()
			if errors.Is(err, syscall.EADDRINUSE) {
				why = "in use by " + holderOf(l.Network, l.Port)
			} else if errors.Is(err, syscall.EACCES) {
				why = "not permitted: ports below 1024 need privileges"
			}
			last := len(busy) - 1
			if last < 0 || busy[last].member != l.Member || busy[last].why != why {
				busy = append(busy, busyPorts{member: l.Member, why: why})
				last++
			}
			busy[last].ports = append(busy[last].ports, fmt.Sprintf("%d/%s (%s)", l.Port, l.Network, l.Purpose))
		}
	}
	if len(busy) == 0 {
		return nil
	}
	out := &PortsBusyError{}
	for _, b := range busy {
		out.Busy = append(out.Busy, fmt.Sprintf("%s needs port %s: %s", b.member, strings.Join(b.ports, ", "), b.why))
	}
	return out
}

// busyPorts are ports of one member that are taken for the same reason.
type busyPorts struct {
	member, why string
	ports       []string
}

func tryListen(network, address string) error {
	if network == "udp" {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	return l.Close()
}

// holderOf describes the process that has a port.
func holderOf(network string, port int) string {
	inode := ""
	for _, table := range []string{network, network + "6"} {
		f, err := os.Open("/proc/net/" + table)
		if err != nil {
			continue
		}
		found := findSocket(f, port)
		f.Close()
		if found != "" {
			inode = found
			break
		}
	}
	if inode == "" {
		return "a process outside of this container or namespace"
	}
	pid := socketOwner(inode)
	if pid == 0 {
		return "a process of another user"
	}
	return fmt.Sprintf("process %d, %s", pid, commandOf(pid))
}

// Columns of /proc/net/tcp and udp, and the state of a socket that listens.
const (
	netLocal  = 1
	netState  = 3
	netInode  = 9
	tcpListen = "0A"
)

// findSocket returns the inode of the socket with a local port in a table such as
// /proc/net/tcp, "" if there is none. One that listens is preferred to connections
// from that port, which keep it taken as well.
func findSocket(table io.Reader, port int) (inode string) {
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) <= netInode {
			continue
		}
		_, hex, _ := strings.Cut(fields[netLocal], ":")
		n, err := strconv.ParseUint(hex, 16, 16)
		if err != nil || int(n) != port || fields[netInode] == "0" {
			continue
		}
		inode = fields[netInode]
		if fields[netState] == tcpListen {
			return inode
		}
	}
	return inode
}

// socketOwner returns the PID of a process that holds a socket, 0 if none can be seen.
func socketOwner(inode string) int {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is well formed
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && target == "socket:["+inode+"]" {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2]) // digits, by the pattern
			return pid
		}
	}
	return 0
}

// commandShown is how much of a command line is shown.
const commandShown = 300

// commandOf returns a process's command line, shortened.
func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	line := strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
	if err != nil || line == "" {
		return "of unknown command"
	}
	if len(line) > commandShown {
		line = strings.ToValidUTF8(line[:commandShown], "") + "…"
	}
	return line
}
