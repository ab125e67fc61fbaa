// Package devcluster runs a cluster of real kvnode and kvorch processes on this
// machine, for development and for trying out failures. It plans their ports, writes
// their configuration, starts, signals and stops them, and remembers them in the
// cluster's directory, so that any later process can go on where one left off. It
// never speaks to the cluster beyond asking whether a process is ready, never
// restarts anything by itself, and never signals a process it did not start. See
// DESIGN.md.
package devcluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Options are what a run gives. Zero durations take their defaults.
type Options struct {
	// BinDir is where kvnode and kvorch are found.
	BinDir string
	// NodeArgs are further arguments of kvnode.
	NodeArgs []string
	// Environ is the environment of new processes, less the settings of kvnode and
	// kvorch. Default: this process's.
	Environ []string
	// ReadyTimeout is how long processes may take to become ready. Default 30 s.
	ReadyTimeout time.Duration
	// StopTimeout is how long a process may take to stop before it is killed. Default
	// 15 s, more than the 10 s that a node waits for its requests.
	StopTimeout time.Duration
	// Notice is called with what people should know beyond errors, by the goroutine that
	// runs the method. It may be several lines. Nil is nobody.
	Notice func(string)
}

// Cluster is a development cluster in a directory. Methods are safe for concurrent
// use, also by several operating system processes.
type Cluster struct {
	dir      string
	settings Settings
	opts     Options
	// recovery is a file that orchestrators are started with, or "".
	recovery string
	mu       struct {
		sync.Mutex
		// children are the processes that this one started, by PID. Each is reaped by a
		// goroutine that ends with it.
		children map[int]*child
	}
	// exited holds a token when a child has ended and Watch has not looked since.
	exited chan struct{}
}

// Status describes one process. The fields are a contract with scripts.
type Status struct {
	Name string `json:"name"`
	// Role is data or orchestrator.
	Role string `json:"role"`
	// State is running, paused or stopped.
	State string `json:"state"`
	// PID is 0 when the process is stopped.
	PID int `json:"pid"`
	// Zone is empty for orchestrators.
	Zone string `json:"zone"`
	// ClientAddr is where it serves gRPC, AdminAddr HTTP for health and metrics.
	ClientAddr string `json:"client_addr"`
	AdminAddr  string `json:"admin_addr"`
}

// Open returns the cluster in a directory. ErrNoCluster matches when there is none.
func Open(dir string, opts Options) (*Cluster, error) {
	st, err := loadState(dir)
	if err != nil {
		return nil, err
	}
	return newCluster(dir, st.Settings, opts), nil
}

// Create plans a cluster in a directory, which is made; nothing is started yet. The
// directory must be empty, the executables present and the ports free: otherwise
// nothing is remembered, and it can be tried again with other settings.
func Create(ctx context.Context, dir string, settings Settings, opts Options) (*Cluster, error) {
	if err := settings.Validate(); err != nil {
		return nil, err
	}
	if err := checkEmpty(dir); err != nil {
		return nil, err
	}
	members := settings.members()
	if err := checkBinaries(opts.BinDir, members); err != nil {
		return nil, err
	}
	if err := checkPorts(members); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the cluster's directory: %w", err)
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Under the lock once more: another run may have been quicker.
	if err := checkEmpty(dir); err != nil {
		return nil, err
	}
	st := &state{Format: stateFormat, Created: time.Now().UTC().Truncate(time.Second), Settings: settings}
	for _, m := range members {
		st.Processes = append(st.Processes, process{member: m})
	}
	if err := st.save(dir); err != nil {
		return nil, err
	}
	return newCluster(dir, settings, opts), nil
}

func newCluster(dir string, settings Settings, opts Options) *Cluster {
	if opts.Environ == nil {
		opts.Environ = os.Environ()
	}
	if opts.ReadyTimeout == 0 {
		opts.ReadyTimeout = 30 * time.Second
	}
	if opts.StopTimeout == 0 {
		opts.StopTimeout = 15 * time.Second
	}
	c := &Cluster{dir: dir, settings: settings, opts: opts, exited: make(chan struct{}, 1)}
	c.mu.children = map[int]*child{}
	return c
}

