package devcluster_test

import (
	"context"
	"encoding/json"
	"testing"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// roll has kvctl restart the whole cluster, and returns its document.
func (r *rig) roll() (out []struct {
	Name        string
	Restarted   bool
	DowntimeMs  int `json:"downtime_ms"`
	ConvergedMs int `json:"converged_ms"`
}) {
	r.t.Helper()
	if err := json.Unmarshal(r.kvctl("cluster", "roll", "-o", "json"), &out); err != nil {
		r.t.Fatal(err)
	}
	return out
}

// runs returns the present run of every process.
func (r *rig) runs() map[string]string {
	r.t.Helper()
	out := map[string]string{}
	for _, p := range r.status() {
		resp, err := adminv1.NewProcessServiceClient(r.conn(p.Name)).GetProcess(context.Background(), &adminv1.GetProcessRequest{})
		if err != nil {
			r.t.Fatal(err)
		}
		out[p.Name] = resp.GetRunId()
	}
	return out
}

// Every process is restarted in turn, under load: no operation fails, nothing is lost, and
// each is the same process with another run.
func TestE2ERollingRestart(t *testing.T) {
	r := start(t, 3, 3)
	l := loadOn(t, r.client(), scale(300.0, 2000.0))
	for range scale(1, 5) {
		processes, before := r.status(), r.runs()
		rolled := r.roll()
		after := r.runs()
		if len(rolled) != 6 {
			t.Errorf("rolled %v", rolled)
		}
		for _, p := range rolled {
			t.Logf("%s: serving again after %d ms, converged after %d ms more", p.Name, p.DowntimeMs, p.ConvergedMs)
			if !p.Restarted || before[p.Name] == after[p.Name] {
				t.Errorf("%s was not restarted: run %q, then %q", p.Name, before[p.Name], after[p.Name])
			}
		}
		for i, p := range r.status() {
			if p != processes[i] {
				t.Errorf("was %+v, is %+v", processes[i], p)
			}
		}
	}
	l.end()
}
