package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/hlc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func (a *App) repairCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "Show and steer what makes replicas equal again",
		Long: `Shows and steers repair. Every node compares the vnodes it leads with their other replicas,
round after round, and exchanges what differs. It runs by itself; nothing has to be started.`,
		Example: `  kvctl repair status
  kvctl repair start`,
	}
	var vnodes bool
	status := &cobra.Command{
		Use:   "status [NODE]",
		Short: "Show how far repair has come",
		Long: `Shows how far repair has come, of every node or the one given. A round compares every
vnode that the node leads once. Sent and received count the records that replicas lacked
since the node's process started, read the bytes it has read to compare, rot how often
damaged bytes were met on its disk. Dirty vnodes are
those for which hints were lost; they are compared before others.`,
		Example: `  kvctl repair status
  kvctl repair status node2 --vnodes
  kvctl repair status -o json`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.repairStatus(cmd.Context(), args, vnodes) },
	}
	status.Flags().BoolVar(&vnodes, "vnodes", false, "every vnode too")
	var scrub bool
	start := &cobra.Command{
		Use:   "start [NODE]",
		Short: "End a pause, and begin a round at once",
		Long: `Ends a pause, and begins a round at once that does not wait between vnodes, on every node
or the one given. With --scrub it reads all data on disk, too, to find bit rot; otherwise
that is done once a week.`,
		Example: "  kvctl repair start\n  kvctl repair start node2 --scrub",
		RunE: func(cmd *cobra.Command, args []string) error {
			what := "begins a round"
			if scrub {
				what = "begins a round and a scrub"
			}
			return a.steerRepair(cmd.Context(), args, what, func(ctx context.Context, c adminv1.RepairServiceClient) error {
				_, err := c.StartRepair(ctx, &adminv1.StartRepairRequest{Scrub: scrub})
				return err
			})
		},
	}
	start.Flags().BoolVar(&scrub, "scrub", false, "read all data on disk, too, to find bit rot")
	cmd.AddCommand(status, start,
		&cobra.Command{
			Use:   "pause [NODE]",
			Short: "Stop comparing until start, or the next start of the process",
			Long: `Stops comparing replicas, on every node or the one given, until repair start or the next
start of the node's process. Deleted records stay on disk meanwhile.`,
			Example: "  kvctl repair pause node2",
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.steerRepair(cmd.Context(), args, "pauses", func(ctx context.Context, c adminv1.RepairServiceClient) error {
					_, err := c.PauseRepair(ctx, &adminv1.PauseRepairRequest{})
					return err
				})
			},
		},
	)
	return cmd
}

// repairDoc is how far a node's repair has come, as a document.
type repairDoc struct {
	Node            string           `json:"node"`
	Paused          bool             `json:"paused"`
	Rounds          uint64           `json:"rounds"`
	LastRoundAgeMs  *uint64          `json:"last_round_age_ms"`
	LastRoundTookMs *uint64          `json:"last_round_took_ms"`
	BytesRead       uint64           `json:"bytes_read"`
	RecordsSent     uint64           `json:"records_sent"`
	RecordsReceived uint64           `json:"records_received"`
	DirtyVnodes     uint64           `json:"dirty_vnodes"`
	ScrubRounds     uint64           `json:"scrub_rounds"`
	ScrubBytes      uint64           `json:"scrub_bytes"`
	ScrubProgress   float64          `json:"scrub_progress"`
	Corruptions     uint64           `json:"corruptions"`
	Vnodes          []vnodeRepairDoc `json:"vnodes,omitempty"`
}

type vnodeRepairDoc struct {
	Namespace   string  `json:"namespace"`
	Vnode       uint32  `json:"vnode"`
	State       string  `json:"state"`
	Reason      string  `json:"reason,omitempty"`
	AgeMs       uint64  `json:"age_ms"`
	Records     uint64  `json:"records"`
	Differences uint64  `json:"differences"`
	Dirty       bool    `json:"dirty"`
	CertifiedAt *string `json:"certified_at"`
}

func (a *App) repairStatus(ctx context.Context, name []string, vnodes bool) error {
	_, nodes, err := askEach(ctx, a, name, func(ctx context.Context, cc *grpc.ClientConn) (*adminv1.GetRepairStatusResponse, error) {
		return adminv1.NewRepairServiceClient(cc).GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{Vnodes: vnodes})
	})
	if err != nil {
		return err
	}
	docs := []repairDoc{}
	for _, n := range nodes {
		docs = append(docs, newRepairDoc(n.Name, n.answer))
	}
	return a.print(docs, func(w io.Writer) { writeRepair(w, nodes, vnodes) })
}

