package devcluster_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// topology returns what the control plane has agreed on.
func (r *rig) topology() *topology.Topology {
	r.t.Helper()
	var t *topology.Topology
	r.eventually(20*time.Second, func() string {
		for _, orch := range r.named(devcluster.RoleOrchestrator) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			resp, err := topologyv1.NewTopologyServiceClient(r.conn(orch)).GetTopology(ctx, &topologyv1.GetTopologyRequest{})
			cancel()
			if err != nil {
				continue
			}
			next, err := topology.FromProto(resp.GetTopology())
			if err != nil {
				return err.Error()
			}
			if t == nil || next.Epoch > t.Epoch {
				t = next
			}
		}
		if t == nil {
			return "no orchestrator has a topology"
		}
		return ""
	})
	return t
}

// addNodes starts more nodes, and returns their names.
func (r *rig) addNodes(n int) (names []string) {
	r.t.Helper()
	for range n {
		name, err := r.cluster.AddNode(context.Background(), "")
		if err != nil {
			r.t.Fatal(err)
		}
		names = append(names, name)
	}
	r.up(names...)
	return names
}

// begin starts the operation that leaves the ring even on the named nodes. It is
// planned anew while other changes come in between. Those of the others that are to be
// removed leave the cluster.
func (r *rig) begin(kind string, names []string, remove ...string) *topologyv1.Operation {
	r.t.Helper()
	var op *topologyv1.Operation
	r.eventually(20*time.Second, func() string {
		t := r.topology()
		plan := &topologyv1.Operation{Kind: kind, Title: "even over " + strings.Join(names, ", ")}
		var nodes []placement.Node
		for _, name := range names {
			n := t.Resolve(name)
			if n == nil {
				return name + " has not registered"
			}
			nodes = append(nodes, placement.Node{ID: n.Incarnation, Zone: n.Zone})
		}
		for _, name := range remove {
			plan.Remove = append(plan.Remove, t.Resolve(name).Incarnation)
		}
		var current placement.Assignment
		for _, v := range t.Ring {
			var slots []uint64
			for _, s := range v.Slots {
				slots = append(slots, s.Node)
			}
			current = append(current, slots)
		}
		next, err := placement.Even(current, nodes, []int{3})
		if err != nil {
			return err.Error()
		}
		for v := range next {
			for s, n := range next[v] {
				if from := current[v][s]; from != n {
					plan.Moves = append(plan.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(s), From: from, To: n})
				}
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		resp, err := r.control("orch1").StartOperation(ctx, &adminv1.StartOperationRequest{Epoch: t.Epoch, Operation: plan})
		if err != nil {
			return err.Error()
		}
		op = resp.GetOperation()
		return ""
	})
	return op
}

// operation returns how far an operation has come; nil while nobody can say.
func (r *rig) operation(id uint64) *adminv1.ObservedOperation {
	for _, orch := range r.named(devcluster.RoleOrchestrator) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		resp, err := r.control(orch).ListOperations(ctx, &adminv1.ListOperationsRequest{Id: id})
		cancel()
		if err == nil {
			return resp.GetOperations()[0]
		}
	}
	return nil
}

// left returns how many moves of an operation are not done.
func left(op *topologyv1.Operation) (n int) {
	for _, m := range op.GetMoves() {
		if !m.GetDone() {
			n++
		}
	}
	return n
}

// done waits for the end of an operation, calling each at every look.
func (r *rig) done(id uint64, within time.Duration, each func(*adminv1.ObservedOperation)) *topologyv1.Operation {
	r.t.Helper()
	var last *adminv1.ObservedOperation
	r.eventually(within, func() string {
		if op := r.operation(id); op != nil {
			last = op
		}
		if last == nil {
			return "nobody knows the operation"
		}
		if last.GetOperation().GetState() == topologyv1.Operation_STATE_DONE {
			return ""
		}
		if each != nil {
			each(last)
		}
		var waits []string
		for _, p := range last.GetMoving() {
			waits = append(waits, fmt.Sprintf("vnode %d: %s", p.GetMove().GetVnode(), p.GetWaitsFor()))
		}
		return fmt.Sprintf("%d of %d moves are left: %s", left(last.GetOperation()), len(last.GetOperation().GetMoves()), strings.Join(waits, "; "))
	})
	return last.GetOperation()
}

