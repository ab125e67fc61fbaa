package devcluster_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// The tests here run real processes and kill them. KVASIR_E2E=full makes them as
// long as `make e2e` wants them; otherwise they are short enough for `make test`.
var full = os.Getenv("KVASIR_E2E") == "full"

// scale returns the first value in a short run, the second in a full one.
func scale[T any](short, long T) T {
	if full {
		return long
	}
	return short
}

// besideOthers lets a test that mostly waits run beside others in a short run.
func besideOthers(t *testing.T) {
	if !full {
		t.Parallel()
	}
}

var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kvasir-e2e-bin")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-tags", "pebblegozstd", "-o", dir+"/",
		"github.com/kvasirdb/kvasir/cmd/kvnode", "github.com/kvasirdb/kvasir/cmd/kvorch", "github.com/kvasirdb/kvasir/cmd/kvctl").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

// rig is a cluster of real processes with what a test needs of it.
type rig struct {
	t       *testing.T
	cluster *devcluster.Cluster
	rng     *rand.Rand
	// conns are by address: tests ask again and again.
	conns struct {
		sync.Mutex
		to map[string]*grpc.ClientConn
	}
}

func start(t *testing.T, nodes, orchestrators int) *rig {
	t.Helper()
	return startIn(t, nodes, orchestrators, min(nodes, 3))
}

// startIn starts a cluster in so many zones, its nodes with further arguments.
func startIn(t *testing.T, nodes, orchestrators, zones int, nodeArgs ...string) *rig {
	t.Helper()
	// Tests start again what they kill, and replace what is dead themselves.
	return startWith(t, devcluster.Settings{Nodes: nodes, Orchestrators: orchestrators, Zones: zones, ReplaceAfter: 10 * time.Minute}, nodeArgs...)
}

// ports are those of the clusters that run now, first and count.
var ports struct {
	sync.Mutex
	taken map[int]int
}

// freePorts returns the first of so many free ports. They are no other test's until this
// one ends, whether something listens there yet or not.
func freePorts(t *testing.T, count int) int {
	ports.Lock()
	defer ports.Unlock()
	for {
		base := loopback.Base(t, count)
		overlaps := false
		for other, n := range ports.taken {
			overlaps = overlaps || base < other+n && other < base+count
		}
		if overlaps {
			continue
		}
		if ports.taken == nil {
			ports.taken = map[int]int{}
		}
		ports.taken[base] = count
		t.Cleanup(func() {
			ports.Lock()
			defer ports.Unlock()
			delete(ports.taken, base)
		})
		return base
	}
}

// startWith starts a cluster with settings but for its ports.
func startWith(t *testing.T, settings devcluster.Settings, nodeArgs ...string) *rig {
	t.Helper()
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KVASIR_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("to choose the same processes again: KVASIR_SEED=%d go test -run '^%s$' ./internal/devcluster", seed, t.Name())
	r := &rig{t: t, rng: rand.New(rand.NewPCG(seed, 1))}
	dir := t.TempDir()
	for tries := 0; ; tries++ {
		nodes := settings.Nodes + 5 // that tests add
		if settings.Autonomy {
			nodes += 20 // that are launched
		}
		below := settings.Orchestrators + settings.Reporting
		settings.Port = freePorts(t, 10*(nodes+below)) + 10*below
		r.cluster, err = devcluster.Create(context.Background(), filepath.Join(dir, strconv.Itoa(tries)), settings, devcluster.Options{BinDir: bin, NodeArgs: nodeArgs})
		var busy *devcluster.PortsBusyError
		if errors.As(err, &busy) && tries < 5 {
			continue
		}
		break
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			r.logs()
		}
		if _, err := r.cluster.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	r.up()
	return r
}

