package orchestrator

import (
	"fmt"
	"slices"
	"testing"
	"time"

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
