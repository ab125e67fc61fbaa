package orchestrator

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/provision"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// A leader asks the provisioner for nothing before there is a ring, not twice at once for
// the same, not more at once than allowed, and to end no node that it is launching.
func TestWhatIsDueOfTheProvisioner(t *testing.T) {
	p := newProvisioning(&Orchestrator{machine: newMachine()})
	check := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, due := range p.due() {
			got = append(got, fmt.Sprint(due.Kind, " ", due.Node))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q is due, want %q", when, got, want)
		}
	}
	check("before there is a ring")

	s, _ := ringOf(t, 3)
	apply := func(ms ...*topologyv1.Mutation) {
		t.Helper()
		next, _, err := s.Apply(&topologyv1.Command{Mutations: ms})
		if err != nil {
			t.Fatal(err)
		}
		s = next
		p.o.machine.state.Store(s)
	}
	launch := func() *topologyv1.Mutation {
		return askProvision(topology.Provision{Kind: topology.Launch, Zone: "z"})
	}
	apply(launch())
	first := s.Provisions[0]
	check("a launch is wanted", "launch "+first.Node)
	p.mu.calls[first.ID] = provisionCall{cancel: func() {}, launches: first.Node}
	check("the call is under way")

	apply(steered(s, &first, topology.Failed, 0, "it did not register").Mutations...)
	apply(askProvision(topology.Provision{Kind: topology.End, Node: first.Node, Zone: "z"}))
	check("the launch was in vain, and its call is still under way")
	delete(p.mu.calls, first.ID)
	check("the call has returned", "end "+first.Node)

	end := s.Provisions[len(s.Provisions)-1]
	p.mu.again[first.ID], p.mu.again[end.ID] = time.Now().Add(time.Hour), time.Now().Add(time.Hour)
	check("the end has failed lately")
	if _, kept := p.mu.again[first.ID]; kept {
		t.Error("what has ended is still remembered")
	}
	p.mu.again[end.ID] = time.Now()
	apply(launch(), launch(), launch(), launch())
	check("much is wanted", "end "+first.Node, "launch node2", "launch node3", "launch node4")
}

// fakeNodes is a provisioner of which a launch can take effect late.
type fakeNodes struct {
	there []provision.Instance
	ended []string
}

func (f *fakeNodes) Launch(context.Context, provision.Node) error { return nil }
func (f *fakeNodes) End(_ context.Context, n provision.Node) error {
	f.ended = append(f.ended, n.Name)
	return nil
}
func (f *fakeNodes) List(context.Context) ([]provision.Instance, error) { return f.there, nil }

// A node that was given up, ended, and then launched after all is ended again once it was
// seen twice; one that is wanted, or that nobody launched, never.
func TestStraysAreEnded(t *testing.T) {
	s, _ := ringOf(t, 3)
	apply := func(ms ...*topologyv1.Mutation) {
		t.Helper()
		next, _, err := s.Apply(&topologyv1.Command{Mutations: ms})
		if err != nil {
			t.Fatal(err)
		}
		s = next
	}
	launch := askProvision(topology.Provision{Kind: topology.Launch, Zone: "z"})
	apply(launch, launch)
	late, wanted := s.Provisions[0], s.Provisions[1]
	all := []provision.Instance{{Name: late.Node}, {Name: wanted.Node}, {Name: "n1"}, {Name: "stranger"}}
	if got := strays(s, all); len(got) != 0 {
		t.Errorf("while both are awaited, strays are %+v", got)
	}
	apply(steered(s, &late, topology.Failed, 0, "it did not register").Mutations...)
	apply(askProvision(topology.Provision{Kind: topology.End, Node: late.Node, Zone: "z"}))
	if got := strays(s, all); len(got) != 0 {
		t.Errorf("before it has ended, strays are %+v", got)
	}
	end := s.Provisions[len(s.Provisions)-1]
	apply(steered(s, &end, topology.Provided, 0, "it has ended").Mutations...)

	o := leadingAlone(t)
	o.machine.state.Store(s)
	fake := &fakeNodes{there: all}
	o.cfg.Provisioner, o.cfg.Provision.Timeout, o.cfg.Logger = fake, time.Minute, slog.New(slog.DiscardHandler)
	p := newProvisioning(o)
	seen := p.endStrays(t.Context(), nil)
	if len(fake.ended) != 0 || !slices.Equal(seen, []uint64{late.ID}) {
		t.Errorf("at the first look %v are ended, %v are seen", fake.ended, seen)
	}
	p.endStrays(t.Context(), seen)
	if !slices.Equal(fake.ended, []string{late.Node}) {
		t.Errorf("at the second look %v are ended, want %s", fake.ended, late.Node)
	}
	s = registerNode(t, s, late.Node, "z")
	if got := strays(s, all); len(got) != 0 {
		t.Errorf("once it has registered, strays are %+v", got)
	}
}
