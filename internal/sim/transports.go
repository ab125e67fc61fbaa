package sim

import (
	"context"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/raft"

	"github.com/kvasirdb/kvasir/internal/sim/simnet"
)

// gossipTransport is a memberlist.Transport on the simulated network.
type gossipTransport struct {
	instance *instance
	bind     *net.UDPAddr
	packets  *simnet.PacketConn
	listen   net.Listener
	in       chan *memberlist.Packet
	streams  chan net.Conn
	stopped  sync.WaitGroup
}

func newGossipTransport(in *instance, bind string) (memberlist.Transport, error) {
	host, port, err := net.SplitHostPort(bind)
	if err != nil {
		return nil, err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return nil, err
	}
	t := &gossipTransport{
		instance: in, bind: &net.UDPAddr{IP: net.ParseIP(host), Port: number},
		in: make(chan *memberlist.Packet, 256), streams: make(chan net.Conn, 16),
	}
	if t.packets, err = in.p.w.Net.ListenPacket(bind); err != nil {
		return nil, err
	}
	if t.listen, err = in.listen(bind); err != nil {
		t.packets.Close()
		return nil, err
	}
	t.stopped.Go(t.receive)
	t.stopped.Go(t.accept)
	return t, nil
}

func (t *gossipTransport) receive() {
	for {
		select {
		case <-t.packets.Done():
			return
		case p := <-t.packets.Packets():
			from, err := net.ResolveUDPAddr("udp", p.From)
			if err != nil {
				continue
			}
			if t.deafTo(p.From) {
				continue
			}
			select {
			case t.in <- &memberlist.Packet{Buf: p.Data, From: from, Timestamp: p.At}:
			default: // as a full socket buffer drops it
			}
		}
	}
}

func (t *gossipTransport) accept() {
	for {
		c, err := t.listen.Accept()
		if err != nil {
			return
		}
		if t.deafTo(c.RemoteAddr().String()) {
			c.Close()
			continue
		}
		select {
		case t.streams <- c:
		case <-t.packets.Done():
			c.Close()
			return
		}
	}
}

func (t *gossipTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.bind.IP.To4(), t.bind.Port, nil
}

func (t *gossipTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	if t.deafTo(addr) {
		return time.Now(), nil
	}
	return time.Now(), t.packets.Send(addr, b)
}

func (t *gossipTransport) PacketCh() <-chan *memberlist.Packet { return t.in }
func (t *gossipTransport) StreamCh() <-chan net.Conn           { return t.streams }

func (t *gossipTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if t.deafTo(addr) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return t.instance.dial(ctx, addr)
}

// deafTo reports whether gossip with an address is lost.
func (t *gossipTransport) deafTo(address string) bool {
	deaf := t.instance.p.deafTo.Load()
	host, _, _ := net.SplitHostPort(address)
	return deaf != nil && (*deaf)(host)
}

func (t *gossipTransport) Shutdown() error {
	t.packets.Close()
	t.listen.Close()
	t.stopped.Wait()
	return nil
}

// raftStreams is a raft.StreamLayer on the simulated network.
type raftStreams struct {
	net.Listener
	in *instance
}

func newRaftStreams(in *instance, bind string) (raft.StreamLayer, error) {
	l, err := in.listen(bind)
	if err != nil {
		return nil, err
	}
	return raftStreams{l, in}, nil
}

func (s raftStreams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return s.in.dial(ctx, string(to))
}
