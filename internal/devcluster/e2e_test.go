package devcluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// With 16 callers and deadlines of 2 s every node is killed and restarted in turn,
// the client's first endpoint included. No operation fails, and what was written
// meanwhile gets to the returned node's own copy.
func TestE2EKillsInTurnFailNothing(t *testing.T) {
	r := start(t, 3, 1)
	c := r.client()
	length, least := scale(9*time.Second, 62*time.Second), scale(int64(10_000), int64(100_000))
	var done atomic.Int64
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for i := range 16 {
		callers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				key, value := fmt.Sprintf("%d/%d", i, n%50), strconv.Itoa(n)
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				if _, err := c.Put(ctx, []byte(key), []byte(value)); err != nil {
					t.Errorf("put %s: %v", key, err)
				}
				cancel()
				ctx, cancel = context.WithTimeout(context.Background(), 2*time.Second)
				if v, err := c.Get(ctx, []byte(key)); err != nil || string(v.Value) != value {
					t.Errorf("get %s = %q, %v; want %s", key, v.Value, err, value)
				}
				cancel()
				done.Add(2)
			}
		})
	}
	began := time.Now()
	for round := 0; time.Since(began) < length || done.Load() < least; round++ {
		for _, name := range r.named(devcluster.RoleData) {
			r.kill(name)
			time.Sleep(scale(700*time.Millisecond, 2*time.Second)) // load goes on without it
			r.up(name)
			time.Sleep(scale(700*time.Millisecond, 2*time.Second)) // and with it
		}
		if t.Failed() || round > 100 {
			break
		}
	}
	close(stop)
	callers.Wait()
	t.Logf("%d operations in %s", done.Load(), time.Since(began).Round(time.Second))
	for i := range 16 {
		for k := range 50 {
			key := fmt.Sprintf("%d/%d", i, k)
			want, err := c.Get(context.Background(), []byte(key))
			if err != nil {
				t.Fatal(err)
			}
			for _, node := range r.named(devcluster.RoleData) {
				r.eventually(20*time.Second, func() string {
					own, err := c.Get(context.Background(), []byte(key), client.FromReplica(node))
					if err != nil || string(own.Value) != string(want.Value) {
						return fmt.Sprintf("%s's own copy of %s is %q, %v; want %q", node, key, own.Value, err, want.Value)
					}
					return ""
				})
			}
		}
	}
}

