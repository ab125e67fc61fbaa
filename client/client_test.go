package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// world runs a test in a bubble with a simulated cluster.
func world(t *testing.T, cfg sim.Config, test func(t *testing.T, w *sim.World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := sim.New(t, cfg)
		defer w.Close()
		time.Sleep(2 * time.Second)
		test(t, w)
	})
}

// within returns a context without a deadline that is cancelled all the same.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(d, cancel)
	return ctx
}

func TestTypedErrors(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		ctx := context.Background()
		k := []byte("k")
		put := func(key, value []byte, opts ...client.CallOption) error {
			_, err := c.Put(ctx, key, value, opts...)
			return err
		}
		get := func(opts ...client.CallOption) error { _, err := c.Get(ctx, k, opts...); return err }
		batch := func(ops ...client.Operation) error { _, err := c.Batch(ctx, ops); return err }
		for name, tc := range map[string]struct {
			err    error
			want   error
			detail string
		}{
			"absent key":         {get(), client.ErrNotFound, ""},
			"empty key":          {put(nil, nil), client.ErrInvalidArgument, "limit"},
			"large value":        {put(k, make([]byte, 2<<20)), client.ErrInvalidArgument, "limit"},
			"unknown namespace":  {put(k, nil, client.Namespace("nope")), client.ErrNamespaceNotFound, "namespace"},
			"bad quorum":         {put(k, nil, client.W("101%")), client.ErrInvalidArgument, "value"},
			"quorum above N":     {put(k, nil, client.W("4")), client.ErrInvalidArgument, "n"},
			"negative TTL":       {put(k, nil, client.TTL(-time.Second)), client.ErrInvalidArgument, "field"},
			"TTL below 1ms":      {put(k, nil, client.TTL(time.Microsecond)), client.ErrInvalidArgument, "field"},
			"batch TTL below 0":  {batch(client.Operation{Key: k, TTL: -time.Second}), client.ErrInvalidArgument, "operation"},
			"batch TTL < 1ms":    {batch(client.Operation{Key: k, TTL: 500 * time.Microsecond}), client.ErrInvalidArgument, "operation"},
			"duplicate key":      {batch(client.Operation{Key: k}, client.Operation{Key: k}), client.ErrInvalidArgument, "operation"},
			"unknown replica":    {get(client.FromReplica("node9")), nil, "node"},
			"version of nowhere": {get(client.MinVersion(client.Version{Timestamp: 1 << 60, Incarnation: 1})), client.ErrUnavailable, ""},
		} {
			if tc.err == nil || tc.want != nil && !errors.Is(tc.err, tc.want) {
				t.Errorf("%s: error %v, want %v", name, tc.err, tc.want)
			}
			var e *client.Error
			if tc.detail != "" && (!errors.As(tc.err, &e) || e.Details[tc.detail] == "") {
				t.Errorf("%s: no detail %s in %+v", name, tc.detail, e)
			}
			if errors.Is(tc.err, client.ErrOutcomeUnknown) {
				t.Errorf("%s: a refusal is reported as an unknown outcome", name)
			}
		}
		if _, _, err := c.ScanPage(ctx, client.Range{Limit: -1}, nil); !errors.Is(err, client.ErrInvalidArgument) {
			t.Errorf("negative limit: %v", err)
		}
	})
}

// A client that knows one node by its endpoint spreads its calls over all replicas.
func TestCallsAreSpreadOverReplicas(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c, err := client.New(context.Background(), []string{w.Host("node1") + ":7400"}, client.WithDialer(w.Net.Dialer("10.0.2.99")))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		served := map[string]int{}
		for i := range 300 {
			receipt, err := c.Put(context.Background(), fmt.Appendf(nil, "k%d", i), nil)
			if err != nil {
				t.Fatal(err)
			}
			served[receipt.Coordinator]++
		}
		if len(served) != 3 || min(served["node1"], served["node2"], served["node3"]) < 60 {
			t.Errorf("calls by node: %v", served)
		}
	})
}

