package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// writePlan writes a plan to a file that is not there yet.
func writePlan(path string, d *planDoc) error {
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("write the plan: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Close())
}

// readPlan reads what writePlan or -o json has written; "-" is stdin.
func (a *App) readPlan(path string) (*planDoc, error) {
	in := a.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read the plan: %w", err)
		}
		defer f.Close()
		in = f
	}
	d := &planDoc{}
	dec := json.NewDecoder(in)
	dec.DisallowUnknownFields()
	if err := dec.Decode(d); err != nil {
		return nil, usagef("%s is no plan: %w", path, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, usagef("%s is no plan: something follows it", path)
	}
	if d.Format != planFormat {
		return nil, usagef("%s is a plan of format %d, this kvctl knows format %d: make the plan again", path, d.Format, planFormat)
	}
	return d, nil
}

// writeNext says how a plan is made.
func (d *planDoc) writeNext(w io.Writer, file string) {
	switch missing := d.missing(); {
	case len(d.Moves) == 0:
	case missing != "":
		fmt.Fprintf(w, "start %s first (kvctl dev add, or kvnode with the cluster's orchestrators), then plan again\n", missing)
	case file != "":
		fmt.Fprintf(w, "make it with: kvctl ring apply %s --wait\n", file)
	default:
		fmt.Fprintln(w, "nothing was changed: kvctl ring apply with the same flags makes it so")
	}
}

// missing names the nodes that a plan needs and that are not there yet.
func (d *planDoc) missing() string {
	var out []string
	for _, n := range d.Nodes {
		if !n.Exists {
			out = append(out, n.Node)
		}
	}
	return strings.Join(out, ", ")
}

// operation is the plan as the control plane takes it.
func (d *planDoc) operation() (*topologyv1.Operation, error) {
	if missing := d.missing(); missing != "" {
		return nil, usagef("%s of the plan are not there yet: start them (kvctl dev add, or kvnode with the cluster's orchestrators), then plan again", missing)
	}
	op := &topologyv1.Operation{Kind: d.Kind, Title: d.Title}
	for _, m := range d.Moves {
		if m.From == nil {
			return nil, usagef("the move of vnode %d slot %d does not say from where: make the plan again", m.Vnode, m.Slot)
		}
		op.Moves = append(op.Moves, &topologyv1.Move{Vnode: uint32(m.Vnode), Slot: uint32(m.Slot), From: m.From.Incarnation, To: m.To.Incarnation})
	}
	for _, n := range d.Leave {
		op.Remove = append(op.Remove, n.Incarnation)
	}
	return op, nil
}

// applyFlags are those of every command that starts an operation.
type applyFlags struct{ yes, wait bool }

func (f *applyFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.yes, "yes", false, "do not ask")
	cmd.Flags().BoolVar(&f.wait, "wait", false, "show the progress until the end")
}

