package provision

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

func labels(cluster, node string) map[string]string {
	return map[string]string{labelCluster: cluster, labelNode: node}
}

func data(volume string) container.MountPoint {
	return container.MountPoint{Type: mount.TypeVolume, Name: volume, Destination: "/data"}
}

var node6 = Node{Name: "node6", Zone: "z1"}

// expect compares what an engine has.
func (e *engine) expect(t *testing.T, containers, volumes []string) {
	t.Helper()
	c, v := e.state()
	if diff := cmp.Diff(containers, c); diff != "" {
		t.Errorf("containers (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(volumes, v); diff != "" {
		t.Errorf("volumes (-want +got):\n%s", diff)
	}
}

func TestDockerLaunchesAndEnds(t *testing.T) {
	e := newEngine(t)
	cfg := dockerConfig()
	cfg.Docker.Command = []string{"/bin/kvnode", "--zone", "{zone}"}
	cfg.Docker.Env = []string{"KVNODE_TLS__CERT=/tls/{name}.pem", "KVNODE_ADVERTISE={container}.example.org:7400", "A=1=2"}
	cfg.Docker.Binds = []string{"/etc/tls:/tls:ro"}
	cfg.Docker.MemoryBytes, cfg.Docker.CPUs = 1<<30, 1.5
	d := e.provisioner(t, cfg)
	e.add("shop_node1_1", container.StateRunning, labels("shop", "node1"), data("shop_node1"))
	for range 3 {
		if err := d.Launch(t.Context(), node6); err != nil {
			t.Fatal(err)
		}
	}
	e.expect(t, []string{"shop-node6 running", "shop_node1_1 running"}, []string{"shop_node1", "shop_node6"})
	if diff := cmp.Diff([]string{"create volume shop_node6", "create /shop-node6", "start /shop-node6"}, e.calls()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	req := e.mu.requests["shop-node6"]
	env := []string{
		"KVNODE_NAME=node6", "KVNODE_DATA_DIR=/data", "KVNODE_ORCHESTRATORS=orch1:7390,orch2:7390",
		"KVNODE_ADMIN_ADVERTISE=shop-node6:7401", "KVNODE_GOSSIP_ADVERTISE=shop-node6:7402", "KVNODE_ZONE=z1",
		"KVNODE_TLS__CERT=/tls/node6.pem", "KVNODE_ADVERTISE=shop-node6.example.org:7400", "A=1=2",
	}
	if diff := cmp.Diff(env, req.Env); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	if req.Image != "kvasir:test" || !slices.Equal(req.Cmd, []string{"/bin/kvnode", "--zone", "z1"}) || req.Labels[labelCluster] != "shop" || req.Labels[labelNode] != "node6" {
		t.Errorf("container %+v", req.Config)
	}
	if h := req.HostConfig; h.NetworkMode != "shop_default" || h.Memory != 1<<30 || h.NanoCPUs != 1.5e9 || h.RestartPolicy.Name != "unless-stopped" || !slices.Equal(h.Binds, cfg.Docker.Binds) {
		t.Errorf("host %+v", h)
	}
	for range 2 {
		if err := d.End(t.Context(), node6); err != nil {
			t.Fatal(err)
		}
		e.expect(t, []string{"shop_node1_1 running"}, []string{"shop_node1"})
	}
}

// Of calls that overlap one makes the container, and all return when it runs.
func TestDockerCallsOverlap(t *testing.T) {
	e := newEngine(t)
	const callers = 8
	at := func(call func(*Docker) error) {
		t.Helper()
		var wg sync.WaitGroup
		for range callers {
			d := e.provisioner(t, dockerConfig()) // each in a process of its own
			wg.Go(func() {
				if err := call(d); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	// All look before one of them creates.
	var looked atomic.Int32
	all := make(chan struct{})
	e.before = func(_ *http.Request, _, path string) (int, string) {
		if path == "volumes/create" {
			if looked.Add(1) == callers {
				close(all)
			}
			<-all
		}
		return 0, ""
	}
	at(func(d *Docker) error { return d.Launch(t.Context(), node6) })
	e.expect(t, []string{"shop-node6 running"}, []string{"shop_node6"})
	if n := strings.Count(strings.Join(e.calls(), "\n"), "create /shop-node6"); n != 1 || looked.Load() != callers {
		t.Errorf("created %d times by %d callers", n, looked.Load())
	}
	at(func(d *Docker) error { return d.End(t.Context(), node6) })
	e.expect(t, nil, nil)
}

// Between the moment a name is taken and that in which the container shows, another
// caller sees neither.
func TestDockerWaitsForTheOtherCaller(t *testing.T) {
	e := newEngine(t)
	creates := 0
	e.before = func(_ *http.Request, _, path string) (int, string) {
		if path == "containers/create" {
			if creates++; creates == 2 {
				e.add("shop-node6", container.StateCreated, labels("shop", "node6"), data("shop_node6"))
			}
			return http.StatusConflict, "The container name is already in use"
		}
		return 0, ""
	}
	if err := e.provisioner(t, dockerConfig()).Launch(t.Context(), node6); err != nil {
		t.Fatal(err)
	}
	e.expect(t, []string{"shop-node6 running"}, []string{"shop_node6"})
}

// A call that was cut off anywhere is completed by the next.
func TestDockerGoesOnAfterFailures(t *testing.T) {
	for _, tc := range []struct{ method, path string }{
		{"GET", "containers/json"}, {"POST", "volumes/create"}, {"POST", "containers/create"}, {"POST", "/start"},
		{"GET", "volumes/shop_node6"}, {"DELETE", "containers/"}, {"DELETE", "volumes/shop_node6"},
	} {
		e := newEngine(t)
		d := e.provisioner(t, dockerConfig())
		failing := func(_ *http.Request, method, path string) (int, string) {
			if method == tc.method && strings.Contains(path, tc.path) {
				return http.StatusInternalServerError, "out of luck"
			}
			return 0, ""
		}
		working := e.before
		failed := 0
		for _, call := range []func(context.Context, Node) error{d.Launch, d.End} {
			e.before = failing
			if err := call(t.Context(), node6); err != nil {
				failed++
				if !strings.Contains(err.Error(), "out of luck") || errors.Is(err, ErrTryAgain) {
					t.Errorf("%s %s: %v", tc.method, tc.path, err)
				}
			}
			e.before = working
			if err := call(t.Context(), node6); err != nil {
				t.Errorf("%s %s, then: %v", tc.method, tc.path, err)
			}
			if call(t.Context(), node6) != nil {
				t.Errorf("%s %s, and once more: %v", tc.method, tc.path, call(t.Context(), node6))
			}
			if list, err := d.List(t.Context()); err != nil || len(list) > 1 {
				t.Errorf("%s %s: %v %v", tc.method, tc.path, list, err)
			}
		}
		if failed == 0 {
			t.Errorf("%s %s is never asked", tc.method, tc.path)
		}
		e.expect(t, nil, nil)
	}
}

// What has no process gets one, what has one is left alone.
func TestDockerStartsWhatDoesNotRun(t *testing.T) {
	for state, starts := range map[container.ContainerState]bool{
		container.StateCreated: true, container.StateExited: true,
		container.StateRunning: false, container.StatePaused: false, container.StateRestarting: false,
	} {
		e := newEngine(t)
		e.add("shop_node6_1", state, labels("shop", "node6"), data("x"))
		if err := e.provisioner(t, dockerConfig()).Launch(t.Context(), node6); err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(e.calls(), "start /shop_node6_1"); got != starts || len(e.calls()) > 1 {
			t.Errorf("%s: %v", state, e.calls())
		}
	}
}

// A container that is about to be gone is no node that was launched.
func TestDockerDoesNotCountWhatIsBeingRemoved(t *testing.T) {
	for _, state := range []container.ContainerState{container.StateRemoving, container.StateDead} {
		e := newEngine(t)
		e.add("shop-node6", state, labels("shop", "node6"))
		if err := e.provisioner(t, dockerConfig()).Launch(t.Context(), node6); !errors.Is(err, ErrTryAgain) {
			t.Errorf("%s: %v", state, err)
		}
	}
}

// A container that cannot be started is not kept: the settings may be to blame.
func TestDockerRemovesWhatDoesNotStart(t *testing.T) {
	for state, kept := range map[container.ContainerState]bool{container.StateCreated: false, container.StateExited: true} {
		e := newEngine(t)
		e.add("shop-node6", state, labels("shop", "node6"), data("shop_node6"))
		e.before = func(_ *http.Request, _, path string) (int, string) {
			if strings.HasSuffix(path, "/start") {
				return http.StatusNotFound, "network shop_default not found"
			}
			return 0, ""
		}
		err := e.provisioner(t, dockerConfig()).Launch(t.Context(), node6)
		if err == nil || !strings.Contains(err.Error(), "network shop_default not found") {
			t.Errorf("%v", err)
		}
		if c, _ := e.state(); (len(c) == 1) != kept {
			t.Errorf("%s: %v", state, c)
		}
	}
}

// Nothing is touched that is not labelled as the node's.
func TestDockerRefusesStrangers(t *testing.T) {
	composed := labels("shop", "node6")
	composed[labelProject] = "other"
	for _, tc := range []struct {
		name string
		make func(*engine)
		want string
	}{
		{"no labels", func(e *engine) { e.add("shop-node6", "running", nil, data("shop_node6")) }, "is called shop-node6, but is not labelled"},
		{"another cluster", func(e *engine) { e.add("shop-node6", "running", labels("other", "node6")) }, "is called shop-node6, but is not labelled"},
		{"another node", func(e *engine) { e.add("shop-node6", "created", labels("shop", "node7")) }, "is called shop-node6, but is not labelled"},
		{"another project", func(e *engine) { e.add("other_node6_1", "running", composed, data("other_node6")) }, "docker-compose made it for project other"},
		{"two", func(e *engine) {
			e.add("a", "running", labels("shop", "node6"))
			e.add("b", "running", labels("shop", "node6"))
		}, "2 containers are labelled as node node6"},
	} {
		e := newEngine(t)
		tc.make(e)
		d := e.provisioner(t, dockerConfig())
		for _, call := range []func(context.Context, Node) error{d.Launch, d.End} {
			if err := call(t.Context(), node6); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, want %s", tc.name, err, tc.want)
			}
		}
		if len(e.calls()) != 0 {
			t.Errorf("%s: %v", tc.name, e.calls())
		}
	}
}

// Names are compared as they are, not as patterns, parts or beginnings.
func TestDockerTellsNamesApart(t *testing.T) {
	e := newEngine(t)
	e.add("shop-node60", container.StateRunning, labels("shop", "node60"), data("shop_node60"))
	e.add("my-shop-node6", container.StateRunning, nil)
	e.add("shop-axb", container.StateRunning, nil)
	e.add("other", container.StateRunning, labels("shop2", "node6"), data("shop2_node6"))
	d := e.provisioner(t, dockerConfig())
	for _, n := range []Node{node6, {Name: "a.b"}} {
		if err := d.End(t.Context(), n); err != nil {
			t.Error(err)
		}
		if err := d.Launch(t.Context(), n); err != nil {
			t.Error(err)
		}
		if err := d.End(t.Context(), n); err != nil {
			t.Error(err)
		}
	}
	e.expect(t, []string{"my-shop-node6 running", "other running", "shop-axb running", "shop-node60 running"}, []string{"shop2_node6", "shop_node60"})
}

// The disk goes with the node wherever docker-compose put it; others' stay.
func TestDockerDeletesTheDisk(t *testing.T) {
	composed := labels("shop", "node4")
	composed[labelProject] = "shop"
	tls := container.MountPoint{Type: mount.TypeVolume, Name: "tls", Destination: "/tls"}
	bound := container.MountPoint{Type: mount.TypeBind, Source: "/srv/node4", Destination: "/data"}
	for _, tc := range []struct {
		name   string
		make   func(*engine)
		leaves []string
		warns  bool
	}{
		{"composed", func(e *engine) { e.add("shop_node4_1", "running", composed, tls, data("shop_node4")) }, []string{"tls"}, false},
		{"of another name", func(e *engine) { e.add("shop_node4_1", "paused", composed, data("disk4")) }, nil, false},
		{"left alone", func(e *engine) { e.addVolume("shop_node4", labels("shop", "node4")) }, nil, false},
		{"not labelled", func(e *engine) { e.addVolume("shop_node4", nil) }, []string{"shop_node4"}, false},
		{"another's", func(e *engine) { e.addVolume("shop_node4", labels("other", "node4")) }, []string{"shop_node4"}, false},
		{"of the host", func(e *engine) { e.add("shop_node4_1", "exited", composed, bound) }, nil, true},
	} {
		e := newEngine(t)
		tc.make(e)
		d := e.provisioner(t, dockerConfig())
		var log bytes.Buffer
		d.logger = slog.New(slog.NewTextHandler(&log, nil))
		if err := d.End(t.Context(), Node{Name: "node4", Incarnation: 4}); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		e.expect(t, nil, tc.leaves)
		if strings.Contains(log.String(), "/srv/node4") != tc.warns {
			t.Errorf("%s: %s", tc.name, log.String())
		}
	}
}

// A volume of the node's name that is not the node's is not given to it.
func TestDockerTakesNoStrangersVolume(t *testing.T) {
	e := newEngine(t)
	e.addVolume("shop_node6", nil)
	err := e.provisioner(t, dockerConfig()).Launch(t.Context(), node6)
	if err == nil || !strings.Contains(err.Error(), "volume shop_node6 is not labelled") {
		t.Error(err)
	}
	e.expect(t, nil, []string{"shop_node6"})
}

// The engine says that a removal goes on already, or that a volume is in use by a
// container that no longer shows.
func TestDockerWaitsForRemovals(t *testing.T) {
	e := newEngine(t)
	e.add("shop-node6", container.StateRunning, labels("shop", "node6"), data("shop_node6"))
	refusals := map[string]int{}
	e.before = func(_ *http.Request, method, path string) (int, string) {
		kind, _, _ := strings.Cut(path, "/")
		if method == http.MethodDelete && refusals[kind] < 2 {
			refusals[kind]++
			return http.StatusConflict, "it is in progress"
		}
		return 0, ""
	}
	d := e.provisioner(t, dockerConfig())
	if err := d.End(t.Context(), node6); err != nil {
		t.Fatal(err)
	}
	e.expect(t, nil, nil)

	e.add("shop-node6", container.StateRunning, labels("shop", "node6"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked := 0
	e.before = func(_ *http.Request, method, _ string) (int, string) {
		if method != http.MethodDelete {
			return 0, ""
		}
		if asked++; asked == 3 {
			cancel()
		}
		return http.StatusConflict, "it is in progress"
	}
	if err := d.End(ctx, node6); !errors.Is(err, context.Canceled) || asked != 3 {
		t.Errorf("a removal without an end, asked for %d times: %v", asked, err)
	}
}

func TestDockerList(t *testing.T) {
	e := newEngine(t)
	composed, foreign := labels("shop", "node1"), labels("shop", "node2")
	composed[labelProject], foreign[labelProject] = "shop", "other"
	e.add("shop_node1_1", container.StateRunning, composed)
	e.add("other_node2_1", container.StateRunning, foreign)
	e.add("x", container.StateRunning, labels("other", "node3"))
	e.add("shop_orch1_1", container.StateRunning, map[string]string{labelCluster: "shop"})
	e.add("shop-node4", container.StatePaused, labels("shop", "node4"))
	e.add("shop-node5", container.StateExited, labels("shop", "node5"))
	e.add("shop-node6", container.StateCreated, labels("shop", "node6"))
	got, err := e.provisioner(t, dockerConfig()).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, func(a, b Instance) int { return strings.Compare(a.Name, b.Name) })
	id := strings.Repeat("0", 12)
	if diff := cmp.Diff([]Instance{{"node1", id, true}, {"node4", id, true}, {"node5", id, false}, {"node6", id, false}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A hanging engine holds nobody for longer than the context or the timeout.
func TestDockerReturnsWhenTheEngineHangs(t *testing.T) {
	e := newEngine(t)
	release := make(chan struct{})
	defer close(release)
	arrived := make(chan struct{}, 10)
	e.before = func(r *http.Request, _, _ string) (int, string) {
		arrived <- struct{}{}
		<-release
		return 0, ""
	}
	d := e.provisioner(t, dockerConfig())
	calls := map[string]func(context.Context) error{
		"launch": func(ctx context.Context) error { return d.Launch(ctx, node6) },
		"end":    func(ctx context.Context) error { return d.End(ctx, node6) },
		"list":   func(ctx context.Context) error { _, err := d.List(ctx); return err },
	}
	for name, call := range calls {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- call(ctx) }()
		<-arrived
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d.timeout = time.Second
	for name, call := range calls {
		if err := call(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDockerWithoutEngineOrImage(t *testing.T) {
	e := newEngine(t)
	cfg := dockerConfig()
	nobody := &engine{path: filepath.Join(t.TempDir(), "docker.sock")}
	if _, err := nobody.provisioner(t, cfg).List(t.Context()); !errors.Is(err, ErrTryAgain) {
		t.Errorf("no engine: %v", err)
	}
	e.before = func(_ *http.Request, _, path string) (int, string) {
		if path == "containers/create" {
			return http.StatusNotFound, "No such image: kvasir:test"
		}
		return 0, ""
	}
	err := e.provisioner(t, cfg).Launch(t.Context(), node6)
	if err == nil || !strings.Contains(err.Error(), "No such image: kvasir:test") || !strings.Contains(err.Error(), "pull the image") {
		t.Errorf("no image: %v", err)
	}
}
