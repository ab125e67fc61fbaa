package sim

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/provision"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// What the control loops of a run keep to. Times are short, so that much happens in minutes.
const (
	loopsMin, loopsMax = 4, 8
	loopsTarget        = 0.6
	replaceAfter       = 12 * time.Second
	provisionTimeout   = 15 * time.Second
	launchTimeout      = 40 * time.Second
	// fleetNodes is how many nodes there may ever be, fleetTwins how many at once that run
	// beside another one of their name.
	fleetNodes, fleetTwins = 60, 4
)

// fleet is a provisioner that has simulated nodes. It keeps the laws of package provision
// and errs in every way that these leave. What it was asked for is on record: the
// checker takes it from here, and not from the code under test.
type fleet struct {
	r *run
	// errs is whether the provisioner makes mistakes.
	errs     bool
	machines map[string]*machine // by the name of the node; made beforehand
	late     sync.WaitGroup      // what takes effect later, and nodes that are starting
	mu       struct {
		sync.Mutex
		rng       *rand.Rand
		until     time.Time // when mistakes end
		calls     []*call
		stillborn bool // the last launch was of a node that never registers
		twins     []*process
		// load is how many nodes' CPU the load takes; 0: as much as the target wants of those
		// there are.
		load float64
	}
}

// machine is where the nodes of one name run.
type machine struct {
	name string
	// turn holds a token for whoever starts or ends its processes, which the fields below
	// belong to.
	turn      chan struct{}
	processes []*process
	// exists: it was launched, and not ended since.
	exists bool
	// lost: its disk is gone for good, and nobody starts it again.
	lost bool
}

// call is one call of the provisioner, as it was made and answered.
type call struct {
	kind topology.ProvisionKind
	node provision.Node
	by   string // orchestrator
	how  callFault
	// returned is the zero time while it is under way.
	began, returned time.Time
	err             error
}

func (c *call) String() string {
	return fmt.Sprintf("%s of %s, #%d, by %s", c.kind, c.node.Name, c.node.Incarnation, c.by)
}

// callFault is what goes wrong with a call.
type callFault int

const (
	callWorks callFault = iota
	// callHangs until it is given up.
	callHangs
	// callFails, and does nothing.
	callFails
	// callLies: it does what it was asked for and answers an error.
	callLies
	// callLate hangs until it is given up, and takes effect after that.
	callLate
	// callStillborn launches a node that never registers.
	callStillborn
	// callTwice launches a second process under the same name.
	callTwice
)

func (f callFault) String() string {
	return [...]string{"works", "hangs", "fails", "lies", "is late", "launches a node that never registers", "launches twice"}[f]
}

func newFleet(r *run) *fleet {
	fl := &fleet{r: r, errs: slices.Contains(r.cfg.Faults, provisionerTrack), machines: map[string]*machine{}}
	fl.mu.rng = rand.New(rand.NewPCG(r.cfg.Seed, 0xf1ee7))
	return fl
}

// addMachines makes the machines of all nodes there may ever be. Those of the founding nodes run.
func (fl *fleet) addMachines(founding int) {
	w := fl.r.w
	for i := range fleetNodes {
		name := fmt.Sprint("node", i+1)
		if i >= founding {
			w.AddNode(name, "")
		}
		fl.machines[name] = &machine{name: name, turn: make(chan struct{}, 1), processes: []*process{w.process(name)}, exists: i < founding}
	}
	for i := range fleetTwins {
		name := fmt.Sprint("twin", i+1)
		w.AddNode(name, "")
		fl.mu.twins = append(fl.mu.twins, w.process(name))
	}
}

// configure puts an orchestrator's control loops to work.
func (fl *fleet) configure(cfg *orchestrator.Config, in *instance) {
	b := &cfg.Bootstrap
	b.ReplaceAfter = replaceAfter
	b.AutoScalingGroup.MinCapacity, b.AutoScalingGroup.MaxCapacity = loopsMin, loopsMax
	b.AutoScalingGroup.TargetCPU = fmt.Sprintf("%.0f%%", 100*loopsTarget)
	b.AutoScalingGroup.ScaleUpCooldown, b.AutoScalingGroup.ScaleDownCooldown = 15*time.Second, 20*time.Second
	b.Rebalance.Policy, b.Rebalance.QuietCPU, b.Rebalance.Cooldown = "auto", "100%", 30*time.Second
	cfg.Provision.Timeout, cfg.Provision.LaunchTimeout = provisionTimeout, launchTimeout
	cfg.Provisioner = provisioner{fl, in}
}

// provisioner is the fleet as one run of an orchestrator reaches it.
type provisioner struct {
	fleet *fleet
	in    *instance
}

