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
