package bench_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/gossip"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// TestControlPlane measures what hundreds of nodes cost three orchestrators, for
// docs/scale.md. The orchestrators are processes; the nodes are simulated in this one: they
// register, gossip, follow the topology and answer probes, and have no data.
func TestControlPlane(t *testing.T) {
	if os.Getenv("KVASIR_SCALE") == "" {
		t.Skip("KVASIR_SCALE=1 measures what grows with nodes; it asserts nothing")
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nnodes\tall registered in\tring formed, known to all in\ta change, known to all in\ta dead node, known to all in\tleader's CPU at rest\tothers'\tleader's memory\tgossip and more, a node\t\n")
	for _, nodes := range []int{30, 100, 300} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) { controlPlane(t, w, nodes) })
	}
	w.Flush()
	t.Log(b.String())
}

func controlPlane(t *testing.T, w *tabwriter.Writer, nodes int) {
	t.Helper()
	orchs, pids := startOrchestrators(t, nodes)
	transport := rpc.Transport{Dial: rpc.NetDialer}
	all := make([]*simulated, nodes)
	began := time.Now()
	var g errgroup.Group
	g.SetLimit(16)
	for i := range all {
		all[i] = newSimulated(t, orchs)
		g.Go(func() error { return all[i].register(transport, fmt.Sprint("node", i), fmt.Sprint("z", i%3)) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	registered := time.Since(began)
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	defer running.Wait()
	defer cancel()
	for i, n := range all {
		n.join(t, all[max(0, i-1)])
		running.Go(func() { n.follow(ctx, transport, i) })
	}
	defer func() {
		for _, n := range all {
			n.gossip.Close()
		}
	}()
	known := func(what func(*simulated) bool) time.Duration {
		t.Helper()
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			missing := 0
			for _, n := range all {
				if !what(n) {
					missing++
				}
			}
			if missing == 0 {
				return time.Since(began)
			}
			if time.Since(began) > 3*time.Minute {
				t.Fatalf("%d of %d nodes still have not heard", missing, nodes)
			}
		}
	}
	formed := known(func(n *simulated) bool { return n.topology.Load().Formed() })

	time.Sleep(20 * time.Second) // gossip settles
	const rest = 30 * time.Second
	cpus, bytes := make([]time.Duration, len(pids)), loopbackBytes(t)
	for i, pid := range pids {
		cpus[i] = cpuOf(t, []int{pid})
	}
	time.Sleep(rest)
	bytes = loopbackBytes(t) - bytes
	for i, pid := range pids {
		cpus[i] = cpuOf(t, []int{pid}) - cpus[i]
	}
	leader := leaderOf(t, transport, orchs)

	cc, err := transport.NewConn(orchs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	resp, err := adminv1.NewControlServiceClient(cc).CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: "change"})
	if err != nil {
		t.Fatal(err)
	}
	changed := known(func(n *simulated) bool { return n.topology.Load().Epoch >= resp.GetEpoch() })

	dead := all[nodes/2]
	dead.die()
	all = append(all[:nodes/2:nodes/2], all[nodes/2+1:]...)
	noticed := known(func(n *simulated) bool { return n.deems(dead.incarnation) })
	for _, n := range all {
		for _, other := range all {
			if n.deems(other.incarnation) {
				t.Errorf("#%d takes #%d for dead", n.incarnation, other.incarnation)
			}
		}
	}
	percent := func(d time.Duration) float64 { return 100 * d.Seconds() / rest.Seconds() }
	others := time.Duration(0)
	for i := range cpus {
		if i != leader {
			others = max(others, cpus[i])
		}
	}
	fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%.1f%% of a core\t%.1f%%\t%.0f MiB\t%.1f kB/s\t\n", nodes, registered.Round(time.Millisecond), formed.Round(time.Millisecond),
		changed.Round(time.Millisecond), noticed.Round(100*time.Millisecond), percent(cpus[leader]), percent(others), residentOf(t, pids[leader]),
		float64(bytes)/rest.Seconds()/float64(nodes)/1000)
}

