package coordinator_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// promise has some nodes refuse versions up to so far ahead of now, for all vnodes.
func (c *cluster) promise(ahead time.Duration, ids ...uint64) hlc.Timestamp {
	c.t.Helper()
	ts := hlc.At(time.Now().Add(ahead).UnixMilli())
	for _, id := range ids {
		for v := range uint32(vnodes) {
			if err := c.nodes[id-1].store.Promise(1, v, ts); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	return ts
}

// A version that a replica does not take any more is never acknowledged: the write
// gets a new one, whose acknowledgements alone count.
func TestRefusedVersionsAreReplaced(t *testing.T) {
	for _, by := range [][]uint64{{1, 2, 3}, {1}, {2}, {2, 3}} {
		run(t, 3, nil, func(t *testing.T, c *cluster) {
			n := c.nodes[0]
			// The refusal is there before the others have answered.
			for id := uint64(1); id <= 3; id++ {
				if len(by) < 3 && id != by[0] {
					c.set(slowly, id)
				}
			}
			promise := c.promise(100*time.Millisecond, by...)
			r := n.mustPut("k", "v", "all")
			if v := hlc.Timestamp(r.GetVersion().GetTimestamp()); v <= promise || r.GetAcknowledged() != 3 {
				t.Errorf("refused by %v: version %s under promise %s, %d acknowledged", by, v, promise, r.GetAcknowledged())
			}
			time.Sleep(time.Second)
			for _, o := range c.nodes {
				if rec := o.own("k"); rec == nil || uint64(rec.Version.Time) != r.GetVersion().GetTimestamp() {
					t.Errorf("refused by %v: node %d holds %+v", by, o.id, rec)
				}
				if b := o.hints.Backlog(); len(b) > 0 {
					t.Errorf("hints are kept for what was refused: %+v", b)
				}
			}
			n.wantValue("k", "v")
		})
	}
}

func TestRefusedVersionsInBatches(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		promise := c.promise(100*time.Millisecond, 2, 3)
		resp, err := c.nodes[0].coord.Batch(context.Background(), &kvv1.BatchRequest{Operations: []*kvv1.BatchOperation{
			{Key: []byte("a"), Value: []byte("1")}, {Key: []byte("b"), Value: []byte("2")}, {Key: []byte("c"), Delete: true},
		}})
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range resp.GetResults() {
			if r.GetError() != nil || hlc.Timestamp(r.GetVersion().GetTimestamp()) <= promise {
				t.Errorf("operation %d: %+v, promise %s", i, r, promise)
			}
		}
		c.nodes[0].wantValue("a", "1")
		c.nodes[0].wantValue("b", "2")
	})
}

// A promise that the clock must not follow fails the write, which may have happened
// where nobody had promised.
func TestRefusedVersionWithoutAnother(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		c.promise(time.Minute, 3)
		c.set(slowly, 3)
		_, err := c.nodes[0].put("k", "v", "all")
		wantError(t, err, codes.Unavailable, rpc.ReasonOutcomeUnknown)
		if n := c.holders("k", "v"); n != 2 {
			t.Errorf("%d nodes hold the first version", n)
		}
	})
}

// Records that another replica holds join below any promise.
func TestReadRepairPassesPromises(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		for _, id := range []uint64{1, 2} {
			c.nodes[id-1].plant("k", record.Record{Version: record.Version{Time: 5, Incarnation: 1}, Kind: record.Value, Payload: []byte("old")})
		}
		c.promise(0, 1, 2, 3)
		if _, err := c.nodes[2].get("k", func(r *kvv1.GetRequest) { r.ReadQuorum = "all" }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if n := c.holders("k", "old"); n != 3 {
			t.Errorf("%d nodes hold the record", n)
		}
	})
}
