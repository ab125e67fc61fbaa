package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	setup := &App{ConfigDir: dir}
	for name, c := range map[string]Context{
		"prod": {Endpoints: []string{"prod:7400"}, TLS: rpc.TLSFiles{Cert: "c", Key: "k", CA: "a"}},
		"dev":  {Endpoints: []string{"dev1:7400", "dev2:7400"}},
	} {
		if err := setup.saveContext(name, c); err != nil {
			t.Fatal(err)
		}
	}
	all, err := setup.loadContexts()
	if err != nil {
		t.Fatal(err)
	}
	all.Current = "dev"
	if err := setup.storeContexts(all); err != nil {
		t.Fatal(err)
	}
	tls := rpc.TLSFiles{Cert: "c", Key: "k", CA: "a"}
	for name, c := range map[string]struct {
		flags flags
		env   string
		dir   string
		want  Context
		fails string
	}{
		"flag first":               {flags: flags{endpoints: []string{"x:1"}, context: "dev"}, env: "y:1", want: Context{Endpoints: []string{"x:1"}}},
		"then the environment":     {flags: flags{context: "dev"}, env: " y:1 ,z:2,", want: Context{Endpoints: []string{"y:1", "z:2"}}},
		"then the named context":   {flags: flags{context: "prod"}, want: Context{Endpoints: []string{"prod:7400"}, TLS: tls}},
		"then the current one":     {want: Context{Endpoints: []string{"dev1:7400", "dev2:7400"}}},
		"then this machine":        {dir: t.TempDir(), want: Context{Endpoints: []string{DefaultEndpoint}}},
		"no home":                  {dir: "-", want: Context{Endpoints: []string{DefaultEndpoint}}},
		"TLS of the named context": {flags: flags{endpoints: []string{"x:1"}, context: "prod"}, want: Context{Endpoints: []string{"x:1"}, TLS: tls}},
		"unknown context":          {flags: flags{context: "nope"}, fails: "--context"},
		"bad flag":                 {flags: flags{endpoints: []string{"x"}}, fails: "--endpoints"},
		"bad port":                 {flags: flags{endpoints: []string{"x:0"}}, fails: "--endpoints"},
		"bad environment":          {env: "x", fails: "$KVCTL_ENDPOINTS"},
	} {
		t.Run(name, func(t *testing.T) {
			a := &App{ConfigDir: dir, Getenv: func(string) string { return c.env }, flags: c.flags}
			switch c.dir {
			case "":
			case "-":
				a.ConfigDir = ""
			default:
				a.ConfigDir = c.dir
			}
			got, err := a.resolve()
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) || exitCode(err) != exitUsage {
					t.Errorf("got %v, want a usage error with %q", err, c.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestContextCommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kvasir")
	at := func(a *App) { a.ConfigDir = dir }
	if r := runKvctl(t, at, "context", "ls", "-o", "json").want(t, 0); r.stdout != "[]\n" {
		t.Errorf("no contexts are %q", r.stdout)
	}
	runKvctl(t, at, "context", "use", "dev").want(t, 3, `there is no context "dev"`)
	setup := &App{ConfigDir: dir}
	for _, name := range []string{"one", "two"} {
		if err := setup.saveContext(name, Context{Endpoints: []string{name + ":7400", name + ":7410"}}); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "context-ls", runKvctl(t, at, "context", "ls").want(t, 0).stdout)
	runKvctl(t, at, "context", "use", "one").want(t, 0)
	golden(t, "context-ls-json", runKvctl(t, at, "context", "ls", "-o", "json").want(t, 0).stdout)
	runKvctl(t, at, "context", "rm", "one").want(t, 0)
	runKvctl(t, at, "context", "rm", "one").want(t, 3)
	all, err := setup.loadContexts()
	if err != nil || all.Current != "" || len(all.ByName) != 1 {
		t.Errorf("left are %+v, %v", all, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
}

func TestContextsFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "contexts.yaml")
	for content, want := range map[string]string{
		"current: [":                        file,
		"currrent: dev":                     "currrent",
		"contexts: {dev: {endpoints: []}}":  "context dev: no endpoints",
		"contexts: {dev: {endpoints: [x]}}": `context dev: "x" is not host:port`,
		"current: gone\ncontexts: {}":       `the current context "gone" is not in`,
		"contexts: {d: {tls: {cert: x}, endpoints: [h:1]}}\ncurrent: d": "name all three files or none",
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		runKvctl(t, func(a *App) { a.ConfigDir = dir }, "get", "k").want(t, 1, want)
	}
	// Who says where the cluster is does not need the file.
	runKvctl(t, func(a *App) { a.ConfigDir = dir }, "get", "k", "--endpoints", "127.0.0.1:1", "--timeout", "50ms").want(t, 4)
	if err := (&App{}).saveContext("x", Context{Endpoints: []string{"h:1"}}); err == nil || !strings.Contains(err.Error(), "HOME") {
		t.Errorf("without a home: %v", err)
	}
	if err := (&App{ConfigDir: t.TempDir()}).saveContext("x", Context{}); err == nil {
		t.Error("a context without endpoints was saved")
	}
}
