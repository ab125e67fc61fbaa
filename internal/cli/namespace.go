package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func (a *App) namespaceCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "namespace",
		Short: "Make, show, change and drop namespaces",
		Long: `Makes, shows, changes and drops namespaces. A namespace is a set of keys with its own
number of replicas N, default quorums W and R, read repair, hints, time to live, and copies
for reports.`,
		Example: `  kvctl namespace ls
  kvctl namespace create orders --n 3 --w quorum --r quorum
  kvctl namespace set orders --w all --read-repair async`,
	}
	cmd.AddCommand(a.namespaceList(), a.namespaceCreate(), a.namespaceShow(), a.namespaceSet(), a.namespaceDrop())
	return cmd
}

// namespaceFlags are what a namespace can be given.
type namespaceFlags struct {
	n      int
	w, r   string
	repair topology.ReadRepair
	chance float64
	hints  bool
	ttl    time.Duration

	reporting        topology.ReportingPolicy
	reportingCopies  int
	reportingTimeout time.Duration
}

func (f *namespaceFlags) add(cmd *cobra.Command) {
	l := cmd.Flags()
	l.Var(countFlag(&f.n, 1, quorum.MaxN), "n", fmt.Sprintf("replicas of each key, 1 to %d and at most the data nodes of the ring", quorum.MaxN))
	l.Var(quorumFlag(&f.w), "w", "default write quorum: "+quorumWords)
	l.Var(quorumFlag(&f.r), "r", "default read quorum: "+quorumWords)
	l.Var(repairFlag(&f.repair), "read-repair", "what reads do about stale replicas: blocking, async or off")
	l.Var(chanceFlag(&f.chance), "repair-chance", "chance that a read compares the replicas beyond R too, 0 to 1")
	l.Var(onOffFlag(&f.hints), "hints", "keep records for replicas that are down: on or off")
	l.Var(durationFlag(&f.ttl, 0, 0), "ttl", "default time to live, 0 for ever: 500ms, 30m, 12h, 7d")
	l.Var(reportingFlag(&f.reporting), "reporting", "copies for reports, and whether writes wait for them: block, degrade, best_effort or off")
	l.Var(countFlag(&f.reportingCopies, 1, topology.MaxReportingCopies), "reporting-copies", fmt.Sprintf("copies for reports of each key, 1 to %d, on as many reporting nodes", topology.MaxReportingCopies))
	l.Var(durationFlag(&f.reportingTimeout, 0, topology.MinReportingTimeout), "reporting-timeout",
		fmt.Sprintf("how long a write waits for a copy, %s to %s, before the policy applies", topology.MinReportingTimeout, topology.MaxReportingTimeout))
}

// settings returns those that were given.
func (f *namespaceFlags) settings(cmd *cobra.Command) *adminv1.NamespaceSettings {
	s := &adminv1.NamespaceSettings{}
	changed := cmd.Flags().Changed
	if changed("n") {
		s.N = ptr(uint32(f.n))
	}
	if changed("w") {
		s.WriteQuorum = &f.w
	}
	if changed("r") {
		s.ReadQuorum = &f.r
	}
	if changed("read-repair") {
		s.ReadRepair = ptr(topologyv1.ReadRepairMode(f.repair))
	}
	if changed("repair-chance") {
		s.RepairChance = &f.chance
	}
	if changed("hints") {
		s.Hints = &f.hints
	}
	if changed("ttl") {
		s.TtlMs = ptr(uint64(f.ttl.Milliseconds()))
	}
	if changed("reporting") {
		s.ReportingPolicy = ptr(topologyv1.ReportingPolicy(f.reporting))
	}
	if changed("reporting-copies") {
		s.ReportingCopies = ptr(uint32(f.reportingCopies))
	}
	if changed("reporting-timeout") {
		s.ReportingTimeoutMs = ptr(uint64(f.reportingTimeout.Milliseconds()))
	}
	return s
}

func ptr[T any](v T) *T { return &v }

func (a *App) namespaceList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List the namespaces", Example: "  kvctl namespace ls -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.topology(cmd.Context())
			if err != nil {
				return err
			}
			docs := []namespaceDoc{}
			for i := range t.Namespaces {
				docs = append(docs, namespaceDocOf(&t.Namespaces[i]))
			}
			return a.print(docs, func(w io.Writer) { writeNamespaces(w, t.Namespaces) })
		},
	}
}

