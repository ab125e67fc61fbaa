package sim_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// clocks is a cluster whose clocks are tried. What it writes goes through the node it
// says, and past the client, which would go elsewhere.
type clocks struct {
	*testing.T
	w *sim.World
	// newest is the greatest timestamp each node has issued, acked what must be read.
	newest map[string]uint64
	acked  map[string]string
	puts   int
}

func clockWorld(t *testing.T, seed uint64, nodes int, test func(c *clocks)) {
	world(t, sim.Config{Seed: seed, Nodes: nodes, Orchestrators: 1}, func(t *testing.T, w *sim.World) {
		test(&clocks{T: t, w: w, newest: map[string]uint64{}, acked: map[string]string{}})
	})
}

// put writes through a node. Invariant 10: its versions strictly increase.
func (c *clocks) put(name string) error {
	c.Helper()
	c.puts++
	key, value := fmt.Sprint("k", c.puts%10), fmt.Sprint(c.puts)
	r, err := kvv1.NewKVServiceClient(c.w.Conn(name)).Put(timeout(c.T, 2*time.Second), &kvv1.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		return err
	}
	ts := r.GetReceipt().GetVersion().GetTimestamp()
	if ts <= c.newest[name] {
		c.Errorf("%s issued %d after %d", name, ts, c.newest[name])
	}
	c.newest[name] = ts
	c.acked[key] = value
	return nil
}

func (c *clocks) mustPut(names ...string) {
	c.Helper()
	for _, name := range names {
		if err := c.put(name); err != nil {
			c.Fatalf("put through %s: %v", name, err)
		}
	}
}

// wantStopped fails the test unless a node refuses to coordinate.
func (c *clocks) wantStopped(name string) {
	c.Helper()
	if e := wantReason(c.T, c.put(name), codes.Unavailable, rpc.ReasonClockSkew); !e.NothingDone() {
		c.Errorf("the refusal leaves it open whether anything was done: %+v", e)
	}
}

// wantNamed fails the test unless the cluster's status names just this node, as one
// that coordinates or not; "" stands for none.
func (c *clocks) wantNamed(name string, coordinates bool) {
	c.Helper()
	for _, n := range status(c.T, c.w.Control("orch1")).GetNodes() {
		s := n.GetStatus()
		off := s.GetName() == name
		if (s.GetClockProblem() != "") != off || s.GetClockOk() != (!off || coordinates) {
			c.Errorf("%s: clock ok is %v, %q, offset %d ms of %d opinions", s.GetName(), s.GetClockOk(), s.GetClockProblem(), s.GetClockOffsetMs(), s.GetClockOpinions())
		}
	}
}

// wantAll fails the test unless every acknowledged write is read.
func (c *clocks) wantAll() {
	c.Helper()
	reader := c.w.Client()
	defer reader.Close()
	for k, v := range c.acked {
		want(c.T, reader, k, v)
	}
}

// A node whose clock jumps stops coordinating at once, in both directions; the others
// go on, nothing is lost, and it comes back with its clock.
func TestClockJumps(t *testing.T) {
	for i, jump := range []time.Duration{10 * time.Minute, -10 * time.Minute, 400 * time.Millisecond, -400 * time.Millisecond} {
		t.Run(jump.String(), func(t *testing.T) {
			clockWorld(t, uint64(20+i), 5, func(c *clocks) {
				others := []string{"node1", "node3", "node4", "node5"}
				c.mustPut("node2")
				c.mustPut(others...)
				c.w.SetClock("node2", jump)
				c.wantStopped("node2")
				_, err := kvv1.NewKVServiceClient(c.w.Conn("node2")).Get(timeout(c.T, time.Second), &kvv1.GetRequest{Key: []byte("k1")})
				wantReason(c.T, err, codes.Unavailable, rpc.ReasonClockSkew)
				c.mustPut(others...)
				time.Sleep(3 * time.Second)
				c.wantNamed("node2", false)
				for range 20 {
					c.wantStopped("node2")
					c.mustPut(others...)
					time.Sleep(200 * time.Millisecond)
				}
				c.wantAll()
				c.w.SetClock("node2", 0)
				time.Sleep(3 * time.Second)
				c.wantNamed("", true)
				c.mustPut("node2")
				c.mustPut(others...)
				c.wantAll()
			})
		})
	}
}

