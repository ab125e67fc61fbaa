package capacity

import (
	"fmt"
	"time"
)

const (
	// loadWindow is what reported loads are means of: for so long after a change they tell of
	// the time before it.
	loadWindow = time.Minute
	// longestGap is how far observations may lie apart for what holds in both to have held in
	// between.
	longestGap = time.Minute
	// persistUp and persistDown are for how long load must ask for an action, at most.
	persistUp, persistDown = time.Minute, 15 * time.Minute
)

func (r *Rules) persistUp() time.Duration   { return min(persistUp, r.ScaleUpCooldown/5) }
func (r *Rules) persistDown() time.Duration { return min(persistDown, 3*r.ScaleDownCooldown) }

// view is an observation, counted.
type view struct {
	r *Rules
	o *Observation
	// have is how many nodes stay, with those being launched.
	have int
	totals
	unknown int
	// motion is what is under way, for people, and idle that spares wait to join.
	motion, idle []string
	signals      []Signal
	// wants and enough are the most of the signals'.
	wants, enough int
}

func look(r *Rules, o *Observation) *view {
	v := &view{r: r, o: o, have: len(o.Launching)}
	leaving, spares := 0, 0
	for i := range o.Nodes {
		n := &o.Nodes[i]
		switch {
		case n.Leaving:
			leaving++
		case !n.Member:
			spares++
		}
		if !n.Leaving {
			v.have++
		}
		if n.good(r) {
			v.add(n)
		}
	}
	v.unknown = len(o.Nodes) - v.known
	if n := len(o.Launching); n > 0 {
		v.motion = append(v.motion, count(n, "node", " is", " are")+" being launched")
	}
	if spares > 0 {
		v.idle = []string{count(spares, "node", " has", " have") + " not joined the ring yet"}
	}
	if leaving > 0 {
		v.motion = append(v.motion, count(leaving, "node", " is", " are")+" leaving")
	}
	if o.Moving {
		v.motion = append(v.motion, "slots are moving")
	}
	return v
}

// calm reports whether nothing is under way or waits to be.
func (v *view) calm() bool { return len(v.motion)+len(v.idle) == 0 }

// blind says why load can not be judged, or "".
func (v *view) blind() string {
	switch {
	case v.o.Frozen:
		return fmt.Sprintf("frozen: too many nodes are suspect (the load of %d of %d is unknown)", v.unknown, len(v.o.Nodes))
	case 2*v.known <= len(v.o.Nodes):
		return fmt.Sprintf("the load of %d of %d nodes is unknown", v.unknown, len(v.o.Nodes))
	}
	return ""
}

// Decide returns what is to be done, and the State to hand over with the next observation. The
// decision has to be carried out if and only if that State is agreed on. It does nothing at most
// times; what it keeps to is explained at the package.
// REQUIRES: the rules are valid.
func Decide(r Rules, s State, o Observation) (State, Decision) {
	v := look(&r, &o)
	s.notAfter(o.AtMillis)
	s.follow(v)
	v.signals = measure(&r, &o, &v.totals, s.DiskGrowth)
	for _, sig := range v.signals {
		v.wants, v.enough = max(v.wants, sig.Wants), max(v.enough, sig.Enough)
	}
	s.judge(v)
	d := Decision{Desired: v.have, Signals: v.signals, Waits: v.motion}
	if v.have <= r.MaxCapacity {
		d.Waits = append(d.Waits, v.idle...)
	}
	if why := v.blind(); why != "" {
		d.Waits = append(d.Waits, why)
	}
	fewest := max(r.MinCapacity, o.LargestN)
	switch {
	case v.have < r.MinCapacity:
		d.Why = fmt.Sprintf("%s there, fewer than min_capacity, which is %d", count(v.have, "node", " is", " are"), r.MinCapacity)
		d.Waits = nil
		s.up(v, &d, r.MinCapacity)
	case v.have > r.MaxCapacity:
		d.Why = fmt.Sprintf("%s there, more than max_capacity, which is %d", count(v.have, "node", " is", " are"), r.MaxCapacity)
		d.Waits = append(d.Waits, s.beforeDown(v)...)
		least := max(r.MaxCapacity, fewest, v.have-max(1, v.have/4))
		d.Waits = append(d.Waits, v.tooFull(least)...)
		s.down(v, &d, least)
	case v.known == 0:
		d.Why = nodes(v.have) + ", whose load is unknown"
	case v.wants > v.have:
		d.Why = v.most(func(s *Signal) int { return s.Wants }).wanted(len(o.Nodes))
		d.Waits = append(d.Waits, s.beforeUp(v)...)
		s.up(v, &d, min(v.wants, r.MaxCapacity, 2*v.have))
	case max(v.enough, fewest) < v.have:
		s.shrink(v, &d, fewest)
	default:
		d.Why = levels(v.signals, len(o.Nodes))
		if v.have > fewest && v.calm() {
			d.Why += v.most(func(s *Signal) int { return s.Enough }).less(float64(v.have))
		}
	}
	return s, d
}

