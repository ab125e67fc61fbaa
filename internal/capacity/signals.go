package capacity

import (
	"cmp"
	"fmt"
	"math"
	"sort"
	"strings"
	"time"
)

const (
	// margin is by which part of a target what remains after a scale-down stays below it.
	margin = 0.15
	// guard is what a load without a target may grow to by a scale-down.
	guard = 0.85
	// growthWindow is over which time the growth of disks is smoothed: compactions come and
	// go in less. It is measured every growthEvery.
	growthWindow, growthEvery = 10 * time.Minute, time.Minute
	assumedLaunch             = 2 * time.Minute
	assumedFill               = 16 << 20 // bytes a second
	// unbounded is more nodes than any rules allow.
	unbounded = 1 << 20
)

// good reports whether the load of a node is known.
func (n *Node) good(r *Rules) bool {
	sane := func(f float64) bool { return f >= 0 && !math.IsInf(f, 1) }
	return n.Known && sane(n.CPU) && n.DiskTotal > 0 && (r.TargetOperations == 0 || sane(n.Operations))
}

// totals are sums over the nodes whose load is known, with the most of one.
type totals struct {
	known           int
	sum, peak       [3]float64 // of cpu, disk as a part, operations
	peakNode        [3]uint64
	used, total     float64 // of disks, in bytes
	fullest, fullOf float64 // used and total of the fullest disk
}

func (t *totals) add(n *Node) {
	t.known++
	used, total := float64(n.DiskUsed), float64(n.DiskTotal)
	t.used += used
	t.total += total
	for i, f := range [...]float64{n.CPU, used / total, n.Operations} {
		t.sum[i] += f
		if t.peakNode[i] == 0 || f > t.peak[i] {
			t.peak[i], t.peakNode[i] = f, n.Incarnation
			if i == 1 {
				t.fullest, t.fullOf = used, total
			}
		}
	}
}

// measure returns the signals of n nodes, of which those in t are known.
func measure(r *Rules, o *Observation, t *totals, growth float64) []Signal {
	if t.known == 0 {
		return nil
	}
	n := float64(len(o.Nodes))
	mean := func(i int) float64 { return t.sum[i] / float64(t.known) }
	out := []Signal{
		track(Signal{Name: CPU, Mean: mean(0), Peak: t.peak[0], PeakNode: t.peakNode[0], Target: r.TargetCPU}, n),
		track(Signal{Name: Disk, Mean: t.used / t.total, Peak: t.peak[1], PeakNode: t.peakNode[1], Target: r.TargetDisk}, n),
	}
	if r.TargetOperations > 0 {
		out = append(out, track(Signal{Name: Operations, Mean: mean(2), Peak: t.peak[2], PeakNode: t.peakNode[2], Target: r.TargetOperations}, n))
	}
	if s, ok := timeToFull(r, o, t, growth); ok {
		out = append(out, s)
	}
	return out
}

// track fills in what a load of n nodes asks for. What the most loaded node may ask for is
// explained at the package.
func track(s Signal, n float64) Signal {
	if s.Target == 0 {
		s.PeakLimit = guard
		s.Enough = nodesFor(n * s.Peak / guard)
		return s
	}
	s.PeakLimit = 1.25 * s.Target
	if s.Name != Operations {
		s.PeakLimit = min(s.PeakLimit, (1+s.Target)/2)
	}
	byMean, byPeak := nodesFor(n*s.Mean/s.Target), nodesFor(n*s.Peak/s.PeakLimit)
	most := byMean + max(1, byMean/4)
	s.Wants = max(byMean, min(byPeak, most))
	s.HotSpot = s.Peak > s.PeakLimit && byPeak > most && float64(s.Wants) <= n
	s.Enough = nodesFor(n * max(s.Mean/s.Target, s.Peak/s.PeakLimit) / (1 - margin))
	return s
}

// nodesFor rounds up to nodes, but for what is an error of arithmetic.
func nodesFor(f float64) int { return int(min(math.Ceil(f-1e-9), unbounded)) }

// timeToFull is the signal of the disk that is full first when all of them grow like what
// they hold; with other numbers of nodes it holds and grows in proportion.
func timeToFull(r *Rules, o *Observation, t *totals, growth float64) (Signal, bool) {
	if r.TargetDisk == 0 || growth <= 0 || t.fullest == 0 {
		return Signal{}, false
	}
	n := float64(len(o.Nodes))
	launch, fill := cmp.Or(o.LaunchTime, assumedLaunch), cmp.Or(o.FillBytesPerSecond, assumedFill)
	all := t.used / float64(t.known) * n
	grows := growth * t.fullest / t.used
	lasts := func(m float64) float64 { return max(0, t.fullOf*m/n-t.fullest) / grows }
	lead := func(m float64) float64 {
		return 2*(launch.Seconds()+all/(m+1)/fill) + r.ScaleUpCooldown.Seconds()
	}
	s := Signal{Name: TimeToFull, Mean: lasts(n), Peak: lasts(n), PeakNode: t.peakNode[1], Target: lead(n), PeakLimit: lead(n)}
	least := func(times float64) int {
		return 1 + sort.Search(MostNodes, func(i int) bool { return lasts(float64(1+i)) >= times*lead(float64(1+i)) })
	}
	s.Wants, s.Enough = least(1), least(2)
	return s, true
}

