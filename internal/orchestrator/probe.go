package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

const (
	// suspectTimeout bounds the probe of a node that gossip has dead: it has been silent
	// for seconds.
	suspectTimeout = 2 * time.Second
	// witnessTimeout bounds a question to a node about another one, and maxWitnesses how
	// many are asked.
	witnessTimeout = time.Second
	maxWitnesses   = 16
)

// watch looks at one node again and again until ctx ends.
func (h *probes) watch(ctx context.Context, incarnation uint64, hurry <-chan struct{}) {
	var l line
	defer func() { l.close() }()
	for {
		t := h.o.machine.topology()
		if n := t.Node(incarnation); n != nil {
			h.look(ctx, t, n, &l)
		}
		select {
		case <-ctx.Done():
			return
		case <-hurry:
		case <-time.After(t.Settings.HealthChecks.Interval):
		}
	}
}

// look looks at a node once: it probes it, and where that or what was heard speaks
// against the node, it asks others anew before it judges.
func (h *probes) look(ctx context.Context, t *topology.Topology, n *topology.Node, l *line) {
	began, checks := time.Now(), t.Settings.HealthChecks
	timeout := checks.Timeout
	if h.word(n.Incarnation) == gossipDead {
		timeout = min(timeout, suspectTimeout)
	}
	r := h.probe(ctx, n, timeout, l)
	f := h.evidence(t, n.Incarnation, r, began.Add(-2*checks.Interval-checks.Timeout)).find()
	if !f.passed && ctx.Err() == nil {
		h.askAround(ctx, t, n.Incarnation, min(timeout, witnessTimeout))
		f = h.evidence(t, n.Incarnation, r, began).find()
	}
	if ctx.Err() == nil {
		h.note(n, look{f, began, time.Since(began)}, checks)
	}
}

// reply is what a probe brought.
type reply struct {
	answer answer
	said   string
}

// line is the connection on which a node answered last, if any.
type line struct {
	cc      *grpc.ClientConn
	address string
}

func (l *line) close() {
	if l.cc != nil {
		l.cc.Close()
	}
	*l = line{}
}

// lineAlone is the part of a probe's time after which it is made on a new connection, too.
const lineAlone = 0.25

// probe asks a node for its status: on the line where there is one, for a connection costs
// a node that is idle more than all else that it is asked. What keeps it from answering only
// a new connection tells, so that is made as soon as the line fails, or is slow; and whichever
// brings an answer first, counts.
func (h *probes) probe(ctx context.Context, n *topology.Node, timeout time.Duration, l *line) reply {
	if l.cc == nil || l.address != n.Address {
		l.close()
		return h.ask(ctx, n, timeout, l)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	old, fresh := make(chan *adminv1.NodeStatus, 1), make(chan reply, 1)
	go func() {
		resp, err := adminv1.NewStatusServiceClient(l.cc).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
		if err == nil && resp.GetStatus().GetIncarnation() == n.Incarnation {
			old <- resp.GetStatus()
		}
		close(old)
	}()
	slow := time.NewTimer(time.Duration(lineAlone * float64(timeout)))
	defer slow.Stop()
	select {
	case s := <-old:
		if s != nil {
			return h.answered(n, s)
		}
	case <-slow.C:
	}
	var next line
	go func() { fresh <- h.ask(ctx, n, timeout, &next) }()
	answers := old
	for {
		select {
		case s := <-answers:
			answers = nil
			if s == nil {
				continue
			}
			cancel()
			<-fresh
			next.close()
			return h.answered(n, s)
		case r := <-fresh:
			cancel()
			for range old { // until it has ended
			}
			l.close()
			*l = next
			return r
		}
	}
}

var errHungUp = errors.New("the connection has ended")

// ask asks a node for its status on a new connection, notes that, and tells what kind of
// answer it was. The line gets the connection if there was one.
func (h *probes) ask(ctx context.Context, n *topology.Node, timeout time.Duration, l *line) reply {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	// The dialer sees what an error of the call does not tell: whether somebody listens.
	// Once there was an answer it dials no more: a line that ends stays so.
	var connected, nobody, over atomic.Bool
	transport := h.o.transport
	dial := transport.Dial
	transport.Dial = func(ctx context.Context, address string) (c net.Conn, err error) {
		if over.Load() {
			return nil, errHungUp
		}
		c, err = dial(ctx, address)
		if err == nil {
			connected.Store(true)
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			nobody.Store(true)
			cancel()
		}
		return c, err
	}
	// A node that is busy may take long to greet: the timeout is the only limit.
	cc, err := transport.NewConn(n.Address, grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: timeout}))
	if err != nil {
		return reply{strange, err.Error()}
	}
	resp, err := adminv1.NewStatusServiceClient(cc).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{}, grpc.WaitForReady(true))
	over.Store(true)
	if err != nil {
		cc.Close()
		return failed(rpc.AsError(err), connected.Load(), nobody.Load())
	}
	status := resp.GetStatus()
	if got := status.GetIncarnation(); got != n.Incarnation {
		cc.Close()
		return reply{strange, fmt.Sprintf("#%d answers at its address", got)}
	}
	*l = line{cc, n.Address}
	return h.answered(n, status)
}

