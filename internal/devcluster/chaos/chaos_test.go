// Package chaos breaks a cluster of real processes on a network and disks of its
// own, under load through the client library, and checks afterwards that nothing
// acknowledged is lost and that all replicas hold the same records. It is a test and
// nothing else; no other package imports it.
package chaos

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Environment variables that steer the test.
const (
	// lengthEnv is "short" or a duration; without it the test is skipped.
	lengthEnv = "KVASIR_CHAOS"
	// seedEnv repeats the schedule of an earlier run.
	seedEnv = "KVASIR_SEED"
	// kindsEnv is a comma-separated list of faults; all without it.
	kindsEnv = "KVASIR_CHAOS_FAULTS"
	// insideEnv tells the test binary that it runs inside the namespaces, and where
	// its directory is.
	insideEnv = "KVASIR_CHAOS_INSIDE"
)

// plan is what a run does.
type plan struct {
	seed   uint64
	length time.Duration // faults begin for at least so long
	rounds int           // each fault happens at least so often
	kinds  []kind
}

func readPlan() (plan, error) {
	p := plan{seed: uint64(time.Now().UnixNano()), rounds: 5}
	var err error
	if s := os.Getenv(seedEnv); s != "" {
		if p.seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			return plan{}, fmt.Errorf("%s: %w", seedEnv, err)
		}
	}
	if s := os.Getenv(lengthEnv); s == "short" {
		p.rounds = 1
	} else if p.length, err = time.ParseDuration(s); err != nil {
		return plan{}, fmt.Errorf("%s: want short or a duration: %w", lengthEnv, err)
	}
	if p.kinds, err = kindsNamed(os.Getenv(kindsEnv)); err != nil {
		return plan{}, fmt.Errorf("%s: %w", kindsEnv, err)
	}
	return p, nil
}

// rerun returns the line that repeats the schedule.
func (p plan) rerun() string {
	line := fmt.Sprintf("%s=%d %s=%s", seedEnv, p.seed, lengthEnv, os.Getenv(lengthEnv))
	if k := os.Getenv(kindsEnv); k != "" {
		line += fmt.Sprintf(" %s=%s", kindsEnv, k)
	}
	return line + " go test -tags pebblegozstd -count=1 -timeout 0 -v -run TestChaos ./internal/devcluster/chaos"
}

// TestMain lets the test binary be the first process of its own namespaces.
func TestMain(m *testing.M) {
	if dir := os.Getenv(insideEnv); dir != "" {
		os.Exit(inside(dir))
	}
	os.Exit(m.Run())
}

// Real processes, each with a network stack and a small disk of its own, suffer every
// fault under load. In the end every acknowledged write, or a later one, is read, and
// all replicas are equal record by record.
func TestChaos(t *testing.T) {
	if os.Getenv(lengthEnv) == "" {
		t.Skipf("set %s=short or to a duration, or run make chaos", lengthEnv)
	}
	p, err := readPlan()
	if err != nil {
		t.Fatal(err)
	}
	if reason := cannot(); reason != "" {
		t.Skip("chaos needs namespaces: " + reason)
	}
	dir, err := os.MkdirTemp("", "kvasir-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs are kept in %s", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if out, err := exec.Command("go", "build", "-tags", "pebblegozstd", "-o", dir+"/",
		"github.com/kvasirdb/kvasir/cmd/kvnode", "github.com/kvasirdb/kvasir/cmd/kvorch").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("to repeat the schedule:\n%s", p.rerun())
	cmd := namespaced(self)
	cmd.Env = append(os.Environ(), insideEnv+"="+dir, seedEnv+"="+strconv.FormatUint(p.seed, 10))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := runTied(cmd); err != nil {
		t.Errorf("the run failed: %v; what is wrong stands above", err)
	}
}

// namespaced returns a command that becomes the first process of new namespaces for
// processes, networks and mounts. When it ends, whatever way, the kernel ends all it
// has started and removes every network and mount it has made.
func namespaced(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	return cmd
}

// runTied runs a command that dies with this process. Pdeathsig is about the thread
// that started it, so that thread must stay.
func runTied(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return cmd.Run()
}

// cannot returns why the test cannot run here, or "".
func cannot() string {
	if os.Geteuid() != 0 {
		return "only root may make them"
	}
	for tool, pack := range map[string]string{"ip": "iproute2", "nft": "nftables", "sh": "dash", "mount": "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Sprintf("there is no program %s: install the package %s", tool, pack)
		}
	}
	probe := namespaced("sh", "-ec", `mount --make-rprivate /
mount -t tmpfs -o size=1m tmpfs /run
mount -t proc proc /proc
ip netns add probe
ip link add bridge type bridge
ip link add port type veth peer name eth0 netns probe
ip netns exec probe nft add table inet probe`)
	var out strings.Builder
	probe.Stdout, probe.Stderr = &out, &out
	if err := runTied(probe); err != nil {
		return fmt.Sprintf("they cannot be made here: %v: %s", err, strings.TrimSpace(out.String()))
	}
	return ""
}

// inside is the run itself, in its namespaces. It returns the exit code.
func inside(dir string) int {
	p, err := readPlan()
	if err != nil {
		fmt.Println(err)
		return 2
	}
	r := &run{plan: p, log: newJournal(os.Stdout)}
	if err := r.all(dir); err != nil {
		r.log.wrong("the run ended early: %v", err)
	}
	if n := r.log.count(); n > 0 {
		r.log.say("FAILED: %d things are wrong; again: %s", n, p.rerun())
		return 1
	}
	r.log.say("ok")
	return 0
}

// isolate makes this process's mounts its own.
func isolate() error {
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Networks get their names below /run, and those of others are none of ours.
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "size=1m"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

// tmpfs mounts a small disk.
func tmpfs(path string, bytes int64) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", path, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// fill takes all the space of a disk.
func fill(dir string) error {
	f, err := os.Create(filepath.Join(dir, "FULL"))
	if err != nil {
		return err
	}
	chunk := make([]byte, 256<<10)
	for err == nil {
		_, err = f.Write(chunk)
		if err != nil && len(chunk) > 4<<10 && errors.Is(err, syscall.ENOSPC) {
			chunk, err = chunk[:len(chunk)/2], nil // the last bit
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

func unfill(dir string) error { return os.Remove(filepath.Join(dir, "FULL")) }
