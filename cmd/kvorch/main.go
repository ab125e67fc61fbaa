// Command kvorch is an orchestrator of a Kvasir cluster: 1, 3 or 5 of them agree on
// the topology and watch the nodes.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/kvasirdb/kvasir/cmd/internal/process"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/provision"
	"github.com/kvasirdb/kvasir/internal/topology"
)

type config struct {
	orchestrator.Config `yaml:",inline"`
	Log                 process.Log `yaml:"log"`
}

func main() {
	os.Exit(process.Program[config]{
		Name:      "kvorch",
		Short:     "An orchestrator of a Kvasir cluster: it agrees on the topology and watches the nodes",
		EnvPrefix: "KVORCH_",
		Defaults:  func() config { return config{orchestrator.Defaults(), process.DefaultLog} },
		Validate:  func(c *config) error { return c.Config.Validate() },
		Files: func(c *config) error {
			_, err := c.TLS.Load()
			return errors.Join(err, c.Provision.Files(), readRecovery(&c.Config))
		},
		Log:         func(c *config) process.Log { return c.Log },
		AdminListen: func(c *config) string { return c.AdminListen },
		Run: func(ctx context.Context, c config, h process.Host) error {
			c.Logger, c.Software, c.Fatal, c.Restart = h.Logger, h.Software, h.Fatal, h.Restart
			if err := readRecovery(&c.Config); err != nil {
				return err
			}
			var err error
			if c.Provisioner, err = provisioner(&c.Config, h.Logger); err != nil {
				return err
			}
			return orchestrator.Run(ctx, c.Config)
		},
	}.Main())
}

// readRecovery reads the file that begins a new generation, where there is one.
func readRecovery(c *orchestrator.Config) error {
	if c.Recover == "" {
		return nil
	}
	b, err := os.ReadFile(c.Recover)
	if err == nil {
		c.Recovery, err = topology.DecodeRecovery(b)
	}
	if err != nil {
		return fmt.Errorf("recover: %s: %w", c.Recover, err)
	}
	return nil
}

// provisioner returns who launches and ends nodes, nil where nobody does.
func provisioner(c *orchestrator.Config, logger *slog.Logger) (orchestrator.Provisioner, error) {
	switch c.Provision.Kind {
	case provision.KindDocker:
		return provision.NewDocker(c.Provision, c.Addresses(), logger)
	case provision.KindExec:
		return provision.NewExec(c.Provision, c.Addresses()), nil
	case provision.KindProcess:
		return newProcesses(c.Provision.Process, logger)
	}
	return nil, nil
}

// processes has the nodes of a development cluster launched and ended.
type processes struct{ *devcluster.Provisioner }

func newProcesses(c provision.ProcessConfig, logger *slog.Logger) (*processes, error) {
	if c.BinDir == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find kvnode beside this executable, or set provisioner.process.bin_dir: %w", err)
		}
		c.BinDir = filepath.Dir(self)
	}
	p, err := devcluster.NewProvisioner(c.Dir, devcluster.Options{BinDir: c.BinDir, Notice: func(text string) { logger.Info(text) }})
	if err != nil {
		return nil, fmt.Errorf("provisioner.process.dir: %w", err)
	}
	return &processes{p}, nil
}

// Launch implements orchestrator.Provisioner.
func (p *processes) Launch(ctx context.Context, n provision.Node) error {
	return p.Provisioner.Launch(ctx, n.Name, n.Zone)
}

// End implements orchestrator.Provisioner.
func (p *processes) End(ctx context.Context, n provision.Node) error {
	return p.Provisioner.End(ctx, n.Name)
}

// List implements orchestrator.Provisioner.
func (p *processes) List(context.Context) ([]provision.Instance, error) {
	all, err := p.Provisioner.List()
	var out []provision.Instance
	for _, s := range all {
		out = append(out, provision.Instance{Name: s.Name, ID: fmt.Sprint(s.PID), Running: s.State == devcluster.Running || s.State == devcluster.Paused})
	}
	return out, err
}
