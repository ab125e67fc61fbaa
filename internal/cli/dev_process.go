package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/devcluster"
)

// devProcessCommands returns the subcommands of dev. data is the value of --data.
func (a *App) devProcessCommands(data *string) []*cobra.Command {
	onCluster := func(cmd *cobra.Command, do func(context.Context, *devcluster.Cluster) error) error {
		cluster, err := a.findDev(*data)
		if err == nil {
			err = do(cmd.Context(), cluster)
		}
		return devError(err)
	}
	status := &cobra.Command{
		Use: "status", Short: "Show the cluster's processes",
		Long: `Shows every process: running, paused or stopped, where it serves, and its process id.`,
		Example: `  kvctl dev status
  kvctl dev status -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onCluster(cmd, func(_ context.Context, c *devcluster.Cluster) error { return a.printDevStatus(c) })
		},
	}
	stop := &cobra.Command{
		Use: "stop", Short: "Stop all processes",
		Long: `Stops the nodes, then the orchestrators, with SIGTERM; those that take longer than 15 s
are killed. Data and settings stay: kvctl dev starts the cluster again.`,
		Example: `  kvctl dev stop`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onCluster(cmd, a.devStop)
		},
	}
	var zone string
	add := &cobra.Command{
		Use: "add", Short: "Add and start one more data node, as a spare",
		Long: `Adds the data node with the next free number, in the background. It registers with the
orchestrators and becomes a spare: it coordinates requests and holds no data.`,
		Example: `  kvctl dev add
  kvctl dev add --zone z2`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onCluster(cmd, func(ctx context.Context, c *devcluster.Cluster) error { return a.devAdd(ctx, c, zone) })
		},
	}
	add.Flags().StringVar(&zone, "zone", "", "zone of the node (default: round robin over the cluster's zones)")
	out := []*cobra.Command{status, stop, add}
	for _, v := range devVerbs {
		cmd := &cobra.Command{
			Use: v.name + " NAME...", Short: v.short, Long: v.long, Example: v.example,
			Args: func(cmd *cobra.Command, args []string) error {
				if len(args) == 0 {
					return usagef("%s needs the NAME of a process, such as node2 or orch1: see kvctl dev status", cmd.CommandPath())
				}
				return nil
			},
			RunE: func(cmd *cobra.Command, names []string) error {
				return onCluster(cmd, func(ctx context.Context, c *devcluster.Cluster) error {
					if wipe, err := cmd.Flags().GetBool("wipe"); err == nil && wipe {
						if err := c.Wipe(ctx, names...); err != nil {
							return err
						}
					}
					if file, err := cmd.Flags().GetString("recover"); err == nil && file != "" {
						if err := c.Recover(file); err != nil {
							return err
						}
					}
					return v.do(a, ctx, c, names)
				})
			},
		}
		if v.name == "start" {
			cmd.Flags().Bool("wipe", false, "with an empty data directory, as a new node; stops it first")
			cmd.Flags().String("recover", "", "file of kvctl recover, to start orchestrators of a new generation with; their data directories must be empty")
		}
		out = append(out, cmd)
	}
	return out
}

// devVerbs are the subcommands that take names of processes.
var devVerbs = []struct {
	name, short, long, example string
	do                         func(a *App, ctx context.Context, c *devcluster.Cluster, names []string) error
}{
	{
		name: "kill", short: "Kill processes with SIGKILL",
		long: `Kills processes at once, as a crash would: nothing is flushed, nobody is told.
Start them again with kvctl dev start.`,
		example: `  kvctl dev kill node2
  kvctl dev kill node1 node2 orch1`,
		do: func(a *App, ctx context.Context, c *devcluster.Cluster, names []string) error {
			return a.devSignal(ctx, names, c.Kill, "killed")
		},
	},
	{
		name: "pause", short: "Pause processes with SIGSTOP",
		long: `Makes processes stand still, connections open: what a node looks like that is
overloaded, or behind a broken network. Let them go on with kvctl dev resume.`,
		example: `  kvctl dev pause node3`,
		do: func(a *App, ctx context.Context, c *devcluster.Cluster, names []string) error {
			return a.devSignal(ctx, names, c.Pause, "paused")
		},
	},
	{
		name: "resume", short: "Let paused processes go on",
		long: `Lets paused processes go on, with SIGCONT.`, example: `  kvctl dev resume node3`,
		do: func(a *App, ctx context.Context, c *devcluster.Cluster, names []string) error {
			return a.devSignal(ctx, names, c.Resume, "resumed")
		},
	},
	{
		name: "start", short: "Start stopped processes",
		long: `Starts processes that were killed, or never started, in the background with the data they
have, and waits until they are ready. A process that is not ready in time stays running. A node
that was removed from the cluster, as one that was dead for longer than replace_after, joins
again only with --wipe.`,
		example: `  kvctl dev start node2
  kvctl dev start node2 --wipe
  kvctl dev start orch1 orch2 orch3
  kvctl dev start orch1 --recover kvasir-recovery-g1.json`,
		do: (*App).devStart,
	},
}

func (a *App) devStop(ctx context.Context, c *devcluster.Cluster) error {
	stopped, err := c.Stop(ctx)
	switch {
	case err != nil:
		return err
	case len(stopped) == 0:
		a.devTalkf("nothing is running in %s", c.Dir())
	default:
		a.devTalkf("stopped %s; the data is in %s", strings.Join(stopped, ", "), c.Dir())
	}
	return nil
}

func (a *App) devSignal(ctx context.Context, names []string, signal func(context.Context, ...string) error, done string) error {
	if err := signal(ctx, names...); err != nil {
		return err
	}
	a.devTalkf("%s %s", done, strings.Join(names, ", "))
	return nil
}

func (a *App) devStart(ctx context.Context, c *devcluster.Cluster, names []string) error {
	started, err := c.Start(ctx, names...)
	if err != nil || len(started) == 0 {
		return err
	}
	if err := c.WaitReady(ctx, started...); err != nil {
		return err
	}
	a.devTalkf("started %s", strings.Join(started, ", "))
	return nil
}

func (a *App) devAdd(ctx context.Context, c *devcluster.Cluster, zone string) error {
	name, err := c.AddNode(ctx, zone)
	if err != nil {
		return err
	}
	if _, err := c.Start(ctx, name); err != nil {
		return err
	}
	if err := c.WaitReady(ctx, name); err != nil {
		return err
	}
	// The context dev is the one of the cluster that was started last.
	if last, err := a.lastDev(); err == nil && last == c.Dir() {
		if err := a.saveDevContext(c); err != nil {
			return err
		}
	}
	a.devTalkf("added %s; it is a spare: it coordinates requests and holds no data", name)
	return a.printDevStatus(c, name)
}
