package cli

import "testing"

func TestBench(t *testing.T) {
	f := newFake(t, 3)
	f.run("bench", "--fill", "--records", "50", "--reads", "0.5", "--duration", "300ms", "--threads", "4", "--value-bytes", "10").
		want(t, 0, "operations/s", "4 threads", "update", "read")
	f.run("bench", "--workload", "f", "--records", "50", "--duration", "300ms", "--target", "100").want(t, 0, "workload f", "of 100 wanted", "read-modify-write")
	doc := decode(t, f.run("bench", "--records", "50", "--duration", "200ms", "-o", "json").want(t, 0).stdout)
	latencies := doc["latencies"].(map[string]any)
	if doc["workload"] != "a" || doc["distribution"] != "zipfian" || doc["per_second"].(float64) <= 0 || latencies["update"].(map[string]any)["count"].(float64) <= 0 || doc["errors"].(float64) != 0 {
		t.Errorf("document %v", doc)
	}
	doc = decode(t, f.run("bench", "--records", "50", "--reads", "1", "--distribution", "uniform", "--duration", "200ms", "-o", "json").want(t, 0).stdout)
	if doc["workload"] != nil || doc["distribution"] != "uniform" || len(doc["latencies"].(map[string]any)) != 1 {
		t.Errorf("document %v", doc)
	}
	f.run("bench", "--records", "50", "--reads", "1", "--duration", "200ms", "-n", "nope").want(t, 1, "there is no namespace")
	f.run("bench", "--reads", "2").want(t, 2, "--reads", "0 to 1")
	f.run("bench", "--threads", "0").want(t, 2, "--threads")
	f.run("bench", "--workload", "g").want(t, 2, "--workload", "a to f")
	f.run("bench", "--workload", "a", "--reads", "1").want(t, 2, "workload", "reads")
	f.run("bench", "--distribution", "normal").want(t, 2, "--distribution", "zipfian")
	f.run("bench", "--target", "0").want(t, 2, "--target", "above 0")
}
