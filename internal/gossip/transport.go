package gossip

import (
	"context"
	"net"
	"time"

	"github.com/hashicorp/memberlist"
)

// transport breaks the streams that this process opened when its context ends, so
// that nothing waits for them any longer. It leaves the ports open: they are the
// process's, and outlast a run of the library.
type transport struct {
	memberlist.Transport
	ctx context.Context
}

// Shutdown implements memberlist.Transport.
func (t *transport) Shutdown() error { return nil }

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if err := t.ctx.Err(); err != nil {
		return nil, ErrClosed
	}
	c, err := t.dial(addr, timeout)
	if err != nil {
		return nil, err
	}
	return stream{c, context.AfterFunc(t.ctx, func() { c.Close() })}, nil
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(to.Addr, timeout)
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *transport) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, to.Addr)
}

func (t *transport) dial(addr string, timeout time.Duration) (net.Conn, error) {
	if _, ok := t.Transport.(*memberlist.NetTransport); ok {
		d := net.Dialer{Timeout: timeout}
		return d.DialContext(t.ctx, "tcp", addr)
	}
	return t.Transport.DialTimeout(addr, timeout)
}

// stream is a connection that is closed when a context ends.
type stream struct {
	net.Conn
	forget func() bool
}

// Close implements net.Conn.
func (s stream) Close() error {
	s.forget()
	return s.Conn.Close()
}