func (p provisioner) Launch(ctx context.Context, n provision.Node) error {
	return p.fleet.ask(ctx, p.in, topology.Launch, n)
}

func (p provisioner) End(ctx context.Context, n provision.Node) error {
	return p.fleet.ask(ctx, p.in, topology.End, n)
}

// List returns the machines that there are.
func (p provisioner) List(ctx context.Context) (all []provision.Instance, _ error) {
	for name, m := range p.fleet.machines {
		select {
		case m.turn <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if m.exists {
			all = append(all, provision.Instance{Name: name, ID: name, Running: m.processes[0].live != nil})
		}
		<-m.turn
	}
	return all, nil
}

var errFleet = errors.New("the provisioner failed")

// ask makes a call.
func (fl *fleet) ask(ctx context.Context, by *instance, kind topology.ProvisionKind, n provision.Node) error {
	c, wait := fl.begin(by, kind, n)
	if kind == topology.End {
		fl.r.loops.ending(c)
	}
	err := fl.carryOut(ctx, c, wait)
	fl.mu.Lock()
	defer fl.mu.Unlock()
	c.returned, c.err = time.Now(), err
	fl.r.history.Note("provisioner: %s %s, after %s: %v", c, c.how, c.returned.Sub(c.began), err)
	return err
}

// begin notes a call and draws what comes of it.
func (fl *fleet) begin(by *instance, kind topology.ProvisionKind, n provision.Node) (c *call, wait time.Duration) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	c = &call{kind: kind, node: n, by: by.p.name, began: time.Now()}
	fl.mu.calls = append(fl.mu.calls, c)
	wait = time.Duration(100+fl.mu.rng.IntN(2500)) * time.Millisecond
	if how := fl.mu.rng.IntN(20); fl.errs && time.Now().Before(fl.mu.until) {
		faults := []callFault{callHangs, callFails, callFails, callLies, callLies, callLate}
		if kind == topology.Launch {
			faults = append(faults, callStillborn, callTwice, callTwice)
		}
		if how < len(faults) {
			c.how = faults[how]
		}
		if c.how == callStillborn && fl.mu.stillborn {
			c.how = callWorks // the leader waits longer each time
		}
		fl.mu.stillborn = c.how == callStillborn
		if c.how != callWorks {
			fl.r.count(fl.r.report.Faults, fmt.Sprintf("provisioner: a call to %s %s", kind, c.how))
		}
	}
	fl.r.count(fl.r.report.Loops, "call to "+kind.String())
	return c, wait
}

func (fl *fleet) carryOut(ctx context.Context, c *call, wait time.Duration) error {
	switch c.how {
	case callHangs:
		<-ctx.Done()
		return ctx.Err()
	case callLate:
		<-ctx.Done()
		fl.late.Go(func() {
			time.Sleep(wait)
			fl.take(context.Background(), c)
		})
		return ctx.Err()
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.how == callFails {
		return errFleet
	}
	if err := fl.take(ctx, c); err != nil {
		return err
	}
	if c.how == callLies {
		return errFleet
	}
	return nil
}

// take does what a call asks for.
func (fl *fleet) take(ctx context.Context, c *call) error {
	m := fl.machines[c.node.Name]
	if m == nil {
		fl.r.history.violate(0, "the provisioner is asked for the %s: more than %d nodes in one run, or a name that nobody gave", c, fleetNodes)
		return errFleet
	}
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.kind == topology.End {
		fl.remove(m)
		return nil
	}
	if m.exists {
		return nil
	}
	m.exists = true
	p := m.processes[0]
	p.zone = c.node.Zone
	fl.r.count(fl.r.report.Loops, "node launched")
	if c.how == callStillborn {
		return nil
	}
	fl.boot(m, p)
	if c.how == callTwice {
		fl.twin(m, c.node.Zone)
	}
	return nil
}

// remove ends all that runs under a name, and gives its disks back.
// REQUIRES: the machine's turn is held.
func (fl *fleet) remove(m *machine) {
	for _, p := range m.processes {
		if p.live != nil {
			fl.r.w.Crash(p.name, Kill)
		}
		fl.r.w.Wipe(p.name)
	}
	if m.exists {
		fl.r.count(fl.r.report.Loops, "node ended")
	}
	fl.mu.Lock()
	fl.mu.twins = append(fl.mu.twins, m.processes[1:]...)
	fl.mu.Unlock()
	m.processes = m.processes[:1]
	m.exists = false
}

// twin starts a second process under a machine's name a little later.
// REQUIRES: the machine's turn is held.
func (fl *fleet) twin(m *machine, zone string) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if len(fl.mu.twins) == 0 || len(m.processes) > 1 {
		return
	}
	p := fl.mu.twins[0]
	fl.mu.twins = fl.mu.twins[1:]
	p.node, p.zone = m.name, zone
	m.processes = append(m.processes, p)
	wait := time.Duration(fl.mu.rng.IntN(3000)) * time.Millisecond
	fl.late.Go(func() {
		time.Sleep(wait)
		m.turn <- struct{}{}
		defer func() { <-m.turn }()
		if slices.Contains(m.processes, p) {
			fl.boot(m, p)
		}
	})
}