// checkEmpty refuses a directory that holds anything but a lock: it could be
// anything, a home directory included.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look into %s: %w", dir, err)
	}
	for _, e := range entries {
		if e.Name() == stateFile {
			return fmt.Errorf("%s holds a cluster already", dir)
		}
	}
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() != lockFile }) {
		return fmt.Errorf("%s is not empty and holds no cluster (no %s): choose another directory with --data", dir, stateFile)
	}
	return nil
}

// checkBinaries refuses when an executable that the members need is missing.
func checkBinaries(binDir string, members []member) error {
	for _, m := range members {
		path := filepath.Join(binDir, m.binary())
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is missing: build it with `make build`", path)
		}
		if err != nil {
			return fmt.Errorf("find %s: %w", m.binary(), err)
		}
		if info.IsDir() || info.Mode()&0o111 == 0 {
			return fmt.Errorf("%s is no executable file: build it anew with `make build`", path)
		}
	}
	return nil
}

// Dir returns the cluster's directory.
func (c *Cluster) Dir() string { return c.dir }

// Settings returns what the cluster was created with.
func (c *Cluster) Settings() Settings { return c.settings }

// LogPath returns where a process's log is.
func (c *Cluster) LogPath(name string) string { return logPath(c.dir, name) }

// Describe says in a line what the cluster consists of.
func (c *Cluster) Describe() (string, error) {
	st, err := loadState(c.dir)
	if err != nil {
		return "", err
	}
	s, nodes := st.Settings, len(st.Processes)-st.Settings.Orchestrators-st.Settings.Reporting
	out := fmt.Sprintf("%s, %s, %s, port %d", count(nodes, "node"), count(s.Orchestrators, "orchestrator"), count(s.Zones, "zone"), s.Port)
	if s.Reporting > 0 {
		out += ", " + count(s.Reporting, "reporting node")
	}
	if nodes > s.Nodes {
		out += fmt.Sprintf(" (created with %s)", count(s.Nodes, "node"))
	}
	return out, nil
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// Status returns all processes, nodes first.
func (c *Cluster) Status() ([]Status, error) {
	st, err := loadState(c.dir)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(st.Processes, func(a, b process) int { return showOrder(a.member, b.member) })
	out := make([]Status, 0, len(st.Processes))
	for _, p := range st.Processes {
		s := Status{
			Name: p.Name, Role: p.Role, State: p.state(), PID: p.PID, Zone: p.Zone,
			ClientAddr: p.clientAddr(), AdminAddr: p.adminAddr(),
		}
		if s.State == Stopped {
			s.PID = 0
		}
		out = append(out, s)
	}
	return out, nil
}

// AddNode plans one more data node and returns its name. It is not started. An empty
// zone is chosen round robin.
func (c *Cluster) AddNode(ctx context.Context, zone string) (string, error) {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	st, err := loadState(c.dir)
	if err != nil {
		return "", err
	}
	m, err := st.Settings.nextNode(st.members(), zone)
	if err != nil {
		return "", err
	}
	if err := errors.Join(checkBinaries(c.opts.BinDir, []member{m}), checkPorts([]member{m})); err != nil {
		return "", err
	}
	st.Processes = append(st.Processes, process{member: m})
	if err := st.save(c.dir); err != nil {
		return "", err
	}
	return m.Name, nil
}

// each applies f to the processes of the names, in the order of a start, and joins
// the errors. Names that do not exist are an UnknownNameError, and f is not called.
func (c *Cluster) each(names []string, f func(*process) error) error {
	st, err := loadState(c.dir)
	if err != nil {
		return err
	}
	picked, err := st.pick(names)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range picked {
		if err := f(p); err != nil {
			errs = append(errs, fmt.Errorf("%s %w", p.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Cluster) noticef(format string, args ...any) {
	if c.opts.Notice == nil {
		return
	}
	c.opts.Notice(fmt.Sprintf(format, args...))
}
