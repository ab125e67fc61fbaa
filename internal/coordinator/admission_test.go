package coordinator_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// While flushes or compactions are behind, a node lets some writes wait and refuses the
// others; reads it serves.
func TestStalledStoreTakesFewWrites(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		n := c.nodes[0]
		n.mustPut("k", "v", "all")
		n.stalled.Store(int64(300 * time.Millisecond))
		c.set(slowly, 2, 3)
		var mu sync.Mutex
		var wg sync.WaitGroup
		taken := 0
		for i := range 100 {
			wg.Go(func() {
				_, err := n.coord.Put(context.Background(), &kvv1.PutRequest{Key: fmt.Append(nil, i)})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					taken++
				} else if e := wantError(t, err, codes.ResourceExhausted, rpc.ReasonOverloaded); e.RetryAfter <= 0 || e.Details["limit"] != "64" {
					t.Errorf("error %+v", e)
				}
			})
		}
		time.Sleep(time.Millisecond)
		n.wantValue("k", "v")
		wg.Wait()
		if taken != 64 {
			t.Errorf("%d of 100 writes were taken, want 64", taken)
		}
		n.stalled.Store(0)
		for i := range 100 {
			wg.Go(func() {
				if _, err := n.coord.Put(context.Background(), &kvv1.PutRequest{Key: fmt.Append(nil, i)}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

// A request whose deadline is over before it would be served is refused at once, and has
// done nothing; one with more time is served.
func TestDeadlinesThatCannotBeMet(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		n := c.nodes[0]
		for range 40 {
			n.coord.Waited(100 * time.Millisecond)
			time.Sleep(5 * time.Millisecond)
		}
		put := func(left time.Duration) error {
			ctx, cancel := context.WithTimeout(context.Background(), left)
			defer cancel()
			_, err := n.coord.Put(ctx, &kvv1.PutRequest{Key: []byte("k"), Value: []byte("v")})
			return err
		}
		began := time.Now()
		if e := wantError(t, put(30*time.Millisecond), codes.DeadlineExceeded, rpc.ReasonTooShort); !e.NothingDone() {
			t.Error("the refusal leaves open what was done")
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it was refused after %s", took)
		}
		for _, n := range c.nodes {
			if n.own("k") != nil {
				t.Errorf("node %d has it", n.id)
			}
		}
		if err := put(200 * time.Millisecond); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		if err := put(30 * time.Millisecond); err != nil {
			t.Errorf("waits of two seconds ago: %v", err)
		}
	})
}

// A node on which requests wait too long for a processor serves fewer at once, and says so;
// a slow peer alone is no reason to.
func TestOverloadedNodeServesFewer(t *testing.T) {
	run(t, 3, nil, func(t *testing.T, c *cluster) {
		n := c.nodes[0]
		c.set(slowly, 2, 3)
		// 200 puts for some seconds, each of which waits 100 ms for peers and for a processor as said.
		load := func(wait time.Duration) (refused int) {
			var mu sync.Mutex
			var wg sync.WaitGroup
			for i := range 200 {
				wg.Go(func() {
					for range 30 {
						n.coord.Waited(wait)
						_, err := n.coord.Put(context.Background(), &kvv1.PutRequest{Key: fmt.Append(nil, i)})
						if err == nil {
							continue
						}
						e := wantError(t, err, codes.ResourceExhausted, rpc.ReasonOverloaded)
						mu.Lock()
						refused++
						mu.Unlock()
						time.Sleep(e.RetryAfter)
					}
				})
			}
			wg.Wait()
			return refused
		}
		if refused := load(time.Millisecond); refused > 0 {
			t.Errorf("%d requests were refused because peers are slow", refused)
		}
		if refused := load(200 * time.Millisecond); refused == 0 {
			t.Error("no request was refused though all waited 200 ms")
		}
		if f := n.coord.InFlight(); f.Limit != 64 || f.Requests != 0 {
			t.Errorf("the limit is %d with %d under way, want 64 and 0", f.Limit, f.Requests)
		}
		load(time.Millisecond)
		if refused := load(time.Millisecond); refused > 0 {
			t.Errorf("%d requests were refused after the overload was over", refused)
		}
	})
}
