// Package simnet is a network in memory for tests: hosts with names, listeners,
// connections with latency, cuts in one or both directions, resets, loss of datagrams,
// hosts that freeze, and crashes. It uses
// no timer but time's own, so that it runs in a synctest bubble on virtual time.
package simnet

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"
)

// Errors of connections.
var (
	ErrRefused error = syscall.ECONNREFUSED
	ErrReset         = errors.New("connection reset")
)

// windowBytes is how much a connection holds on its way in one direction before
// its writer has to wait.
const windowBytes = 256 << 10

// Network connects hosts. It is safe for concurrent use.
type Network struct {
	seed uint64
	mu   struct {
		sync.Mutex
		listeners map[string]*listener // by address
		packets   map[string]*PacketConn
		conns     map[*conn]struct{}
		cut       map[[2]string]bool // from, to
		frozen    map[string]bool    // by host
		// passable is closed and replaced whenever a cut is healed or a host thaws.
		passable chan struct{}
		latency  func(from, to string) (base, jitter time.Duration)
		loss     float64
		dials    uint64
	}
}

// New returns a network without cuts, with latencies of 50 to 150 µs drawn from
// seed.
func New(seed uint64) *Network {
	n := &Network{seed: seed}
	n.mu.listeners = map[string]*listener{}
	n.mu.packets = map[string]*PacketConn{}
	n.mu.conns = map[*conn]struct{}{}
	n.mu.cut = map[[2]string]bool{}
	n.mu.frozen = map[string]bool{}
	n.mu.passable = make(chan struct{})
	n.mu.latency = func(string, string) (time.Duration, time.Duration) {
		return 50 * time.Microsecond, 100 * time.Microsecond
	}
	return n
}

// SetLatency sets the least latency of each direction and what is added at random.
func (n *Network) SetLatency(f func(from, to string) (base, jitter time.Duration)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mu.latency = f
}

// Cut stops what one host sends to another: bytes wait, packets are lost, dials
// hang until their context ends.
func (n *Network) Cut(from, to string) { n.setCut(from, to, true) }

// Heal undoes Cut.
func (n *Network) Heal(from, to string) { n.setCut(from, to, false) }

func (n *Network) setCut(from, to string, cut bool) {
	n.change(!cut, func() { n.mu.cut[[2]string{from, to}] = cut })
}

// Freeze stops all that a host sends and receives, with clients too: connections
// stay, bytes wait, packets are lost.
func (n *Network) Freeze(host string) { n.change(false, func() { n.mu.frozen[host] = true }) }

// Thaw undoes Freeze.
func (n *Network) Thaw(host string) { n.change(true, func() { delete(n.mu.frozen, host) }) }

// change changes what passes, and lets all that waits look again.
func (n *Network) change(passable bool, f func()) {
	n.mu.Lock()
	f()
	if passable {
		close(n.mu.passable)
		n.mu.passable = make(chan struct{})
	}
	var woken []*pipe
	for c := range n.mu.conns {
		woken = append(woken, c.in, c.out)
	}
	n.mu.Unlock()
	for _, p := range woken {
		p.wake()
	}
}

func (n *Network) isCut(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut(from, to)
}

// REQUIRES: n.mu is held.
func (n *Network) cut(from, to string) bool {
	return n.mu.cut[[2]string{from, to}] || n.mu.frozen[from] || n.mu.frozen[to]
}

// Reaches reports whether two hosts can talk to each other.
func (n *Network) Reaches(a, b string) bool { return n.blocked(a, b) == nil }

// blocked returns nil where a connection can be made, else what is closed when it is
// worth another look.
func (n *Network) blocked(a, b string) <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut(a, b) || n.cut(b, a) {
		return n.mu.passable
	}
	return nil
}

// SetLoss sets the share of datagrams that are lost, 0 to 1.
func (n *Network) SetLoss(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mu.loss = share
}

// lost decides whether the i-th datagram between two hosts is; the same seed loses
// the same ones.
func (n *Network) lost(from, to string, i uint64) bool {
	n.mu.Lock()
	share := n.mu.loss
	n.mu.Unlock()
	return share > 0 && n.stream(from, to, 1<<41, i).Float64() < share
}

// Reset breaks the connections between two hosts, as a middlebox that forgets them.
func (n *Network) Reset(a, b string) {
	n.mu.Lock()
	var conns []*conn
	for c := range n.mu.conns {
		if o := hostOf(string(c.remote)); c.host == a && o == b || c.host == b && o == a {
			conns = append(conns, c)
		}
	}
	n.mu.Unlock()
	for _, c := range conns {
		c.reset()
	}
}

