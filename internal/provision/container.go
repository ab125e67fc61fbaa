package provision

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"
)

// stopSeconds is how long `docker stop` leaves a node, more than the 10 s that it
// waits for its requests.
const stopSeconds = 30

func (d *Docker) containerName(node string) string { return d.cfg.NamePrefix + node }

// volumeName is the name that docker-compose gives to a volume called as the node.
func (d *Docker) volumeName(node string) string { return d.cluster + "_" + node }

// create makes a node's volume, if need be, and its container. A conflict is that
// the container's name is taken.
func (d *Docker) create(ctx context.Context, n Node) (id string, err error) {
	labels := map[string]string{labelCluster: d.cluster, labelNode: n.Name}
	v, err := d.engine.VolumeCreate(ctx, client.VolumeCreateOptions{Name: d.volumeName(n.Name), Labels: labels})
	if err != nil {
		return "", failed("create the volume "+d.volumeName(n.Name), err)
	}
	// The engine returns the one that exists, if there is one.
	if v.Volume.Labels[labelCluster] != d.cluster || v.Volume.Labels[labelNode] != n.Name {
		return "", fmt.Errorf("volume %s is not labelled as that of node %s of cluster %s: remove it if nobody needs it", v.Volume.Name, n.Name, d.cluster)
	}
	fill := d.fill(n)
	made, err := d.engine.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name: d.containerName(n.Name),
		Config: &container.Config{
			Image: d.cfg.Image, Cmd: fill(d.cfg.Command), Env: d.environment(n), Labels: labels, StopTimeout: new(stopSeconds),
		},
		HostConfig: &container.HostConfig{
			NetworkMode:   container.NetworkMode(d.cfg.Network),
			RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyUnlessStopped},
			Mounts:        []mount.Mount{{Type: mount.TypeVolume, Source: d.volumeName(n.Name), Target: d.cfg.DataDir}},
			Binds:         fill(d.cfg.Binds),
			Resources:     container.Resources{Memory: d.cfg.MemoryBytes, NanoCPUs: int64(d.cfg.CPUs * 1e9)},
		},
	})
	if errdefs.IsNotFound(err) {
		return "", failed("create the container of "+n.Name+" (build or pull the image where the engine is)", err)
	}
	if err != nil {
		return "", failed("create the container of "+n.Name, err)
	}
	return made.ID, nil
}

// environment returns the settings of a node in a container.
func (d *Docker) environment(n Node) []string {
	host := d.containerName(n.Name)
	env := []string{
		"KVNODE_NAME=" + n.Name,
		"KVNODE_DATA_DIR=" + d.cfg.DataDir,
		"KVNODE_ORCHESTRATORS=" + strings.Join(d.orchestrators, ","),
		"KVNODE_ADVERTISE=" + host + ":7400",
		"KVNODE_ADMIN_ADVERTISE=" + host + ":7401",
		"KVNODE_GOSSIP_ADVERTISE=" + host + ":7402",
	}
	if n.Zone != "" {
		env = append(env, "KVNODE_ZONE="+n.Zone)
	}
	for _, own := range d.fill(n)(d.cfg.Env) {
		name, _, _ := strings.Cut(own, "=")
		// Of a variable that is set twice, programs take one or the other.
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
		env = append(env, own)
	}
	return env
}

// fill returns a function that puts what is known of a node into templates.
func (d *Docker) fill(n Node) func([]string) []string {
	r := strings.NewReplacer("{name}", n.Name, "{zone}", n.Zone, "{container}", d.containerName(n.Name))
	return func(templates []string) []string {
		var out []string
		for _, t := range templates {
			out = append(out, r.Replace(t))
		}
		return out
	}
}
