package capacity

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// simulatedStart is what simulations take for the time of their beginning: any time but 0.
const simulatedStart = int64(1) << 40

// Options is the model of a cluster that rules are tried on.
type Options struct {
	// NodeCapacity is the load that takes all the CPU of a node: more than 0.
	NodeCapacity float64
	// Nodes is how many there are at the start; 0: as many as load asks for then.
	Nodes int
	// Skew is what the most loaded node has over the mean, 1 or more. HotSpot is load that stays on
	// one node, however many there are.
	Skew, HotSpot float64
	// LaunchTime is until a launched node registers. MoveTime is until it has joined the ring, or
	// a node has left it; where there are data, it is what they take at FillBytesPerSecond.
	LaunchTime, MoveTime time.Duration
	FillBytesPerSecond   float64
	// MoveCPU is what moves take of the CPU of every node.
	MoveCPU float64
	// DiskBytes is the size of a node's disk, DataBytes what all nodes hold at the start, replicas
	// counted, and GrowthBytesPerSecond by how much that grows.
	DiskBytes, DataBytes, GrowthBytesPerSecond float64
	// Step is the time between two observations: 1 s to 30 s.
	Step time.Duration
}

// DefaultOptions are nodes that each do so much load at most, register after a minute, join or leave
// within five, and have empty disks.
func DefaultOptions(nodeCapacity float64) Options {
	return Options{
		NodeCapacity: nodeCapacity, Skew: 1.1, LaunchTime: time.Minute, MoveTime: 5 * time.Minute, MoveCPU: 0.1,
		FillBytesPerSecond: assumedFill, DiskBytes: 1 << 40, Step: 10 * time.Second,
	}
}

// Validate returns an error that says which option is wrong.
func (o Options) Validate() error {
	amount := func(f float64) bool { return f >= 0 && f <= 1e18 }
	switch {
	case !(o.NodeCapacity > 0 && amount(o.NodeCapacity)):
		return fmt.Errorf("the capacity of a node is %v: write the load that takes all of its CPU", o.NodeCapacity)
	case o.Nodes < 0 || o.Nodes > MostNodes:
		return fmt.Errorf("%d nodes: write 0 to %d", o.Nodes, MostNodes)
	case !(o.Skew >= 1 && o.Skew <= 100):
		return fmt.Errorf("skew is %v: write what the most loaded node has over the mean, 1 to 100", o.Skew)
	case !(amount(o.HotSpot) && amount(o.DataBytes) && amount(o.GrowthBytesPerSecond)):
		return fmt.Errorf("hot spot, data and growth can not be negative")
	case !(o.MoveCPU >= 0 && o.MoveCPU <= 1):
		return fmt.Errorf("the CPU of moves is %v: write a part, 0 to 1", o.MoveCPU)
	case o.LaunchTime < 0 || o.MoveTime < 0 || o.LaunchTime > LongestCurve || o.MoveTime > LongestCurve:
		return fmt.Errorf("launches take %v and moves %v: write 0 s or more", o.LaunchTime, o.MoveTime)
	case !(o.DiskBytes >= 1 && amount(o.DiskBytes) && o.FillBytesPerSecond > 0):
		return fmt.Errorf("the disk of a node has %v bytes and is filled with %v a second: write more than 0", o.DiskBytes, o.FillBytesPerSecond)
	case o.Step < time.Second || o.Step > 30*time.Second:
		return fmt.Errorf("a step is %v: write 1s to 30s", o.Step)
	}
	return nil
}

// Step is the cluster at one time of a simulation.
type Step struct {
	At   time.Duration
	Load float64
	// Nodes is how many serve, those that leave included; others wait to register or to join.
	Nodes, Launching, Joining, Leaving int
	// CPU is what load asks of the CPU of the mean node, more than 1 where that is not there.
	CPU float64
	// Disk is how full the mean disk is.
	Disk float64
	// Above: a load is above its target.
	Above bool
}

// Event is a decision to do something.
type Event struct {
	At       time.Duration
	Nodes    int // before it
	Decision Decision
}

