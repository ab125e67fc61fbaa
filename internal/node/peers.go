package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Metadata of links.
const (
	mdCluster = "kvasir-cluster"
	// mdTarget is the incarnation the caller means to reach, mdFrom its own.
	mdTarget = "kvasir-target"
	mdFrom   = "kvasir-from"
	// mdAddress is where the caller's own server listens.
	mdAddress = "kvasir-address"
	// mdIncarnation is who answers.
	mdIncarnation = "kvasir-incarnation"
)

type replicaLink = rpc.Link[*replicav1.Call, *replicav1.Reply]

// peers reaches the replicas of the topology and says which are alive. A node is
// alive when it answers on its link and does not say of itself that it does not
// serve; an orchestrator's word counts where gossip does not contradict it.
type peers struct {
	self    uint64
	cfg     rpc.LinkConfig // what all links share
	cluster string
	address string
	clock   *replica.Clock
	loop    *rpc.Loop[*replicav1.Call, *replicav1.Reply]
	// cached answers this node's own reads for which nothing has to be waited for, or
	// returns nil.
	cached func(*replicav1.Call) *replicav1.Reply
	health func(incarnation uint64) *topologyv1.NodeHealth
	gossip atomic.Pointer[gossip.Gossip]
	// links is replaced, never changed.
	links atomic.Pointer[map[uint64]*replicaLink]
	mu    struct {
		sync.Mutex
		closed  bool
		closing sync.WaitGroup
	}
}

// gossipName is what a node is called among the members.
func gossipName(incarnation uint64) string { return "n" + strconv.FormatUint(incarnation, 10) }

// update makes links to new nodes and closes those to nodes that are gone or moved.
func (p *peers) update(t *topology.Topology) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.closed {
		return
	}
	old := *p.links.Load()
	next := make(map[uint64]*replicaLink, len(t.Nodes))
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if n.Incarnation == p.self {
			continue
		}
		if l := old[n.Incarnation]; l != nil && l.Address() == n.Address {
			next[n.Incarnation] = l
			continue
		}
		next[n.Incarnation] = p.connect(n)
	}
	p.links.Store(&next)
	for inc, l := range old {
		if next[inc] != l {
			p.mu.closing.Go(l.Close)
		}
	}
}

// maxOffsetTrip is the longest round trip by which a clock's offset is judged.
const maxOffsetTrip = 100 * time.Millisecond

func (p *peers) connect(n *topology.Node) *replicaLink {
	cfg := p.cfg
	cfg.Address = n.Address
	cfg.Peer = n.Name
	target := n.Incarnation
	cfg.Metadata = func() metadata.MD {
		return metadata.Pairs(mdCluster, p.cluster, mdTarget, strconv.FormatUint(target, 10),
			mdFrom, strconv.FormatUint(p.self, 10), mdAddress, p.address)
	}
	cfg.Greeted = func(md metadata.MD) error {
		if who := first(md, mdIncarnation); who != strconv.FormatUint(target, 10) {
			return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "#%s answers in place of #%d", who, target)
		}
		return nil
	}
	cfg.Offset = func(ahead, trip time.Duration) {
		if trip <= maxOffsetTrip {
			p.clock.Observe(target, ahead)
		}
	}
	return rpc.NewLink(cfg, rpc.Replica)
}

func first(md metadata.MD, key string) string {
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// greet checks who opens a link to this node.
func (p *peers) greet(md metadata.MD) error {
	if c := first(md, mdCluster); c != p.cluster {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this node is of cluster %s, the caller of cluster %s", p.cluster, c)
	}
	if t := first(md, mdTarget); t != strconv.FormatUint(p.self, 10) {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "this is #%d, the caller looks for #%s", p.self, t)
	}
	return nil
}

// heard notes that a node has opened a link to this one, so it is there to be
// connected to as well.
func (p *peers) heard(md metadata.MD) {
	if inc, err := strconv.ParseUint(first(md, mdFrom), 10, 64); err == nil {
		if l := p.link(inc); l != nil {
			l.Retry()
		}
	}
}

// settled reports whether every link has been tried at least once.
func (p *peers) settled() bool {
	for l := range maps.Values(*p.links.Load()) {
		select {
		case <-l.Ready():
		default:
			return false
		}
	}
	return true
}

