package cli

import (
	"cmp"
	"context"
	"errors"
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

// rollOptions say what is restarted.
type rollOptions struct {
	names                []string // empty: all
	nodes, orchestrators bool     // only these
	// before, unless it is zero, spares what was started at or after it.
	before time.Time
	dryRun bool
	// patience bounds each wait of a roll.
	patience time.Duration
}

func (a *App) rollCommand() *cobra.Command {
	var o rollOptions
	cmd := &cobra.Command{
		Use:   "roll [NAME]...",
		Short: "Restart every process, one after the other",
		Long: `Restarts the processes of the cluster, or those that are named: nodes first, then
orchestrators, their leader last. Each one stops in order and runs its binary anew, which
may be a newer one by then, with the same arguments; it needs nobody who starts it again.
The next one follows once all nodes are healthy, reach each other, have the latest topology,
and keep no hints for each other, and all orchestrators have caught up. Meanwhile clients
lose nothing as long as every namespace can do without one node.

Nothing is restarted while a node is down or an operation is under way. If a process does not
come back the roll ends, and says how to go on. An interrupt ends it after the process that is
being restarted; a second one at once.`,
		Example: `  kvctl cluster roll --dry-run
  kvctl cluster roll
  kvctl cluster roll --orchestrators
  kvctl cluster roll node1 node2 --wait-timeout 10m
  kvctl cluster roll --started-before 2026-11-20T09:30:00Z`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.names = args
			if len(args) > 0 && (o.nodes || o.orchestrators) || o.nodes && o.orchestrators {
				return usagef("want names, --nodes or --orchestrators, only one of them: without any of them all processes are restarted")
			}
			return a.roll(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.nodes, "nodes", false, "only the nodes")
	f.BoolVar(&o.orchestrators, "orchestrators", false, "only the orchestrators")
	f.Var(durationFlag(&o.patience, 5*time.Minute, time.Second), "wait-timeout", "how long a process may take to serve again, and then the cluster to be ready for the next")
	f.Var(timeFlag(&o.before), "started-before", "spare what was started since then, to go on with a roll (a time such as 2026-11-20T09:30:00Z)")
	f.BoolVar(&o.dryRun, "dry-run", false, "only show what would be restarted, and whether it could be now")
	return cmd
}

// rolled is a process of a roll, and what became of it.
type rolled struct {
	answered[*adminv1.GetProcessResponse] // the run that is to end
	role                                  string
	spared                                bool
	doc                                   rollDoc
}

// rollDoc is a process of a roll as a document.
type rollDoc struct {
	Name      string `json:"name"`
	Role      string `json:"role"`
	Restarted bool   `json:"restarted"`
	// UptimeMs is for how long it had been running.
	UptimeMs uint64 `json:"uptime_ms"`
	// DowntimeMs is from the request until it served again, ConvergedMs from then until
	// the cluster was ready for the next.
	DowntimeMs  int64 `json:"downtime_ms"`
	ConvergedMs int64 `json:"converged_ms"`
	// Software is what runs now.
	Software string `json:"software"`
}

// roll restarts processes one after the other.
func (a *App) roll(ctx context.Context, o rollOptions) error {
	began := time.Now()
	v, err := a.look(ctx)
	if err != nil {
		return err
	}
	all, err := a.toRoll(ctx, v, o)
	if err != nil {
		return err
	}
	for _, text := range v.withoutOne(all) {
		a.warn("%s", text)
	}
	if o.dryRun {
		if err := a.print(rollDocs(all), func(w io.Writer) { writeRollPlan(w, all, v.notReady()) }); err != nil {
			return err
		}
	}
	if why := v.blocked(); why != "" {
		return rpc.Errorf(codes.FailedPrecondition, "CLUSTER_NOT_READY", "nothing was restarted: %s", why)
	}
	if o.dryRun {
		return nil
	}
	if err := a.await(ctx, "before the first restart", o.patience, a.notReady); err != nil {
		return fail(err, "nothing was restarted: %s", err)
	}
	if o.before.IsZero() {
		o.before = began
	}
	if err = a.rollEach(ctx, all, o); err != nil {
		err = goOn(err, o)
	}
	if printErr := a.print(rollDocs(all), func(w io.Writer) { writeRollSum(w, all, time.Since(began)) }); printErr != nil {
		return errors.Join(err, printErr)
	}
	return err
}

// goOn says how to go on with a roll that ended early.
func goOn(err error, o rollOptions) error {
	how := "kvctl cluster roll --started-before " + o.before.UTC().Format(time.RFC3339)
	switch {
	case o.nodes:
		how += " --nodes"
	case o.orchestrators:
		how += " --orchestrators"
	}
	for _, name := range o.names {
		how += " " + name
	}
	e := *rpc.AsError(err)
	e.Message += "; go on with: " + how
	return e.With("go_on", how)
}

// rollEach restarts what is not spared, and returns once the cluster has converged.
// REQUIRES: the cluster is ready.
func (a *App) rollEach(ctx context.Context, all []*rolled, o rollOptions) error {
	for _, r := range all {
		if r.spared {
			continue
		}
		if ctx.Err() != nil {
			return rpc.Errorf(codes.Canceled, "CANCELED", "ended before %s was restarted", r.Name)
		}
		// What has begun is seen through: it would be left half done.
		if err := a.rollOne(context.WithoutCancel(ctx), ctx, r, o.patience); err != nil {
			return err
		}
		if a.flags.output == outputTable {
			if err := a.print(nil, r.write); err != nil {
				return err
			}
		}
	}
	return nil
}

// rollOne restarts a process and waits until it serves and the cluster has converged.
// interrupt is only told of.
func (a *App) rollOne(ctx, interrupt context.Context, r *rolled, patience time.Duration) error {
	began := time.Now()
	if err := a.restart(ctx, r, patience); err != nil {
		return err
	}
	said := false
	wait := func(what string, check func(context.Context) (string, error)) error {
		return a.await(ctx, what, patience, func(ctx context.Context) (string, error) {
			if interrupt.Err() != nil && !said {
				said = true
				a.unfollow()
				a.warn("ends after %s; interrupt again to end at once", r.Name)
			}
			return check(ctx)
		})
	}
	err := wait(r.Name+" restarts", func(ctx context.Context) (string, error) {
		now, err := a.process(ctx, r.Node)
		switch {
		case err != nil:
			return "", err
		case now.GetRunId() == r.answer.GetRunId():
			return "it has not ended yet", nil
		case now.GetNotReady() == "":
			r.doc.Restarted, r.doc.Software = true, now.GetSoftware()
		}
		return now.GetNotReady(), nil
	})
	if err != nil {
		return fail(err, "%s was told to restart and does not serve again after %s: %s; look at its log and start it if it ended", r.Name, durationText(patience), err)
	}
	served := time.Now()
	r.doc.DowntimeMs = served.Sub(began).Milliseconds()
	if err := wait(r.Name+" serves again", a.notReady); err != nil {
		return fail(err, "%s serves again, but after %s the cluster is not ready for the next restart: %s", r.Name, durationText(patience), err)
	}
	r.doc.ConvergedMs = time.Since(served).Milliseconds()
	return nil
}

// fail words an error anew, whose code stays.
func fail(err error, format string, args ...any) error {
	e := rpc.AsError(err)
	return rpc.Errorf(e.Code, e.Reason, format, args...)
}

// restartTimeout bounds the request for a restart: the process checks first whether it
// could start again.
const restartTimeout = 40 * time.Second

// restart tells a process to restart, as soon as it can be reached. That the answer did
// not come means nothing: the process may be gone by then.
func (a *App) restart(ctx context.Context, r *rolled, patience time.Duration) error {
	var refused error
	err := a.await(ctx, "telling "+r.Name+" to restart", patience, func(ctx context.Context) (string, error) {
		_, err := askOne(ctx, a, r.Node, restartTimeout, func(ctx context.Context, cc *grpc.ClientConn) (*adminv1.RestartResponse, error) {
			return adminv1.NewProcessServiceClient(cc).Restart(ctx, &adminv1.RestartRequest{RunId: r.answer.GetRunId()})
		})
		e := rpc.AsError(err)
		switch {
		case err == nil, e.Reason == rpc.ReasonLinkBroken, e.Reason == rpc.ReasonDeadline:
			return "", nil
		case e.Code == codes.FailedPrecondition, e.Code == codes.Unimplemented:
			refused = e
			return "", nil
		}
		return "", err
	})
	if err = cmp.Or(refused, err); err != nil {
		return fail(err, "%s was not restarted: %s", r.Name, rpc.AsError(err).Message)
	}
	return nil
}

// rollEvery is how often a wait of a roll looks again.
const rollEvery = 200 * time.Millisecond

// await looks until check returns "", which otherwise returns what is waited for, or what
// kept it from looking. It ends with that when patience does.
func (a *App) await(ctx context.Context, what string, patience time.Duration, check func(context.Context) (string, error)) error {
	defer a.unfollow()
	began := time.Now()
	said := began // where there is no terminal a short wait is not worth a line
	for {
		why, err := check(ctx)
		if err != nil {
			why = rpc.AsError(err).Message
		}
		if why == "" {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) >= patience {
			return rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "%s", why)
		}
		a.followed(fmt.Sprintf("%s, since %s: %s", what, durationText(time.Since(began).Round(time.Second)), why), &said)
		select {
		case <-ctx.Done():
		case <-time.After(rollEvery):
		}
	}
}

// notReady returns why nothing may be restarted now, or "".
func (a *App) notReady(ctx context.Context) (string, error) {
	v, err := a.look(ctx)
	if err != nil {
		return "", err
	}
	return v.notReady(), nil
}

// process asks a process, a node's or an orchestrator's, what it is.
func (a *App) process(ctx context.Context, at *topology.Node) (*adminv1.GetProcessResponse, error) {
	return askOne(ctx, a, at, a.flags.timeout, askProcess)
}

func askProcess(ctx context.Context, cc *grpc.ClientConn) (*adminv1.GetProcessResponse, error) {
	return adminv1.NewProcessServiceClient(cc).GetProcess(ctx, &adminv1.GetProcessRequest{})
}

// toRoll returns what is to be restarted, in order, as it runs now.
func (a *App) toRoll(ctx context.Context, v *rollView, o rollOptions) ([]*rolled, error) {
	picked, err := v.pick(o)
	if err != nil {
		return nil, err
	}
	at := make([]answered[*adminv1.GetProcessResponse], len(picked))
	for i, r := range picked {
		at[i].Node = r.Node
	}
	now := time.Now()
	if err := askAll(ctx, a, at, a.flags.timeout, askProcess); err != nil {
		return nil, err
	}
	for i, r := range picked {
		r.answered = at[i]
		if e := rpc.AsError(r.err); e != nil {
			if e.Code == codes.Unimplemented {
				return nil, fail(e, "nothing was restarted: %s runs a version that cannot restart by itself: restart it by other means", r.Name)
			}
			return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "nothing was restarted: %s at %s: %s", r.Name, r.Address, e.Message)
		}
		r.doc = rollDoc{Name: r.Name, Role: r.role, UptimeMs: r.answer.GetUptimeMs(), Software: r.answer.GetSoftware()}
		r.spared = !o.before.IsZero() && !now.Add(-millis(r.answer.GetUptimeMs())).Before(o.before)
	}
	return picked, nil
}

