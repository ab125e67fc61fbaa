package process

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type inner struct {
	Cert string `yaml:"cert"`
}

type embedded struct {
	Name    string        `yaml:"name" help:"a name"`
	Count   int           `yaml:"count"`
	Ratio   float64       `yaml:"ratio"`
	Wait    time.Duration `yaml:"wait"`
	List    []string      `yaml:"list"`
	TLS     inner         `yaml:"tls"`
	Peers   []inner       `yaml:"peers"`
	Private func()        `yaml:"-"`
}

type testConfig struct {
	embedded `yaml:",inline"`
	Log      Log    `yaml:"log"`
	Listen   string `yaml:"listen"`
	Admin    string `yaml:"admin_listen"`
}

// program is a small server; got receives the configuration it ran with.
func program(got *testConfig) Program[testConfig] {
	return Program[testConfig]{
		Name: "prog", Short: "A test", EnvPrefix: "PROG_",
		Defaults: func() testConfig {
			return testConfig{embedded{Count: 1, Wait: time.Second, List: []string{"a"}}, DefaultLog, "127.0.0.1:2", "127.0.0.1:1"}
		},
		Validate: func(c *testConfig) error {
			if c.Count < 0 {
				return errors.New("count: -1: want 0 or more")
			}
			return nil
		},
		Files: func(c *testConfig) error {
			if c.TLS.Cert == "" {
				return nil
			}
			_, err := os.Stat(c.TLS.Cert)
			return err
		},
		Log:         func(c *testConfig) Log { return c.Log },
		AdminListen: func(c *testConfig) string { return c.Admin },
		Run: func(_ context.Context, c testConfig, _ Host) error {
			*got = c
			return nil
		},
	}
}

func run(t *testing.T, file string, env []string, args ...string) (cfg testConfig, code int, stdout, stderr string) {
	t.Helper()
	if file != "" {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	var out, errs bytes.Buffer
	code = program(&cfg).run(context.Background(), args, &out, &errs, func() []string { return env })
	return cfg, code, out.String(), errs.String()
}

func TestPrecedence(t *testing.T) {
	file := "name: file\ncount: 2\nwait: 3s\nlist: [x, y]\ntls: {cert: c.pem}\npeers: [{cert: p}]\nlog: {level: debug}\n"
	cfg, code, _, stderr := run(t, file, []string{"PROG_COUNT=4", "PROG_LOG__FORMAT=json", "PROG_LIST=q,r", "PATH=/bin"}, "--count", "5", "--ratio", "0.5")
	if code != 0 {
		t.Fatal(stderr)
	}
	want := testConfig{
		embedded{Name: "file", Count: 5, Ratio: 0.5, Wait: 3 * time.Second, List: []string{"q", "r"}, TLS: inner{"c.pem"}, Peers: []inner{{"p"}}},
		Log{"debug", "json"}, "127.0.0.1:2", "127.0.0.1:1",
	}
	if diff := cmp.Diff(want, cfg, cmp.AllowUnexported(testConfig{}), cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "embedded.Private" }, cmp.Ignore())); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

// What is wrong is refused with the name of the culprit.
func TestBadConfiguration(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		env, args  []string
		want       string
	}{
		{"unknown key in the file", "nmae: x\n", nil, nil, `unknown key "nmae"`},
		{"unknown nested key", "tls: {certt: x}\n", nil, nil, `unknown key "tls.certt"`},
		{"unknown key in a list", "peers: [{crt: x}]\n", nil, nil, "crt"},
		{"unknown variable", "", []string{"PROG_NMAE=x"}, nil, `unknown key "nmae"`},
		{"unknown flag", "", nil, []string{"--nmae", "x"}, "nmae"},
		{"bad type in the file", "count: many\n", nil, nil, "count"},
		{"bad variable", "", []string{"PROG_WAIT=soon"}, nil, "wait"},
		{"bad flag", "", nil, []string{"--wait", "soon"}, "wait"},
		{"a duration without a unit", "wait: 10\n", nil, nil, "10 has no unit: want for example 10s"},
		{"the same in the environment", "", []string{"PROG_WAIT=10"}, nil, "wait"},
		{"a truth for a text", "name: true\n", nil, nil, "true is no text"},
		{"a number for a text", "name: 010\n", nil, nil, "name"},
		{"a truth for a number", "count: true\n", nil, nil, "true is no number"},
		{"a part of one", "count: 1.5\n", nil, nil, "1.5 is no whole number"},
		{"a blank in a list", "list: [a, ' b']\n", nil, nil, `" b" begins or ends with white space`},
		{"a blank in a table", "peers: [{cert: 'x '}]\n", nil, nil, `"x " begins or ends with white space`},
		{"a blank in a flag", "", nil, []string{"--name", " :80"}, "name"},
		{"one address twice", "", nil, []string{"--admin_listen", "127.0.0.1:2"}, "admin_listen: 127.0.0.1:2 is taken by listen"},
		{"one address of all", "listen: 0.0.0.0:1\n", nil, nil, "admin_listen: 127.0.0.1:1 is taken by listen"},
		{"impossible value", "count: -1\n", nil, nil, "count: -1"},
		{"bad log level", "log: {level: loud}\n", nil, nil, "log.level"},
		{"bad log format", "", nil, []string{"--log.format", "xml"}, "log.format"},
		{"no YAML", "{", nil, nil, "config.yaml"},
		{"a stray word", "", nil, []string{"start"}, "start"},
	} {
		for _, sub := range []string{"", "validate"} {
			args := tc.args
			if sub != "" && tc.name != "a stray word" {
				args = append([]string{"config", "validate"}, args...)
			}
			if _, code, _, stderr := run(t, tc.file, tc.env, args...); code == 0 || !strings.Contains(stderr, tc.want) {
				t.Errorf("%s: code %d, %q; want a message with %q", tc.name, code, stderr, tc.want)
			}
		}
	}
	if _, code, _, stderr := run(t, "", nil, "--config", "nowhere.yaml"); code != 2 || !strings.Contains(stderr, "nowhere.yaml") {
		t.Errorf("a missing file: code %d, %q", code, stderr)
	}
}