// answered takes in what a node says of itself.
func (h *probes) answered(n *topology.Node, status *adminv1.NodeStatus) reply {
	h.o.noteEpoch(status.GetEpoch())
	h.heard(n.Incarnation, status)
	return answerOf(status, h.o.machine.topology().Formed())
}

// failed tells what kind of answer a call that failed is.
func failed(err *rpc.Error, connected, nobody bool) reply {
	// A connection that is made and never agreed on is silent, but for what TLS says.
	_, handshake, _ := strings.Cut(err.Message, "handshake failed: ")
	switch {
	case nobody:
		return reply{answer: refused}
	case err.Code != codes.DeadlineExceeded && err.Code != codes.Unavailable:
		return reply{strange, err.Message}
	case connected:
		return reply{silent, strings.TrimSuffix(handshake, `"`)}
	}
	return reply{answer: unconnected}
}

// answerOf tells what kind of answer a status is.
func answerOf(s *adminv1.NodeStatus, formed bool) reply {
	switch {
	case s.GetState() == adminv1.NodeStatus_STATE_SERVING:
		return reply{answered, s.GetReason()}
	case s.GetState() == adminv1.NodeStatus_STATE_STALLED:
		return reply{stalled, s.GetReason()}
	case formed:
		return reply{notServing, s.GetReason()}
	}
	return reply{answer: answered}
}

// askAround asks well nodes how they are, and so whom they reach.
func (h *probes) askAround(ctx context.Context, t *topology.Topology, about uint64, timeout time.Duration) {
	var asking sync.WaitGroup
	for _, p := range h.witnesses(t, about) {
		asking.Go(func() {
			var l line
			h.ask(ctx, p, timeout, &l)
			l.close()
		})
	}
	asking.Wait()
}

// witnesses returns some well nodes other than one: those that follow it, lest the
// same are asked about all.
func (h *probes) witnesses(t *topology.Topology, about uint64) []*topology.Node {
	h.mu.Lock()
	defer h.mu.Unlock()
	first := slices.IndexFunc(t.Nodes, func(n topology.Node) bool { return n.Incarnation == about })
	var out []*topology.Node
	for i := range t.Nodes {
		n := &t.Nodes[(first+1+i)%len(t.Nodes)]
		if obs := h.mu.nodes[n.Incarnation]; n.Incarnation != about && obs != nil && obs.well() && len(out) < maxWitnesses {
			out = append(out, n)
		}
	}
	return out
}

// heard notes what a node said of itself.
func (h *probes) heard(incarnation uint64, status *adminv1.NodeStatus) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if obs := h.mu.nodes[incarnation]; obs != nil {
		obs.status, obs.at = status, time.Now()
	}
}

// word returns what gossip says of a node.
func (h *probes) word(incarnation uint64) gossipWord {
	if h.o.gossip == nil {
		return gossipUnknown
	}
	switch alive, known := h.o.gossip.Alive(gossipName(incarnation)); {
	case alive:
		return gossipAlive
	case known:
		return gossipDead
	}
	return gossipUnknown
}

// evidence gathers what there is on a node, of what others said since some time.
func (h *probes) evidence(t *topology.Topology, incarnation uint64, r reply, since time.Time) evidence {
	e := evidence{by: h.o.cfg.Name, answer: r.answer, said: r.said, gossip: h.word(incarnation)}
	h.mu.Lock()
	defer h.mu.Unlock()
	accounts := make([]account, 0, len(t.Nodes))
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if obs := h.mu.nodes[n.Incarnation]; obs != nil && obs.status != nil {
			accounts = append(accounts, account{n.Incarnation, n.Name, obs.well(), obs.at, obs.status.GetUnreachable()})
		}
	}
	e.hearsay = hear(incarnation, accounts, since)
	return e
}

// note judges a node by one more look at it.
func (h *probes) note(n *topology.Node, l look, checks topology.HealthChecks) {
	h.mu.Lock()
	defer h.mu.Unlock()
	obs := h.mu.nodes[n.Incarnation]
	if obs == nil {
		return
	}
	obs.looks = append(slices.Clone(obs.looks[max(0, len(obs.looks)+1-keepLooks):]), l)
	before, why := obs.verdict.state, obs.verdict.reason()
	obs.verdict = obs.verdict.judge(l.finding, checks, time.Now())
	if obs.verdict.state != before {
		obs.changed, obs.sinceMillis = time.Now(), h.o.cfg.Seams.WallClock()
	} else if (why == "") == (obs.verdict.reason() == "") {
		return // reasons count failures: not every count is news
	}
	h.o.cfg.Logger.Info("node health changed", "node", n.Name, "incarnation", n.Incarnation,
		"healthy", obs.verdict.state == topologyv1.NodeHealth_STATE_HEALTHY, "reason", obs.verdict.reason())
	close(h.mu.changed)
	h.mu.changed = make(chan struct{})
}
