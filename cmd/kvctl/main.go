// Command kvctl talks to a Kvasir cluster, or runs one on this machine. It only
// gathers the surroundings; the commands are in package cli.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/term"

	"github.com/kvasirdb/kvasir/cmd/internal/process"
	"github.com/kvasirdb/kvasir/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends what does not heed the first
	os.Exit(run(ctx))
}

func run(ctx context.Context) int {
	// Without a home there are no contexts, which not every command needs.
	configDir, _ := cli.DefaultConfigDir()
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintf(os.Stderr, "kvctl: find the directory of kvctl: %s\n", err)
		return 1
	}
	app := &cli.App{
		Stdin:       os.Stdin,
		Stdout:      os.Stdout,
		Stderr:      os.Stderr,
		InTerminal:  term.IsTerminal(int(os.Stdin.Fd())),
		Terminal:    term.IsTerminal(int(os.Stdout.Fd())),
		ErrTerminal: term.IsTerminal(int(os.Stderr.Fd())),
		Getenv:      os.Getenv,
		ConfigDir:   configDir,
		BinDir:      filepath.Dir(self),
		Software:    process.Software(),
	}
	return app.Run(ctx, os.Args[1:])
}
