package prometheus_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
)

// tool returns the path of prometheus or promtool. KVASIR_PROMETHEUS, set by `make
// test-prometheus`, is the directory they are in.
func tool(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("KVASIR_PROMETHEUS")
	if dir == "" {
		t.Skip("make test-prometheus runs this: it takes prometheus and promtool")
	}
	return filepath.Join(dir, name)
}

type alert struct {
	Alert, Expr         string
	Labels, Annotations map[string]string
	For                 string
}

func alerts(t *testing.T) (out []alert) {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []alert }
	}
	b, err := os.ReadFile("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		out = append(out, g.Rules...)
	}
	if len(out) == 0 {
		t.Fatal("no alerts")
	}
	return out
}

// Whoever is woken learns how bad it is and what to do, and every alert has been seen
// to fire.
func TestAlertsAreComplete(t *testing.T) {
	tests, err := os.ReadFile("alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range alerts(t) {
		if s := a.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s has severity %q", a.Alert, s)
		}
		for _, name := range []string{"summary", "description"} {
			if !strings.HasSuffix(a.Annotations[name], ".") {
				t.Errorf("%s has no %s that is a sentence: %q", a.Alert, name, a.Annotations[name])
			}
		}
		if !strings.Contains(string(tests), `alertname="`+a.Alert+`"`) {
			t.Errorf("%s fires in no test of alerts_test.yml", a.Alert)
		}
		for _, list := range regexp.MustCompile(`code=~"([^"]*)"`).FindAllStringSubmatch(a.Expr, -1) {
			for _, name := range strings.Split(list[1], "|") {
				if !isCode(name) {
					t.Errorf("%s asks for code %q, which there is not", a.Alert, name)
				}
			}
		}
	}
}

func isCode(name string) bool {
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		if c.String() == name {
			return true
		}
	}
	return false
}

func TestProfile(t *testing.T) {
	promtool := tool(t, "promtool")
	for _, args := range [][]string{{"check", "config", "prometheus.yml"}, {"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// What alerts and the documentation tell people to type is there.
func TestCommandsExist(t *testing.T) {
	tool(t, "promtool")
	var texts []string
	for _, a := range alerts(t) {
		texts = append(texts, a.Annotations["description"])
	}
	doc, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile("`kvctl ((?:[a-z]+ ?)+)").FindAllStringSubmatch(strings.Join(append(texts, string(doc)), "\n"), -1)
	if len(commands) == 0 {
		t.Fatal("no commands")
	}
	seen := map[string]bool{}
	for _, c := range commands {
		words := strings.TrimSpace(c[1])
		if seen[words] {
			continue
		}
		seen[words] = true
		out, err := exec.Command("../../bin/kvctl", append(strings.Fields(words), "--help")...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "\n  kvctl "+words) {
			t.Errorf("there is no kvctl %s: %v\n%s", words, err, out)
		}
	}
}
