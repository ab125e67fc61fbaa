package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// watchEvery is how often --watch looks again.
const watchEvery = 2 * time.Second

func (a *App) clusterCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "cluster", Short: "Show the cluster as a whole, or restart it", Example: "  kvctl cluster status --watch\n  kvctl cluster roll --dry-run",
	}
	var watch bool
	status := &cobra.Command{
		Use:   "status",
		Short: "Show nodes, orchestrators and their health",
		Long: `Shows nodes, orchestrators and their health. It works when every orchestrator is dead:
a node then tells what it knows.`,
		Example: `  kvctl cluster status
  kvctl cluster status --watch
  kvctl cluster status -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch && a.flags.output != outputTable {
				return usagef("--watch and --output %s are both given: a document is written once", a.flags.output)
			}
			if watch {
				return a.watchStatus(cmd.Context())
			}
			s, err := a.status(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(s.doc(), s.write)
		},
	}
	status.Flags().BoolVar(&watch, "watch", false, "look again every "+durationText(watchEvery)+" until interrupted")
	cmd.AddCommand(status, a.rollCommand())
	return cmd
}

// watchStatus shows the status again and again. What goes wrong is shown in its
// place: the cluster may come back.
func (a *App) watchStatus(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		s, err := a.status(ctx)
		if ctx.Err() != nil {
			break
		}
		var page bytes.Buffer
		if a.Terminal {
			page.WriteString("\x1b[H\x1b[2J") // home, clear
		}
		if err != nil {
			fmt.Fprintln(&page, err)
		} else {
			s.write(&page)
		}
		if !a.Terminal {
			page.WriteByte('\n')
		}
		if _, err := a.Stdout.Write(page.Bytes()); err != nil {
			return fmt.Errorf("write the answer: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	return nil
}

// clusterDoc is a cluster's status as a document.
type clusterDoc struct {
	ClusterID             string            `json:"cluster_id"`
	Epoch                 uint64            `json:"epoch"`
	Formed                bool              `json:"formed"`
	FoundingNodes         int               `json:"founding_nodes"`
	Vnodes                uint32            `json:"vnodes"`
	AnsweredBy            string            `json:"answered_by"`
	ControlPlaneAvailable bool              `json:"control_plane_available"`
	Conditions            []conditionDoc    `json:"conditions"`
	Nodes                 []nodeDoc         `json:"nodes"`
	Orchestrators         []orchestratorDoc `json:"orchestrators"`
	Namespaces            []namespaceDoc    `json:"namespaces"`
	// Losses are what was given up for lost, oldest first.
	Losses []*lossDoc `json:"losses"`
}

// conditionDoc is something that holds for a while, such as a lack of redundancy.
type conditionDoc struct {
	Kind  string `json:"kind"`
	Text  string `json:"text"`
	Since string `json:"since"`
}

type orchestratorDoc struct {
	Name            string `json:"name"`
	Reachable       bool   `json:"reachable"`
	State           string `json:"state"`
	Leader          string `json:"leader"`
	Term            uint64 `json:"term"`
	AppliedIndex    uint64 `json:"applied_index"`
	Epoch           uint64 `json:"epoch"`
	UptimeMs        uint64 `json:"uptime_ms"`
	LeaderContactMs uint64 `json:"leader_contact_ms"`
	Software        string `json:"software"`
}

func (s *clusterStatus) doc() clusterDoc {
	t := s.topology
	d := clusterDoc{
		ClusterID: t.ClusterID, Epoch: t.Epoch, Formed: t.Formed(), FoundingNodes: t.FoundingNodes, Vnodes: t.Vnodes,
		AnsweredBy: s.answeredBy, ControlPlaneAvailable: s.controlled,
		Conditions: []conditionDoc{}, Nodes: s.nodeDocs(), Orchestrators: []orchestratorDoc{}, Namespaces: []namespaceDoc{}, Losses: []*lossDoc{},
	}
	for _, c := range s.conditions {
		d.Conditions = append(d.Conditions, conditionDoc{c.GetKind(), c.GetText(), millisDoc(c.GetSinceMs())})
	}
	for _, o := range s.orchestrators {
		st := o.GetStatus()
		d.Orchestrators = append(d.Orchestrators, orchestratorDoc{
			Name: o.GetName(), Reachable: o.GetReachable(), State: raftState(o), Leader: st.GetLeader(), Term: st.GetTerm(),
			AppliedIndex: st.GetAppliedIndex(), Epoch: st.GetEpoch(), UptimeMs: st.GetUptimeMs(),
			LeaderContactMs: st.GetLeaderContactMs(), Software: st.GetSoftware(),
		})
	}
	for _, l := range s.losses {
		d.Losses = append(d.Losses, newLossDoc(l))
	}
	for i := range t.Namespaces {
		d.Namespaces = append(d.Namespaces, namespaceDocOf(&t.Namespaces[i]))
	}
	return d
}

func raftState(o *adminv1.ObservedOrchestrator) string {
	if state := o.GetStatus().GetRaftState(); state != "" && o.GetReachable() {
		return state
	}
	return "unknown"
}

// write writes the status for people.
func (s *clusterStatus) write(w io.Writer) {
	t := s.topology
	ring := fmt.Sprintf("%s on %s", plural(int(t.Vnodes), "vnode"), plural(len(t.Members()), "node"))
	if !t.Formed() {
		ring = fmt.Sprintf("not formed: %d of %d founding nodes have registered", t.DataNodes(), t.FoundingNodes)
	}
	control := "answered by " + s.answeredBy
	if !s.controlled {
		control = fmt.Sprintf("no orchestrator answers: reads and writes go on, nothing can be changed (answered by %s)", s.answeredBy)
	}
	fields(w, "cluster", t.ClusterID, "epoch", topology.EpochString(t.Epoch), "ring", ring, "control", control)
	if len(s.nodes) > 0 {
		fmt.Fprintln(w)
		s.nodeTable().write(w)
		s.writeReasons(w)
	}
	for i, c := range s.conditions {
		if i == 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintln(w, c.GetText())
	}
	if len(s.orchestrators) > 0 {
		fmt.Fprintln(w)
		s.orchestratorTable().write(w)
	}
	if len(t.Namespaces) > 0 {
		fmt.Fprintln(w)
		writeNamespaces(w, t.Namespaces)
	}
	for _, l := range s.losses {
		fmt.Fprintf(w, "\nepoch %s, %s: %s\n", topology.EpochString(l.Epoch), time.UnixMilli(l.AtMillis).UTC().Format(time.RFC3339), l.Describe())
	}
}

func (s *clusterStatus) nodeTable() *table {
	tab := newTable("NODE", "ROLE", "ZONE", "STATE", "HEALTH", ">SLOTS", ">EPOCH", ">CPU", ">MEMORY", ">DISK", ">OPS/S", ">AGE", "VERSION")
	slots := s.topology.SlotCounts(quorum.MaxN)
	for i := range s.nodes {
		n := &s.nodes[i]
		cells := []any{n.Name, n.Role, n.Zone, n.stateText(), n.healthText(), slots[n.Incarnation]}
		if st := n.status; st != nil {
			cells = append(cells, topology.EpochString(st.GetEpoch()), cpuText(st), sizeText(st.GetMemoryBytes()),
				sizeText(st.GetDiskUsedBytes()), rateText(operations(st)), durationText(n.age), st.GetSoftware())
		} else {
			cells = append(cells, "-", "-", "-", "-", "-", "-", "-")
		}
		tab.add(cells...)
	}
	return tab
}

// writeReasons says why nodes are down, whose clock is off and who is being filled, below a table of
// nodes.
func (s *clusterStatus) writeReasons(w io.Writer) {
	for i := range s.nodes {
		n := &s.nodes[i]
		if why := n.down(); why != "" {
			fmt.Fprintf(w, "%s is down: %s\n", n.Name, strings.TrimSuffix(why, ": "))
		} else if problem := clockProblem(n.status); problem != "" {
			fmt.Fprintf(w, "%s %s\n", n.Name, problem)
		} else if n.reason != "" {
			fmt.Fprintf(w, "%s is healthy, but %s\n", n.Name, n.reason)
		}
		if text := fillingText(n.status); text != "" {
			fmt.Fprintf(w, "%s is being filled: %s\n", n.Name, text)
		}
	}
}

func (s *clusterStatus) orchestratorTable() *table {
	tab := newTable("ORCHESTRATOR", "STATE", ">TERM", ">EPOCH", ">UPTIME", ">HEARD LEADER", "VERSION")
	for _, o := range s.orchestrators {
		st := o.GetStatus()
		if !o.GetReachable() || st == nil {
			tab.add(o.GetName(), "does not answer", "-", "-", "-", "-", "-")
			continue
		}
		heard := durationText(time.Duration(st.GetLeaderContactMs()) * time.Millisecond)
		if st.GetRaftState() == "leader" {
			heard = "-"
		}
		tab.add(o.GetName(), st.GetRaftState(), st.GetTerm(), topology.EpochString(st.GetEpoch()),
			durationText(time.Duration(st.GetUptimeMs())*time.Millisecond), heard, st.GetSoftware())
	}
	return tab
}