func writeNamespaces(w io.Writer, all []topology.Namespace) {
	t := newTable("NAME", ">N", "W", "R", "READS", "READ REPAIR", ">CHANCE", "HINTS", "TTL", "REPORTING")
	starred := false
	for i := range all {
		ns := &all[i]
		reads := ns.Strength().String()
		if ns.Strength() == quorum.StrongWhileNotReplaced {
			reads, starred = "strong*", true
		}
		t.add(ns.Name, ns.N, quorumText(ns.W, ns.N), quorumText(ns.R, ns.N), reads,
			ns.ReadRepair, chanceText(ns.RepairChance), onOff(ns.Hints), ttlText(ns.TTL), ns.Reporting.Policy)
	}
	t.write(w)
	if starred {
		fmt.Fprintf(w, "\n* %s\n", quorum.StrongWhileNotReplaced)
	}
}

func (a *App) namespaceCreate() *cobra.Command {
	f := &namespaceFlags{}
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a namespace",
		Long: `Makes a namespace. What is not given is: N 3, or the number of data nodes if that is
less; W and R quorum; read repair blocking, chance 0; hints on; no TTL; reporting off.`,
		Example: `  kvctl namespace create orders
  kvctl namespace create events --n 5 --w 40% --r one --read-repair async --ttl 7d`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var resp *adminv1.CreateNamespaceResponse
			err := a.control(cmd.Context(), question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
				resp, err = adminv1.NewControlServiceClient(cc).CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: args[0], Settings: f.settings(cmd)})
				return err
			}})
			if err != nil {
				return err
			}
			return a.printChanged("created", resp.GetNamespace(), resp.GetEpoch(), resp.GetWarnings(), nil)
		},
	}
	f.add(cmd)
	return cmd
}

func (a *App) namespaceSet() *cobra.Command {
	f := &namespaceFlags{}
	var ifEpoch uint64
	var allowEventual, wait bool
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change a namespace's settings",
		Long: `Changes the settings that are given and leaves the others.

Another N takes an operation (see kvctl operation), which adds or takes away one replica of
each key after the other, while reads and writes go on; --wait shows its progress. Where it
would make strong reads weaker, as W and R are counts, --allow-eventual must be given.

Other quorums take one too, unless reads are eventual before and after: for a while writes
need both the old and the new W, until no node reads by the old R any more. Where reads are
to ask fewer replicas, these first take over from each other what they lack. What may serve
by the old quorums is waited for, even if it is down, as with R=one each replica may.

--reporting has reporting nodes (kvnode --role reporting) hold copies for reports. With block
and degrade a write is acknowledged only when the copies in sync have it too. Where one does
not answer within --reporting-timeout, block has the write fail, and degrade has the copy
evicted first, after which reports of it are refused until it has caught up. With best_effort
no write waits, and no report is exact. See kvctl reporting status.

--if-changed-epoch makes a change safe against others: it is refused, with exit code 5,
unless the namespace was last changed in that epoch (see kvctl namespace show).`,
		Example: `  kvctl namespace set orders --w all --r one
  kvctl namespace set orders --hints off --read-repair off
  kvctl namespace set orders --ttl 30d --if-changed-epoch 12
  kvctl namespace set orders --n 5 --wait
  kvctl namespace set orders --reporting degrade --reporting-timeout 200ms`,
		RunE: func(cmd *cobra.Command, args []string) error {
			settings := f.settings(cmd)
			if proto.Size(settings) == 0 {
				return usagef("nothing to set: give at least one of --n, --w, --r, --read-repair, --repair-chance, --hints, --ttl, --reporting, --reporting-copies, --reporting-timeout")
			}
			var resp *adminv1.UpdateNamespaceResponse
			err := a.control(cmd.Context(), question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
				resp, err = adminv1.NewControlServiceClient(cc).UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: args[0], Settings: settings, IfChangedEpoch: ifEpoch, AllowEventual: allowEventual})
				return err
			}})
			if err != nil {
				return err
			}
			op := resp.GetOperation()
			if op != nil && wait {
				return a.followOperation(cmd.Context(), op.GetId())
			}
			return a.printChanged("set", resp.GetNamespace(), resp.GetEpoch(), resp.GetWarnings(), op)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&allowEventual, "allow-eventual", false, "with --n: strong reads may become weaker")
	cmd.Flags().BoolVar(&wait, "wait", false, "with --n, --w or --r: show the progress until the end")
	cmd.Flags().Uint64Var(&ifEpoch, "if-changed-epoch", 0, "refuse unless the namespace was last changed in this epoch; 0 for whichever")
	return cmd
}

