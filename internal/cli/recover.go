package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/cli/recovery"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// recoverFlags are the flags of recover.
type recoverFlags struct {
	recovery.Options
	vnodes      []uint
	file        string
	yes, dryRun bool
}

func (a *App) recoverCommand() *cobra.Command {
	var f recoverFlags
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Make the control plane anew when the orchestrators are lost, or give up lost replicas",
		Long: `Makes the control plane anew when a majority of the orchestrators is lost for good, with its
disks. Meanwhile the nodes serve reads and writes as before.

It asks all nodes for the topology that they have, and refuses while orchestrators answer that
are a majority, or while a node is missing that may know of a later change. Then it seals the
nodes: they take in nothing more of the lost orchestrators, should these come back. It writes a
file with the newest topology, as the first of a new generation. New orchestrators, each with an
empty data_dir, are started with it:

  kvorch --config FILE --recover RECOVERY-FILE
  kvctl dev start orch1 --recover RECOVERY-FILE     (on a development cluster)

The nodes look for them where the old ones were, and at --orchestrators. Use the file for one set of
orchestrators only. Interrupted anywhere, run it again with the same flags: it goes on.

With --accept-loss nodes are given up with their disks that are down and without which too few
replicas of a vnode are left to rebuild it. Their places are then filled with all that is left.
Writes that were acknowledged may be lost; the history keeps of what (kvctl events --subject
loss). It works with living orchestrators, and when the control plane is made anew.`,
		Example: `  kvctl recover --dry-run
  kvctl recover
  kvctl recover --without node3 --file recovery.json --yes
  kvctl recover --orchestrators 10.0.0.7:7390,10.0.0.8:7390,10.0.0.9:7390
  kvctl recover --accept-loss --dry-run
  kvctl recover --accept-loss --vnode 17`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.recover(cmd.Context(), f) },
	}
	l := cmd.Flags()
	l.StringSliceVar(&f.Without, "without", nil, "nodes that are gone for good, or may be left behind: they are not waited for")
	l.StringSliceVar(&f.Orchestrators, "orchestrators", nil, "host:port of the new orchestrators, where they are not where the old ones were")
	l.BoolVar(&f.AcceptLoss, "accept-loss", false, "give up nodes that are down and without which vnodes cannot be rebuilt")
	l.UintSliceVar(&f.vnodes, "vnode", nil, "with --accept-loss: only for these vnodes (default: all that cannot be rebuilt)")
	l.BoolVar(&f.TakeOver, "take-over", false, "begin anew in the place of a recovery that has begun: its file is of no use any more")
	l.StringVar(&f.file, "file", "", "where to write the file for the orchestrators (default: kvasir-recovery-gN.json here, of generation N)")
	l.BoolVar(&f.dryRun, "dry-run", false, "only show what was found and would be done")
	l.BoolVar(&f.yes, "yes", false, "do not ask")
	return cmd
}

// recoverDoc is a recovery as a document.
type recoverDoc struct {
	Cluster       string           `json:"cluster"`
	Recovery      string           `json:"recovery"`
	Generation    uint64           `json:"generation"`
	Resumed       bool             `json:"resumed"`
	Epoch         string           `json:"epoch"`
	NewestAt      string           `json:"newest_at"`
	Nodes         []recoverNodeDoc `json:"nodes"`
	Without       []string         `json:"without"`
	Orchestrators []recoverOrchDoc `json:"orchestrators"`
	Loss          *lossDoc         `json:"loss"`
	File          string           `json:"file"`
	Done          bool             `json:"done"`
	refusal       *rpc.Error
}

type recoverNodeDoc struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation"`
	Answers     bool   `json:"answers"`
	Epoch       string `json:"epoch"`
	SealedFor   string `json:"sealed_for"`
}

type recoverOrchDoc struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Answers bool   `json:"answers"`
	What    string `json:"what"`
}

// lossDoc is what is given up, as a document.
type lossDoc struct {
	Nodes      []string `json:"nodes"`
	Vnodes     []uint32 `json:"vnodes"`
	Namespaces []string `json:"namespaces"`
	// Since is when the first of the nodes became unhealthy, At when it was accepted.
	Since *time.Time `json:"since"`
	At    *time.Time `json:"at"`
	Epoch string     `json:"epoch"`
}

