package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kvasirdb/kvasir/internal/devcluster"
)

// devDir returns the absolute directory of --data, or the default one.
func (a *App) devDir(data string) (string, error) {
	if data != "" {
		dir, err := filepath.Abs(data)
		if err != nil {
			return "", fmt.Errorf("--data: %w", err)
		}
		return dir, nil
	}
	if cache := a.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(cache) {
		return filepath.Join(cache, "kvasir-dev"), nil
	}
	home := a.Getenv("HOME")
	if !filepath.IsAbs(home) {
		return "", usagef("neither $XDG_CACHE_HOME nor $HOME says where to put the cluster: name a directory with --data")
	}
	return filepath.Join(home, ".cache", "kvasir-dev"), nil
}

// lastDevFile remembers the directory of the cluster that was started last.
func (a *App) lastDevFile() string { return filepath.Join(a.ConfigDir, "dev-last") }

func (a *App) rememberDev(dir string) error {
	if a.ConfigDir == "" {
		return errors.New("there is no directory to remember the cluster in: set $HOME or $XDG_CONFIG_HOME")
	}
	err := os.MkdirAll(a.ConfigDir, 0o755)
	if err == nil {
		err = os.WriteFile(a.lastDevFile(), []byte(dir+"\n"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("remember the cluster: %w", err)
	}
	return nil
}

// lastDev returns the directory of the cluster that was started last.
func (a *App) lastDev() (string, error) {
	if a.ConfigDir == "" {
		return "", fmt.Errorf("%w is remembered: neither $HOME nor $XDG_CONFIG_HOME is set; name its directory with --data", devcluster.ErrNoCluster)
	}
	b, err := os.ReadFile(a.lastDevFile())
	dir := strings.TrimSuffix(string(b), "\n")
	if errors.Is(err, fs.ErrNotExist) || err == nil && dir == "" {
		return "", fmt.Errorf("%w was started yet", devcluster.ErrNoCluster)
	}
	if err != nil {
		return "", fmt.Errorf("find the cluster started last: %w", err)
	}
	return dir, nil
}

// findDev returns the cluster of --data, else the one started last.
func (a *App) findDev(data string) (*devcluster.Cluster, error) {
	var dir string
	var err error
	if data != "" {
		dir, err = a.devDir(data)
	} else {
		dir, err = a.lastDev()
	}
	if err != nil {
		return nil, err
	}
	return devcluster.Open(dir, a.devOptions())
}

// devContradictions refuses flags, by name and value, that are not what the cluster was
// created with.
func devContradictions(cluster *devcluster.Cluster, asked map[string]int) error {
	have := cluster.Settings()
	status, err := cluster.Status()
	if err != nil {
		return err
	}
	nodes := 0
	for _, s := range status {
		if s.Role == devcluster.RoleData {
			nodes++
		}
	}
	var wrong []string
	differs := func(flag string, allowed ...int) bool {
		value, given := asked[flag]
		if !given || slices.Contains(allowed, value) {
			return false
		}
		wrong = append(wrong, fmt.Sprintf("--%s %d", flag, value))
		return true
	}
	// The number it was created with as well: the same command must go on working.
	more := differs("nodes", have.Nodes, nodes) && asked["nodes"] > nodes
	differs("orchestrators", have.Orchestrators)
	differs("reporting", have.Reporting)
	differs("zones", have.Zones)
	differs("port", have.Port)
	if len(wrong) == 0 {
		return nil
	}
	what, err := cluster.Describe()
	if err != nil {
		return err
	}
	advice := "leave that out to go on with it"
	if more {
		advice += ", add nodes to it with `kvctl dev add`"
	}
	return usagef("the cluster in %s has %s, unlike %s: %s, choose another directory with --data, or stop it and remove that directory to begin anew without its data",
		cluster.Dir(), what, strings.Join(wrong, " and "), advice)
}

func devRuns(cluster *devcluster.Cluster) (bool, error) {
	status, err := cluster.Status()
	return slices.ContainsFunc(status, func(s devcluster.Status) bool { return s.State != devcluster.Stopped }), err
}

// devAlreadyRunning says that the cluster runs, and how.
func (a *App) devAlreadyRunning(cluster *devcluster.Cluster) error {
	a.devTalkf("the cluster in %s is already running", cluster.Dir())
	if err := a.saveDevContext(cluster); err != nil {
		return err
	}
	if err := a.printDevStatus(cluster); err != nil {
		return err
	}
	status, err := cluster.Status()
	if err != nil {
		return err
	}
	for _, s := range status {
		switch s.State {
		case devcluster.Stopped:
			a.devTalkf("%s is stopped; start it with: %s dev start %s", s.Name, a.invocation(), s.Name)
		case devcluster.Paused:
			a.devTalkf("%s is paused; let it go on with: %s dev resume %s", s.Name, a.invocation(), s.Name)
		}
	}
	return nil
}

// saveDevContext writes the context dev with the addresses of all processes, nodes
// first, and makes it the current one.
func (a *App) saveDevContext(cluster *devcluster.Cluster) error {
	status, err := cluster.Status()
	if err != nil {
		return err
	}
	var c Context
	for _, s := range status {
		c.Endpoints = append(c.Endpoints, s.ClientAddr)
	}
	return a.saveContext(devContext, c)
}

// printDevStatus prints the processes of the names, all without names.
func (a *App) printDevStatus(cluster *devcluster.Cluster, names ...string) error {
	status, err := cluster.Status()
	if err != nil {
		return err
	}
	if len(names) > 0 {
		status = slices.DeleteFunc(status, func(s devcluster.Status) bool { return !slices.Contains(names, s.Name) })
	}
	return a.print(status, func(w io.Writer) { writeDevStatus(w, status) })
}

func writeDevStatus(w io.Writer, status []devcluster.Status) {
	t := newTable("NAME", "ROLE", "ZONE", "STATE", ">PID", "CLIENT", "ADMIN")
	for _, s := range status {
		zone, pid := s.Zone, strconv.Itoa(s.PID)
		if zone == "" {
			zone = "-"
		}
		if s.PID == 0 {
			pid = "-"
		}
		t.add(s.Name, s.Role, zone, s.State, pid, s.ClientAddr, "http://"+s.AdminAddr)
	}
	t.write(w)
}

// devWelcome says what was started and what to try. For programs it is the status.
func (a *App) devWelcome(cluster *devcluster.Cluster, detached bool) error {
	what, err := cluster.Describe()
	if err != nil {
		return err
	}
	status, err := cluster.Status()
	if err != nil {
		return err
	}
	kvctl := a.invocation()
	victim, afterKill, where, end := "node2", "", " in another terminal", "Ctrl-C stops the cluster and keeps its data."
	switch cluster.Settings().Nodes {
	case 1:
		victim, afterKill = "node1", "   # fails: the only replica is gone"
	case 2:
		afterKill = "   # fails: a majority of two is both"
	}
	if detached {
		where, end = "", fmt.Sprintf("It runs in the background: see %[1]s dev status, stop it with %[1]s dev stop.", kvctl)
	}
	return a.print(status, func(w io.Writer) {
		fmt.Fprintf(w, "Kvasir is ready: %s.\n\n", what)
		writeDevStatus(w, status)
		fmt.Fprintf(w, `
Data and logs:  %[1]s (NAME.log and the directory NAME for each process)
Context:        %[2]s, the current one: kvctl needs no --endpoints

Try%[3]s:
  %[4]s put greeting hello
  %[4]s get greeting
  %[4]s put greeting 'hello again' --trace
  %[4]s dev kill %[5]s && %[4]s get greeting%[6]s
  %[4]s dev start %[5]s

%[7]s
`, cluster.Dir(), devContext, where, kvctl, victim, afterKill, end)
	})
}

// invocation returns how kvctl can be called here: its name if it is found by it,
// else its path, relative if that is shorter.
func (a *App) invocation() string {
	if slices.Contains(filepath.SplitList(a.Getenv("PATH")), a.BinDir) {
		return "kvctl"
	}
	path := filepath.Join(a.BinDir, "kvctl")
	wd, err := os.Getwd()
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(wd, path); err == nil && len(rel) < len(path) {
		if !strings.Contains(rel, string(filepath.Separator)) {
			return "./" + rel
		}
		return rel
	}
	return path
}
