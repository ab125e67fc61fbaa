package topology_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func ask(p topology.Provision) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_AskProvision{AskProvision: &topologyv1.AskProvision{Provision: p.Proto()}}}
}

func steer(id uint64, state topology.ProvisionState, incarnation uint64, failures uint32, problem string) *topologyv1.Mutation {
	return &topologyv1.Mutation{Kind: &topologyv1.Mutation_SteerProvision{SteerProvision: &topologyv1.SteerProvision{
		Id: id, State: topologyv1.Provision_State(state), Incarnation: incarnation, Failures: failures, Problem: problem,
	}}}
}

func found3(t *testing.T) *cluster {
	c := &cluster{t: t}
	c.must(found(4))
	for i, name := range []string{"node1", "node2", "node30"} {
		c.must(register(name, 0, 1, fmt.Sprint("boot", i)))
	}
	c.must(setRing(4, 1, 2, 3), create(*topology.FoundingNamespace(3)))
	return c
}

// A launched node gets a name that no node has or had, under any leader.
func TestLaunchedNodesAreNamedOnce(t *testing.T) {
	c := found3(t)
	epoch := c.state.Topology.Epoch
	launch := topology.Provision{Kind: topology.Launch, Zone: "z1", Why: "a fourth is wanted"}
	names := map[string]bool{}
	for range 3 {
		p := c.must(ask(launch)).Provision
		if names[p.Node] || c.state.Topology.Resolve(p.Node) != nil {
			t.Errorf("%s is given twice", p.Node)
		}
		names[p.Node] = true
		restored, err := topology.StateFromProto(c.state.Proto())
		if err != nil {
			t.Fatal(err)
		}
		c.state = restored
	}
	if !names["node31"] || !names["node33"] {
		t.Errorf("launched %v, want node31 to node33", names)
	}
	if c.state.Topology.Epoch != epoch {
		t.Error("asking for a node raised the epoch, which no node needs to know")
	}
}

func TestProvisionsOnlyGoForward(t *testing.T) {
	c := found3(t)
	id := c.must(ask(topology.Provision{Kind: topology.Launch, Zone: "z1"})).Provision.ID
	c.must(steer(id, topology.Wanted, 0, 1, strings.Repeat("no ", 1000)))
	if p := c.state.Provision(id); p.Failures != 1 || len(p.Problem) > 500 {
		t.Errorf("after a failure: %+v", p)
	}
	c.must(steer(id, topology.Launched, 0, 1, ""))
	refused := func(want string, m *topologyv1.Mutation) {
		t.Helper()
		var r *topology.Refusal
		if _, err := c.apply(m); !errors.As(err, &r) || r.Reason != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	refused("PROVISION_STATE", steer(id, topology.Wanted, 0, 0, ""))
	c.must(steer(id, topology.Provided, 4, 1, ""))
	refused("PROVISION_STATE", steer(id, topology.Failed, 0, 0, ""))
	refused("PROVISION_NOT_FOUND", steer(99, topology.Provided, 0, 0, ""))
	refused("NODE_HAS_SLOTS", ask(topology.Provision{Kind: topology.End, Node: "node1", Incarnation: 1}))
	refused("BAD_PROVISION", ask(topology.Provision{Node: "node1"}))
	refused("BAD_NAME", ask(topology.Provision{Kind: topology.Launch, Zone: "no zone"}))

	// An end is asked for once.
	end := ask(topology.Provision{Kind: topology.End, Node: "node9", Incarnation: 9})
	first := c.must(end).Provision
	if c.must(end); len(c.state.Provisions) != 2 {
		t.Errorf("the end of a node was asked for twice: %+v", c.state.Provisions)
	}
	refused("PROVISION_STATE", steer(first.ID, topology.Launched, 0, 0, ""))
}

func TestEndedProvisionsAreForgotten(t *testing.T) {
	c := found3(t)
	open := c.must(ask(topology.Provision{Kind: topology.Launch, Zone: "z1"})).Provision.ID
	for range 300 {
		id := c.must(ask(topology.Provision{Kind: topology.Launch, Zone: "z1"})).Provision.ID
		c.must(steer(id, topology.Failed, 0, 1, "no"))
	}
	if n := len(c.state.Provisions); n != 201 || c.state.Provision(open) == nil {
		t.Errorf("%d provisions are kept, the open one is %v: want 200 that ended and the open one", n, c.state.Provision(open))
	}
}

func TestFoundHealth(t *testing.T) {
	c := found3(t)
	find := func(at uint64, incarnation uint64, healthy bool, reason string) error {
		h := topology.FoundHealth{Incarnation: incarnation, Healthy: healthy, Reason: reason}
		next, _, err := c.state.Apply(&topologyv1.Command{
			Change: &topologyv1.Change{AtMs: at, Subject: "health", Name: "node1", What: reason},
			Mutations: []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_FindHealth{FindHealth: &topologyv1.FindHealth{
				Nodes: []*topologyv1.FoundHealth{h.Proto()},
			}}}},
		})
		c.state = next
		return err
	}
	for _, step := range []struct {
		at      uint64
		healthy bool
		reason  string
		since   int64
		changes int
	}{
		{10, true, "", 10, 1},
		{20, true, "", 10, 0},
		{30, true, "slow", 10, 1},
		{40, false, "refused", 40, 1},
		{50, false, "timed out", 40, 1},
		{60, true, "", 60, 1},
	} {
		before := len(c.state.History)
		if err := find(step.at, 1, step.healthy, step.reason); err != nil {
			t.Fatal(err)
		}
		h, _ := c.state.Found(1)
		if h.SinceMillis != step.since || h.Healthy != step.healthy || h.Reason != step.reason || len(c.state.History)-before != step.changes {
			t.Errorf("at %d: %+v with %d changes, want %+v", step.at, h, len(c.state.History)-before, step)
		}
	}
	if err := find(70, 9, false, ""); err == nil {
		t.Error("the health of a node that does not exist was taken")
	}
	c.must(register("spare", 0, 1, "spare"))
	spare := c.state.Topology.Resolve("spare").Incarnation
	if err := find(80, spare, false, "gone"); err != nil {
		t.Fatal(err)
	}
	c.must(remove(spare))
	if _, ok := c.state.Found(spare); ok {
		t.Error("the health of a removed node is kept")
	}
}

