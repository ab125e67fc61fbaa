package consensus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func TestLeaderCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, Config{})
		defer c.stop()
		c.mustPropose(1, 20)
		old := c.leader()
		if s := c.members[old].r.Status(); s.State != "leader" || s.Leader != old || s.Term < 2 || s.Applied < 20 || s.LastContact != time.Now() {
			t.Errorf("status of the leader: %+v", s)
		}
		began := time.Now()
		c.crash(old)
		c.mustPropose(21, 40)
		t.Logf("a command succeeded %v after the leader crashed", time.Since(began))
		next := c.leader()
		c.start(old)
		if got := c.waitEqual(); !slices.Equal(got, numbers(1, 40)) {
			t.Errorf("commands %v", got)
		}
		r := c.members[old].r
		if name, ok := r.Leader(); name != next || !ok {
			t.Errorf("leader of %s is %q, want %s", old, name, next)
		}
		if s := r.Status(); s.State != "follower" || s.Leader != next || time.Since(s.LastContact) > time.Second {
			t.Errorf("status of a follower: %+v", s)
		}
		ctx := context.Background()
		if _, err := r.Propose(ctx, []byte("x")); err != ErrNotLeader {
			t.Errorf("Propose on a follower: %v", err)
		}
		if err := r.Barrier(ctx); err != ErrNotLeader {
			t.Errorf("Barrier on a follower: %v", err)
		}
		if err := r.VerifyLeader(ctx); err != ErrNotLeader {
			t.Errorf("VerifyLeader on a follower: %v", err)
		}
	})
}

// With the default timeouts a new leader accepts commands soon after the old one
// was killed.
func TestFailoverTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2, Config{})
		defer c.stop()
		var worst, sum time.Duration
		const rounds = 100
		for i := range rounds {
			old := c.leader()
			time.Sleep(time.Duration(c.rng.Int64N(int64(2 * time.Second))))
			began := time.Now()
			c.crash(old)
			c.mustPropose(i, i)
			took := time.Since(began)
			worst, sum = max(worst, took), sum+took
			c.start(old)
			c.waitEqual()
		}
		t.Logf("of %d failovers the mean took %v, the worst %v", rounds, sum/rounds, worst)
		if worst > 5*time.Second {
			t.Errorf("a failover took %v, want at most 5 s", worst)
		}
	})
}

func TestRestartOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, Config{SnapshotInterval: 50 * time.Millisecond, SnapshotThreshold: 8, TrailingLogs: 4})
		defer c.stop()
		c.mustPropose(1, 50)
		c.waitEqual()
		time.Sleep(time.Second)
		for name := range c.members {
			c.crash(name)
		}
		for name, m := range c.members {
			c.start(name)
			if m.sm.restored != 1 {
				t.Errorf("server %s restored %d snapshots, want 1", name, m.sm.restored)
			}
		}
		c.mustPropose(51, 60)
		if got := c.waitEqual(); !slices.Equal(got, numbers(1, 60)) {
			t.Errorf("commands %v", got)
		}
	})
}

func TestLaggingFollowerGetsSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 4, Config{SnapshotInterval: 50 * time.Millisecond, SnapshotThreshold: 8, TrailingLogs: 4})
		defer c.stop()
		c.mustPropose(1, 5)
		c.waitEqual()
		var late string
		for name := range c.members {
			if name != c.leader() {
				late = name
			}
		}
		c.crash(late)
		for i := 6; i <= 100; i++ {
			c.mustPropose(i, i)
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		if first, _ := c.members[c.leader()].r.store.FirstIndex(); first < 50 {
			t.Fatalf("the leader's log begins at %d: nothing was compacted", first)
		}
		c.start(late)
		if got := c.waitEqual(); !slices.Equal(got, numbers(1, 100)) {
			t.Errorf("commands %v", got)
		}
		if n := c.members[late].sm.restored; n == 0 {
			t.Error("the follower caught up without a snapshot")
		}
		// What was installed holds over a crash, and is a state to lead from.
		c.crash(late)
		c.start(late)
		c.waitEqual()
		for c.leader() != late {
			old := c.leader()
			c.crash(old)
			c.leader()
			c.start(old)
		}
		c.mustPropose(101, 120)
		if got := c.waitEqual(); !slices.Equal(got, numbers(1, 120)) {
			t.Errorf("commands %v", got)
		}
	})
}

