// Package cli is kvctl: its commands, what they print and how they fail. Data
// commands use the public client library, the others the cluster's control
// services; neither opens a store or takes part in an agreement. See DESIGN.md.
package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// App is what a run of kvctl uses of its surroundings.
type App struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Terminal tells whether Stdout, ErrTerminal whether Stderr, and InTerminal whether
	// Stdin is a terminal.
	Terminal, ErrTerminal, InTerminal bool
	Getenv                            func(string) string
	// ConfigDir holds the contexts and what dev remembers.
	ConfigDir string
	// BinDir is where kvnode and kvorch are looked for.
	BinDir string
	// Software names the version.
	Software string

	flags flags
	// settle is how long nodes are waited for that are to take settings in. Default 15 s.
	settle time.Duration
	// started is set when a command itself begins: failures before are those of the
	// command line.
	started bool
}

// flags are those that every command has.
type flags struct {
	endpoints []string
	context   string
	output    string
	timeout   time.Duration
}

// The values of --output.
const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

// defaultTimeout bounds one request.
const defaultTimeout = 5 * time.Second

// Run runs kvctl and returns its exit code. It is called once for an App.
func (a *App) Run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil && !a.started {
		err = usageError{err}
		a.flags.output = outputOf(args)
	}
	return a.fail(err)
}

// outputOf finds --output on a command line that could not be understood as a whole.
func outputOf(args []string) string {
	for i, arg := range args {
		switch {
		case arg == "--":
			return outputTable
		case (arg == "-o" || arg == "--output") && i+1 < len(args):
			return args[i+1]
		case strings.HasPrefix(arg, "--output="):
			return strings.TrimPrefix(arg, "--output=")
		case strings.HasPrefix(arg, "-o"):
			return strings.TrimPrefix(strings.TrimPrefix(arg, "-o"), "=")
		}
	}
	return outputTable
}

// root builds the command tree.
func (a *App) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "kvctl",
		Short: "Talk to a Kvasir cluster, or run one on this machine",
		Long: `kvctl talks to a Kvasir cluster, or runs one on this machine.

The cluster is looked for at --endpoints, else at $KVCTL_ENDPOINTS, else in the
context of --context or the current one, else at 127.0.0.1:7400.

Exit codes: 0 ok, 1 error, 2 usage or bad flag value, 3 not found, 4 unavailable
or timed out, 5 conflict. Data goes to stdout, everything else to stderr.`,
		Example: `  kvctl dev --nodes 3
  kvctl put greeting hello
  kvctl get greeting --trace`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	f := root.PersistentFlags()
	f.StringSliceVar(&a.flags.endpoints, "endpoints", nil, "addresses of the cluster, host:port; one that answers is enough")
	f.StringVar(&a.flags.context, "context", "", "named cluster to talk to (default: the current one, see kvctl context ls)")
	f.StringVarP(&a.flags.output, "output", "o", outputTable, "table, json or yaml")
	f.Var(durationFlag(&a.flags.timeout, defaultTimeout, time.Millisecond), "timeout", "how long one request may take, 1ms or more")
	for _, g := range a.commands() {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title + ":"})
		for _, c := range g.commands {
			c.GroupID = g.title
			root.AddCommand(c)
		}
	}
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	a.wire(root)
	return root
}

// commandGroup is what --help lists under one title.
type commandGroup struct {
	title    string
	commands []*cobra.Command
}

func (a *App) commands() []commandGroup {
	return []commandGroup{
		{"Records", []*cobra.Command{a.putCommand(), a.getCommand(), a.delCommand(), a.scanCommand(), a.importCommand(), a.exportCommand(), a.reportCommand()}},
		{"Cluster", []*cobra.Command{a.clusterCommand(), a.nodeCommand(), a.ringCommand(), a.operationCommand(), a.namespaceCommand(), a.configCommand(), a.healthCommand(), a.topCommand(), a.eventsCommand(), a.capacityCommand(), a.hintsCommand(), a.repairCommand(), a.gcCommand(), a.reportingCommand(), a.recoverCommand()}},
		{"This machine", []*cobra.Command{a.devCommand(), a.benchCommand(), a.contextCommand(), a.versionCommand()}},
	}
}

// wire gives a command and those below it what all have in common.
func (a *App) wire(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		a.wire(sub)
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = help
	}
	if cmd.Args == nil {
		cmd.Args = argsOf(cmd.Use)
	}
	cmd.SuggestionsMinimumDistance = 2
	run := cmd.RunE
	if run == nil {
		return
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if o := a.flags.output; o != outputTable && o != outputJSON && o != outputYAML {
			return fmt.Errorf("--output %q: want table, json or yaml", o)
		}
		a.started = true
		return run(cmd, args)
	}
}

// help is what a command does that only has others below it.
func help(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	msg := fmt.Sprintf("there is no command %q", cmd.CommandPath()+" "+args[0])
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		msg += fmt.Sprintf(": did you mean %s?", alternatives(like))
	} else {
		msg += fmt.Sprintf(": see `%s --help`", cmd.CommandPath())
	}
	return usagef("%s", msg)
}

// alternatives writes names as "a", "b" or "c".
func alternatives(names []string) string {
	var out strings.Builder
	for i, name := range names {
		switch {
		case i > 0 && i == len(names)-1:
			out.WriteString(" or ")
		case i > 0:
			out.WriteString(", ")
		}
		out.WriteString(strconv.Quote(name))
	}
	return out.String()
}

// argsOf checks arguments against a usage line such as "describe KEY [NODE]".
func argsOf(use string) cobra.PositionalArgs {
	names := strings.Fields(use)[1:]
	required := 0
	for required < len(names) && !strings.HasPrefix(names[required], "[") {
		required++
	}
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < required {
			return fmt.Errorf("%s is missing: usage: %s", names[len(args)], cmd.UseLine())
		}
		if len(args) > len(names) {
			return fmt.Errorf("unexpected argument %q: usage: %s", args[len(names)], cmd.UseLine())
		}
		return nil
	}
}

// DefaultConfigDir returns where kvctl keeps its contexts.
func DefaultConfigDir() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the directory for kvctl's contexts: %w", err)
	}
	return filepath.Join(dir, "kvasir"), nil
}
