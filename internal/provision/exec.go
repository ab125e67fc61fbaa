package provision

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/kvasirdb/kvasir/internal/topology"
)

const (
	// exitTryAgain is EX_TEMPFAIL of sysexits.h.
	exitTryAgain = 75
	// maxListBytes bounds what a hook prints, 1,000 instances several times over.
	maxListBytes = 1 << 20
	// saidBytes and saidLines bound how much of a hook's complaint is passed on.
	saidBytes = 1 << 10
	saidLines = 5
	// leftoverPatience is how long output is read on after the hook has ended, as long as
	// something it left behind holds its pipes.
	leftoverPatience = time.Second
)

// Exec is a provisioner that runs a hook. docs/provisioners.md has the contract.
type Exec struct {
	command       []string
	timeout       time.Duration
	cluster       string
	orchestrators []string
}

// NewExec returns the provisioner of kind exec for a cluster whose orchestrators
// nodes reach by gRPC at the given addresses.
// REQUIRES: cfg.Validate returned nil.
func NewExec(cfg Config, orchestrators []string) *Exec {
	return &Exec{command: cfg.Exec.Command, timeout: cfg.Timeout, cluster: cfg.Cluster, orchestrators: orchestrators}
}

// Kind returns KindExec.
func (e *Exec) Kind() string { return KindExec }

// Launch launches a node unless an instance of its name exists.
func (e *Exec) Launch(ctx context.Context, n Node) error {
	if err := topology.CheckName("node", n.Name); err != nil {
		return err
	}
	_, err := e.run(ctx, "launch", n)
	return err
}

// End ends a node and deletes its data.
func (e *Exec) End(ctx context.Context, n Node) error {
	if err := topology.CheckName("node", n.Name); err != nil {
		return err
	}
	_, err := e.run(ctx, "end", n)
	return err
}

// List returns the cluster's instances.
func (e *Exec) List(ctx context.Context) ([]Instance, error) {
	out, err := e.run(ctx, "list", Node{})
	if err != nil {
		return nil, err
	}
	if out.cut {
		return nil, fmt.Errorf("hook list printed more than %d bytes", maxListBytes)
	}
	instances, err := parseInstances(out.b)
	if err != nil {
		return nil, fmt.Errorf("hook list: %w", err)
	}
	return instances, nil
}

// request is what a hook reads from its standard input.
type request struct {
	Action        string   `json:"action"`
	Cluster       string   `json:"cluster"`
	Node          string   `json:"node"`
	Zone          string   `json:"zone"`
	Incarnation   uint64   `json:"incarnation"`
	Orchestrators []string `json:"orchestrators"`
}

// run runs the hook and returns the beginning of what it printed.
func (e *Exec) run(ctx context.Context, action string, n Node) (stdout *head, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	input, err := json.Marshal(request{action, e.cluster, n.Name, n.Zone, n.Incarnation, e.orchestrators})
	if err != nil {
		return nil, fmt.Errorf("hook %s: %w", action, err)
	}
	cmd := exec.CommandContext(ctx, e.command[0], append(slices.Clone(e.command[1:]), action)...)
	cmd.Env = append(cmd.Environ(),
		"KVASIR_ACTION="+action, "KVASIR_CLUSTER="+e.cluster,
		"KVASIR_NODE="+n.Name, "KVASIR_ZONE="+n.Zone, fmt.Sprintf("KVASIR_INCARNATION=%d", n.Incarnation),
		"KVASIR_ORCHESTRATORS="+strings.Join(e.orchestrators, ","))
	out, said := head{limit: maxListBytes}, tail{limit: saidBytes}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &said
	// A group of its own, so that what the hook started is killed with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = leftoverPatience
	err = cmd.Run()
	exit := (*exec.ExitError)(nil)
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil:
	case ctx.Err() != nil:
		return nil, fmt.Errorf("hook %s was killed: %w%s", action, ctx.Err(), said.String())
	case errors.As(err, &exit) && exit.ExitCode() == exitTryAgain:
		return nil, fmt.Errorf("hook %s: %w%s", action, ErrTryAgain, said.String())
	default:
		return nil, fmt.Errorf("hook %s: %w%s", action, err, said.String())
	}
	return &out, nil
}

// parseInstances reads what a hook lists, a JSON object a line.
func parseInstances(out []byte) ([]Instance, error) {
	var all []Instance
	number := 0
	for line := range bytes.Lines(out) {
		number++
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		var i struct {
			Name    string `json:"name"`
			ID      string `json:"id"`
			Running *bool  `json:"running"`
		}
		if err := json.Unmarshal(line, &i); err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		if err := topology.CheckName("node", i.Name); err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		if i.Running == nil {
			return nil, fmt.Errorf("line %d: running is missing: want true or false", number)
		}
		all = append(all, Instance{i.Name, i.ID, *i.Running})
	}
	return all, nil
}

// head keeps the beginning of what is written to it.
type head struct {
	limit int
	b     []byte
	cut   bool
}

func (h *head) Write(p []byte) (int, error) {
	fits := min(len(p), h.limit-len(h.b))
	h.b, h.cut = append(h.b, p[:fits]...), h.cut || fits < len(p)
	return len(p), nil
}

// tail keeps the end of what is written to it.
type tail struct {
	limit int
	b     []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = append(t.b[:0], t.b[max(0, len(t.b)-t.limit):]...)
	return len(p), nil
}

// String returns the last lines as the end of an error message, fit for a terminal.
func (t *tail) String() string {
	lines := strings.FieldsFunc(string(t.b), func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) == 0 {
		return ""
	}
	text := strings.Join(lines[max(0, len(lines)-saidLines):], "; ")
	return ": " + strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
}
