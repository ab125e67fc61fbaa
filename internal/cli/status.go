package cli

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// staleStatus is the age from which a node is asked for its status directly.
const staleStatus = 10 * time.Second

// clusterStatus is the cluster as somebody in it sees it.
type clusterStatus struct {
	topology      *topology.Topology
	nodes         []observedNode // by name
	orchestrators []*adminv1.ObservedOrchestrator
	answeredBy    string
	// controlled tells whether an orchestrator answered.
	controlled bool
	// conditions are what holds at present, by word of the orchestrators.
	conditions []*topologyv1.Condition
	losses     []topology.Loss
	heldBack   []uint64
}

// drained reports whether people drained a node, by word of the orchestrators.
func (s *clusterStatus) drained(incarnation uint64) bool {
	return slices.Contains(s.heldBack, incarnation)
}

// observedNode is what is known of a node.
type observedNode struct {
	*topology.Node
	health topologyv1.NodeHealth_State
	reason string
	// sinceMs is since when, in milliseconds since 1970, or 0.
	sinceMs uint64
	gossip  string
	checks  []*adminv1.HealthCheck
	// status is nil when the node has never answered; age is how old it is.
	status *adminv1.NodeStatus
	age    time.Duration
	// refuses is set when the node's address was tried and nobody listens there.
	refuses bool
}

// status asks the cluster for its status.
func (a *App) status(ctx context.Context) (*clusterStatus, error) {
	var resp *adminv1.GetClusterStatusResponse
	err := a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
		return err
	}})
	if err != nil {
		return nil, err
	}
	return statusFromProto(resp)
}

func statusFromProto(resp *adminv1.GetClusterStatusResponse) (*clusterStatus, error) {
	t, err := topology.FromProto(resp.GetTopology())
	if err != nil {
		return nil, err
	}
	s := &clusterStatus{
		topology: t, orchestrators: resp.GetOrchestrators(), answeredBy: resp.GetAnsweredBy(), controlled: resp.GetControlPlaneAvailable(),
		conditions: resp.GetConditions(), heldBack: resp.GetHeldBack(),
	}
	for _, l := range resp.GetLosses() {
		s.losses = append(s.losses, topology.LossFromProto(l))
	}
	observed := map[uint64]*adminv1.ObservedNode{}
	for _, o := range resp.GetNodes() {
		observed[o.GetHealth().GetIncarnation()] = o
	}
	for i := range t.Nodes {
		n := &t.Nodes[i]
		o := observed[n.Incarnation]
		s.nodes = append(s.nodes, observedNode{
			Node: n, health: o.GetHealth().GetState(), reason: o.GetHealth().GetReason(),
			sinceMs: sinceMillis(o.GetHealth(), resp.GetFound()), gossip: o.GetGossip(), checks: o.GetChecks(),
			status: o.GetStatus(), age: time.Duration(o.GetAgeMs()) * time.Millisecond,
		})
	}
	slices.SortFunc(s.nodes, func(a, b observedNode) int {
		return cmp.Or(compareNames(a.Name, b.Name), cmp.Compare(a.Incarnation, b.Incarnation))
	})
	return s, nil
}

// compareNames orders names as people do: node9 before node10.
func compareNames(a, b string) int {
	headA, headB := strings.TrimRight(a, "0123456789"), strings.TrimRight(b, "0123456789")
	tailA, tailB := strings.TrimLeft(a[len(headA):], "0"), strings.TrimLeft(b[len(headB):], "0")
	return cmp.Or(strings.Compare(headA, headB), cmp.Compare(len(tailA), len(tailB)), strings.Compare(tailA, tailB), strings.Compare(a, b))
}

// askNodes asks nodes for their status directly, all at once, and takes in what they
// answer. Addresses may not be reachable from here, so silence proves nothing; that
// nobody listens at an address does.
func (a *App) askNodes(ctx context.Context, nodes []*observedNode) error {
	at, err := a.resolve()
	if err != nil {
		return err
	}
	transport, err := at.transport()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, min(a.flags.timeout, connectTimeout))
	defer cancel()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { n.ask(ctx, transport) })
	}
	wg.Wait()
	return nil
}

func (n *observedNode) ask(ctx context.Context, transport rpc.Transport) {
	conn, err := transport.Dial(ctx, n.Address)
	if err != nil {
		n.refuses = errors.Is(err, syscall.ECONNREFUSED)
		return
	}
	conn.Close()
	cc, err := dial(ctx, transport, n.Address)
	if err != nil {
		return
	}
	defer cc.Close()
	resp, err := adminv1.NewStatusServiceClient(cc).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	// The address may have gone to another node meanwhile.
	if s := resp.GetStatus(); err == nil && s.GetIncarnation() == n.Incarnation {
		n.status, n.age = s, 0
	}
}

// old returns the nodes of which there is no recent status.
func (s *clusterStatus) old() []*observedNode {
	var out []*observedNode
	for i := range s.nodes {
		if n := &s.nodes[i]; n.status == nil || n.age > staleStatus {
			out = append(out, n)
		}
	}
	return out
}

// down returns why a node cannot take part in quorums, or "".
func (n *observedNode) down() string {
	state := n.status.GetState()
	switch {
	case n.refuses:
		return "nobody listens at " + n.Address
	case n.health == topologyv1.NodeHealth_STATE_UNHEALTHY:
		return "unhealthy: " + n.reason
	case n.status == nil && n.health != topologyv1.NodeHealth_STATE_HEALTHY:
		return "not heard of"
	case n.status != nil && state != adminv1.NodeStatus_STATE_SERVING:
		return stateText(state) + ": " + n.status.GetReason()
	}
	return ""
}

// stateText is what a node does, as far as is known.
func (n *observedNode) stateText() string {
	text := stateText(n.status.GetState())
	if n.status != nil && (n.refuses || n.health == topologyv1.NodeHealth_STATE_UNHEALTHY) {
		return "was " + text
	}
	return text
}

// healthText is a node's health in a word.
func (n *observedNode) healthText() string {
	switch n.health {
	case topologyv1.NodeHealth_STATE_HEALTHY:
		return "healthy"
	case topologyv1.NodeHealth_STATE_UNHEALTHY:
		return "unhealthy"
	}
	return "unknown"
}

// stateText is a state in words; that of a node that never answered is unknown.
func stateText(s adminv1.NodeStatus_State) string {
	switch s {
	case adminv1.NodeStatus_STATE_STARTING:
		return "starting"
	case adminv1.NodeStatus_STATE_SERVING:
		return "serving"
	case adminv1.NodeStatus_STATE_LOST_TAIL:
		return "lost tail"
	case adminv1.NodeStatus_STATE_STOPPING:
		return "stopping"
	case adminv1.NodeStatus_STATE_REMOVED:
		return "removed"
	case adminv1.NodeStatus_STATE_STALLED:
		return "stalled"
	}
	return "unknown"
}
