package provision

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// The labels that make a container or volume one of ours. labelProject is what
// docker-compose sets.
const (
	labelCluster = "io.kvasir.cluster"
	labelNode    = "io.kvasir.node"
	labelProject = "com.docker.compose.project"
)

// Docker is a provisioner of containers. What makes Launch idempotent is that the
// engine gives a container's name to one container only.
type Docker struct {
	cfg           DockerConfig
	cluster       string
	timeout       time.Duration
	orchestrators []string
	engine        *client.Client
	logger        *slog.Logger
}

// NewDocker returns the provisioner of kind docker for a cluster whose orchestrators
// nodes reach by gRPC at the given addresses. It does not connect yet.
// REQUIRES: cfg.Validate returned nil.
func NewDocker(cfg Config, orchestrators []string, logger *slog.Logger) (*Docker, error) {
	engine, err := client.New(client.WithHost(cfg.Docker.Socket))
	if err != nil {
		return nil, fmt.Errorf("docker engine at %s: %w", cfg.Docker.Socket, err)
	}
	if cfg.Docker.NamePrefix == "" {
		cfg.Docker.NamePrefix = cfg.Cluster + "-"
	}
	return &Docker{cfg.Docker, cfg.Cluster, cfg.Timeout, orchestrators, engine, logger}, nil
}

// Kind returns KindDocker.
func (d *Docker) Kind() string { return KindDocker }

// Launch runs a node in a new container with a new volume, unless there is one of
// its name.
func (d *Docker) Launch(ctx context.Context, n Node) error {
	if err := topology.CheckName("node", n.Name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	for {
		c, err := d.find(ctx, n.Name)
		if err != nil {
			return err
		}
		if c != nil {
			// The engine lists a container that another call is making before it can start it.
			err := d.start(ctx, n.Name, c.ID, c.State)
			if !unmade(err) {
				return err
			}
			if err := pause(ctx); err != nil {
				return fmt.Errorf("launch %s: %w", n.Name, err)
			}
			continue
		}
		id, err := d.create(ctx, n)
		if err == nil {
			return d.start(ctx, n.Name, id, container.StateCreated)
		}
		if !errdefs.IsConflict(err) {
			return err
		}
		// Another call was given the name. Its container shows in a moment.
		if err := pause(ctx); err != nil {
			return fmt.Errorf("launch %s: %w", n.Name, err)
		}
	}
}

// start starts a container that has no process. One that never ran and cannot be
// started is removed, so that the next call makes it by the settings of then.
func (d *Docker) start(ctx context.Context, name, id string, state container.ContainerState) error {
	switch state {
	case container.StateCreated, container.StateExited:
	case container.StateRemoving, container.StateDead:
		return fmt.Errorf("the container of %s, %s, is being removed: %w", name, short(id), ErrTryAgain)
	default:
		return nil
	}
	if _, err := d.engine.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		if state == container.StateCreated && !unmade(err) {
			// Without force: the engine refuses if another call has started it.
			_, _ = d.engine.ContainerRemove(ctx, id, client.ContainerRemoveOptions{})
		}
		return failed("start the container of "+name, err)
	}
	d.logger.Info("container started", "node", name, "container", short(id))
	return nil
}

// End kills and removes a node's container, and deletes its volume.
func (d *Docker) End(ctx context.Context, n Node) error {
	if err := topology.CheckName("node", n.Name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	c, err := d.find(ctx, n.Name)
	if err != nil {
		return err
	}
	// By name too: a call that was cut off may have left the volume alone.
	own, err := d.ownVolume(ctx, n.Name)
	if err != nil {
		return err
	}
	disks := []string{own}
	if c != nil {
		disks = append(disks, d.mounted(c))
		err := d.remove(ctx, func() error {
			_, err := d.engine.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
			return err
		})
		if err != nil {
			return failed("remove the container of "+n.Name, err)
		}
		d.logger.Info("container removed", "node", n.Name, "container", short(c.ID))
	}
	for _, disk := range disks {
		if disk == "" {
			continue
		}
		err := d.remove(ctx, func() error {
			_, err := d.engine.VolumeRemove(ctx, disk, client.VolumeRemoveOptions{})
			return err
		})
		if err != nil {
			return failed("delete the volume "+disk, err)
		}
	}
	return nil
}

// remove tries until something is gone. A conflict is that another call is just
// removing it: the volume of a container is in use until all of that is done.
func (d *Docker) remove(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		if !errdefs.IsConflict(err) {
			return err
		}
		if ended := pause(ctx); ended != nil {
			return fmt.Errorf("%w: %w", ended, err)
		}
	}
}

