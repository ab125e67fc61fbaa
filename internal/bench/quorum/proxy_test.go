package quorum

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"time"
)

// proxy passes connections on to a target as a long line does: every byte arrives late by
// the same time, in order, and as many at once as were sent. Only connecting takes no time.
type proxy struct {
	listener net.Listener
	target   string
	// far is how long what a connection brings is under way, each way. A connection for
	// which there is no saying is closed.
	far func(net.Conn) (time.Duration, error)
}

// run passes connections on until ctx ends.
func (p *proxy) run(ctx context.Context) {
	var passing sync.WaitGroup
	defer passing.Wait()
	defer context.AfterFunc(ctx, func() { p.listener.Close() })()
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		passing.Go(func() { p.pass(ctx, in) })
	}
}

func (p *proxy) pass(ctx context.Context, in net.Conn) {
	defer in.Close()
	delay, err := p.far(in)
	if err != nil {
		return
	}
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() { in.Close(); out.Close() })()
	var ways sync.WaitGroup
	ways.Go(func() { carry(out.(*net.TCPConn), in.(*net.TCPConn), delay) })
	ways.Go(func() { carry(in.(*net.TCPConn), out.(*net.TCPConn), delay) })
	ways.Wait()
}

// chunk is bytes that are due at a time.
type chunk struct {
	due   time.Time
	bytes []byte
}

// A direction carries maxChunks at once; when it is full, nothing more is read.
const (
	maxChunks  = 4096
	chunkBytes = 64 << 10
)

// carry passes on what is read, and in the end that there is no more.
func carry(to, from *net.TCPConn, delay time.Duration) {
	defer to.CloseWrite()
	if delay == 0 {
		io.Copy(to, from) // in the kernel
		return
	}
	chunks := make(chan chunk, maxChunks)
	go func() { // ends when nothing more can be read
		defer close(chunks)
		buf := make([]byte, chunkBytes)
		for {
			n, err := from.Read(buf)
			chunks <- chunk{time.Now().Add(delay), bytes.Clone(buf[:n])} // the last is empty: the end is late, too
			if err != nil {
				return
			}
		}
	}()
	for c := range chunks {
		time.Sleep(time.Until(c.due))
		if _, err := to.Write(c.bytes); err != nil {
			from.Close() // and what is under way is lost
		}
	}
}
