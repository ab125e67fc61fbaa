package quorum

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// throughProxy returns both ends of a connection through a proxy.
func throughProxy(t *testing.T, delay time.Duration) (near, far *net.TCPConn) {
	t.Helper()
	target, in := listen(t), listen(t)
	p := &proxy{listener: in, target: target.Addr().String(), far: func(net.Conn) (time.Duration, error) { return delay, nil }}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { p.run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	a, err := net.Dial("tcp", in.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := target.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestEveryByteIsLateAndInOrder(t *testing.T) {
	for _, delay := range []time.Duration{0, 50 * time.Millisecond} {
		near, far := throughProxy(t, delay)
		for _, way := range []struct{ from, to *net.TCPConn }{{near, far}, {far, near}} {
			var sent []byte
			began := time.Now()
			for i := range 200 {
				part := bytes.Repeat([]byte{byte(i)}, 1+i*i)
				sent = append(sent, part...)
				if _, err := way.from.Write(part); err != nil {
					t.Fatal(err)
				}
			}
			if err := way.from.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			first := make([]byte, 1)
			if _, err := io.ReadFull(way.to, first); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took < delay {
				t.Errorf("the first byte took %v, want at least %v", took, delay)
			}
			rest, err := io.ReadAll(way.to)
			if err != nil || !bytes.Equal(append(first, rest...), sent) {
				t.Errorf("delay %v: %d bytes arrived of %d, %v", delay, 1+len(rest), len(sent), err)
			}
		}
	}
}

// What is sent while something is under way does not wait for that: 500 messages are there
// long before the 100 seconds that they would take one after the other.
func TestALongLineHoldsMuchAtOnce(t *testing.T) {
	const messages, delay = 500, 200 * time.Millisecond
	near, far := throughProxy(t, delay)
	began := time.Now()
	go func() {
		for range messages {
			near.Write([]byte{1})
			time.Sleep(time.Millisecond)
		}
	}()
	if _, err := io.ReadFull(far, make([]byte, messages)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > messages*delay/2 {
		t.Errorf("%d messages took %v", messages, took)
	}
}

func TestAnEndThatBreaksEndsTheOther(t *testing.T) {
	near, far := throughProxy(t, time.Millisecond)
	if err := near.SetLinger(0); err != nil { // a reset
		t.Fatal(err)
	}
	near.Close()
	if n, err := far.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes came of nothing", n)
	}
}

func TestTheCallerIsFound(t *testing.T) {
	l := listen(t)
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if pid, err := callerOf(far, []int{os.Getppid(), os.Getpid()}); pid != os.Getpid() {
		t.Errorf("process %d, %v", pid, err)
	}
	if pid, err := callerOf(far, []int{os.Getppid()}); err == nil {
		t.Errorf("process %d", pid)
	}
}

func TestInodeOf(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0 20 4 30 10 -1
   2: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0 20 4 30 10 -1
`
	for _, c := range []struct {
		from, to int
		want     string
	}{{50000, 8080, "13"}, {8080, 50000, "12"}, {8080, 8081, ""}} {
		if got := inodeOf(table, c.from, c.to); got != c.want {
			t.Errorf("from %d to %d: %q, want %q", c.from, c.to, got, c.want)
		}
	}
}
