package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// kindRebalance is the kind of the operations that spread slots better.
const kindRebalance = "rebalance"

// measureEvery is how often nodes are asked what they hold, measureTimeout how long one
// may take to answer.
const (
	measureEvery   = time.Minute
	measureTimeout = 5 * time.Second
)

// holdings are what vnodes hold, by namespace in the topology's order and vnode.
type holdings [][]uint64

// measuring asks the nodes what they hold, on the leader, where placement goes by that.
type measuring struct {
	o  *Orchestrator
	mu struct {
		sync.Mutex
		asked   time.Time
		running bool
		epoch   uint64 // that the holdings were measured in
		held    holdings
	}
}

// held returns what vnodes hold, not older than a few minutes, or nil while that is not
// known. It has the nodes asked when it is time to.
func (m *measuring) held(run context.Context, t *topology.Topology) holdings {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.mu.running && time.Since(m.mu.asked) >= measureEvery {
		m.mu.running, m.mu.asked = true, time.Now()
		m.o.workers.Go(func() { m.measure(run, t) })
	}
	if m.mu.epoch != t.Epoch {
		return nil
	}
	return m.mu.held
}

// measure asks every member. A vnode that nobody speaks for leaves all unknown.
func (m *measuring) measure(run context.Context, t *topology.Topology) {
	held, err := m.o.measure(run, t)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.running, m.mu.epoch, m.mu.held = false, t.Epoch, held
	if err != nil && run.Err() == nil {
		m.o.cfg.Logger.Warn("not known what vnodes hold", "err", err)
	}
}

func (o *Orchestrator) measure(run context.Context, t *topology.Topology) (holdings, error) {
	index := map[uint32]int{} // of namespaces
	held := make(holdings, len(t.Namespaces))
	for i := range t.Namespaces {
		index[t.Namespaces[i].ID] = i
		held[i] = make([]uint64, len(t.Ring))
	}
	for _, n := range t.Members() {
		uses, err := o.askUse(run, n)
		if err != nil {
			return nil, fmt.Errorf("%s does not say what it holds: %w", n.Name, err)
		}
		for _, u := range uses {
			if i, ok := index[u.GetNamespaceId()]; ok && int(u.GetVnode()) < len(t.Ring) {
				held[i][u.GetVnode()] = max(held[i][u.GetVnode()], u.GetBytes())
			}
		}
	}
	return held, nil
}

func (o *Orchestrator) askUse(run context.Context, n *topology.Node) ([]*adminv1.VnodeUse, error) {
	cc, err := o.transport.NewConn(n.Address)
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(run, measureTimeout)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(cc).GetNodeUse(ctx, &adminv1.GetNodeUseRequest{})
	return resp.GetVnodes(), err
}

// place returns the assignment that the cluster's placement makes of nodes. Where it goes
// by what vnodes hold and that is not known, it spreads their number.
func place(t *topology.Topology, nodes []placement.Node, held holdings) (placement.Assignment, error) {
	if t.Settings.Placement == topology.PlaceWeighted && held != nil {
		return placement.Weighted(placement.Of(t), nodes, placement.Uses(t), held)
	}
	return placement.Even(placement.Of(t), nodes, placement.Uses(t))
}

// rebalance returns the command that begins to spread slots better, when that is worth it
// and nothing else is going on, or nil.
func rebalance(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	r := t.Settings.Rebalance
	if r.Policy != topology.RebalanceAuto || !quiet(s, v) {
		return nil
	}
	for _, op := range s.Operations {
		if op.Kind == kindRebalance && v.nowMillis-op.StartedMillis < r.Cooldown.Milliseconds() {
			return nil
		}
	}
	held := holdings(nil)
	if t.Settings.Placement == topology.PlaceWeighted {
		if held = v.held(); held == nil {
			return nil
		}
	}
	current := placement.Of(t)
	before, close := excess(t, current, held), crowded(t, current)
	if before < r.Threshold && close == 0 {
		return nil
	}
	next, err := place(t, members(t), held)
	if err != nil {
		return nil // there were enough nodes for what there is
	}
	after, moves := excess(t, next, held), placement.Moves(current, next)
	op := topology.Operation{Kind: kindRebalance, Title: "slots are spread better", Moves: moves}
	if left := crowded(t, next); left < close { // an operation that was aborted leaves such vnodes
		op.Title = "replicas are spread over zones"
		return startOperation(s, op, "rebalance", "", fmt.Sprintf("%d vnodes have replicas in fewer zones than they could, and %d after %d moves: %s", close, left, len(moves), op.Title))
	}
	// Less than half a threshold is not worth what it costs; and it might not be enough for
	// this to rest then.
	if len(moves) == 0 || before < r.Threshold || before-after < r.Threshold/2 {
		return nil
	}
	return startOperation(s, op, "rebalance", "", fmt.Sprintf("a node has %.0f%% more than the mean, and %.0f%% after %d moves: %s", 100*before, 100*max(after, 0), len(moves), op.Title))
}

// members returns the nodes that have slots.
func members(t *topology.Topology) (out []placement.Node) {
	for _, n := range t.Members() {
		out = append(out, placement.Node{ID: n.Incarnation, Zone: n.Zone})
	}
	return out
}

// quiet reports whether nothing else is going on, nodes are well, and the busiest of them
// has time for moves.
func quiet(s *topology.State, v view) bool {
	t := s.Topology
	if changing(s) || !v.knows(t) || degraded(t, v) != "" {
		return false
	}
	for i := range s.Provisions {
		if !s.Provisions[i].State.Ended() {
			return false
		}
	}
	for _, n := range t.Members() {
		if !v.healthy(n.Incarnation) || !v.fresh(n.Incarnation) || v.status(n.Incarnation).GetCpuUtilization() > t.Settings.Rebalance.QuietCPU {
			return false
		}
	}
	return true
}

// crowded returns how many vnodes have the replicas of a namespace in fewer zones than
// members could have them in.
func crowded(t *topology.Topology, a placement.Assignment) (vnodes int) {
	zone, zones := map[uint64]string{}, map[string]bool{}
	for _, n := range t.Members() {
		zone[n.Incarnation], zones[n.Zone] = n.Zone, true
	}
	uses := placement.Uses(t)
	slots := make([]string, 0, t.Width()) // zones of a vnode's slots
	for v := range a {
		slots = slots[:0]
		for _, inc := range a[v] {
			slots = append(slots, zone[inc])
		}
		if slices.ContainsFunc(uses, func(n int) bool { return distinct(slots[:n]) < min(n, len(zones)) }) {
			vnodes++
		}
	}
	return vnodes
}

// distinct returns how many of a few zones are distinct.
func distinct(zones []string) (n int) {
	for i, z := range zones {
		if !slices.Contains(zones[:i], z) {
			n++
		}
	}
	return n
}

// excess returns how much above the mean the node with most has, of bytes where they are
// known and of slots otherwise: 0 is even.
func excess(t *topology.Topology, a placement.Assignment, held holdings) float64 {
	has := map[uint64]float64{}
	for _, n := range t.Members() {
		has[n.Incarnation] = 0
	}
	sum := 0.0
	for v := range a {
		for slot, n := range a[v] {
			worth := 1.0
			if held != nil {
				worth = 0
				for i := range t.Namespaces {
					if slot < t.Namespaces[i].Wide() {
						worth += float64(held[i][v])
					}
				}
			}
			has[n] += worth
			sum += worth
		}
	}
	most := 0.0
	for _, h := range has {
		most = max(most, h)
	}
	if sum == 0 {
		return 0
	}
	return most*float64(len(has))/sum - 1
}
