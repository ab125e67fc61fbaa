package orchestrator

import (
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/capacity"
	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// The environment of TestADay.
const (
	envDayNodes = "KVASIR_DAY_NODES" // at most
	envDaySeed  = "KVASIR_DAY_SEED"
)

// dayStep is the time between two looks of the leader, and dayCommands how many steps of moves
// it gets done in it: so a join takes minutes.
const (
	dayStep     = 30 * time.Second
	dayCommands = 8
	dayZones    = 5
)

// dayCurve is how many of the nodes a day's load takes, as a part of the most there may be.
var dayCurve = capacity.Curve{
	{At: 0, Load: 0.05}, {At: 3 * time.Hour, Load: 0.05}, {At: 9 * time.Hour, Load: 0.94}, {At: 11 * time.Hour, Load: 0.94},
	{At: 14 * time.Hour, Load: 0.5}, {At: 18 * time.Hour, Load: 0.95}, {At: 19 * time.Hour, Load: 0.95}, {At: 24 * time.Hour, Load: 0.08},
}

// day is a cluster under the leader's control loops, of which the nodes and the time are
// simulated: what they are told is agreed on and done at once.
type day struct {
	t     *testing.T
	cfg   *Config
	s     *topology.State
	loops scaling
	rng   *rand.Rand
	most  int
	now   time.Duration // since 1970
	began time.Duration
	// ill are the nodes that do not answer, with since when and until when: 0 is for ever.
	ill map[uint64][2]time.Duration
	// split: so many nodes are ill that it is the network.
	split bool
	// spread is when replicas last lay in distinct zones, or were on their way.
	spread time.Duration
	// due is when launched nodes register.
	due map[uint64]time.Duration
	// statuses and cpu are what nodes say in the present state at the present time.
	statuses map[uint64]*adminv1.NodeStatus
	digest   uint64
	dayCounts
}

type dayCounts struct {
	joins, leaves, died, recovered, stillborn, commands, operations int
	ups, downs, turns                                               int
	lastUp                                                          bool
	least, peak                                                     int
	moved, needed                                                   int
	imbalance                                                       float64
}

func newDay(t *testing.T, seed uint64, most, vnodes int) *day {
	cfg := testConfig(1)
	cfg.Bootstrap.Vnodes, cfg.Bootstrap.FoundingNodes = vnodes, max(dayZones, most/15)
	cfg.Bootstrap.AutoScalingGroup.MinCapacity, cfg.Bootstrap.AutoScalingGroup.MaxCapacity = max(dayZones, most/30), most
	cfg.Bootstrap.Rebalance.Policy, cfg.Bootstrap.Rebalance.QuietCPU, cfg.Bootstrap.Rebalance.Cooldown = "auto", "100%", 10*time.Minute
	d := &day{t: t, cfg: &cfg, rng: rand.New(rand.NewPCG(seed, 0xda1)), most: most, began: 1000 * time.Hour, ill: map[uint64][2]time.Duration{}, due: map[uint64]time.Duration{}}
	d.now = d.began
	d.s, _ = settle(t, nil, &cfg)
	for i := range cfg.Bootstrap.FoundingNodes {
		d.s = registerNode(t, d.s, fmt.Sprint("node", i+1), fmt.Sprint("z", i%dayZones))
	}
	d.s, _ = settle(t, d.s, &cfg)
	d.least = cfg.Bootstrap.FoundingNodes
	return d
}

// view is what the leader sees of the nodes.
func (d *day) view() view {
	return view{
		state: func(inc uint64) topologyv1.NodeHealth_State {
			if _, ill := d.ill[inc]; ill {
				return topologyv1.NodeHealth_STATE_UNHEALTHY
			}
			return topologyv1.NodeHealth_STATE_HEALTHY
		},
		status: func(inc uint64) *adminv1.NodeStatus { return d.statuses[inc] },
		reason: func(inc uint64) string {
			if _, ill := d.ill[inc]; ill {
				return "it does not answer"
			}
			return ""
		},
		down: func(inc uint64) time.Duration {
			if since, ill := d.ill[inc]; ill {
				return d.now - since[0]
			}
			return 0
		},
		fresh:     func(inc uint64) bool { _, ill := d.ill[inc]; return !ill },
		held:      func() holdings { return nil },
		nowMillis: d.now.Milliseconds(), provisions: true, launchTimeout: 5 * time.Minute,
	}
}

// report has the nodes say how they are: members share the load, with some noise, and newcomers are filled
// as soon as they have slots to fill.
func (d *day) report() {
	t := d.s.Topology
	members := len(t.Members())
	load := dayCurve.At(d.now-d.began) * float64(d.most) * t.Settings.AutoScalingGroup.TargetCPU
	was := d.statuses
	d.statuses = make(map[uint64]*adminv1.NodeStatus, len(t.Nodes))
	for i := range t.Nodes {
		inc := t.Nodes[i].Incarnation
		if _, ill := d.ill[inc]; ill {
			d.statuses[inc] = was[inc]
			continue
		}
		st := &adminv1.NodeStatus{Incarnation: inc, Epoch: t.Epoch, DiskUsedBytes: 1 << 30, DiskAvailableBytes: 1 << 35}
		if st.CpuUtilization = 0.01; t.Names(inc) {
			st.CpuUtilization = min(1, load/float64(members)*(0.95+0.1*d.rng.Float64()))
		}
		d.statuses[inc] = st
	}
	for v := range t.Ring {
		if j := t.Ring[v].Moving(); j >= 0 {
			slot := t.Ring[v].Slots[j]
			if st := d.statuses[slot.Incoming]; st != nil {
				st.Fillings = append(st.Fillings, &adminv1.Filling{Vnode: uint32(v), AssignedEpoch: slot.Since, Complete: true})
			}
		}
	}
}

// step is one look of the leader: what it decides is agreed on and carried out.
func (d *day) step() {
	d.trouble()
	d.provide()
	for moves := 0; moves < dayCommands; {
		d.report()
		v := d.view()
		cmd, err := decide(d.s, d.cfg, v, "x")
		if err != nil {
			d.t.Fatal(err)
		}
		if cmd == nil {
			cmd = d.loops.next(d.s, v)
		}
		if cmd == nil {
			break
		}
		d.apply(cmd)
		if m := cmd.GetMutations(); len(m) > 0 && m[0].GetSetVnodes() != nil {
			moves++
		}
	}
	d.bounds()
	// What an aborted operation leaves is mended, too.
	if d.s.Active() != nil || crowded(d.s.Topology, placement.Of(d.s.Topology)) == 0 {
		d.spread = d.now
	} else if d.now-d.spread > 2*time.Hour {
		d.t.Errorf("%s: for %s vnodes have had two replicas in a zone", d.at(), d.now-d.spread)
	}
	if op := d.s.Active(); op != nil && d.now.Milliseconds()-op.StartedMillis > time.Hour.Milliseconds() {
		d.t.Errorf("%s: %s goes on for more than an hour: %d of %d moves left", d.at(), op.Title, op.Left(), len(op.Moves))
	}
	d.now += dayStep
}

// apply has a command agreed on, and judges what it begins and ends.
func (d *day) apply(cmd *topologyv1.Command) {
	t := d.t
	cmd.Change.AtMs = uint64(d.now.Milliseconds())
	before := d.s
	s, result, err := d.s.Apply(cmd)
	if err != nil {
		t.Fatalf("%s: %v", cmd.GetChange().GetWhat(), err)
	}
	d.s = s
	d.commands++
	h := fnv.New64a()
	fmt.Fprint(h, d.digest, d.now, cmd.GetChange().GetWhat())
	d.digest = h.Sum64()
	for _, m := range cmd.GetMutations() {
		switch {
		case m.GetStartOperation() != nil:
			d.begun(before, result.Operation)
		case m.GetRemoveNodes() != nil:
			d.leaves += len(m.GetRemoveNodes().GetIncarnations())
			for _, inc := range m.GetRemoveNodes().GetIncarnations() {
				if until, ill := d.ill[inc]; ill && until[1] == 0 {
					d.recovered++
				} else if ill && before.Active().Kind == kindRecover {
					t.Errorf("%s: #%d is given up, which was away for a moment only", d.at(), inc)
				}
				delete(d.ill, inc)
			}
		case m.GetNoteScaling() != nil:
			d.scaled(m.GetNoteScaling().GetUp(), before)
		case m.GetSetVnodes() != nil:
			d.distinct(m.GetSetVnodes())
		case m.GetSteerOperation().GetState() == topologyv1.Operation_STATE_DONE:
			d.even(before.Active())
		}
	}
}

func (d *day) at() time.Duration { return d.now - d.began }

// scaled judges that a decision to scale waited for its cooldown, and counts turns.
func (d *day) scaled(up bool, before *topology.State) {
	g := d.s.Topology.Settings.AutoScalingGroup
	since := func(last int64) time.Duration { return time.Duration(d.now.Milliseconds()-last) * time.Millisecond }
	if up {
		d.ups++
		if since(before.ScaledUpMillis) < g.ScaleUpCooldown {
			d.t.Errorf("%s: up %s after the last time", d.at(), since(before.ScaledUpMillis))
		}
	} else {
		d.downs++
		if since(max(before.ScaledUpMillis, before.ScaledDownMillis)) < g.ScaleDownCooldown {
			d.t.Errorf("%s: down %s after the last time", d.at(), since(max(before.ScaledUpMillis, before.ScaledDownMillis)))
		}
	}
	if d.ups+d.downs > 1 && up != d.lastUp {
		d.turns++
	}
	if d.lastUp = up; d.split {
		d.t.Errorf("%s: scaled while two in five nodes seem to be dead", d.at())
	}
}

// begun judges an operation: it takes few nodes out, and moves little more than it must.
func (d *day) begun(before *topology.State, op *topology.Operation) {
	t := before.Topology
	d.operations++
	if d.split {
		d.t.Errorf("%s: %s begins while two in five nodes seem to be dead", d.at(), op.Title)
	}
	members := len(t.Members())
	if n := len(op.Remove); n > max(1, members*3/10) {
		d.t.Errorf("%s: %s takes out %d of %d members", d.at(), op.Title, n, members)
	}
	// What each node has too few of is what has to move.
	gains := map[uint64]int{}
	for _, m := range op.Moves {
		gains[m.From]--
		gains[m.To]++
	}
	needed := 0
	for _, n := range gains {
		needed += max(0, n)
	}
	d.moved += len(op.Moves)
	d.needed += needed
}

// distinct checks invariant 9 where slots changed.
func (d *day) distinct(m *topologyv1.SetVnodes) {
	t := d.s.Topology
	for _, v := range m.GetVnodes() {
		seen := map[uint64]bool{}
		slots := t.Ring[v.GetVnode()].Slots
		for _, s := range slots {
			for _, n := range s.Quorum().Write {
				if n != 0 && seen[n] {
					d.t.Fatalf("%s: vnode %d has two slots on #%d", d.at(), v.GetVnode(), n)
				}
				seen[n] = true
			}
		}
		if len(slots) != t.Width() {
			d.t.Fatalf("%s: vnode %d has %d slots", d.at(), v.GetVnode(), len(slots))
		}
	}
}

// even checks invariant 9 and what placement promises once an operation is done: zones
// are distinct, and nodes have as many slots as the others of their zone, within one.
func (d *day) even(op *topology.Operation) {
	t := d.s.Topology
	zone := map[uint64]string{}
	for i := range t.Nodes {
		zone[t.Nodes[i].Incarnation] = t.Nodes[i].Zone
	}
	if op.Kind != kindJoin && op.Kind != kindShrink && op.Kind != kindRebalance {
		return
	}
	if n := crowded(t, placement.Of(t)); n > 0 {
		d.t.Fatalf("%s: after %s %d vnodes have two replicas in a zone", d.at(), op.Title, n)
	}
	counts := t.SlotCounts(t.Width())
	least, most := map[string]int{}, map[string]int{}
	for inc, n := range counts {
		z := zone[inc]
		if _, ok := least[z]; !ok || n < least[z] {
			least[z] = n
		}
		most[z] = max(most[z], n)
	}
	for z := range least {
		if most[z]-least[z] > 1 {
			d.t.Errorf("%s: after %s nodes of zone %s have %d to %d slots", d.at(), op.Title, z, least[z], most[z])
		}
	}
	if all := t.Imbalance(); all > 1.02+1/float64(slices.Min(values(least))) {
		d.t.Errorf("%s: after %s a node has %.3f of the mean", d.at(), op.Title, all)
	} else {
		d.imbalance = max(d.imbalance, all)
	}
}

func values(m map[string]int) (out []int) {
	for _, n := range m {
		out = append(out, n)
	}
	return out
}

// bounds checks min_capacity and max_capacity: of the nodes that work or are away for a
// moment, those that leave left out and those that are launched counted in.
func (d *day) bounds() {
	t := d.s.Topology
	g := t.Settings.AutoScalingGroup
	have := 0
	op := d.s.Active()
	for i := range t.Nodes {
		inc := t.Nodes[i].Incarnation
		if until, ill := d.ill[inc]; ill && until[1] == 0 || op != nil && slices.Contains(op.Remove, inc) {
			continue
		}
		have++
	}
	d.least, d.peak = min(d.least, have), max(d.peak, have)
	for i := range d.s.Provisions {
		if p := &d.s.Provisions[i]; p.Kind == topology.Launch && !p.State.Ended() {
			have++
		}
	}
	// A node that dies is missing until the policy has seen it; that one is launched in its place may
	// be one too many when it was not needed any more.
	if have < g.MinCapacity-1 || have > g.MaxCapacity {
		d.t.Errorf("%s: %d nodes, %d launched or there are to be %d to %d", d.at(), len(t.Nodes), have, g.MinCapacity, g.MaxCapacity)
	}
}

// trouble has nodes die for good or for a moment, and, once a day, two in five seem to.
func (d *day) trouble() {
	for inc, until := range d.ill {
		if until[1] != 0 && d.now >= until[1] || d.s.Topology.Node(inc) == nil {
			delete(d.ill, inc)
		}
	}
	members := d.s.Topology.Members()
	if at := d.at(); at >= 12*time.Hour && at < 12*time.Hour+dayStep {
		for i, n := range members {
			if i%5 < 2 {
				d.ill[n.Incarnation] = [2]time.Duration{d.now, d.now + 20*time.Minute}
			}
		}
	}
	d.split = d.at() > 12*time.Hour && d.at() < 12*time.Hour+20*time.Minute
	if d.split || len(d.ill) >= max(1, len(members)/20) {
		return
	}
	// Some die in a day, and more are away for a moment, so that there is still time in which the load of
	// all is known: without that none leaves. The next one dies once all is whole without the
	// last: what two replicas lose is lost.
	whole := true
	for _, until := range d.ill {
		whole = whole && until[1] != 0
	}
	aDay, more := dayStep.Hours()/24, float64(len(members))
	switch n := members[d.rng.IntN(len(members))]; {
	case d.ill[n.Incarnation] != [2]time.Duration{}:
	case whole && d.rng.Float64() < aDay*(10+more/40):
		d.died++
		d.ill[n.Incarnation] = [2]time.Duration{d.now}
	case d.rng.Float64() < aDay*(20+more/20):
		d.ill[n.Incarnation] = [2]time.Duration{d.now, d.now + time.Duration(30+d.rng.IntN(500))*time.Second}
	}
}

// provide does what a provisioner is asked for: nodes register after a minute or two, few never,
// and end at once.
func (d *day) provide() {
	for _, p := range d.s.Provisions {
		if p.State.Ended() {
			continue
		}
		due, known := d.due[p.ID]
		if !known {
			if due = d.now + time.Duration(40+d.rng.IntN(60))*time.Second; d.rng.IntN(40) == 0 && p.Kind == topology.Launch {
				due = math.MaxInt64
				d.stillborn++
			}
			d.due[p.ID] = due
		}
		switch {
		case p.Kind == topology.End:
			d.apply(steered(d.s, &p, topology.Provided, p.Incarnation, p.Node+" has ended"))
		case d.now >= due:
			d.s = registerNode(d.t, d.s, p.Node, p.Zone)
			d.due[p.ID] = math.MaxInt64
			d.joins++
		}
	}
}

func (d *day) run(length time.Duration) {
	for said := time.Duration(0); d.at() < length; {
		if d.at()-said >= 2*time.Hour {
			said = d.at()
			d.t.Logf("%s: %d joins, %d leaves, %d moves", d.at(), d.joins, d.leaves, d.moved)
		}
		d.step()
		if d.t.Failed() {
			return
		}
	}
}

func envNumber(t *testing.T, name string, otherwise int) int {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s=%s is not a number", name, s)
	}
	return n
}

