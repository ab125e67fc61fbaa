package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Client is a connection to a cluster. It is safe for concurrent use.
type Client struct {
	cfg       config
	transport rpc.Transport
	endpoints []string
	// view is what the client knows of the cluster.
	view atomic.Pointer[view]
	// avoided holds until when addresses are asked after all others.
	avoided sync.Map
	// token is the greatest timestamp seen; it orders this client's writes.
	token   atomic.Uint64
	budget  budget
	run     context.Context // ends with Close
	cancel  context.CancelFunc
	stopped sync.WaitGroup
	mu      struct {
		sync.Mutex
		links      map[string]*link // by address
		refreshing bool             // a refresh is under way
		closed     bool
	}
}

// view is a topology with the health of its nodes.
type view struct {
	topology  *topology.Topology
	unhealthy map[uint64]bool
}

// openTimeout bounds New when its context has no deadline.
const openTimeout = 5 * time.Second

// New connects to the cluster that some endpoints, host:port, belong to. One that
// answers is enough. It tries until ctx ends, at most 5 s when ctx has no deadline.
func New(ctx context.Context, endpoints []string, opts ...Option) (*Client, error) {
	cfg := config{timeout: 5 * time.Second, patience: time.Second, dial: rpc.NetDialer, wall: func() int64 { return time.Now().UnixMilli() }}
	for _, o := range opts {
		o(&cfg)
	}
	if len(endpoints) == 0 {
		return nil, fmt.Errorf("%w: no endpoints given", ErrNoCluster)
	}
	for _, e := range endpoints {
		if err := rpc.CheckAddress(e, true); err != nil {
			return nil, fmt.Errorf("%w: endpoint %w", ErrInvalidArgument, err)
		}
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, openTimeout)
		defer cancel()
	}
	c := &Client{cfg: cfg, transport: rpc.Transport{Dial: cfg.dial, TLS: cfg.tls}, endpoints: slices.Clone(endpoints)}
	c.mu.links = map[string]*link{}
	c.budget.fill()
	t, err := c.firstTopology(ctx)
	if err != nil {
		return nil, err
	}
	c.view.Store(&view{topology: t})
	c.run, c.cancel = context.WithCancel(context.Background())
	c.stopped.Go(func() { c.follow(c.run) })
	return c, nil
}

// Close ends the client and waits for its goroutines. Calls under way fail.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.mu.closed {
		c.mu.Unlock()
		return nil
	}
	c.mu.closed = true
	links := slices.Collect(maps.Values(c.mu.links))
	clear(c.mu.links)
	c.mu.Unlock()
	c.cancel()
	for _, l := range links {
		l.Close()
	}
	c.stopped.Wait()
	return nil
}