// List returns the cluster's containers.
func (d *Docker) List(ctx context.Context) ([]Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	found, err := d.containers(ctx, client.Filters{}.Add("label", labelCluster+"="+d.cluster, labelNode))
	if err != nil {
		return nil, err
	}
	var out []Instance
	for _, c := range found {
		if d.foreign(&c) == "" {
			running := c.State == container.StateRunning || c.State == container.StatePaused
			out = append(out, Instance{c.Labels[labelNode], short(c.ID), running})
		}
	}
	return out, nil
}

// find returns the container of a node, or nil. It refuses to guess: an error says
// what stands in the way.
func (d *Docker) find(ctx context.Context, name string) (*container.Summary, error) {
	found, err := d.containers(ctx, client.Filters{}.Add("label", labelCluster+"="+d.cluster, labelNode+"="+name))
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 0:
		return nil, d.checkName(ctx, name)
	case 1:
		if why := d.foreign(&found[0]); why != "" {
			return nil, fmt.Errorf("container %s is labelled as node %s of cluster %s, but %s", short(found[0].ID), name, d.cluster, why)
		}
		return &found[0], nil
	}
	return nil, fmt.Errorf("%d containers are labelled as node %s of cluster %s: remove all but one, or name clusters that share an engine differently (provisioner.cluster)", len(found), name, d.cluster)
}

// checkName returns an error when a container that is not ours has the name that a
// node's container has to get.
func (d *Docker) checkName(ctx context.Context, name string) error {
	want := d.containerName(name)
	found, err := d.containers(ctx, client.Filters{}.Add("name", "^/?"+regexp.QuoteMeta(want)+"$"))
	if err != nil {
		return err
	}
	for _, c := range found {
		// One that was made since find looked is no stranger.
		if c.Labels[labelCluster] != d.cluster || c.Labels[labelNode] != name {
			return fmt.Errorf("container %s is called %s, but is not labelled as node %s of cluster %s: rename or remove it, or set provisioner.docker.name_prefix", short(c.ID), want, name, d.cluster)
		}
	}
	return nil
}

// foreign says why a container with our labels is another cluster's all the same, or
// is empty. A compose file can be run twice under two projects with one cluster's name
// in it.
func (d *Docker) foreign(c *container.Summary) string {
	if project, ok := c.Labels[labelProject]; ok && project != d.cluster {
		return fmt.Sprintf("docker-compose made it for project %s: set provisioner.cluster and the label %s to the project's name", project, labelCluster)
	}
	return ""
}

func (d *Docker) containers(ctx context.Context, filters client.Filters) ([]container.Summary, error) {
	found, err := d.engine.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
	if err != nil {
		return nil, failed("list containers", err)
	}
	return found.Items, nil
}

// ownVolume returns the volume that belongs to a node by its name and labels, or "".
func (d *Docker) ownVolume(ctx context.Context, name string) (string, error) {
	v, err := d.engine.VolumeInspect(ctx, d.volumeName(name), client.VolumeInspectOptions{})
	switch {
	case errdefs.IsNotFound(err):
		return "", nil
	case err != nil:
		return "", failed("inspect the volume "+d.volumeName(name), err)
	case v.Volume.Labels[labelCluster] != d.cluster || v.Volume.Labels[labelNode] != name:
		return "", nil
	}
	return v.Volume.Name, nil
}

// mounted returns the volume that holds a container's data, or "".
func (d *Docker) mounted(c *container.Summary) string {
	for _, m := range c.Mounts {
		switch {
		case m.Destination != d.cfg.DataDir:
		case m.Type == mount.TypeVolume:
			return m.Name
		default:
			d.logger.Warn("a node's data lies in a directory of the host, which stays", "node", c.Labels[labelNode], "directory", m.Source)
		}
	}
	return ""
}

// failed wraps an error of the engine.
func failed(what string, err error) error {
	if client.IsErrConnectionFailed(err) {
		return fmt.Errorf("%s: %w: %w", what, ErrTryAgain, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// unmade reports whether an error says that there is no such container. What else may be
// missing, such as a network, has the same status.
func unmade(err error) bool {
	return errdefs.IsNotFound(err) && strings.Contains(err.Error(), "No such container")
}

// short returns an identifier as people see it elsewhere.
func short(id string) string { return id[:min(len(id), 12)] }