// Crash closes all listeners and resets all connections of a host, as the end of
// its process would.
func (n *Network) Crash(host string) {
	n.mu.Lock()
	var conns []*conn
	for c := range n.mu.conns {
		if c.host == host {
			conns = append(conns, c)
		}
	}
	var ls []*listener
	for addr, l := range n.mu.listeners {
		if hostOf(addr) == host {
			ls = append(ls, l)
		}
	}
	var ps []*PacketConn
	for addr, p := range n.mu.packets {
		if hostOf(addr) == host {
			ps = append(ps, p)
		}
	}
	n.mu.Unlock()
	for _, l := range ls {
		l.Close()
	}
	for _, p := range ps {
		p.Close()
	}
	for _, c := range conns {
		c.reset()
	}
}

func hostOf(address string) string {
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return h
}

// addr is a host:port.
type addr string

func (a addr) Network() string { return "sim" }
func (a addr) String() string  { return string(a) }

// Listen listens on host:port.
func (n *Network) Listen(address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.listeners[address] != nil {
		return nil, fmt.Errorf("listen %s: address already in use", address)
	}
	l := &listener{net: n, address: address, backlog: make(chan net.Conn, 128), done: make(chan struct{})}
	n.mu.listeners[address] = l
	return l, nil
}

type listener struct {
	net     *Network
	address string
	backlog chan net.Conn
	once    sync.Once
	done    chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.backlog:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		if l.net.mu.listeners[l.address] == l {
			delete(l.net.mu.listeners, l.address)
		}
		l.net.mu.Unlock()
		close(l.done)
	})
	return nil
}

func (l *listener) Addr() net.Addr { return addr(l.address) }

// Dial connects a host to an address.
func (n *Network) Dial(ctx context.Context, from, address string) (net.Conn, error) {
	to := hostOf(address)
	for {
		passable := n.blocked(from, to)
		if passable == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("dial %s: %w", address, ctx.Err())
		case <-passable:
		}
	}
	n.mu.Lock()
	l := n.mu.listeners[address]
	n.mu.dials++
	id := n.mu.dials
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: %w", address, ErrRefused)
	}
	local := addr(fmt.Sprintf("%s:%d", from, 40000+id%20000))
	there, back := n.newPipe(from, to, id), n.newPipe(to, from, id)
	near := &conn{net: n, host: from, in: back, out: there, local: local, remote: addr(address)}
	far := &conn{net: n, host: to, in: there, out: back, local: addr(address), remote: local}
	n.mu.Lock()
	n.mu.conns[near] = struct{}{}
	n.mu.conns[far] = struct{}{}
	n.mu.Unlock()
	select {
	case l.backlog <- far:
		return near, nil
	case <-l.done:
	case <-ctx.Done():
	}
	near.reset()
	far.reset()
	return nil, fmt.Errorf("dial %s: %w", address, ErrRefused)
}

// Dialer returns a dial function for one host.
func (n *Network) Dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) { return n.Dial(ctx, from, address) }
}

// conn is one end of a connection.
type conn struct {
	net           *Network
	host          string
	in, out       *pipe
	local, remote addr
	read, write   deadline
}

func (c *conn) Read(b []byte) (int, error)  { return c.in.read(b, &c.read) }
func (c *conn) Write(b []byte) (int, error) { return c.out.write(b, &c.write) }
func (c *conn) LocalAddr() net.Addr         { return c.local }
func (c *conn) RemoteAddr() net.Addr        { return c.remote }

func (c *conn) Close() error {
	c.out.close(nil)          // the other end reads to the end
	c.in.close(net.ErrClosed) // this end reads no more
	c.forget()
	return nil
}

func (c *conn) reset() {
	c.out.close(ErrReset)
	c.in.close(ErrReset)
	c.forget()
}

func (c *conn) forget() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	delete(c.net.mu.conns, c)
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) SetReadDeadline(t time.Time) error  { c.read.set(t); c.in.wake(); return nil }
func (c *conn) SetWriteDeadline(t time.Time) error { c.write.set(t); c.out.wake(); return nil }

type deadline struct {
	mu sync.Mutex
	at time.Time
}

func (d *deadline) set(t time.Time) { d.mu.Lock(); d.at = t; d.mu.Unlock() }
func (d *deadline) get() time.Time  { d.mu.Lock(); defer d.mu.Unlock(); return d.at }

// delay draws the latency of the i-th chunk of a stream or packet between two
// hosts; the same seed gives the same delays whatever else happens.
func (n *Network) delay(from, to string, stream, i uint64) time.Duration {
	n.mu.Lock()
	base, jitter := n.mu.latency(from, to)
	n.mu.Unlock()
	if jitter <= 0 {
		return base
	}
	return base + time.Duration(n.stream(from, to, stream, i).Int64N(int64(jitter)))
}

// stream returns the random numbers of the i-th chunk of a stream between two hosts.
func (n *Network) stream(from, to string, stream, i uint64) *rand.Rand {
	h := fnv.New64a()
	fmt.Fprint(h, from, ">", to)
	return rand.New(rand.NewPCG(n.seed^h.Sum64(), stream<<32^i))
}