// Moves take many changes: those before them must not be forgotten for it.
func TestMovesDoNotCrowdOutHistory(t *testing.T) {
	c := found3(t)
	note := func(subject string, n int) {
		for i := range n {
			next, _, err := c.state.Apply(&topologyv1.Command{
				Change:    &topologyv1.Change{Subject: subject, What: fmt.Sprint(i)},
				Mutations: []*topologyv1.Mutation{ask(topology.Provision{Kind: topology.Launch, Zone: "z1"})},
			})
			if err != nil {
				t.Fatal(err)
			}
			c.state = next
		}
	}
	before := len(c.state.History)
	note(topology.SubjectMove, 400)
	if got := len(c.state.History); got != before+300 {
		t.Errorf("%d changes are kept, want the %d from before and 300 of moves", got, before)
	}
	note("capacity", 30)
	number := c.state.History[0].Number
	for _, h := range c.state.History[1:] {
		if h.Number <= number {
			t.Fatalf("change %d comes after %d", h.Number, number)
		}
		number = h.Number
	}
	if number != uint64(before)+430 {
		t.Errorf("the last change has number %d, want %d", number, before+430)
	}
}

func TestSettingsVersions(t *testing.T) {
	c := found3(t)
	set := func(s topology.Settings) error {
		_, err := c.apply(&topologyv1.Mutation{Kind: &topologyv1.Mutation_SetSettings{SetSettings: &topologyv1.SetSettings{Settings: s.Proto()}}})
		return err
	}
	s := c.state.Topology.Settings
	if s.Version != 1 || len(c.state.SettingsVersions) != 1 {
		t.Fatalf("founded with version %d of %d", s.Version, len(c.state.SettingsVersions))
	}
	epoch := c.state.Topology.Epoch
	if err := set(s); err != nil || c.state.Topology.Epoch != epoch {
		t.Errorf("the same settings made epoch %d of %d, %v", c.state.Topology.Epoch, epoch, err)
	}
	s.AutoScalingGroup = topology.AutoScalingGroup{MinCapacity: 3, MaxCapacity: 5, TargetCPU: 0.7, ScaleUpCooldown: 1e9, ScaleDownCooldown: 1e9}
	if err := set(s); err != nil {
		t.Fatal(err)
	}
	s.Version = 2
	if got := c.state.Topology; got.Settings != s || got.Epoch != epoch+1 {
		t.Errorf("set %+v in epoch %d, want %+v in %d", got.Settings, got.Epoch, s, epoch+1)
	}
	restored, err := topology.StateFromProto(c.state.Proto())
	if err != nil {
		t.Fatal(err)
	}
	if got := restored.SettingsVersions; len(got) != 2 || got[1].Settings != s || got[1].Epoch != epoch+1 || got[0].Settings.Version != 1 {
		t.Errorf("kept %+v", got)
	}
	if !proto.Equal(restored.Proto(), c.state.Proto()) {
		t.Error("a state is another one after a snapshot")
	}
	s.MaxValueBytes = 0
	if err := set(s); err == nil || c.state.Topology.Settings.Version != 2 {
		t.Errorf("bad settings: %v, version %d", err, c.state.Topology.Settings.Version)
	}
}