// pick returns what is to be restarted, in order.
func (v *rollView) pick(o rollOptions) ([]*rolled, error) {
	var out []*rolled
	add := func(n *topology.Node, role string) {
		out = append(out, &rolled{answered: answered[*adminv1.GetProcessResponse]{Node: n}, role: role})
	}
	if !o.orchestrators {
		for i := range v.nodes {
			add(v.nodes[i].Node, v.nodes[i].Role.String())
		}
	}
	if !o.nodes {
		orchs := slices.Clone(v.topology.Orchestrators)
		leader := v.leader().GetName()
		slices.SortFunc(orchs, func(a, b topology.Orchestrator) int {
			if last := (a.Name == leader); last != (b.Name == leader) {
				return map[bool]int{true: 1, false: -1}[last]
			}
			return compareNames(a.Name, b.Name)
		})
		for _, orch := range orchs {
			add(&topology.Node{Name: orch.Name, Address: orch.Address}, "orchestrator")
		}
	}
	if len(o.names) == 0 {
		return out, nil
	}
	for _, name := range o.names {
		if !slices.ContainsFunc(out, func(r *rolled) bool { return r.named(name) }) {
			return nil, missingError{"process", name, nil}
		}
	}
	return slices.DeleteFunc(out, func(r *rolled) bool { return !slices.ContainsFunc(o.names, r.named) }), nil
}

func (r *rolled) named(name string) bool {
	return r.Name == name || r.Incarnation != 0 && name == fmt.Sprintf("#%d", r.Incarnation)
}
