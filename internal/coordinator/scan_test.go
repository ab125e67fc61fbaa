package coordinator_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// scanAll follows resume tokens to the end.
func (n *node) scanAll(r *kvv1.ScanRequest) (keys []string, pages int) {
	n.c.t.Helper()
	for {
		resp, err := n.coord.Scan(context.Background(), r)
		if err != nil {
			n.c.t.Fatal(err)
		}
		pages++
		for _, rec := range resp.GetRecords() {
			keys = append(keys, string(rec.GetKey()))
		}
		if len(resp.GetResumeToken()) == 0 {
			return keys, pages
		}
		r.ResumeToken = resp.GetResumeToken()
	}
}

func TestScan(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		var want []string
		for i := range 3000 {
			key := fmt.Sprintf("user/%05d", i)
			c.nodes[i%3].mustPut(key, "v", "all")
			want = append(want, key)
		}
		c.nodes[0].mustPut("usher", "v", "all")
		c.nodes[0].mustPut("a", "v", "all")
		got, pages := c.nodes[1].scanAll(&kvv1.ScanRequest{Prefix: []byte("user/")})
		if !slices.Equal(got, want) {
			t.Errorf("%d keys, want %d in order", len(got), len(want))
		}
		if pages < 3 {
			t.Errorf("%d pages", pages)
		}
		for _, tc := range []struct {
			req  *kvv1.ScanRequest
			want []string
		}{
			{&kvv1.ScanRequest{Prefix: []byte("user/"), Limit: 2500}, want[:2500]},
			{&kvv1.ScanRequest{Prefix: []byte("user/"), Limit: 7}, want[:7]},
			{&kvv1.ScanRequest{Prefix: []byte("user/"), Start: []byte("user/02990")}, want[2990:]},
			{&kvv1.ScanRequest{Start: []byte("user/02999")}, []string{"user/02999", "usher"}},
			{&kvv1.ScanRequest{Limit: 2, KeysOnly: true}, []string{"a", "user/00000"}},
			{&kvv1.ScanRequest{Prefix: []byte("user/"), Start: []byte("z")}, nil},
			{&kvv1.ScanRequest{Prefix: []byte("x")}, nil},
		} {
			if got, _ := c.nodes[2].scanAll(tc.req); !slices.Equal(got, tc.want) {
				t.Errorf("scan %v: %d keys %.60v, want %d", tc.req, len(got), got, len(tc.want))
			}
		}
	})
}

// Whatever subset of replicas has which record, a scan shows each key as a quorum
// read would, and mends what it met.
func TestScanIsAQuorumReadOfEachKey(t *testing.T) {
	run(t, 5, nil, func(t *testing.T, c *cluster) {
		rng := rand.New(rand.NewPCG(3, 5))
		now := time.Now().UnixMilli()
		want := map[string]string{}
		for i := range 400 {
			key := fmt.Sprintf("%03d", i)
			for version := range 1 + rng.IntN(3) {
				payload := fmt.Sprint("v", version)
				if rng.IntN(4) == 0 {
					payload = "" // a tombstone
				}
				// Acknowledged by a majority, whichever.
				for _, at := range rng.Perm(5)[:3+rng.IntN(3)] {
					c.nodes[at].plant(key, recordAt(now-10+int64(version), payload))
				}
				want[key] = payload
			}
		}
		for _, n := range []int{0, 3} {
			c.set(down, uint64(n+2))
			got := map[string]string{}
			req := &kvv1.ScanRequest{}
			for {
				resp, err := c.nodes[n].coord.Scan(context.Background(), req)
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range resp.GetRecords() {
					got[string(r.GetKey())] = string(r.GetValue())
				}
				if req.ResumeToken = resp.GetResumeToken(); len(req.ResumeToken) == 0 {
					break
				}
			}
			c.set(open, uint64(n+2))
			for key, payload := range want {
				if v, found := got[key]; found != (payload != "") || v != payload {
					t.Errorf("scan from n%d: %s = %q, found %v; want %q", n+1, key, v, found, payload)
				}
			}
		}
	})
}