// printChanged prints a namespace after a change, the operation that the change began,
// if any, and warnings to stderr.
func (a *App) printChanged(what string, pb *topologyv1.Namespace, epoch uint64, warnings []string, op *topologyv1.Operation) error {
	ns, err := topology.NamespaceFromProto(pb)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		a.warn("namespace %s: %s", ns.Name, w)
	}
	doc := struct {
		namespaceDoc
		Epoch    uint64   `json:"epoch"`
		Warnings []string `json:"warnings"`
		// Operation is left out where none was begun.
		Operation uint64 `json:"operation,omitempty"`
	}{namespaceDocOf(&ns), epoch, append([]string{}, warnings...), op.GetId()}
	return a.print(doc, func(w io.Writer) {
		fmt.Fprintf(w, "%s namespace %s in epoch %s\n\n", what, ns.Name, topology.EpochString(epoch))
		fields(w, namespaceFields(&ns)...)
		if op != nil {
			what := fmt.Sprintf("N from %d to %d", op.GetFromN(), op.GetTargetN())
			if op.GetKind() == topology.KindQuorums {
				what = fmt.Sprintf("W and R from %s and %s to %s and %s", op.GetFromWriteQuorum(), op.GetFromReadQuorum(), op.GetTargetWriteQuorum(), op.GetTargetReadQuorum())
			}
			fmt.Fprintf(w, "\noperation %d changes %s; follow it with: kvctl operation show %d --wait\n", op.GetId(), what, op.GetId())
		}
	})
}

func (a *App) namespaceShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show a namespace's settings and how they came about", Example: "  kvctl namespace show orders",
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := a.topology(cmd.Context())
			if err != nil {
				return err
			}
			ns := t.Namespace(args[0])
			if ns == nil {
				return topologyRefusal(topology.ErrNamespaceNotFound(args[0]))
			}
			changes, err := a.changes(cmd.Context(), &adminv1.ListChangesRequest{Subject: "namespace", Name: args[0]})
			if err != nil {
				// The settings are known to every node, the history only to orchestrators.
				a.warn("the history is not available: %s", err)
			}
			return a.printNamespace(ns, changes)
		},
	}
}

// changes returns the changes that are asked for, oldest first.
func (a *App) changes(ctx context.Context, r *adminv1.ListChangesRequest) ([]*topologyv1.Change, error) {
	var resp *adminv1.ListChangesResponse
	err := a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).ListChanges(ctx, r)
		return err
	}})
	return resp.GetChanges(), err
}

func (a *App) printNamespace(ns *topology.Namespace, changes []*topologyv1.Change) error {
	doc := struct {
		namespaceDoc
		History []changeDoc `json:"history"`
	}{namespaceDocOf(ns), []changeDoc{}}
	history := newTable(">EPOCH", "WHEN", "WHAT")
	for _, c := range changes {
		at := time.UnixMilli(int64(c.GetAtMs())).UTC()
		doc.History = append(doc.History, changeDoc{c.GetEpoch(), at.Format(time.RFC3339Nano), c.GetWhat()})
		history.add(topology.EpochString(c.GetEpoch()), at.Format(time.RFC3339), c.GetWhat())
	}
	return a.print(doc, func(w io.Writer) {
		fields(w, namespaceFields(ns)...)
		if len(changes) > 0 {
			fmt.Fprintln(w)
			history.write(w)
		}
	})
}

func (a *App) namespaceDrop() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "drop NAME",
		Short: "Drop a namespace with all its records",
		Long: `Drops a namespace with all its records, which cannot be undone. It asks first on a
terminal; elsewhere --yes must be given. The namespace default cannot be dropped.`,
		Example: `  kvctl namespace drop orders --yes`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes {
				if err := a.confirm(fmt.Sprintf("drop namespace %s with all its records", args[0]), args[0]); err != nil {
					return err
				}
			}
			var resp *adminv1.DropNamespaceResponse
			err := a.control(cmd.Context(), question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
				resp, err = adminv1.NewControlServiceClient(cc).DropNamespace(ctx, &adminv1.DropNamespaceRequest{Name: args[0]})
				return err
			}})
			if err != nil {
				return err
			}
			doc := struct {
				Name  string `json:"name"`
				Epoch uint64 `json:"epoch"`
			}{args[0], resp.GetEpoch()}
			return a.print(doc, func(w io.Writer) {
				fmt.Fprintf(w, "dropped namespace %s in epoch %s\n", doc.Name, topology.EpochString(doc.Epoch))
			})
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// confirm has somebody at a terminal type a name before something that cannot be
// undone.
func (a *App) confirm(what, name string) error {
	if !a.InTerminal || !a.ErrTerminal {
		return usagef("--yes is missing: it is needed to %s where nobody can be asked", what)
	}
	fmt.Fprintf(a.Stderr, "This will %s. It cannot be undone. Type the name to go on: ", what)
	line, err := bufio.NewReader(a.Stdin).ReadString('\n')
	if err != nil && line == "" {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	if strings.TrimSpace(line) != name {
		return fmt.Errorf("nothing was changed: %q is not %q", strings.TrimSpace(line), name)
	}
	return nil
}
