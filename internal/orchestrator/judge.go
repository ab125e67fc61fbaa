package orchestrator

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// How a node's health is judged; DESIGN.md, section Health, says why so. All of it is
// a function of values.

// answer is what came of a probe.
type answer int

const (
	// answered: it serves, or the ring has not formed yet.
	answered answer = iota
	// notServing: it answers, and says that it does not serve.
	notServing
	// stalled: it answers, and says that its disk does not.
	stalled
	// refused: nobody listens at its address.
	refused
	// unconnected: no connection came about in time.
	unconnected
	// silent: it was connected to, and no answer came in time.
	silent
	// strange: something else answers.
	strange
)

// gossipWord is what gossip says of a node.
type gossipWord int

const (
	gossipUnknown gossipWord = iota
	gossipAlive
	gossipDead
)

func (g gossipWord) String() string { return [...]string{"unknown", "alive", "dead"}[g] }

// account is what a node said of itself last.
type account struct {
	incarnation uint64
	name        string
	// well tells that it passed its last checks, so that its word counts.
	well        bool
	at          time.Time
	unreachable []uint64
}

// hearsay is what nodes say of their ways to one node, and it of its ways to them.
type hearsay struct {
	// peers is how many well nodes have spoken; cannot are those that do not reach the
	// node, unreached those that it does not reach, by name.
	peers             int
	cannot, unreached []string
}

// hear gathers what was said of a node since some time. Nodes that are not well
// themselves are left out: one that is cut off reaches nobody, and one that is dead is
// reached by nobody.
func hear(about uint64, accounts []account, since time.Time) hearsay {
	var h hearsay
	var own []uint64
	if i := slices.IndexFunc(accounts, func(a account) bool { return a.incarnation == about }); i >= 0 && !accounts[i].at.Before(since) {
		own = accounts[i].unreachable
	}
	for _, a := range accounts {
		if a.incarnation == about || !a.well || a.at.Before(since) {
			continue
		}
		h.peers++
		if slices.Contains(a.unreachable, about) {
			h.cannot = append(h.cannot, a.name)
		}
		if slices.Contains(own, a.incarnation) {
			h.unreached = append(h.unreached, a.name)
		}
	}
	return h
}

// mostly reports whether so many of the peers are most of them. One peer alone never
// is: a cut between two nodes is not the fault of either.
func (h hearsay) mostly(names []string) bool { return len(names) >= 2 && 2*len(names) > h.peers }

// vouched reports whether most of the peers reach the node.
func (h hearsay) vouched() bool { return 2*(h.peers-len(h.cannot)) > h.peers }

// evidence is what an orchestrator has on a node when it has looked at it.
type evidence struct {
	by     string // the orchestrator
	answer answer
	// said is what a node that answers adds, or what is strange.
	said   string
	gossip gossipWord
	hearsay
}

// finding is what one look at a node comes to.
type finding struct {
	passed bool
	// decisive findings are believed at once.
	decisive bool
	// words say why it did not pass, or what is odd all the same.
	words string
}

// find weighs the evidence.
func (e evidence) find() finding {
	switch e.answer {
	case answered:
		switch {
		case e.mostly(e.cannot):
			return finding{words: fmt.Sprintf("%d of %d nodes cannot reach it: %s", len(e.cannot), e.peers, strings.Join(e.cannot, ", "))}
		case e.mostly(e.unreached):
			return finding{words: fmt.Sprintf("it cannot reach %d of %d nodes: %s", len(e.unreached), e.peers, strings.Join(e.unreached, ", "))}
		}
		return finding{passed: true, words: e.said}
	case notServing:
		return finding{words: "it does not serve: " + e.said}
	case stalled: // it has waited before it said so
		return finding{decisive: true, words: "it does not serve: " + e.said}
	}
	dead := e.gossip == gossipDead
	if e.vouched() && e.answer != strange && !(e.answer == refused && dead) {
		return finding{passed: true, words: e.excuse()}
	}
	f := finding{decisive: dead, words: e.failure()}
	if len(e.cannot) > 0 {
		f.words += fmt.Sprintf("; %d of %d nodes cannot reach it either", len(e.cannot), e.peers)
	}
	if dead {
		f.words += "; gossip has it dead"
	}
	return f
}