func (a *App) ringApply() *cobra.Command {
	r := planRequest{kind: "apply"}
	var f applyFlags
	cmd := &cobra.Command{
		Use:   "apply [PLAN]",
		Short: "Move slots as planned, while the cluster serves",
		Long: `Moves slots as a plan says that kvctl ring plan wrote to a file (- is stdin), or as the same
flags as of ring plan ask for; then the plan is shown first. Reads and writes go on; each
move is made in steps that any orchestrator can go on with. A plan is good for the epoch it
was made in: when the ring or a namespace has changed since, it is refused (exit code 5).

One operation runs at a time: see kvctl operation.`,
		Example: `  kvctl ring apply plan.json --wait
  kvctl ring apply --add 1
  kvctl ring apply --remove node1 --yes -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			asked := slices.ContainsFunc([]string{"add", "remove", "replace", "strategy", "zone"}, cmd.Flags().Changed)
			if len(args) == 0 {
				return a.planAndStart(cmd.Context(), r, f)
			}
			if asked {
				return usagef("a plan says all: leave --add, --remove, --replace, --strategy and --zone out")
			}
			d, err := a.readPlan(args[0])
			if err != nil {
				return err
			}
			t, err := a.formedTopology(cmd.Context())
			if err != nil {
				return err
			}
			if d.Cluster != t.ClusterID {
				return rpc.Errorf(codes.Aborted, "WRONG_CLUSTER", "the plan was made for cluster %s, this is %s: make the plan here", d.Cluster, t.ClusterID)
			}
			op, err := a.start(cmd.Context(), d)
			if err != nil {
				return err
			}
			return a.tellOperation(cmd.Context(), op, f.wait)
		},
	}
	r.addFlags(cmd)
	f.add(cmd)
	return cmd
}

// start has the control plane begin what is planned.
func (a *App) start(ctx context.Context, d *planDoc) (*topologyv1.Operation, error) {
	op, err := d.operation()
	if err != nil {
		return nil, err
	}
	var resp *adminv1.StartOperationResponse
	err = a.control(ctx, question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).StartOperation(ctx, &adminv1.StartOperationRequest{Epoch: d.Epoch, Operation: op})
		return err
	}})
	return resp.GetOperation(), err
}

// maxReplans bounds how often a plan is made again because the topology has changed
// since it was made.
const maxReplans = 5

// planAndStart plans, shows the plan and asks, and has it begun. Where the topology
// changes in between, it plans again what was agreed to.
func (a *App) planAndStart(ctx context.Context, r planRequest, f applyFlags) error {
	var uses ringUse
	for try := 0; ; try++ {
		t, err := a.formedTopology(ctx)
		if err != nil {
			return err
		}
		if try == 0 {
			if uses, _, err = a.uses(ctx, t); err != nil {
				return err
			}
		}
		d, err := planRing(t, r, uses)
		if err != nil {
			return err
		}
		if len(d.Moves) == 0 && len(d.Leave) == 0 {
			a.warn("nothing has to move")
			return nil
		}
		if try == 0 {
			if _, err := d.operation(); err != nil {
				return err
			}
			if a.flags.output == outputTable {
				d.write(a.Stderr)
			}
			if !f.yes {
				if err := a.confirmYes(d.Title); err != nil {
					return err
				}
			}
		}
		op, err := a.start(ctx, d)
		var e *rpc.Error
		if errors.As(err, &e) && e.Reason == "EPOCH_CHANGED" && try < maxReplans {
			continue
		}
		if err != nil {
			return err
		}
		return a.tellOperation(ctx, op, f.wait)
	}
}

// confirmYes asks somebody at a terminal whether to go on.
func (a *App) confirmYes(what string) error {
	if !a.InTerminal || !a.ErrTerminal {
		return usagef("--yes is missing: it is needed to %s where nobody can be asked", what)
	}
	fmt.Fprintf(a.Stderr, "\nThis will %s. Go on? [y/N] ", what)
	line, err := bufio.NewReader(a.Stdin).ReadString('\n')
	if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
		return errors.Join(errors.New("nothing was changed"), ignoreEOF(err))
	}
	return nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// nodeOperations are the subcommands of node that take what it has from it.
func (a *App) nodeOperations() []*cobra.Command {
	change := func(use, short, long, example string, request func(args []string) (planRequest, error)) *cobra.Command {
		var f applyFlags
		cmd := &cobra.Command{
			Use: use, Short: short, Long: long, Example: example,
			RunE: func(cmd *cobra.Command, args []string) error {
				r, err := request(args)
				if err != nil {
					return err
				}
				r.strategy = "even"
				return a.planAndStart(cmd.Context(), r, f)
			},
		}
		f.add(cmd)
		return cmd
	}
	return []*cobra.Command{
		a.nodeDrain(),
		change("decommission NODE", "Move a node's slots to the others, and let it leave",
			`Moves all slots of a node to the others, evenly, and then removes it from the cluster. It
may be dead: then its replicas are rebuilt from the others. Its data directory can join
again only when it is emptied. A reporting node leaves once others have its copies in sync; the
last one takes them with it.`,
			"  kvctl node decommission node3 --wait",
			func(args []string) (planRequest, error) {
				return planRequest{kind: "decommission", remove: args, leave: true}, nil
			}),
		change("replace OLD [NEW]", "Have a spare take the place of a node",
			`Gives all slots of a node to a spare, and then removes it from the cluster. The two are
given as OLD NEW or as OLD=NEW. The old node may be dead: then its replicas are rebuilt from
the others.`,
			"  kvctl dev add\n  kvctl node replace node2 node4 --wait\n  kvctl node replace node2=node4",
			func(args []string) (planRequest, error) {
				pair := strings.Join(args, "=")
				if strings.Count(pair, "=") != 1 {
					return planRequest{}, usagef("%q: want OLD NEW, or OLD=NEW", strings.Join(args, " "))
				}
				return planRequest{kind: "replace", replace: pair, leave: true}, nil
			}),
	}
}
