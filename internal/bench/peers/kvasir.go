package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

var kvasirKind = kind{
	name: "kvasir",
	guarantees: guarantees{
		Write: "synced to disk on 2 of 3 replicas (W=2)",
		Read:  "compares 2 of 3 replicas (R=2): sees every write acknowledged before it",
	},
	version: func(p place) (string, error) {
		v, err := moduleVersion(filepath.Join(p.bin, "kvnode"))
		if v == "(devel)" {
			v = "of this checkout"
		}
		return v, err
	},
	create: func(p place) system { return &kvasir{place: p} },
}

// kvasir is three nodes and one orchestrator, which kvctl starts and stops.
type kvasir struct {
	place
	client *client.Client
	procs  []server
}

func (k *kvasir) start(ctx context.Context) error {
	first := loopback.Base(nil, 40)
	port := first + 10 // node i has ports from here + 10(i-1), the orchestrator those from 10 below
	if err := k.kvctl(ctx, "--nodes", strconv.Itoa(replicas), "--port", strconv.Itoa(port), "--detach"); err != nil {
		return err
	}
	if err := k.readProcesses(); err != nil {
		return err
	}
	var endpoints []string
	for i := range replicas {
		endpoints = append(endpoints, address(port+10*i))
	}
	var err error
	k.client, err = client.New(ctx, endpoints)
	return err
}

func (k *kvasir) data() string { return filepath.Join(k.dir, "cluster") }

func (k *kvasir) state() string { return filepath.Join(k.data(), "dev.json") }

// kvctl runs `kvctl dev`, with contexts of its own: the user's stay as they are.
func (k *kvasir) kvctl(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(k.bin, "kvctl"), append([]string{"dev", "--data", k.data()}, args...)...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+filepath.Join(k.dir, "config"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) } // it stops what it has started
	cmd.WaitDelay = 30 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kvctl dev %s: %w\n%s", strings.Join(args, " "), err, lastLines(string(out)))
	}
	return nil
}

// readProcesses takes the processes from the cluster's state.
func (k *kvasir) readProcesses() error {
	b, err := os.ReadFile(k.state())
	if err != nil {
		return fmt.Errorf("find the processes: %w", err)
	}
	var state struct {
		Processes []struct {
			Name string `json:"name"`
			PID  int    `json:"pid"`
		} `json:"processes"`
	}
	if err := json.Unmarshal(b, &state); err != nil {
		return fmt.Errorf("find the processes: %s: %w", k.state(), err)
	}
	held := 0
	for _, p := range state.Processes {
		s := server{name: p.Name, pid: p.PID, replica: strings.HasPrefix(p.Name, "node")}
		k.procs = append(k.procs, s)
		if s.replica {
			held++
		}
	}
	if held != replicas {
		return fmt.Errorf("find the processes: %s has %d nodes, want %d", k.state(), held, replicas)
	}
	return nil
}

func (k *kvasir) stores() []bench.Store { return []bench.Store{bench.Kvasir(k.client)} }

func (k *kvasir) servers() []server { return k.procs }

func (k *kvasir) check() error {
	for _, p := range k.procs {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.pid)); err != nil {
			logs, _ := filepath.Glob(filepath.Join(k.data(), p.name, "*.log"))
			text := ""
			for _, log := range logs {
				text += "; the end of its log:\n" + tail(log)
			}
			return fmt.Errorf("%s has ended%s", p.name, text)
		}
	}
	return nil
}

func (k *kvasir) stop() error {
	if k.client != nil {
		k.client.Close()
	}
	if _, err := os.Stat(k.state()); errors.Is(err, os.ErrNotExist) {
		return nil // nothing was started
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := k.kvctl(ctx, "stop")
	if err != nil && len(k.procs) > 0 {
		kill := []string{"kill"}
		for _, p := range k.procs {
			kill = append(kill, p.name)
		}
		if k.kvctl(context.Background(), kill...) == nil {
			return nil
		}
	}
	return err
}
