package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func decode(t *testing.T, text string) map[string]any {
	t.Helper()
	var out map[string]any
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return out
}

func TestPutGetDel(t *testing.T) {
	f := newFake(t, 3)
	r := f.run("put", "greeting", "hello").want(t, 0, "2 of 3 slots acknowledged, 2 needed")
	if strings.Count(r.stdout, "\n") != 1 || r.stderr != "" {
		t.Errorf("put said %q and %q", r.stdout, r.stderr)
	}
	if r := f.run("get", "greeting").want(t, 0); r.stdout != "hello" || r.stderr != "" {
		t.Errorf("get wrote %q and %q", r.stdout, r.stderr)
	}
	if r := f.runWith(func(a *App) { a.Terminal = true }, "get", "greeting").want(t, 0); r.stdout != "hello\n" {
		t.Errorf("get wrote %q to a terminal", r.stdout)
	}
	if r := f.run("get", "greeting", "--replica", "node2").want(t, 0); r.stdout != "node2 has hello" {
		t.Errorf("get --replica wrote %q", r.stdout)
	}
	f.run("del", "greeting").want(t, 0, "acknowledged")
	f.run("get", "greeting").want(t, 3, `kvctl: there is no key "greeting"`)
	f.run("delete", "greeting").want(t, 0, "acknowledged")
	f.run("rm", "greeting").want(t, 0, "acknowledged")
	f.run("get", "greeting", "--replica", "nobody").want(t, 3, "nobody")
	f.run("get", "greeting", "-n", "nope").want(t, 3, `there is no namespace "nope"`)
}

func TestPutFlags(t *testing.T) {
	f := newFake(t, 3)
	f.run("put", "k", "v", "-w", "40%", "--ttl", "1d").want(t, 0)
	f.run("put", "k", "v", "-w", "all").want(t, 0, "3 of 3")
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.mu.puts[0]; p.GetWriteQuorum() != "40%" || p.GetTtlMs() != 86_400_000 || p.GetNamespace() != "default" {
		t.Errorf("put sent %v", p)
	}
}

func TestPutFile(t *testing.T) {
	f := newFake(t, 3)
	file := filepath.Join(t.TempDir(), "value")
	content := "\xff\x00 not text\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f.run("put", "k", "--file", file).want(t, 0)
	if r := f.run("get", "k").want(t, 0); r.stdout != content {
		t.Errorf("get wrote %q", r.stdout)
	}
	f.runWith(func(a *App) { a.Stdin = strings.NewReader("from stdin") }, "put", "k", "-f", "-").want(t, 0)
	if r := f.run("get", "k").want(t, 0); r.stdout != "from stdin" {
		t.Errorf("get wrote %q", r.stdout)
	}
	f.run("put", "k", "").want(t, 0)
	if r := f.run("get", "k").want(t, 0); r.stdout != "" {
		t.Errorf("get wrote %q", r.stdout)
	}
	f.run("put", "k", "v", "--file", file).want(t, 2, "--file")
	f.run("put", "k").want(t, 2, "VALUE is missing")
	f.run("put", "k", "--file", file+"?").want(t, 2, "--file", "no such file")
	f.run("put", "k", strings.Repeat("x", 2<<20)).want(t, 2, "the limit is 1048576")
}

func TestDataDocuments(t *testing.T) {
	f := newFake(t, 3)
	put := decode(t, f.run("put", "k", "v", "-o", "json").want(t, 0).stdout)
	if put["n"] != 3.0 || put["needed"] != 2.0 || put["strength"] != "strong" || put["coordinator"] != "node1" || put["epoch"] != 7.0 || put["trace"] != nil {
		t.Errorf("put: %v", put)
	}
	get := decode(t, f.run("get", "k", "-o", "json").want(t, 0).stdout)
	if get["key"] != "k" || get["value"] != "v" || get["version"] != put["version"] || get["receipt"].(map[string]any)["vnode"] != 5.0 {
		t.Errorf("get: %v", get)
	}
	f.run("put", "\xff", "\xfe").want(t, 0)
	get = decode(t, f.run("get", "\xff", "-o", "json").want(t, 0).stdout)
	if get["key_base64"] != "/w==" || get["value_base64"] != "/g==" || get["key"] != nil || get["value"] != nil {
		t.Errorf("get: %v", get)
	}
	var y map[string]any
	if err := yaml.Unmarshal([]byte(f.run("get", "k", "-o", "yaml").want(t, 0).stdout), &y); err != nil || y["value"] != "v" {
		t.Errorf("yaml: %v, %v", y, err)
	}
}

