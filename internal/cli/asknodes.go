package cli

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// answered is what one node said.
type answered[T any] struct {
	*topology.Node
	answer T
	err    error
}

// askEach asks every node itself, or the one that is named, all at once, and returns
// what those said that answered. Others are warned of; it is an error when nobody
// answers.
func askEach[T any](ctx context.Context, a *App, name []string, ask func(context.Context, *grpc.ClientConn) (T, error)) (*topology.Topology, []answered[T], error) {
	t, err := a.topology(ctx)
	if err != nil {
		return nil, nil, err
	}
	var nodes []answered[T]
	if len(name) > 0 {
		n, err := resolveNode(t, name[0])
		if err != nil {
			return nil, nil, err
		}
		nodes = append(nodes, answered[T]{Node: n})
	} else {
		for i := range t.Nodes {
			nodes = append(nodes, answered[T]{Node: &t.Nodes[i]})
		}
		slices.SortStableFunc(nodes, func(a, b answered[T]) int { return compareNames(a.Name, b.Name) })
	}
	if err := askAll(ctx, a, nodes, a.flags.timeout, ask); err != nil {
		return nil, nil, err
	}
	var out []answered[T]
	for _, n := range nodes {
		switch {
		case n.err == nil:
			out = append(out, n)
		case len(nodes) > 1:
			a.warn("%s: %s", n.Name, rpc.AsError(n.err).Message)
		}
	}
	if len(out) == 0 && len(nodes) > 0 {
		return nil, nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "%s: %s", nodes[0].Name, rpc.AsError(nodes[0].err).Message)
	}
	return t, out, nil
}

// askAll asks nodes themselves, all at once, and notes what each said or why it did not.
func askAll[T any](ctx context.Context, a *App, nodes []answered[T], timeout time.Duration, ask func(context.Context, *grpc.ClientConn) (T, error)) error {
	at, err := a.resolve()
	if err != nil {
		return err
	}
	transport, err := at.transport()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var wg sync.WaitGroup
	for i := range nodes {
		n := &nodes[i]
		wg.Go(func() {
			cc, err := dial(ctx, transport, n.Address)
			if err != nil {
				n.err = err
				return
			}
			defer cc.Close()
			n.answer, n.err = ask(ctx, cc)
		})
	}
	wg.Wait()
	return nil
}

// askOne asks one process itself.
func askOne[T any](ctx context.Context, a *App, at *topology.Node, timeout time.Duration, ask func(context.Context, *grpc.ClientConn) (T, error)) (T, error) {
	one := []answered[T]{{Node: at}}
	if err := askAll(ctx, a, one, timeout, ask); err != nil {
		return one[0].answer, err
	}
	return one[0].answer, one[0].err
}
