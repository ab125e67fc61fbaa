package sim_test

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/sim"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// writers each count up on keys of their own, and check after every write that what
// was acknowledged is read, and that what is read never goes back.
type writers struct {
	c    *client.Client
	stop chan struct{}
	wg   sync.WaitGroup
	done atomic.Int64
	// failed counts operations that failed.
	failed atomic.Int64
	// acked holds what was acknowledged last, by key, once the writers have ended.
	mu    sync.Mutex
	acked map[string]int
}

const (
	writerCount = 6
	writerKeys  = 40
)

func startWriters(t *testing.T, w *sim.World) *writers {
	l := &writers{c: w.Client(), stop: make(chan struct{}), acked: map[string]int{}}
	for i := range writerCount {
		l.wg.Go(func() {
			seen, acked := map[string]int{}, map[string]int{}
			defer func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				maps.Copy(l.acked, acked)
			}()
			for n := 1; ; n++ {
				select {
				case <-l.stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
				key := fmt.Sprintf("%d/%d", i, n%writerKeys)
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
				if _, err := l.c.Put(ctx, []byte(key), strconv.AppendInt(nil, int64(n), 10)); err != nil {
					l.failed.Add(1)
					t.Logf("put %s: %v", key, err)
				} else {
					acked[key] = n
				}
				v, err := l.c.Get(ctx, []byte(key))
				cancel()
				l.done.Add(2)
				if err != nil {
					l.failed.Add(1)
					t.Logf("get %s: %v", key, err)
					continue
				}
				got, err := strconv.Atoi(string(v.Value))
				if err != nil || got < seen[key] || got < acked[key] {
					t.Errorf("read %s = %q (%v) after %d was read and %d acknowledged", key, v.Value, err, seen[key], acked[key])
				}
				seen[key] = got
			}
		})
	}
	return l
}

// end stops the writers, waits until the replicas have had time to become equal, and
// checks that they are, with all that was acknowledged.
func (l *writers) end(t *testing.T, nodes int, mayFail int64) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	defer l.c.Close()
	if failed := l.failed.Load(); failed > mayFail {
		t.Errorf("%d of %d operations failed, more than %d", failed, l.done.Load(), mayFail)
	}
	time.Sleep(90 * time.Second)
	for key, n := range l.acked {
		v, err := l.c.Get(context.Background(), []byte(key))
		if err != nil {
			t.Fatalf("get %s: %v", key, err)
		}
		if got, _ := strconv.Atoi(string(v.Value)); got < n {
			t.Errorf("%s = %q, but %d was acknowledged", key, v.Value, n)
		}
		have := 0
		for i := range nodes {
			own, err := l.c.Get(context.Background(), []byte(key), client.FromReplica(fmt.Sprint("node", i+1)))
			if err != nil && strings.Contains(err.Error(), "holds no replica of the key") {
				continue
			}
			if err != nil || string(own.Value) != string(v.Value) {
				t.Errorf("node%d has %s = %q, %v; the others %q", i+1, key, own.Value, err, v.Value)
			}
			have++
		}
		if have != 3 {
			t.Errorf("%d nodes have %s, want 3", have, key)
		}
	}
}

