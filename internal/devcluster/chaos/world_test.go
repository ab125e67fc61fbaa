package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// The cluster of a run. Every vnode has at most one replica in a zone.
const (
	nodeCount         = 5
	orchestratorCount = 3
	zoneCount         = 3
	vnodes            = 64
	diskBytes         = 256 << 20
	memTableBytes     = 4 << 20
)

// machine is a process with the network stack and the disk it runs on.
type machine struct {
	name, binary, zone string
	ip                 string
	// dir is its disk, logPath where it writes its log, which is on another one.
	dir, config, logPath string
	status               adminv1.StatusServiceClient // nodes only
	repair               adminv1.RepairServiceClient // nodes only
	control              adminv1.ControlServiceClient

	mu struct {
		sync.Mutex
		cmd     *exec.Cmd
		done    chan struct{} // closed when cmd has ended
		err     error         // how it ended; to be read after done
		expects bool          // its end is expected
	}
}

func (m *machine) isNode() bool    { return m.binary == "kvnode" }
func (m *machine) address() string { return m.ip + ":7400" }

// dataDir is a directory on the machine's disk, so that it can be deleted.
func (m *machine) dataDir() string { return filepath.Join(m.dir, "data") }

// world is the cluster.
type world struct {
	log           *journal
	dir           string
	nodes         []*machine
	orchestrators []*machine
	reporting     *machine
	cuts          cuts
}

// build makes networks, disks and configurations. Nothing runs yet.
func build(dir string, log *journal) (*world, error) {
	w := &world{log: log, dir: dir}
	for i := range orchestratorCount {
		w.orchestrators = append(w.orchestrators, &machine{name: fmt.Sprintf("orch%d", i+1), binary: "kvorch", ip: fmt.Sprintf("10.66.0.%d", 101+i)})
	}
	for i := range nodeCount {
		w.nodes = append(w.nodes, &machine{
			name: fmt.Sprintf("node%d", i+1), binary: "kvnode", zone: fmt.Sprintf("z%d", i%zoneCount+1), ip: fmt.Sprintf("10.66.0.%d", 11+i),
		})
	}
	w.reporting = &machine{name: "report1", binary: "kvnode", zone: "z1", ip: "10.66.0.61"}
	if err := makeHub(); err != nil {
		return nil, err
	}
	for _, m := range w.machines() {
		m.dir, m.config, m.logPath = filepath.Join(dir, m.name), filepath.Join(dir, m.name+".yaml"), filepath.Join(dir, m.name+".log")
		if err := errors.Join(makeNetwork(m.name, m.ip), tmpfs(m.dir, diskBytes)); err != nil {
			return nil, err
		}
		b, err := yaml.Marshal(w.configOf(m))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(m.config, b, 0o600); err != nil {
			return nil, err
		}
		cc, err := rpc.Transport{Dial: rpc.NetDialer}.NewConn(m.address())
		if err != nil {
			return nil, err
		}
		m.status, m.repair, m.control = adminv1.NewStatusServiceClient(cc), adminv1.NewRepairServiceClient(cc), adminv1.NewControlServiceClient(cc)
	}
	return w, nil
}

func (w *world) machines() []*machine {
	return slices.Concat(w.orchestrators, w.nodes, []*machine{w.reporting})
}

func (w *world) configOf(m *machine) map[string]any {
	c := map[string]any{
		"name": m.name, "data_dir": m.dataDir(),
		"listen": m.address(), "admin_listen": m.ip + ":7401", "gossip_listen": m.ip + ":7402",
	}
	var addresses []string
	var peers []map[string]any
	for _, o := range w.orchestrators {
		addresses = append(addresses, o.address())
		peers = append(peers, map[string]any{
			"name": o.name, "address": o.address(), "admin_address": o.ip + ":7401", "gossip_address": o.ip + ":7402", "raft_address": o.ip + ":7403",
		})
	}
	if m.isNode() {
		c["zone"], c["orchestrators"] = m.zone, addresses
		if m == w.reporting {
			c["role"] = topology.Reporting.String()
		}
		c["memtable_bytes"], c["cache_bytes"] = memTableBytes, 16<<20
		return c
	}
	c["raft_listen"], c["peers"], c["election_timeout"] = m.ip+":7403", peers, "500ms"
	c["bootstrap"] = map[string]any{
		"founding_nodes": nodeCount, "vnodes": vnodes,
		"health_checks": map[string]any{"interval": "1s", "timeout": "500ms", "healthy_threshold": 2, "unhealthy_threshold": 3},
	}
	return c
}

