package simnet

import (
	"fmt"
	"net"
	"sync"
	"time"
)

// Packet is a datagram as it was received.
type Packet struct {
	From string
	Data []byte
	At   time.Time
}

// PacketConn sends and receives datagrams; what finds no room is dropped.
type PacketConn struct {
	net     *Network
	address string
	in      chan Packet
	once    sync.Once
	done    chan struct{}
	mu      sync.Mutex
	sent    uint64
}

// ListenPacket binds host:port for datagrams.
func (n *Network) ListenPacket(address string) (*PacketConn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.packets[address] != nil {
		return nil, fmt.Errorf("listen %s: address already in use", address)
	}
	p := &PacketConn{net: n, address: address, in: make(chan Packet, 1024), done: make(chan struct{})}
	n.mu.packets[address] = p
	return p, nil
}

// Send sends a datagram; nobody learns whether it arrives.
func (p *PacketConn) Send(to string, data []byte) error {
	select {
	case <-p.done:
		return net.ErrClosed
	default:
	}
	from := hostOf(p.address)
	if p.net.isCut(from, hostOf(to)) {
		return nil
	}
	p.mu.Lock()
	p.sent++
	sent := p.sent
	p.mu.Unlock()
	if p.net.lost(from, hostOf(to), sent) {
		return nil
	}
	packet := Packet{From: p.address, Data: append([]byte(nil), data...)}
	time.AfterFunc(p.net.delay(from, hostOf(to), 1<<40, sent), func() {
		p.net.mu.Lock()
		target := p.net.mu.packets[to]
		p.net.mu.Unlock()
		if target == nil || p.net.isCut(from, hostOf(to)) {
			return
		}
		packet.At = time.Now()
		select {
		case target.in <- packet:
		case <-target.done:
		default:
		}
	})
	return nil
}

// Packets returns the channel of received datagrams.
func (p *PacketConn) Packets() <-chan Packet { return p.in }

// Done is closed by Close.
func (p *PacketConn) Done() <-chan struct{} { return p.done }

// Close unbinds the address.
func (p *PacketConn) Close() error {
	p.once.Do(func() {
		p.net.mu.Lock()
		if p.net.mu.packets[p.address] == p {
			delete(p.net.mu.packets, p.address)
		}
		p.net.mu.Unlock()
		close(p.done)
	})
	return nil
}