// Nodes that are far are asked less often than by chance, and no more so once they are near.
func TestFarNodesAreAskedSeldom(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		far := w.Host("node3")
		w.Net.SetLatency(func(from, to string) (base, jitter time.Duration) {
			if from == far || to == far {
				return 20 * time.Millisecond, 0
			}
			return time.Millisecond, 0
		})
		c := w.Client()
		defer c.Close()
		served := func() int {
			n := 0
			for i := range 300 {
				key := fmt.Appendf(nil, "k%d", i)
				receipt, err := c.Put(context.Background(), key, nil)
				if err != nil {
					t.Fatal(err)
				}
				rec, err := c.Get(context.Background(), key)
				if err != nil {
					t.Fatal(err)
				}
				for _, by := range []string{receipt.Coordinator, rec.Receipt.Coordinator} {
					if by == "node3" {
						n++
					}
				}
			}
			return n
		}
		if n := served(); n == 0 || n > 20 {
			t.Errorf("%d of 600 operations went to the far node", n)
		}
		w.Net.SetLatency(func(string, string) (base, jitter time.Duration) { return time.Millisecond, 0 })
		time.Sleep(10 * time.Second)
		if n := served(); n < 100 {
			t.Errorf("%d of 600 operations went to the node that is not far any more", n)
		}
	})
}