// even fails unless the ring is even over the named nodes.
func (r *rig) even(names []string) {
	r.t.Helper()
	t := r.topology()
	counts := t.SlotCounts(3)
	least, most := 1<<30, 0
	for _, name := range names {
		n := counts[t.Resolve(name).Incarnation]
		least, most = min(least, n), max(most, n)
	}
	if len(counts) != len(names) || most-least > 1 {
		r.t.Errorf("slots %v, want them even over %v", counts, names)
	}
	for v := range t.Ring {
		if t.Ring[v].Moving() >= 0 {
			r.t.Errorf("vnode %d is in transition: %+v", v, t.Ring[v])
		}
	}
}

// load is a steady load whose every answer is judged.
type load struct {
	t       *testing.T
	c       *client.Client
	pace    *rate.Limiter
	raised  time.Time
	stop    chan struct{}
	callers sync.WaitGroup
	done    atomic.Int64
	slowest time.Duration
	began   time.Time
	ended   sync.Once
	// last is, by caller and key, the value that was acknowledged last.
	last [][]int
	took struct { // since the last look
		sync.Mutex
		all []time.Duration
	}
}

var loadKeys = scale(50, 500)

func loadKey(caller, k int) []byte { return fmt.Appendf(nil, "load/%d/%d", caller, k) }

// loadOn puts and gets, so many operations a second, with default quorums and a
// deadline of 2 s (5 s in a short run, which has no machine to itself). Any failure fails
// the test, and so does any read that misses the caller's last write.
func loadOn(t *testing.T, c *client.Client, perSecond float64) *load {
	const callers = 64
	l := &load{t: t, c: c, pace: rate.NewLimiter(rate.Limit(perSecond), 64), stop: make(chan struct{}), began: time.Now(), last: make([][]int, callers)}
	t.Cleanup(l.halt) // where the test fails before it ends the load
	for i := range callers {
		l.last[i] = make([]int, loadKeys)
		l.callers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 7))
			for n := 1; ; n++ {
				select {
				case <-l.stop:
					return
				default:
				}
				if err := l.pace.Wait(context.Background()); err != nil {
					t.Error(err)
				}
				k := rng.IntN(loadKeys)
				began := time.Now()
				ctx, cancel := context.WithTimeout(context.Background(), scale(5*time.Second, 2*time.Second))
				if rng.IntN(2) == 0 {
					if _, err := c.Put(ctx, loadKey(i, k), []byte(strconv.Itoa(n))); err != nil {
						t.Errorf("put %s: %v", loadKey(i, k), err)
					} else {
						l.last[i][k] = n
					}
				} else {
					l.check(ctx, i, k)
				}
				cancel()
				l.note(time.Since(began))
			}
		})
	}
	return l
}

func (l *load) note(took time.Duration) {
	l.done.Add(1)
	l.took.Lock()
	defer l.took.Unlock()
	l.took.all = append(l.took.all, took)
	l.slowest = max(l.slowest, took)
}

// latencies returns how long operations have taken since the last call, in order.
func (l *load) latencies() []time.Duration {
	l.took.Lock()
	defer l.took.Unlock()
	out := l.took.all
	l.took.all = nil
	slices.Sort(out)
	return out
}

func (l *load) check(ctx context.Context, caller, k int) {
	v, err := l.c.Get(ctx, loadKey(caller, k))
	want := l.last[caller][k]
	if want == 0 && errors.Is(err, client.ErrNotFound) {
		return
	}
	if err != nil || string(v.Value) != strconv.Itoa(want) {
		l.t.Errorf("get %s = %q, %v; want %d", loadKey(caller, k), v.Value, err, want)
	}
}