// Summary is what a run comes to.
type Summary struct {
	Ups, Downs, Launched, Drained int
	LeastNodes, MostNodes         int
	// AboveTarget is for how long a load was above its target.
	AboveTarget time.Duration
	// MaxCPU is the most CPU that load asked for, MaxDisk the fullest mean disk.
	MaxCPU, MaxDisk float64
	NodeHours       float64
}

// Run is a simulation that is over.
type Run struct {
	Rules   Rules
	Steps   []Step
	Events  []Event
	Summary Summary
}

// Simulate tries rules on a load curve. The model is simple: load is spread evenly but for skew and the
// hot spot, and reports are means of a minute; nodes serve from when all that joined with them
// have their data until all that leave with them have handed theirs over.
func Simulate(r Rules, c Curve, o Options) (*Run, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := o.Validate(); err != nil {
		return nil, err
	}
	m := newModel(r, c, o)
	for m.now <= c[len(c)-1].At {
		m.step()
	}
	return &m.run, nil
}

// model is a simulation that runs.
type model struct {
	o     Options
	curve Curve
	run   Run
	state State
	now   time.Duration
	// obs is what Decide sees, its nodes being those of the model.
	obs  Observation
	last uint64 // incarnation
	// due is when what is under way is done, if something is.
	due time.Duration
	// spread and peak are the CPU of a node like others and of the most loaded one, of the last
	// minute's steps in a ring.
	spread, peak []float64
	at           int
}

func newModel(r Rules, c Curve, o Options) *model {
	m := &model{o: o, curve: c, now: c[0].At, run: Run{Rules: r}}
	m.obs = Observation{LaunchTime: o.LaunchTime, FillBytesPerSecond: o.FillBytesPerSecond, Whole: true}
	n := o.Nodes
	if load := c[0].Load; n == 0 {
		needs := 0.0
		if r.TargetCPU > 0 {
			needs = load / o.NodeCapacity / r.TargetCPU
		}
		if r.TargetOperations > 0 {
			needs = max(needs, load/r.TargetOperations)
		}
		n = min(max(nodesFor(needs), r.MinCapacity), r.MaxCapacity)
	}
	for range n {
		m.register("", true)
	}
	window := int(loadWindow / o.Step)
	m.spread, m.peak = make([]float64, 0, window), make([]float64, 0, window)
	m.run.Summary.LeastNodes = n
	return m
}

func (m *model) register(zone string, member bool) {
	m.last++
	m.obs.Nodes = append(m.obs.Nodes, Node{Incarnation: m.last, Zone: zone, Member: member, Known: true, DiskTotal: uint64(m.o.DiskBytes)})
}

// step brings the model to the next time: what is due is done, nodes report, a decision
// is made and carried out.
func (m *model) step() {
	m.finish()
	s := m.serve()
	m.obs.AtMillis = simulatedStart + (m.now - m.curve[0].At).Milliseconds()
	var d Decision
	m.state, d = Decide(m.run.Rules, m.state, m.obs)
	m.note(s, d)
	m.carryOut(d)
	m.now += m.o.Step
}

// finish ends what is due. Launched nodes register, and join at once.
func (m *model) finish() {
	if m.now < m.due {
		return
	}
	switch {
	case m.obs.Moving:
		m.obs.Nodes = slices.DeleteFunc(m.obs.Nodes, func(n Node) bool { return n.Leaving })
		for i := range m.obs.Nodes {
			m.obs.Nodes[i].Member = true
		}
		m.obs.Moving = false
	case len(m.obs.Launching) > 0:
		members := len(m.obs.Nodes)
		for _, zone := range m.obs.Launching {
			m.register(zone, false)
		}
		m.obs.Launching = nil
		m.move(members, len(m.obs.Nodes))
	}
}

// move begins the moves by which the data of some nodes come to lie on others.
func (m *model) move(from, to int) {
	m.obs.Moving = true
	takes := m.o.MoveTime
	if data := m.data(); data > 0 {
		each := data / float64(max(from, to)) // of what a newcomer takes in, or a leaver hands over
		if to < from {
			each *= float64(from-to) / float64(to)
		}
		takes = time.Duration(min(each/m.o.FillBytesPerSecond, LongestCurve.Seconds()) * float64(time.Second))
	}
	m.due = m.now + takes
}

// data is what all nodes hold.
func (m *model) data() float64 {
	return m.o.DataBytes + m.o.GrowthBytesPerSecond*(m.now-m.curve[0].At).Seconds()
}

