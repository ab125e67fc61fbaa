// Package gossip says which processes of the cluster are alive, and spreads a few
// bytes about each. It wraps hashicorp/memberlist (SWIM). It is about liveness
// alone: who owns what is the topology's to say, and a process that gossip has not
// heard of is not alive, no more.
package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// ErrClosed is the error of a call after Close.
var ErrClosed = errors.New("gossip: closed")

// streamTimeout bounds a dial, and each exchange over a stream.
const streamTimeout = 5 * time.Second

// spreadTimeout is how long new metadata is given to spread before newer one may
// replace it.
const spreadTimeout = time.Second

// Config says who this process is and how it finds the others. Durations and
// factors left at zero take their defaults, which suit a local network.
type Config struct {
	// Name is unique among the processes of the cluster, as long as others remember
	// it: "n17" for the node of incarnation 17, "o.orch1" for an orchestrator. At most
	// 128 bytes.
	Name string
	// Cluster identifies the cluster, in at most 255 bytes. Processes of another one are
	// never taken for members.
	Cluster string
	// Bind is the host:port to listen on, by UDP and TCP. Port 0 picks one.
	Bind string
	// Advertise is the host:port at which the others reach this process. Port 0 stands
	// for the one that is listened on. Empty is the address that is listened on.
	Advertise string
	// Seeds returns gossip addresses, host:port, of processes that may be members. It is
	// asked again and again, by one goroutine, and must not block; nil is none.
	Seeds func() []string
	// Transport replaces UDP and TCP; Bind and Advertise are not used then. It is given
	// host:port, never names. Start takes it over and shuts it down, also when Start
	// fails.
	Transport memberlist.Transport
	// SecretKey of 16, 24 or 32 bytes encrypts all traffic. Empty is no encryption.
	SecretKey []byte
	// Meta is what is first said about this process.
	Meta Meta
	// Logger is nil for none.
	Logger *slog.Logger

	// ProbeInterval is how often a member, chosen at random, is asked for a sign of
	// life. Default 1 s.
	ProbeInterval time.Duration
	// ProbeTimeout is how long the answer may take before others are asked to try; less
	// than ProbeInterval. Default 500 ms.
	ProbeTimeout time.Duration
	// SuspicionMult is for how many probe intervals, in a cluster of up to 10, a member
	// that does not answer may still object before it counts as dead. Default 4.
	SuspicionMult int
	// GossipInterval is how often news are passed on. Default 200 ms.
	GossipInterval time.Duration
	// RejoinInterval is how often Seeds is asked. Default 5 s.
	RejoinInterval time.Duration
}

