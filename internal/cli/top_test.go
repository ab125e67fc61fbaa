package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"
)

func TestTop(t *testing.T) {
	f := newFake(t, 3)
	f.run("top").want(t, 0, "3 nodes", "node1", "serving", "front page", "default", "30", "10.0%", "counter of #1… (1000 B)")
	f.run("top", "--keys", "0").want(t, 0, "no hot keys")
	doc := decode(t, f.run("top", "--keys", "2", "-o", "json").want(t, 0).stdout)
	keys := doc["hot_keys"].([]any)
	if nodes := doc["nodes"].([]any); len(nodes) != 3 || len(keys) != 2 || nodes[0].(map[string]any)["state"] != "serving" {
		t.Fatalf("document %v", doc)
	}
	if k := keys[0].(map[string]any); k["key"] != "front page" || k["reads_per_second"] != 30.0 || k["share"] != 0.1 {
		t.Errorf("hot key %v", k)
	}
	f.run("top", "--interval", "1ms").want(t, 2, "--interval", "100ms")
}

// On a terminal it goes on until it is told to stop, and says who does not answer.
func TestTopOnATerminal(t *testing.T) {
	f := newFake(t, 3)
	f.nodes[1].server.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	out := f.runIn(ctx, func(a *App) { a.Terminal = true }, "top", "--interval", "100ms").want(t, 0).stdout
	if n := strings.Count(out, home); n < 2 {
		t.Errorf("it was shown %d times: %q", n, out)
	}
	last := out[strings.LastIndex(out, home):]
	if !strings.Contains(last, "unknown") || !bytes.Contains([]byte(last), []byte("node2: ")) {
		t.Errorf("it shows %q", last)
	}
}
