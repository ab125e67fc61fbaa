package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// checkTimeout bounds the check whether a program could start again.
	checkTimeout = 30 * time.Second
	// answerFirst is how long a restart waits before it begins, for the answer to whoever
	// asked for it to be under way.
	answerFirst = 50 * time.Millisecond
)

// errAgain is why a server ends that is to run anew.
var errAgain = errors.New("restarting")

// self returns the path to run this program by again. It is the one it was called by,
// where that leads to what runs: a link may lead to a newer version later. To be called
// at the start, before the file is replaced.
func self() (string, error) {
	running, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	called, err := exec.LookPath(os.Args[0])
	if err != nil {
		return running, nil
	}
	if called, err = filepath.Abs(called); err != nil {
		return running, nil
	}
	a, errA := os.Stat(called)
	b, errB := os.Stat(running)
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		return running, nil
	}
	return called, nil
}

// checkAgain has the program that is on disk by now check the settings that are there by
// now. What it would refuse to start with is no reason to stop.
func checkAgain(ctx context.Context, path string, args []string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, append([]string{"config", "validate"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s config validate: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// again replaces this program by the one that is on disk by now: the same process, with
// the same arguments and environment. It returns only when that fails.
func again(path string) error {
	return fmt.Errorf("run %s anew: %w", path, syscall.Exec(path, os.Args, os.Environ()))
}
