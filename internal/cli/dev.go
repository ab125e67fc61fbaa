package cli

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
)

// devFlags are the flags of dev; data is one of its subcommands too.
type devFlags struct {
	devcluster.Settings
	data   string
	detach bool
}

// devContext is the name of the context that dev writes.
const devContext = "dev"

func (a *App) devCommand() *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use: "dev", SuggestionsMinimumDistance: 2,
		Short: "Run a cluster of real processes on this machine",
		Long: `Starts a local cluster: kvorch and kvnode processes, found beside kvctl, on 127.0.0.1.

Node i serves clients at port BASE+10(i-1), admin HTTP one above and gossip two above;
orchestrator j has the four ports from BASE-10j. BASE is --port.

The cluster's configuration, data and logs are in one directory. Run again with the same
directory, it starts what is there: data, settings, and nodes that were added. Without
--detach it runs until Ctrl-C, and reports processes that die. It becomes the current
context, named dev.

The subcommands find the cluster by --data, else take the last one that was started.`,
		Example: `  kvctl dev                           three nodes, one orchestrator
  kvctl dev --nodes 5 --detach        five nodes in three zones, in the background
  kvctl dev --data /tmp/b --port 8400 a second cluster beside the first
  kvctl dev --reporting 1 --detach    with a node that answers reports
  kvctl dev --autonomy --detach       a cluster that replaces what dies, and scales itself
  kvctl dev kill node2                what a crash looks like
  kvctl dev stop`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return help(cmd, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return devError(a.runDev(cmd, f))
		},
	}
	cmd.PersistentFlags().StringVar(&f.data, "data", "", "directory of the cluster (default: kvasir-dev in the user's cache directory; of subcommands: the last one started)")
	l := cmd.Flags()
	l.IntVar(&f.Nodes, "nodes", 3, "number of data nodes")
	l.IntVar(&f.Orchestrators, "orchestrators", 1, "number of orchestrators: 1, 3 or 5")
	l.IntVar(&f.Reporting, "reporting", 0, fmt.Sprintf("number of reporting nodes, 0 to %d, report1 and on", devcluster.MaxReporting))
	l.IntVar(&f.Zones, "zones", 0, "number of zones that the nodes are spread over, z1 and on (default: 3, or the number of nodes if that is less)")
	l.IntVar(&f.Port, "port", 7400, "first port of node1; the others follow from it")
	l.BoolVar(&f.Autonomy, "autonomy", false, "let the orchestrators replace dead nodes and scale the cluster: they launch and end kvnode processes by themselves")
	l.Float64Var(&f.CPULimit, "cpu-limit", 0, "cores that each node is taken to have, for its CPU utilisation (default: all; with --autonomy, its part of them when there are as many nodes as may be)")
	l.BoolVar(&f.detach, "detach", false, "return when the cluster is ready, and leave it running")
	cmd.AddCommand(a.devProcessCommands(&f.data)...)
	return cmd
}

// endSignals are those that end a run in the foreground. The processes it started
// do not get them from the terminal.
var endSignals = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}

func untilEndSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, endSignals[0], endSignals[1], endSignals[2])
}

// runDev starts the cluster, or says that it runs, and stays with it unless --detach.
func (a *App) runDev(cmd *cobra.Command, f devFlags) error {
	ctx, release := untilEndSignal(cmd.Context())
	defer release()
	cluster, err := a.openOrCreateDev(ctx, cmd, f)
	if err != nil {
		return err
	}
	if err := a.rememberDev(cluster.Dir()); err != nil {
		return err
	}
	if running, err := devRuns(cluster); err != nil || running {
		return errors.Join(err, a.devAlreadyRunning(cluster))
	}
	started, err := cluster.Start(ctx)
	if err == nil && len(started) == 0 { // another run was quicker
		return a.devAlreadyRunning(cluster)
	}
	if err == nil {
		a.devTalkf("starting %s in %s", strings.Join(started, ", "), cluster.Dir())
		err = cluster.WaitReady(ctx)
	}
	if err == nil {
		err = a.saveDevContext(cluster)
	}
	if err == nil {
		err = a.devWelcome(cluster, f.detach)
	}
	if err != nil {
		return a.stopStarted(ctx, cluster, started, err)
	}
	if f.detach {
		return nil
	}
	return a.attendDev(ctx, cluster)
}