// A clock that drifts is told of once it is 250 ms off, and not before.
func TestClockDrifts(t *testing.T) {
	for i, drift := range []time.Duration{10 * time.Millisecond, -10 * time.Millisecond} {
		t.Run(drift.String(), func(t *testing.T) {
			clockWorld(t, uint64(24+i), 5, func(c *clocks) {
				for step := range 40 {
					ahead := time.Duration(step) * drift
					c.w.SetClock("node2", ahead)
					time.Sleep(200 * time.Millisecond)
					c.mustPut("node1", "node3", "node4", "node5")
					switch err := c.put("node2"); {
					case ahead.Abs() <= 230*time.Millisecond && err != nil:
						c.Fatalf("%s off: %v", ahead, err)
					case ahead.Abs() >= 270*time.Millisecond:
						wantReason(c.T, err, codes.Unavailable, rpc.ReasonClockSkew)
					}
				}
				time.Sleep(3 * time.Second)
				c.wantNamed("node2", false)
				c.wantAll()
			})
		})
	}
}

// With two opinions a node that is ahead only warns; the right one is named. Its
// writes are refused by all, its own replica included, so none of them stops the
// others, and a client that comes to it goes elsewhere.
func TestClockAheadAmongThree(t *testing.T) {
	clockWorld(t, 26, 3, func(c *clocks) {
		c.mustPut("node1", "node2", "node3")
		c.w.SetClock("node2", 10*time.Minute)
		time.Sleep(3 * time.Second)
		c.wantNamed("node2", true)
		if e := wantReason(c.T, c.put("node2"), codes.FailedPrecondition, rpc.ReasonClockSkew); !e.NothingDone() {
			c.Errorf("error %+v", e)
		}
		user := c.w.Client()
		defer user.Close()
		for i := range 100 {
			key, value := fmt.Sprint("k", i%10), fmt.Sprint("v", i)
			if _, err := user.Put(timeout(c.T, 2*time.Second), []byte(key), []byte(value)); err != nil {
				c.Fatalf("put %d: %v", i, err)
			}
			c.acked[key] = value
			time.Sleep(20 * time.Millisecond)
		}
		time.Sleep(2 * time.Minute) // repair has seen everything by then
		c.mustPut("node1", "node3")
		c.wantNamed("node2", true)
		c.wantAll()
	})
}

// Behind by ten minutes it has seen versions from what it takes for the future, and
// stops, however few its peers are.
func TestClockBehindAmongThree(t *testing.T) {
	clockWorld(t, 27, 3, func(c *clocks) {
		c.mustPut("node1", "node2", "node3")
		c.w.SetClock("node2", -10*time.Minute)
		time.Sleep(3 * time.Second)
		c.wantNamed("node2", false)
		c.wantStopped("node2")
		c.mustPut("node1", "node3")
		c.wantAll()
		c.w.SetClock("node2", 0)
		time.Sleep(3 * time.Second)
		c.mustPut("node1", "node2", "node3")
		c.wantNamed("", true)
		c.wantAll()
	})
}

// Invariant 10: a node that is restarted with its clock set back continues above what
// it had issued, at once if that is near, else when its clock is there.
func TestRestartWithTheClockSetBack(t *testing.T) {
	for i, how := range []sim.Crash{sim.Kill, sim.PowerCut} {
		clockWorld(t, uint64(28+i), 3, func(c *clocks) {
			for range 20 {
				c.mustPut("node1", "node2", "node3")
			}
			c.w.Crash("node2", how)
			c.w.SetClock("node2", -100*time.Millisecond)
			c.w.Start("node2")
			time.Sleep(time.Second)
			for range 5 {
				c.mustPut("node2")
			}
			c.w.Crash("node2", how)
			c.w.SetClock("node2", -time.Hour)
			c.w.Start("node2")
			time.Sleep(time.Second)
			c.wantStopped("node2")
			c.mustPut("node1", "node3")
			c.w.SetClock("node2", 0)
			time.Sleep(time.Second)
			c.mustPut("node1", "node2", "node3")
			c.wantAll()
		})
	}
}