// serve spreads load and data over the nodes, and has them report.
func (m *model) serve() Step {
	s := Step{At: m.now, Load: m.curve.At(m.now), Launching: len(m.obs.Launching)}
	for i := range m.obs.Nodes {
		switch n := &m.obs.Nodes[i]; {
		case n.Leaving:
			s.Leaving++
		case !n.Member:
			s.Joining++
		}
	}
	s.Nodes = len(m.obs.Nodes) - s.Joining
	n := float64(s.Nodes)
	hot := min(m.o.HotSpot, s.Load)
	mean := (s.Load - hot) / n
	peak := min(mean*m.o.Skew, s.Load-hot) + hot
	spread := 0.0
	if s.Nodes > 1 {
		spread = (s.Load - peak) / (n - 1)
	}
	s.CPU, s.Disk = s.Load/n/m.o.NodeCapacity, m.data()/n/m.o.DiskBytes
	r := &m.run.Rules
	s.Above = r.TargetCPU > 0 && s.CPU > r.TargetCPU || r.TargetDisk > 0 && s.Disk > r.TargetDisk || r.TargetOperations > 0 && s.Load/n > r.TargetOperations
	extra := 0.0
	if m.obs.Moving {
		extra = m.o.MoveCPU
	}
	spreadCPU := m.minute(&m.spread, min(1, spread/m.o.NodeCapacity+extra))
	peakCPU := m.minute(&m.peak, min(1, peak/m.o.NodeCapacity+extra))
	m.at++
	for i := range m.obs.Nodes {
		node := &m.obs.Nodes[i]
		node.CPU, node.Operations, node.DiskUsed = spreadCPU, spread, uint64(min(1, s.Disk)*m.o.DiskBytes)
		if !node.Member {
			node.CPU, node.Operations, node.DiskUsed = extra, 0, 0
		}
	}
	m.obs.Nodes[0].CPU, m.obs.Nodes[0].Operations = peakCPU, peak // the oldest, which leaves last
	return s
}

// minute returns the mean of a minute's values with one more.
func (m *model) minute(values *[]float64, v float64) float64 {
	if len(*values) < cap(*values) {
		*values = append(*values, v)
	} else {
		(*values)[m.at%len(*values)] = v
	}
	sum := 0.0
	for _, f := range *values {
		sum += f
	}
	return sum / float64(len(*values))
}

// note keeps a step and its decision.
func (m *model) note(s Step, d Decision) {
	sum := &m.run.Summary
	m.run.Steps = append(m.run.Steps, s)
	if s.Above {
		sum.AboveTarget += m.o.Step
	}
	sum.MaxCPU, sum.MaxDisk = max(sum.MaxCPU, s.CPU), max(sum.MaxDisk, s.Disk)
	sum.LeastNodes, sum.MostNodes = min(sum.LeastNodes, s.Nodes), max(sum.MostNodes, s.Nodes)
	sum.NodeHours += float64(s.Nodes+s.Joining) * m.o.Step.Hours()
	if d.Action != None {
		m.run.Events = append(m.run.Events, Event{At: s.At, Nodes: len(m.obs.Nodes), Decision: d})
	}
}

// carryOut begins what was decided.
func (m *model) carryOut(d Decision) {
	switch sum := &m.run.Summary; d.Action {
	case Up:
		sum.Ups++
		sum.Launched += d.Count
		m.obs.Launching = append(m.obs.Launching, d.Zones...)
		m.due = m.now + m.o.LaunchTime
	case Down:
		sum.Downs++
		sum.Drained += d.Count
		for i := range m.obs.Nodes {
			if slices.Contains(d.Leave, m.obs.Nodes[i].Incarnation) {
				m.obs.Nodes[i].Leaving = true
			}
		}
		m.move(len(m.obs.Nodes), len(m.obs.Nodes)-d.Count)
	}
}

// stretch returns what part of the way from the first to the last step a time is.
func (r *Run) stretch(t time.Duration) float64 {
	first, last := r.Steps[0].At, r.Steps[len(r.Steps)-1].At
	return math.Max(0, float64(t-first)/math.Max(1, float64(last-first)))
}