// excuse says why a node that did not answer is not taken for dead.
func (e evidence) excuse() string {
	can := fmt.Sprintf("%d of %d nodes can", e.peers-len(e.cannot), e.peers)
	if e.answer == silent {
		return fmt.Sprintf("slow: %s gets no answer in time, %s", e.by, can)
	}
	return fmt.Sprintf("%s cannot reach it, %s", e.by, can)
}

// failure says what went wrong with a probe.
func (e evidence) failure() string {
	words := map[answer]string{refused: "nobody listens at its address", unconnected: "no connection to it comes about", silent: "it does not answer in time", strange: ""}[e.answer]
	switch {
	case e.said == "":
		return words
	case words == "":
		return e.said
	}
	return words + " (" + e.said + ")"
}

// A node whose state changes flappingChanges times within flappingWindow is said to be
// flapping.
const (
	flappingChanges = 4
	flappingWindow  = 15 * time.Minute
)

// verdict is what is known of a node's health. The zero verdict knows nothing.
//
// Invariants: the state changes only with as many findings of one kind in a row as the
// thresholds say, or with a decisive one; what is unhealthy has a reason.
type verdict struct {
	state topologyv1.NodeHealth_State
	// why it is unhealthy, or what is odd about a healthy one.
	why string
	// good and bad count the findings of one kind in a row, plain the good ones in a row
	// that had nothing odd.
	good, bad, plain int
	// changes are when the state last changed, oldest first.
	changes []time.Time
	// flapping is how many of them were within the window, if they were many.
	flapping int
}

// judge returns the verdict after one more finding. The first of all that is good is
// enough.
func (v verdict) judge(f finding, h topology.HealthChecks, now time.Time) verdict {
	before := v.state
	if f.passed {
		v.good, v.bad = v.good+1, 0
		if v.plain++; f.words != "" {
			v.plain = 0
		}
		if v.good >= h.HealthyThreshold || v.state == topologyv1.NodeHealth_STATE_UNSPECIFIED {
			v.state = topologyv1.NodeHealth_STATE_HEALTHY
		}
		// What was odd stays for as long as it takes to get well, or it would come and go.
		if v.state == topologyv1.NodeHealth_STATE_HEALTHY && (f.words != "" || before != v.state || v.plain >= h.HealthyThreshold) {
			v.why = f.words
		}
	} else {
		v.good, v.plain, v.bad = 0, 0, v.bad+1
		if f.decisive || v.bad >= h.UnhealthyThreshold {
			v.state, v.why = topologyv1.NodeHealth_STATE_UNHEALTHY, f.words
			if !f.decisive && v.bad > 1 {
				v.why = fmt.Sprintf("%d checks in a row failed: %s", v.bad, f.words)
			}
		}
	}
	return v.note(before, now)
}

// note keeps count of the changes of the state.
func (v verdict) note(before topologyv1.NodeHealth_State, now time.Time) verdict {
	recent := slices.DeleteFunc(slices.Clone(v.changes), func(at time.Time) bool { return now.Sub(at) > flappingWindow })
	if v.state != before && before != topologyv1.NodeHealth_STATE_UNSPECIFIED {
		recent = append(recent, now)
	}
	v.changes = recent[max(0, len(recent)-2*flappingChanges):]
	if v.flapping = len(v.changes); v.flapping < flappingChanges {
		v.flapping = 0
	}
	return v
}

// reason says why the state is what it is, or what is odd about it.
func (v verdict) reason() string {
	if v.flapping == 0 {
		return v.why
	}
	text := fmt.Sprintf("flapping: %d changes in %s", v.flapping, flappingWindow)
	if v.why != "" {
		text += "; " + v.why
	}
	return text
}