func (l *load) halt() {
	l.ended.Do(func() { close(l.stop) })
	l.callers.Wait()
}

// end stops the load and reads everything once more.
func (l *load) end() {
	l.halt()
	took := time.Since(l.began)
	l.t.Logf("%d operations in %s, %.0f/s, the slowest took %s", l.done.Load(), took.Round(time.Second),
		float64(l.done.Load())/took.Seconds(), l.slowest.Round(time.Millisecond))
	const readers = 16 // one alone would take most of a short run's time
	var reading sync.WaitGroup
	for r := range readers {
		reading.Go(func() {
			for i := r; i < len(l.last); i += readers {
				for k := range loadKeys {
					l.check(context.Background(), i, k)
				}
			}
		})
	}
	reading.Wait()
}

// From three nodes to four, to eight (in full length) and back to three, under load: no
// operation fails, nothing is lost, the ring is even after each step, and no more is moved
// than has to be.
func TestE2ETheRingGrowsAndShrinks(t *testing.T) {
	besideOthers(t)
	r := startIn(t, 3, 1, 1)
	data := large{r: r, c: r.client(), keys: scale(5_000, 130_000), size: 4 << 10}
	began := time.Now()
	data.each(data.keys, data.put)
	stored := float64(data.keys * (data.size + 8)) // and what a record adds
	t.Logf("%.0f MB stored after %s", stored/1e6, time.Since(began).Round(time.Second))
	l := loadOn(t, data.c, scale[float64](400, 1200))
	three := []string{"node1", "node2", "node3"}
	names := slices.Clone(three)
	change := func(kind string, next []string, remove ...string) {
		t.Helper()
		began := time.Now()
		op := r.begin(kind, next, remove...)
		said := time.Now()
		seen := map[int]bool{}
		op = r.done(op.GetId(), scale(3*time.Minute, 15*time.Minute), func(o *adminv1.ObservedOperation) {
			seen[left(o.GetOperation())] = true
			if time.Since(said) > 5*time.Second {
				said = time.Now()
				t.Logf("  %d of %d moves left, %d MB moved", left(o.GetOperation()), len(o.GetOperation().GetMoves()), o.GetOperation().GetMovedBytes()>>20)
			}
		})
		least := 3 * stored * float64(len(op.GetMoves())) / float64(3*r.topology().Vnodes)
		t.Logf("%d nodes: %d moves, %.0f MB, %.3f of what they have to be, in %s", len(next), len(op.GetMoves()), float64(op.GetMovedBytes())/1e6,
			float64(op.GetMovedBytes())/least, time.Since(began).Round(time.Second))
		if moved := float64(op.GetMovedBytes()); moved > 1.1*least || moved < 0.9*least {
			t.Errorf("%.0f bytes were moved, of at least %.0f", moved, least)
		}
		if len(seen) < 4 {
			t.Errorf("of the progress no more was seen than %v", seen)
		}
		r.even(next)
	}
	names = append(names, r.addNodes(1)...)
	change("apply", names)
	if full {
		names = append(names, r.addNodes(4)...)
		change("apply", names)
	}
	change("decommission", three, names[3:]...)
	if got := len(r.topology().Nodes); got != 3 {
		t.Errorf("%d nodes are left", got)
	}
	l.end()
	data.each(data.keys, func(i int) error {
		v, err := data.c.Get(context.Background(), data.key(i))
		if err == nil && !bytes.Equal(v.Value, data.value(i)) {
			err = errors.New("a wrong value")
		}
		return err
	})
}

// counter returns the value of one of a process's counters.
func (r *rig) counter(name, metric string) float64 {
	r.t.Helper()
	i := slices.IndexFunc(r.status(), func(p devcluster.Status) bool { return p.Name == name })
	resp, err := http.Get("http://" + r.status()[i].AdminAddr + "/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), metric+" "); ok {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				r.t.Fatal(err)
			}
			return v
		}
	}
	r.t.Fatalf("%s has no counter %s", name, metric)
	return 0
}

