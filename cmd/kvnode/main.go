// Command kvnode is a node of a Kvasir cluster: it holds records and serves
// clients.
package main

import (
	"context"
	"os"
	"runtime"

	"github.com/kvasirdb/kvasir/cmd/internal/process"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/topology"
)

type config struct {
	node.Config `yaml:",inline"`
	Log         process.Log `yaml:"log"`
}

func main() {
	os.Exit(process.Program[config]{
		Name:      "kvnode",
		Short:     "A node of a Kvasir cluster: it holds records and serves clients",
		EnvPrefix: "KVNODE_",
		Defaults:  func() config { return config{node.Defaults(), process.DefaultLog} },
		Validate: func(c *config) error {
			c.Complete()
			return c.Config.Validate()
		},
		Files: func(c *config) error {
			_, err := c.TLS.Load()
			return err
		},
		Log:         func(c *config) process.Log { return c.Log },
		AdminListen: func(c *config) string { return c.AdminListen },
		Run: func(ctx context.Context, c config, h process.Host) error {
			c.Logger, c.Software, c.Fatal, c.Restart = h.Logger, h.Software, h.Fatal, h.Restart
			if c.Role == topology.Reporting.String() && os.Getenv("GOMAXPROCS") == "" {
				// Those that read for reports leave the others to the writes. The system shares
				// the cores out.
				runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + node.MaxReports)
			}
			return node.Run(ctx, c.Config)
		},
	}.Main())
}