func newLossDoc(l topology.Loss) *lossDoc {
	d := &lossDoc{Nodes: l.Nodes, Vnodes: l.Vnodes, Namespaces: l.Namespaces}
	if l.Epoch != 0 {
		d.Epoch = topology.EpochString(l.Epoch)
	}
	at := func(millis int64) *time.Time {
		if millis == 0 {
			return nil
		}
		t := time.UnixMilli(millis).UTC()
		return &t
	}
	d.Since, d.At = at(l.SinceMillis), at(l.AtMillis)
	return d
}

func (d *lossDoc) write(w io.Writer) {
	since := ""
	if d.Since != nil {
		since = ", unhealthy since " + d.Since.Format(time.RFC3339)
	}
	fmt.Fprintf(w, "given up: %s%s\n%d vnodes may lose acknowledged writes of %s\n", strings.Join(d.Nodes, ", "), since, len(d.Vnodes), strings.Join(d.Namespaces, ", "))
}

// recover makes the control plane anew, or has living orchestrators give up what is lost.
func (a *App) recover(ctx context.Context, f recoverFlags) error {
	if len(f.vnodes) > 0 && !f.AcceptLoss {
		return usagef("--vnode is for --accept-loss only")
	}
	for _, o := range f.Orchestrators {
		if err := rpc.CheckAddress(o, true); err != nil {
			return usagef("--orchestrators: %w", err)
		}
	}
	at, err := a.resolve()
	if err != nil {
		return err
	}
	if f.Transport, err = at.transport(); err != nil {
		return err
	}
	f.Endpoints, f.Timeout, f.By, f.Now = at.Endpoints, a.flags.timeout, operator(), time.Now().UnixMilli()
	v, err := recovery.Look(ctx, f.Options)
	if err != nil {
		return err
	}
	if e := v.Refusal(); f.AcceptLoss && e != nil && e.Reason == "ORCHESTRATORS_ANSWER" {
		if len(f.Without) > 0 || len(f.Orchestrators) > 0 || f.TakeOver || f.file != "" {
			return usagef("the orchestrators live: --accept-loss goes with --vnode only")
		}
		return a.acceptLoss(ctx, f)
	}
	d := newRecoverDoc(v, f)
	if f.dryRun {
		if err := a.print(d, d.write); err != nil {
			return err
		}
		if d.refusal != nil {
			return d.refusal
		}
		return nil
	}
	if a.flags.output == outputTable {
		d.write(a.Stderr)
	}
	if d.refusal != nil {
		return d.refusal
	}
	if !f.yes {
		if err := a.confirmYes(fmt.Sprintf("seal the nodes and begin generation %d", d.Generation)); err != nil {
			return err
		}
	}
	s, err := v.Recover(ctx)
	if err != nil {
		return err
	}
	if err := writeRecovery(d.File, s); err != nil {
		return err
	}
	d.Done, d.Epoch = true, topology.EpochString(s.Topology.Epoch)
	return a.print(d, d.writeNext)
}

// operator says who runs kvctl.
func operator() string {
	name, host := "somebody", "this machine"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name + "@" + host
}

func newRecoverDoc(v *recovery.View, f recoverFlags) *recoverDoc {
	d := &recoverDoc{
		Cluster: v.Newest.ClusterID, Recovery: v.Seal.GetRecovery(), Generation: v.Seal.GetGeneration(), Resumed: v.Resumed,
		Epoch: topology.EpochString(v.Newest.Epoch), NewestAt: v.NewestAt, Nodes: []recoverNodeDoc{}, Without: []string{}, Orchestrators: []recoverOrchDoc{},
		File: f.file, refusal: v.Refusal(),
	}
	if d.File == "" {
		d.File = fmt.Sprintf("kvasir-recovery-g%d.json", d.Generation)
	}
	if path, err := filepath.Abs(d.File); err == nil {
		d.File = path
	}
	for i := range v.Newest.Nodes {
		n := &v.Newest.Nodes[i]
		doc := recoverNodeDoc{Name: n.Name, Incarnation: n.Incarnation}
		if got, ok := v.Answers[n.Incarnation]; ok {
			doc.Answers, doc.Epoch, doc.SealedFor = true, topology.EpochString(got.Topology.Epoch), got.State.GetSeal().GetRecovery()
		}
		d.Nodes = append(d.Nodes, doc)
	}
	slices.SortFunc(d.Nodes, func(a, b recoverNodeDoc) int { return compareNames(a.Name, b.Name) })
	for _, n := range v.Without {
		d.Without = append(d.Without, n.Name)
	}
	for _, o := range v.Orchestrators {
		d.Orchestrators = append(d.Orchestrators, recoverOrchDoc{o.Name, o.Address, o.There, o.What})
	}
	if f.AcceptLoss {
		if l := v.Loss(); len(l.Vnodes) > 0 {
			d.Loss = newLossDoc(l)
		}
	}
	return d
}

