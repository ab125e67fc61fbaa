package handoff

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// targets stands in for the replicas that hints go to.
type targets struct {
	mu     sync.Mutex
	alive  map[uint64]bool
	credit uint64
	// refuse returns why a call is refused, or nil.
	refuse func(*replicav1.Apply) error
	got    map[uint64][]string // keys
	bytes  int
	calls  int
}

// set changes the targets' behaviour.
func (p *targets) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

func (p *targets) Alive(n uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.alive[n]
}

func (p *targets) Go(n uint64, call *replicav1.Call, _ time.Time, done func(*replicav1.Reply, error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls++
	op := call.GetApply()
	if op.GetSource() != replicav1.Source_SOURCE_HINT {
		return errors.New("not sent as a hint")
	}
	if p.refuse != nil {
		if err := p.refuse(op); err != nil {
			go done(nil, err)
			return nil
		}
	}
	for _, e := range op.GetEntries() {
		p.got[n] = append(p.got[n], string(e.GetKey()))
		p.bytes += len(e.GetRecord())
	}
	go done(&replicav1.Reply{Result: &replicav1.Reply_Apply{Apply: &replicav1.ApplyResult{CreditBytes: p.credit}}}, nil)
	return nil
}

// ring has nodes 1 to 4 and two vnodes, on 1, 2 and 3.
func ring(t *testing.T) *topology.Topology {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: 2, Settings: topology.DefaultSettings().Proto(), Ring: []*topologyv1.Vnode{{}, {}}}
	for i := uint64(1); i <= 4; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
		if i < 4 {
			for _, v := range pb.Ring {
				v.Slots = append(v.Slots, &topologyv1.Slot{Node: i, Phase: topologyv1.Phase_PHASE_STABLE})
			}
		}
	}
	ns := topology.FoundingNamespace(3)
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// bench is a replayer with what it works on.
type bench struct {
	*testing.T
	*targets
	fs    *vfs.MemFS
	store *storage.Store
	hints *replica.Hints
	fence *replica.Fence
	stop  func()
}

func run(t *testing.T, test func(b *bench)) {
	synctest.Test(t, func(t *testing.T) {
		b := &bench{
			T: t, fs: vfs.NewCrashableMem(), fence: replica.NewFence(ring(t)),
			targets: &targets{alive: map[uint64]bool{}, got: map[uint64][]string{}, credit: 16 << 20},
		}
		b.start(replica.HintBounds{Bytes: 64 << 20, Count: 10_000, Age: 3 * time.Hour})
		test(b)
		b.stop()
	})
}

func (b *bench) start(bounds replica.HintBounds) {
	logger := slog.New(slog.DiscardHandler)
	var err error
	b.store, err = storage.Open(storage.Config{FS: b.fs, Dir: "data", Logger: logger, Fatal: func(err error) { panic(err) }})
	if err != nil {
		b.Fatal(err)
	}
	b.hints, err = replica.LoadHints(b.store, func() int64 { return time.Now().UnixMilli() }, logger)
	if err != nil {
		b.Fatal(err)
	}
	b.hints.SetBounds(bounds)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	r := New(Config{Fence: b.fence, Hints: b.hints, Peers: b, Logger: logger})
	wg.Go(func() { b.hints.Run(ctx) })
	wg.Go(func() { r.Run(ctx) })
	b.stop = func() {
		cancel()
		wg.Wait()
		b.store.Close()
	}
}

// powerCut starts anew from what was synced.
func (b *bench) powerCut() {
	clone := b.fs.CrashClone(vfs.CrashCloneCfg{})
	bounds := b.hints.Bounds()
	b.stop()
	b.fs = clone
	b.start(bounds)
}

func (b *bench) keep(target uint64, w storage.Write) {
	if w.Record == nil {
		w.Record = value(1000)
	}
	b.hints.Keep(target, []storage.Write{w}, func(bool) {})
}

func (b *bench) wantDirty(want ...storage.Place) {
	b.Helper()
	var got []storage.Place
	for _, d := range b.store.Dirty() {
		got = append(got, d.Place)
	}
	if !slices.Equal(got, want) {
		b.Errorf("dirty are %v, want %v", got, want)
	}
}

func value(size int) []byte {
	return record.Encode(record.Record{Version: record.Version{Time: hlc.Timestamp(1), Incarnation: 1}, Kind: record.Value, Payload: make([]byte, size)})
}

func in(namespace, vnode uint32, key string) storage.Write {
	return storage.Write{Namespace: namespace, Vnode: vnode, Key: []byte(key)}
}

