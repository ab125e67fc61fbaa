package devcluster

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMembers(t *testing.T) {
	var got []string
	for _, m := range (Settings{Nodes: 4, Orchestrators: 3, Zones: 3, Port: 7400}).members() {
		line := fmt.Sprintf("%s %s %s", m.Name, m.Role, m.Zone)
		for _, l := range m.listeners() {
			line += fmt.Sprintf(" %s/%d", l.Network, l.Port)
		}
		got = append(got, line)
	}
	want := []string{
		"orch1 orchestrator  tcp/7390 tcp/7391 tcp/7392 udp/7392 tcp/7393",
		"orch2 orchestrator  tcp/7380 tcp/7381 tcp/7382 udp/7382 tcp/7383",
		"orch3 orchestrator  tcp/7370 tcp/7371 tcp/7372 udp/7372 tcp/7373",
		"node1 data z1 tcp/7400 tcp/7401 tcp/7402 udp/7402",
		"node2 data z2 tcp/7410 tcp/7411 tcp/7412 udp/7412",
		"node3 data z3 tcp/7420 tcp/7421 tcp/7422 udp/7422",
		"node4 data z1 tcp/7430 tcp/7431 tcp/7432 udp/7432",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
}

func TestPortsNeverOverlap(t *testing.T) {
	seen := map[string]string{}
	for _, m := range (Settings{Nodes: MaxNodes, Orchestrators: 5, Zones: 1, Port: 7400}).members() {
		for _, l := range m.listeners() {
			key := fmt.Sprintf("%s/%d", l.Network, l.Port)
			if other, taken := seen[key]; taken {
				t.Errorf("%s is a port of %s and of %s", key, other, m.Name)
			}
			seen[key] = m.Name
		}
	}
}

func TestSettingsValidate(t *testing.T) {
	ok := Settings{Nodes: 3, Orchestrators: 1, Zones: 3, Port: 7400}
	for _, test := range []struct {
		name   string
		change func(*Settings)
		want   string
	}{
		{"good", func(*Settings) {}, ""},
		{"lowest port", func(s *Settings) { s.Port = 11 }, ""},
		{"highest port", func(s *Settings) { s.Port = 65513 }, ""},
		{"no nodes", func(s *Settings) { s.Nodes = 0 }, "--nodes 0: want 1 to 100"},
		{"too many nodes", func(s *Settings) { s.Nodes = 101 }, "--nodes 101"},
		{"even orchestrators", func(s *Settings) { s.Orchestrators = 2 }, "--orchestrators 2: want 1, 3 or 5"},
		{"no zones", func(s *Settings) { s.Zones = 0 }, "--zones 0"},
		{"more zones than nodes", func(s *Settings) { s.Zones = 4 }, "--zones 4: want 1 to the number of nodes, 3"},
		{"port too low", func(s *Settings) { s.Port = 10 }, "the ports 0 to 32"},
		{"port too high", func(s *Settings) { s.Port = 65514 }, "the ports 65504 to 65536"},
		{"two at once", func(s *Settings) { s.Nodes, s.Orchestrators = -1, 4 }, "--nodes -1: want 1 to 100\n--orchestrators 4"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := ok
			test.change(&s)
			err := s.Validate()
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
}

func TestNextNode(t *testing.T) {
	s := Settings{Nodes: 3, Orchestrators: 1, Zones: 2, Port: 65503}
	members := s.members()
	got, err := s.nextNode(members, "")
	if want := (member{Name: "node4", Role: RoleData, Zone: "z2", Port: 65533}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if got, err = s.nextNode(members, "attic"); err != nil || got.Zone != "attic" {
		t.Errorf("got %+v, %v, want the zone that was asked for", got, err)
	}
	if _, err = s.nextNode(members, "no such/zone"); err == nil || !strings.Contains(err.Error(), "bad zone name") {
		t.Errorf("got error %v for an impossible zone", err)
	}
	if _, err = s.nextNode(append(members, got), ""); err == nil || !strings.Contains(err.Error(), "node5") {
		t.Errorf("got error %v for a node beyond the last port", err)
	}
	// A number in the middle that is free is taken first.
	if got, err = s.nextNode([]member{members[1], members[3]}, ""); err != nil || got.Name != "node2" {
		t.Errorf("got %+v, %v, want node2", got, err)
	}
}

func TestChildEnviron(t *testing.T) {
	got := childEnviron([]string{"KVNODE_NAME=node1", "A=b", "KVORCH_PEERS=x", "KVCTL_ENDPOINTS=y"})
	if diff := cmp.Diff([]string{"A=b", "KVCTL_ENDPOINTS=y"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