// Only a start needs the files that the settings name, and validate tells whether it
// would find them.
func TestValidateReadsFiles(t *testing.T) {
	const file = "tls: {cert: nowhere.pem}\n"
	if _, code, _, stderr := run(t, file, nil, "config", "validate"); code != 2 || !strings.Contains(stderr, "nowhere.pem") {
		t.Errorf("validate: code %d, %q", code, stderr)
	}
	if _, code, _, stderr := run(t, file, nil, "config", "print"); code != 0 {
		t.Errorf("print: code %d, %q", code, stderr)
	}
}

// What is unusual and means what it says is taken.
func TestOddConfiguration(t *testing.T) {
	cfg, code, _, stderr := run(t, "wait: 0\ncount: 1e3\nratio: 2\nname: \"true\"\nlisten: 127.0.0.2:1\n", []string{"PROG_LIST="})
	if code != 0 || cfg.Wait != 0 || cfg.Count != 1000 || cfg.Ratio != 2 || cfg.Name != "true" || len(cfg.List) != 0 {
		t.Errorf("code %d, %q: %+v", code, stderr, cfg)
	}
}

// A Kubernetes Service that is called as the program is sets variables with its prefix.
func TestVariablesOfKubernetes(t *testing.T) {
	for _, name := range []string{"SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_7400_TCP", "PORT_7400_TCP_ADDR"} {
		if _, code, _, stderr := run(t, "", []string{"PROG_" + name + "=x"}, "config", "validate"); code != 0 {
			t.Errorf("%s: code %d, %q", name, code, stderr)
		}
	}
	if _, code, _, _ := run(t, "", []string{"PROG_SERVICE=x"}, "config", "validate"); code != 2 {
		t.Error("PROG_SERVICE is taken")
	}
}

// What print prints is a configuration that gives the same.
func TestPrintedConfigurationIsOne(t *testing.T) {
	_, code, out, stderr := run(t, "name: n\nwait: 90s\n", nil, "config", "print")
	if code != 0 {
		t.Fatal(stderr)
	}
	_, code, again, stderr := run(t, out, nil, "config", "print")
	if code != 0 || again != out {
		t.Errorf("code %d %s\nfirst:\n%s\nagain:\n%s", code, stderr, out, again)
	}
	if !strings.Contains(out, "wait: 1m30s") {
		t.Errorf("no readable duration in:\n%s", out)
	}
	if _, code, _, stderr := run(t, "", nil, "config", "validate"); code != 0 || !strings.Contains(stderr, "valid") {
		t.Errorf("code %d, %q", code, stderr)
	}
}

func TestHealthCommand(t *testing.T) {
	ready := true
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ready || r.URL.Path != "/readyz" {
			http.Error(w, "waits for the ring", http.StatusServiceUnavailable)
		}
	})}
	go srv.Serve(l)
	defer srv.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	args := []string{"health", "--admin_listen", "0.0.0.0:" + port}
	if _, code, _, stderr := run(t, "", nil, args...); code != 0 {
		t.Errorf("code %d, %q", code, stderr)
	}
	ready = false
	if _, code, _, stderr := run(t, "", nil, args...); code != 1 || !strings.Contains(stderr, "waits for the ring") {
		t.Errorf("code %d, %q", code, stderr)
	}
}

func TestVersionAndHelp(t *testing.T) {
	if _, code, out, _ := run(t, "", nil, "version"); code != 0 || out == "" {
		t.Errorf("version: code %d, %q", code, out)
	}
	_, code, out, _ := run(t, "", nil, "--help")
	if code != 0 || !strings.Contains(out, "--tls.cert") || !strings.Contains(out, "a name") || strings.Contains(out, "--peers") {
		t.Errorf("help: code %d\n%s", code, out)
	}
	text, _, _ := strings.Cut(out, "Usage:")
	for line := range strings.Lines(text) {
		if len(line) > 88 {
			t.Errorf("help has a line of %d columns: %s", len(line), line)
		}
	}
}
