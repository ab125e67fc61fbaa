package devcluster

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestParseStat(t *testing.T) {
	const rest = " 1 5 5 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 9 0 8812345 0 0"
	for _, test := range []struct {
		in   string
		want stat
		bad  bool
	}{
		{in: "5 (kvnode) S" + rest, want: stat{'S', 9, 8812345}},
		{in: "5 (a) b (c) T" + rest, want: stat{'T', 9, 8812345}},
		{in: "5 (kvnode) T", bad: true},
		{in: "5 kvnode S" + rest, bad: true},
		{in: "5 (kvnode) S" + strings.Replace(rest, " 9 ", " x ", 1), bad: true},
		{in: "5 (kvnode) S" + strings.Replace(rest, "8812345", "x", 1), bad: true},
		{in: "", bad: true},
	} {
		got, err := parseStat([]byte(test.in))
		if got != test.want || (err != nil) != test.bad {
			t.Errorf("%q: got %+v, %v", test.in, got, err)
		}
	}
}

func TestStatEnded(t *testing.T) {
	for _, test := range []struct {
		stat
		want bool
	}{
		{stat{letter: 'S', threads: 1}, false},
		{stat{letter: 'Z', threads: 1}, true},
		{stat{letter: 'X', threads: 0}, true},
		// Other threads are still about to end, and hold the ports.
		{stat{letter: 'Z', threads: 2}, false},
	} {
		if got := test.ended(); got != test.want {
			t.Errorf("%c with %d threads: got %v", test.letter, test.threads, got)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("5 (a) b) S 1 5 5 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 8812345 0 0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := parseStat(b); err != nil && got != (stat{}) {
			t.Errorf("got %+v with error %v", got, err)
		}
	})
}

// stranger starts a process that is none of a cluster's.
func stranger(t *testing.T) *process {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Skipf("no sleep to start: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	p := &process{PID: cmd.Process.Pid}
	st, err := readStat(p.PID)
	if err != nil {
		t.Fatal(err)
	}
	p.StartTicks = st.startTicks
	if p.Executable, err = executableOf(p.PID); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNoSignalToAReusedPID(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*process)
	}{
		{"other start time", func(p *process) { p.StartTicks-- }},
		{"other executable", func(p *process) { p.Executable += "-not" }},
		{"no process", func(p *process) { p.PID = 0 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			real := stranger(t)
			p := *real
			test.change(&p)
			if got := p.state(); got != Stopped {
				t.Errorf("state %s, want stopped", got)
			}
			for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGTERM, syscall.SIGKILL} {
				if err := p.signal(sig); err != errNotRunning {
					t.Errorf("%s: got %v, want errNotRunning", sig, err)
				}
			}
			if got := real.state(); got != Running {
				t.Errorf("the other process is %s", got)
			}
		})
	}
}

func TestZombieIsStopped(t *testing.T) {
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Skipf("no sleep to start: %v", err)
	}
	defer cmd.Wait()
	p := &process{PID: cmd.Process.Pid}
	st, err := readStat(p.PID)
	if err != nil {
		t.Fatal(err)
	}
	p.StartTicks = st.startTicks
	if p.Executable, err = executableOf(p.PID); err != nil {
		t.Fatal(err)
	}
	if err := p.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the killed process counts as stopped before it is reaped", func() bool { return p.state() == Stopped })
}

func TestDeletedExecutableIsTheSame(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	b, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/kvnode"
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	p := &process{PID: cmd.Process.Pid, Executable: path}
	st, err := readStat(p.PID)
	if err != nil {
		t.Fatal(err)
	}
	p.StartTicks = st.startTicks
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := p.state(); got != Running {
		t.Errorf("state %s after the executable was replaced, want running", got)
	}
}

func TestFindSocket(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1CE8 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 111 1
   1: 0100007F:1CE8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1
   2: 0100007F:1CE9 0100007F:9C40 06 00000000:00000000 00:00000000 00000000     0        0 0 1
   3: 0100007F:1CEA 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 333 1
   4: broken
`
	for port, want := range map[int]string{7400: "222", 7401: "", 7402: "333", 7403: ""} {
		if got := findSocket(strings.NewReader(table), port); got != want {
			t.Errorf("port %d: got inode %q, want %q", port, got, want)
		}
	}
}

func TestBusyPortsAreNamedWithTheirHolder(t *testing.T) {
	tcp, err := net.Listen("tcp", Host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", Host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcpPort, udpPort := tcp.Addr().(*net.TCPAddr).Port, udp.LocalAddr().(*net.UDPAddr).Port
	for _, test := range []struct {
		base int
		want string
	}{
		{tcpPort, fmt.Sprintf("node1 needs port %d/tcp (gRPC): in use by process %d, %s", tcpPort, os.Getpid(), os.Args[0])},
		{udpPort - 2, fmt.Sprintf("node1 needs port %d/udp (gossip): in use by process %d, %s", udpPort, os.Getpid(), os.Args[0])},
	} {
		err := checkPorts([]member{{Name: "node1", Role: RoleData, Port: test.base}})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got error %v, want %q", err, test.want)
		}
	}
}