// Invariant 15: hints for a node that never comes back do not take the room past
// their age, and leave marks that survive a power cut.
func TestOldHintsGiveRoomAndLeaveAMark(t *testing.T) {
	run(t, func(b *bench) {
		b.hints.SetBounds(replica.HintBounds{Bytes: 1200, Count: 10, Age: 3 * time.Hour})
		b.keep(3, in(1, 1, "dead node"))
		time.Sleep(3*time.Hour + 2*time.Second)
		b.keep(2, in(1, 0, "other node"))
		time.Sleep(time.Minute)
		totals := b.hints.Totals()
		if l := b.hints.Backlog(); totals.Dropped() != 0 || totals.Lost[replica.LossExpired] != 1 || len(l) != 1 || l[0].Target != 2 {
			b.Errorf("totals %+v, backlog %+v", totals, l)
		}
		b.wantDirty(storage.Place{Namespace: 1, Vnode: 1})
		b.powerCut()
		b.wantDirty(storage.Place{Namespace: 1, Vnode: 1})
		if l := b.hints.Backlog(); len(l) != 1 || l[0].Target != 2 {
			b.Errorf("backlog %+v", l)
		}
	})
}

func TestHintsAreDeliveredWhenTheTargetIsBack(t *testing.T) {
	run(t, func(b *bench) {
		for i := range 1000 {
			b.keep(2, in(1, 0, fmt.Sprint(i)))
		}
		time.Sleep(5 * time.Second)
		b.set(func() {
			if b.calls != 0 {
				b.Error("hints are sent to a node that is down")
			}
			b.alive[2], b.refuse = true, func(*replicav1.Apply) error { return errors.New("no") }
		})
		b.powerCut() // hints survive that
		time.Sleep(5 * time.Second)
		l := b.hints.Backlog()
		b.set(func() {
			if len(l) != 1 || l[0].Count != 1000 || b.calls > 10 {
				b.Errorf("backlog %+v after %d refused calls", l, b.calls)
			}
			b.refuse = nil
		})
		time.Sleep(5 * time.Second)
		b.set(func() {
			if len(b.got[2]) != 1000 || b.got[2][0] != "0" || b.got[2][999] != "999" || len(b.hints.Backlog()) != 0 {
				b.Errorf("%d hints delivered, backlog %+v", len(b.got[2]), b.hints.Backlog())
			}
		})
		b.wantDirty()
		if n := b.hints.Totals().Delivered; n != 1000 {
			b.Errorf("%d are counted as delivered", n)
		}
	})
}

// What has no owner, no namespace or is too old is given up, not delivered. Only
// the last leaves something for repair to do.
func TestUselessHintsAreGivenUp(t *testing.T) {
	run(t, func(b *bench) {
		b.keep(4, in(1, 0, "not an owner"))
		b.keep(99, in(1, 0, "not a node"))
		b.keep(3, in(7, 0, "dropped namespace"))
		b.keep(3, in(1, 1, "old"))
		time.Sleep(4 * time.Hour)
		b.set(func() {
			for i := range uint64(5) {
				b.alive[i] = true
			}
		})
		time.Sleep(5 * time.Second)
		if len(b.got) != 0 || len(b.hints.Backlog()) != 0 {
			b.Errorf("delivered %v, backlog %+v", b.got, b.hints.Backlog())
		}
		b.wantDirty(storage.Place{Namespace: 1, Vnode: 1})
		lost := b.hints.Totals().Lost
		if lost[replica.LossNotOwner] != 2 || lost[replica.LossNamespace] != 1 || lost[replica.LossExpired] != 1 {
			b.Errorf("lost %v", lost)
		}
	})
}

// Invariant 7: a node that owned a vnode when a hint was kept, and does not when it
// is back, gets nothing of it.
func TestFormerOwnerGetsNothing(t *testing.T) {
	run(t, func(b *bench) {
		b.keep(3, in(1, 0, "moved away"))
		b.keep(3, in(1, 1, "still there"))
		time.Sleep(time.Second)
		pb := ring(t).Proto()
		pb.Epoch++
		pb.Ring[0].Slots[2].Node = 4
		next, err := topology.FromProto(pb)
		if err != nil {
			b.Fatal(err)
		}
		b.fence.Advance(next)
		b.set(func() { b.alive[3], b.alive[4] = true, true })
		time.Sleep(5 * time.Second)
		b.set(func() {
			if len(b.got) != 1 || !slices.Equal(b.got[3], []string{"still there"}) || len(b.hints.Backlog()) != 0 {
				b.Errorf("delivered %v, backlog %+v", b.got, b.hints.Backlog())
			}
		})
	})
}

// A call that is acknowledged is forgotten even when others of its round fail, and
// what waits keeps neither its order from it nor others from their turn.
func TestPartOfARoundIsForgotten(t *testing.T) {
	run(t, func(b *bench) {
		for i := range 100 {
			b.keep(2, in(1, uint32(i%2), fmt.Sprint(i)))
		}
		time.Sleep(time.Second)
		b.set(func() {
			b.alive[2] = true
			b.refuse = func(a *replicav1.Apply) error {
				if a.GetVnode() == 0 {
					return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonStaleEpoch, "not now")
				}
				return nil
			}
		})
		time.Sleep(5 * time.Second)
		b.set(func() {
			if g := b.hints.Groups(); len(b.got[2]) != 50 || len(g) != 1 || g[0].Vnode != 0 || g[0].Count != 50 {
				b.Errorf("%d delivered, groups %+v", len(b.got[2]), g)
			}
			b.refuse = nil
		})
		time.Sleep(5 * time.Second)
		b.set(func() {
			if len(b.got[2]) != 100 { // none of them twice
				b.Errorf("%d delivered", len(b.got[2]))
			}
			for i, k := range b.got[2] {
				if want := fmt.Sprint((i%50)*2 + 1 - i/50); k != want {
					b.Fatalf("the %d. is %s, want %s", i, k, want)
				}
			}
		})
	})
}

