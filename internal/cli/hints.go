package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func (a *App) hintsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hints",
		Short: "Show the records kept for nodes that were down",
		Long: `Shows hints: records that a node keeps for another one that could not be reached, and
brings to it once it is back.`,
		Example: "  kvctl hints ls",
	}
	var target string
	ls := &cobra.Command{
		Use:   "ls [NODE]",
		Short: "List what nodes keep for others, by vnode",
		Long: `Lists what nodes keep for others: every node, or the one given, is asked itself. Oldest
is a bound: no hint of the vnode has been kept for longer. Below stand each node's bounds
and what became of hints since its process started: those dropped found no room, those
expired grew too old. Both left their vnodes to repair.`,
		Example: `  kvctl hints ls
  kvctl hints ls node2
  kvctl hints ls --target node3
  kvctl hints ls -o json`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.listHints(cmd.Context(), args, target) },
	}
	ls.Flags().StringVar(&target, "target", "", "only what is kept for this node")
	cmd.AddCommand(ls)
	return cmd
}

// nodeHints is what a node said of the hints it keeps.
type nodeHints = answered[*adminv1.ListHintsResponse]

func (a *App) listHints(ctx context.Context, name []string, target string) error {
	request := &adminv1.ListHintsRequest{}
	if target != "" {
		t, err := a.topology(ctx)
		if err != nil {
			return err
		}
		n, err := resolveNode(t, target)
		if err != nil {
			return err
		}
		request.Target = n.Incarnation
	}
	t, nodes, err := askEach(ctx, a, name, func(ctx context.Context, cc *grpc.ClientConn) (*adminv1.ListHintsResponse, error) {
		return adminv1.NewRepairServiceClient(cc).ListHints(ctx, request)
	})
	if err != nil {
		return err
	}
	return a.print(hintListDocs(t, nodes), func(w io.Writer) { writeHints(w, t, nodes) })
}

// hintListDoc is what a node keeps, as a document.
type hintListDoc struct {
	Node      string         `json:"node"`
	Records   uint64         `json:"records"`
	SizeBytes uint64         `json:"size_bytes"`
	MaxHints  uint64         `json:"max_hints"`
	MaxBytes  uint64         `json:"max_hint_bytes"`
	MaxAgeMs  uint64         `json:"max_hint_age_ms"`
	Dropped   uint64         `json:"dropped"`
	Expired   uint64         `json:"expired"`
	SampledAt string         `json:"sampled_at"`
	Hints     []hintGroupDoc `json:"hints"`
}

type hintGroupDoc struct {
	For       string `json:"for"`
	Namespace string `json:"namespace"`
	Vnode     uint32 `json:"vnode"`
	Records   uint64 `json:"records"`
	SizeBytes uint64 `json:"size_bytes"`
	OldestAt  string `json:"oldest_at"`
}

func hintListDocs(t *topology.Topology, nodes []nodeHints) []hintListDoc {
	docs := []hintListDoc{}
	for _, n := range nodes {
		d := hintListDoc{
			Node: n.Name, Records: n.answer.GetCount(), SizeBytes: n.answer.GetBytes(), MaxHints: n.answer.GetMaxCount(), MaxBytes: n.answer.GetMaxBytes(), MaxAgeMs: n.answer.GetMaxAgeMs(),
			Dropped: n.answer.GetDropped(), Expired: n.answer.GetExpired(), SampledAt: millisDoc(n.answer.GetSampledAtMs()), Hints: []hintGroupDoc{},
		}
		for _, g := range n.answer.GetGroups() {
			d.Hints = append(d.Hints, hintGroupDoc{t.NodeName(g.GetTarget()), g.GetNamespace(), g.GetVnode(), g.GetCount(), g.GetBytes(), millisDoc(g.GetOldestMs())})
		}
		docs = append(docs, d)
	}
	return docs
}

func writeHints(w io.Writer, t *topology.Topology, nodes []nodeHints) {
	kept := newTable("NODE", "FOR", "NAMESPACE", ">VNODE", ">RECORDS", ">SIZE", ">OLDEST")
	sums := newTable("NODE", ">RECORDS", ">OF", ">SIZE", ">OF", ">MAX AGE", ">DROPPED", ">EXPIRED")
	found := false
	for _, n := range nodes {
		for _, g := range n.answer.GetGroups() {
			found = true
			age := time.Duration(int64(n.answer.GetSampledAtMs())-int64(g.GetOldestMs())) * time.Millisecond
			name := g.GetNamespace()
			if name == "" {
				name = "(dropped)"
			}
			kept.add(n.Name, t.NodeName(g.GetTarget()), name, g.GetVnode(), countText(int64(g.GetCount())), sizeText(g.GetBytes()), durationText(max(age, 0)))
		}
		sums.add(n.Name, countText(int64(n.answer.GetCount())), countText(int64(n.answer.GetMaxCount())), sizeText(n.answer.GetBytes()), sizeText(n.answer.GetMaxBytes()),
			durationText(time.Duration(n.answer.GetMaxAgeMs())*time.Millisecond), countText(int64(n.answer.GetDropped())), countText(int64(n.answer.GetExpired())))
	}
	if found {
		kept.write(w)
		fmt.Fprintln(w)
	}
	sums.write(w)
}