// A day of the planner and the policy, by the leader's own functions: load comes and goes, and
// nodes with it; some die, some are away for a moment, and once two in five of them seem
// to. With 1000 nodes it is make day, with fewer it is as large in proportion.
func TestADay(t *testing.T) {
	if testing.Short() {
		t.Skip("a day takes a while")
	}
	most, seed := envNumber(t, envDayNodes, 100), uint64(envNumber(t, envDaySeed, 1))
	vnodes := 1
	for vnodes < 8*most {
		vnodes *= 2
	}
	again := fmt.Sprintf("%s=%d %s=%d go test -run '^TestADay$' ./internal/orchestrator", envDayNodes, most, envDaySeed, seed)
	began := time.Now()
	d := newDay(t, seed, most, vnodes)
	d.run(24 * time.Hour)
	c := d.dayCounts
	t.Logf("%d vnodes, %d to %d nodes: %d joins and %d leaves, %d of them of %d that died, %d launches in vain; %d ups, %d downs, %d turns; "+
		"%d operations with %d moves, %.4f of the least; imbalance at most %.4f; %d commands in %s; again: %s",
		vnodes, c.least, c.peak, c.joins, c.leaves, c.recovered, c.died, c.stillborn, c.ups, c.downs, c.turns,
		c.operations, c.moved, float64(c.moved)/float64(max(1, c.needed)), c.imbalance, c.commands, time.Since(began).Round(time.Second), again)
	if t.Failed() {
		return
	}
	if c.joins+c.leaves < 2*most {
		t.Errorf("%d joins and leaves, want %d", c.joins+c.leaves, 2*most)
	}
	if c.turns > 4 {
		t.Errorf("%d turns: the load turns three times", c.turns)
	}
	if c.moved > c.needed*11/10 {
		t.Errorf("%d slots moved, %d had to", c.moved, c.needed)
	}
	if c.peak < most*9/10 || c.died == 0 || c.recovered < c.died-max(2, most/50) {
		t.Errorf("%d nodes at most, %d of %d dead ones replaced", c.peak, c.recovered, c.died)
	}
	// The same seed decides the same: as the load of an hour of the morning goes.
	var digests [2]uint64
	for i := range digests {
		d := newDay(t, seed, 50, 512)
		d.began -= 4 * time.Hour
		d.run(5 * time.Hour)
		if digests[i] = d.digest; d.commands < 10 {
			t.Errorf("%d commands in an hour", d.commands)
		}
	}
	if digests[0] != digests[1] {
		t.Errorf("the same hour twice: digests %x", digests)
	}
}
