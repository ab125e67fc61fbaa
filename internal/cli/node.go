package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

func (a *App) nodeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Show the cluster's nodes, and have them come and go",
		Long: `Shows the cluster's nodes, and moves their slots elsewhere. A node is given by its name,
or by its incarnation as #17: the number that the cluster hands out once for a data
directory.`,
		Example: `  kvctl node ls
  kvctl node status node2
  kvctl node drain node2 --wait`,
	}
	cmd.AddCommand(a.nodeOperations()...)
	cmd.AddCommand(
		&cobra.Command{
			Use: "ls", Short: "List the nodes with their addresses", Example: "  kvctl node ls -o json",
			RunE: func(cmd *cobra.Command, _ []string) error {
				s, err := a.status(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(s.nodeDocs(), func(w io.Writer) {
					s.addressTable().write(w)
					s.writeReasons(w)
				})
			},
		},
		&cobra.Command{
			Use:   "status [NODE]",
			Short: "Show how busy nodes are, and whether they are well",
			Long: `Shows how busy nodes are, and whether they are well: CPU over its allowance (mean of
60 s), memory, disk, operations a second with their p50 and p99, queues, hints kept for
others, and the clock against the median of the node's peers. Age is how old the figures
are; a node whose figures are older than 10 s is asked directly.

Of one node it shows why it is taken for healthy or not, and since when: the orchestrators'
last checks, what gossip says, which nodes cannot reach it and which it cannot reach. A
node that is slow, or that only some cannot reach, stays healthy, and it says so.`,
			Example: `  kvctl node status
  kvctl node status node2
  kvctl node status '#17' -o json`,
			RunE: func(cmd *cobra.Command, args []string) error {
				s, err := a.status(cmd.Context())
				if err != nil {
					return err
				}
				if err := a.askNodes(cmd.Context(), s.old()); err != nil {
					return err
				}
				if len(args) == 0 {
					return a.print(s.nodeDocs(), s.writeNodes)
				}
				n, err := resolveNode(s.topology, args[0])
				if err != nil {
					return err
				}
				for i := range s.nodes {
					if s.nodes[i].Incarnation == n.Incarnation {
						return a.print(s.nodeDocs()[i], func(w io.Writer) { s.writeNode(w, &s.nodes[i]) })
					}
				}
				return missingError{"node", args[0], nil}
			},
		},
	)
	return cmd
}

func (s *clusterStatus) addressTable() *table {
	tab := newTable("NODE", "INCARNATION", "ROLE", "ZONE", "ADDRESS", "ADMIN", "HEALTH", ">SLOTS")
	slots := s.topology.SlotCounts(quorum.MaxN)
	for i := range s.nodes {
		n := &s.nodes[i]
		tab.add(n.Name, fmt.Sprintf("#%d", n.Incarnation), n.Role, n.Zone, n.Address, n.AdminAddress, n.healthText(), slots[n.Incarnation])
	}
	return tab
}

// operations is how many a node coordinates in a second.
func operations(st *adminv1.NodeStatus) float64 {
	return st.GetGet().GetPerSecond() + st.GetPut().GetPerSecond() + st.GetScan().GetPerSecond()
}

func cpuText(st *adminv1.NodeStatus) string { return fmt.Sprintf("%.0f%%", st.GetCpuUtilization()*100) }

// microText is a latency; 0 stands for none measured.
func microText(us uint64) string {
	if us == 0 {
		return "-"
	}
	return durationText(time.Duration(us) * time.Microsecond)
}

// clockText is a node's clock against its peers'.
func clockText(st *adminv1.NodeStatus) string {
	if st.GetClockOpinions() == 0 {
		return "no peers"
	}
	text := fmt.Sprintf("%+d ms", st.GetClockOffsetMs())
	if !st.GetClockOk() {
		text += " BAD"
	}
	return text
}

