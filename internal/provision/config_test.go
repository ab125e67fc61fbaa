package provision

import (
	"strings"
	"testing"
	"time"
)

// dockerConfig is a valid one.
func dockerConfig() Config {
	c := Defaults()
	c.Kind, c.Cluster = KindDocker, "shop"
	c.Docker.Image, c.Docker.Network = "kvasir:test", "shop_default"
	return c
}

// execConfig is a valid one.
func execConfig(command ...string) Config {
	c := Defaults()
	c.Kind, c.Cluster = KindExec, "shop"
	c.Exec.Command = command
	return c
}

func TestValidate(t *testing.T) {
	process := Defaults()
	process.Kind, process.Process.Dir = KindProcess, "data"
	for name, c := range map[string]Config{"defaults": Defaults(), "process": process, "docker": dockerConfig(), "exec": execConfig("/bin/hook", "x")} {
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, tc := range []struct {
		name   string
		of     Config
		change func(*Config)
		want   string
	}{
		{"kind", Defaults(), func(c *Config) { c.Kind = "magic" }, `provisioner.kind: "magic": want recommend, process, docker or exec`},
		{"no kind", Defaults(), func(c *Config) { c.Kind = "" }, "provisioner.kind"},
		{"short timeout", Defaults(), func(c *Config) { c.Timeout = time.Millisecond }, "provisioner.timeout: 1ms"},
		{"long timeout", Defaults(), func(c *Config) { c.Timeout = 2 * time.Hour }, "provisioner.timeout"},
		{"no directory", process, func(c *Config) { c.Process.Dir = "" }, "provisioner.process.dir: is required"},
		{"no hook", execConfig(), func(*Config) {}, "provisioner.exec.command: is required"},
		{"relative hook", execConfig("hook"), func(*Config) {}, "provisioner.exec.command: \"hook\""},
		{"exec without cluster", execConfig("/hook"), func(c *Config) { c.Cluster = "" }, "provisioner.cluster"},
		{"docker without cluster", dockerConfig(), func(c *Config) { c.Cluster = "" }, "provisioner.cluster"},
		{"tcp", dockerConfig(), func(c *Config) { c.Docker.Socket = "tcp://1.2.3.4:1" }, "provisioner.docker.socket"},
		{"relative socket", dockerConfig(), func(c *Config) { c.Docker.Socket = "unix://docker.sock" }, "provisioner.docker.socket"},
		{"no image", dockerConfig(), func(c *Config) { c.Docker.Image = "" }, "provisioner.docker.image: is required"},
		{"no network", dockerConfig(), func(c *Config) { c.Docker.Network = "" }, "provisioner.docker.network: is required"},
		{"default network", dockerConfig(), func(c *Config) { c.Docker.Network = "bridge" }, "provisioner.docker.network: bridge"},
		{"prefix", dockerConfig(), func(c *Config) { c.Docker.NamePrefix = "a/b" }, "provisioner.docker.name_prefix"},
		{"data", dockerConfig(), func(c *Config) { c.Docker.DataDir = "data" }, "provisioner.docker.data_dir"},
		{"env", dockerConfig(), func(c *Config) { c.Docker.Env = []string{"=x"} }, "provisioner.docker.env"},
		{"memory", dockerConfig(), func(c *Config) { c.Docker.MemoryBytes = 1 << 20 }, "provisioner.docker.memory_bytes"},
		{"cpus", dockerConfig(), func(c *Config) { c.Docker.CPUs = -1 }, "provisioner.docker.cpus"},
	} {
		c := tc.of
		tc.change(&c)
		err := c.Validate()
		if err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", tc.name, err, tc.want)
		}
	}
}

func TestFiles(t *testing.T) {
	for _, tc := range []struct {
		c  Config
		ok bool
	}{{Defaults(), true}, {dockerConfig(), true}, {execConfig("/bin/sh"), true}, {execConfig("/nowhere/hook"), false}} {
		if err := tc.c.Files(); (err == nil) != tc.ok {
			t.Errorf("%s %v: %v", tc.c.Kind, tc.c.Exec.Command, err)
		}
	}
}