func TestErrorsForPrograms(t *testing.T) {
	f := newFake(t, 3)
	for _, c := range []struct {
		args        string
		exit        int
		code, texts string
	}{
		{"get k", 3, "NotFound", "there is no key"},
		{"get k -n nope", 3, "NotFound", "NAMESPACE_NOT_FOUND"},
		{"get k -r 0%", 2, "InvalidArgument", "-r"},
		{"get k --bogus", 2, "InvalidArgument", "--bogus"},
		{"get", 2, "InvalidArgument", "KEY is missing"},
		{"nonsense", 2, "InvalidArgument", "nonsense"},
		{"namespace nonsense", 2, "InvalidArgument", "nonsense"},
		{"put k v extra", 2, "InvalidArgument", "extra"},
		{"namespace create default", 1, "AlreadyExists", "NAMESPACE_EXISTS"},
		{"namespace create x --n 5", 1, "FailedPrecondition", `"data_nodes":"3"`},
		{"namespace set default --if-changed-epoch 99 --hints off", 5, "Aborted", "EPOCH_CHANGED"},
		{"node status nobody", 3, "NotFound", "nobody"},
		{"get k --timeout 50ms --endpoints 127.0.0.1:1", 4, "Unavailable", "no cluster at 127.0.0.1:1: start one with `make run`"},
		{"health --endpoints 127.0.0.1:1", 4, "Unavailable", "no cluster at 127.0.0.1:1: start one with `make run`"},
	} {
		t.Run(c.args, func(t *testing.T) {
			for _, flag := range []string{"--output=json", "-ojson", "-o=json", "-oyaml"} {
				r := f.run(append(strings.Fields(c.args), flag)...).want(t, c.exit, c.texts)
				if got := decode(t, r.stderr); got["code"] != c.code || got["message"] == "" || got["details"] == nil {
					t.Errorf("%s: stderr is %s, want code %s", flag, r.stderr, c.code)
				}
				if r.stdout != "" {
					t.Errorf("stdout is %q", r.stdout)
				}
			}
			r := f.run(strings.Fields(c.args)...).want(t, c.exit)
			if !strings.HasPrefix(r.stderr, "kvctl: ") {
				t.Errorf("stderr is %q", r.stderr)
			}
		})
	}
}

func TestUnavailable(t *testing.T) {
	f := newFake(t, 3)
	f.mu.Lock()
	f.mu.health[2].State = topologyv1.NodeHealth_STATE_UNHEALTHY
	f.mu.Unlock()
	f.run("put", "k", "v").want(t, 0)
	r := f.run("put", "k", "v", "-w", "all", "--timeout", "100ms", "-o", "json").want(t, 4, "2 of 3 slots are live")
	if d := decode(t, r.stderr)["details"].(map[string]any); d["needed"] != "3" || d["reason"] != "NOT_ENOUGH_REPLICAS" {
		t.Errorf("details %v", d)
	}
}