// clockProblem is what a wrong clock keeps a node from, and what is wrong with it, or
// "".
func clockProblem(st *adminv1.NodeStatus) string {
	switch problem := st.GetClockProblem(); {
	case problem == "":
		return ""
	case st.GetClockOk():
		return "warns: " + problem
	default:
		return "has stopped coordinating: " + problem
	}
}

func clockLine(st *adminv1.NodeStatus) string {
	against := "no peer's clock is known"
	if n := st.GetClockOpinions(); n > 0 {
		against = fmt.Sprintf("%s against the median of %s", clockText(st), plural(int(n), "peer"))
	}
	return fmt.Sprintf("%s; versions lead it by %d ms", against, st.GetClockLeadMs())
}

func hintsText(st *adminv1.NodeStatus) string {
	var count, size uint64
	for _, h := range st.GetHints() {
		count += h.GetCount()
		size += h.GetBytes()
	}
	if count == 0 {
		return "none"
	}
	return fmt.Sprintf("%s (%s)", countText(int64(count)), sizeText(size))
}

// writeNodes writes what nodes are and what they do, in two tables.
func (s *clusterStatus) writeNodes(w io.Writer) {
	well := newTable("NODE", "STATE", "HEALTH", ">CPU", ">MEMORY", ">DISK", ">FREE", ">CLOCK", ">HINTS", ">AGE")
	busy := newTable("NODE", ">GET/S", ">P50", ">P99", ">PUT/S", ">P50", ">P99", ">SCAN/S", ">P50", ">P99", ">IN FLIGHT", ">BACKLOG", ">AGE")
	for i := range s.nodes {
		n := &s.nodes[i]
		st := n.status
		if st == nil {
			well.add(n.Name, "unknown", n.healthText(), "-", "-", "-", "-", "-", "-", "-")
			busy.add(n.Name, "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-")
			continue
		}
		well.add(n.Name, n.stateText(), n.healthText(), cpuText(st), sizeText(st.GetMemoryBytes()), sizeText(st.GetDiskUsedBytes()),
			sizeText(st.GetDiskAvailableBytes()), clockText(st), hintsText(st), durationText(n.age))
		cells := []any{n.Name}
		for _, o := range []*adminv1.OperationStats{st.GetGet(), st.GetPut(), st.GetScan()} {
			cells = append(cells, rateText(o.GetPerSecond()), microText(o.GetP50Us()), microText(o.GetP99Us()))
		}
		busy.add(append(cells, st.GetRequestsInFlight(), st.GetWriteBacklog(), durationText(n.age))...)
	}
	well.write(w)
	s.writeReasons(w)
	fmt.Fprintln(w)
	busy.write(w)
}

// writeNode writes all that is known of one node.
func (s *clusterStatus) writeNode(w io.Writer, n *observedNode) {
	pairs := append([]string{
		"node", fmt.Sprintf("%s (#%d), %s, zone %s", n.Name, n.Incarnation, n.Role, n.Zone),
		"address", fmt.Sprintf("%s, admin %s", n.Address, n.AdminAddress),
	}, s.evidence(n)...)
	pairs = append(pairs, s.holds(n)...)
	st := n.status
	if st == nil {
		fields(w, pairs...)
		fmt.Fprintln(w, "\nthe node has not said anything of itself")
		writeChecks(w, n.checks)
		return
	}
	state := n.stateText()
	if st.GetReason() != "" {
		state += ": " + st.GetReason()
	}
	if text := fillingText(st); text != "" {
		pairs = append(pairs, "filling", text)
	}
	fields(w, append(pairs,
		"state", state,
		"epoch", topology.EpochString(st.GetEpoch()),
		"version", fmt.Sprintf("%s, up %s", st.GetSoftware(), durationText(time.Duration(st.GetUptimeMs())*time.Millisecond)),
		"CPU", cpuText(st)+" of its allowance, mean of 60 s",
		"memory", sizeText(st.GetMemoryBytes()),
		"disk", fmt.Sprintf("%s used, %s free", sizeText(st.GetDiskUsedBytes()), sizeText(st.GetDiskAvailableBytes())),
		"clock", clockLine(st),
		"requests in flight", fmt.Sprint(st.GetRequestsInFlight()),
		"write backlog", plural(int(st.GetWriteBacklog()), "record"),
		"unreachable", s.names(st.GetUnreachable()),
		"figures are", durationText(n.age)+" old",
	)...)
	if problem := clockProblem(st); problem != "" {
		fmt.Fprintf(w, "\n%s %s\n", n.Name, problem)
	}
	writeChecks(w, n.checks)
	writeNodeTables(w, s.topology, st)
}

