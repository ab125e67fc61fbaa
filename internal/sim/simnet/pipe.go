package simnet

import (
	"io"
	"os"
	"sync"
	"time"
)

// pipe is one direction of a connection: chunks with the time they arrive.
type pipe struct {
	net      *Network
	from, to string
	id       uint64
	mu       struct {
		sync.Mutex
		chunks []chunk
		bytes  int
		sent   uint64
		last   time.Time // arrival of the newest chunk; order is kept
		closed bool
		err    error // nil for an orderly end
		// changed is closed and replaced at every change.
		changed chan struct{}
	}
}

type chunk struct {
	at   time.Time
	data []byte
}

func (n *Network) newPipe(from, to string, id uint64) *pipe {
	p := &pipe{net: n, from: from, to: to, id: id}
	p.mu.changed = make(chan struct{})
	return p
}

func (p *pipe) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.signal()
}

// signal tells waiters to look again.
// REQUIRES: p.mu is held.
func (p *pipe) signal() {
	close(p.mu.changed)
	p.mu.changed = make(chan struct{})
}

func (p *pipe) close(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.closed && (p.mu.err != nil || err == nil) {
		return
	}
	p.mu.closed, p.mu.err = true, err
	if err != nil {
		p.mu.chunks, p.mu.bytes = nil, 0
	}
	p.signal()
}

func (p *pipe) write(b []byte, d *deadline) (int, error) {
	for {
		p.mu.Lock()
		if p.mu.closed {
			err := p.mu.err
			p.mu.Unlock()
			if err == nil {
				err = io.ErrClosedPipe
			}
			return 0, err
		}
		if p.mu.bytes < windowBytes {
			break
		}
		changed := p.mu.changed
		p.mu.Unlock()
		if err := wait(changed, time.Time{}, d); err != nil {
			return 0, err
		}
	}
	p.mu.sent++
	sent := p.mu.sent
	p.mu.Unlock()
	delay := p.net.delay(p.from, p.to, p.id, sent)
	p.mu.Lock()
	defer p.mu.Unlock()
	at := time.Now().Add(delay)
	if at.Before(p.mu.last) {
		at = p.mu.last
	}
	p.mu.last = at
	p.mu.chunks = append(p.mu.chunks, chunk{at, append([]byte(nil), b...)})
	p.mu.bytes += len(b)
	p.signal()
	return len(b), nil
}

func (p *pipe) read(b []byte, d *deadline) (int, error) {
	for {
		cut := p.net.isCut(p.from, p.to)
		p.mu.Lock()
		if err := p.mu.err; err != nil {
			p.mu.Unlock()
			return 0, err
		}
		var until time.Time
		if len(p.mu.chunks) > 0 && !cut {
			first := &p.mu.chunks[0]
			if !time.Now().Before(first.at) {
				n := copy(b, first.data)
				first.data = first.data[n:]
				if len(first.data) == 0 {
					p.mu.chunks = p.mu.chunks[1:]
				}
				p.mu.bytes -= n
				p.signal()
				p.mu.Unlock()
				return n, nil
			}
			until = first.at
		} else if len(p.mu.chunks) == 0 && p.mu.closed {
			p.mu.Unlock()
			return 0, io.EOF
		}
		changed := p.mu.changed
		p.mu.Unlock()
		if err := wait(changed, until, d); err != nil {
			return 0, err
		}
	}
}

// wait returns when something changed, when until has come (unless it is zero), or
// with an error when the deadline has.
func wait(changed <-chan struct{}, until time.Time, d *deadline) error {
	now := time.Now()
	at := d.get()
	if !at.IsZero() && !now.Before(at) {
		return os.ErrDeadlineExceeded
	}
	var timer <-chan time.Time
	next := until
	if next.IsZero() || !at.IsZero() && at.Before(next) {
		next = at
	}
	if !next.IsZero() {
		t := time.NewTimer(next.Sub(now))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-changed:
	case <-timer:
	}
	return nil
}
