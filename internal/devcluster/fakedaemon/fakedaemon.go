// Package fakedaemon stands in for kvnode and kvorch in tests: a test binary that
// is called by one of those names listens on the ports of its configuration, is
// ready, and stops on SIGTERM. It never stores or serves anything.
package fakedaemon

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// Behaviour is the environment variable that makes processes misbehave: a list such
// as "node2=exit,node3=unready,node4=removed,orch1=stubborn". The first ends before it
// listens, the second is never ready, the third says that it was removed from the
// cluster, and the last ignores SIGTERM.
const Behaviour = "KVASIR_FAKE_BEHAVIOUR"

// lifetime ends processes that a failed test has left behind.
const lifetime = 3 * time.Minute

// Stops is the file in a data directory that holds the time of each stop by SIGTERM,
// in Unix nanoseconds, a line each; Starts is the same for starts.
const (
	Stops  = "stops"
	Starts = "starts"
)

// Main runs the daemon and exits, if the executable was called by the name of one.
// A test binary calls it before anything else.
func Main() {
	switch filepath.Base(os.Args[0]) {
	case "kvnode", "kvorch":
		if err := run(os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "level=ERROR msg=%q\n", err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
}

type config struct {
	Name         string `yaml:"name"`
	DataDir      string `yaml:"data_dir"`
	Listen       string `yaml:"listen"`
	AdminListen  string `yaml:"admin_listen"`
	GossipListen string `yaml:"gossip_listen"`
	RaftListen   string `yaml:"raft_listen"`
}

func run(args []string) error {
	ctx, release := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer release()
	if len(args) != 2 || args[0] != "--config" {
		return fmt.Errorf("arguments %q: want --config FILE", args)
	}
	b, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	var c config
	if err := yaml.Unmarshal(b, &c); err != nil {
		return err
	}
	behaves := slices.Collect(strings.SplitSeq(os.Getenv(Behaviour), ","))
	fmt.Fprintf(os.Stderr, "level=INFO msg=starting name=%s gomaxprocs=%s\n", c.Name, os.Getenv("GOMAXPROCS"))
	if slices.Contains(behaves, c.Name+"=exit") {
		return fmt.Errorf("%s was told to fail", c.Name)
	}
	unready := ""
	switch {
	case slices.Contains(behaves, c.Name+"=unready"):
		unready = "the ring has not formed"
	case slices.Contains(behaves, c.Name+"=removed"):
		unready = "removed: data directory #1 is not part of this cluster any more"
	}
	if err := listen(c, unready); err != nil {
		return err
	}
	if err := stamp(c.DataDir, Starts); err != nil {
		return err
	}
	end := time.After(lifetime)
	for {
		select {
		case <-ctx.Done():
			if slices.Contains(behaves, c.Name+"=stubborn") {
				<-end
			}
			return stamp(c.DataDir, Stops)
		case <-end:
			return fmt.Errorf("%s was forgotten", c.Name)
		}
	}
}

// held are the ports of this process: what nobody refers to is closed when garbage is
// collected.
var held []io.Closer

// listen opens every port of a process, until it exits. unready is why it is not ready.
func listen(c config, unready string) error {
	for _, address := range []string{c.Listen, c.GossipListen, c.RaftListen} {
		if address == "" {
			continue
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		held = append(held, l)
	}
	udp, err := net.ListenPacket("udp", c.GossipListen)
	if err != nil {
		return err
	}
	held = append(held, udp)
	admin, err := net.Listen("tcp", c.AdminListen)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if unready != "" {
			http.Error(w, unready, http.StatusServiceUnavailable)
		}
	})
	go http.Serve(admin, mux)
	return nil
}

func stamp(dir, file string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, time.Now().UnixNano())
	return err
}

// Install returns a directory in which the running test binary is called kvnode,
// kvorch and kvctl.
func Install(t testing.TB) (binDir string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binDir = t.TempDir()
	for _, name := range []string{"kvnode", "kvorch", "kvctl"} {
		if err := os.Symlink(self, filepath.Join(binDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return binDir
}

// FreeBase returns a port such that those from 50 below to 58 above it are free. The
// one after those stays taken, so that no other test chooses the same.
func FreeBase(t testing.TB) int {
	t.Helper()
	for range 100 {
		base := 12000 + rand.IntN(160)*110 // below the ports that connections use
		reservation, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+59))
		if err != nil {
			continue
		}
		if allFree(base-50, base+58) {
			t.Cleanup(func() { reservation.Close() })
			return base
		}
		reservation.Close()
	}
	t.Fatal("no range of free ports was found between 12000 and 30000")
	return 0
}

func allFree(first, last int) bool {
	for port := first; port <= last; port++ {
		address := fmt.Sprintf("127.0.0.1:%d", port)
		l, err := net.Listen("tcp", address)
		if err != nil {
			return false
		}
		l.Close()
		p, err := net.ListenPacket("udp", address)
		if err != nil {
			return false
		}
		p.Close()
	}
	return true
}
