package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// track is one kind of trouble, with random numbers of its own: it waits for about
// every, breaks something that no other track has broken, and mends it.
type track struct {
	name  string
	every time.Duration
	fault func(*faults, *rand.Rand)
	// loops: it runs where the control loops are at work, which it puts to work if it is asked for.
	loops bool
	// reports: it runs where there are reporting nodes.
	reports bool
}

// tracks are all there are.
var tracks = []track{
	{name: "crashes", every: 12 * time.Second, fault: (*faults).crash},
	{name: "more-crashes", every: 15 * time.Second, fault: (*faults).crash},
	{name: "correlated-crashes", every: 50 * time.Second, fault: (*faults).correlated},
	{name: "restarts", every: 40 * time.Second, fault: (*faults).restart},
	{name: "cuts", every: 10 * time.Second, fault: (*faults).cut},
	{name: "more-cuts", every: 20 * time.Second, fault: (*faults).cut},
	{name: "partitions", every: 40 * time.Second, fault: (*faults).partition},
	{name: "pauses", every: 25 * time.Second, fault: (*faults).pauseNode},
	{name: "loss", every: 60 * time.Second, fault: (*faults).loss},
	{name: "resets", every: 20 * time.Second, fault: (*faults).resets},
	{name: "latencies", every: 25 * time.Second, fault: (*faults).slow},
	{name: "links", every: 30 * time.Second, fault: (*faults).slowLinks},
	{name: "slow-disks", every: 25 * time.Second, fault: (*faults).slowDisk},
	{name: "held-disks", every: 25 * time.Second, fault: (*faults).heldDisk},
	{name: "late-hints", every: 50 * time.Second, fault: (*faults).lateHints},
	{name: "absences", every: 20 * time.Second, fault: (*faults).absence},
	{name: "lonely-writes", every: 40 * time.Second, fault: (*faults).lonely},
	{name: "broken-logs", every: 40 * time.Second, fault: (*faults).brokenLog},
	{name: "full-disks", every: 50 * time.Second, fault: (*faults).fullDisk},
	{name: "clocks", every: 25 * time.Second, fault: (*faults).clock},
	{name: "orchestrators", every: 30 * time.Second, fault: (*faults).orchestrator},
	{name: "leaders", every: 60 * time.Second, fault: (*faults).leader},
	{name: "no-orchestrators", every: 90 * time.Second, fault: (*faults).noOrchestrators},
	{name: "namespaces", every: 20 * time.Second, fault: (*faults).changeNamespace},
	{name: "unheard-changes", every: 30 * time.Second, fault: (*faults).changeUnheard},
	{name: ringChanges, every: 4 * time.Second, fault: (*faults).changeRing},
	{name: "hit-moves", every: 15 * time.Second, fault: (*faults).hitMove},
	{name: "split-moves", every: 10 * time.Second, fault: (*faults).splitMove},
	{name: "lost-disks", every: 60 * time.Second, fault: (*faults).lostDisk},
	{name: "flipped-bits", every: 60 * time.Second, fault: (*faults).flipBit},
	{name: "loads", every: 45 * time.Second, fault: (*faults).changeLoad, loops: true},
	{name: "dead-nodes", every: 50 * time.Second, fault: (*faults).deadNode, loops: true},
	{name: "flapping-nodes", every: 30 * time.Second, fault: (*faults).flap, loops: true},
	{name: "gossip-lies", every: 30 * time.Second, fault: (*faults).lie, loops: true},
	{name: "lost-leaders", every: 8 * time.Second, fault: (*faults).loseLeader, loops: true},
	{name: provisionerTrack, every: 30 * time.Second, fault: (*faults).killWrong, loops: true},
	{name: "uneven-rings", every: 60 * time.Second, fault: (*faults).unbalance, loops: true},
	{name: "no-majority", every: 50 * time.Second, fault: (*faults).noMajority, loops: true},
	{name: "reporting-nodes", every: 8 * time.Second, fault: (*faults).reportingNode, reports: true},
	{name: "lease-clocks", every: 15 * time.Second, fault: (*faults).leaseClock, reports: true},
	{name: "reporting-rules", every: 30 * time.Second, fault: (*faults).reportingRules, reports: true},
}

// Tracks returns the names of the tracks of faults that run unless others are asked for: all
// that expect no change of the cluster but those that they make.
func Tracks() []string {
	var out []string
	for _, t := range tracks {
		if !t.loops && !t.reports {
			out = append(out, t.name)
		}
	}
	return out
}

// loops reports whether the control loops are at work.
func (c RunConfig) loops() bool {
	return slices.ContainsFunc(c.tracks(), func(t track) bool { return t.loops })
}

// reports reports whether there are reporting nodes.
func (c RunConfig) reports() bool {
	return slices.ContainsFunc(c.tracks(), func(t track) bool { return t.reports })
}

// zones is over how many zones the nodes of a run are spread where the control loops are at work.
func (c RunConfig) zones() int { return []int{1, 3}[c.Seed/2%2] }

// size is how large the cluster of a run is.
func (c RunConfig) size() (nodes, orchestrators int) {
	switch {
	case c.Seed%2 == 1 && !c.reports(), c.loops():
		return 5, 3
	case c.Seed%4 == 2, c.reports():
		return 3, 3
	}
	return 3, 1
}

// tracks returns those that run.
func (c RunConfig) tracks() []track {
	names := c.Faults
	if names == nil {
		names = Tracks()
	}
	var out []track
	for _, t := range tracks {
		if slices.Contains(names, t.name) {
			out = append(out, t)
		}
	}
	return out
}

// String writes all options of a run; ParseRunConfig reads them.
func (c RunConfig) String() string {
	nodes, orchestrators := c.size()
	var names []string
	for _, t := range c.tracks() {
		names = append(names, t.name)
	}
	return fmt.Sprintf("seed=%d minutes=%g nodes=%d orchestrators=%d faults=%s", c.Seed, c.Minutes, nodes, orchestrators, strings.Join(names, ","))
}

// ParseRunConfig reads what String writes. The size of the cluster follows from the
// seed, so it is ignored.
func ParseRunConfig(s string) (RunConfig, error) {
	c := RunConfig{}
	for _, field := range strings.Fields(s) {
		key, value, found := strings.Cut(field, "=")
		if !found {
			return c, fmt.Errorf("options %q: %q has no value", s, field)
		}
		var err error
		switch key {
		case "seed":
			c.Seed, err = strconv.ParseUint(value, 10, 64)
		case "minutes":
			c.Minutes, err = strconv.ParseFloat(value, 64)
		case "faults":
			c.Faults, err = ParseFaults(value)
		case "nodes", "orchestrators":
		default:
			err = fmt.Errorf("no such option")
		}
		if err != nil {
			return c, fmt.Errorf("options %q: %s: %w", s, key, err)
		}
	}
	return c, nil
}

// ParseFaults reads names of tracks of faults, separated by commas; "" stands for none,
// autonomy for those that run beside the control loops, and reporting for those that run
// beside reporting nodes.
func ParseFaults(s string) ([]string, error) {
	out := []string{}
	for name := range strings.SplitSeq(s, ",") {
		switch {
		case name == "":
		case name == autonomy:
			out = append(out, autonomyTracks...)
		case name == reporting:
			out = append(out, reportingTracks...)
		case slices.ContainsFunc(tracks, func(t track) bool { return t.name == name }):
			out = append(out, name)
		default:
			return nil, fmt.Errorf("there are no faults %q", name)
		}
	}
	return out, nil
}