// firstTopology asks the endpoints, all at once, until one answers.
func (c *Client) firstTopology(ctx context.Context) (*topology.Topology, error) {
	type answer struct {
		t   *topology.Topology
		err error
	}
	for {
		round, cancel := context.WithTimeout(ctx, time.Second)
		answers := make(chan answer, len(c.endpoints))
		for _, e := range c.endpoints {
			go func() {
				t, err := c.fetchTopology(round, e, &topology.Topology{})
				answers <- answer{t, err}
			}()
		}
		var found *topology.Topology
		var lastErr error
		for range c.endpoints {
			a := <-answers
			if a.err != nil {
				lastErr = a.err
			} else if found == nil || a.t.Epoch > found.Epoch {
				found = a.t
				cancel() // the others are not needed
			}
		}
		cancel()
		if found != nil {
			return found, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w at %s: %s", ErrNoCluster, strings.Join(c.endpoints, ", "), rpc.AsError(lastErr).Message)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// fetchTopology asks one address, for what differs from known or, if that is empty, for
// the whole.
func (c *Client) fetchTopology(ctx context.Context, address string, known *topology.Topology) (*topology.Topology, error) {
	cc, err := c.transport.NewConn(address)
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	resp, err := topologyv1.NewTopologyServiceClient(cc).GetTopology(ctx, &topologyv1.GetTopologyRequest{ClusterId: known.ClusterID, KnownEpoch: known.Epoch})
	if err != nil {
		return nil, err
	}
	return c.updated(ctx, address, known, resp)
}

// updated returns the topology that a server's message leads to from known, asking for
// the whole where what differs does not fit.
func (c *Client) updated(ctx context.Context, address string, known *topology.Topology, m topology.Updating) (*topology.Topology, error) {
	t, err := topology.Updated(known, m)
	if errors.Is(err, topology.ErrOtherBase) {
		return c.fetchTopology(ctx, address, &topology.Topology{ClusterID: known.ClusterID})
	}
	return t, err
}

// follow watches the topology, at one node after the other, until ctx ends.
func (c *Client) follow(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		addresses := c.watchable()
		err := c.watch(ctx, addresses[i%len(addresses)])
		pause := 20 * time.Millisecond
		if err != nil && (i+1)%len(addresses) == 0 {
			pause = 500 * time.Millisecond // nobody answers
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// watchable returns the addresses to watch the topology at: healthy nodes, the
// endpoints, then the others.
func (c *Client) watchable() []string {
	v := c.view.Load()
	var healthy, other []string
	for i := range v.topology.Nodes {
		if n := &v.topology.Nodes[i]; v.unhealthy[n.Incarnation] {
			other = append(other, n.Address)
		} else {
			healthy = append(healthy, n.Address)
		}
	}
	return slices.Concat(healthy, c.endpoints, other)
}

// watch follows the topology at one address until that ends.
func (c *Client) watch(ctx context.Context, address string) error {
	cc, err := c.transport.NewConn(address)
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A server that falls silent is left for another.
	silence := time.AfterFunc(watchSilence, cancel)
	defer silence.Stop()
	// known is the topology that the server takes this client to have: what it sent last,
	// whatever has come from elsewhere since.
	known := c.view.Load().topology
	var health map[uint64]*topologyv1.NodeHealth
	stream, err := topologyv1.NewTopologyServiceClient(cc).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{
		ClusterId: known.ClusterID, KnownEpoch: known.Epoch,
	})
	for err == nil {
		var resp *topologyv1.WatchTopologyResponse
		if resp, err = stream.Recv(); err != nil {
			break
		}
		silence.Reset(watchSilence)
		if known, err = c.updated(ctx, address, known, resp); err != nil {
			break
		}
		health = topology.HealthAfter(health, resp.GetHealth(), known)
		if err = c.learn(known, health); err != nil {
			break
		}
	}
	return err
}

// watchSilence is how long a watched server may send nothing; it sends something
// every 2 s.
const watchSilence = 6 * time.Second

// errCutOff: a watched server reaches too few nodes to judge their health.
var errCutOff = errors.New("the server reaches less than half of the data nodes")

// learn takes in what a watched server sent. One that holds half of the data nodes or
// more for unhealthy is likelier cut off from them than right: its opinion is left,
// since following it would lead every request to that very server.
func (c *Client) learn(t *topology.Topology, health map[uint64]*topologyv1.NodeHealth) error {
	unhealthy := map[uint64]bool{}
	serving, down := 0, 0
	for _, h := range health {
		bad := h.GetState() == topologyv1.NodeHealth_STATE_UNHEALTHY
		if bad {
			unhealthy[h.GetIncarnation()] = true
		}
		if n := t.Node(h.GetIncarnation()); n != nil && n.Role == topology.Data {
			serving++
			if bad {
				down++
			}
		}
	}
	if serving > 2 && 2*down >= serving {
		c.advance(t, nil)
		return errCutOff
	}
	c.advance(t, unhealthy)
	return nil
}

// advance replaces the view; nil keeps what it has. The topology only goes forward.
func (c *Client) advance(t *topology.Topology, unhealthy map[uint64]bool) {
	for {
		old := c.view.Load()
		next := *old
		if unhealthy != nil {
			next.unhealthy = unhealthy
		}
		if t != nil && t.Epoch > old.topology.Epoch {
			next.topology = t
		}
		if !c.view.CompareAndSwap(old, &next) {
			continue
		}
		if next.topology != old.topology {
			c.dropLinks()
		}
		return
	}
}

// dropLinks closes links to addresses that nobody has any more.
func (c *Client) dropLinks() {
	var stale []*link
	c.mu.Lock()
	t := c.view.Load().topology
	for address, l := range c.mu.links {
		known := slices.Contains(c.endpoints, address) ||
			slices.ContainsFunc(t.Nodes, func(n topology.Node) bool { return n.Address == address })
		if !known {
			stale = append(stale, l)
			delete(c.mu.links, address)
			c.avoided.Delete(address)
		}
	}
	c.mu.Unlock()
	for _, l := range stale {
		l.Close()
	}
}

// refresh asks one address for its topology, in the background, when an answer
// showed that it has a newer one. Many answers show it at once: one asks.
func (c *Client) refresh(address string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.closed || c.mu.refreshing {
		return
	}
	c.mu.refreshing = true
	c.stopped.Go(func() {
		ctx, cancel := context.WithTimeout(c.run, time.Second)
		defer cancel()
		if t, err := c.fetchTopology(ctx, address, c.view.Load().topology); err == nil {
			c.advance(t, nil)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.mu.refreshing = false
	})
}

// link returns the link to an address, making it when there is none.
func (c *Client) link(address string) (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.closed {
		return nil, ErrClosed
	}
	l := c.mu.links[address]
	if l == nil {
		l = &link{Link: rpc.NewLink(rpc.LinkConfig{
			Transport: c.transport, Address: address, Peer: "node", WallClock: c.cfg.wall,
			PingInterval: 500 * time.Millisecond, StallAfter: time.Second, StartWithin: 600 * time.Millisecond,
		}, rpc.KV)}
		c.mu.links[address] = l
	}
	return l, nil
}

// known returns the link to an address if there is one.
func (c *Client) known(address string) *link {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.links[address]
}

// budget pays for retries and hedges: each call earns a fifth of one, time earns
// ten a second.
type budget struct {
	mu    sync.Mutex
	coins float64
	at    time.Time
}

const (
	budgetMax     = 1000
	budgetPerCall = 0.2
	budgetPerSec  = 10
)

func (b *budget) fill() { b.coins, b.at = budgetMax, time.Now() }

func (b *budget) earn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.coins = min(budgetMax, b.coins+budgetPerCall)
}

func (b *budget) spend() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.coins = min(budgetMax, b.coins+now.Sub(b.at).Seconds()*budgetPerSec)
	b.at = now
	if b.coins < 1 {
		return false
	}
	b.coins--
	return true
}

// unimplemented reports whether an address serves something else than keys, as an
// orchestrator does.
func unimplemented(err error) bool {
	return rpc.AsError(err).Code == codes.Unimplemented || errors.Is(err, grpc.ErrServerStopped)
}