func TestScanWithDeadReplicas(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		for i := range 100 {
			c.nodes[0].mustPut(fmt.Sprintf("%03d", i), "v", "all")
		}
		c.set(refusing, 2) // not known to be down, yet it fails
		if got, _ := c.nodes[0].scanAll(&kvv1.ScanRequest{}); len(got) != 100 {
			t.Errorf("%d keys", len(got))
		}
		c.set(down, 2, 3)
		_, err := c.nodes[0].coord.Scan(context.Background(), &kvv1.ScanRequest{})
		wantError(t, err, codes.Unavailable, rpc.ReasonNotEnoughReplicas)
		resp, err := c.nodes[0].coord.Scan(context.Background(), &kvv1.ScanRequest{ReadQuorum: "one"})
		if err != nil || len(resp.GetRecords()) != 100 {
			t.Errorf("at R=one: %d records, %v", len(resp.GetRecords()), err)
		}
	})
}

// Pages are cut where replies were, also by many tombstones and large values.
func TestScanPages(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		now := time.Now().UnixMilli()
		var want []string
		for i := range 4000 {
			key := fmt.Sprintf("%05d", i)
			rec := recordAt(now, "")
			if i%1500 == 0 {
				rec = recordAt(now, "alive")
				want = append(want, key)
			}
			for _, n := range c.nodes {
				n.plant(key, rec)
			}
		}
		if got, _ := c.nodes[0].scanAll(&kvv1.ScanRequest{}); !slices.Equal(got, want) {
			t.Errorf("keys %v, want %v", got, want)
		}
		for i := range 6 {
			for _, n := range c.nodes {
				n.plant(fmt.Sprint("large", i), record.Record{Version: recordAt(now, "").Version, Kind: record.Value, Payload: []byte(strings.Repeat("x", 1<<19))})
			}
		}
		got, pages := c.nodes[0].scanAll(&kvv1.ScanRequest{Prefix: []byte("large")})
		if len(got) != 6 || pages < 3 {
			t.Errorf("%d large records on %d pages", len(got), pages)
		}
	})
}

// A limit makes a scan over deleted keys no slower, and a page that takes long ends
// early.
func TestScanOverTombstones(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		c.place(1, 2, 3)
		c.publish()
		for i := range 300 {
			for _, n := range c.nodes[:3] {
				n.plant(fmt.Sprintf("k%05d", i), recordAt(time.Now().UnixMilli(), ""))
			}
		}
		c.set(slowly, 1, 2, 3)
		start := time.Now()
		if _, err := c.nodes[3].coord.Scan(context.Background(), &kvv1.ScanRequest{Limit: 1}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 300*time.Millisecond {
			t.Errorf("2 rounds of 100 ms took %s", took)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 150*time.Millisecond)
		defer cancel()
		r, err := c.nodes[3].coord.Scan(ctx, &kvv1.ScanRequest{Limit: 1})
		if err != nil || len(r.GetResumeToken()) == 0 {
			t.Fatalf("a page without time to finish: %v, %v", r, err)
		}
		r, err = c.nodes[3].coord.Scan(context.Background(), &kvv1.ScanRequest{Limit: 1, ResumeToken: r.GetResumeToken()})
		if err != nil || len(r.GetRecords()) != 0 || len(r.GetResumeToken()) != 0 {
			t.Errorf("the rest: %v, %v", r, err)
		}
	})
}

// Invariant 3: what a scan returned from the old node of a moving slot is there when
// the new one is read.
func TestScanDuringAMove(t *testing.T) {
	run(t, 4, func(s *topology.NamespaceSettings) { s.N = ptr(3) }, func(t *testing.T, c *cluster) {
		move := func(p topology.Phase) {
			c.setRing(func(int) []topology.Slot {
				return []topology.Slot{{Node: 1, Incoming: 4, Phase: p}, {Node: 2, Phase: topology.Stable}, {Node: 3, Phase: topology.Stable}}
			})
			c.publish()
		}
		move(topology.WriteBothReadOld)
		// A write that was not acknowledged: nodes 1 and 2 have it, 3 and 4 do not.
		rec := recordAt(time.Now().UnixMilli(), "v")
		c.nodes[0].plant("k", rec)
		c.nodes[1].plant("k", rec)
		scan := func(n *node, without uint64) int {
			c.set(down, without)
			defer c.set(open, without)
			r, err := n.coord.Scan(context.Background(), &kvv1.ScanRequest{})
			if err != nil {
				t.Fatal(err)
			}
			return len(r.GetRecords())
		}
		if n := scan(c.nodes[0], 3); n != 1 {
			t.Fatalf("%d records", n)
		}
		move(topology.WriteBothReadNew)
		if n := scan(c.nodes[3], 2); n != 1 {
			t.Errorf("the first scan returned the record, the second %d records", n)
		}
	})
}
