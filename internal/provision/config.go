package provision

import (
	"errors"
	"fmt"
	"math"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// The kinds of provisioners. With KindRecommend there is none: the orchestrators say
// what they would do. That of KindProcess belongs to those who run development
// clusters.
const (
	KindRecommend = "recommend"
	KindProcess   = "process"
	KindDocker    = "docker"
	KindExec      = "exec"
)

// Config holds an orchestrator's settings for launching and ending nodes. They must
// be the same on every orchestrator.
type Config struct {
	// Kind is one of the kinds. Default recommend.
	Kind string `yaml:"kind" help:"who launches and ends nodes: recommend (nobody), process, docker or exec"`
	// Cluster tells the cluster's instances from those of other clusters that the same
	// engine or hook has. Required for docker and exec, and never to be changed.
	Cluster string `yaml:"cluster" help:"name that tells this cluster's instances from others' (required for docker and exec)"`
	// Timeout bounds one launch, end or list. Default 1 min.
	Timeout time.Duration `yaml:"timeout" help:"how long a launch, an end or a list may take"`
	// LaunchTimeout is how long a launched node may take to register, before it is given up
	// and ended. Default 5 min.
	LaunchTimeout time.Duration `yaml:"launch_timeout" help:"how long a launched node may take to register"`
	Process       ProcessConfig `yaml:"process"`
	Docker        DockerConfig  `yaml:"docker"`
	Exec          ExecConfig    `yaml:"exec"`
}

// ProcessConfig is for processes of a development cluster on this machine.
type ProcessConfig struct {
	// Dir is the development cluster's directory. Required.
	Dir string `yaml:"dir" help:"directory of the development cluster whose processes the nodes are"`
	// BinDir is where kvnode lies. Default: where this executable lies.
	BinDir string `yaml:"bin_dir" help:"directory of kvnode (default: that of this executable)"`
}

// ExecConfig is for a hook, an executable of the operator's.
type ExecConfig struct {
	// Command is the hook's absolute path and arguments. The action is added as the
	// last one. Required.
	Command []string `yaml:"command" help:"absolute path and arguments of the hook; launch, end or list is added"`
}

// DockerConfig is for containers.
type DockerConfig struct {
	// Socket is the engine's. Default unix:///var/run/docker.sock.
	Socket string `yaml:"socket" help:"socket of the engine, unix://PATH"`
	// Image holds kvnode. Required; it must be on the engine, nothing is pulled.
	Image string `yaml:"image" help:"image with kvnode; it is not pulled"`
	// Network is one that the engine resolves names in and the orchestrators are
	// reached through. Required.
	Network string `yaml:"network" help:"network that containers join; not the default bridge, which does not resolve names"`
	// NamePrefix and the node's name are the container's name, under which others reach
	// it. Default: the cluster and a dash.
	NamePrefix string `yaml:"name_prefix" help:"what container names begin with (default: the cluster and a dash)"`
	// DataDir is where the volume is mounted. Default /data.
	DataDir string `yaml:"data_dir" help:"where the node's volume is mounted in the container"`
	// Command and Env go to the container: without Command it runs the image's own, and
	// Env, as NAME=VALUE, wins over the settings that are derived. In both, {name},
	// {zone} and {container} stand for the node's name and zone and the container's name.
	Command []string `yaml:"command" help:"command and arguments (default: the image's); {name}, {zone} and {container} are replaced"`
	Env     []string `yaml:"env" help:"NAME=VALUE for the container, for example KVNODE_GOSSIP_KEY=...; {name}, {zone} and {container} are replaced"`
	// Binds are further mounts, such as certificates, in Docker's notation.
	Binds []string `yaml:"binds" help:"further mounts, such as certificates: HOST_PATH:CONTAINER_PATH:ro"`
	// MemoryBytes and CPUs limit a container; 0: they do not.
	MemoryBytes int64   `yaml:"memory_bytes" help:"memory of a container, in bytes; 0: no limit"`
	CPUs        float64 `yaml:"cpus" help:"cores of a container; 0: no limit"`
}

// Defaults returns a configuration with every default filled in.
func Defaults() Config {
	return Config{
		Kind: KindRecommend, Timeout: time.Minute, LaunchTimeout: 5 * time.Minute,
		Docker: DockerConfig{Socket: "unix:///var/run/docker.sock", DataDir: "/data"},
	}
}

// Validate returns an error that names every key with an impossible value, as keys
// below "provisioner". Settings of other kinds than the chosen one are not looked at.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("provisioner.%s: %w", key, err))
		}
	}
	switch c.Kind {
	case KindRecommend:
	case KindProcess:
		if c.Process.Dir == "" {
			bad("process.dir", errors.New("is required"))
		}
	case KindDocker:
		bad("cluster", topology.CheckName("cluster", c.Cluster))
		c.Docker.validate(bad)
	case KindExec:
		bad("cluster", topology.CheckName("cluster", c.Cluster))
		if len(c.Exec.Command) == 0 {
			bad("exec.command", errors.New("is required"))
		} else if !filepath.IsAbs(c.Exec.Command[0]) {
			bad("exec.command", fmt.Errorf("%q: want an absolute path", c.Exec.Command[0]))
		}
	default:
		bad("kind", fmt.Errorf("%q: want recommend, process, docker or exec", c.Kind))
	}
	if c.Timeout < time.Second || c.Timeout > time.Hour {
		bad("timeout", fmt.Errorf("%s: want 1s to 1h", c.Timeout))
	}
	if c.LaunchTimeout < time.Second || c.LaunchTimeout > 24*time.Hour {
		bad("launch_timeout", fmt.Errorf("%s: want 1s to 24h", c.LaunchTimeout))
	}
	return errors.Join(errs...)
}

func (c *DockerConfig) validate(bad func(key string, err error)) {
	if path, ok := strings.CutPrefix(c.Socket, "unix://"); !ok || !filepath.IsAbs(path) {
		bad("docker.socket", fmt.Errorf("%q: want unix:// and an absolute path", c.Socket))
	}
	if c.Image == "" {
		bad("docker.image", errors.New("is required"))
	}
	switch c.Network {
	case "":
		bad("docker.network", errors.New("is required"))
	case "default", "bridge", "host", "none":
		bad("docker.network", fmt.Errorf("%s does not resolve the names of containers: make one with docker network create", c.Network))
	}
	if c.NamePrefix != "" {
		bad("docker.name_prefix", topology.CheckName("container", c.NamePrefix))
	}
	if !filepath.IsAbs(c.DataDir) {
		bad("docker.data_dir", fmt.Errorf("%q: want an absolute path", c.DataDir))
	}
	for _, v := range c.Env {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" {
			bad("docker.env", fmt.Errorf("%q: want NAME=VALUE", v))
		}
	}
	if c.MemoryBytes != 0 && c.MemoryBytes < 64<<20 {
		bad("docker.memory_bytes", fmt.Errorf("%d: want 0 (no limit) or at least 67108864", c.MemoryBytes))
	}
	if !(c.CPUs >= 0) || math.IsInf(c.CPUs, 1) { // NaN is not at least 0
		bad("docker.cpus", fmt.Errorf("%v: want 0 (no limit) or more", c.CPUs))
	}
}

// Files returns an error when a file that the settings name cannot be used.
func (c *Config) Files() error {
	if c.Kind != KindExec {
		return nil
	}
	if _, err := exec.LookPath(c.Exec.Command[0]); err != nil {
		return fmt.Errorf("provisioner.exec.command: %w", err)
	}
	return nil
}