// A leader that was cut off has entries that nobody else has, more of them than the
// others committed meanwhile, and the others compacted their logs: the snapshot that
// it gets must replace its log, or it would refuse everything that follows.
func TestSnapshotReplacesLogOfCutOffLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 5, Config{SnapshotInterval: 50 * time.Millisecond, SnapshotThreshold: 8, TrailingLogs: 1})
		defer c.stop()
		c.mustPropose(1, 5)
		c.waitEqual()
		old := c.leader()
		m := c.members[old]
		c.net.setCut(c.address(old), true)
		var lost sync.WaitGroup
		for i := range maxCalls {
			lost.Go(func() {
				if _, err := m.r.Propose(context.Background(), fmt.Appendf(nil, "lost %d", i)); err != ErrLeadershipLost {
					t.Errorf("proposing to a leader that was cut off: %v", err)
				}
			})
		}
		lost.Wait()
		if last, _ := m.r.store.LastIndex(); last < maxCalls {
			t.Fatalf("the log of the leader that was cut off ends at %d", last)
		}
		for i := 6; i <= 40; i++ {
			r := c.members[c.leader()].r
			if _, err := r.Propose(context.Background(), fmt.Append(nil, i)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		c.net.setCut(c.address(old), false)
		// Too few commands for the next snapshot: the last ones come by the log.
		for i := 41; i <= 46; i++ {
			c.mustPropose(i, i)
			if got := c.waitEqual(); !slices.Equal(got, numbers(1, i)) {
				t.Errorf("commands %v", got)
			}
		}
		if m.sm.restored != 1 {
			t.Errorf("the old leader restored %d snapshots, want 1", m.sm.restored)
		}
	})
}

func TestLeaderChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 6, Config{})
		defer c.stop()
		old := c.leader()
		changes := c.members[old].r.LeaderChanges()
		if !<-changes {
			t.Error("the leader was told that it does not lead")
		}
		c.net.setCut(c.address(old), true)
		if <-changes {
			t.Error("a leader that was cut off was told that it leads")
		}
		// Nobody reads while leadership moves about: the latest value is there.
		c.net.setCut(c.address(old), false)
		for c.leader() != old {
			next := c.leader()
			c.net.setCut(c.address(next), true)
			time.Sleep(3 * time.Second)
			c.net.setCut(c.address(next), false)
		}
		if !<-changes {
			t.Error("the last change is missing")
		}
	})
}

// A leader that hands over is followed at once by one that has every command, and takes
// no more of them itself.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 7, Config{})
		defer c.stop()
		ctx := context.Background()
		for round := range 20 {
			c.mustPropose(2*round+1, 2*round+1)
			old := c.leader()
			began := time.Now()
			if err := c.members[old].r.HandOver(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := c.members[old].r.Propose(ctx, []byte("x")); err != ErrNotLeader {
				t.Errorf("Propose after a hand-over: %v", err)
			}
			c.mustPropose(2*round+2, 2*round+2)
			if took := time.Since(began); took > 100*time.Millisecond || c.leader() == old {
				t.Errorf("a command succeeded %v after %s handed over to %s", took, old, c.leader())
			}
			if err := c.members[old].r.HandOver(ctx); err != ErrNotLeader {
				t.Errorf("a follower handed over: %v", err)
			}
		}
		if got := c.waitEqual(); !slices.Equal(got, numbers(1, 40)) {
			t.Errorf("commands %v", got)
		}
	})
}

// A leader that nobody can follow goes on.
func TestHandOverToNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 8, Config{LeaderLease: 500 * time.Millisecond})
		defer c.stop()
		c.mustPropose(1, 1)
		old := c.leader()
		for name := range c.members {
			if name != old {
				c.net.setCut(c.address(name), true)
			}
		}
		if err := c.members[old].r.HandOver(context.Background()); err == nil {
			t.Error("it was handed over to a server that is cut off")
		}
		for name := range c.members {
			c.net.setCut(c.address(name), false)
		}
		c.mustPropose(2, 2)
	})
}

func TestCallsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 7, Config{LeaderLease: 400 * time.Millisecond})
		defer c.stop()
		old := c.leader()
		r := c.members[old].r
		c.net.setCut(c.address(old), true)

		// A deadline ends the wait, whatever the library does.
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := r.Propose(ctx, []byte("x"))
		if !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 50*time.Millisecond {
			t.Errorf("Propose: %v after %v", err, time.Since(began))
		}
		cancelled, cancel := context.WithCancel(context.Background())
		cancel()
		if err := r.Barrier(cancelled); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.Canceled) {
			t.Errorf("Barrier: %v", err)
		}

		// Close ends the others.
		var calls sync.WaitGroup
		for i := range 3 * maxCalls {
			calls.Go(func() {
				var err error
				switch i % 3 {
				case 0:
					_, err = r.Propose(context.Background(), []byte("y"))
				case 1:
					err = r.Barrier(context.Background())
				case 2:
					err = r.VerifyLeader(context.Background())
				}
				if err == nil || errors.Is(err, ErrTimeout) {
					t.Errorf("call %d under way at Close: %v", i, err)
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		calls.Go(func() { c.crash(old) })
		calls.Go(func() {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
		calls.Wait()
		if _, err := r.Propose(context.Background(), []byte("z")); err != ErrClosed {
			t.Errorf("Propose after Close: %v", err)
		}
		if s := r.Status(); s.State != "closed" {
			t.Errorf("status after Close: %+v", s)
		}
	})
}

// slowLedger takes its time to apply a command.
type slowLedger struct{ ledger }

func (l *slowLedger) Apply(index uint64, command []byte) any {
	time.Sleep(100 * time.Millisecond)
	return l.ledger.Apply(index, command)
}

// Commands that are committed but not applied when Close is called are answered, a
// thing the library forgets.
func TestCloseAnswersCommittedCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := []Server{{"a", "a:1"}}
		sm := &slowLedger{}
		r, err := Open(Config{Name: "a", Servers: one, FS: vfs.NewMem(), Dir: "raft", Streams: newNetwork().listen("a:1")}, sm)
		if err != nil {
			t.Fatal(err)
		}
		for !r.IsLeader() {
			time.Sleep(10 * time.Millisecond)
		}
		var calls sync.WaitGroup
		for i := range 20 {
			calls.Go(func() {
				if got, err := r.Propose(context.Background(), fmt.Append(nil, i)); err != nil || got != fmt.Sprint("did ", i) {
					t.Errorf("Propose = %v, %v", got, err)
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		calls.Wait()
		time.Sleep(time.Minute)
	})
}

// Servers crash and lose their network at random while clients propose. What was
// acknowledged is there in the end, once, on every server and in the same order.
func TestRandomFaults(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomFaults(t, seed) })
			if t.Failed() {
				t.Logf("run again: go test ./internal/consensus -run '%s'", t.Name())
			}
		})
	}
}

func randomFaults(t *testing.T, seed uint64) {
	c := newCluster(t, seed, Config{SnapshotInterval: 200 * time.Millisecond, SnapshotThreshold: 16, TrailingLogs: 8})
	defer c.stop()
	var acked [3][]string
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for id := range 3 {
		rng := rand.New(rand.NewPCG(seed, uint64(id)+1))
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				command := fmt.Sprintf("%d.%d", id, n)
				r := c.server(clusterServers[rng.IntN(3)].Name)
				if r == nil || !r.IsLeader() {
					time.Sleep(time.Millisecond)
					continue
				}
				callCtx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				_, err := r.Propose(callCtx, []byte(command))
				cancel()
				if err == nil {
					acked[id] = append(acked[id], command)
				}
				time.Sleep(time.Duration(rng.Int64N(int64(60 * time.Millisecond))))
			}
		})
	}
	for range 40 {
		time.Sleep(time.Duration(c.rng.Int64N(int64(2 * time.Second))))
		name := clusterServers[c.rng.IntN(3)].Name
		switch kind := c.rng.IntN(4); {
		case c.server(name) == nil:
			c.start(name)
		case kind == 0:
			c.crash(name)
		case kind == 1:
			c.net.setCut(c.address(name), true)
		default:
			c.net.setCut(c.address(name), false)
		}
	}
	cancel()
	clients.Wait()
	for name, m := range c.members {
		c.net.setCut(c.address(name), false)
		if m.r == nil {
			c.start(name)
		}
	}
	got := c.waitEqual()
	count := map[string]int{}
	for _, command := range got {
		count[command]++
	}
	all := slices.Concat(acked[:]...)
	for _, command := range all {
		if count[command] != 1 {
			t.Errorf("command %s was acknowledged and applied %d times", command, count[command])
		}
	}
	t.Logf("%d commands acknowledged, %d applied", len(all), len(got))
}