// Kills of senders, of the receiver and of the orchestrators' leader in the middle of
// moves: what was under way goes on where it was, little is sent again, and it ends as
// planned, without a failed operation.
func TestE2EKillsInTheMiddleOfMoves(t *testing.T) {
	if !full {
		t.Skip("in make e2e; the simulation kills in the middle of moves in every run")
	}
	r := startIn(t, 3, 3, 1)
	data := large{r: r, c: r.client(), keys: scale(5_000, 130_000), size: 4 << 10}
	data.each(data.keys, data.put)
	l := loadOn(t, data.c, 200)
	names := append([]string{"node1", "node2", "node3"}, r.addNodes(1)...)
	op := r.begin("apply", names)
	taken := 0.0 // by runs of the receiver that were ended
	kills := []func(){
		func() { r.restart(names[r.rng.IntN(3)]) },
		func() {
			taken += r.counter("node4", "kvasir_fill_bytes_total")
			r.restart("node4")
		},
		func() { r.restart(r.leader()) },
	}
	rounds := 0
	op = r.done(op.GetId(), scale(4*time.Minute, 15*time.Minute), func(o *adminv1.ObservedOperation) {
		moves := len(o.GetOperation().GetMoves())
		if left(o.GetOperation()) > moves-moves*(rounds+1)/12 || rounds == 9 {
			return // the next kill comes a little later
		}
		kills[rounds%3]()
		rounds++
	})
	if rounds < 9 {
		t.Errorf("%d kills in the middle", rounds)
	}
	r.even(names)
	l.end()
	taken += r.counter("node4", "kvasir_fill_bytes_total")
	stored := float64(data.keys * (data.size + 8))
	least := 3 * stored * float64(len(op.GetMoves())) / float64(3*r.topology().Vnodes)
	t.Logf("%.0f MB were sent, of at least %.0f", taken/1e6, least/1e6)
	if taken > 1.1*least {
		t.Errorf("%.0f bytes were sent, more than a tenth above %.0f", taken, least)
	}
	r.equal(data, 3, names)
}

// restart kills a process and starts it again.
func (r *rig) restart(name string) {
	r.t.Helper()
	r.kill(name)
	time.Sleep(time.Duration(r.rng.IntN(1000)) * time.Millisecond)
	r.up(name)
}

// equal fails unless every replica's own copy of all data is what was stored.
func (r *rig) equal(data large, n int, names []string) {
	r.t.Helper()
	top := r.topology()
	owners := map[string]map[uint32]bool{}
	for _, name := range names {
		owners[name] = map[uint32]bool{}
		for v := range top.Ring {
			owners[name][uint32(v)] = top.Owns(top.Resolve(name).Incarnation, uint32(v), n)
		}
	}
	for _, name := range names {
		r.eventually(time.Minute, func() string {
			var wrong atomic.Int64
			data.each(data.keys, func(i int) error {
				if !owners[name][top.VnodeOf(data.key(i))] {
					return nil
				}
				v, err := data.c.Get(context.Background(), data.key(i), client.FromReplica(name))
				if errors.Is(err, client.ErrNotFound) || err == nil && !bytes.Equal(v.Value, data.value(i)) {
					wrong.Add(1)
					return nil
				}
				return err
			})
			if n := wrong.Load(); n > 0 {
				return fmt.Sprintf("%s's own copies of %d keys are not what they have to be", name, n)
			}
			return ""
		})
	}
}

