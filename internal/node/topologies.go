package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

const metaTopology = "topology"

// loadTopology returns the topology that the node keeps on disk, or an empty one.
func loadTopology(s *storage.Store) (*topology.Topology, error) {
	b, err := s.Meta(metaTopology)
	if errors.Is(err, storage.ErrNotFound) {
		return &topology.Topology{}, nil
	}
	if err != nil {
		return nil, err
	}
	var pb topologyv1.Topology
	if err := proto.Unmarshal(b, &pb); err != nil {
		return nil, fmt.Errorf("%w: topology on disk: %w", storage.ErrCorrupt, err)
	}
	t, err := topology.FromProto(&pb)
	if err != nil {
		return nil, fmt.Errorf("%w: topology on disk: %w", storage.ErrCorrupt, err)
	}
	return t, nil
}

// topologies keeps the node's topology up to date: on disk, in the fence, and for
// those who watch it here.
type topologies struct {
	store     *storage.Store
	fence     *replica.Fence
	dial      rpc.Transport
	logger    *slog.Logger
	clusterID string
	// seeds are the configured orchestrators.
	seeds []string
	// prepare is called before each new topology, adopted after it, by one goroutine at
	// a time. Where prepare fails the topology is not taken in.
	prepare func(*topology.Topology) error
	adopted func(*topology.Topology)
	// token holds the right to adopt, which includes writing to disk.
	token chan struct{}
	mu    struct {
		sync.Mutex
		// changed is closed and replaced when there is something new for watchers.
		changed chan struct{}
		// health is what an orchestrator last said, nil while none is connected.
		health map[uint64]*topologyv1.NodeHealth
		// idleUntil is when asking for a newer topology makes sense again.
		idleUntil time.Time
	}
}

func newTopologies(store *storage.Store, fence *replica.Fence, dial rpc.Transport, clusterID string, seeds []string, logger *slog.Logger) *topologies {
	t := &topologies{store: store, fence: fence, dial: dial, clusterID: clusterID, seeds: seeds, logger: logger, token: make(chan struct{}, 1)}
	t.mu.changed = make(chan struct{})
	return t
}

func (t *topologies) current() *topology.Topology { return t.fence.Topology() }

// adopt makes a topology the node's, if it is newer: on disk first, then in use.
func (t *topologies) adopt(next *topology.Topology) error {
	// Many may bring it at once, with requests that wait for it: they go on as soon as one
	// has it in use.
	for taken := false; !taken; {
		changed := t.changed()
		if next.Epoch <= t.current().Epoch {
			return nil
		}
		select {
		case t.token <- struct{}{}:
			taken = true
		case <-changed:
		}
	}
	defer func() { <-t.token }()
	if next.Epoch <= t.current().Epoch {
		return nil
	}
	if next.ClusterID != t.clusterID {
		return fmt.Errorf("a topology of cluster %s was offered, this is cluster %s", next.ClusterID, t.clusterID)
	}
	b, err := proto.Marshal(next.Proto())
	if err != nil {
		return err
	}
	if err := t.prepare(next); err != nil {
		return err
	}
	if err := t.store.SetMeta(metaTopology, b); err != nil {
		return err
	}
	if t.fence.Advance(next) {
		t.logger.Info("topology adopted", "epoch", topology.EpochString(next.Epoch), "nodes", len(next.Nodes), "namespaces", len(next.Namespaces))
		t.signal()
		t.adopted(next)
	}
	return nil
}

// signal tells watchers that there is something new.
func (t *topologies) signal() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.mu.changed)
	t.mu.changed = make(chan struct{})
}

func (t *topologies) changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.changed
}

// observed returns what an orchestrator says of a node's health, or nil.
func (t *topologies) observed(incarnation uint64) *topologyv1.NodeHealth {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.health[incarnation]
}

func (t *topologies) setHealth(health map[uint64]*topologyv1.NodeHealth) {
	t.mu.Lock()
	t.mu.health = health
	t.mu.Unlock()
	t.signal()
}

// orchestrators returns the addresses of all orchestrators that are known.
func (t *topologies) orchestrators() []string {
	return orchestrators(t.seeds, t.current())
}

// watchSilence is how long an orchestrator may send nothing; it sends something
// every 2 s.
const watchSilence = 6 * time.Second

// run watches the topology at one orchestrator after the other until ctx ends.
func (t *topologies) run(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		addresses := t.orchestrators()
		a := addresses[i%len(addresses)]
		err := t.watch(ctx, a)
		t.setHealth(nil)
		if ctx.Err() == nil {
			t.logger.Debug("topology watch ended", "orchestrator", a, "reason", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (t *topologies) watch(ctx context.Context, address string) error {
	cc, err := t.dial.NewConn(address)
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(watchSilence, cancel)
	defer silence.Stop()
	stream, err := topologyv1.NewTopologyServiceClient(cc).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{
		ClusterId: t.clusterID, KnownEpoch: t.current().Epoch,
	})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		silence.Reset(watchSilence)
		health := make(map[uint64]*topologyv1.NodeHealth, len(resp.GetHealth()))
		for _, h := range resp.GetHealth() {
			health[h.GetIncarnation()] = h
		}
		t.setHealth(health)
		if resp.GetTopology() == nil {
			continue
		}
		next, err := topology.FromProto(resp.GetTopology())
		if err != nil {
			return err
		}
		if err := t.adopt(next); err != nil {
			return err
		}
	}
}

// refreshPause keeps requests from asking again and again for a topology that
// nobody has.
const refreshPause = 300 * time.Millisecond

// refresh returns when the node has a topology of at least an epoch, asking the
// given addresses first, then orchestrators and peers.
func (t *topologies) refresh(ctx context.Context, epoch uint64, first ...string) error {
	if t.current().Epoch >= epoch {
		return nil
	}
	t.mu.Lock()
	idle := len(first) == 0 && time.Now().Before(t.mu.idleUntil)
	t.mu.Unlock()
	addresses := first
	if !idle {
		addresses = append(slices.Clone(first), t.orchestrators()...)
		for _, n := range t.current().Nodes {
			addresses = append(addresses, n.Address)
		}
	}
	// The watch may bring it sooner than asking does.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	arrived := make(chan struct{})
	go func() {
		defer close(arrived)
		for ctx.Err() == nil {
			changed := t.changed()
			if t.current().Epoch >= epoch {
				cancel()
				return
			}
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
	}()
	last := errors.New("no peer or orchestrator has it")
	for _, a := range addresses {
		if err := t.fetch(ctx, a); err != nil && ctx.Err() == nil {
			last = err
		}
		if t.current().Epoch >= epoch || ctx.Err() != nil {
			break
		}
	}
	cancel()
	<-arrived
	if t.current().Epoch >= epoch {
		return nil
	}
	t.mu.Lock()
	t.mu.idleUntil = time.Now().Add(refreshPause)
	t.mu.Unlock()
	return last
}

// fetch adopts the topology of one address.
func (t *topologies) fetch(ctx context.Context, address string) error {
	cc, err := t.dial.NewConn(address)
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	resp, err := topologyv1.NewTopologyServiceClient(cc).GetTopology(ctx, &topologyv1.GetTopologyRequest{ClusterId: t.clusterID})
	if err != nil {
		return err
	}
	next, err := topology.FromProto(resp.GetTopology())
	if err != nil {
		return err
	}
	return t.adopt(next)
}
