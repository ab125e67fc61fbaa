package consensus

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// tcpStreams is a raft.StreamLayer over TCP.
type tcpStreams struct {
	net.Listener
	advertise net.Addr
	tls       *tls.Config
}

// address is a host:port that is kept as it was written: a name may resolve to
// another host tomorrow, and servers compare addresses by their text.
type address string

// Network implements net.Addr.
func (address) Network() string { return "tcp" }

// String implements net.Addr.
func (a address) String() string { return string(a) }

// NewTCPStreamLayer listens on bind, a host:port, and has the others told
// advertise, a host:port at which they reach it. An empty advertise is the address
// that it listens on. With a TLS configuration both sides must show a certificate;
// without one, nil, streams are plain.
func NewTCPStreamLayer(bind, advertise string, config *tls.Config) (raft.StreamLayer, error) {
	listener, err := net.Listen("tcp", bind)
	if err != nil {
		return nil, fmt.Errorf("consensus: cannot listen on %s, choose another address or end the process that holds it: %w", bind, err)
	}
	if advertise == "" {
		advertise = listener.Addr().String()
	}
	host, _, err := net.SplitHostPort(advertise)
	if err != nil {
		listener.Close()
		return nil, fmt.Errorf("consensus: bad advertised address: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		listener.Close()
		return nil, fmt.Errorf("consensus: others cannot reach %s: give an address to advertise", advertise)
	}
	if config != nil {
		listener = tls.NewListener(listener, config)
	}
	return &tcpStreams{listener, address(advertise), config}, nil
}

// Addr implements net.Listener.
func (t *tcpStreams) Addr() net.Addr { return t.advertise }

// Dial implements raft.StreamLayer.
func (t *tcpStreams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	dialer := &net.Dialer{Timeout: timeout}
	if t.tls != nil {
		return tls.DialWithDialer(dialer, "tcp", string(to), t.tls)
	}
	return dialer.Dial("tcp", string(to))
}

// streams knows the open connections of a stream layer, so that they can be cut
// and waited for: the library does neither for those that others opened.
type streams struct {
	raft.StreamLayer
	group string
	// handlers counts accepted connections until the library closes them, which is
	// the last thing it does with one.
	handlers sync.WaitGroup
	mu       struct {
		sync.Mutex
		cut  bool
		open map[*stream]struct{}
	}
}

func newStreams(layer raft.StreamLayer, group string) *streams {
	s := &streams{StreamLayer: layer, group: group}
	s.mu.open = map[*stream]struct{}{}
	return s
}

// stream is a connection that streams knows of.
type stream struct {
	net.Conn
	of       *streams
	accepted bool
	once     sync.Once
	err      error
	// greeted is set once the greeting of an accepted stream has been read. One goroutine
	// reads.
	greeted bool
}

// The greeting of a group that has a name: a byte that begins no call of Raft, the length
// of the name, the name. Servers without a group send none, take this for a call that they
// do not know, and close the stream.
const (
	greetingByte  = 0xF7
	maxGroupBytes = 255
)

func greeting(group string) []byte {
	return append([]byte{greetingByte, byte(len(group))}, group...)
}

var errStranger = errors.New("consensus: the stream is of another group of servers")

// Read implements net.Conn. Of an accepted stream nothing is handed on before its greeting.
func (c *stream) Read(p []byte) (int, error) {
	if c.accepted && !c.greeted && c.of.group != "" {
		want := greeting(c.of.group)
		got := make([]byte, len(want))
		if n, err := io.ReadFull(c.Conn, got); !bytes.Equal(got[:n], want[:n]) {
			return 0, errStranger
		} else if err != nil {
			return 0, err
		}
		c.greeted = true
	}
	return c.Conn.Read(p)
}

// Close implements net.Conn.
func (c *stream) Close() error {
	c.once.Do(func() {
		c.of.mu.Lock()
		delete(c.of.mu.open, c)
		c.of.mu.Unlock()
		c.err = c.Conn.Close()
		if c.accepted {
			c.of.handlers.Done()
		}
	})
	return c.err
}

// track takes a connection in, or closes it when the streams are cut.
func (s *streams) track(conn net.Conn, accepted bool) (net.Conn, bool) {
	c := &stream{Conn: conn, of: s, accepted: accepted}
	s.mu.Lock()
	cut := s.mu.cut
	if !cut {
		s.mu.open[c] = struct{}{}
		if accepted {
			s.handlers.Add(1)
		}
	}
	s.mu.Unlock()
	if cut {
		conn.Close()
	}
	return c, !cut
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	for {
		conn, err := s.StreamLayer.Accept()
		if err != nil {
			return nil, err
		}
		if c, ok := s.track(conn, true); ok {
			return c, nil
		}
	}
}

// Dial implements raft.StreamLayer.
func (s *streams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	s.mu.Lock()
	cut := s.mu.cut
	s.mu.Unlock()
	if cut {
		return nil, ErrClosed
	}
	conn, err := s.StreamLayer.Dial(to, timeout)
	if err != nil {
		return nil, err
	}
	c, ok := s.track(conn, false)
	if !ok {
		return nil, ErrClosed
	}
	if s.group != "" {
		err := c.SetWriteDeadline(time.Now().Add(timeout))
		if err == nil {
			_, err = c.Write(greeting(s.group))
		}
		if err = errors.Join(err, c.SetWriteDeadline(time.Time{})); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

// cut breaks every connection and lets no new one come about.
func (s *streams) cut() {
	s.mu.Lock()
	s.mu.cut = true
	open := make([]*stream, 0, len(s.mu.open))
	for c := range s.mu.open {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.Conn.Close()
	}
}