// start starts a process that does not run.
func (w *world) start(m *machine) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	log, err := os.OpenFile(m.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Fprintf(log, "--- start at %s\n", w.log.clock())
	cmd := exec.Command("ip", "netns", "exec", m.name, filepath.Join(w.dir, m.binary), "--config", m.config)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, w.dir
	// A blocked sync holds a P; with two of them the group commit degenerates.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=4")
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", m.name, err)
	}
	done := make(chan struct{})
	m.mu.cmd, m.mu.done, m.mu.expects = cmd, done, false
	go func() {
		err := cmd.Wait()
		m.mu.Lock()
		m.mu.err = err
		expected := m.mu.expects
		m.mu.Unlock()
		close(done)
		if !expected {
			w.log.wrong("%s ended by itself: %v\n%s", m.name, err, w.tail(m))
		}
	}()
	return nil
}

// tail returns the end of a machine's log.
func (w *world) tail(m *machine) string {
	b, err := os.ReadFile(m.logPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// signal sends a signal to a process. last tells that it is to end by it.
func (m *machine) signal(s syscall.Signal, last bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.expects = m.mu.expects || last
	if err := m.mu.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s of %s: %w", s, m.name, err)
	}
	return nil
}

// expectEnd tells that the process may end by itself from now on.
func (m *machine) expectEnd() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.expects = true
}

// ended waits for the end of a process and tells how it was.
func (m *machine) ended(patience time.Duration) error {
	m.mu.Lock()
	done := m.mu.done
	m.mu.Unlock()
	select {
	case <-done:
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.mu.err
	case <-time.After(patience):
		return fmt.Errorf("%s has not ended after %s", m.name, patience)
	}
}

func (m *machine) isRunning() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.mu.done:
		return false
	default:
		return true
	}
}

// kill is kill -9, of all at once.
func kill(ms ...*machine) error {
	var errs []error
	for _, m := range ms {
		errs = append(errs, m.signal(syscall.SIGKILL, true))
	}
	for _, m := range ms {
		var exit *exec.ExitError
		if err := m.ended(10 * time.Second); err != nil && !errors.As(err, &exit) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (w *world) startAll(ms ...*machine) error {
	for _, m := range ms {
		if err := w.start(m); err != nil {
			return err
		}
	}
	return nil
}

// stopAll stops processes in good order.
func stopAll(ms ...*machine) error {
	var errs []error
	for _, m := range ms {
		errs = append(errs, m.signal(syscall.SIGTERM, true))
	}
	for _, m := range ms {
		if err := m.ended(40 * time.Second); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", m.name, err))
		}
	}
	return errors.Join(errs...)
}

// nodeStatus asks a node for its own status.
func (m *machine) nodeStatus(ctx context.Context) (*adminv1.NodeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := m.status.GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return nil, err
	}
	return r.GetStatus(), nil
}

// whole returns why the cluster is not whole, or "": every node serves and reaches
// all others, and the orchestrators have a leader that holds all nodes for healthy.
func (w *world) whole(ctx context.Context) string {
	for _, m := range append(slices.Clone(w.nodes), w.reporting) {
		s, err := m.nodeStatus(ctx)
		switch {
		case err != nil:
			return fmt.Sprintf("%s does not answer: %s", m.name, rpc.AsError(err).Message)
		case s.GetState() != adminv1.NodeStatus_STATE_SERVING:
			return fmt.Sprintf("%s does not serve: %s %s", m.name, s.GetState(), s.GetReason())
		case len(s.GetUnreachable()) > 0:
			return fmt.Sprintf("%s does not reach %v", m.name, s.GetUnreachable())
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c, err := w.nodes[0].control.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
	if err != nil {
		return "no status of the cluster: " + rpc.AsError(err).Message
	}
	if !c.GetControlPlaneAvailable() {
		return "the orchestrators have no leader"
	}
	for _, o := range c.GetOrchestrators() {
		if !o.GetReachable() {
			return fmt.Sprintf("%s is not reached by the leader", o.GetName())
		}
	}
	if len(c.GetNodes()) != nodeCount+1 {
		return fmt.Sprintf("%d nodes are in the topology, %d are running", len(c.GetNodes()), nodeCount+1)
	}
	for _, n := range c.GetNodes() {
		if n.GetHealth().GetState() != topologyv1.NodeHealth_STATE_HEALTHY {
			return fmt.Sprintf("node #%d does not count as healthy: %s", n.GetHealth().GetIncarnation(), n.GetHealth().GetReason())
		}
	}
	for i, v := range c.GetTopology().GetRing() {
		for _, s := range v.GetSlots() {
			if s.GetIncoming() != 0 {
				return fmt.Sprintf("vnode %d is being moved to #%d", i, s.GetIncoming())
			}
		}
	}
	return ""
}

// until waits until check returns "", and returns what it said last when it does
// not get there in time.
func until(ctx context.Context, patience time.Duration, check func(context.Context) string) string {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	said := "nothing was asked"
	for {
		if now := check(ctx); now == "" {
			return ""
		} else if ctx.Err() == nil {
			said = now
		}
		select {
		case <-ctx.Done():
			return said
		case <-time.After(200 * time.Millisecond):
		}
	}
}