// TestBadFlags: what is wrong with a flag is said with the flag's name.
func TestBadFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"put k v -w 0%", "-w"},
		{"put k v -w 101%", "-w"},
		{"put k v -w -1", "-w"},
		{"put k v -w abc", "-w"},
		{"put k v -w=", "-w"},
		{"put k v --ttl 0s", "--ttl"},
		{"put k v --ttl soon", "--ttl"},
		{"put k v --ttl 1500us", "--ttl"},
		{"put k v --timeout 0s", "--timeout"},
		{"put k v -n bad/name", "--namespace"},
		{"get k --read-repair maybe", "--read-repair"},
		{"get k --replica node1 -r one", "--replica"},
		{"get k --replica node1 --trace", "--trace"},
		{"get k -o xml", "--output"},
		{"get k -w 2", "'w' in -w"},
		{"get k --context nope", "--context"},
		{"get k --endpoints nope", "--endpoints"},
		{"scan --limit -1", "--limit"},
		{"scan --limit x", "--limit"},
		{"namespace create x --n 0", "--n"},
		{"namespace create x --n 16", "--n"},
		{"namespace create x --repair-chance 1.5", "--repair-chance"},
		{"namespace create x --repair-chance NaN", "--repair-chance"},
		{"namespace create x --hints maybe", "--hints"},
		{"namespace create x --ttl -1s", "--ttl"},
		{"namespace set x", "--hints"},
		{"namespace drop x", "--yes"},
		{"import f", "--format"},
		{"import f --format xml", "--format"},
		{"import f --format tsv --key-column 0", "--key-column"},
		{"import f --format tsv --key-column name", "--key-column"},
		{"import f --format jsonl --header", "--header"},
		{"export --format tsv --key-column name", "--key-column"},
		{"export --format csv --header a,b --key-column c", "--key-column"},
		{"export --format csv --header a,b --key-column 3", "--key-column"},
		{"export --format csv --header a,a --key-column a", "--key-column"},
		{"cluster status --watch -o json", "--watch"},
	} {
		r := runKvctl(t, func(*App) {}, strings.Fields(c.args)...)
		if r.code != 2 || !strings.Contains(r.stderr, c.want) || r.stdout != "" {
			t.Errorf("%s: exit code %d, want 2 and %q in %s%s", c.args, r.code, c.want, r.stdout, r.stderr)
		}
	}
}

// wideTrace is the course of a put to two of five replicas, one of which is paused.
func wideTrace() []*kvv1.TraceEvent {
	type k = kvv1.TraceEvent_Kind
	var out []*kvv1.TraceEvent
	for _, e := range []struct {
		at           uint64
		kind         k
		node, detail string
	}{
		{0, kvv1.TraceEvent_KIND_RECEIVED, "", "put of a key in vnode 5 of namespace wide: W=2 of N=5"},
		{80, kvv1.TraceEvent_KIND_SENT, "node1", ""},
		{85, kvv1.TraceEvent_KIND_SENT, "node2", ""},
		{90, kvv1.TraceEvent_KIND_SENT, "node3", ""},
		{95, kvv1.TraceEvent_KIND_SENT, "node4", ""},
		{99, kvv1.TraceEvent_KIND_SENT, "node5", ""},
		{640, kvv1.TraceEvent_KIND_ACKNOWLEDGED, "node1", ""},
		{910, kvv1.TraceEvent_KIND_ACKNOWLEDGED, "node3", ""},
		{912, kvv1.TraceEvent_KIND_QUORUM_REACHED, "", "2 of 5 slots"},
		{950, kvv1.TraceEvent_KIND_ANSWERED, "", "version 1772366400000.1@1, 2 of 5 slots have it"},
		{1200, kvv1.TraceEvent_KIND_LATE, "node2", "acknowledged after the answer"},
		{1850, kvv1.TraceEvent_KIND_LATE, "node4", "acknowledged after the answer"},
		{1_501_000, kvv1.TraceEvent_KIND_FAILED, "node5", "node5 does not answer"},
		{1_501_400, kvv1.TraceEvent_KIND_HINT, "node5", "a hint is kept for it"},
	} {
		out = append(out, &kvv1.TraceEvent{AtUs: e.at, Kind: e.kind, Node: e.node, Detail: e.detail})
	}
	return out
}