// shrink drains nodes that load does not need.
func (s *State) shrink(v *view, d *Decision, fewest int) {
	least := max(v.enough, fewest, s.BelowBefore, s.BelowEnough)
	d.Why = v.most(func(s *Signal) int { return s.Enough }).spare(len(v.o.Nodes), max(v.enough, fewest))
	if least > max(v.enough, fewest) {
		d.Why += fmt.Sprintf(", and %s what there was lately", nodes(least))
	}
	to := max(least, v.have-max(1, v.have/4))
	if to > least {
		d.Why += "; a quarter leave at a time"
	}
	d.Waits = append(d.Waits, s.beforeDown(v)...)
	if wait := s.left(v, s.BelowMillis, v.r.persistDown()); wait > 0 && v.calm() {
		d.Waits = append(d.Waits, fmt.Sprintf("it has to stay so for another %s", span(wait)))
	}
	s.down(v, d, to)
}

// most returns the signal that asks for most nodes.
func (v *view) most(nodes func(*Signal) int) *Signal {
	best := &v.signals[0]
	for i := range v.signals {
		if s := &v.signals[i]; nodes(s) > nodes(best) || nodes(s) == nodes(best) && best.Target == 0 {
			best = s
		}
	}
	return best
}

// up launches nodes until there are so many, unless something is waited for.
func (s *State) up(v *view, d *Decision, to int) {
	if len(d.Waits) > 0 || to <= v.have {
		return
	}
	d.Action, d.Count, d.Desired = Up, to-v.have, to
	d.Zones = launchZones(v.o, d.Count)
	s.LastUpMillis = v.o.AtMillis
	s.CalmMillis, s.AboveMillis = 0, 0
	s.notBelow()
}

// down drains nodes until there are so few, unless something is waited for.
func (s *State) down(v *view, d *Decision, to int) {
	if len(d.Waits) > 0 || to >= v.have {
		return
	}
	d.Action, d.Count, d.Desired = Down, v.have-to, to
	d.Leave = leavers(v.o, d.Count)
	s.LastDownMillis = v.o.AtMillis
	s.CalmMillis, s.AboveMillis = 0, 0
	s.notBelow()
}

// left is how much of a time since a moment remains.
func (s *State) left(v *view, since int64, d time.Duration) time.Duration {
	if since == 0 {
		return d
	}
	return d - time.Duration(v.o.AtMillis-since)*time.Millisecond
}

// cooldown is how much of a cooldown after a scaling remains, if there was one.
func (s *State) cooldown(v *view, last int64, d time.Duration) time.Duration {
	if last == 0 {
		return 0
	}
	return s.left(v, last, d)
}

// beforeUp returns what a scale-up by load waits for, other than motion.
func (s *State) beforeUp(v *view) (waits []string) {
	if v.have >= v.r.MaxCapacity {
		waits = append(waits, fmt.Sprintf("max_capacity: %s are the most", nodes(v.r.MaxCapacity)))
	}
	if wait := s.left(v, s.AboveMillis, v.r.persistUp()); wait > 0 && v.calm() && s.warm(v) {
		waits = append(waits, fmt.Sprintf("it has to stay so for another %s", span(wait)))
	}
	if wait := s.cooldown(v, s.LastUpMillis, v.r.ScaleUpCooldown); wait > 0 {
		waits = append(waits, fmt.Sprintf("scale_up_cooldown: %s left", span(wait)))
	}
	return append(waits, s.beforeAny(v)...)
}

