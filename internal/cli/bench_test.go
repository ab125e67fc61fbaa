package cli

import "testing"

func TestBench(t *testing.T) {
	f := newFake(t, 3)
	f.run("bench", "--fill", "--keys", "50", "--reads", "0.5", "--duration", "300ms", "--callers", "4", "--value-bytes", "10").
		want(t, 0, "operations/s", "4 callers", "put", "get")
	doc := decode(t, f.run("bench", "--keys", "50", "--duration", "200ms", "-o", "json").want(t, 0).stdout)
	if doc["per_second"].(float64) <= 0 || doc["puts"].(map[string]any)["count"].(float64) <= 0 || doc["errors"].(float64) != 0 {
		t.Errorf("document %v", doc)
	}
	f.run("bench", "--keys", "50", "--reads", "1", "--duration", "200ms", "-n", "nope").want(t, 1, "there is no namespace")
	f.run("bench", "--reads", "2").want(t, 2, "--reads", "0 to 1")
	f.run("bench", "--callers", "0").want(t, 2, "--callers")
}
