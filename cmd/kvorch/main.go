// Command kvorch is an orchestrator of a Kvasir cluster: 1, 3 or 5 of them agree on
// the topology and watch the nodes.
package main

import (
	"context"
	"os"

	"github.com/kvasirdb/kvasir/cmd/internal/process"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
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
			return err
		},
		Log:         func(c *config) process.Log { return c.Log },
		AdminListen: func(c *config) string { return c.AdminListen },
		Run: func(ctx context.Context, c config, h process.Host) error {
			c.Logger, c.Software, c.Fatal, c.Restart = h.Logger, h.Software, h.Fatal, h.Restart
			return orchestrator.Run(ctx, c.Config)
		},
	}.Main())
}