// holds says how much of the ring a node has.
func (s *clusterStatus) holds(n *observedNode) []string {
	name, text := "slots", fmt.Sprint(s.topology.SlotCounts(quorum.MaxN)[n.Incarnation])
	if n.Role == topology.Reporting {
		name, text = "copies", fmt.Sprint(copiesOn(s.topology, n.Incarnation))
	}
	if s.drained(n.Incarnation) {
		text += ", drained: it is given none until people ask"
	}
	return []string{name, text}
}

// fillingText says how many of the vnodes that a node is being filled with have come,
// and why it does not go on, or "" when it is not being filled.
func fillingText(st *adminv1.NodeStatus) string {
	all := st.GetFillings()
	if len(all) == 0 {
		return ""
	}
	complete := 0
	waits := ""
	for _, f := range all {
		if f.GetComplete() {
			complete++
		} else if waits == "" {
			waits = f.GetWaitsFor()
		}
	}
	text := fmt.Sprintf("%d/%d vnodes", complete, len(all))
	if waits != "" {
		text += ", waits: " + waits
	}
	return text
}

func writeNodeTables(w io.Writer, t *topology.Topology, st *adminv1.NodeStatus) {
	fmt.Fprintln(w)
	ops := newTable("OPERATION", ">PER SECOND", ">P50", ">P99", ">TOTAL", ">ERRORS")
	for _, o := range []struct {
		name string
		*adminv1.OperationStats
	}{{"get", st.GetGet()}, {"put", st.GetPut()}, {"scan", st.GetScan()}} {
		ops.add(o.name, rateText(o.GetPerSecond()), microText(o.GetP50Us()), microText(o.GetP99Us()), countText(int64(o.GetTotal())), countText(int64(o.GetErrors())))
	}
	ops.write(w)
	if len(st.GetQueues()) > 0 {
		fmt.Fprintln(w)
		queues := newTable("QUEUE", ">DEPTH", ">CAPACITY")
		for _, q := range st.GetQueues() {
			queues.add(queueCells(q)...)
		}
		queues.write(w)
	}
	if len(st.GetHints()) > 0 {
		fmt.Fprintln(w)
		hints := newTable("HINTS FOR", ">RECORDS", ">SIZE", ">OLDEST")
		for _, h := range st.GetHints() {
			age := time.Duration(int64(st.GetSampledAtMs())-int64(h.GetOldestMs())) * time.Millisecond
			hints.add(t.NodeName(h.GetTarget()), countText(int64(h.GetCount())), sizeText(h.GetBytes()), durationText(max(age, 0)))
		}
		hints.write(w)
	}
}

// queueCells are a queue's name, depth and bound; one named for bytes counts them.
func queueCells(q *adminv1.QueueDepth) []any {
	text := func(n uint64) string { return countText(int64(n)) }
	name, ofBytes := strings.CutSuffix(q.GetName(), "_bytes")
	if ofBytes {
		text = sizeText
	}
	bound := "-"
	if q.GetCapacity() > 0 {
		bound = text(q.GetCapacity())
	}
	return []any{strings.ReplaceAll(name, "_", " "), text(q.GetDepth()), bound}
}

func (s *clusterStatus) names(incarnations []uint64) string {
	if len(incarnations) == 0 {
		return "none"
	}
	names := make([]string, len(incarnations))
	for i, n := range incarnations {
		names[i] = s.topology.NodeName(n)
	}
	return strings.Join(names, ", ")
}