// With every orchestrator dead: writes and reads go on, a new client connects, a
// node restarts and serves; also after kill −9 of all nodes.
func TestE2EWithoutOrchestrators(t *testing.T) {
	besideOthers(t)
	r := start(t, 3, 3)
	c := r.client()
	ctx := context.Background()
	put := func(c *client.Client, key, value string) {
		t.Helper()
		if _, err := c.Put(ctx, []byte(key), []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(c *client.Client, key, value string) {
		t.Helper()
		if v, err := c.Get(ctx, []byte(key)); err != nil || string(v.Value) != value {
			t.Fatalf("get %s = %q, %v; want %q", key, v.Value, err, value)
		}
	}
	put(c, "before", "1")
	r.kill(r.named(devcluster.RoleOrchestrator)...)
	put(c, "during", "2")
	want(c, "before", "1")
	fresh := r.client()
	want(fresh, "during", "2")
	r.kill("node2")
	put(fresh, "during", "3")
	r.up("node2")
	second, err := client.New(ctx, []string{r.endpoints()[1]})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	want(second, "during", "3")
	r.kill(r.named(devcluster.RoleData)...)
	r.up(r.named(devcluster.RoleData)...)
	again := r.client()
	want(again, "before", "1")
	want(again, "during", "3")
	put(again, "after", "4")
	want(again, "after", "4")
}

// Five nodes, N=5, W=40%, one node paused: two acknowledgements, the answer, two
// late ones, and a hint for the fifth.
func TestE2ETraceWithAPausedNode(t *testing.T) {
	r := start(t, 5, 1)
	if _, err := r.control("node1").CreateNamespace(context.Background(), &adminv1.CreateNamespaceRequest{
		Name: "wide", Settings: &adminv1.NamespaceSettings{N: ptr(uint32(5))},
	}); err != nil {
		t.Fatal(err)
	}
	c := r.client(client.WithNamespace("wide"))
	if _, err := c.Put(context.Background(), []byte("k"), []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := r.cluster.Pause(context.Background(), "node5"); err != nil {
		t.Fatal(err)
	}
	// Keys until one is coordinated by a node that runs, which the first may not be.
	receipt, err := c.Put(context.Background(), []byte("k"), []byte("v"), client.W("40%"), client.Traced())
	if err != nil {
		t.Fatal(err)
	}
	if receipt.Needed != 2 || receipt.N != 5 {
		t.Errorf("receipt %+v", receipt)
	}
	events, complete, err := c.Trace(context.Background(), receipt, 5*time.Second)
	if err != nil || !complete {
		t.Fatalf("complete %v, %v", complete, err)
	}
	count := map[string]int{}
	var order []string
	for _, e := range events {
		if e.Kind == "hint" && e.Node != "node5" {
			t.Errorf("a hint for %s", e.Node)
		}
		count[e.Kind]++
		order = append(order, e.Kind)
	}
	if count["acknowledged"]+count["late"] != 4 || count["acknowledged"] < 2 || count["hint"] != 1 || count["answered"] != 1 {
		t.Errorf("events %v", order)
	}
}

// Keys made stale on one replica, overwritten and deleted, with hints off: reads
// mend them, blocking and asynchronous.
func TestE2EReadsMendAStaleReplica(t *testing.T) {
	r := start(t, 3, 1)
	if _, err := r.control("node1").CreateNamespace(context.Background(), &adminv1.CreateNamespaceRequest{
		Name: "nohints", Settings: &adminv1.NamespaceSettings{Hints: ptr(false)},
	}); err != nil {
		t.Fatal(err)
	}
	c := r.client(client.WithNamespace("nohints"))
	ctx := context.Background()
	const keys = 1000
	key := func(i int) []byte { return fmt.Appendf(nil, "k%04d", i) }
	all := func(f func(i int)) {
		var wg sync.WaitGroup
		for w := range 16 {
			wg.Go(func() {
				for i := w; i < keys; i += 16 {
					f(i)
				}
			})
		}
		wg.Wait()
	}
	all(func(i int) {
		if _, err := c.Put(ctx, key(i), []byte("old"), client.W("all")); err != nil {
			t.Error(err)
		}
	})
	// pause stops node3 and waits until it is known to be gone: what is sent before
	// waits in its sockets for it to come back.
	pause := func() {
		t.Helper()
		if err := r.cluster.Pause(ctx, "node3"); err != nil {
			t.Fatal(err)
		}
		r.eventually(10*time.Second, func() string {
			if _, err := c.Put(ctx, []byte("probe"), nil, client.W("all"), client.WithoutRetries()); errors.Is(err, client.ErrUnavailable) && !errors.Is(err, client.ErrOutcomeUnknown) {
				return ""
			}
			return "node3 still counts as live"
		})
	}
	pause()
	all(func(i int) {
		var err error
		if i%2 == 0 {
			_, err = c.Put(ctx, key(i), []byte("new"))
		} else {
			_, err = c.Delete(ctx, key(i))
		}
		if err != nil {
			t.Error(err)
		}
	})
	if err := r.cluster.Resume(ctx, "node3"); err != nil {
		t.Fatal(err)
	}
	own := func(i int) string {
		v, err := c.Get(ctx, key(i), client.FromReplica("node3"))
		if errors.Is(err, client.ErrNotFound) {
			return "deleted"
		}
		if err != nil {
			return err.Error()
		}
		return string(v.Value)
	}
	r.eventually(10*time.Second, func() string {
		if _, err := c.Put(ctx, []byte("probe"), nil, client.W("all")); err != nil {
			return err.Error()
		}
		return ""
	})
	stale := 0
	for i := range keys {
		if own(i) == "old" {
			stale++
		}
	}
	if stale != keys {
		t.Fatalf("%d of %d keys are stale on node3, the test needs all", stale, keys)
	}
	want := func(i int) string { return []string{"new", "deleted"}[i%2] }
	all(func(i int) {
		mode := client.RepairBlocking
		if i >= keys/2 {
			mode = client.RepairAsync
		}
		// R=all meets node3 for certain.
		v, err := c.Get(ctx, key(i), client.R("all"), client.Repair(mode))
		if got := string(v.Value); err == nil && got != want(i) || err != nil && (want(i) != "deleted" || !errors.Is(err, client.ErrNotFound)) {
			t.Errorf("get %d = %q, %v", i, got, err)
		}
	})
	for i := range keys {
		r.eventually(5*time.Second, func() string {
			if got := own(i); got != want(i) {
				return fmt.Sprintf("node3's own copy of key %d is %s, want %s", i, got, want(i))
			}
			return ""
		})
	}
	// The trace shows a repair.
	pause()
	if _, err := c.Put(ctx, key(0), []byte("newer")); err != nil {
		t.Fatal(err)
	}
	if err := r.cluster.Resume(ctx, "node3"); err != nil {
		t.Fatal(err)
	}
	r.eventually(10*time.Second, func() string {
		v, err := c.Get(ctx, key(0), client.R("all"), client.Traced())
		if err != nil {
			return err.Error()
		}
		events, _, err := c.Trace(ctx, v.Receipt, 5*time.Second)
		if err != nil {
			return err.Error()
		}
		kinds := map[string]string{}
		for _, e := range events {
			kinds[e.Kind] += e.Node
		}
		if kinds["stale"] != "node3" || kinds["repair"] != "node3" {
			t.Fatalf("events %v", events)
		}
		return ""
	})
}

// Three orchestrators, the leader killed under namespace changes: a new one within
// 5 s, nothing lost.
func TestE2ELeaderKilledUnderChanges(t *testing.T) {
	r := start(t, 3, 3)
	ctl := r.control("node1")
	made := map[string]bool{}
	create := func(name string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := ctl.CreateNamespace(ctx, &adminv1.CreateNamespaceRequest{Name: name})
		if err == nil || rpc.AsError(err).Reason == "NAMESPACE_EXISTS" {
			made[name] = true
			return nil
		}
		return err
	}
	for round := range scale(2, 6) {
		for i := range 5 {
			if err := create(fmt.Sprintf("ns-%d-%d", round, i)); err != nil {
				t.Fatal(err)
			}
		}
		leader := r.leader()
		r.kill(leader)
		killed := time.Now()
		r.eventually(15*time.Second, func() string {
			if err := create(fmt.Sprintf("after-%d", round)); err != nil {
				return err.Error()
			}
			return ""
		})
		took := time.Since(killed)
		t.Logf("%s was killed, the next change was made after %s", leader, took.Round(time.Millisecond))
		if took > 5*time.Second {
			t.Errorf("no new leader within 5 s: %s", took)
		}
		r.up(leader)
	}
	status, err := ctl.GetClusterStatus(context.Background(), &adminv1.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name := range made {
		if !slices.ContainsFunc(status.GetTopology().GetNamespaces(), func(n *topologyv1.Namespace) bool { return n.GetName() == name }) {
			t.Errorf("namespace %s is lost", name)
		}
	}
}

// Random processes are killed during acknowledged writes: none is lost.
func TestE2ERandomKillsLoseNothing(t *testing.T) {
	r := start(t, 3, 3)
	c := r.client()
	kills, least := scale(8, 50), scale(int64(5_000), int64(200_000))
	type last struct{ acked, tried int }
	const writers, keys = 16, 40
	state := make([][keys]last, writers)
	var acked, unacked atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := 1; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				l := &state[w][n%keys]
				l.tried = n
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				_, err := c.Put(ctx, fmt.Appendf(nil, "%d/%d", w, n%keys), strconv.AppendInt(nil, int64(n), 10))
				cancel()
				if err == nil {
					l.acked = n
					acked.Add(1)
				} else {
					unacked.Add(1)
				}
			}
		})
	}
	names := append(r.named(devcluster.RoleData), r.named(devcluster.RoleOrchestrator)...)
	killed := 0
	for killed < kills || acked.Load() < least {
		victims := []string{names[r.rng.IntN(len(names))]}
		if r.rng.IntN(4) == 0 {
			victims = append(victims, names[r.rng.IntN(len(names))])
		}
		slices.Sort(victims)
		victims = slices.Compact(victims)
		r.kill(victims...)
		killed += len(victims)
		time.Sleep(time.Duration(r.rng.IntN(600)) * time.Millisecond)
		if _, err := r.cluster.Start(context.Background(), victims...); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(200+r.rng.IntN(600)) * time.Millisecond)
		if killed > 1000 {
			t.Fatalf("%d kills and only %d writes", killed, acked.Load())
		}
	}
	close(stop)
	wg.Wait()
	r.up()
	lost := 0
	for w := range writers {
		for k := range keys {
			l := state[w][k]
			if l.acked == 0 {
				continue
			}
			v, err := c.Get(context.Background(), fmt.Appendf(nil, "%d/%d", w, k))
			got, _ := strconv.Atoi(string(v.Value))
			if err != nil || got < l.acked || got > l.tried {
				lost++
				t.Errorf("key %d/%d = %q, %v; acknowledged %d, tried %d", w, k, v.Value, err, l.acked, l.tried)
			}
		}
	}
	t.Logf("%d kills, %d acknowledged writes, %d not acknowledged, %d lost", killed, acked.Load(), unacked.Load(), lost)
}

