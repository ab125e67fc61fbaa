package orchestrator

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func testConfig(orchestrators int) Config {
	cfg := Defaults()
	cfg.Name, cfg.DataDir = "orch1", "data"
	for i := range orchestrators {
		h := fmt.Sprintf("10.0.0.%d", i+1)
		cfg.Peers = append(cfg.Peers, Peer{fmt.Sprint("orch", i+1), h + ":1", h + ":2", h + ":3", h + ":4"})
	}
	cfg.Bootstrap.Vnodes = 16
	return cfg
}

func registerNode(t *testing.T, s *topology.State, name, zone string) *topology.State {
	t.Helper()
	next, _, err := s.Apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_Register{Register: &topologyv1.Register{
		Node: &topologyv1.Node{Name: name, Zone: zone, Role: topologyv1.Role_ROLE_DATA, Address: name + ":1", DataId: name + zone}, Boot: 1,
	}}}}})
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// settle applies what decide says until it has nothing to say. What is only noted is no
// step.
func settle(t *testing.T, s *topology.State, cfg *Config, dead ...uint64) (_ *topology.State, steps []string) {
	t.Helper()
	for range 20 {
		cmd, err := decide(s, cfg, alive(s, dead...), "c1")
		if err != nil {
			t.Fatal(err)
		}
		if cmd == nil {
			return s, steps
		}
		if m := cmd.GetMutations()[0]; m.GetFindHealth() == nil && m.GetSetCondition() == nil {
			steps = append(steps, cmd.GetChange().GetSubject())
		}
		if s, _, err = s.Apply(cmd); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the leader never comes to rest")
	return nil, nil
}

// Of a node that was wiped and registered again before the ring formed, only the
// newer counts and gets slots; of one that is dead, neither.
func TestRingFormsOfLivingNodes(t *testing.T) {
	cfg := testConfig(1)
	s, _ := settle(t, nil, &cfg)
	for _, zone := range []string{"z1", "z2"} { // another zone makes another data directory
		s = registerNode(t, s, "n1", zone)
	}
	s = registerNode(t, s, "n2", "z")
	if s, steps := settle(t, s, &cfg); len(steps) != 0 {
		t.Fatalf("with two nodes that were registered three times it decides on %v, %+v", steps, s.Topology)
	}
	s = registerNode(t, s, "n3", "z")
	if s, steps := settle(t, s, &cfg, 3); len(steps) != 0 {
		t.Fatalf("with a dead node it decides on %v, %+v", steps, s.Topology)
	}
	s, _ = settle(t, s, &cfg)
	if counts := s.Topology.SlotCounts(3); !s.Topology.Formed() || counts[1] != 0 || counts[2] == 0 {
		t.Errorf("slots %v", counts)
	}
}

func TestNameFree(t *testing.T) {
	const unknown, healthy, unhealthy = topologyv1.NodeHealth_STATE_UNSPECIFIED, topologyv1.NodeHealth_STATE_HEALTHY, topologyv1.NodeHealth_STATE_UNHEALTHY
	cfg := testConfig(1)
	s, _ := settle(t, nil, &cfg)
	s = registerNode(t, s, "n1", "a")
	s = registerNode(t, s, "n1", "b")
	for _, tc := range []struct {
		name, dataID  string
		first, second topologyv1.NodeHealth_State
		want          string
	}{
		{"n2", "x", healthy, healthy, ""},
		{"n1", "n1b", unknown, unknown, ""}, // restarted
		{"n1", "n1b", unhealthy, unhealthy, ""},
		{"n1", "n1a", unhealthy, healthy, "NAME_IN_USE"}, // replaced
		{"n1", "x", unhealthy, healthy, "NAME_IN_USE"},
		{"n1", "x", unhealthy, unknown, rpc.ReasonNotReady},
		{"n1", "x", unhealthy, unhealthy, ""},
		// At the address of the one before, whose end may not have been noticed.
		{"n1", "at n1:1", unhealthy, healthy, rpc.ReasonNotReady},
		{"n1", "at n1:1", unhealthy, unhealthy, ""},
	} {
		address, _ := strings.CutPrefix(tc.dataID, "at ")
		err := nameFree(s.Topology, &topologyv1.Node{Name: tc.name, DataId: tc.dataID, Address: address}, func(incarnation uint64) topologyv1.NodeHealth_State {
			return []topologyv1.NodeHealth_State{tc.first, tc.second}[incarnation-1]
		})
		if err == nil && tc.want != "" || err != nil && err.Reason != tc.want {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

// Of what a provisioner launched twice the first to register keeps the name, dead or not,
// for as long as a launch may take. Wiped, it is known by its address.
func TestNodesAreLaunchedOnce(t *testing.T) {
	const within = time.Minute
	cfg := testConfig(1)
	s, _ := settle(t, nil, &cfg)
	apply := func(cmd *topologyv1.Command) {
		t.Helper()
		next, _, err := s.Apply(cmd)
		if err != nil {
			t.Fatal(err)
		}
		s = next
	}
	apply(&topologyv1.Command{Mutations: []*topologyv1.Mutation{askProvision(topology.Provision{Kind: topology.Launch, Zone: "z"})}})
	name := s.Provisions[0].Node
	at := s.Provisions[0].AtMillis
	check := func(when string, now int64, dataID, address, want string) {
		t.Helper()
		err := launchedOnce(s, &topologyv1.Node{Name: name, DataId: dataID, Address: address}, now, within)
		if err == nil && want != "" || err != nil && err.Reason != want {
			t.Errorf("%s: %v, want %q", when, err, want)
		}
	}
	check("the first", at, name+"a", "a:1", "")
	s = registerNode(t, s, name, "a")
	address := s.Topology.Resolve(name).Address
	check("the first, started again elsewhere", at, name+"a", "other:1", "")
	check("a second, before the first was noted", at, "x", "other:1", "NAME_IN_USE")
	apply(steered(s, &s.Provisions[0], topology.Provided, s.Topology.Resolve(name).Incarnation, "registered"))
	at = s.Provisions[0].ChangedMillis
	check("a second", at+within.Milliseconds()-1, "x", "other:1", "NAME_IN_USE")
	check("the first, wiped", at, "x", address, "")
	check("a second, long after", at+within.Milliseconds(), "x", "other:1", "")
}

func TestDecide(t *testing.T) {
	cfg := testConfig(3)
	s, steps := settle(t, nil, &cfg)
	if got := strings.Join(steps, " "); got != "cluster cluster" || s.Topology.Formed() || len(s.Topology.Orchestrators) != 3 {
		t.Fatalf("steps %s, topology %+v", got, s.Topology)
	}
	for i := range 2 {
		s = registerNode(t, s, fmt.Sprint("n", i), fmt.Sprint("z", i))
	}
	if s, steps = settle(t, s, &cfg); len(steps) != 0 {
		t.Fatalf("with two of three founding nodes it decides on %v", steps)
	}
	s = registerNode(t, s, "n2", "z2")
	s, steps = settle(t, s, &cfg)
	if got := strings.Join(steps, " "); got != "ring" || !s.Topology.Formed() || s.Topology.Namespace("default").N != 3 {
		t.Fatalf("steps %s", got)
	}
	s = registerNode(t, s, "n3", "z0")
	if s, steps = settle(t, s, &cfg); len(steps) != 0 || len(s.Topology.Members()) != 3 {
		t.Errorf("a spare moves it to %v", steps)
	}
	moved := testConfig(3)
	moved.Peers[1].Address = "10.0.0.9:1"
	if s, steps = settle(t, s, &moved); len(steps) != 1 || s.Topology.Orchestrators[1].Address != "10.0.0.9:1" {
		t.Errorf("a moved orchestrator: %v", steps)
	}
}

func TestSmallRings(t *testing.T) {
	for founding, n := range map[int]int{1: 1, 2: 2, 5: 3} {
		cfg := testConfig(1)
		cfg.Bootstrap.FoundingNodes = founding
		s, _ := settle(t, nil, &cfg)
		for i := range founding {
			s = registerNode(t, s, fmt.Sprint("n", i), "z")
		}
		s, _ = settle(t, s, &cfg)
		if got := s.Topology.Namespace("default").N; got != n {
			t.Errorf("%d founding nodes: N is %d, want %d", founding, got, n)
		}
	}
}

func TestCreateNamespaceWidensTheRing(t *testing.T) {
	cfg := testConfig(1)
	cfg.Bootstrap.FoundingNodes = 5
	s, _ := settle(t, nil, &cfg)
	for i := range 5 {
		s = registerNode(t, s, fmt.Sprint("n", i), fmt.Sprint("z", i%3))
	}
	s, _ = settle(t, s, &cfg)
	before := s.Topology.Ring
	five := 5
	cmd, _, err := createNamespace(s, "wide", topology.NamespaceSettings{N: &five})
	if err != nil {
		t.Fatal(err)
	}
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	for v := range s.Topology.Ring {
		slots := s.Topology.Ring[v].Slots
		if len(slots) != 5 {
			t.Fatalf("vnode %d has %d slots", v, len(slots))
		}
		for i, old := range before[v].Slots {
			if slots[i] != old {
				t.Fatalf("vnode %d: slot %d was %v, is %v", v, i, old, slots[i])
			}
		}
	}
	if _, _, err := createNamespace(s, "wide", topology.NamespaceSettings{}); err == nil {
		t.Error("made twice")
	}
	if _, _, err := updateNamespace(s.Topology, "nope", topology.NamespaceSettings{}, false); err == nil {
		t.Error("changed what does not exist")
	}
	if _, err := dropNamespace(s.Topology, "default"); err == nil {
		t.Error("dropped default")
	}
}

// group is an auto-scaling group with the defaults otherwise.
func group(least, most int) AutoScalingGroup {
	g := Defaults().Bootstrap.AutoScalingGroup
	g.MinCapacity, g.MaxCapacity = least, most
	return g
}

// What a cluster begins with by default are the default settings.
func TestBootstrapSettings(t *testing.T) {
	b := Defaults().Bootstrap
	s, err := b.settings()
	s.Version = 1
	if err != nil || s != topology.DefaultSettings() {
		t.Errorf("%+v, %v", s, err)
	}
	b.AutoScalingGroup, b.Join, b.Rebalance.Policy = group(3, 12), "manual", "auto"
	if s, err = b.settings(); err != nil || s.AutoScalingGroup != topology.DefaultGroup() || s.JoinsAuto() || s.Rebalance.Policy != topology.RebalanceAuto {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestValidate(t *testing.T) {
	for key, harm := range map[string]func(*Config){
		"name":                               func(c *Config) { c.Name = "" },
		"is not one of the peers":            func(c *Config) { c.Name = "orch9" },
		"data_dir":                           func(c *Config) { c.DataDir = "" },
		"listen":                             func(c *Config) { c.Listen = "7390" },
		"raft_listen":                        func(c *Config) { c.RaftListen = "x:0" },
		"peers: there are 2":                 func(c *Config) { c.Peers = c.Peers[:2] },
		"appears twice":                      func(c *Config) { c.Peers[1].Name = "orch1" },
		"peers[2].raft_address":              func(c *Config) { c.Peers[2].RaftAddress = "0.0.0.0:1" },
		"bootstrap.founding_nodes":           func(c *Config) { c.Bootstrap.FoundingNodes = 0 },
		"bootstrap.vnodes":                   func(c *Config) { c.Bootstrap.Vnodes = 100 },
		"health_checks.interval":             func(c *Config) { c.Bootstrap.HealthChecks.Interval = 0 },
		"health_checks.timeout":              func(c *Config) { c.Bootstrap.HealthChecks.Timeout = time.Hour },
		"health_checks.healthy_thres":        func(c *Config) { c.Bootstrap.HealthChecks.HealthyThreshold = 0 },
		"write a max_capacity of 3":          func(c *Config) { c.Bootstrap.AutoScalingGroup.MinCapacity = 3 },
		"write a max_capacity of 12 or less": func(c *Config) { c.Bootstrap.AutoScalingGroup = group(3, 13) },
		"with N=3":                           func(c *Config) { c.Bootstrap.AutoScalingGroup = group(2, 4) },
		"target_cpu_utilization": func(c *Config) {
			c.Bootstrap.AutoScalingGroup = group(3, 4)
			c.Bootstrap.AutoScalingGroup.TargetCPU = "120%"
		},
		"scale_up_cooldown": func(c *Config) {
			c.Bootstrap.AutoScalingGroup = group(3, 4)
			c.Bootstrap.AutoScalingGroup.ScaleUpCooldown = 0
		},
		"join is":             func(c *Config) { c.Bootstrap.Join = "never" },
		"placement is":        func(c *Config) { c.Bootstrap.Placement = "split" },
		"rebalance.threshold": func(c *Config) { c.Bootstrap.Rebalance.Threshold = "70" },
		"rebalance.cooldown":  func(c *Config) { c.Bootstrap.Rebalance.Cooldown = -1 },
		"max_value_bytes":     func(c *Config) { c.Bootstrap.MaxValueBytes = 1 << 30 },
		"election_timeout":    func(c *Config) { c.ElectionTimeout = time.Millisecond },
		"tls":                 func(c *Config) { c.TLS.Cert = "x" },
	} {
		cfg := testConfig(3)
		if err := cfg.Validate(); err != nil {
			t.Fatal(err)
		}
		harm(&cfg)
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("error = %v, want one that names %s", err, key)
		}
	}
	// A wrong configuration is refused before anything is opened.
	if _, err := Start(Config{}); err == nil {
		t.Error("an empty configuration starts")
	}
}

func TestMachineRestores(t *testing.T) {
	m := newMachine()
	if b, err := m.Snapshot(); err != nil || len(b) != 0 {
		t.Fatalf("snapshot of nothing: %d bytes, %v", len(b), err)
	}
	cfg := testConfig(1)
	s, _ := settle(t, nil, &cfg)
	m.set(registerNode(t, s, "n1", "z"))
	b, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	other := newMachine()
	changed := other.changed()
	if err := other.Restore(b); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("watchers are not told")
	}
	if other.topology().Epoch != m.topology().Epoch || other.topology().Resolve("n1") == nil {
		t.Error("the restored topology differs")
	}
	if err := other.Restore([]byte("junk")); err == nil {
		t.Error("junk restores")
	}
	if a := other.Apply(1, []byte{0xff}).(applied); a.err == nil {
		t.Error("a command that does not decode applies")
	}
	var r *topology.Refusal
	if a := newMachine().Apply(1, nil).(applied); !errors.As(a.err, &r) {
		t.Errorf("error = %v", a.err)
	}
}

// A dropped namespace's slots go with it.
func TestUnusedSlotsAreTrimmed(t *testing.T) {
	s, cfg := ringOf(t, 5)
	five := 5
	cmd, _, err := createNamespace(s, "wide", topology.NamespaceSettings{N: &five})
	if err != nil {
		t.Fatal(err)
	}
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	if cmd, err = dropNamespace(s.Topology, "wide"); err != nil {
		t.Fatal(err)
	}
	if s, _, err = s.Apply(cmd); err != nil {
		t.Fatal(err)
	}
	before := s.Topology.Ring
	s, what := next(t, s, cfg, alive(s))
	if !strings.Contains(what, "vnodes have 3 slots") || len(s.Topology.Ring[0].Slots) != 3 {
		t.Fatalf("%q: %+v", what, s.Topology.Ring[0])
	}
	for v := range before {
		if !slices.Equal(before[v].Slots[:3], s.Topology.Ring[v].Slots) {
			t.Errorf("vnode %d was %+v and is %+v", v, before[v], s.Topology.Ring[v])
		}
	}
	if _, what := next(t, s, cfg, alive(s)); what != "" {
		t.Errorf("and then: %q", what)
	}
}
