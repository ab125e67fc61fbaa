package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// The verdicts of health.
const (
	healthOK          = "ok"
	healthDegraded    = "degraded"
	healthUnavailable = "unavailable"
)

// healthDoc says whether the cluster can serve its namespaces.
type healthDoc struct {
	Status                string               `json:"status"`
	ControlPlaneAvailable bool                 `json:"control_plane_available"`
	NodesDown             []downDoc            `json:"nodes_down"`
	ClocksOff             []clockOffDoc        `json:"clocks_off"`
	Namespaces            []namespaceHealthDoc `json:"namespaces"`
}

type downDoc struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
}

// clockOffDoc is a node that is up and whose clock is off.
type clockOffDoc struct {
	Node string `json:"node"`
	// Coordinates is false for a node that has stopped serving requests for it.
	Coordinates bool   `json:"coordinates"`
	Reason      string `json:"reason"`
	text        string
}

// namespaceHealthDoc counts the vnodes that miss a namespace's default quorums.
type namespaceHealthDoc struct {
	Name        string `json:"name"`
	Vnodes      int    `json:"vnodes"`
	NotWritable int    `json:"vnodes_not_writable"`
	NotReadable int    `json:"vnodes_not_readable"`
	// HeldUp counts those whose writes fail for a copy for reports that is down.
	HeldUp int `json:"vnodes_held_up"`
	// SharingZones counts those with two replicas in one zone though there are enough.
	SharingZones  int `json:"vnodes_sharing_zones"`
	n, w, r       int
	fewestWriting int
}

func (a *App) healthCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "health",
		Short: "Say whether every key can be read and written",
		Long: `Says whether every vnode of every namespace meets the namespace's default quorums with
the nodes that are up: exit code 0 if so, else 4. Prints ok; or degraded, when a node is
down or has stopped coordinating because its clock is off, and the quorums are met all
the same; or unavailable, also where writes wait for a reporting node that is down. It names
the namespaces that have two replicas in one zone though there are enough zones, as after a
node has changed its own. It works when every orchestrator is dead.`,
		Example: `  kvctl health
  kvctl health && kvctl put greeting hello
  kvctl health -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.health(cmd.Context()) },
	}
}

func (a *App) health(ctx context.Context) error {
	s, err := a.status(ctx)
	if err != nil {
		return err
	}
	all := make([]*observedNode, len(s.nodes))
	for i := range s.nodes {
		all[i] = &s.nodes[i]
	}
	if err := a.askNodes(ctx, all); err != nil {
		return err
	}
	d := s.assess()
	if err := a.print(d, d.write); err != nil {
		return err
	}
	if d.Status != healthUnavailable {
		return nil
	}
	if err := checkFormed(s.topology); err != nil {
		e := rpc.AsError(err)
		return rpc.Errorf(codes.Unavailable, e.Reason, "%s", e.Message)
	}
	return rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas, "%s", strings.Join(d.failures(), "; "))
}

// assess judges what can be served with the nodes that are up.
func (s *clusterStatus) assess() healthDoc {
	d := healthDoc{Status: healthOK, ControlPlaneAvailable: s.controlled, NodesDown: []downDoc{}, ClocksOff: []clockOffDoc{}, Namespaces: []namespaceHealthDoc{}}
	up := map[uint64]bool{}
	for i := range s.nodes {
		n := &s.nodes[i]
		why := n.down()
		if up[n.Incarnation] = why == ""; why != "" {
			d.NodesDown = append(d.NodesDown, downDoc{n.Name, strings.TrimSuffix(why, ": ")})
			d.Status = healthDegraded
		} else if text := clockProblem(n.status); text != "" {
			d.ClocksOff = append(d.ClocksOff, clockOffDoc{n.Name, n.status.GetClockOk(), n.status.GetClockProblem(), text})
			if !n.status.GetClockOk() {
				d.Status = healthDegraded
			}
		}
	}
	if !s.topology.Formed() {
		d.Status = healthUnavailable
	}
	for i := range s.topology.Namespaces {
		ns := namespaceHealth(s.topology, &s.topology.Namespaces[i], func(node uint64) bool { return up[node] })
		if ns.NotReadable+ns.NotWritable+ns.HeldUp > 0 {
			d.Status = healthUnavailable
		}
		d.Namespaces = append(d.Namespaces, ns)
	}
	return d
}

// namespaceHealth counts the vnodes that miss a namespace's default quorums.
func namespaceHealth(t *topology.Topology, ns *topology.Namespace, up func(node uint64) bool) namespaceHealthDoc {
	s := t.Service(ns, up)
	return namespaceHealthDoc{
		Name: ns.Name, Vnodes: len(t.Ring), NotWritable: s.NotWritable, NotReadable: s.NotReadable, HeldUp: s.HeldUp, SharingZones: needlesslySharing(t, ns.N),
		n: ns.N, w: ns.Writes(quorum.Spec{})[0].Need, r: ns.R.Need(ns.N), fewestWriting: s.FewestWriting,
	}
}

// failures says what cannot be served.
func (d healthDoc) failures() []string {
	var out []string
	for _, ns := range d.Namespaces {
		for _, f := range []struct {
			what, quorum string
			vnodes, need int
		}{{"written", "W", ns.NotWritable, ns.w}, {"read", "R", ns.NotReadable, ns.r}} {
			if f.vnodes > 0 {
				out = append(out, fmt.Sprintf("namespace %s: %d of %s cannot be %s with %s=%d of N=%d",
					ns.Name, f.vnodes, plural(ns.Vnodes, "vnode"), f.what, f.quorum, f.need, ns.n))
			}
		}
		if ns.HeldUp > 0 {
			out = append(out, fmt.Sprintf("namespace %s: writes to %d of %s wait for a reporting node that is down: start it, or kvctl namespace set %s --reporting degrade",
				ns.Name, ns.HeldUp, plural(ns.Vnodes, "vnode"), ns.Name))
		}
	}
	return out
}

func (d healthDoc) write(w io.Writer) {
	fmt.Fprintln(w, d.Status)
	for _, n := range d.NodesDown {
		fmt.Fprintf(w, "node %s is down: %s\n", n.Node, n.Reason)
	}
	for _, n := range d.ClocksOff {
		fmt.Fprintf(w, "node %s %s\n", n.Node, n.text)
	}
	for _, ns := range d.Namespaces {
		if ns.NotReadable+ns.NotWritable+ns.HeldUp == 0 {
			fmt.Fprintf(w, "namespace %s: all %s meet W=%d and R=%d of N=%d, with %d live slots at least\n", ns.Name, plural(ns.Vnodes, "vnode"), ns.w, ns.r, ns.n, ns.fewestWriting)
		}
	}
	for _, ns := range d.Namespaces {
		if ns.SharingZones > 0 {
			fmt.Fprintf(w, "namespace %s: %d of %s have two replicas in one zone, though there are enough zones: kvctl ring plan shows what mends that\n",
				ns.Name, ns.SharingZones, plural(ns.Vnodes, "vnode"))
		}
	}
	if !d.ControlPlaneAvailable {
		fmt.Fprintln(w, "no orchestrator answers: reads and writes go on, nothing can be changed")
	}
}
