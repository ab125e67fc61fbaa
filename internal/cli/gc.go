package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func (a *App) gcCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Show why deleted records are still on disk",
		Long: `Shows why deleted and expired records are still on disk. They are removed by themselves
once all replicas of their vnode have been found equal, about a minute after they died.`,
		Example: "  kvctl gc explain greeting",
	}
	f := &dataFlags{}
	var vnode uint32
	explain := &cobra.Command{
		Use:   "explain [KEY]",
		Short: "Name what keeps a dead record on disk",
		Long: `Names what keeps the dead record of a key on disk, or those of a whole vnode: a replica that
is down, that has not promised yet to take no older writes, or that has not been found
equal; hints that are still kept; a vnode that moves; or that the record died a moment ago.`,
		Example: `  kvctl gc explain greeting
  kvctl gc explain --vnode 17 -n orders -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &adminv1.ExplainCollectionRequest{Namespace: f.namespace}
			switch byVnode := cmd.Flags().Changed("vnode"); {
			case byVnode == (len(args) > 0):
				return usageError{errors.New("want either a key or --vnode")}
			case byVnode:
				r.Target = &adminv1.ExplainCollectionRequest_Vnode{Vnode: vnode}
			default:
				r.Target = &adminv1.ExplainCollectionRequest_Key{Key: []byte(args[0])}
			}
			return a.explainCollection(cmd.Context(), r)
		},
	}
	f.addNamespace(explain)
	explain.Flags().Uint32Var(&vnode, "vnode", 0, "all dead records of a vnode")
	cmd.AddCommand(explain)
	return cmd
}

// collectionAnswer is what one node says of a vnode's dead records, with the hints
// that it keeps.
type collectionAnswer struct {
	*adminv1.ExplainCollectionResponse
	hints []*adminv1.HintGroup
}

func (a *App) explainCollection(ctx context.Context, r *adminv1.ExplainCollectionRequest) error {
	t, nodes, err := askEach(ctx, a, nil, func(ctx context.Context, cc *grpc.ClientConn) (out collectionAnswer, err error) {
		c := adminv1.NewRepairServiceClient(cc)
		if out.ExplainCollectionResponse, err = c.ExplainCollection(ctx, r); err != nil {
			return out, err
		}
		hints, err := c.ListHints(ctx, &adminv1.ListHintsRequest{})
		for _, h := range hints.GetGroups() {
			if h.GetNamespace() == r.GetNamespace() && h.GetVnode() == out.GetVnode() {
				out.hints = append(out.hints, h)
			}
		}
		return out, err
	})
	if err != nil {
		return err
	}
	d := newCollectionDoc(t, r, nodes)
	return a.print(d, func(w io.Writer) { d.write(w, r) })
}

// collectionDoc is what keeps dead records on disk, as a document.
type collectionDoc struct {
	*keyDoc
	Namespace string `json:"namespace"`
	Vnode     uint32 `json:"vnode"`
	// Found and Dead are left out where a vnode was asked for.
	Found     *bool                  `json:"found,omitempty"`
	Dead      *bool                  `json:"dead,omitempty"`
	DeadSince *string                `json:"dead_since,omitempty"`
	PinnedBy  []string               `json:"pinned_by"`
	Replicas  []collectionReplicaDoc `json:"replicas"`
}

type collectionReplicaDoc struct {
	Node         string  `json:"node"`
	Incarnation  uint64  `json:"incarnation"`
	Reachable    bool    `json:"reachable"`
	Reason       string  `json:"reason,omitempty"`
	DeadRecords  uint64  `json:"dead_records"`
	OldestDeadAt *string `json:"oldest_dead_at"`
	PromisedAt   *string `json:"promised_at"`
	CertifiedAt  *string `json:"certified_at"`
}

// timestampDoc is the time of a timestamp, or nil for none.
func timestampDoc(ts uint64) *string {
	if ts == 0 {
		return nil
	}
	at := millisDoc(uint64(hlc.Timestamp(ts).Millis()))
	return &at
}

// newCollectionDoc makes one of what the nodes said: the vnode's leader knows best, the
// others add the hints that they keep.
func newCollectionDoc(t *topology.Topology, r *adminv1.ExplainCollectionRequest, nodes []answered[collectionAnswer]) collectionDoc {
	best := 0
	if ns := t.Namespace(r.GetNamespace()); ns != nil && int(nodes[0].answer.GetVnode()) < len(t.Ring) {
		vnode := nodes[0].answer.GetVnode()
		endpoints, _ := t.Endpoints(vnode, ns)
		leader := endpoints[int(vnode)%len(endpoints)]
		best = max(0, slices.IndexFunc(nodes, func(n answered[collectionAnswer]) bool { return n.Incarnation == leader }))
	}
	res := nodes[best].answer
	d := collectionDoc{Namespace: r.GetNamespace(), Vnode: res.GetVnode(), PinnedBy: append([]string{}, res.GetPinnedBy()...)}
	if r.GetKey() != nil {
		key, found, dead := keyDocOf(r.GetKey()), res.GetFound(), res.GetDead()
		d.keyDoc, d.Found, d.Dead, d.DeadSince = &key, &found, &dead, timestampDoc(res.GetDeadSince())
	}
	for i, n := range nodes {
		for _, h := range n.answer.hints {
			if i != best && len(d.PinnedBy) > 0 {
				d.PinnedBy = append(d.PinnedBy, fmt.Sprintf("%s keeps %d hints of this vnode for %s", n.Name, h.GetCount(), t.NodeName(h.GetTarget())))
			}
		}
	}
	for _, c := range res.GetReplicas() {
		d.Replicas = append(d.Replicas, collectionReplicaDoc{
			Node: c.GetName(), Incarnation: c.GetIncarnation(), Reachable: c.GetReachable(), Reason: c.GetReason(), DeadRecords: c.GetDeadRecords(),
			OldestDeadAt: timestampDoc(c.GetOldestDead()), PromisedAt: timestampDoc(c.GetPromise()), CertifiedAt: timestampDoc(c.GetCertificate()),
		})
	}
	return d
}

func (d *collectionDoc) write(w io.Writer, r *adminv1.ExplainCollectionRequest) {
	what := fmt.Sprintf("vnode %d of namespace %s", d.Vnode, d.Namespace)
	state := "nothing keeps its dead records on disk"
	if d.Found != nil {
		what = fmt.Sprintf("%s in vnode %d of namespace %s", quoted(r.GetKey()), d.Vnode, d.Namespace)
		switch {
		case !*d.Found:
			state = "no replica that answered has a record of it"
		case !*d.Dead:
			state = "it is neither deleted nor expired"
		default:
			state = "dead since " + *d.DeadSince
		}
	}
	if d.Found == nil && len(d.PinnedBy) > 0 {
		state = "dead records wait to be removed"
	}
	lines := []string{"what", what, "state", state}
	for i, p := range d.PinnedBy {
		lines = append(lines, [...]string{"pinned by", ""}[min(i, 1)], p)
	}
	fields(w, lines...)
	fmt.Fprintln(w)
	tab := newTable("REPLICA", ">DEAD", "OLDEST", "PROMISED", "CERTIFIED", "STATE")
	or := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	for _, c := range d.Replicas {
		state := "answers"
		if !c.Reachable {
			state = c.Reason
		}
		tab.add(c.Node, countText(int64(c.DeadRecords)), or(c.OldestDeadAt), or(c.PromisedAt), or(c.CertifiedAt), state)
	}
	tab.write(w)
}