// beforeDown returns what any scale-down waits for, other than motion.
func (s *State) beforeDown(v *view) (waits []string) {
	if v.unknown > 0 && v.blind() == "" {
		waits = append(waits, "the load of "+count(v.unknown, "node", " is", " are")+" unknown")
	}
	if !v.o.Whole {
		waits = append(waits, "a vnode is not whole")
	}
	if wait := s.cooldown(v, max(s.LastUpMillis, s.LastDownMillis), v.r.ScaleDownCooldown); wait > 0 {
		waits = append(waits, fmt.Sprintf("scale_down_cooldown: %s left", span(wait)))
	}
	return append(waits, s.beforeAny(v)...)
}

func (s *State) beforeAny(v *view) []string {
	if wait := s.left(v, s.CalmMillis, loadWindow); wait > 0 && v.calm() {
		return []string{fmt.Sprintf("load is measured for another %s, for something has changed", span(wait))}
	}
	return nil
}

// tooFull returns what keeps a group that is too large from being made so small.
func (v *view) tooFull(to int) []string {
	if v.known == 0 {
		return []string{"it is not known whether their data would fit"}
	}
	disk := &v.signals[1] // as measure orders them
	if then := disk.Peak * float64(v.have) / float64(to); then > guard {
		return []string{fmt.Sprintf("the disk of node #%d is %s full and could be %s full then", disk.PeakNode, percent(disk.Peak), percent(then))}
	}
	return nil
}

// notAfter takes what lies in the future for now: the clock of a new leader may be behind. So
// what is waited for lasts as long as it would have, and no longer.
func (s *State) notAfter(now int64) {
	for _, t := range []*int64{&s.LastUpMillis, &s.LastDownMillis, &s.AtMillis, &s.CalmMillis, &s.AboveMillis, &s.BelowMillis, &s.DiskMillis} {
		*t = min(*t, now)
	}
}

// warm reports whether loads tell of the time since the last change.
func (s *State) warm(v *view) bool {
	return s.CalmMillis != 0 && s.left(v, s.CalmMillis, loadWindow) <= 0
}

// follow notes whether the cluster is calm, and how its disks grow.
func (s *State) follow(v *view) {
	calm := v.calm()
	if changed := s.Nodes != v.have; changed || !calm {
		s.CalmMillis, s.DiskMillis = 0, 0
	}
	s.Nodes = v.have
	if calm && s.CalmMillis == 0 {
		s.CalmMillis = v.o.AtMillis
	}
	if v.r.TargetDisk > 0 && v.blind() == "" {
		s.grow(v.o.AtMillis, v.used, calm && v.unknown == 0)
	}
}

// judge notes since when load has asked for more nodes, or for fewer. What can not be judged
// leaves that as it is, unless it lasts for longer than a gap may.
func (s *State) judge(v *view) {
	now, last := v.o.AtMillis, s.AtMillis
	if v.blind() != "" {
		s.notBelow()
		return
	}
	if time.Duration(now-s.AtMillis)*time.Millisecond > longestGap {
		s.AboveMillis = 0
		s.notBelow()
		if s.CalmMillis != 0 {
			s.CalmMillis = now
		}
	}
	s.AtMillis = now
	if !s.warm(v) || v.wants <= v.have {
		s.AboveMillis = 0
	} else if s.AboveMillis == 0 {
		s.AboveMillis = now
	}
	half := v.r.persistDown().Milliseconds() / 2
	switch {
	case !s.warm(v) || v.enough >= v.have || v.unknown > 0 || !v.o.Whole:
		s.notBelow()
	case s.BelowMillis == 0:
		s.BelowMillis, s.BelowEnough = now, v.enough
	case (now-s.BelowMillis)/half != (last-s.BelowMillis)/half:
		s.BelowBefore, s.BelowEnough = s.BelowEnough, v.enough
	default:
		s.BelowEnough = max(s.BelowEnough, v.enough)
	}
}

func (s *State) notBelow() { s.BelowMillis, s.BelowEnough, s.BelowBefore = 0, 0, 0 }
