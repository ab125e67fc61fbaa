package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestAServerThatEndsIsNamedWithItsLog(t *testing.T) {
	var f fleet
	defer f.stop()
	if err := f.launch(t.TempDir(), "broken", "sh", "-c", "echo the address is taken >&2; exit 3"); err != nil {
		t.Fatal(err)
	}
	err := f.ready(context.Background(), func(context.Context) error { return errors.New("refused") })
	if err == nil || !strings.Contains(err.Error(), "broken has ended (exit status 3)") || !strings.Contains(err.Error(), "the address is taken") {
		t.Errorf("error = %v", err)
	}
}

func TestStopEndsProcesses(t *testing.T) {
	var f fleet
	for _, name := range []string{"a", "b"} {
		if err := f.launch(t.TempDir(), name, "sleep", "1000"); err != nil {
			t.Fatal(err)
		}
	}
	servers := f.servers()
	if err := f.check(); err != nil || len(servers) != 2 {
		t.Fatalf("%v, %v", servers, err)
	}
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.pid)); err == nil {
			t.Errorf("%s, process %d, is still there", s.name, s.pid)
		}
	}
	if err := f.stop(); err != nil {
		t.Errorf("stop once more: %v", err)
	}
}

func TestReadyEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var f fleet
	err := f.ready(ctx, func(context.Context) error { cancel(); return errors.New("not yet") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
}
