package provision

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"
)

// engine is a Docker engine without containers, behind a socket. It answers as far
// as a provisioner asks.
type engine struct {
	path string
	// before runs ahead of every request; a status that is not 0 is the answer. It may
	// be set while no request runs.
	before func(r *http.Request, method, path string) (status int, message string)
	mu     struct {
		sync.Mutex
		containers map[string]*container.Summary // by identifier
		requests   map[string]container.CreateRequest
		volumes    map[string]volume.Volume
		next       int
		// calls lists the requests that changed something, and starts that did not.
		calls []string
	}
}

func newEngine(t *testing.T) *engine {
	t.Helper()
	e := &engine{path: filepath.Join(t.TempDir(), "docker.sock"), before: func(*http.Request, string, string) (int, string) { return 0, "" }}
	e.mu.containers, e.mu.requests, e.mu.volumes = map[string]*container.Summary{}, map[string]container.CreateRequest{}, map[string]volume.Volume{}
	l, err := net.Listen("unix", e.path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: e}}
	srv.Start()
	t.Cleanup(srv.Close)
	return e
}

// provisioner returns a provisioner that uses the engine.
func (e *engine) provisioner(t *testing.T, cfg Config) *Docker {
	t.Helper()
	cfg.Docker.Socket = "unix://" + e.path
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	d, err := NewDocker(cfg, []string{"orch1:7390", "orch2:7390"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.engine.Close() })
	return d
}

// add adds a container as somebody else makes it, with a volume if one is named.
func (e *engine) add(name string, state container.ContainerState, labels map[string]string, mounts ...container.MountPoint) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mu.next++
	id := fmt.Sprintf("%064d", e.mu.next)
	for _, m := range mounts {
		if _, ok := e.mu.volumes[m.Name]; !ok && m.Type == mount.TypeVolume {
			e.mu.volumes[m.Name] = volume.Volume{Name: m.Name}
		}
	}
	e.mu.containers[id] = &container.Summary{ID: id, Names: []string{"/" + name}, Labels: labels, State: state, Mounts: mounts}
	return id
}

func (e *engine) addVolume(name string, labels map[string]string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mu.volumes[name] = volume.Volume{Name: name, Labels: labels}
}

// state returns what there is: "name state" of every container, and the volumes.
func (e *engine) state() (containers, volumes []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.mu.containers {
		containers = append(containers, c.Names[0][1:]+" "+string(c.State))
	}
	slices.Sort(containers)
	return containers, slices.Sorted(maps.Keys(e.mu.volumes))
}

func (e *engine) calls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.mu.calls)
}

// ServeHTTP answers /v1.41/…, under a lock that makes every request atomic.
func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.41")
	_, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v"), "/")
	if path == "_ping" || r.URL.Path == "/_ping" {
		return
	}
	status, message := e.before(r, r.Method, path)
	var body any
	if status == 0 {
		e.mu.Lock()
		defer e.mu.Unlock()
		status, body = e.answer(r, path)
	} else {
		body = map[string]string{"message": message}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if status != http.StatusNoContent {
		_ = json.NewEncoder(w).Encode(body) // the caller may have gone
	}
}

func (e *engine) answer(r *http.Request, path string) (status int, body any) {
	kind, rest, _ := strings.Cut(path, "/")
	id, _, _ := strings.Cut(rest, "/")
	switch {
	case path == "containers/json":
		return http.StatusOK, e.list(r.URL.Query().Get("filters"))
	case path == "containers/create":
		return e.create(r)
	case path == "volumes/create":
		var v volume.CreateRequest
		if err := json.NewDecoder(r.Body).Decode(&v); err != nil {
			return problem(http.StatusBadRequest, "%v", err)
		}
		if _, ok := e.mu.volumes[v.Name]; !ok {
			e.mu.volumes[v.Name] = volume.Volume{Name: v.Name, Labels: v.Labels}
			e.mu.calls = append(e.mu.calls, "create volume "+v.Name)
		}
		return http.StatusCreated, e.mu.volumes[v.Name]
	case kind == "volumes":
		return e.volume(r.Method, id)
	case kind == "containers" && e.mu.containers[id] == nil:
		return problem(http.StatusNotFound, "No such container: %s", id)
	case r.Method == http.MethodDelete:
		return e.remove(e.mu.containers[id], r.URL.Query().Get("force") == "1")
	case strings.HasSuffix(path, "/start"):
		c := e.mu.containers[id]
		e.mu.calls = append(e.mu.calls, "start "+c.Names[0])
		if c.State == container.StateRunning {
			return http.StatusNotModified, nil
		}
		c.State = container.StateRunning
		return http.StatusNoContent, nil
	}
	return problem(http.StatusNotImplemented, "%s %s", r.Method, path)
}

func problem(status int, format string, args ...any) (int, any) {
	return status, map[string]string{"message": fmt.Sprintf(format, args...)}
}

func (e *engine) list(query string) []*container.Summary {
	var filters map[string]map[string]bool
	_ = json.Unmarshal([]byte(query), &filters)
	out := []*container.Summary{}
	for _, c := range e.mu.containers {
		fits := true
		for label := range filters["label"] {
			key, value, exact := strings.Cut(label, "=")
			got, ok := c.Labels[key]
			fits = fits && ok && (!exact || got == value)
		}
		for name := range filters["name"] {
			fits = fits && regexp.MustCompile(name).MatchString(c.Names[0])
		}
		if fits {
			out = append(out, c)
		}
	}
	return out
}

func (e *engine) create(r *http.Request) (int, any) {
	var req container.CreateRequest
	b, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(b, &req)
	}
	name := "/" + r.URL.Query().Get("name")
	if err != nil {
		return problem(http.StatusBadRequest, "%v", err)
	}
	for _, c := range e.mu.containers {
		if c.Names[0] == name {
			return problem(http.StatusConflict, "The container name %q is already in use", name)
		}
	}
	e.mu.next++
	id := fmt.Sprintf("%064d", e.mu.next)
	c := &container.Summary{ID: id, Names: []string{name}, Labels: req.Labels, State: container.StateCreated}
	for _, m := range req.HostConfig.Mounts {
		c.Mounts = append(c.Mounts, container.MountPoint{Type: m.Type, Name: m.Source, Destination: m.Target})
	}
	e.mu.containers[id], e.mu.requests[name[1:]] = c, req
	e.mu.calls = append(e.mu.calls, "create "+name)
	return http.StatusCreated, container.CreateResponse{ID: id}
}

func (e *engine) remove(c *container.Summary, force bool) (int, any) {
	if !force && c.State != container.StateCreated && c.State != container.StateExited {
		return problem(http.StatusConflict, "You cannot remove a running container")
	}
	delete(e.mu.containers, c.ID)
	e.mu.calls = append(e.mu.calls, "remove "+c.Names[0])
	return http.StatusNoContent, nil
}

func (e *engine) volume(method, name string) (int, any) {
	v, ok := e.mu.volumes[name]
	if !ok {
		return problem(http.StatusNotFound, "get %s: no such volume", name)
	}
	if method == http.MethodGet {
		return http.StatusOK, v
	}
	for _, c := range e.mu.containers {
		for _, m := range c.Mounts {
			if m.Name == name {
				return problem(http.StatusConflict, "volume is in use")
			}
		}
	}
	delete(e.mu.volumes, name)
	e.mu.calls = append(e.mu.calls, "remove volume "+name)
	return http.StatusNoContent, nil
}