// boot starts a process of a machine without waiting for it.
// REQUIRES: the machine's turn is held.
func (fl *fleet) boot(m *machine, p *process) {
	fl.r.w.begin(p)
	in := p.live
	fl.late.Go(func() {
		<-in.ready
		if in.err == nil {
			return
		}
		fl.r.history.Note("%s, a process of %s, does not start: %v", p.name, m.name, in.err)
		m.turn <- struct{}{}
		defer func() { <-m.turn }()
		if p.live == in {
			p.live = nil
		}
	})
}

// down ends the process of a node against its will, with its disk if that is to be lost, and
// reports whether there was one.
func (fl *fleet) down(name string, how Crash, lost bool) bool {
	m := fl.machines[name]
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if !m.exists {
		return false
	}
	for _, p := range m.processes {
		if p.live == nil && !lost {
			continue
		}
		if p.live != nil {
			fl.r.w.Crash(p.name, how)
		}
		if lost {
			fl.r.w.Wipe(p.name)
		}
	}
	m.lost = m.lost || lost
	return true
}

// up starts the process of a node again, and returns once it serves or a while has passed. One that
// was removed meanwhile is turned away.
func (fl *fleet) up(name string) {
	m := fl.machines[name]
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	p := m.processes[0]
	if !m.exists || m.lost || p.live != nil {
		return
	}
	fl.boot(m, p)
	in := p.live
	select {
	case <-in.ready:
	case <-time.After(20 * time.Second):
		return
	}
	if t := fl.r.present(); in.err != nil && t.Resolve(name) != nil && hostOf(t.Resolve(name).Address) == p.host {
		fl.r.history.violate(0, "%s does not start: %v", name, in.err)
	}
}

// close waits for all that is on its way.
// REQUIRES: no orchestrator runs.
func (fl *fleet) close() { fl.late.Wait() }

// err has the provisioner make mistakes until a time.
func (fl *fleet) err(until time.Time) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.mu.until = until
}

// underWay returns how many calls of a kind are.
func (fl *fleet) underWay(kind topology.ProvisionKind) (n int) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	for _, c := range fl.mu.calls {
		if c.kind == kind && c.returned.IsZero() {
			n++
		}
	}
	return n
}

// log returns the calls so far, as they are now.
func (fl *fleet) log() (out []call) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	for _, c := range fl.mu.calls {
		out = append(out, *c)
	}
	return out
}

// setLoad sets how many nodes' CPU the load takes.
func (fl *fleet) setLoad(nodes float64) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.mu.load = nodes
}

// enough says why the load needs another number of nodes, or "".
func (fl *fleet) enough(nodes int) string {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	within := func(n float64) int { return min(max(int(math.Ceil(n-1e-9)), loopsMin), loopsMax) }
	// A scale-down leaves the margin of 15% that package capacity tells of.
	least, most := within(fl.mu.load/loopsTarget), within(fl.mu.load/loopsTarget/0.85)
	if fl.mu.load > 0 && (nodes < least || nodes > most) {
		return fmt.Sprintf("%d nodes have a load of %.2f, which is for %d to %d", nodes, fl.mu.load, least, most)
	}
	return ""
}

// cpu is what the node on a host reads: the members share the load.
func (fl *fleet) cpu(host string) float64 {
	const idle = 0.02
	t := fl.r.topologies.latest()
	if t == nil || !t.Formed() {
		return idle
	}
	members := t.Members()
	if !slices.ContainsFunc(members, func(n *topology.Node) bool { return hostOf(n.Address) == host }) {
		return idle
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.mu.load == 0 {
		return 0.95 * loopsTarget
	}
	return min(1, fl.mu.load/float64(len(members)))
}

// endpoints returns where nodes serve.
func (fl *fleet) endpoints() (out []string) {
	if t := fl.r.topologies.latest(); t != nil {
		for i := range t.Nodes {
			out = append(out, t.Nodes[i].Address)
		}
		return out
	}
	for i := range fl.r.report.Nodes {
		out = append(out, fl.r.w.Host(fmt.Sprint("node", i+1))+":7400")
	}
	return out
}
