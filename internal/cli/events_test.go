package cli

import (
	"strings"
	"testing"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func TestEvents(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	for i, e := range []*topologyv1.Change{
		{Subject: "node", Name: "node3", What: "registered at h:1 in zone z"},
		{Subject: "health", Name: "node3", What: "node3, #3, is healthy"},
		{Subject: "move", Name: "node3", What: "node3 to #4"},
		{Subject: "capacity", What: "2 more nodes"},
	} {
		e.Number, e.Epoch, e.AtMs = uint64(i+1), 5, 1772366400000+uint64(i)*1000
		f.mu.history = append(f.mu.history, e)
	}
	f.mu.Unlock()
	for _, tc := range []struct {
		args string
		want []string
	}{
		{"events", []string{"registered", "is healthy", "2 more nodes"}},
		{"events --moves", []string{"registered", "is healthy", "#4", "2 more nodes"}},
		{"events --subject move", []string{"#4"}},
		{"events --subject health", []string{"is healthy"}},
		{"events --name node3", []string{"registered", "is healthy"}},
		{"events --limit 1", []string{"2 more nodes"}},
		{"events --limit 1 -o json", []string{`"what": "2 more nodes"`}},
	} {
		r := f.run(strings.Fields(tc.args)...).want(t, 0)
		lines := 0
		for line := range strings.Lines(r.stdout) {
			if strings.Contains(line, "node") {
				lines++
			}
		}
		for _, want := range tc.want {
			if !strings.Contains(r.stdout, want) {
				t.Errorf("%s: no %q in\n%s%s", tc.args, want, r.stdout, r.stderr)
			}
		}
		if !strings.Contains(tc.args, "json") && lines != len(tc.want) {
			t.Errorf("%s: want %d events:\n%s", tc.args, len(tc.want), r.stdout)
		}
	}
	for _, args := range []string{"events --subject nodes", "events --limit -1", "events now"} {
		f.run(strings.Fields(args)...).want(t, 2)
	}
}