// openOrCreateDev returns the cluster in the directory that the flags name, which is
// created if there is none.
func (a *App) openOrCreateDev(ctx context.Context, cmd *cobra.Command, f devFlags) (*devcluster.Cluster, error) {
	dir, err := a.devDir(f.data)
	if err != nil {
		return nil, err
	}
	cluster, err := devcluster.Open(dir, a.devOptions())
	if err == nil {
		asked := map[string]int{}
		for name, value := range map[string]int{"nodes": f.Nodes, "orchestrators": f.Orchestrators, "reporting": f.Reporting, "zones": f.Zones, "port": f.Port} {
			if cmd.Flags().Changed(name) {
				asked[name] = value
			}
		}
		if have := cluster.Settings().Autonomy; cmd.Flags().Changed("autonomy") && f.Autonomy != have {
			return nil, usagef("--autonomy=%t: the cluster in %s was created with --autonomy=%t, and stays so; use another directory, with --data", f.Autonomy, dir, have)
		}
		if have := cluster.Settings().CPULimit; cmd.Flags().Changed("cpu-limit") && f.CPULimit != have {
			return nil, usagef("--cpu-limit %v: the cluster in %s was created with %v, and stays so; use another directory, with --data", f.CPULimit, dir, have)
		}
		return cluster, devContradictions(cluster, asked)
	}
	if !errors.Is(err, devcluster.ErrNoCluster) {
		return nil, err
	}
	if !cmd.Flags().Changed("zones") {
		f.Zones = devcluster.DefaultZones(f.Nodes)
	}
	if err := f.Settings.Validate(); err != nil {
		return nil, usageError{err}
	}
	return devcluster.Create(ctx, dir, f.Settings, a.devOptions())
}

// stopStarted stops what a failed start has started, and returns why it failed.
func (a *App) stopStarted(ctx context.Context, cluster *devcluster.Cluster, started []string, why error) error {
	if ctx.Err() != nil {
		why = errors.New("interrupted before the cluster was ready")
	}
	if len(started) == 0 {
		return why
	}
	hurry, release := untilEndSignal(context.Background())
	defer release()
	a.devTalkf("stopping %s", strings.Join(started, ", "))
	_, err := cluster.Stop(hurry, started...)
	return errors.Join(why, err)
}

// attendDev stays with the cluster until a signal arrives, and stops it then.
func (a *App) attendDev(ctx context.Context, cluster *devcluster.Cluster) error {
	err := cluster.Watch(ctx)
	// Before anything else, so that no second signal ends this process before its time.
	hurry, release := untilEndSignal(context.Background())
	defer release()
	if errors.Is(err, devcluster.ErrStopped) {
		a.devTalkf("the cluster was stopped by another kvctl; its data is in %s", cluster.Dir())
		return nil
	}
	if err != nil {
		a.devTalkf("stopping, as %s can no longer be read", cluster.Dir())
		_, stopErr := cluster.StopChildren(hurry)
		return errors.Join(err, stopErr)
	}
	a.devTalkf("stopping the nodes, then the orchestrators (Ctrl-C again kills them)")
	if _, err := cluster.Stop(hurry); err != nil {
		return err
	}
	a.devTalkf("stopped; the data is in %s, and `%s dev` with the same directory goes on with it", cluster.Dir(), a.invocation())
	return nil
}

func (a *App) devOptions() devcluster.Options {
	return devcluster.Options{BinDir: a.BinDir, Notice: func(text string) { a.devTalkf("%s", text) }}
}

// devTalkf writes a line for people.
func (a *App) devTalkf(format string, args ...any) {
	fmt.Fprintf(a.Stderr, format+"\n", args...)
}

// devError gives errors the code that scripts rely on.
func devError(err error) error {
	var unknown *devcluster.UnknownNameError
	var notReady *devcluster.StartError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		return rpc.Errorf(codes.NotFound, "PROCESS_NOT_FOUND", "%s", err).
			With("names", strings.Join(unknown.Names, ",")).With("known", strings.Join(unknown.Known, ","))
	case errors.Is(err, devcluster.ErrNoCluster):
		return rpc.Errorf(codes.NotFound, "NO_DEV_CLUSTER", "%s: start one with `kvctl dev`", err)
	case errors.As(err, &notReady) && !notReady.Exited:
		return rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "%s", err).With("name", notReady.Name).With("log", notReady.LogPath)
	}
	return err
}