// startOrchestrators starts three, which wait for so many nodes.
func startOrchestrators(t *testing.T, nodes int) (addresses []string, pids []int) {
	t.Helper()
	bin := os.Getenv("KVASIR_BIN")
	if bin == "" {
		t.Fatal("KVASIR_BIN says where kvnode and kvorch are: use the target of the Makefile")
	}
	dir, base := t.TempDir(), loopback.Base(t, 12)
	at := func(orch, what int) string { return fmt.Sprintf("127.0.0.1:%d", base+4*orch+what) }
	var peers strings.Builder
	for i := range 3 {
		fmt.Fprintf(&peers, "  - {name: orch%d, address: %q, admin_address: %q, gossip_address: %q, raft_address: %q}\n", i, at(i, 0), at(i, 1), at(i, 2), at(i, 3))
		addresses = append(addresses, at(i, 0))
	}
	for i := range 3 {
		file := filepath.Join(dir, fmt.Sprintf("orch%d.yaml", i))
		config := fmt.Sprintf("name: orch%d\ndata_dir: %s\nlisten: %q\nadmin_listen: %q\ngossip_listen: %q\nraft_listen: %q\npeers:\n%sbootstrap:\n  founding_nodes: %d\n  vnodes: %d\n",
			i, filepath.Join(dir, fmt.Sprint("orch", i)), at(i, 0), at(i, 1), at(i, 2), at(i, 3), &peers, nodes, 4096)
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, "kvorch"), "--config", file)
		log, err := os.Create(filepath.Join(dir, fmt.Sprintf("orch%d.log", i)))
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		log.Close()
		pids = append(pids, cmd.Process.Pid)
	}
	return addresses, pids
}

// leaderOf returns which orchestrator leads.
func leaderOf(t *testing.T, transport rpc.Transport, orchs []string) int {
	t.Helper()
	for i, address := range orchs {
		cc, err := transport.NewConn(address)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := adminv1.NewStatusServiceClient(cc).GetOrchestratorStatus(t.Context(), &adminv1.GetOrchestratorStatusRequest{})
		cc.Close()
		if err == nil && resp.GetStatus().GetLeader() == fmt.Sprint("orch", i) {
			return i
		}
	}
	t.Fatal("no orchestrator leads")
	return 0
}

// loopbackBytes returns how many bytes have gone over the loopback interface.
func loopbackBytes(t *testing.T) (n int64) {
	t.Helper()
	b, err := os.ReadFile("/sys/class/net/lo/statistics/tx_bytes")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// simulated is a node as the control plane sees it.
type simulated struct {
	adminv1.UnimplementedStatusServiceServer
	orchs       []string
	address     string
	server      *grpc.Server
	incarnation uint64
	topology    atomic.Pointer[topology.Topology]
	health      atomic.Pointer[map[uint64]*topologyv1.NodeHealth]
	gossip      *gossip.Gossip
	dead        atomic.Bool
	reserved    net.Listener // of the gossip's port, until it begins
}

func newSimulated(t *testing.T, orchs []string) *simulated {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &simulated{orchs: orchs, address: lis.Addr().String(), server: rpc.Transport{}.NewServer()}
	n.health.Store(&map[uint64]*topologyv1.NodeHealth{})
	adminv1.RegisterStatusServiceServer(n.server, n)
	var serving sync.WaitGroup
	serving.Go(func() { _ = n.server.Serve(lis) }) // ends with Stop
	t.Cleanup(func() { n.server.Stop(); serving.Wait() })
	if n.reserved, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *simulated) GetNodeStatus(context.Context, *adminv1.GetNodeStatusRequest) (*adminv1.GetNodeStatusResponse, error) {
	t := n.topology.Load()
	if t == nil {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "not registered yet")
	}
	return &adminv1.GetNodeStatusResponse{Status: &adminv1.NodeStatus{
		Incarnation: n.incarnation, State: adminv1.NodeStatus_STATE_SERVING, Epoch: t.Epoch, ClockOk: true, SettingsHash: t.Settings.Hash(),
	}}, nil
}

