package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// Program is a server program with a configuration of type C, whose fields carry
// yaml and help tags.
type Program[C any] struct {
	Name, Short, EnvPrefix string
	// Defaults returns the configuration before file, environment and flags.
	Defaults func() C
	// Validate completes a configuration and returns an error that names every bad key.
	Validate func(*C) error
	// Files reads the files that a configuration names, for config validate only.
	Files func(*C) error
	// Log and AdminListen pick two of its settings.
	Log         func(*C) Log
	AdminListen func(*C) string
	// Run runs the server until ctx ends.
	Run func(ctx context.Context, cfg C, host Host) error
}

// Host is what a server is given by the process it runs in.
type Host struct {
	Logger   *slog.Logger
	Software string
	// Fatal ends the process.
	Fatal func(error)
	// Restart checks that the program could start again, and then, a moment later, ends
	// the context of Run. When Run returns nil the process runs the program anew: the
	// newer one, where its file was replaced. Under a supervisor it is the same process
	// all the while.
	Restart func(context.Context) error
}

// Main runs a program with the process's arguments and returns its exit code: 0, 1
// for an error, 2 for a bad command line or configuration.
func (p Program[C]) Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return p.run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Environ)
}

// badInput is an error of the command line or configuration.
type badInput struct{ error }

func (p Program[C]) run(ctx context.Context, args []string, stdout, stderr io.Writer, environ func() []string) int {
	root := p.command(stdout, stderr, environ)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "%s: %s\n", p.Name, err)
	if errors.As(err, new(badInput)) {
		return 2
	}
	return 1
}

func (p Program[C]) command(stdout, stderr io.Writer, environ func() []string) *cobra.Command {
	var path string
	defaults := p.Defaults()
	root := &cobra.Command{
		Use: p.Name, Short: p.Short, Args: cobra.NoArgs, SilenceErrors: true, SilenceUsage: true,
		Long: fmt.Sprintf(`%[1]s.

Settings come from --config, then from environment variables (%[2]sDATA_DIR for
data_dir, %[2]sLOG__LEVEL for log.level), then from flags; the last one wins.
Lists of tables stand in the file only. Unknown keys are refused.`, p.Short, p.EnvPrefix),
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return badInput{err} })
	flags := root.PersistentFlags()
	flags.SortFlags = false
	flags.StringVar(&path, "config", "", "YAML file with settings")
	addFlags(flags, &defaults)
	read := func() (C, error) {
		cfg := p.Defaults()
		if err := load(&cfg, path, p.EnvPrefix, environ, flags); err != nil {
			return cfg, badInput{err}
		}
		if _, err := p.Log(&cfg).logger(io.Discard); err != nil {
			return cfg, badInput{err}
		}
		if err := p.Validate(&cfg); err != nil {
			return cfg, badInput{fmt.Errorf("bad configuration:\n%w", err)}
		}
		return cfg, nil
	}
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := read()
		if err != nil {
			return err
		}
		return p.serve(cmd.Context(), cfg, stderr)
	}
	root.AddCommand(p.configCommands(read), p.healthCommand(read), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(stdout, Software()) },
	})
	return root
}

// serve runs the server.
func (p Program[C]) serve(ctx context.Context, cfg C, stderr io.Writer) error {
	logger, err := p.Log(&cfg).logger(stderr)
	if err != nil {
		return badInput{err}
	}
	// A blocked fdatasync holds one of Go's processors. With few of them, those that
	// would gather the next group of commits cannot run.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 4))
	}
	path, err := self()
	if err != nil {
		return err
	}
	run, end := context.WithCancelCause(ctx)
	defer end(nil)
	err = p.Run(run, cfg, Host{
		Logger: logger, Software: Software(),
		Fatal: func(err error) {
			logger.Error("cannot go on", "err", err)
			os.Exit(1)
		},
		Restart: func(ctx context.Context) error {
			if err := checkAgain(ctx, path, os.Args[1:]); err != nil {
				return err
			}
			time.AfterFunc(answerFirst, func() { end(errAgain) })
			return nil
		},
	})
	if err != nil || context.Cause(run) != errAgain {
		return err
	}
	// From here on a signal ends the process at once. One that came before counts.
	signal.Reset(os.Interrupt, syscall.SIGTERM)
	if ctx.Err() != nil {
		return nil
	}
	logger.Info("running anew", "program", path)
	return again(path)
}

func (p Program[C]) configCommands(read func() (C, error)) *cobra.Command {
	parent := &cobra.Command{Use: "config", Short: "Check or print the settings that a start would use"}
	parent.AddCommand(
		&cobra.Command{
			Use: "validate", Short: "Check the settings and the files they name; exit code 2 when one is bad", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := read()
				if err != nil {
					return err
				}
				if err := p.Files(&cfg); err != nil {
					return badInput{err}
				}
				fmt.Fprintln(cmd.ErrOrStderr(), "the configuration is valid")
				return nil
			},
		},
		&cobra.Command{
			Use: "print", Short: "Print the settings as YAML, defaults included", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := read()
				if err != nil {
					return err
				}
				e := yaml.NewEncoder(cmd.OutOrStdout())
				e.SetIndent(2)
				return errors.Join(e.Encode(cfg), e.Close())
			},
		},
	)
	return parent
}

// healthCommand asks the server that runs with these settings whether it serves,
// for container health checks.
func (p Program[C]) healthCommand(read func() (C, error)) *cobra.Command {
	return &cobra.Command{
		Use: "health", Short: "Ask the running server whether it serves; exit code 1 when it does not", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := read()
			if err != nil {
				return err
			}
			host, port, err := net.SplitHostPort(p.AdminListen(&cfg))
			if err != nil {
				return err
			}
			if allInterfaces(host) {
				host = "127.0.0.1"
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/readyz", nil)
			if err != nil {
				return err
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
			if resp.StatusCode != http.StatusOK {
				return errors.Join(fmt.Errorf("%s: %s", resp.Status, body), err)
			}
			fmt.Fprint(cmd.OutOrStdout(), string(body))
			return err
		},
	}
}

// Software returns the version of the running binary.
func Software() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	if version == "" || version == "(devel)" {
		version = "devel"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			version += " " + s.Value[:12]
		}
	}
	return version + " " + info.GoVersion
}
