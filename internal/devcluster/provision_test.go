package devcluster

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
)

func TestProvisioner(t *testing.T) {
	c, _ := create(t, 2, 1)
	startAll(t, c)
	p := &Provisioner{c}
	pid := func(name string) int {
		status, err := c.Status()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range status {
			if s.Name == name {
				return s.PID
			}
		}
		return 0
	}

	// Two leaders at once ask for the same node: there is one.
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			if err := p.Launch(t.Context(), "node3", "z2"); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if err := c.WaitReady(t.Context(), "node3"); err != nil {
		t.Fatal(err)
	}
	first := pid("node3")
	if err := p.Launch(t.Context(), "node3", "z2"); err != nil || pid("node3") != first {
		t.Errorf("launched again: process %d in the place of %d, %v", pid("node3"), first, err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "node3": Running, "orch1": Running})

	// One that stands still ends, too, and its disk with it.
	if err := c.Pause(t.Context(), "node3"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.End(t.Context(), "node3"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(dataDir(c.dir, "node3")); !os.IsNotExist(err) {
		t.Errorf("its data directory: %v", err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Running, "orch1": Running})

	for name, want := range map[string]string{"orch1": "is no data node"} {
		if err := p.End(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("end %s: %v", name, err)
		}
	}
	for _, name := range []string{"other", "node0", "node", "node03", "node99999"} {
		if err := p.Launch(t.Context(), name, "z1"); err == nil {
			t.Errorf("launched %s", name)
		}
	}
	hurry, cancel := context.WithCancel(t.Context())
	cancel()
	unlock, err := lock(t.Context(), c.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := p.Launch(hurry, "node4", "z1"); err == nil {
		t.Error("a call goes on when its context has ended")
	}
}

func TestWipe(t *testing.T) {
	c, _ := create(t, 2, 1)
	startAll(t, c)
	file := dataDir(c.dir, "node2") + "/old"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Wipe(t.Context(), "orch1"); err == nil {
		t.Error("an orchestrator was wiped")
	}
	if err := c.Wipe(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	wantStates(t, c, map[string]string{"node1": Running, "node2": Stopped, "orch1": Running})
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("its data are there still: %v", err)
	}
	startAll(t, c)
}
