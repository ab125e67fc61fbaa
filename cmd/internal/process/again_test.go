package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// asServer names the variable that makes this binary a server which is restarted once.
const asServer = "PROCESS_TEST_SERVER"

func TestMain(m *testing.M) {
	if what := os.Getenv(asServer); what != "" {
		os.Exit(server(what))
	}
	os.Exit(m.Run())
}

// server runs a server in a directory, its --name. Each run says which process and which
// file it is, and what it was told. The first one brings about what is to be different by
// the next, and restarts.
func server(what string) int {
	var cfg testConfig
	p := program(&cfg)
	p.Run = func(ctx context.Context, c testConfig, h Host) error {
		var exe syscall.Stat_t
		if err := syscall.Stat("/proc/self/exe", &exe); err != nil {
			return err
		}
		fmt.Println(os.Getpid(), exe.Ino, os.Args[1:], c.Wait)
		bin := filepath.Join(c.Name, "bin")
		if err := os.Rename(filepath.Join(c.Name, "next"), filepath.Join(c.Name, "newer")); err != nil {
			return nil // the second run
		}
		switch what {
		case "replaced":
			if err := os.Rename(filepath.Join(c.Name, "newer"), bin); err != nil {
				return err
			}
		case "linked":
			if err := errors.Join(os.Remove(bin), os.Symlink("newer", bin)); err != nil {
				return err
			}
		case "misconfigured":
			if err := os.WriteFile(filepath.Join(c.Name, "config.yaml"), []byte("count: -1\n"), 0o600); err != nil {
				return err
			}
		}
		if err := h.Restart(ctx); err != nil {
			return fmt.Errorf("refused: %w", err)
		}
		<-ctx.Done()
		if what == "gone" {
			return os.Remove(bin)
		}
		return nil
	}
	return p.Main()
}

// A restart runs the file that is there by then, in the same process and as it was
// called; and a program that could not start goes on.
func TestRestart(t *testing.T) {
	for _, tc := range []struct {
		what, runs string // the file that runs the second time
		want       string // what stderr has
	}{
		{"unchanged", "bin", ""},
		{"replaced", "bin", ""},
		{"linked", "newer", ""},
		{"misconfigured", "", "count: -1: want 0 or more"},
		{"gone", "", "anew: no such file or directory"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			dir := t.TempDir()
			b, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			bin := filepath.Join(dir, "bin")
			first := bin
			if tc.what == "linked" {
				first = filepath.Join(dir, "first")
				if err := os.Symlink("first", bin); err != nil {
					t.Fatal(err)
				}
			}
			config := filepath.Join(dir, "config.yaml")
			err = errors.Join(os.WriteFile(first, b, 0o700), os.WriteFile(filepath.Join(dir, "next"), b, 0o700), os.WriteFile(config, []byte("wait: 3s\n"), 0o600))
			if err != nil {
				t.Fatal(err)
			}
			before, err := os.Stat(first)
			if err != nil {
				t.Fatal(err)
			}
			var stderr strings.Builder
			cmd := exec.Command(bin, "--config", config, "--name", dir)
			cmd.Env, cmd.Stderr = append(os.Environ(), asServer+"="+tc.what), &stderr
			out, err := cmd.Output()
			if (err != nil) != (tc.want != "") || !strings.Contains(stderr.String(), tc.want) {
				t.Fatalf("%v, want %q in:\n%s", err, tc.want, &stderr)
			}
			line := func(f os.FileInfo) string {
				return fmt.Sprintln(cmd.Process.Pid, f.Sys().(*syscall.Stat_t).Ino, cmd.Args[1:], "3s")
			}
			want := []string{line(before)}
			if tc.runs != "" {
				after, err := os.Stat(filepath.Join(dir, tc.runs))
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, line(after))
			}
			if got := slices.Collect(strings.Lines(string(out))); !slices.Equal(got, want) {
				t.Errorf("runs %q, want %q", got, want)
			}
		})
	}
}
