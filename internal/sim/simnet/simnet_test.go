package simnet_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/internal/sim/simnet"
)

func connect(t *testing.T, n *simnet.Network) (a, b net.Conn) {
	t.Helper()
	l, err := n.Listen("b:1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = n.Dial(t.Context(), "a", "b:1"); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestBytesArriveInOrderAndLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := simnet.New(1)
		n.SetLatency(func(string, string) (time.Duration, time.Duration) { return time.Millisecond, 5 * time.Millisecond })
		a, b := connect(t, n)
		want := bytes.Repeat([]byte("0123456789"), 100_000) // more than the window
		go func() {
			for rest := want; len(rest) > 0; rest = rest[10_000:] {
				if _, err := a.Write(rest[:10_000]); err != nil {
					t.Error(err)
				}
			}
			a.Close()
		}()
		start := time.Now()
		got, err := io.ReadAll(b)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, error %v", len(got), err)
		}
		if time.Since(start) < time.Millisecond {
			t.Error("no latency")
		}
		b.Close()
	})
}

func TestCutStallsAndHealDelivers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := simnet.New(1)
		a, b := connect(t, n)
		n.Cut("a", "b")
		if _, err := a.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		b.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("error = %v", err)
		}
		// The other direction is open.
		if _, err := b.Write([]byte("y")); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Dial(ctx, "a", "b:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("dial over a cut: %v", err)
		}
		n.Heal("a", "b")
		b.SetReadDeadline(time.Time{})
		if _, err := b.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		a.Close()
		b.Close()
	})
}

func TestCrashResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := simnet.New(1)
		a, b := connect(t, n)
		n.Crash("b")
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, simnet.ErrReset) {
			t.Fatalf("error = %v", err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, simnet.ErrReset) {
			t.Fatalf("error = %v", err)
		}
		if _, err := n.Dial(t.Context(), "a", "b:1"); !errors.Is(err, simnet.ErrRefused) {
			t.Fatalf("error = %v", err)
		}
		a.Close()
	})
}

func TestPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := simnet.New(1)
		a, err := n.ListenPacket("a:1")
		if err != nil {
			t.Fatal(err)
		}
		b, err := n.ListenPacket("b:1")
		if err != nil {
			t.Fatal(err)
		}
		a.Send("b:1", []byte("x"))
		if p := <-b.Packets(); p.From != "a:1" || string(p.Data) != "x" {
			t.Fatalf("packet %+v", p)
		}
		n.Cut("a", "b")
		a.Send("b:1", []byte("lost"))
		a.Send("nobody:1", []byte("lost"))
		time.Sleep(time.Second)
		if len(b.Packets()) != 0 {
			t.Error("a packet crossed a cut")
		}
		a.Close()
		b.Close()
		if err := a.Send("b:1", nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error = %v", err)
		}
	})
}
