package prometheus_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

// patience bounds every wait. It is for busy machines: a wait ends when what it waits
// for is there.
const patience = 2 * time.Minute

// startCluster starts three nodes and three orchestrators, and puts and gets keys.
func startCluster(t *testing.T) *devcluster.Cluster {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var c *devcluster.Cluster
	for try := range 5 {
		c, err = devcluster.Create(t.Context(), filepath.Join(dir, fmt.Sprint(try)), devcluster.Settings{
			Nodes: 3, Orchestrators: 3, Zones: 3, Port: loopback.Base(t, 70) + 30, // and a node more
		}, devcluster.Options{BinDir: bin, ReadyTimeout: patience})
		var busy *devcluster.PortsBusyError
		if !errors.As(err, &busy) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	up(t, c)
	kv, err := client.New(t.Context(), []string{addresses(t, c, "data")[0].ClientAddr})
	if err != nil {
		t.Fatal(err)
	}
	defer kv.Close()
	for i := range 30 { // of which every node coordinates some
		key := fmt.Append(nil, "key", i)
		if _, err := kv.Put(t.Context(), key, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Get(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// up starts processes that do not run, all by default, and waits until they serve.
func up(t *testing.T, c *devcluster.Cluster, names ...string) {
	t.Helper()
	if _, err := c.Start(t.Context(), names...); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(t.Context(), names...); err != nil {
		t.Fatal(err)
	}
}

func addresses(t *testing.T, c *devcluster.Cluster, role string) (out []devcluster.Status) {
	t.Helper()
	all, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Role == role {
			out = append(out, s)
		}
	}
	return out
}

// profileFor writes the profile with what it cannot know, the orchestrators' addresses,
// and with shorter intervals.
func profileFor(t *testing.T, c *devcluster.Cluster) (path string) {
	t.Helper()
	b, err := os.ReadFile("prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	var profile map[string]any
	if err := yaml.Unmarshal(b, &profile); err != nil {
		t.Fatal(err)
	}
	rules, err := filepath.Abs("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	profile["rule_files"] = []string{rules}
	maps.Copy(profile["global"].(map[string]any), map[string]any{"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"})
	discoveries := profile["scrape_configs"].([]any)[0].(map[string]any)["http_sd_configs"].([]any)
	orchestrators := addresses(t, c, "orchestrator")
	if len(discoveries) != len(orchestrators) {
		t.Fatalf("%d discoveries for %d orchestrators", len(discoveries), len(orchestrators))
	}
	for i, o := range orchestrators {
		d := discoveries[i].(map[string]any)
		u, err := url.Parse(d["url"].(string))
		if err != nil {
			t.Fatal(err)
		}
		u.Host = o.AdminAddr
		d["url"], d["refresh_interval"] = u.String(), "3s"
	}
	if b, err = yaml.Marshal(profile); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "prometheus.yml")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// server is a running Prometheus.
type server struct {
	t     *testing.T
	url   string
	texts map[string]string // of all alerts that were seen, by what alerting calls them
}

func startPrometheus(t *testing.T, program, config string) *server {
	t.Helper()
	address := loopback.Addresses(t, 1)[0]
	cmd := exec.Command(program, "--config.file="+config, "--web.listen-address="+address, "--storage.tsdb.path="+t.TempDir(), "--log.level=warn")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stuck := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer stuck.Stop()
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("prometheus ended: %v\n%s", err, log.Bytes())
		}
	})
	return &server{t, "http://" + address + "/api/v1/", map[string]string{}}
}

// ask decodes the data of an answer; out is as it was when there was none.
func (s *server) ask(path string, out any) error {
	resp, err := http.Get(s.url + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	answer := struct{ Data any }{out}
	if err := json.Unmarshal(b, &answer); err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s (%w)", path, resp.Status, b, err)
	}
	return nil
}

// eventually waits until check returns nothing to complain about.
func (s *server) eventually(what string, check func() string) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		wrong := check()
		if wrong == "" {
			s.t.Logf("%s, with %s to spare", what, time.Until(deadline).Round(time.Second))
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not in %s: %s: %s", patience, what, wrong)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// targets compares the targets that are up with names.
func (s *server) targets(want ...string) string {
	var got struct {
		ActiveTargets []struct {
			Labels    map[string]string
			Health    string
			LastError string
		}
	}
	if err := s.ask("targets?state=active", &got); err != nil {
		return err.Error()
	}
	var names []string
	for _, a := range got.ActiveTargets {
		if a.Health != "up" {
			return fmt.Sprintf("%v is %s: %s", a.Labels, a.Health, a.LastError)
		}
		names = append(names, a.Labels["role"]+" "+a.Labels["name"])
	}
	slices.Sort(names)
	if !slices.Equal(names, want) {
		return fmt.Sprintf("targets %q, want %q", names, want)
	}
	return ""
}

// alerting returns the alerts whose expressions hold, pending ones too, but for those
// that tell of the machine that the test runs on: name and name of what it is about,
// then the texts.
func (s *server) alerting() (out map[string]string, wrong string) {
	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	if err := s.ask("rules", &rules); err != nil {
		return nil, err.Error()
	}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if r.Health != "ok" {
				return nil, fmt.Sprintf("%s is %s: %s", r.Name, r.Health, r.LastError)
			}
		}
	}
	var got struct {
		Alerts []struct{ Labels, Annotations map[string]string }
	}
	if err := s.ask("alerts", &got); err != nil {
		return nil, err.Error()
	}
	machine := regexp.MustCompile(`^Kvasir(CPU|Memory|Disk|FileDescriptors|Clock|Latency|WritesStall|LeaderUnstable)`)
	out = map[string]string{}
	for _, a := range got.Alerts {
		if name := a.Labels["alertname"]; !machine.MatchString(name) {
			out[strings.TrimSpace(name+" "+a.Labels["name"]+a.Labels["node"])] = a.Annotations["summary"] + " " + a.Annotations["description"]
		}
	}
	maps.Copy(s.texts, out)
	return out, ""
}

// sees waits until each of the alerts has held, or has not, at some time: on a busy
// machine scrapes come late, and alerts come and go with that.
func (s *server) sees(what string, holding bool, names ...string) {
	s.t.Helper()
	left := slices.Clone(names)
	s.eventually(what, func() string {
		got, wrong := s.alerting()
		if wrong != "" {
			return wrong
		}
		left = slices.DeleteFunc(left, func(name string) bool { _, holds := got[name]; return holds == holding })
		if len(left) > 0 {
			return fmt.Sprintf("%q, while these hold: %v", left, got)
		}
		return ""
	})
}

// selector matches a metric in an expression, with its matchers.
var selector = regexp.MustCompile(`\b(?:kvasir|process)_[a-z0-9_]+(?:\{[^}]*\})?|\bup\{[^}]*\}`)

// missing returns the selectors of all alerts that select nothing. A code of failure
// counts as any code: there may have been no failure.
func (s *server) missing() (out []string) {
	seen := map[string]bool{}
	for _, a := range alerts(s.t) {
		found := selector.FindAllString(a.Expr, -1)
		if len(found) == 0 {
			s.t.Errorf("%s asks for no metric: %s", a.Alert, a.Expr)
		}
		for _, sel := range found {
			sel = regexp.MustCompile(`code=~"[^"]*"`).ReplaceAllString(sel, `code=~".+"`)
			if seen[sel] {
				continue
			}
			seen[sel] = true
			var got struct{ Result []any }
			if err := s.ask("query?query="+url.QueryEscape("last_over_time("+sel+"[10m])"), &got); err != nil || len(got.Result) == 0 {
				out = append(out, fmt.Sprintf("%s of %s (%v)", sel, a.Alert, err))
			}
		}
	}
	return out
}

// lint has promtool judge the names and help texts of what a process exposes.
func lint(t *testing.T, promtool, address string) {
	t.Helper()
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = resp.Body
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("metrics of %s: %v\n%s", address, err, out)
	}
}

// A real Prometheus with the profile finds all processes of a real cluster and every
// metric that alerts ask for, sees a node die, and finds one that comes.
func TestScrapesACluster(t *testing.T) {
	program, promtool := tool(t, "prometheus"), tool(t, "promtool")
	c := startCluster(t)
	lint(t, promtool, addresses(t, c, "data")[0].AdminAddr)
	lint(t, promtool, addresses(t, c, "orchestrator")[0].AdminAddr)
	s := startPrometheus(t, program, profileFor(t, c))
	whole := []string{"data node1", "data node2", "data node3", "orchestrator orch1", "orchestrator orch2", "orchestrator orch3"}
	s.eventually("all targets are up", func() string { return s.targets(whole...) })
	s.eventually("every metric is there", func() string { return strings.Join(s.missing(), "\n") })
	var first map[string]string
	s.eventually("every alert is evaluated", func() (wrong string) {
		first, wrong = s.alerting()
		return wrong
	})
	s.sees("no alert about a healthy cluster", false, slices.Collect(maps.Keys(first))...)

	if err := c.Kill(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	telling := []string{"KvasirNodeUnreachable node2", "KvasirNodeUnhealthy node2", "KvasirVnodesDegraded"}
	s.sees("alerts tell of a node that was killed", true, telling...)
	for _, name := range telling {
		text := s.texts[name]
		if !strings.Contains(text, "ode node2 ") && name != "KvasirVnodesDegraded" || strings.Contains(text, "<") {
			t.Errorf("%s says %q", name, text)
		}
	}
	s.sees("every key is served", false, "KvasirVnodesUnwritable", "KvasirVnodesUnreadable")

	added, err := c.AddNode(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	up(t, c, "node2", added)
	s.eventually("the node that was added is found", func() string {
		return s.targets(slices.Insert(slices.Clone(whole), 3, "data "+added)...)
	})
	s.sees("these alerts have ended", false, telling...) // others look at the last ten minutes
}
