package consensus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
)

// network carries streams between servers in memory. A server that is cut off loses
// its connections and gets no new ones.
type network struct {
	mu        sync.Mutex
	listeners map[string]*memListener
	conns     map[*memConn]bool
	cut       map[string]bool
}

func newNetwork() *network {
	return &network{listeners: map[string]*memListener{}, conns: map[*memConn]bool{}, cut: map[string]bool{}}
}

// memListener is a raft.StreamLayer.
type memListener struct {
	net    *network
	at     address
	accept chan net.Conn
	once   sync.Once
	closed chan struct{}
}

type memConn struct {
	net.Conn
	net      *network
	from, to string
}

func (n *network) listen(at string) *memListener {
	l := &memListener{net: n, at: address(at), accept: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[at] = l
	return l
}

func (l *memListener) Addr() net.Addr { return l.at }

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *memListener) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ours, theirs := net.Pipe()
	a := &memConn{ours, l.net, l.at.String(), string(to)}
	b := &memConn{theirs, l.net, l.at.String(), string(to)}
	l.net.mu.Lock()
	peer := l.net.listeners[string(to)]
	up := peer != nil && !l.net.cut[string(to)] && !l.net.cut[l.at.String()]
	if up {
		l.net.conns[a], l.net.conns[b] = true, true
	}
	l.net.mu.Unlock()
	if up {
		select {
		case peer.accept <- b:
			return a, nil
		case <-peer.closed:
		case <-time.After(timeout):
		}
	}
	a.Close()
	b.Close()
	return nil, errors.New("connection refused")
}

func (c *memConn) Close() error {
	c.net.mu.Lock()
	delete(c.net.conns, c)
	c.net.mu.Unlock()
	return c.Conn.Close()
}

func (n *network) setCut(at string, cut bool) {
	n.mu.Lock()
	n.cut[at] = cut
	var broken []*memConn
	for c := range n.conns {
		if cut && (c.from == at || c.to == at) {
			broken = append(broken, c)
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		c.Close()
	}
}

// ledger is a state machine that remembers its commands.
type ledger struct {
	mu       sync.Mutex
	commands []string
	last     uint64
	restored int
}

func (l *ledger) Apply(index uint64, command []byte) any {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index <= l.last {
		panic(fmt.Sprintf("index %d after %d", index, l.last))
	}
	l.last = index
	l.commands = append(l.commands, string(command))
	return "did " + string(command)
}

func (l *ledger) Snapshot() ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Appendf(nil, "%d\n%s", l.last, strings.Join(l.commands, "\n")), nil
}

func (l *ledger) Restore(snapshot []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	head, rest, ok := strings.Cut(string(snapshot), "\n")
	if !ok {
		return errors.New("bad snapshot")
	}
	if l.restored++; l.restored > 100 {
		panic("a snapshot is installed over and over")
	}
	l.commands = strings.Split(rest, "\n")
	_, err := fmt.Sscan(head, &l.last)
	return err
}

func (l *ledger) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.commands)
}

// member is a server of a cluster. Its file system outlives its crashes.
type member struct {
	fs *vfs.MemFS
	sm *ledger
	r  *Raft
}

// cluster is driven by one goroutine; only server may be called by others.
type cluster struct {
	t       *testing.T
	net     *network
	rng     *rand.Rand
	config  Config
	members map[string]*member
	mu      sync.Mutex // guards the field r of the members
}

var clusterServers = []Server{{"a", "a:1"}, {"b", "b:1"}, {"c", "c:1"}}

// newCluster starts three servers. It must run in a bubble.
func newCluster(t *testing.T, seed uint64, config Config) *cluster {
	config.Servers, config.Dir = clusterServers, "raft"
	config.Fatal = func(err error) { panic(err) }
	c := &cluster{t: t, net: newNetwork(), rng: rand.New(rand.NewPCG(seed, 0)), config: config, members: map[string]*member{}}
	for _, s := range clusterServers {
		c.members[s.Name] = &member{fs: vfs.NewCrashableMem()}
		c.start(s.Name)
	}
	return c
}

func (c *cluster) address(name string) string {
	i := slices.IndexFunc(c.config.Servers, func(s Server) bool { return s.Name == name })
	return c.config.Servers[i].Address
}

// server returns a running server, or nil.
func (c *cluster) server(name string) *Raft {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.members[name].r
}

func (c *cluster) setServer(name string, r *Raft) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.members[name].r = r
}

func (c *cluster) start(name string) {
	c.t.Helper()
	m := c.members[name]
	cfg := c.config
	cfg.Name, cfg.FS, cfg.Streams = name, m.fs, c.net.listen(c.address(name))
	m.sm = &ledger{}
	r, err := Open(cfg, m.sm)
	if err != nil {
		c.t.Fatalf("open %s: %v", name, err)
	}
	c.setServer(name, r)
}

// crash ends a server at once; of what it did not sync, half is lost.
func (c *cluster) crash(name string) {
	c.t.Helper()
	m := c.members[name]
	c.net.setCut(c.address(name), true)
	after := m.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: c.rng})
	r := m.r
	c.setServer(name, nil)
	if err := r.Close(); err != nil {
		c.t.Errorf("close %s: %v", name, err)
	}
	c.net.setCut(c.address(name), false)
	m.fs = after
}

// stop ends every server and lets what is left of them run out.
func (c *cluster) stop() {
	for name, m := range c.members {
		if m.r != nil {
			if err := m.r.Close(); err != nil {
				c.t.Errorf("close %s: %v", name, err)
			}
		}
	}
	time.Sleep(time.Minute)
}

// leader waits for a server that leads by the word of a majority.
func (c *cluster) leader() string {
	c.t.Helper()
	for range 1000 {
		for name, m := range c.members {
			if m.r != nil && m.r.IsLeader() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				err := m.r.VerifyLeader(ctx)
				cancel()
				if err == nil {
					return name
				}
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatal("no leader")
	return ""
}

func (c *cluster) propose(command string) error {
	r := c.members[c.leader()].r
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	got, err := r.Propose(ctx, []byte(command))
	if err == nil && got != "did "+command {
		c.t.Errorf("Propose(%s) = %v", command, got)
	}
	return err
}

func (c *cluster) mustPropose(from, to int) {
	c.t.Helper()
	for i := from; i <= to; i++ {
		if err := c.propose(fmt.Sprint(i)); err != nil {
			c.t.Fatalf("proposing %d: %v", i, err)
		}
	}
}

// waitEqual waits until every running server has the same commands, and returns them.
func (c *cluster) waitEqual() []string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	lead := c.members[c.leader()]
	if err := lead.r.Barrier(ctx); err != nil {
		c.t.Fatalf("barrier: %v", err)
	}
	want := lead.sm.all()
	for name, m := range c.members {
		for i := 0; m.r != nil && !slices.Equal(m.sm.all(), want); i++ {
			if i == 1000 {
				c.t.Fatalf("server %s has %v, the leader has %v", name, m.sm.all(), want)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return want
}

func numbers(from, to int) []string {
	var out []string
	for i := from; i <= to; i++ {
		out = append(out, fmt.Sprint(i))
	}
	return out
}