// What is exported is what was imported, row by row, up to order.
func TestE2EExportEqualsImport(t *testing.T) {
	besideOthers(t)
	r := start(t, 3, 1)
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	rows := packageIndex(t)
	if rows == nil {
		for i := range scale(5_000, 60_000) {
			rows = append(rows, fmt.Sprintf("package-%d\t%d.%d\tdescription of %d, with \"quotes\" and ünïcode\t%d", i, i%7, i%11, i, i*i))
		}
	}
	file := filepath.Join(t.TempDir(), "rows.tsv")
	if err := os.WriteFile(file, []byte(strings.Join(rows, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	kvctl := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(bin, "kvctl"), append([]string{"--endpoints", strings.Join(r.endpoints(), ",")}, args...)...)
		var talk strings.Builder
		cmd.Stderr = &talk
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("kvctl %v: %v\n%s", args, err, talk.String())
		}
		t.Logf("kvctl %s: %s", args[0], strings.TrimSpace(talk.String()))
		return string(out)
	}
	kvctl("import", file, "--format", "tsv", "--key-column", "1")
	kvctl("import", file, "--format", "tsv", "--key-column", "1") // again is safe
	got := strings.Split(strings.TrimSuffix(kvctl("export", "--format", "tsv", "--key-column", "1"), "\n"), "\n")
	slices.Sort(rows)
	slices.Sort(got)
	if !slices.Equal(rows, got) {
		t.Errorf("%d rows went in, %d other ones came out", len(rows), len(got))
	}
	t.Logf("%d rows", len(rows))
}

// packageIndex returns Debian's package index as rows of name, version, section and
// description, in a full run on a machine that has one.
func packageIndex(t *testing.T) (rows []string) {
	if !full {
		return nil
	}
	out, err := exec.Command("apt-cache", "dumpavail").Output()
	if err != nil {
		t.Logf("no package index here: %v", err)
		return nil
	}
	seen := map[string]bool{}
	for stanza := range strings.SplitSeq(string(out), "\n\n") {
		fields := map[string]string{}
		for line := range strings.SplitSeq(stanza, "\n") {
			if name, value, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, " ") {
				fields[name] = value
			}
		}
		name := fields["Package"]
		if name == "" || seen[name] {
			continue
		}
		seen[name] = true
		rows = append(rows, strings.Join([]string{name, fields["Version"], fields["Section"], fields["Description"]}, "\t"))
	}
	return rows
}