// replaced waits until a node's successor has all its slots and the old one is gone.
func replaced(t *testing.T, w *sim.World, name string, old uint64, within time.Duration) {
	t.Helper()
	began := time.Now()
	for {
		top := agreed(t, w.Control("node1"))
		n := top.Resolve(name)
		if n.Incarnation != old && top.Node(old) == nil && len(top.Incoming(n.Incarnation)) == 0 && top.SlotCounts(3)[n.Incarnation] > 0 {
			t.Logf("%s was replaced after %s", name, time.Since(began))
			return
		}
		if time.Since(began) > within {
			t.Fatalf("%s is not replaced within %s: %+v, incoming on %d vnodes; %s", name, within, top.Nodes, len(top.Incoming(n.Incarnation)), waits(t, w, name))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// waits says what a node is filled with and why that does not go on.
func waits(t *testing.T, w *sim.World, name string) string {
	resp, err := adminv1.NewStatusServiceClient(w.Conn(name)).GetNodeStatus(timeout(t, time.Second), &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, f := range resp.GetStatus().GetFillings() {
		out = append(out, fmt.Sprintf("%d (%v): %s", f.GetVnode(), f.GetComplete(), f.GetWaitsFor()))
	}
	return fmt.Sprintf("epoch %d, fillings %s", resp.GetStatus().GetEpoch(), strings.Join(out, "; "))
}

// A node whose data directory is deleted under load comes back by being started, as
// a new incarnation with all the old one held, and no operation fails.
func TestWipedNodeIsReplaced(t *testing.T) {
	for _, nodes := range []int{3, 5} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			world(t, sim.Config{Seed: 60 + uint64(nodes), Nodes: nodes, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
				old := incarnation(t, w, "node3")
				l := startWriters(t, w)
				time.Sleep(5 * time.Second)
				before := w.CopyDisk("node3")
				w.Crash("node3", sim.Kill)
				w.Wipe("node3")
				w.Start("node3") // before anybody has noticed
				replaced(t, w, "node3", old, 30*time.Second)
				time.Sleep(5 * time.Second)
				l.end(t, nodes, 0)

				current := w.CopyDisk("node3")
				w.Stop("node3")
				w.SetDisk("node3", before)
				if err := w.TryStart("node3"); err == nil || !strings.Contains(err.Error(), "not part of this cluster any more") {
					t.Errorf("the old directory is put back: %v", err)
				}
				w.SetDisk("node3", current)
				if err := w.TryStart("node3"); err != nil {
					t.Errorf("the new one: %v", err)
				}
				hist, err := w.Control("node1").ListChanges(context.Background(), &adminv1.ListChangesRequest{Name: "node3"})
				if err != nil {
					t.Fatal(err)
				}
				var said []string
				for _, c := range hist.GetChanges() {
					said = append(said, c.GetWhat())
				}
				for _, what := range []string{"takes the place of", "has been filled and votes", "removed"} {
					if !strings.Contains(strings.Join(said, "\n"), what) {
						t.Errorf("the history does not say %q: %q", what, said)
					}
				}
			})
		})
	}
}

// moment waits for a moment of a replacement.
func moment(t *testing.T, w *sim.World, name string, is func(old, now *topology.Node, top *topology.Topology) bool, old uint64) {
	t.Helper()
	for range 6000 {
		top := agreed(t, w.Control("node1"))
		if now := top.Resolve(name); now.Incarnation != old && is(top.Node(old), now, top) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("the moment never comes; %s", waits(t, w, name))
}

func begun(_, now *topology.Node, top *topology.Topology) bool {
	return len(top.Incoming(now.Incarnation)) > 0
}

// The leader dies in every phase; the next one goes on from there.
func TestLeaderDiesDuringAReplacement(t *testing.T) {
	for name, is := range map[string]func(old, now *topology.Node, top *topology.Topology) bool{
		"admitted": func(_, now *topology.Node, _ *topology.Topology) bool { return now != nil },
		"begun":    begun,
		"filled": func(_, now *topology.Node, top *topology.Topology) bool {
			return len(top.Incoming(now.Incarnation)) == 0 && top.SlotCounts(3)[now.Incarnation] > 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			world(t, sim.Config{Seed: 70, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
				old := incarnation(t, w, "node3")
				l := startWriters(t, w)
				time.Sleep(3 * time.Second)
				w.Crash("node3", sim.Kill)
				w.Wipe("node3")
				go w.Start("node3")
				moment(t, w, "node3", is, old)
				dead := leader(t, w)
				w.Crash(dead, sim.Kill)
				replaced(t, w, "node3", old, 30*time.Second)
				w.Start(dead)
				time.Sleep(3 * time.Second)
				l.end(t, 3, 0)
			})
		})
	}
}

// The newcomer dies while it is being filled: it goes on where it was; with its disk
// it is replaced in turn.
func TestNewcomerDiesDuringAReplacement(t *testing.T) {
	for _, wipe := range []bool{false, true} {
		t.Run(fmt.Sprint("wiped=", wipe), func(t *testing.T) {
			world(t, sim.Config{Seed: 71, Nodes: 3, Orchestrators: 3, Vnodes: 64}, func(t *testing.T, w *sim.World) {
				old := incarnation(t, w, "node3")
				l := startWriters(t, w)
				time.Sleep(3 * time.Second)
				w.Crash("node3", sim.Kill)
				w.Wipe("node3")
				w.Start("node3")
				moment(t, w, "node3", begun, old)
				first := incarnation(t, w, "node3")
				w.Crash("node3", sim.PowerCut)
				if wipe {
					w.Wipe("node3")
				}
				w.Start("node3")
				replaced(t, w, "node3", old, 60*time.Second)
				if again := incarnation(t, w, "node3"); (again != first) != wipe {
					t.Errorf("the newcomer was #%d, is #%d", first, again)
				}
				time.Sleep(3 * time.Second)
				l.end(t, 3, 0)
			})
		})
	}
}

// A source dies while the newcomer is being filled: with too few others it waits, says
// what for, and goes on when the source is back; nothing becomes a voter before.
func TestSourceDiesDuringAReplacement(t *testing.T) {
	world(t, sim.Config{Seed: 72, Nodes: 3, Orchestrators: 3}, func(t *testing.T, w *sim.World) {
		old := incarnation(t, w, "node3")
		l := startWriters(t, w)
		time.Sleep(3 * time.Second)
		w.Crash("node3", sim.Kill)
		w.Wipe("node3")
		w.Start("node3")
		moment(t, w, "node3", begun, old)
		w.Crash("node2", sim.Kill)
		time.Sleep(20 * time.Second)
		top := agreed(t, w.Control("node1"))
		if left := len(top.Incoming(incarnation(t, w, "node3"))); left > 0 {
			if said := waits(t, w, "node3"); !strings.Contains(said, "node2 is down") && !strings.Contains(said, "(true)") {
				t.Errorf("with %d vnodes to go it says %s", left, said)
			}
		}
		w.Start("node2")
		replaced(t, w, "node3", old, 60*time.Second)
		time.Sleep(3 * time.Second)
		l.end(t, 3, l.done.Load()) // with two nodes away many operations fail
	})
}