// What its target will never take is given up at once, counted, and left to repair.
func TestRefusedForGood(t *testing.T) {
	for reason, tc := range map[string]struct {
		err  *rpc.Error
		loss replica.HintLoss
	}{
		"below promise": {rpc.Errorf(codes.FailedPrecondition, rpc.ReasonBelowPromise, "too old"), replica.LossBelowPromise},
		"damaged":       {rpc.Errorf(codes.InvalidArgument, rpc.ReasonCorrupt, "junk"), replica.LossRefused},
	} {
		t.Run(reason, func(t *testing.T) {
			run(t, func(b *bench) {
				b.set(func() {
					b.alive[2] = true
					b.refuse = func(a *replicav1.Apply) error {
						if a.GetVnode() == 0 {
							return tc.err
						}
						return nil
					}
				})
				for i := range 20 {
					b.keep(2, in(1, uint32(i%2), fmt.Sprint(i)))
				}
				time.Sleep(3 * time.Second)
				b.set(func() {
					if len(b.got[2]) != 10 || len(b.hints.Backlog()) != 0 || b.hints.Totals().Lost[tc.loss] != 10 {
						b.Errorf("%d delivered, backlog %+v, totals %+v", len(b.got[2]), b.hints.Backlog(), b.hints.Totals())
					}
				})
				b.wantDirty(storage.Place{Namespace: 1, Vnode: 0})
			})
		})
	}
}

// A target sets the pace by its credit; without one it is only asked, by one hint,
// whether it has any.
func TestCreditSetsThePace(t *testing.T) {
	run(t, func(b *bench) {
		for i := range 400 {
			b.keep(2, in(1, 0, fmt.Sprint(i)))
		}
		got := func() (n int) {
			b.set(func() { n = len(b.got[2]) })
			return n
		}
		b.set(func() { b.alive[2], b.credit = true, 10_000 })
		time.Sleep(10 * time.Second)
		slow := got()
		if slow < 60 || slow > 120 {
			b.Errorf("%d KB are delivered in 10 s at 10 KB/s", slow)
		}
		b.set(func() { b.credit = 0 })
		time.Sleep(time.Second)
		before := got()
		time.Sleep(10 * time.Second)
		if n := got() - before; n < 5 || n > 11 {
			b.Errorf("%d are delivered in 10 s without a credit", n)
		}
		b.set(func() { b.credit = 1 << 20 })
		time.Sleep(5 * time.Second)
		if n := got(); n != 400 {
			b.Errorf("%d of 400 are delivered in the end", n)
		}
	})
}

// A target with much to get does not keep others waiting.
func TestTargetsTakeTurns(t *testing.T) {
	run(t, func(b *bench) {
		b.hints.SetBounds(replica.HintBounds{Bytes: 1 << 30, Count: 10_000, Age: time.Hour})
		for i := range 128 {
			b.keep(2, storage.Write{Namespace: 1, Key: fmt.Append(nil, i), Record: value(1 << 20)})
		}
		for i := range 100 {
			b.keep(3, in(1, 0, fmt.Sprint(i)))
		}
		b.set(func() { b.alive[2], b.alive[3] = true, true })
		time.Sleep(3 * time.Second)
		b.set(func() {
			if len(b.got[3]) != 100 || len(b.got[2]) > 100 {
				b.Errorf("%d of 100 KB and %d of 128 MB are delivered", len(b.got[3]), len(b.got[2]))
			}
		})
	})
}

// Replay is paced: 80 MiB at 16 MiB a second take about three seconds beyond the
// first burst, whatever the target grants.
func TestReplayIsPaced(t *testing.T) {
	run(t, func(b *bench) {
		b.hints.SetBounds(replica.HintBounds{Bytes: 1 << 30, Count: 10_000, Age: time.Hour})
		b.set(func() { b.alive[2], b.credit = true, 1<<40 })
		for i := range 80 {
			b.keep(2, storage.Write{Namespace: 1, Key: fmt.Append(nil, i), Record: value(1 << 20)})
		}
		time.Sleep(1500 * time.Millisecond)
		b.set(func() {
			if early := len(b.got[2]); early == 0 || early > 60 {
				b.Errorf("%d of 80 MiB are delivered after 1.5 s", early)
			}
		})
		time.Sleep(10 * time.Second)
		b.set(func() {
			if len(b.got[2]) != 80 {
				b.Errorf("%d of 80 are delivered in the end", len(b.got[2]))
			}
		})
	})
}
