package cli

import (
	"fmt"
	"io"
	"slices"
	"time"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// checkDoc is one of the newest looks at a node in a document.
type checkDoc struct {
	AgeMs  uint64 `json:"age_ms"`
	TookMs uint64 `json:"took_ms"`
	Passed bool   `json:"passed"`
	What   string `json:"what"`
}

func checkDocs(checks []*adminv1.HealthCheck) []checkDoc {
	docs := []checkDoc{}
	for _, c := range checks {
		docs = append(docs, checkDoc{c.GetAgeMs(), c.GetTookMs(), c.GetPassed(), c.GetWhat()})
	}
	return docs
}

// sinceMillis returns since when a node's health is what it is: what was agreed on, which
// outlives the leader, or else what the one who answered saw. 0: not known.
func sinceMillis(h *topologyv1.NodeHealth, found []*topologyv1.FoundHealth) uint64 {
	for _, f := range found {
		if f.GetIncarnation() == h.GetIncarnation() && f.GetState() == h.GetState() && f.GetSinceMs() > 0 {
			return f.GetSinceMs()
		}
	}
	return h.GetSinceMs()
}

// healthLine is a node's health with since when and why.
func (n *observedNode) healthLine() string {
	text := n.healthText()
	if n.sinceMs > 0 {
		text += " since " + time.UnixMilli(int64(n.sinceMs)).Format("2006-01-02 15:04:05")
	}
	if n.reason != "" {
		text += ": " + n.reason
	}
	if why := n.down(); n.refuses {
		text += "; " + why
	}
	return text
}

// unreachableBy returns the healthy nodes that say they do not reach a node.
func (s *clusterStatus) unreachableBy(incarnation uint64) []uint64 {
	var out []uint64
	for i := range s.nodes {
		n := &s.nodes[i]
		if n.health == topologyv1.NodeHealth_STATE_HEALTHY && slices.Contains(n.status.GetUnreachable(), incarnation) {
			out = append(out, n.Incarnation)
		}
	}
	return out
}

// evidence are the lines about a node's health that it does not give itself.
func (s *clusterStatus) evidence(n *observedNode) []string {
	lines := []string{"health", n.healthLine()}
	if n.gossip != "" {
		lines = append(lines, "gossip", n.gossip)
	}
	return append(lines, "unreachable by", s.names(s.unreachableBy(n.Incarnation)))
}

// writeChecks writes the newest looks at a node, oldest first.
func writeChecks(w io.Writer, checks []*adminv1.HealthCheck) {
	if len(checks) == 0 {
		return
	}
	fmt.Fprintln(w)
	tab := newTable("CHECKED", ">TOOK", "PASSED", "WHY, OR WHAT WAS ODD")
	for _, c := range checks {
		passed := "yes"
		if !c.GetPassed() {
			passed = "no"
		}
		tab.add(durationText(time.Duration(c.GetAgeMs())*time.Millisecond)+" ago", durationText(time.Duration(c.GetTookMs())*time.Millisecond), passed, c.GetWhat())
	}
	tab.write(w)
}
