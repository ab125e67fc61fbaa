// Package capacity is the policy by which the cluster scales itself: how many data nodes
// there are to be, by the load that they report, and why. It is pure: it neither launches
// nor drains a node, reads no clock and keeps nothing; the orchestrators agree on its State.
//
// It tracks targets, as the scaling groups of clouds and Kubernetes' autoscaler do: of every
// load that has a target, n nodes at a mean of m are taken for n·m/target nodes that would be
// at it, and the load that needs most nodes decides. On top of that:
//
//   - Hysteresis. Fewer nodes are enough only when they stay a margin of 15% under every
//     target, and what no target is set for stays below 85% too. So what a scale-down leaves
//     is not what a scale-up acts on, and under a steady load nothing happens any more.
//   - Time. More must be wanted for a minute (or a fifth of the cooldown, if that is less), fewer
//     must be enough for 15 minutes (or three cooldowns), without a break: nodes that leave and
//     come back cost all their data twice. Of what was enough in the last half of that time, the
//     most stay. Scale-ups are a cooldown apart, and a scale-down is one after any scaling. A
//     scale-up does not wait for the cooldown of a scale-down: load that comes back is worse than
//     a node too many.
//   - One thing at a time. While nodes are being launched, wait to join or leave, and while
//     slots move, load is not looked at: it is measured again for a minute after that.
//   - What is not known is neither nothing nor much. A node whose load is unknown has the mean
//     of the others when more are wanted, and no node leaves meanwhile. With half the nodes
//     unknown, or while the orchestrators take no node for dead because too many seem so,
//     load decides nothing.
//   - Bounds. Below min_capacity nodes are launched at once, whatever else is going on: that
//     replaces what was lost. Above max_capacity, if the disks of the others have the room,
//     nodes leave whatever the load. A group at most doubles in one step, and loses a quarter.
//
// # The most loaded node
//
// A mean hides a node that is at its end, so that one asks for nodes too, from halfway between
// the target and what a node has, or 25% above the target if that is less. That helps where it has
// more than its share of what can be spread. Where it is one key or a few vnodes that are hot, they
// stay as hot wherever they lie. Load alone does not tell which of the two it is; how far the
// node stands out does: it may ask for a quarter more nodes (one at least) than the mean does, and no
// more, however hot it is. So a hot spot costs a few nodes and never takes a group to its
// maximum. None leaves while it is there: that could only make it hotter.
//
// # Disks
//
// A disk that is full stops a node, and a new node has its share only after launch and
// streaming. So besides the target of disks, their growth counts: if the fullest would be full before
// twice the time that a new node takes to have its share, and a cooldown, nodes are wanted now.
package capacity

import (
	"fmt"
	"math"
	"time"
)

// Node is a registered data node, with or without slots, as it was last heard of.
type Node struct {
	Incarnation uint64
	Zone        string
	// Member: it has slots. One that has none is a spare that waits to join.
	Member bool
	// Leaving: it is being drained, or was given up as lost. It is not counted as capacity.
	Leaving bool
	// Known: it is healthy, and the load below was reported lately.
	Known bool
	// CPU is a part of what the node may use, 0 to 1.
	CPU float64
	// DiskUsed and DiskTotal are in bytes. A report without DiskTotal is as good as none.
	DiskUsed, DiskTotal uint64
	// Operations is in operations a second. It counts only where it has a target.
	Operations float64
}

// Observation is the cluster as its leader sees it at one time.
type Observation struct {
	// AtMillis is the time, in milliseconds since 1970: more than 0.
	AtMillis int64
	Nodes    []Node
	// Launching holds the zones of nodes that were decided on and have not registered yet. What
	// is given up must be taken out, or the group waits for it for ever; what is tried again
	// stays in, or each try decides on further nodes.
	Launching []string
	// Moving: slots are being moved or filled, whatever for.
	Moving bool
	// Whole: every slot of every vnode has its data.
	Whole bool
	// Frozen: too many nodes are suspect for any to be given up.
	Frozen bool
	// LargestN is the largest N of all namespaces.
	LargestN int
	// LaunchTime is how long a launched node takes to register; 0: two minutes.
	LaunchTime time.Duration
	// FillBytesPerSecond is the pace at which a new node is filled; 0: 16 MiB/s.
	FillBytesPerSecond float64
}

// State is what Decide remembers from one observation to the next. The zero State knows
// nothing. Times are in milliseconds since 1970, 0 for never.
//
// LastUpMillis and LastDownMillis must be agreed with the decision that sets them. The other
// fields may be old when a new leader starts from them: after a gap of a minute it
// begins anew to see for how long load asks for something, and so waits longer.
type State struct {
	LastUpMillis, LastDownMillis int64
	// AtMillis is the last observation that load was judged by.
	AtMillis int64
	// Nodes is how many there were then, and CalmMillis since when nothing has been under way.
	Nodes      int
	CalmMillis int64
	// AboveMillis is since when more nodes have been wanted, and BelowMillis since when fewer
	// would have been enough: at most BelowEnough in the current half of the time that this
	// has to last, and BelowBefore in the half before.
	AboveMillis, BelowMillis int64
	BelowEnough, BelowBefore int
	// DiskBytes is what was used of all disks at DiskMillis, and DiskGrowth by how much that
	// grows, in bytes a second.
	DiskMillis int64
	DiskBytes  float64
	DiskGrowth float64
}

// Action is what is to be done.
type Action uint8

// The actions.
const (
	None Action = iota
	Up
	Down
)

// String writes an action as it is shown to people.
func (a Action) String() string {
	switch a {
	case None:
		return "none"
	case Up:
		return "scale up"
	case Down:
		return "scale down"
	}
	return fmt.Sprintf("action(%d)", uint8(a))
}

// Decision is what is to be done, and why.
type Decision struct {
	Action Action
	// Count is how many nodes are to be launched or drained.
	Count int
	// Desired is how many nodes there are once that is done, those being launched included.
	Desired int
	// Zones holds the zone of every node to launch, and Leave the nodes to drain, in the
	// order in which they are to be picked: see launchZones and leavers.
	Zones []string
	Leave []uint64
	// Signals are the loads that decide, as far as they are known.
	Signals []Signal
	// Why is a sentence for people; Waits holds what the action that load asks for waits for, or
	// what keeps load from being judged.
	Why   string
	Waits []string
}

// The names of signals.
const (
	CPU        = "cpu"
	Disk       = "disk"
	Operations = "operations"
	// TimeToFull is how long the fullest disk lasts, in seconds; its target is how long it has to.
	TimeToFull = "time_to_full"
)

// Signal is a load with what it asks for.
type Signal struct {
	Name string
	// Mean is that of the nodes that are known, Peak the most of a node, PeakNode.
	Mean, Peak float64
	PeakNode   uint64
	// Target is 0 where none is set: such a load only keeps nodes from leaving.
	Target float64
	// PeakLimit is what the most loaded node may have.
	PeakLimit float64
	// Wants is how many nodes would be at the target, and Enough how many stay so far below it
	// that others may leave. Enough is never below Wants.
	Wants, Enough int
	// HotSpot: the most loaded node is above its limit, and further nodes would not help it.
	HotSpot bool
}

// value writes a value of the signal.
func (s *Signal) value(f float64) string {
	switch s.Name {
	case Operations:
		return number(f) + "/s"
	case TimeToFull:
		return span(time.Duration(min(f, math.MaxInt64/2e9) * float64(time.Second)))
	}
	return percent(f)
}
