package devcluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// stateFormat is the format of the state file.
const stateFormat = 1

// Files in the cluster's directory, beside those of each process.
const (
	stateFile = "dev.json"
	lockFile  = "dev.lock"
)

// state is what is remembered of a cluster between runs. It changes only under the
// directory's lock and is replaced as a whole, so that it is read without the lock.
type state struct {
	Format    int       `json:"format"`
	Created   time.Time `json:"created"`
	Settings  Settings  `json:"settings"`
	Processes []process `json:"processes"`
}

// process is a member and the process that was last started for it.
type process struct {
	member
	// PID is 0 when none was started since the cluster was created.
	PID int `json:"pid"`
	// StartTicks is when it started, in clock ticks since boot, and Executable what it
	// runs. With the PID they tell it from a later process of the same PID.
	StartTicks uint64 `json:"start_ticks"`
	Executable string `json:"executable"`
	// LogOffset is where its part of the log begins.
	LogOffset int64 `json:"log_offset"`
	// Stopping: it was asked to stop, so its end is no news.
	Stopping bool `json:"stopping"`
}

func (st *state) members() []member {
	out := make([]member, len(st.Processes))
	for i, p := range st.Processes {
		out[i] = p.member
	}
	return out
}

// pick returns the entries of the names, all of them without any, in the order of
// a start. Names that do not exist are an UnknownNameError.
func (st *state) pick(names []string) ([]*process, error) {
	var out []*process
	unknown := &UnknownNameError{}
	for i := range st.Processes {
		unknown.Known = append(unknown.Known, st.Processes[i].Name)
		if len(names) == 0 || slices.Contains(names, st.Processes[i].Name) {
			out = append(out, &st.Processes[i])
		}
	}
	for _, name := range names {
		if !slices.Contains(unknown.Known, name) && !slices.Contains(unknown.Names, name) {
			unknown.Names = append(unknown.Names, name)
		}
	}
	if len(unknown.Names) > 0 {
		return nil, unknown
	}
	slices.SortFunc(out, func(a, b *process) int { return startOrder(a.member, b.member) })
	return out, nil
}

// UnknownNameError says that the cluster has no process of a name.
type UnknownNameError struct{ Names, Known []string }

// Error implements error.
func (e *UnknownNameError) Error() string {
	return fmt.Sprintf("no process is named %s: there are %s", strings.Join(e.Names, ", "), strings.Join(e.Known, ", "))
}

// ErrNoCluster: the directory holds no development cluster.
var ErrNoCluster = errors.New("no development cluster")

// loadState reads a directory's state.
func loadState(dir string) (*state, error) {
	path := filepath.Join(dir, stateFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNoCluster, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read the cluster's state: %w", err)
	}
	st := &state{}
	if err := json.Unmarshal(b, st); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w): remove %s to begin anew", path, err, dir)
	}
	if st.Format != stateFormat {
		return nil, fmt.Errorf("%s has format %d, and this kvctl knows %d: use the kvctl that wrote it, or another directory", path, st.Format, stateFormat)
	}
	if err := st.Settings.Validate(); err != nil || len(st.Processes) == 0 {
		return nil, fmt.Errorf("%s is damaged (%w): remove %s to begin anew", path, errors.Join(err, errors.New("settings or processes do not make sense")), dir)
	}
	return st, nil
}

// save replaces a directory's state. REQUIRES: the lock is held.
func (st *state) save(dir string) error {
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the cluster's state: %w", err)
	}
	return replaceFile(filepath.Join(dir, stateFile), append(b, '\n'))
}

// replaceFile writes a file so that readers see the old content or the new.
func replaceFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // gone already after a success
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// lockRetry is how often a taken lock is tried again, lockPatience how long: longer
// than a stop takes.
const (
	lockRetry    = 20 * time.Millisecond
	lockPatience = time.Minute
)

// lock makes this process the only one that changes the cluster, until the
// returned function is called. The kernel frees it when the process dies.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the cluster: %w", err)
	}
	deadline := time.NewTimer(lockPatience)
	defer deadline.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-time.After(lockRetry):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, ctx.Err())
		case <-deadline.C:
			f.Close()
			return nil, fmt.Errorf("another kvctl has been changing the cluster in %s for %s: wait for it, or stop it", dir, lockPatience)
		}
	}
}
