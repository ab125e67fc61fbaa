package orchestrator

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// noteHealth notes which nodes became healthy or unhealthy since that was noted last.
func noteHealth(s *topology.State, v view) *topologyv1.Command {
	found := make(map[uint64]topology.FoundHealth, len(s.Health))
	for _, h := range s.Health {
		found[h.Incarnation] = h
	}
	m := &topologyv1.FindHealth{}
	var names, what []string
	for i := range s.Topology.Nodes {
		n := &s.Topology.Nodes[i]
		state := v.state(n.Incarnation)
		if state == topologyv1.NodeHealth_STATE_UNSPECIFIED {
			continue
		}
		was, known := found[n.Incarnation]
		now := topology.FoundHealth{Incarnation: n.Incarnation, Healthy: state == topologyv1.NodeHealth_STATE_HEALTHY, Reason: v.reason(n.Incarnation)}
		if known && was.Healthy == now.Healthy && (was.Reason == "") == (now.Reason == "") {
			continue // reasons count failures: not every count is news
		}
		m.Nodes = append(m.Nodes, now.Proto())
		names = append(names, n.Name)
		what = append(what, fmt.Sprintf("%s, #%d, %s", n.Name, n.Incarnation, became(was, now, known, v.nowMillis)))
	}
	if len(m.Nodes) == 0 {
		return nil
	}
	return noted("health", eventName(names), strings.Join(what, "; "), s, &topologyv1.Mutation{Kind: &topologyv1.Mutation_FindHealth{FindHealth: m}})
}

// became says in words how a node's health changed.
func became(was, now topology.FoundHealth, known bool, nowMillis int64) string {
	after := time.Duration(nowMillis-was.SinceMillis) * time.Millisecond
	switch {
	case !now.Healthy:
		return "is unhealthy: " + now.Reason
	case known && !was.Healthy:
		return fmt.Sprintf("is healthy again after %s", after.Round(100*time.Millisecond))
	case now.Reason != "":
		return "is healthy, but " + now.Reason
	}
	return "is healthy"
}

// eventName returns the name that an event of several nodes is found by: the one node's.
func eventName(names []string) string {
	if slices.Sort(names); len(slices.Compact(names)) == 1 {
		return names[0]
	}
	return ""
}

// noted returns a command that no node needs to know of.
func noted(subject, name, what string, s *topology.State, ms ...*topologyv1.Mutation) *topologyv1.Command {
	return &topologyv1.Command{
		ExpectEpoch: s.Topology.Epoch,
		Change:      &topologyv1.Change{Subject: subject, Name: name, What: what},
		Mutations:   ms,
	}
}

// noteConditions notes what holds now and did not when it was noted last, and the other
// way round.
func noteConditions(s *topology.State, v view) *topologyv1.Command {
	if !s.Topology.Formed() || !v.knows(s.Topology) {
		return nil
	}
	for _, c := range []struct{ kind, subject, text, over string }{
		// Before frozen, whose end is what it begins with.
		{topology.ConditionThaw, "recovery", thawing(s, v), "no node is given time any more after many were unhealthy"},
		{topology.ConditionFrozen, "recovery", frozen(s.Topology, v), "so few nodes are unhealthy that nothing is held back any more"},
		{topology.ConditionRedundancy, "recovery", degraded(s.Topology, v), "every vnode has all its replicas alive again"},
	} {
		if cmd := condition(s, c.kind, c.subject, c.text, c.over); cmd != nil {
			return cmd
		}
	}
	return nil
}

// condition returns the command that makes a condition of a kind hold, or end where the
// text is empty; nil if it is so already.
func condition(s *topology.State, kind, subject, text, over string) *topologyv1.Command {
	if s.Condition(kind) == text {
		return nil
	}
	what := text
	if text == "" {
		what = over
	}
	return noted(subject, "", what, s, &topologyv1.Mutation{Kind: &topologyv1.Mutation_SetCondition{
		SetCondition: &topologyv1.SetCondition{Kind: kind, Text: text},
	}})
}

// knows reports whether something is known of the health of every node that has a slot.
// A leader that has just been elected does not judge by what it has not looked at yet.
func (v view) knows(t *topology.Topology) bool {
	return !slices.ContainsFunc(t.Members(), func(n *topology.Node) bool {
		return v.state(n.Incarnation) == topologyv1.NodeHealth_STATE_UNSPECIFIED
	})
}

// frozen returns why nothing is decided that could do harm, or "". Where many nodes seem
// to be dead, the network or an overload is the likelier cause, and to act on it would
// make it worse.
func frozen(t *topology.Topology, v view) string {
	members := t.Members()
	var suspects []string
	for _, n := range members {
		if v.unhealthy(n.Incarnation) && n.LostEpoch == 0 { // those are no mistake
			suspects = append(suspects, n.Name)
		}
	}
	limit := max(1, len(members)*3/10)
	if len(suspects) <= limit || mutant.On("freeze-ignored") {
		return ""
	}
	return fmt.Sprintf("%d of %d nodes are unhealthy (%s): no node is replaced, launched, ended or drained, and nothing rebalanced, while more than %d are",
		len(suspects), len(members), strings.Join(suspects, ", "), limit)
}

// thawing returns that nodes which are unhealthy are given time, since many more were
// until lately, or "". When a broken network heals, one node is well again before the next:
// those that come last have been away for long and are about to be back.
func thawing(s *topology.State, v view) string {
	t := s.Topology
	unhealthy := slices.ContainsFunc(t.Members(), func(n *topology.Node) bool { return v.unhealthy(n.Incarnation) })
	switch {
	case !unhealthy || t.Settings.ReplaceAfter == 0 || frozen(t, v) != "":
	case s.Condition(topology.ConditionFrozen) != "":
		return fmt.Sprintf("many nodes were unhealthy until now: those that still are have another %s before they are replaced", t.Settings.ReplaceAfter)
	case grace(s, v) > 0:
		return s.Condition(topology.ConditionThaw)
	}
	return ""
}

// grace is for how long no node is dead yet, as many were unhealthy until lately.
func grace(s *topology.State, v view) time.Duration {
	since, ok := s.ConditionSince(topology.ConditionThaw)
	if !ok {
		return 0
	}
	return max(0, s.Topology.Settings.ReplaceAfter-time.Duration(v.nowMillis-since)*time.Millisecond)
}

// degraded returns how few live replicas a vnode has, or "" where each has all.
func degraded(t *topology.Topology, v view) string {
	n := t.LargestN()
	if worst := slices.Min(t.LiveReplicas(n, v.healthy)); worst < n {
		return fmt.Sprintf("there are vnodes with %d of %d replicas alive", worst, n)
	}
	return ""
}
