package devcluster_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kvctlCode runs a command against the cluster and returns what it wrote to stdout, and its exit
// code.
func (r *rig) kvctlCode(args ...string) (string, int) {
	r.t.Helper()
	bin, err := binaries()
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "kvctl"), append(args, "--endpoints", strings.Join(r.endpoints(), ","), "--timeout", "20s")...)
	cmd.Env = append(os.Environ(), "HOME="+r.t.TempDir())
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		r.t.Fatal(err)
	}
	r.t.Logf("kvctl %s: exit code %d\n%s%s", strings.Join(args, " "), cmd.ProcessState.ExitCode(), out, stderr.String())
	return string(out), cmd.ProcessState.ExitCode()
}

// The orchestrator's directory is deleted: kvctl recover, a start with its file, and all is
// as before, with the records, and a ring that can be changed.
func TestE2ERecover(t *testing.T) {
	besideOthers(t)
	r := start(t, 3, 1)
	c := r.client()
	put := func(key, value string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := c.Put(ctx, []byte(key), []byte(value)); err != nil {
			t.Fatalf("put %s: %v", key, err)
		}
	}
	for i := range 50 {
		put(fmt.Sprint("before", i), "v")
	}
	if _, code := r.kvctlCode("recover", "--yes"); code != 1 {
		t.Errorf("with a living orchestrator the exit code is %d", code)
	}
	r.kill("orch1")
	dir := filepath.Join(r.cluster.Dir(), "orch1")
	if _, err := os.Stat(dir); err != nil {
		t.Fatal(err) // the test would delete nothing
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "recovery.json")
	if _, code := r.kvctlCode("recover", "--file", file); code != 2 {
		t.Errorf("without --yes the exit code is %d", code)
	}
	if _, code := r.kvctlCode("recover", "--dry-run", "--file", file); code != 0 {
		t.Errorf("a dry run's exit code is %d", code)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a dry run writes a file")
	}
	for range 2 { // it can be run again
		out, code := r.kvctlCode("recover", "--yes", "--file", file, "-o", "json")
		var doc struct {
			Generation int
			Done       bool
		}
		if err := json.Unmarshal([]byte(out), &doc); code != 0 || err != nil || doc.Generation != 1 || !doc.Done {
			t.Fatalf("exit code %d, %+v, %v", code, doc, err)
		}
	}
	put("sealed", "v")
	if err := r.cluster.Recover(file); err != nil {
		t.Fatal(err)
	}
	r.up("orch1")
	r.eventually(30*time.Second, func() string {
		out, code := r.kvctlCode("cluster", "status", "-o", "json")
		if code != 0 || !strings.Contains(out, `"control_plane_available": true`) {
			return "the control plane is not back"
		}
		return ""
	})
	for i := range 50 {
		if v, err := c.Get(context.Background(), fmt.Append(nil, "before", i)); err != nil || string(v.Value) != "v" {
			t.Fatalf("before%d = %q, %v", i, v.Value, err)
		}
	}
	put("after", "v")
	if _, err := r.cluster.AddNode(context.Background(), ""); err != nil {
		t.Fatal(err)
	}
	r.up("node4")
	// Nodes that have not heard of the new generation do not know node4 yet.
	r.eventually(30*time.Second, func() string {
		if _, code := r.kvctlCode("ring", "apply", "--add", "node4", "--yes", "--wait"); code != 0 {
			return fmt.Sprintf("ring apply: exit code %d", code)
		}
		return ""
	})
	if out, code := r.kvctlCode("ring", "distribution"); code != 0 || !strings.Contains(out, "node4") {
		t.Errorf("distribution: exit code %d", code)
	}
	if v, err := c.Get(context.Background(), []byte("sealed")); err != nil || string(v.Value) != "v" {
		t.Errorf("sealed = %q, %v", v.Value, err)
	}
}