func (d *recoverDoc) write(w io.Writer) {
	fmt.Fprintf(w, "cluster %s, newest epoch %s (of %s)\n\n", d.Cluster, d.Epoch, d.NewestAt)
	nodes := newTable("NODE", ">#", "EPOCH", "")
	for _, n := range d.Nodes {
		what := ""
		switch {
		case slices.Contains(d.Without, n.Name):
			what = "is left behind"
		case !n.Answers:
			what = "does not answer"
		case n.SealedFor != "":
			what = "sealed for " + n.SealedFor
		}
		nodes.add(n.Name, n.Incarnation, n.Epoch, what)
	}
	nodes.write(w)
	fmt.Fprintln(w)
	orchs := newTable("ORCHESTRATOR", "ADDRESS", "")
	for _, o := range d.Orchestrators {
		orchs.add(o.Name, o.Address, o.What)
	}
	orchs.write(w)
	fmt.Fprintln(w)
	if d.Loss != nil {
		d.Loss.write(w)
	}
	verb := "begins"
	if d.Resumed {
		verb = "goes on with"
	}
	if d.refusal == nil {
		fmt.Fprintf(w, "recovery %s %s generation %d: it seals the nodes, and writes %s\n", d.Recovery, verb, d.Generation, d.File)
	}
}

func (d *recoverDoc) writeNext(w io.Writer) {
	fmt.Fprintf(w, `The nodes are sealed: they serve on, and wait for the orchestrators of generation %[1]d.
Start these now, each with an empty data_dir and with the file, for one set of orchestrators only:

  kvorch --config CONFIG --recover %[2]s
  kvctl dev start orch1 --recover %[2]s     (on a development cluster)

Then look at: kvctl cluster status
`, d.Generation, d.File)
}

// writeRecovery writes the file of a recovery so that it is there as a whole or not at all.
func writeRecovery(path string, s *topology.State) error {
	b, err := topology.EncodeRecovery(s)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".recovery-*")
	if err != nil {
		return fmt.Errorf("write the recovery file (the nodes are sealed; run this again with another --file): %w", err)
	}
	defer os.Remove(f.Name()) // gone already after a success
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write the recovery file (the nodes are sealed; run this again with another --file): %w", err)
	}
	return nil
}

// acceptLoss has living orchestrators give up what is lost.
func (a *App) acceptLoss(ctx context.Context, f recoverFlags) error {
	req := &adminv1.AcceptLossRequest{DryRun: true}
	for _, v := range f.vnodes {
		req.Vnodes = append(req.Vnodes, uint32(v))
	}
	ask := func() (resp *adminv1.AcceptLossResponse, _ error) {
		return resp, a.control(ctx, question{changes: !req.DryRun, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
			resp, err = adminv1.NewControlServiceClient(cc).AcceptLoss(ctx, req)
			return err
		}})
	}
	found, err := ask()
	if err != nil {
		return err
	}
	d := newLossDoc(topology.LossFromProto(found.GetLoss()))
	if len(d.Nodes) == 0 {
		a.warn("nothing needs to be given up: enough replicas of every vnode are alive")
		return a.print(d, func(io.Writer) {})
	}
	if f.dryRun {
		return a.print(d, d.write)
	}
	if a.flags.output == outputTable {
		d.write(a.Stderr)
	}
	if !f.yes {
		if err := a.confirmYes("give up " + strings.Join(d.Nodes, ", ") + " with their disks"); err != nil {
			return err
		}
	}
	req.DryRun, req.Epoch = false, found.GetEpoch()
	done, err := ask()
	if err != nil {
		return err
	}
	d = newLossDoc(topology.LossFromProto(done.GetLoss()))
	return a.print(d, func(w io.Writer) {
		d.write(w)
		fmt.Fprintf(w, "in epoch %s; their places are filled with what is left: see kvctl operation ls, kvctl cluster status\n", d.Epoch)
	})
}