func TestTrace(t *testing.T) {
	f := newFake(t, 5)
	f.mu.Lock()
	f.mu.trace = wideTrace()
	f.mu.Unlock()
	f.run("namespace", "create", "wide", "--n", "5").want(t, 0)
	r := f.run("put", "k", "v", "-n", "wide", "-w", "40%", "--trace").want(t, 0)
	golden(t, "put-trace", r.stdout)
	if r.stderr != "" {
		t.Errorf("stderr is %q", r.stderr)
	}
	doc := decode(t, f.run("put", "k", "v", "-n", "wide", "-w", "40%", "--trace", "-o", "json").want(t, 0).stdout)
	events := doc["trace"].([]any)
	if e := events[8].(map[string]any); len(events) != 14 || e["kind"] != "quorum_reached" || e["at_ms"] != 0.912 || e["node"] != "node1" || doc["trace_complete"] != true || doc["n"] != 5.0 {
		t.Errorf("document %v", doc)
	}
	f.mu.Lock()
	f.mu.trace = []*kvv1.TraceEvent{
		{AtUs: 0, Kind: kvv1.TraceEvent_KIND_RECEIVED, Detail: "get of a key in vnode 5 of namespace wide: R=2 of N=5"},
		{AtUs: 800, Kind: kvv1.TraceEvent_KIND_REPLIED, Node: "node1", Detail: "value 1772366400000.2@1"},
		{AtUs: 900, Kind: kvv1.TraceEvent_KIND_STALE, Node: "node2", Detail: "has not 1772366400000.2@1"},
		{AtUs: 950, Kind: kvv1.TraceEvent_KIND_REPAIR, Node: "node2", Detail: "is sent 1772366400000.2@1"},
	}
	f.mu.Unlock()
	r = f.run("get", "k", "-n", "wide", "--trace").want(t, 0)
	if r.stdout != "v" {
		t.Errorf("stdout is %q", r.stdout)
	}
	golden(t, "get-trace", r.stderr)
}

func TestScan(t *testing.T) {
	f := newFake(t, 3)
	if r := f.run("scan", "-o", "json").want(t, 0); r.stdout != "[]\n" {
		t.Errorf("an empty scan is %q", r.stdout)
	}
	if r := f.run("scan", "-o", "yaml").want(t, 0); r.stdout != "[]\n" {
		t.Errorf("an empty scan is %q", r.stdout)
	}
	for _, k := range []string{"a", "b/1", "b/2", "b/3", "b/4", "c\n"} {
		f.run("put", k, "value of "+k).want(t, 0)
	}
	for _, c := range []struct{ args, want string }{
		{"scan --keys-only", "a\nb/1\nb/2\nb/3\nb/4\n\"c\\n\"\n"},
		{"scan --prefix b/ --start b/2 --limit 2", "b/2\tvalue of b/2\nb/3\tvalue of b/3\n"},
		{"scan --start c", "\"c\\n\"\t\"value of c\\n\"\n"},
	} {
		if r := f.run(strings.Fields(c.args)...).want(t, 0); r.stdout != c.want {
			t.Errorf("%s: %q, want %q", c.args, r.stdout, c.want)
		}
	}
	for _, format := range []string{"json", "yaml"} {
		var docs []map[string]any
		if err := yaml.Unmarshal([]byte(f.run("scan", "-o", format).want(t, 0).stdout), &docs); err != nil || len(docs) != 6 || docs[5]["key"] != "c\n" || docs[0]["value"] != "value of a" {
			t.Errorf("%s: %v, %v", format, docs, err)
		}
	}
	r := f.run("scan", "--keys-only", "--limit", "1", "-o", "json").want(t, 0)
	var docs []map[string]any
	if err := json.Unmarshal([]byte(r.stdout), &docs); err != nil || len(docs) != 1 || docs[0]["value"] != nil {
		t.Errorf("%s: %v", r.stdout, err)
	}
	f.run("scan", "-n", "nope").want(t, 3, "nope")
}
