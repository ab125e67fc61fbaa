package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// connectTimeout bounds one attempt to reach one endpoint. A process that is paused
// takes connections and says nothing.
const connectTimeout = time.Second

// openTimeout is how long a cluster is looked for.
const openTimeout = 2 * time.Second

// openClient connects to the cluster for data commands. timeout bounds each request.
func (a *App) openClient(ctx context.Context, timeout time.Duration, opts ...client.Option) (*client.Client, error) {
	at, err := a.resolve()
	if err != nil {
		return nil, err
	}
	opts = append(opts, client.WithTimeout(timeout))
	tls, err := at.TLS.Load()
	if err != nil {
		return nil, err
	}
	if tls != nil {
		opts = append(opts, client.WithTLS(tls))
	}
	opening, cancel := context.WithTimeout(ctx, min(timeout, openTimeout))
	defer cancel()
	c, err := client.New(opening, at.Endpoints, opts...)
	if !errors.Is(err, client.ErrNoCluster) || ctx.Err() != nil {
		return c, err
	}
	// Somebody may be there who has no topology to give, and can say why.
	if _, err := a.topology(ctx); err != nil {
		return nil, err
	}
	return nil, noClusterError{at.Endpoints, err}
}

// question is one request to whichever endpoint answers it.
type question struct {
	ask func(ctx context.Context, cc *grpc.ClientConn) error
	// changes tells that the request changes something: it is asked again elsewhere
	// only if it certainly had no effect.
	changes bool
}

// headStart is how long an endpoint may take to be reached before the next one is
// tried too, so that silent ones cost little.
const headStart = 100 * time.Millisecond

// control asks one endpoint after the other, as they are reached, until one answers.
// Nodes and orchestrators that are not the leader pass requests on to it, so any
// will do.
func (a *App) control(ctx context.Context, q question) error {
	at, err := a.resolve()
	if err != nil {
		return err
	}
	transport, err := at.transport()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.flags.timeout)
	defer cancel()
	var answer *rpc.Error // of an endpoint that could be reached
	var cause error
	for r := range reach(ctx, transport, at.Endpoints) {
		if r.err != nil {
			cause = fmt.Errorf("%s: %w", r.endpoint, r.err)
			continue
		}
		asked := time.Now()
		err := q.ask(ctx, r.cc)
		if err == nil {
			return nil
		}
		e := rpc.AsError(err)
		if ctx.Err() != nil || e.Code == codes.Canceled { // servers cancel by the same deadline
			return rpc.AsError(cmp.Or(ctx.Err(), context.DeadlineExceeded)).With("endpoint", r.endpoint)
		}
		// To find out that nobody leads would take another node as long.
		slow := e.Reason == rpc.ReasonNoLeader && time.Since(asked) >= connectTimeout
		if slow || !elsewhere(e, q.changes) {
			return leaderless(e)
		}
		answer = e
	}
	switch {
	case answer != nil:
		return leaderless(answer)
	case ctx.Err() != nil:
		return rpc.AsError(ctx.Err()).With("endpoints", strings.Join(at.Endpoints, ","))
	}
	return noClusterError{at.Endpoints, cause}
}

// leaderless words for people that nobody leads the orchestrators.
func leaderless(e *rpc.Error) error {
	if e.Reason != rpc.ReasonNoLeader {
		return e
	}
	e = e.With("cause", e.Message)
	e.Message = "no orchestrator leads: reads and writes go on, but nothing can be changed until a majority of the orchestrators runs"
	return e
}

// reached is a connection to an endpoint, or why there is none.
type reached struct {
	endpoint string
	cc       *grpc.ClientConn
	err      error
}

// reach connects to endpoints in turn and yields each once it is known whether it can
// be reached. The next one's turn comes when those before it have been yielded, or
// are late. A connection is closed when the loop that it was yielded to is over.
func reach(ctx context.Context, transport rpc.Transport, endpoints []string) iter.Seq[reached] {
	return func(yield func(reached) bool) {
		ctx, cancel := context.WithCancel(ctx)
		known := make(chan reached, len(endpoints))
		var dials sync.WaitGroup
		defer func() {
			cancel()
			dials.Wait()
			close(known)
			for r := range known {
				r.close()
			}
		}()
		next, open := 0, 0
		for next < len(endpoints) || open > 0 {
			if next < len(endpoints) {
				endpoint := endpoints[next]
				next++
				if slices.Contains(endpoints[:next-1], endpoint) {
					continue
				}
				open++
				dials.Go(func() {
					cc, err := dial(ctx, transport, endpoint)
					known <- reached{endpoint, cc, err}
				})
			}
			var late <-chan time.Time
			if next < len(endpoints) {
				late = time.After(headStart)
			}
			select {
			case <-late:
			case r := <-known:
				open--
				goOn := yield(r)
				r.close()
				if !goOn {
					return
				}
			}
		}
	}
}

func (r reached) close() {
	if r.cc != nil {
		r.cc.Close()
	}
}

// elsewhere reports whether another endpoint may answer what failed at one.
func elsewhere(e *rpc.Error, changes bool) bool {
	switch e.Code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Unimplemented, codes.ResourceExhausted:
		return !changes || e.NothingDone() || e.Code == codes.Unimplemented
	}
	return false
}

// transport is how a context's processes are reached.
func (c Context) transport() (rpc.Transport, error) {
	tls, err := c.TLS.Load()
	return rpc.Transport{Dial: rpc.NetDialer, TLS: tls}, err
}

// dial connects to an endpoint.
func dial(ctx context.Context, transport rpc.Transport, endpoint string) (*grpc.ClientConn, error) {
	cc, err := transport.NewConn(endpoint)
	if err != nil {
		return nil, err
	}
	if err := connect(ctx, cc); err != nil {
		cc.Close()
		return nil, err
	}
	return cc, nil
}

// connect waits until a connection is there, so that a request that fails later is
// known to have been sent or not.
func connect(ctx context.Context, cc *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	cc.Connect()
	for {
		state := cc.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.TransientFailure, connectivity.Shutdown:
			return errUnreachable
		}
		if !cc.WaitForStateChange(ctx, state) {
			return errSilent
		}
	}
}

// What became of an attempt to connect.
var (
	errUnreachable = errors.New("cannot be reached")
	errSilent      = errors.New("does not answer")
)

// topology fetches the topology of the cluster from whoever answers.
func (a *App) topology(ctx context.Context) (*topology.Topology, error) {
	var resp *topologyv1.GetTopologyResponse
	err := a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = topologyv1.NewTopologyServiceClient(cc).GetTopology(ctx, &topologyv1.GetTopologyRequest{})
		return err
	}})
	if err != nil {
		return nil, err
	}
	return topology.FromProto(resp.GetTopology())
}

// formedTopology is topology once the vnodes have slots.
func (a *App) formedTopology(ctx context.Context) (*topology.Topology, error) {
	t, err := a.topology(ctx)
	if err != nil {
		return nil, err
	}
	return t, checkFormed(t)
}

func checkFormed(t *topology.Topology) error {
	if t.Formed() {
		return nil
	}
	return rpc.Errorf(codes.FailedPrecondition, "RING_NOT_FORMED",
		"the ring has not formed yet: %d of %d founding nodes have registered", t.DataNodes(), t.FoundingNodes).
		With("data_nodes", t.DataNodes()).With("founding_nodes", t.FoundingNodes)
}

// resolveNode finds a node by name, or by incarnation as #17.
func resolveNode(t *topology.Topology, name string) (*topology.Node, error) {
	if n := t.Resolve(name); n != nil {
		return n, nil
	}
	return nil, missingError{"node", name, nil}
}