func (c Config) withDefaults() Config {
	setDefault(&c.ProbeInterval, time.Second)
	setDefault(&c.ProbeTimeout, c.ProbeInterval/2)
	setDefault(&c.SuspicionMult, 4)
	setDefault(&c.GossipInterval, 200*time.Millisecond)
	setDefault(&c.RejoinInterval, 5*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Seeds == nil {
		c.Seeds = func() []string { return nil }
	}
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports what is wrong with a configuration.
func (c Config) Validate() error {
	if c.Name == "" || len(c.Name) > 128 {
		return fmt.Errorf("gossip: name %q has %d bytes, want 1 to 128", c.Name, len(c.Name))
	}
	if c.Cluster == "" || len(c.Cluster) > memberlist.LabelMaxSize {
		return fmt.Errorf("gossip: cluster %q has %d bytes, want 1 to %d", c.Cluster, len(c.Cluster), memberlist.LabelMaxSize)
	}
	switch len(c.SecretKey) {
	case 0, 16, 24, 32:
	default:
		return fmt.Errorf("gossip: the secret key has %d bytes, want 16, 24 or 32", len(c.SecretKey))
	}
	c = c.withDefaults()
	if c.ProbeInterval < 0 || c.ProbeTimeout < 0 || c.GossipInterval < 0 || c.RejoinInterval < 0 || c.SuspicionMult < 0 {
		return errors.New("gossip: negative interval, timeout or factor")
	}
	if c.ProbeTimeout >= c.ProbeInterval {
		return fmt.Errorf("gossip: probe timeout %v must be less than the probe interval %v", c.ProbeTimeout, c.ProbeInterval)
	}
	return nil
}

// Gossip is this process among the members. Its methods are safe for concurrent use.
type Gossip struct {
	cfg   Config
	table *table
	// conf is the library's configuration at present, run the library with it: it is
	// replaced when the address to advertise changes.
	conf *memberlist.Config
	run  atomic.Pointer[run]
	// ports are shared by all runs.
	ports memberlist.Transport
	// respread asks for new metadata to be spread. It holds one request.
	respread chan struct{}
	// stopping ends the loops, and the streams that they wait for.
	stopping context.Context
	stop     context.CancelFunc
	loops    sync.WaitGroup
	// turn holds one token; who has it may leave or close, and owns left and closed.
	turn         chan struct{}
	left, closed bool
}

// Start listens, and joins the others in the background.
func Start(cfg Config) (*Gossip, error) {
	if err := cfg.Validate(); err != nil {
		if cfg.Transport != nil {
			cfg.Transport.Shutdown()
		}
		return nil, err
	}
	cfg = cfg.withDefaults()
	g := &Gossip{
		cfg:      cfg,
		table:    newTable(cfg.Meta),
		respread: make(chan struct{}, 1),
		turn:     make(chan struct{}, 1),
	}
	g.turn <- struct{}{}
	g.stopping, g.stop = context.WithCancel(context.Background())
	g.conf = cfg.memberlist(g.table)
	g.ports = cfg.Transport
	if g.ports == nil {
		var err error
		if g.ports, err = listen(cfg, g.conf); err != nil {
			g.stop()
			return nil, err
		}
	}
	if err := g.begin(g.conf); err != nil {
		g.stop()
		g.ports.Shutdown()
		return nil, err
	}
	g.loops.Go(g.spread)
	g.loops.Go(g.rejoin)
	return g, nil
}

// memberlist returns the library's configuration, without a transport.
func (c Config) memberlist(t *table) *memberlist.Config {
	conf := memberlist.DefaultLANConfig()
	conf.Name = c.Name
	conf.Label = c.Cluster
	conf.BindPort, conf.AdvertisePort = 0, 0
	conf.ProbeInterval = c.ProbeInterval
	conf.ProbeTimeout = c.ProbeTimeout
	conf.SuspicionMult = c.SuspicionMult
	conf.GossipInterval = c.GossipInterval
	// In a small cluster, news are passed on few times and may miss a member; comparing
	// everything with another one now and then mends that.
	conf.PushPullInterval = 10 * c.ProbeInterval
	conf.TCPTimeout = streamTimeout
	conf.SecretKey = c.SecretKey
	conf.EnableCompression = false
	// A member that is dead may come back at another address at once: a container that
	// was started anew does.
	conf.DeadNodeReclaimTime = time.Nanosecond
	conf.Delegate = t
	conf.Logger = log.New(logWriter{c.Logger}, "", 0)
	return conf
}

// listen opens the UDP and TCP ports and sets the address to advertise.
func listen(cfg Config, conf *memberlist.Config) (*memberlist.NetTransport, error) {
	bind, err := net.ResolveTCPAddr("tcp", cfg.Bind)
	if err != nil {
		return nil, fmt.Errorf("gossip: bad address to listen on: %w", err)
	}
	if bind.IP == nil {
		bind.IP = net.IPv4zero
	}
	if cfg.Advertise == "" && bind.IP.IsUnspecified() {
		return nil, fmt.Errorf("gossip: others cannot reach %s: give an address to advertise", cfg.Bind)
	}
	var advertise *net.TCPAddr
	if cfg.Advertise != "" {
		if advertise, err = net.ResolveTCPAddr("tcp", cfg.Advertise); err != nil {
			return nil, fmt.Errorf("gossip: bad address to advertise: %w", err)
		}
		if advertise.IP == nil || advertise.IP.IsUnspecified() {
			return nil, fmt.Errorf("gossip: others cannot reach %s: give another address to advertise", cfg.Advertise)
		}
	}
	inner, err := openPorts(bind, conf.Logger)
	if err != nil {
		return nil, err
	}
	conf.BindAddr, conf.BindPort = bind.IP.String(), inner.GetAutoBindPort()
	if advertise != nil {
		conf.AdvertiseAddr, conf.AdvertisePort = advertise.IP.String(), advertise.Port
		setDefault(&conf.AdvertisePort, conf.BindPort)
	}
	return inner, nil
}

// openPorts opens a UDP and a TCP port of the same number. A number that was picked
// for one may be taken for the other: then it tries again.
func openPorts(bind *net.TCPAddr, logger *log.Logger) (*memberlist.NetTransport, error) {
	tries := 1
	if bind.Port == 0 {
		tries = 10
	}
	var err error
	for range tries {
		var inner *memberlist.NetTransport
		inner, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{bind.IP.String()},
			BindPort:  bind.Port,
			Logger:    logger,
		})
		if err == nil {
			return inner, nil
		}
		if !strings.Contains(err.Error(), "address already in use") {
			return nil, fmt.Errorf("gossip: cannot listen on %s: %w", bind, err)
		}
	}
	return nil, fmt.Errorf("gossip: port %d of %s is in use, for UDP or TCP: end the process that holds it, or choose another gossip address: %w",
		bind.Port, bind.IP, err)
}

// SetMeta replaces what is said about this process. It spreads within some gossip
// intervals; of several changes in quick succession, only the last may spread. To say the
// same again costs nothing.
func (g *Gossip) SetMeta(m Meta) {
	if g.table.setMeta(m) {
		signal(g.respread)
	}
}

// spread passes on new metadata of this process.
func (g *Gossip) spread() {
	for {
		select {
		case <-g.stopping.Done():
			return
		case <-g.respread:
		}
		// An error says that it is still on its way after the timeout, which is there to
		// keep changes from chasing each other.
		_ = g.run.Load().list.UpdateNode(spreadTimeout)
	}
}

// Leave tells the others that this process is going, so that they need not find
// out. It waits until some have been told, at most for timeout. After it this process
// counts as dead, here too, and only Close is left to call.
func (g *Gossip) Leave(timeout time.Duration) error {
	<-g.turn
	defer func() { g.turn <- struct{}{} }()
	if g.closed {
		return ErrClosed
	}
	if g.left {
		return nil
	}
	g.left = true
	g.endLoops()
	// The library takes 0 for no limit.
	if err := g.run.Load().list.Leave(max(timeout, time.Nanosecond)); err != nil {
		return fmt.Errorf("gossip: leaving: %w", err)
	}
	return nil
}

// Close stops, and waits for its goroutines. Without a Leave before, the others
// find out as they would after a crash. Timers of the library may run out some
// seconds later; they do nothing then.
func (g *Gossip) Close() error {
	<-g.turn
	defer func() { g.turn <- struct{}{} }()
	if g.closed {
		return nil
	}
	g.closed = true
	g.endLoops()
	// The ports first: they wait for somebody to take what has arrived.
	if err := errors.Join(g.ports.Shutdown(), g.run.Load().list.Shutdown()); err != nil {
		return fmt.Errorf("gossip: closing: %w", err)
	}
	return nil
}

func (g *Gossip) endLoops() {
	g.stop()
	g.loops.Wait()
}

// signal puts a token into a channel that holds one, unless it is there.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