func newRepairDoc(node string, r *adminv1.GetRepairStatusResponse) repairDoc {
	d := repairDoc{
		Node: node, Paused: r.GetPaused(), Rounds: r.GetRounds(), BytesRead: r.GetBytesRead(),
		RecordsSent: r.GetRecordsSent(), RecordsReceived: r.GetRecordsReceived(), DirtyVnodes: r.GetDirtyVnodes(),
		ScrubRounds: r.GetScrubRounds(), ScrubBytes: r.GetScrubBytes(), ScrubProgress: r.GetScrubProgress(), Corruptions: r.GetCorruptions(),
	}
	if r.GetRounds() > 0 {
		age, took := r.GetLastRoundAgeMs(), r.GetLastRoundTookMs()
		d.LastRoundAgeMs, d.LastRoundTookMs = &age, &took
	}
	for _, v := range r.GetVnodes() {
		doc := vnodeRepairDoc{
			Namespace: v.GetNamespace(), Vnode: v.GetVnode(), State: repairState(v.GetState()), Reason: v.GetReason(), AgeMs: v.GetAgeMs(),
			Records: v.GetRecords(), Differences: v.GetDifferences(), Dirty: v.GetDirty(),
		}
		if c := v.GetCertificate(); c != 0 {
			at := millisDoc(uint64(hlc.Timestamp(c).Millis()))
			doc.CertifiedAt = &at
		}
		d.Vnodes = append(d.Vnodes, doc)
	}
	return d
}

// repairState names the state of a vnode.
func repairState(s adminv1.VnodeRepair_State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

func writeRepair(w io.Writer, nodes []answered[*adminv1.GetRepairStatusResponse], vnodes bool) {
	sums := newTable("NODE", "REPAIR", ">ROUNDS", ">LAST", ">TOOK", ">READ", ">SENT", ">RECEIVED", ">DIRTY", "SCRUB", ">ROT")
	for _, n := range nodes {
		r := n.answer
		state, last, took := "runs", "-", "-"
		if r.GetPaused() {
			state = "paused"
		}
		if r.GetRounds() > 0 {
			last, took = durationText(millis(r.GetLastRoundAgeMs()))+" ago", durationText(millis(r.GetLastRoundTookMs()))
		}
		scrub := fmt.Sprintf("%d done", r.GetScrubRounds())
		if p := r.GetScrubProgress(); p > 0 {
			scrub = fmt.Sprintf("%.0f%%", 100*p)
		}
		sums.add(n.Name, state, r.GetRounds(), last, took, sizeText(r.GetBytesRead()), countText(int64(r.GetRecordsSent())), countText(int64(r.GetRecordsReceived())), r.GetDirtyVnodes(), scrub, r.GetCorruptions())
	}
	sums.write(w)
	if !vnodes {
		return
	}
	fmt.Fprintln(w)
	each := newTable("NODE", "NAMESPACE", ">VNODE", "STATE", ">AGE", ">RECORDS", ">MENDED", "REASON")
	for _, n := range nodes {
		for _, v := range n.answer.GetVnodes() {
			state, age := repairState(v.GetState()), "-"
			if v.GetDirty() {
				state += ", dirty"
			}
			if v.GetState() != adminv1.VnodeRepair_STATE_WAITING {
				age = durationText(millis(v.GetAgeMs()))
			}
			each.add(n.Name, v.GetNamespace(), v.GetVnode(), state, age, countText(int64(v.GetRecords())), countText(int64(v.GetDifferences())), v.GetReason())
		}
	}
	each.write(w)
}

// steeredDoc says of a node that it did as it was told.
type steeredDoc struct {
	Node   string `json:"node"`
	Repair string `json:"repair"`
}

func (a *App) steerRepair(ctx context.Context, name []string, what string, steer func(context.Context, adminv1.RepairServiceClient) error) error {
	_, nodes, err := askEach(ctx, a, name, func(ctx context.Context, cc *grpc.ClientConn) (struct{}, error) {
		return struct{}{}, steer(ctx, adminv1.NewRepairServiceClient(cc))
	})
	if err != nil {
		return err
	}
	docs := []steeredDoc{}
	for _, n := range nodes {
		docs = append(docs, steeredDoc{n.Name, what})
	}
	return a.print(docs, func(w io.Writer) {
		for _, n := range nodes {
			fmt.Fprintf(w, "%s %s\n", n.Name, what)
		}
	})
}
