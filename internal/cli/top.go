package cli

import (
	"cmp"
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

// topTimeout bounds how long a look waits for nodes, so that one that hangs does not hold up
// what the others show.
const topTimeout = time.Second

// home moves to the beginning of a terminal, and empties it.
const home = "\x1b[H\x1b[2J"

func (a *App) topCommand() *cobra.Command {
	interval, once, keys := time.Duration(0), false, 10
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show live what nodes do, and which keys are hot",
		Long: `Shows what every node does: CPU over its allowance (mean of 60 s), memory, the reads,
writes and scans that it coordinates a second with their p50 and p99 (of the last 30 to
60 s), and how many are under way. Below stand the hot keys: those that most requests were
for in the last 10 to 20 s, with what they were asked for at least. A sample is counted, so
keys that are asked for seldom are not named.

On a terminal it looks again every --interval until Ctrl-C; otherwise, and with --once,
-o json or -o yaml, once. Rates are of the time between two looks.`,
		Example: `  kvctl top
  kvctl top --interval 5s --keys 20
  kvctl top --once -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.top(cmd.Context(), interval, once || !a.Terminal || a.flags.output != outputTable, keys)
		},
	}
	fl := cmd.Flags()
	fl.Var(durationFlag(&interval, 2*time.Second, 100*time.Millisecond), "interval", "time between two looks")
	fl.BoolVar(&once, "once", false, "show it once")
	fl.Var(countFlag(&keys, 0, 256), "keys", "at most so many hot keys (default 10)")
	return cmd
}

// sight is what nodes said at one look.
type sight struct {
	topology *topology.Topology
	nodes    []answered[*topAnswer]
	at       time.Time
}

// topAnswer is what one node said.
type topAnswer struct {
	status *adminv1.NodeStatus
	hot    *adminv1.GetHotKeysResponse
}

func (a *App) top(ctx context.Context, interval time.Duration, once bool, keys int) error {
	before, err := a.glance(ctx)
	if err != nil {
		return err
	}
	wait := interval
	if once {
		wait = min(interval, time.Second)
	}
	for {
		select {
		case <-ctx.Done():
			if once {
				return ctx.Err()
			}
			return nil // it was told to stop
		case <-time.After(wait):
		}
		now, err := a.glance(ctx)
		switch {
		case ctx.Err() != nil && !once:
			return nil
		case err != nil && once:
			return err
		case err != nil:
			fmt.Fprintf(a.Stdout, "%skvctl: %v; trying again\n", home, err)
			continue
		}
		doc := newTopDoc(now, before, keys)
		if once {
			return a.print(doc, doc.write)
		}
		fmt.Fprint(a.Stdout, home)
		if err := a.print(doc, doc.write); err != nil {
			return err
		}
		before = now
	}
}

// glance asks every node. One that does not answer is shown as such.
func (a *App) glance(ctx context.Context) (*sight, error) {
	t, err := a.topology(ctx)
	if err != nil {
		return nil, err
	}
	s := &sight{topology: t, at: time.Now()}
	for i := range t.Nodes {
		s.nodes = append(s.nodes, answered[*topAnswer]{Node: &t.Nodes[i]})
	}
	slices.SortStableFunc(s.nodes, func(a, b answered[*topAnswer]) int { return compareNames(a.Name, b.Name) })
	err = askAll(ctx, a, s.nodes, min(a.flags.timeout, topTimeout), func(ctx context.Context, cc *grpc.ClientConn) (*topAnswer, error) {
		c := adminv1.NewStatusServiceClient(cc)
		status, err := c.GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
		if err != nil {
			return nil, err
		}
		hot, err := c.GetHotKeys(ctx, &adminv1.GetHotKeysRequest{Limit: 256})
		if err != nil && rpc.AsError(err).Code == codes.Unimplemented {
			err = nil // older software names no keys
		}
		return &topAnswer{status.GetStatus(), hot}, err
	})
	return s, err
}

// topDoc is a look as a document.
type topDoc struct {
	PerSecond number       `json:"per_second"`
	Nodes     []topNodeDoc `json:"nodes"`
	HotKeys   []hotKeyDoc  `json:"hot_keys"`
}

type topNodeDoc struct {
	Name        string   `json:"name"`
	Incarnation uint64   `json:"incarnation"`
	State       string   `json:"state"`
	Problem     string   `json:"problem,omitempty"`
	CPU         number   `json:"cpu_utilization"`
	MemoryBytes uint64   `json:"memory_bytes"`
	InFlight    uint32   `json:"requests_in_flight"`
	Gets        topOpDoc `json:"gets"`
	Puts        topOpDoc `json:"puts"`
	Scans       topOpDoc `json:"scans"`
}

type topOpDoc struct {
	PerSecond number  `json:"per_second"`
	P50MS     float64 `json:"p50_ms"`
	P99MS     float64 `json:"p99_ms"`
	p50, p99  uint64
}

type hotKeyDoc struct {
	Namespace string `json:"namespace"`
	keyDoc
	KeyBytes        uint32 `json:"key_bytes"`
	ReadsPerSecond  number `json:"reads_per_second"`
	WritesPerSecond number `json:"writes_per_second"`
	// Share is that of all keys asked for, 0 to 1.
	Share number `json:"share"`
	key   []byte
}

func newTopDoc(now, before *sight, keys int) *topDoc {
	doc := &topDoc{Nodes: []topNodeDoc{}}
	earlier := map[uint64]*adminv1.NodeStatus{}
	for _, n := range before.nodes {
		if n.err == nil {
			earlier[n.Incarnation] = n.answer.status
		}
	}
	for _, n := range now.nodes {
		if n.err != nil {
			doc.Nodes = append(doc.Nodes, topNodeDoc{Name: n.Name, Incarnation: n.Incarnation, State: "unknown", Problem: rpc.AsError(n.err).Message})
			continue
		}
		st, was := n.answer.status, earlier[n.Incarnation]
		between := time.Duration(int64(st.GetSampledAtMs()-was.GetSampledAtMs())) * time.Millisecond // by the node's clock
		rate := func(now, was *adminv1.OperationStats) topOpDoc {
			out := topOpDoc{PerSecond: number(now.GetPerSecond()), P50MS: float64(now.GetP50Us()) / 1000, P99MS: float64(now.GetP99Us()) / 1000, p50: now.GetP50Us(), p99: now.GetP99Us()}
			// Else it was started anew, or its clock was set.
			if was != nil && now.GetTotal() >= was.GetTotal() && between > 0 {
				out.PerSecond = number(float64(now.GetTotal()-was.GetTotal()) / between.Seconds())
			}
			return out
		}
		d := topNodeDoc{
			Name: n.Name, Incarnation: n.Incarnation, State: stateText(st.GetState()), Problem: st.GetReason(), CPU: number(st.GetCpuUtilization()),
			MemoryBytes: st.GetMemoryBytes(), InFlight: st.GetRequestsInFlight(),
			Gets: rate(st.GetGet(), was.GetGet()), Puts: rate(st.GetPut(), was.GetPut()), Scans: rate(st.GetScan(), was.GetScan()),
		}
		doc.PerSecond += d.Gets.PerSecond + d.Puts.PerSecond + d.Scans.PerSecond
		doc.Nodes = append(doc.Nodes, d)
	}
	doc.HotKeys = now.hotKeys(keys)
	return doc
}

// hotKeys adds up what nodes say of keys.
func (s *sight) hotKeys(limit int) []hotKeyDoc {
	type id struct {
		namespace uint32
		key       string
		bytes     uint32
	}
	sum, total := map[id]*hotKeyDoc{}, 0.0
	for _, n := range s.nodes {
		if n.err != nil {
			continue
		}
		total += n.answer.hot.GetPerSecond()
		for _, k := range n.answer.hot.GetKeys() {
			of := id{k.GetNamespaceId(), string(k.GetKey()), k.GetKeyBytes()}
			d := sum[of]
			if d == nil {
				name := fmt.Sprintf("#%d", k.GetNamespaceId()) // dropped
				if ns := s.topology.NamespaceByID(k.GetNamespaceId()); ns != nil {
					name = ns.Name
				}
				d = &hotKeyDoc{Namespace: name, keyDoc: keyDocOf(k.GetKey()), KeyBytes: k.GetKeyBytes(), key: k.GetKey()}
				sum[of] = d
			}
			d.ReadsPerSecond += number(k.GetReadsPerSecond())
			d.WritesPerSecond += number(k.GetWritesPerSecond())
		}
	}
	out := []hotKeyDoc{}
	for _, d := range sum {
		d.Share = number(float64(d.ReadsPerSecond+d.WritesPerSecond) / max(total, 1))
		out = append(out, *d)
	}
	slices.SortFunc(out, func(a, b hotKeyDoc) int {
		return cmp.Or(cmp.Compare(b.ReadsPerSecond+b.WritesPerSecond, a.ReadsPerSecond+a.WritesPerSecond), slices.Compare(a.key, b.key))
	})
	return out[:min(limit, len(out))]
}

// topKeyWidth is how many bytes of a key are shown.
const topKeyWidth = 40

func (d *topDoc) write(w io.Writer) {
	fmt.Fprintf(w, "%s, %s operations/s\n\n", plural(len(d.Nodes), "node"), rateText(float64(d.PerSecond)))
	t := newTable("NODE", "STATE", ">CPU", ">MEMORY", ">IN FLIGHT", ">GETS/S", ">P50", ">P99", ">PUTS/S", ">P50", ">P99", ">SCANS/S")
	for _, n := range d.Nodes {
		if n.State == "unknown" {
			t.add(n.Name, n.State, "", "", "", "", "", "", "", "", "", "")
			continue
		}
		t.add(n.Name, n.State, fmt.Sprintf("%.0f%%", n.CPU*100), sizeText(n.MemoryBytes), n.InFlight,
			rateText(float64(n.Gets.PerSecond)), microText(n.Gets.p50), microText(n.Gets.p99),
			rateText(float64(n.Puts.PerSecond)), microText(n.Puts.p50), microText(n.Puts.p99), rateText(float64(n.Scans.PerSecond)))
	}
	t.write(w)
	for _, n := range d.Nodes {
		if n.Problem != "" {
			fmt.Fprintf(w, "%s: %s\n", n.Name, n.Problem)
		}
	}
	if len(d.HotKeys) == 0 {
		fmt.Fprintf(w, "\nno hot keys\n")
		return
	}
	fmt.Fprintln(w)
	t = newTable("HOT KEY", "NAMESPACE", ">READS/S", ">WRITES/S", ">SHARE")
	for _, k := range d.HotKeys {
		text := shortened(k.key, topKeyWidth)
		if int(k.KeyBytes) > len(k.key) {
			text = fmt.Sprintf("%s… (%s)", quoted(k.key[:min(len(k.key), topKeyWidth)]), sizeText(uint64(k.KeyBytes)))
		}
		t.add(text, k.Namespace, rateText(float64(k.ReadsPerSecond)), rateText(float64(k.WritesPerSecond)), fmt.Sprintf("%.1f%%", k.Share*100))
	}
	t.write(w)
}