// Go sends a call to a node; see rpc.Link.Go.
func (p *peers) Go(node uint64, call *replicav1.Call, deadline time.Time, done func(*replicav1.Reply, error)) error {
	if node == p.self {
		if reply := p.cached(call); reply != nil {
			done(reply, nil)
			return nil
		}
		return p.loop.Go(call, deadline, done)
	}
	l := (*p.links.Load())[node]
	if l == nil {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "there is no way to #%d", node)
	}
	return l.Go(call, deadline, done)
}

// Alive reports whether a node is worth asking.
func (p *peers) Alive(node uint64) bool { return p.why(node) == "" }

// why returns why a node is not alive, or "".
func (p *peers) why(node uint64) string {
	if node == p.self {
		return ""
	}
	l := (*p.links.Load())[node]
	switch {
	case l == nil:
		return "is not in the topology"
	case !l.Up():
		return "does not answer"
	}
	state, gossips := p.says(node)
	switch state {
	case adminv1.NodeStatus_STATE_LOST_TAIL, adminv1.NodeStatus_STATE_REMOVED, adminv1.NodeStatus_STATE_STOPPING, adminv1.NodeStatus_STATE_STALLED:
		// A node that says it is starting may have gone on since it said so.
		if gossips {
			return "says that it is " + stateName(state)
		}
	}
	if h := p.health(node); !gossips && h.GetState() == topologyv1.NodeHealth_STATE_UNHEALTHY {
		return h.GetReason()
	}
	return ""
}

// drained asks a node for the epoch that is on its disk and that no request of it runs
// under an older one than.
func (p *peers) drained(ctx context.Context, node uint64) (uint64, error) {
	l := p.link(node)
	if l == nil || l.Conn() == nil {
		return 0, rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "there is no way to #%d", node)
	}
	resp, err := adminv1.NewStatusServiceClient(l.Conn()).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return 0, err
	}
	if got := resp.GetStatus().GetIncarnation(); got != node {
		return 0, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonWrongPeer, "#%d answers in place of #%d", got, node)
	}
	return resp.GetStatus().GetEpoch(), nil
}

// says returns the state a node gives of itself, if gossip has it alive.
func (p *peers) says(node uint64) (adminv1.NodeStatus_State, bool) {
	g := p.gossip.Load()
	if g == nil {
		return 0, false
	}
	m, ok := g.Member(gossipName(node))
	return adminv1.NodeStatus_State(m.Meta.State), ok && m.Alive
}

// link returns the link to a node, or nil.
func (p *peers) link(node uint64) *replicaLink { return (*p.links.Load())[node] }

// unreachable returns the nodes of the topology that do not answer on their links, once
// those were tried. A link needs both directions, so a cut in either shows at both ends,
// within its StallAfter and PingInterval. What others say of a node is left out: this is
// evidence, and must not echo.
func (p *peers) unreachable() []uint64 {
	var out []uint64
	for inc, l := range *p.links.Load() {
		select {
		case <-l.Ready():
			if !l.Up() {
				out = append(out, inc)
			}
		default:
		}
	}
	slices.Sort(out)
	return out
}

// word returns what gossip says of a node: alive, dead or unknown.
func (p *peers) word(node uint64) string {
	if g := p.gossip.Load(); g != nil {
		switch alive, known := g.Alive(gossipName(node)); {
		case alive:
			return "alive"
		case known:
			return "dead"
		}
	}
	return "unknown"
}

// pending returns how many calls wait for replies, in all.
func (p *peers) pending() (n int) {
	for l := range maps.Values(*p.links.Load()) {
		n += l.Pending()
	}
	return n
}

// close closes all links and waits for them.
func (p *peers) close() {
	p.mu.Lock()
	p.mu.closed = true
	for l := range maps.Values(*p.links.Load()) {
		p.mu.closing.Go(l.Close)
	}
	p.mu.Unlock()
	p.mu.closing.Wait()
}

func stateName(s adminv1.NodeStatus_State) string {
	switch s {
	case adminv1.NodeStatus_STATE_STARTING:
		return "starting"
	case adminv1.NodeStatus_STATE_SERVING:
		return "serving"
	case adminv1.NodeStatus_STATE_LOST_TAIL:
		return "lost-tail"
	case adminv1.NodeStatus_STATE_STOPPING:
		return "stopping"
	case adminv1.NodeStatus_STATE_REMOVED:
		return "removed"
	case adminv1.NodeStatus_STATE_STALLED:
		return "stalled"
	}
	return fmt.Sprintf("in state %d", s)
}
