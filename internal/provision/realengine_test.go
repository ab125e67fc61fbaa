package provision

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// realEngine returns a provisioner that uses this machine's engine, with an image and
// a network that are gone after the test, and so is all else that it makes.
func realEngine(t *testing.T) *Docker {
	t.Helper()
	cfg := dockerConfig()
	cfg.Cluster = "kvasir-test-" + strings.ToLower(rand.Text()[:8])
	cfg.Docker.Image, cfg.Docker.Network = cfg.Cluster+":latest", cfg.Cluster
	d, err := NewDocker(cfg, []string{"orch1:7390"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.engine.Ping(t.Context(), client.PingOptions{}); err != nil {
		t.Skipf("SKIPPED: no Docker engine answers: %v", err)
	}
	t.Cleanup(func() { d.engine.Close() })
	imported, err := d.engine.ImageImport(t.Context(), client.ImageImportSource{Source: sleeper(t), SourceName: "-"}, cfg.Docker.Image,
		client.ImageImportOptions{Changes: []string{`CMD ["/sleeper"]`, "VOLUME /data"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := new(bytes.Buffer).ReadFrom(imported); err != nil {
		t.Fatal(err)
	}
	imported.Close()
	t.Cleanup(func() {
		if _, err := d.engine.ImageRemove(context.Background(), cfg.Docker.Image, client.ImageRemoveOptions{}); err != nil {
			t.Error(err)
		}
	})
	if _, err := d.engine.NetworkCreate(t.Context(), cfg.Docker.Network, client.NetworkCreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		instances, err := d.List(ctx)
		for _, i := range instances {
			if err := d.End(ctx, Node{Name: i.Name}); err != nil {
				t.Error(err)
			}
		}
		if err != nil {
			t.Error(err)
		}
		if _, err := d.engine.NetworkRemove(ctx, cfg.Docker.Network, client.NetworkRemoveOptions{}); err != nil {
			t.Error(err)
		}
	})
	return d
}

// sleeper returns the files of an image with one static program, which sleeps and
// takes no notice of SIGTERM.
func sleeper(t *testing.T) *bytes.Buffer {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	program := "package main\n\nimport (\n\t\"os/signal\"\n\t\"syscall\"\n\t\"time\"\n)\n\nfunc main() {\n\tsignal.Ignore(syscall.SIGTERM)\n\ttime.Sleep(1 << 62)\n}\n"
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(dir, "sleeper"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "sleeper"))
	if err != nil {
		t.Fatal(err)
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	for _, h := range []*tar.Header{{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "sleeper", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(b))}} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &files
}

// expectInstances compares what runs.
func (d *Docker) expectInstances(t *testing.T, want ...string) {
	t.Helper()
	all, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range all {
		if !i.Running {
			i.Name += " does not run"
		}
		got = append(got, i.Name)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Fatalf("there are %q, want %q", got, want)
	}
}

// A real engine does what the fake one does.
func TestRealEngine(t *testing.T) {
	d := realEngine(t)
	together := func(call func(context.Context, Node) error, n Node) {
		t.Helper()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if err := call(t.Context(), n); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	together(d.End, node6)
	together(d.Launch, node6)
	together(d.Launch, Node{Name: "node7"})
	d.expectInstances(t, "node6", "node7")

	c, err := d.engine.ContainerInspect(t.Context(), d.containerName("node6"), client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(c.Container.Config.Env, "KVNODE_NAME=node6") || len(c.Container.Mounts) != 1 || c.Container.Mounts[0].Name != d.volumeName("node6") || c.Container.NetworkSettings.Networks[d.cfg.Network] == nil {
		t.Errorf("%v %v %v", c.Container.Config.Env, c.Container.Mounts, c.Container.NetworkSettings.Networks)
	}

	// It hangs: a paused process takes no signal.
	if _, err := d.engine.ContainerPause(t.Context(), c.Container.ID, client.ContainerPauseOptions{}); err != nil {
		t.Fatal(err)
	}
	d.expectInstances(t, "node6", "node7")
	together(d.Launch, node6)
	together(d.End, node6)
	d.expectInstances(t, "node7")
	if _, err := d.engine.VolumeInspect(t.Context(), d.volumeName("node6"), client.VolumeInspectOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("the volume of node6: %v", err)
	}

	// A call was cut off before it started the container, or deleted the volume.
	if _, err := d.create(t.Context(), node6); err != nil {
		t.Fatal(err)
	}
	d.expectInstances(t, "node6 does not run", "node7")
	together(d.Launch, node6)
	d.expectInstances(t, "node6", "node7")
	if _, err := d.engine.ContainerRemove(t.Context(), d.containerName("node6"), client.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	together(d.End, node6)

	// docker-compose made one, with a disk that has no name.
	composed := labels(d.cluster, "node4")
	composed[labelProject] = d.cluster
	made, err := d.engine.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Name: d.cluster + "_node4_1", Config: &container.Config{Image: d.cfg.Image, Labels: composed},
		HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(d.cfg.Network)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.engine.ContainerStart(t.Context(), made.ID, client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	d.expectInstances(t, "node4", "node7")
	together(d.End, Node{Name: "node4", Incarnation: 4})
	d.expectInstances(t, "node7")

	// Somebody else's has the name.
	stranger := d.containerName("node8")
	if _, err := d.engine.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: stranger, Config: &container.Config{Image: d.cfg.Image}}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := d.engine.ContainerRemove(context.Background(), stranger, client.ContainerRemoveOptions{RemoveVolumes: true}); err != nil {
			t.Error(err)
		}
	}()
	for _, call := range []func(context.Context, Node) error{d.Launch, d.End} {
		if err := call(t.Context(), Node{Name: "node8"}); err == nil || !strings.Contains(err.Error(), stranger) {
			t.Errorf("a stranger: %v", err)
		}
	}
	together(d.End, Node{Name: "node7"})
	left, err := d.engine.VolumeList(t.Context(), client.VolumeListOptions{Filters: client.Filters{}.Add("label", labelCluster+"="+d.cluster)})
	if err != nil || len(left.Items) != 0 {
		t.Errorf("volumes that are left: %v %v", left.Items, err)
	}
}
