package client_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reported has a client with records in the namespace default, whose copies for reports are
// in sync.
func reported(t *testing.T, w *sim.World, records int) *client.Client {
	t.Helper()
	ctl := w.Control("orch1")
	policy := topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK
	if _, err := ctl.UpdateNamespace(t.Context(), &adminv1.UpdateNamespaceRequest{Name: topology.DefaultNamespace, Settings: &adminv1.NamespaceSettings{ReportingPolicy: &policy}}); err != nil {
		t.Fatal(err)
	}
	c := w.Client()
	for i := range records {
		value := fmt.Appendf(nil, `{"n": %d, "odd": %t, "text": %q}`, i, i%2 == 1, strings.Repeat("x", 1000))
		if _, err := c.Put(t.Context(), fmt.Appendf(nil, "k%05d", i), value); err != nil {
			t.Fatal(err)
		}
	}
	for range 60 {
		if _, _, err := c.ReportGroups(t.Context(), client.Report{}, nil, []string{"count"}); err == nil {
			return c
		}
		time.Sleep(time.Second)
	}
	t.Fatal("the copies are not in sync after a minute")
	return nil
}

func TestReport(t *testing.T) {
	world(t, sim.Config{Seed: 5, Nodes: 3, Reporting: 2, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		before := w.Client()
		if _, _, err := before.ReportGroups(t.Context(), client.Report{}, nil, []string{"count"}); !errors.Is(err, client.ErrNotInSync) {
			t.Errorf("without copies: %v", err)
		}
		before.Close()
		c := reported(t, w, 300)
		defer c.Close()
		var keys []string
		var last client.ReportStats
		r := client.Report{Prefix: []byte("k"), Where: []string{"n >= 100"}, Progress: func(s client.ReportStats) { last = s }}
		for rec, err := range c.ReportRows(t.Context(), r, client.RowOptions{}) {
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, string(rec.Key))
		}
		if len(keys) != 200 || !slices.IsSorted(keys) || !last.InSync || last.Nodes != 2 || last.Records != 300 {
			t.Errorf("%d rows; %+v", len(keys), last)
		}
		groups, _, err := c.ReportGroups(t.Context(), client.Report{}, []string{"odd"}, []string{"count", "sum(n)"})
		if err != nil || len(groups) != 2 || groups[0].Keys[0].Text != "false" || groups[0].Measures[1].Value.Text != "22350" || groups[1].Measures[0].Value.Text != "150" {
			t.Errorf("%+v, %v", groups, err)
		}
		for range 20 { // those that are left early make room for others
			for rec, err := range c.ReportRows(t.Context(), client.Report{}, client.RowOptions{}) {
				if err != nil || string(rec.Key) != "k00000" {
					t.Errorf("%s, %v", rec.Key, err)
				}
				break
			}
		}
		for what, tc := range map[string]struct {
			r    client.Report
			rows client.RowOptions
			opts []client.CallOption
			want error
		}{
			"negative limit":    {rows: client.RowOptions{Limit: -1}, want: client.ErrInvalidArgument},
			"bad condition":     {r: client.Report{Where: []string{"n >"}}, want: client.ErrInvalidArgument},
			"unknown namespace": {opts: []client.CallOption{client.Namespace("nope")}, want: client.ErrNamespaceNotFound},
		} {
			for _, err := range c.ReportRows(t.Context(), tc.r, tc.rows, tc.opts...) {
				if !errors.Is(err, tc.want) {
					t.Errorf("%s: %v", what, err)
				}
			}
		}
	})
}

// A report ends with its context, and with its client.
func TestReportEnds(t *testing.T) {
	world(t, sim.Config{Seed: 6, Nodes: 3, Reporting: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := reported(t, w, 3000) // more than is on its way at a time
		rows := func(ctx context.Context, first func()) (n int, err error) {
			for _, err := range c.ReportRows(ctx, client.Report{}, client.RowOptions{}) {
				if err != nil {
					return n, err
				}
				if n++; n == 1 {
					first()
				}
			}
			return n, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w.Pause("report1")
		if n, err := rows(ctx, func() {}); n == 3000 || !errors.Is(err, client.ErrTimeout) {
			t.Errorf("after its deadline: %d rows, %v", n, err)
		}
		if n, err := rows(t.Context(), func() {}); n == 3000 || !errors.Is(err, client.ErrTimeout) && !errors.Is(err, client.ErrUnavailable) {
			t.Errorf("of a node that says nothing: %d rows, %v", n, err)
		}
		w.Resume("report1")
		for n, err := rows(t.Context(), func() {}); n < 3000; n, err = rows(t.Context(), func() {}) {
			t.Logf("%d rows, %v", n, err) // until its lease is renewed
			time.Sleep(time.Second)
		}
		ctx, cancel = context.WithCancel(t.Context())
		if n, err := rows(ctx, cancel); n == 3000 || !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %d rows, %v", n, err)
		}
		if n, err := rows(t.Context(), func() { c.Close() }); n == 3000 || !errors.Is(err, client.ErrClosed) {
			t.Errorf("with its client closed: %d rows, %v", n, err)
		}
	})
}