func TestNoCluster(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 1, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		dial := client.WithDialer(w.Net.Dialer("10.0.2.1"))
		for _, endpoints := range [][]string{nil, {"10.9.9.9:1"}, {"nonsense"}} {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			_, err := client.New(ctx, endpoints, dial)
			cancel()
			if !errors.Is(err, client.ErrNoCluster) && !errors.Is(err, client.ErrInvalidArgument) {
				t.Errorf("endpoints %v: %v", endpoints, err)
			}
			if len(endpoints) > 0 && !strings.Contains(err.Error(), endpoints[0]) {
				t.Errorf("%v does not name the endpoint", err)
			}
		}
		// One that answers is enough.
		c, err := client.New(context.Background(), []string{"10.9.9.9:1", w.Endpoints()[0]}, dial)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Put(context.Background(), []byte("k"), nil); err != nil {
			t.Error(err)
		}
		c.Close()
		c.Close()
		if _, err := c.Get(context.Background(), []byte("k")); !errors.Is(err, client.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// Where the nodes' own addresses cannot be reached, as from outside a container
// network, the endpoints serve every key.
func TestEndpointsServeWhenNodesCannotBeReached(t *testing.T) {
	world(t, sim.Config{Seed: 2, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		inside := w.Net.Dialer("10.0.2.1")
		forwarded := map[string]string{"192.168.0.1:7500": w.Endpoints()[0], "192.168.0.1:7510": w.Endpoints()[1]}
		dial := func(ctx context.Context, address string) (net.Conn, error) {
			if to, ok := forwarded[address]; ok {
				return inside(ctx, to)
			}
			return nil, errors.New("no route to host")
		}
		c, err := client.New(context.Background(), []string{"192.168.0.1:7500", "192.168.0.1:7510"}, client.WithDialer(dial))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for i := range 50 {
			if _, err := c.Put(context.Background(), fmt.Append(nil, i), []byte("v")); err != nil {
				t.Fatal(err)
			}
		}
		w.Crash("node1", sim.Kill)
		for i := range 50 {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			if v, err := c.Get(ctx, fmt.Append(nil, i)); err != nil || string(v.Value) != "v" {
				t.Fatalf("get %d: %q, %v", i, v.Value, err)
			}
			cancel()
		}
	})
}

// Too few live replicas: the client asks the nodes, waits as long as it is told to
// be patient, and says how many of how many.
func TestPatience(t *testing.T) {
	world(t, sim.Config{Seed: 3, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Crash("node2", sim.Kill)
		time.Sleep(3 * time.Second)
		batch := []client.Operation{{Key: []byte("k")}}
		for _, patience := range []time.Duration{0, time.Second, 3 * time.Second} {
			c := w.Client(client.WithPatience(patience))
			start := time.Now()
			_, err := c.Put(context.Background(), []byte("k"), nil, client.W("all"))
			took := time.Since(start)
			if !errors.Is(err, client.ErrUnavailable) || errors.Is(err, client.ErrOutcomeUnknown) || !strings.Contains(err.Error(), "2 of 3") {
				t.Errorf("error = %v", err)
			}
			if took < patience || took > patience+time.Second {
				t.Errorf("patience %s: refused after %s", patience, took)
			}
			start = time.Now()
			results, err := c.Batch(within(t, time.Minute), batch, client.W("all"))
			took = time.Since(start)
			if err != nil || !errors.Is(results[0].Err, client.ErrUnavailable) || errors.Is(results[0].Err, client.ErrOutcomeUnknown) {
				t.Errorf("batch: %v, %v", results, err)
			}
			if took < patience || took > patience+time.Second {
				t.Errorf("patience %s: batch refused after %s", patience, took)
			}
			c.Close()
		}
		// Without a deadline in the context, the client's ends what patience would not.
		c := w.Client(client.WithPatience(20 * time.Second))
		defer c.Close()
		start := time.Now()
		results, err := c.Batch(within(t, time.Minute), batch, client.W("all"))
		if took := time.Since(start); err != nil || results[0].Err == nil || took > 6*time.Second {
			t.Errorf("batch: %v, %v after %s", results, err, took)
		}
		// A replica that comes back in time serves the request.
		go func() {
			time.Sleep(2 * time.Second)
			w.Start("node2")
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		if _, err := c.Put(ctx, []byte("k"), nil, client.W("all")); err != nil {
			t.Error(err)
		}
	})
}

func TestWithoutRetriesAnUnknownOutcomeStaysOne(t *testing.T) {
	world(t, sim.Config{Seed: 4, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		for i := range 20 {
			c.Put(context.Background(), fmt.Append(nil, i), nil) // links to all nodes are up
		}
		// Replies are lost from now on.
		for i := range 3 {
			w.Net.Cut(w.Host(fmt.Sprint("node", i+1)), "10.0.2.1")
		}
		start := time.Now()
		_, err := c.Put(context.Background(), []byte("k"), nil, client.WithoutRetries())
		if !errors.Is(err, client.ErrOutcomeUnknown) || time.Since(start) > 3*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
		defer cancel()
		_, err = c.Put(ctx, []byte("k"), nil)
		if !errors.Is(err, client.ErrOutcomeUnknown) || !errors.Is(err, client.ErrTimeout) && !errors.Is(err, client.ErrUnavailable) {
			t.Errorf("with retries: %v", err)
		}
	})
}

// A batch whose first attempt lost its reply may have been written, whatever the
// attempts after it say.
func TestBatchRemembersThatItMayBeWritten(t *testing.T) {
	world(t, sim.Config{Seed: 1, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		const outside = "10.0.2.9"
		c, err := client.New(context.Background(), w.Endpoints(), client.WithDialer(w.Net.Dialer(outside)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Put(context.Background(), []byte("warm"), nil); err != nil {
			t.Fatal(err)
		}
		for _, node := range []string{"node2", "node3"} { // the client has only node1, which does not know yet
			w.Net.Cut(outside, w.Host(node))
			w.Net.Cut(w.Host(node), outside)
		}
		time.Sleep(2 * time.Second)
		w.Isolate("node2")
		w.Isolate("node3")
		results, err := c.Batch(context.Background(), []client.Operation{{Key: []byte("a"), Value: []byte("v")}})
		if err != nil || len(results) != 1 || results[0].Err == nil {
			t.Fatalf("batch: %v, %v", results, err)
		}
		v, err := c.Get(context.Background(), []byte("a"), client.FromReplica("node1"))
		if err != nil || string(v.Value) != "v" {
			t.Fatalf("node1 has %q, %v: the test shows nothing", v.Value, err)
		}
		if !errors.Is(results[0].Err, client.ErrOutcomeUnknown) {
			t.Errorf("a record was left by a batch that reports %v", results[0].Err)
		}
	})
}

// A node that holds no replica of a key is not asked for it again.
func TestReplicaThatHoldsNone(t *testing.T) {
	world(t, sim.Config{Seed: 8, Nodes: 4, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		if _, err := c.Put(context.Background(), []byte("k"), nil); err != nil {
			t.Fatal(err)
		}
		without := 0
		for i := range 4 {
			start := time.Now()
			_, err := c.Get(context.Background(), []byte("k"), client.FromReplica(fmt.Sprintf("node%d", i+1)))
			if err == nil {
				continue
			}
			without++
			var e *client.Error
			if !errors.As(err, &e) || e.Reason != "NOT_OWNER" || errors.Is(err, client.ErrTimeout) || time.Since(start) > time.Second {
				t.Errorf("after %s: %v", time.Since(start), err)
			}
		}
		if without != 1 {
			t.Errorf("%d of 4 nodes hold no replica", without)
		}
	})
}

// Many answers may show at once that the topology has changed: a client asks for it
// once.
func TestOneRefreshAtATime(t *testing.T) {
	world(t, sim.Config{Seed: 9, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		w.Net.SetLatency(func(string, string) (time.Duration, time.Duration) { return 500 * time.Microsecond, 0 })
		inside := w.Net.Dialer("10.0.2.1")
		var dials atomic.Int64
		c, err := client.New(context.Background(), w.Endpoints(), client.WithDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dials.Add(1)
			return inside(ctx, address)
		}))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(context.Background())
		var writers sync.WaitGroup
		for i := range 64 {
			writers.Go(func() {
				for ctx.Err() == nil {
					c.Put(ctx, fmt.Append(nil, i), nil)
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		before := dials.Load()
		if _, err := w.Control("orch1").CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: "x"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		if n := dials.Load() - before; n > 3 {
			t.Errorf("one change made the client open %d connections", n)
		}
		cancel()
		writers.Wait()
	})
}

func TestScanIterator(t *testing.T) {
	world(t, sim.Config{Seed: 5, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		ctx := context.Background()
		var ops []client.Operation
		for i := range 2500 {
			ops = append(ops, client.Operation{Key: fmt.Appendf(nil, "k%05d", i), Value: []byte("v")})
		}
		results, err := c.Batch(ctx, ops)
		if err != nil || len(results) != 2500 || results[0].Err != nil || results[0].Version.IsZero() {
			t.Fatalf("%d results, %v", len(results), err)
		}
		n := 0
		for rec, err := range c.Scan(ctx, client.Range{Prefix: []byte("k")}) {
			if err != nil || string(rec.Key) != fmt.Sprintf("k%05d", n) || string(rec.Value) != "v" {
				t.Fatalf("record %d: %s, %v", n, rec.Key, err)
			}
			n++
		}
		if n != 2500 {
			t.Errorf("%d records", n)
		}
		// Stopping early is fine, and pages can be taken up later.
		for range c.Scan(ctx, client.Range{}) {
			break
		}
		page, token, err := c.ScanPage(ctx, client.Range{Limit: 1800, KeysOnly: true}, nil)
		if err != nil || len(token) == 0 || page[0].Value != nil {
			t.Fatalf("page of %d, token %x, %v", len(page), token, err)
		}
		rest, token, err := c.ScanPage(ctx, client.Range{Limit: 1800, KeysOnly: true}, token)
		if err != nil || len(token) != 0 || len(page)+len(rest) != 1800 {
			t.Errorf("%d and %d records, token %x, %v", len(page), len(rest), token, err)
		}
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		for _, err := range c.Scan(canceled, client.Range{}) {
			if err == nil {
				t.Error("a cancelled scan goes on")
			}
		}
	})
}

func TestTrace(t *testing.T) {
	world(t, sim.Config{Seed: 6, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		ctx := context.Background()
		r, err := c.Put(ctx, []byte("k"), []byte("v"), client.Traced())
		if err != nil {
			t.Fatal(err)
		}
		events, complete, err := c.Trace(ctx, r, 5*time.Second)
		if err != nil || !complete {
			t.Fatalf("complete %v, %v", complete, err)
		}
		kinds := map[string]int{}
		for _, e := range events {
			kinds[e.Kind]++
		}
		if kinds["received"] != 1 || kinds["sent"] != 3 || kinds["acknowledged"]+kinds["late"] != 3 || kinds["quorum reached"] != 1 || kinds["answered"] != 1 {
			t.Errorf("events %v", kinds)
		}
		if _, _, err := c.Trace(ctx, client.Receipt{}, 0); err == nil {
			t.Error("the trace of an untraced call")
		}
	})
}

// A get whose node hangs is answered by another one soon.
func TestGetsAreHedged(t *testing.T) {
	world(t, sim.Config{Seed: 7, Nodes: 3, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		c := w.Client()
		defer c.Close()
		ctx := context.Background()
		for i := range 30 {
			if _, err := c.Put(ctx, fmt.Append(nil, i), []byte("v"), client.W("all")); err != nil {
				t.Fatal(err)
			}
		}
		w.Net.Cut(w.Host("node1"), "10.0.2.1") // node1's replies to this client hang
		for i := range 30 {
			start := time.Now()
			if _, err := c.Get(ctx, fmt.Append(nil, i)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("get %d took %s", i, took)
			}
		}
	})
}
