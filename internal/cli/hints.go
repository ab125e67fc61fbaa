package cli

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
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

// nodeHints is what a node said of the hints it keeps, or why it said nothing.
type nodeHints struct {
	*topology.Node
	*adminv1.ListHintsResponse
	err error
}

func (a *App) listHints(ctx context.Context, args []string, target string) error {
	s, err := a.status(ctx)
	if err != nil {
		return err
	}
	asked := make([]nodeHints, 0, len(s.nodes))
	for i := range s.nodes {
		asked = append(asked, nodeHints{Node: s.nodes[i].Node})
	}
	if len(args) > 0 {
		n, err := resolveNode(s.topology, args[0])
		if err != nil {
			return err
		}
		asked = []nodeHints{{Node: n}}
	}
	request := &adminv1.ListHintsRequest{}
	if target != "" {
		n, err := resolveNode(s.topology, target)
		if err != nil {
			return err
		}
		request.Target = n.Incarnation
	}
	if err := a.askHints(ctx, asked, request); err != nil {
		return err
	}
	var answered []nodeHints
	for _, n := range asked {
		if n.err == nil {
			answered = append(answered, n)
			continue
		}
		if len(asked) > 1 {
			a.warn("%s was not asked: %s", n.Name, n.err)
		}
	}
	if len(answered) == 0 && len(asked) > 0 {
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "%s: %s", asked[0].Name, asked[0].err)
	}
	return a.print(hintListDocs(s.topology, answered), func(w io.Writer) { writeHints(w, s.topology, answered) })
}

// askHints asks nodes, all at once.
func (a *App) askHints(ctx context.Context, nodes []nodeHints, request *adminv1.ListHintsRequest) error {
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
			n.ListHintsResponse, n.err = adminv1.NewRepairServiceClient(cc).ListHints(ctx, request)
		})
	}
	wg.Wait()
	return nil
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
			Node: n.Name, Records: n.GetCount(), SizeBytes: n.GetBytes(), MaxHints: n.GetMaxCount(), MaxBytes: n.GetMaxBytes(), MaxAgeMs: n.GetMaxAgeMs(),
			Dropped: n.GetDropped(), Expired: n.GetExpired(), SampledAt: millisDoc(n.GetSampledAtMs()), Hints: []hintGroupDoc{},
		}
		for _, g := range n.GetGroups() {
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
		for _, g := range n.GetGroups() {
			found = true
			age := time.Duration(int64(n.GetSampledAtMs())-int64(g.GetOldestMs())) * time.Millisecond
			name := g.GetNamespace()
			if name == "" {
				name = "(dropped)"
			}
			kept.add(n.Name, t.NodeName(g.GetTarget()), name, g.GetVnode(), countText(int64(g.GetCount())), sizeText(g.GetBytes()), durationText(max(age, 0)))
		}
		sums.add(n.Name, countText(int64(n.GetCount())), countText(int64(n.GetMaxCount())), sizeText(n.GetBytes()), sizeText(n.GetMaxBytes()),
			durationText(time.Duration(n.GetMaxAgeMs())*time.Millisecond), countText(int64(n.GetDropped())), countText(int64(n.GetExpired())))
	}
	if found {
		kept.write(w)
		fmt.Fprintln(w)
	}
	sums.write(w)
}