// grow notes how much disks hold and how fast that grows. While data moves, or not all of it
// is known, what disks hold says nothing about that.
func (s *State) grow(now int64, used float64, calm bool) {
	past := time.Duration(now-s.DiskMillis) * time.Millisecond
	switch {
	case !calm:
		s.DiskMillis = 0
		return
	case s.DiskMillis == 0:
	case past < growthEvery:
		return
	default:
		s.DiskGrowth += ((used-s.DiskBytes)/past.Seconds() - s.DiskGrowth) * past.Seconds() / (past + growthWindow).Seconds()
	}
	s.DiskMillis, s.DiskBytes = now, used
}

// wanted explains why more than n nodes are.
func (s *Signal) wanted(n int) string {
	would := count(s.Wants, "node", "", "") + " would carry it"
	switch {
	case s.Wants >= unbounded || s.Name == TimeToFull && s.Wants > MostNodes:
		would = "no number of nodes would carry it"
	case s.Name == TimeToFull:
		would = nodes(s.Wants) + " would hold it for long enough"
	}
	switch {
	case s.Name == TimeToFull:
		return fmt.Sprintf("the disk of node #%d is full in %s, and to have new nodes take their share in good time needs %s: %s", s.PeakNode, s.value(s.Mean), s.value(s.Target), would)
	case s.Mean > s.Target:
		return fmt.Sprintf("%s is above the target of %s: %s", s.of(n), s.value(s.Target), would)
	case s.Peak > s.PeakLimit:
		return fmt.Sprintf("%s %s of node #%d is above the %s that one node may have (mean %s, target %s): %s might relieve it",
			s.Name, s.value(s.Peak), s.PeakNode, s.value(s.PeakLimit), s.value(s.Mean), s.value(s.Target), nodes(s.Wants))
	}
	return fmt.Sprintf("%s, target %s: %s", s.of(n), s.value(s.Target), would)
}

// of writes the load of n nodes.
func (s *Signal) of(n int) string {
	most := "most loaded"
	if s.Name == Disk {
		most = "fullest"
	}
	return fmt.Sprintf("%s %s of %s (%s %s)", s.Name, s.value(s.Mean), nodes(n), most, s.value(s.Peak))
}

// levels writes all signals for a group of n nodes that is as it should be.
func levels(signals []Signal, n int) string {
	var parts []string
	for i := range signals {
		switch s := &signals[i]; {
		case s.Name == TimeToFull:
			parts = append(parts, fmt.Sprintf("disks full in %s (at least %s)", s.value(s.Mean), s.value(s.Target)))
		case s.HotSpot:
			parts = append(parts, fmt.Sprintf("%s %s (target %s); that node #%d has %s is a hot spot, which more nodes would not relieve", s.Name, s.value(s.Mean), s.value(s.Target), s.PeakNode, s.value(s.Peak)))
		case s.Target > 0:
			parts = append(parts, fmt.Sprintf("%s %s (target %s)", s.Name, s.value(s.Mean), s.value(s.Target)))
		}
	}
	return nodes(n) + " carry the load: " + strings.Join(parts, ", ")
}

// less explains why none of n nodes leaves.
func (s *Signal) less(n float64) string {
	is, may, whose := s.Mean, s.Target*(1-margin), ""
	switch {
	case n == 1 || s.Name == TimeToFull:
		return ""
	case s.Target == 0:
		is, may, whose = s.Peak, guard, " of a node"
	case s.Peak/s.PeakLimit > s.Mean/s.Target:
		is, may, whose = s.Peak, s.PeakLimit*(1-margin), " of a node"
	}
	return fmt.Sprintf("; with one node less the %s%s could be %s, and would have to stay at %s", s.Name, whose, s.value(is*n/(n-1)), s.value(may))
}

// spare explains why fewer than n nodes are enough.
func (s *Signal) spare(n, enough int) string {
	switch {
	case s.Name == TimeToFull:
		return fmt.Sprintf("the disk of node #%d lasts for %s: on %s it would last for long enough", s.PeakNode, s.value(s.Mean), nodes(enough))
	case s.Target == 0:
		return fmt.Sprintf("%s: on %s it would stay below %s", s.of(n), nodes(enough), percent(guard))
	}
	return fmt.Sprintf("%s, target %s: %s would carry it with %s to spare", s.of(n), s.value(s.Target), nodes(enough), percent(margin))
}