// register registers the node as one without a data directory.
func (n *simulated) register(transport rpc.Transport, name, zone string) error {
	var last error
	for tries := range 300 {
		cc, err := transport.NewConn(n.orchs[tries%len(n.orchs)])
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		resp, err := adminv1.NewControlServiceClient(cc).RegisterNode(ctx, &adminv1.RegisterNodeRequest{
			Name: name, Zone: zone, Role: topologyv1.Role_ROLE_DATA, Address: n.address, AdminAddress: n.address,
			GossipAddress: n.reserved.Addr().String(), DataId: "data-of-" + name, Boot: 1, BootId: "boot-of-" + name,
		})
		cancel()
		cc.Close()
		if err == nil {
			n.incarnation = resp.GetIncarnation()
			known, err := topology.FromProto(resp.GetTopology())
			n.topology.Store(known)
			return err
		}
		last = errors.Join(err, last)
		time.Sleep(100 * time.Millisecond)
	}
	return last
}

// join has the node gossip.
func (n *simulated) join(t *testing.T, other *simulated) {
	t.Helper()
	bind := n.reserved.Addr().String()
	n.reserved.Close()
	known := n.topology.Load()
	var seeds []string
	for _, o := range known.Orchestrators {
		seeds = append(seeds, o.GossipAddress)
	}
	seeds = append(seeds, other.reserved.Addr().String())
	g, err := gossip.Start(gossip.Config{
		Name: fmt.Sprint("n", n.incarnation), Cluster: known.ClusterID, Bind: bind, Advertise: bind,
		Meta: gossip.Meta{Incarnation: n.incarnation, Epoch: known.Epoch, State: byte(adminv1.NodeStatus_STATE_SERVING)}, Seeds: func() []string { return seeds },
	})
	if err != nil {
		t.Fatal(err)
	}
	n.gossip = g
}

// follow follows what the orchestrators say, as a node does, until ctx ends.
func (n *simulated) follow(ctx context.Context, transport rpc.Transport, at int) {
	for ; ctx.Err() == nil && !n.dead.Load(); at++ {
		cc, err := transport.NewConn(n.orchs[at%len(n.orchs)])
		if err != nil {
			panic(err)
		}
		n.watch(ctx, cc)
		cc.Close()
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (n *simulated) watch(ctx context.Context, cc *grpc.ClientConn) {
	known := n.topology.Load()
	var health map[uint64]*topologyv1.NodeHealth
	stream, err := topologyv1.NewTopologyServiceClient(cc).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{ClusterId: known.ClusterID, KnownEpoch: known.Epoch})
	for err == nil && !n.dead.Load() {
		var resp *topologyv1.WatchTopologyResponse
		if resp, err = stream.Recv(); err != nil {
			return
		}
		if known, err = topology.Updated(known, resp); err != nil {
			return
		}
		health = topology.HealthAfter(health, resp.GetHealth(), known)
		n.health.Store(&health)
		if known.Epoch > n.topology.Load().Epoch {
			n.topology.Store(known)
			n.gossip.SetMeta(gossip.Meta{Incarnation: n.incarnation, Epoch: known.Epoch, State: byte(adminv1.NodeStatus_STATE_SERVING)})
		}
	}
}

// deems reports whether the node has been told that another one is unhealthy.
func (n *simulated) deems(incarnation uint64) bool {
	return (*n.health.Load())[incarnation].GetState() == topologyv1.NodeHealth_STATE_UNHEALTHY
}

// die ends all that others hear of the node.
func (n *simulated) die() {
	n.dead.Store(true)
	n.server.Stop()
	n.gossip.Close()
}
