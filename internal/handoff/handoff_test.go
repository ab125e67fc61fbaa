package handoff

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// targets stands in for the replicas that hints go to.
type targets struct {
	mu    sync.Mutex
	alive map[uint64]bool
	fail  bool
	got   map[uint64][]string // keys
	calls int
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
	if p.fail {
		go done(nil, errors.New("no"))
		return nil
	}
	if call.GetApply().GetSource() != replicav1.Source_SOURCE_HINT {
		return errors.New("not sent as a hint")
	}
	for _, e := range call.GetApply().GetEntries() {
		p.got[n] = append(p.got[n], string(e.GetKey()))
	}
	go done(&replicav1.Reply{}, nil)
	return nil
}

// ring has nodes 1 to 4 and one vnode, on 1, 2 and 3.
func ring(t *testing.T) *topology.Topology {
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 9, Vnodes: 1, Settings: topology.DefaultSettings().Proto(), Ring: []*topologyv1.Vnode{{}}}
	for i := uint64(1); i <= 4; i++ {
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: i, Name: fmt.Sprint("n", i), Role: topologyv1.Role_ROLE_DATA})
		if i < 4 {
			pb.Ring[0].Slots = append(pb.Ring[0].Slots, &topologyv1.Slot{Node: i, Phase: topologyv1.Phase_PHASE_STABLE})
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

func run(t *testing.T, test func(t *testing.T, h *replica.Hints, p *targets)) {
	synctest.Test(t, func(t *testing.T) {
		logger := slog.New(slog.DiscardHandler)
		s, err := storage.Open(storage.Config{FS: vfs.NewMem(), Dir: "data", Logger: logger, Fatal: func(err error) { panic(err) }})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		h, err := replica.LoadHints(s, func() int64 { return time.Now().UnixMilli() }, logger)
		if err != nil {
			t.Fatal(err)
		}
		h.SetMaxBytes(64 << 20)
		p := &targets{alive: map[uint64]bool{}, got: map[uint64][]string{}}
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		r := New(Config{Fence: replica.NewFence(ring(t)), Hints: h, Peers: p, Logger: logger, Metrics: prometheus.NewRegistry()})
		wg.Go(func() { h.Run(ctx) })
		wg.Go(func() { r.Run(ctx) })
		test(t, h, p)
		cancel()
		wg.Wait()
	})
}

func keep(h *replica.Hints, target uint64, namespace uint32, key string) {
	rec := record.Encode(record.Record{Version: record.Version{Time: hlc.Timestamp(1), Incarnation: 1}, Kind: record.Value, Payload: make([]byte, 1000)})
	h.Keep(target, []storage.Write{{Namespace: namespace, Key: []byte(key), Record: rec}})
}

// Hints for a node that never comes back do not take the room past their age.
func TestOldHintsGiveRoom(t *testing.T) {
	run(t, func(t *testing.T, h *replica.Hints, _ *targets) {
		h.SetMaxBytes(1200)
		keep(h, 3, 1, "dead node")
		time.Sleep(3*time.Hour + 2*time.Second)
		keep(h, 2, 1, "other node")
		time.Sleep(time.Minute)
		if b := h.Backlog(); h.Dropped() != 0 || len(b) != 1 || b[0].Target != 2 {
			t.Errorf("%d dropped, backlog %+v", h.Dropped(), b)
		}
	})
}

func TestHintsAreDeliveredWhenTheTargetIsBack(t *testing.T) {
	run(t, func(t *testing.T, h *replica.Hints, p *targets) {
		for i := range 1000 {
			keep(h, 2, 1, fmt.Sprint(i))
		}
		time.Sleep(5 * time.Second)
		if p.calls != 0 {
			t.Error("hints are sent to a node that is down")
		}
		p.mu.Lock()
		p.alive[2], p.fail = true, true
		p.mu.Unlock()
		time.Sleep(5 * time.Second)
		p.mu.Lock()
		if b := h.Backlog(); len(b) != 1 || b[0].Count != 1000 || p.calls > 10 {
			t.Errorf("backlog %+v after %d refused calls", b, p.calls)
		}
		p.fail = false
		p.mu.Unlock()
		time.Sleep(5 * time.Second)
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.got[2]) != 1000 || p.got[2][0] != "0" || len(h.Backlog()) != 0 {
			t.Errorf("%d hints delivered, backlog %+v", len(p.got[2]), h.Backlog())
		}
	})
}

// What has no owner, no namespace or is too old is given up, not delivered.
func TestUselessHintsAreGivenUp(t *testing.T) {
	run(t, func(t *testing.T, h *replica.Hints, p *targets) {
		keep(h, 4, 1, "not an owner")
		keep(h, 99, 1, "not a node")
		keep(h, 3, 7, "dropped namespace")
		keep(h, 3, 1, "old")
		time.Sleep(4 * time.Hour)
		p.mu.Lock()
		for i := range uint64(5) {
			p.alive[i] = true
		}
		p.mu.Unlock()
		time.Sleep(5 * time.Second)
		if len(p.got) != 0 || len(h.Backlog()) != 0 {
			t.Errorf("delivered %v, backlog %+v", p.got, h.Backlog())
		}
	})
}

// Replay is paced: 64 MiB at 16 MiB a second take about three seconds beyond the
// first burst.
func TestReplayIsPaced(t *testing.T) {
	run(t, func(t *testing.T, h *replica.Hints, p *targets) {
		h.SetMaxBytes(1 << 30)
		p.mu.Lock()
		p.alive[2] = true
		p.mu.Unlock()
		big := record.Encode(record.Record{Version: record.Version{Time: 1, Incarnation: 1}, Kind: record.Value, Payload: make([]byte, 1<<20)})
		for i := range 80 {
			h.Keep(2, []storage.Write{{Namespace: 1, Key: fmt.Append(nil, i), Record: big}})
		}
		time.Sleep(1500 * time.Millisecond)
		p.mu.Lock()
		early := len(p.got[2])
		p.mu.Unlock()
		if early == 0 || early > 60 {
			t.Errorf("%d of 80 MiB are delivered after 1.5 s", early)
		}
		time.Sleep(10 * time.Second)
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.got[2]) != 80 {
			t.Errorf("%d of 80 are delivered in the end", len(p.got[2]))
		}
	})
}
