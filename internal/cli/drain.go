package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// drainFlags are those of node drain.
type drainFlags struct {
	applyFlags
	undo bool
}

func (a *App) nodeDrain() *cobra.Command {
	var f drainFlags
	cmd := &cobra.Command{
		Use: "drain NODE", Short: "Move a node's slots, or copies for reports, to the others",
		Long: `Moves all slots of a node to the others, evenly. It stays in the cluster as a spare: it
coordinates requests and holds no data, and can be given slots again.

A reporting node gives its copies to the other reporting nodes: it keeps each in sync until
another one is. If there is no other, they are given up, and there are no reports.

A drained node is given nothing by itself; --undo takes that back.`,
		Example: `  kvctl node drain node3 --wait
  kvctl node drain report1 --wait
  kvctl node drain report1 --undo`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			t, err := a.formedTopology(ctx)
			if err != nil {
				return err
			}
			n, err := resolveNode(t, args[0])
			switch {
			case err != nil:
				return err
			case f.undo && (f.wait || f.yes):
				return usagef("--undo is done at once: leave --wait and --yes out")
			case f.undo:
				return a.undrain(ctx, t, n)
			case n.Role == topology.Reporting:
				return a.drainCopies(ctx, t, n, f)
			}
			return a.planAndStart(ctx, planRequest{kind: "drain", remove: args, strategy: "even"}, f.applyFlags)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.undo, "undo", false, "let a drained node be given slots, or copies, again")
	return cmd
}

// drainDoc says what became of a reporting node's copies, or that a node is drained no more.
type drainDoc struct {
	Node        string `json:"node"`
	Incarnation uint64 `json:"incarnation"`
	Drained     bool   `json:"drained"`
	// Copies are those for reports that it still has.
	Copies int `json:"copies"`
}

// hold has a reporting node drained, or a node be drained no more.
func (a *App) hold(ctx context.Context, t *topology.Topology, n *topology.Node, held bool) error {
	return a.control(ctx, question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) error {
		_, err := adminv1.NewControlServiceClient(cc).HoldBack(ctx, &adminv1.HoldBackRequest{ClusterId: t.ClusterID, Incarnation: n.Incarnation, Held: held})
		return err
	}})
}

func (a *App) undrain(ctx context.Context, t *topology.Topology, n *topology.Node) error {
	s, err := a.status(ctx)
	if err != nil {
		return err
	}
	if s.controlled && !s.drained(n.Incarnation) {
		a.warn("%s is not drained", n.Name)
		return nil
	}
	if err := a.hold(ctx, t, n, false); err != nil {
		return err
	}
	return a.print(drainDoc{n.Name, n.Incarnation, false, copiesOn(t, n.Incarnation)}, func(w io.Writer) {
		if n.Role == topology.Reporting {
			fmt.Fprintf(w, "%s is given copies again: kvctl reporting status shows them\n", n.Name)
			return
		}
		fmt.Fprintf(w, "%s is a spare as any other: kvctl ring plan --add %s shows what it would be given\n", n.Name, n.Name)
	})
}

// copiesOn counts the copies for reports that a node has.
func copiesOn(t *topology.Topology, incarnation uint64) (n int) {
	for i := range t.Ring {
		for _, c := range t.Ring[i].Copies {
			if c.Node == incarnation {
				n++
			}
		}
	}
	return n
}

func copiesText(n int) string {
	if n == 1 {
		return "1 copy"
	}
	return countText(int64(n)) + " copies"
}

// drainCopies has a reporting node give its copies to others.
func (a *App) drainCopies(ctx context.Context, t *topology.Topology, n *topology.Node, f drainFlags) error {
	s, err := a.status(ctx)
	if err != nil {
		return err
	}
	others := slices.ContainsFunc(s.nodes, func(o observedNode) bool {
		return o.Role == topology.Reporting && o.Incarnation != n.Incarnation && o.down() == "" && !s.drained(o.Incarnation)
	})
	copies := copiesOn(t, n.Incarnation)
	what := fmt.Sprintf("move the %s of %s to the other reporting nodes", copiesText(copies), n.Name)
	switch {
	case copies == 0:
		what = "have " + n.Name + " be given no copies for reports"
	case !others:
		what = fmt.Sprintf("give up the %s of %s, for there is no other reporting node that is up: reports will be refused", copiesText(copies), n.Name)
	}
	if !f.yes {
		if err := a.confirmYes(what); err != nil {
			return err
		}
	}
	if err := a.hold(ctx, t, n, true); err != nil {
		return err
	}
	if f.wait {
		if copies, err = a.followDrain(ctx, n, copies); err != nil {
			return err
		}
	}
	return a.print(drainDoc{n.Name, n.Incarnation, true, copies}, func(w io.Writer) {
		if copies > 0 {
			fmt.Fprintf(w, "%s is drained: %s to go; follow them with kvctl reporting status\n", n.Name, copiesText(copies))
			return
		}
		fmt.Fprintf(w, "%s is drained: it has no copies; kvctl node drain %s --undo gives it some again\n", n.Name, n.Name)
	})
}

// followDrain shows how many copies a node still has until it has none.
func (a *App) followDrain(ctx context.Context, n *topology.Node, had int) (left int, _ error) {
	said := time.Time{}
	defer a.unfollow()
	for {
		s, err := a.status(ctx)
		switch {
		case err != nil && exitCode(err) == exitUnavailable && ctx.Err() == nil, err == nil && !s.controlled:
			a.followed("waiting for the orchestrators", &said)
		case err != nil:
			return 0, err
		case !s.drained(n.Incarnation):
			return 0, rpc.Errorf(codes.Aborted, "NOT_DRAINED", "%s is drained no more", n.Name)
		default:
			if left = copiesOn(s.topology, n.Incarnation); left == 0 {
				return 0, nil
			}
			a.followed(fmt.Sprintf("%d of %s have gone from %s", had-left, copiesText(had), n.Name), &said)
		}
		select {
		case <-ctx.Done():
			return left, fmt.Errorf("the copies go on moving: %w", ctx.Err())
		case <-time.After(followEvery):
		}
	}
}
