package storage

import "sync/atomic"

// gate lets somebody who changed what applies go by wait until the last apply that
// may not have seen the change has ended. Applies never wait for it.
type gate struct {
	current atomic.Pointer[generation]
	// turn holds a token while nobody waits: a second one must not overtake the first,
	// whose applies it has to wait for too.
	turn chan struct{}
}

// generation is the applies that began between two waits. The gate itself is one of
// its users until it is retired; at zero it takes no more.
type generation struct {
	users atomic.Int64
	empty chan struct{}
}

func newGeneration() *generation {
	g := &generation{empty: make(chan struct{})}
	g.users.Store(1)
	return g
}

func (g *gate) init() {
	g.current.Store(newGeneration())
	g.turn = make(chan struct{}, 1)
	g.turn <- struct{}{}
}

// enter begins an apply. The caller must call leave.
func (g *gate) enter() *generation {
	for {
		l := g.current.Load()
		for n := l.users.Load(); n > 0; n = l.users.Load() {
			if l.users.CompareAndSwap(n, n+1) {
				return l
			}
		}
	}
}

func (l *generation) leave() {
	if l.users.Add(-1) == 0 {
		close(l.empty)
	}
}

// wait returns when every apply that entered before has left.
func (g *gate) wait() {
	<-g.turn
	old := g.current.Swap(newGeneration())
	old.leave()
	<-old.empty
	g.turn <- struct{}{}
}