// logs shows the end of every process's log.
func (r *rig) logs() {
	for _, p := range r.status() {
		b, err := os.ReadFile(r.cluster.LogPath(p.Name))
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		r.t.Logf("%s:\n%s", p.Name, strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
}

func (r *rig) status() []devcluster.Status {
	r.t.Helper()
	s, err := r.cluster.Status()
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// up starts what does not run and waits until it serves.
func (r *rig) up(names ...string) {
	r.t.Helper()
	if _, err := r.cluster.Start(context.Background(), names...); err != nil {
		r.t.Fatal(err)
	}
	if err := r.cluster.WaitReady(context.Background(), names...); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) kill(names ...string) {
	r.t.Helper()
	if err := r.cluster.Kill(context.Background(), names...); err != nil {
		r.t.Fatal(err)
	}
}

// named returns the names of all nodes, or of all orchestrators.
func (r *rig) named(role string) (names []string) {
	for _, p := range r.status() {
		if p.Role == role {
			names = append(names, p.Name)
		}
	}
	return names
}

// kvctl runs a command against the cluster and returns what it printed.
func (r *rig) kvctl(args ...string) []byte {
	r.t.Helper()
	bin, err := binaries()
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(bin, "kvctl"), append([]string{"--endpoints", strings.Join(r.endpoints(), ",")}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("kvctl %s: %v: %s", strings.Join(args, " "), err, &stderr)
	}
	return out
}

func (r *rig) endpoints() (out []string) {
	for _, p := range r.status() {
		if p.Role == devcluster.RoleData {
			out = append(out, p.ClientAddr)
		}
	}
	return out
}

func (r *rig) client(opts ...client.Option) *client.Client {
	r.t.Helper()
	c, err := client.New(context.Background(), r.endpoints(), opts...)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// control returns the control service at one process.
func (r *rig) control(name string) adminv1.ControlServiceClient {
	r.t.Helper()
	return adminv1.NewControlServiceClient(r.conn(name))
}

// conn returns the connection to one process.
func (r *rig) conn(name string) *grpc.ClientConn {
	r.t.Helper()
	processes := r.status() // once: there may be others a moment later
	i := slices.IndexFunc(processes, func(p devcluster.Status) bool { return p.Name == name })
	if i < 0 {
		r.t.Fatalf("there is no process %s", name)
	}
	address := processes[i].ClientAddr
	r.conns.Lock()
	defer r.conns.Unlock()
	if cc := r.conns.to[address]; cc != nil {
		return cc
	}
	cc, err := rpc.Transport{Dial: rpc.NetDialer}.NewConn(address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { cc.Close() })
	if r.conns.to == nil {
		r.conns.to = map[string]*grpc.ClientConn{}
	}
	r.conns.to[address] = cc
	return cc
}

// disturb kills or pauses a process for a moment.
func (r *rig) disturb(name string) {
	r.t.Helper()
	moment := time.Duration(200+r.rng.IntN(1000)) * time.Millisecond
	if r.rng.IntN(2) == 0 {
		r.kill(name)
		time.Sleep(moment)
		r.up(name)
		return
	}
	if err := r.cluster.Pause(context.Background(), name); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(moment)
	if err := r.cluster.Resume(context.Background(), name); err != nil {
		r.t.Fatal(err)
	}
}

// eventually waits until check returns "", and fails with what it returned last.
func (r *rig) eventually(within time.Duration, check func() string) {
	r.t.Helper()
	last := ""
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if last = check(); last == "" {
			return
		}
	}
	r.t.Fatalf("not within %s: %s", within, last)
}

// leader returns the orchestrator that leads.
func (r *rig) leader() (name string) {
	r.t.Helper()
	ctl := r.control("node1")
	r.eventually(10*time.Second, func() string {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		s, err := ctl.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return err.Error()
		}
		for _, o := range s.GetOrchestrators() {
			if o.GetStatus().GetRaftState() == "leader" {
				name = o.GetName()
				return ""
			}
		}
		return "nobody leads"
	})
	return name
}

func ptr[T any](v T) *T { return &v }
