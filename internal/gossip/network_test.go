package gossip

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// network carries packets and streams between hosts in memory. It drops packets
// that find no room, as UDP does. Hosts reach those of their own side only.
type network struct {
	mu    sync.Mutex
	hosts map[string]*host
	side  map[string]int
	sent  int // packets
}

func newNetwork() *network {
	return &network{hosts: map[string]*host{}, side: map[string]int{}}
}

// host is a memberlist.Transport.
type host struct {
	net     *network
	at      *net.UDPAddr
	packets chan *memberlist.Packet
	streams chan net.Conn
	once    sync.Once
	down    chan struct{}
}

// listen replaces whoever was at an address.
func (n *network) listen(at string) *host {
	addr, err := net.ResolveUDPAddr("udp", at)
	if err != nil {
		panic(err)
	}
	h := &host{net: n, at: addr, packets: make(chan *memberlist.Packet, 64), streams: make(chan net.Conn), down: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[at] = h
	return h
}

// move gives a host another address: nobody is at the old one any more.
func (n *network) move(from, to string) {
	addr, err := net.ResolveUDPAddr("udp", to)
	if err != nil {
		panic(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.hosts[from]
	delete(n.hosts, from)
	h.at = addr
	n.hosts[to] = h
}

// split moves hosts to another side; streams that are under way go on.
func (n *network) split(side int, at ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range at {
		n.side[a] = side
	}
}

// packets returns how many packets have been sent.
func (n *network) packets() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent
}

func (h *host) here() *net.UDPAddr {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	return h.at
}

// reach returns the host at an address, or nil when it cannot be reached.
func (h *host) reach(addr string) *host {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	to := h.net.hosts[addr]
	if to == nil || h.net.side[addr] != h.net.side[h.at.String()] {
		return nil
	}
	select {
	case <-to.down:
		return nil
	default:
		return to
	}
}

func (h *host) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	at := h.here()
	return at.IP.To4(), at.Port, nil
}

func (h *host) WriteTo(b []byte, addr string) (time.Time, error) {
	now := time.Now()
	h.net.mu.Lock()
	h.net.sent++
	h.net.mu.Unlock()
	if to := h.reach(addr); to != nil {
		select {
		case to.packets <- &memberlist.Packet{Buf: b, From: h.here(), Timestamp: now}:
		default:
		}
	}
	return now, nil
}

func (h *host) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if to := h.reach(addr); to != nil {
		ours, theirs := net.Pipe()
		select {
		case to.streams <- theirs:
			return ours, nil
		case <-to.down:
		case <-time.After(timeout):
		}
		ours.Close()
		theirs.Close()
	}
	return nil, errors.New("no route to host")
}

func (h *host) PacketCh() <-chan *memberlist.Packet { return h.packets }

func (h *host) StreamCh() <-chan net.Conn { return h.streams }

func (h *host) Shutdown() error {
	h.once.Do(func() { close(h.down) })
	return nil
}