// A node that died for good is replaced by a spare: full redundancy again, all replicas
// equal. Started again with its old data directory, it is turned away.
func TestE2EADeadNodeIsReplaced(t *testing.T) {
	besideOthers(t)
	r := start(t, 4, 1)
	data := large{r: r, c: r.client(), keys: scale(5_000, 50_000), size: 1 << 10}
	data.each(data.keys, data.put)
	l := loadOn(t, data.c, 200)
	dead := "node" + strconv.Itoa(1+r.rng.IntN(4))
	spare := r.addNodes(1)[0]
	r.kill(dead)
	r.eventually(30*time.Second, func() string {
		resp, err := r.control("orch1").GetClusterStatus(context.Background(), &adminv1.GetClusterStatusRequest{})
		if err != nil {
			return err.Error()
		}
		inc := r.topology().Resolve(dead).Incarnation
		for _, n := range resp.GetNodes() {
			if h := n.GetHealth(); h.GetIncarnation() == inc && h.GetState() == topologyv1.NodeHealth_STATE_UNHEALTHY {
				return ""
			}
		}
		return dead + " is not known to be dead"
	})
	op := r.replace(dead, spare)
	r.done(op.GetId(), 4*time.Minute, nil)
	top := r.topology()
	if top.Resolve(dead) != nil {
		t.Errorf("%s is still a node", dead)
	}
	l.end()
	var names []string
	for _, n := range top.Nodes {
		names = append(names, n.Name)
	}
	r.equal(data, 3, names)
	if _, err := r.cluster.Start(context.Background(), dead); err != nil {
		t.Fatal(err)
	}
	r.eventually(30*time.Second, func() string {
		b, err := os.ReadFile(r.cluster.LogPath(dead))
		if err != nil || !strings.Contains(string(b), "start the node with an empty data directory to join again") {
			return fmt.Sprintf("%s is not told that it was removed: %v", dead, err)
		}
		return ""
	})
}

// replace starts the operation that gives a node's slots to a spare.
func (r *rig) replace(old, spare string) *topologyv1.Operation {
	r.t.Helper()
	var op *topologyv1.Operation
	r.eventually(20*time.Second, func() string {
		t := r.topology()
		from, to := t.Resolve(old), t.Resolve(spare)
		plan := &topologyv1.Operation{Kind: "replace", Title: spare + " for " + old, Remove: []uint64{from.Incarnation}}
		for v := range t.Ring {
			for s, slot := range t.Ring[v].Slots {
				if slot.Node == from.Incarnation {
					plan.Moves = append(plan.Moves, &topologyv1.Move{Vnode: uint32(v), Slot: uint32(s), From: from.Incarnation, To: to.Incarnation})
				}
			}
		}
		resp, err := r.control("orch1").StartOperation(context.Background(), &adminv1.StartOperationRequest{Epoch: t.Epoch, Operation: plan})
		if err != nil {
			return err.Error()
		}
		op = resp.GetOperation()
		return ""
	})
	return op
}

// N of a namespace goes from 3 to 5 and back under load: no operation fails, nothing is
// lost, and each time the replicas that are to have the records have them.
func TestE2ENChangesUnderLoad(t *testing.T) {
	besideOthers(t)
	r := startIn(t, 5, 1, 1)
	data := large{r: r, c: r.client(), keys: scale(3_000, 50_000), size: 1 << 10}
	data.each(data.keys, data.put)
	l := loadOn(t, data.c, 200)
	for _, n := range []uint32{5, 3} {
		began := time.Now()
		resp, err := r.control("node1").UpdateNamespace(context.Background(), &adminv1.UpdateNamespaceRequest{Name: "default", Settings: &adminv1.NamespaceSettings{N: &n}})
		if err != nil {
			t.Fatal(err)
		}
		r.done(resp.GetOperation().GetId(), scale(3*time.Minute, 10*time.Minute), nil)
		t.Logf("N=%d after %s", n, time.Since(began).Round(time.Second))
		top := r.topology()
		if ns := top.Namespace("default"); ns.N != int(n) || ns.AlsoN != 0 {
			t.Fatalf("namespace %+v", ns)
		}
		r.equal(data, int(n), r.named(devcluster.RoleData))
	}
	l.end()
}
