package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
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
	// unlike is a checksum that says nothing about the topology in use. Only run uses it.
	unlike uint64
	// adopted is called after each new topology came into use, by one goroutine at a
	// time. When the disk follows one, prepare is called before it is written and settle
	// after it: what settle forgets would be prepared again if an older topology came back.
	adopted         func(*topology.Topology)
	prepare, settle func(*topology.Topology) error
	// seal is the last recovery that the node was sealed for, or nil.
	seal atomic.Pointer[adminv1.Seal]
	// hashed is what settingsHash found out last: whoever probes the node asks again and again.
	hashed atomic.Pointer[hashedSettings]
	// wrong is the epoch, if any, of which the node had another topology than was agreed on.
	wrong atomic.Uint64
	// kept is the epoch that the disk has followed, problem why it follows no further.
	kept    atomic.Uint64
	problem atomic.Pointer[string]
	// recent is what others, who have it, are told the difference from.
	recent topology.Recent
	// adopting holds a token while a topology is being taken in, asking one for each
	// request that asks for a newer one.
	adopting, asking chan struct{}
	mu               struct {
		sync.Mutex
		// changed is closed and replaced when there is something new for watchers.
		changed chan struct{}
		// health is what an orchestrator last said, nil while none is connected.
		health map[uint64]*topologyv1.NodeHealth
		// idleUntil is when asking for a newer topology makes sense again.
		idleUntil time.Time
	}
}

func newTopologies(store *storage.Store, fence *replica.Fence, seal *adminv1.Seal, dial rpc.Transport, clusterID string, seeds []string, logger *slog.Logger) *topologies {
	t := &topologies{
		store: store, fence: fence, dial: dial, clusterID: clusterID, seeds: seeds, logger: logger,
		adopting: make(chan struct{}, 1), asking: make(chan struct{}, maxAsking),
	}
	t.mu.changed = make(chan struct{})
	t.seal.Store(seal)
	t.recent.Add(fence.Topology())
	return t
}

func (t *topologies) current() *topology.Topology { return t.fence.Topology() }

// adopt brings a topology into use, if it is newer. The disk follows; until it has, the
// node does not say that it has taken the topology in, and after a crash it goes on with
// an older one, as if it had not heard of this one yet.
func (t *topologies) adopt(next *topology.Topology) error {
	if next.Epoch <= t.current().Epoch {
		return nil
	}
	if next.ClusterID != t.clusterID {
		return fmt.Errorf("a topology of cluster %s was offered, this is cluster %s", next.ClusterID, t.clusterID)
	}
	t.adopting <- struct{}{}
	defer func() { <-t.adopting }()
	if err := t.admits(next); err != nil {
		return err
	}
	if t.fence.Advance(next) {
		t.recent.Add(next)
		t.logger.Info("topology adopted", "epoch", topology.EpochString(next.Epoch), "nodes", len(next.Nodes), "namespaces", len(next.Namespaces))
		t.signal()
		t.adopted(next)
	}
	return nil
}

// keepRetry is the pause before the disk is tried again.
const keepRetry = time.Second

// follow has the disk follow the topology in use until ctx ends. It may pass over some.
func (t *topologies) follow(ctx context.Context) {
	for ctx.Err() == nil {
		changed := t.changed()
		var retry <-chan time.Time
		if now := t.current(); now.Epoch != t.kept.Load() {
			err := t.write(now)
			if err == nil {
				t.problem.Store(nil)
				continue
			}
			why := fmt.Sprintf("holds up changes of the ring, for it cannot keep epoch %s on disk: %s", topology.EpochString(now.Epoch), err)
			t.problem.Store(&why)
			t.logger.Error("this node " + why)
			retry = time.After(keepRetry)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-retry:
		}
	}
}

// write has the disk follow a topology.
func (t *topologies) write(now *topology.Topology) error {
	b, err := proto.Marshal(now.Proto())
	if err != nil {
		return err
	}
	if err := t.prepare(now); err != nil {
		return err
	}
	if err := t.store.SetMeta(metaTopology, b); err != nil {
		return err
	}
	if err := t.settle(now); err != nil {
		return err
	}
	t.kept.Store(now.Epoch)
	return nil
}

// taken returns the epoch that the node has taken in: it is on disk with all that
// follows from it, and no request runs under an older one.
func (t *topologies) taken() uint64 { return min(t.kept.Load(), t.fence.Drained()) }

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

// setHealth takes in what an orchestrator says, again and again. Watchers hear of what is
// new in it.
func (t *topologies) setHealth(health map[uint64]*topologyv1.NodeHealth) {
	t.mu.Lock()
	same := maps.EqualFunc(t.mu.health, health, func(a, b *topologyv1.NodeHealth) bool { return proto.Equal(a, b) })
	t.mu.health = health
	t.mu.Unlock()
	if !same {
		t.signal()
	}
}

// orchestrators returns the addresses of all orchestrators that are known.
func (t *topologies) orchestrators() []string {
	return orchestrators(slices.Concat(t.seeds, t.seal.Load().GetOrchestrators()), t.current())
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
	// known is the topology that the server takes this node to have: what it sent last,
	// whatever has come from elsewhere since.
	known := t.current()
	var health map[uint64]*topologyv1.NodeHealth
	stream, err := topologyv1.NewTopologyServiceClient(cc).WatchTopology(ctx, &topologyv1.WatchTopologyRequest{
		ClusterId: t.clusterID, KnownEpoch: known.Epoch,
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
		if known, err = t.updated(ctx, address, known, resp); err != nil {
			return err
		}
		health = topology.HealthAfter(health, resp.GetHealth(), known)
		t.setHealth(health)
		if err := t.adopt(known); err != nil {
			return err
		}
		if err := t.check(ctx, address, resp.GetDelta()); err != nil {
			return err
		}
	}
}

// check compares the topology in use with the one that was agreed on for its epoch, by the
// checksum that an orchestrator sends while it has nothing newer. One that differs, for the
// disk was tampered with and no orchestrator answered when the node started, stays in use
// until there is a later epoch, which the orchestrators see to (see settingsHash): requests
// run under it, and two topologies of one epoch cannot be told apart.
func (t *topologies) check(ctx context.Context, address string, d *topologyv1.TopologyDelta) error {
	cur := t.current()
	if !cur.Fails(d) || t.wrong.Load() == cur.Epoch || t.unlike == d.GetSum() {
		return nil
	}
	whole, err := t.ask(ctx, address, &topology.Topology{})
	if err != nil {
		return err
	}
	switch {
	case whole.Epoch != cur.Epoch:
		return t.adopt(whole)
	case !whole.Fails(cur.Check()):
		t.unlike = d.GetSum() // the checksum is of what this software does not know
		return nil
	}
	t.wrong.Store(cur.Epoch)
	t.logger.Warn("the topology that was on this node's disk is not the one that was agreed on: it is replaced with the next epoch",
		"epoch", topology.EpochString(cur.Epoch), "settings", topology.DescribeChanges(topology.DiffSettings(cur.Settings, whole.Settings)))
	return nil
}

// settingsHash returns the hash of the settings in use, or one that nobody has in an epoch
// of which the topology was wrong: the orchestrators then note that, and make another epoch.
func (t *topologies) settingsHash() uint64 {
	cur := t.current()
	hash := t.hashOf(cur)
	if cur.Epoch != 0 && t.wrong.Load() == cur.Epoch {
		return ^(hash + cur.Epoch) // another one every time
	}
	return hash
}

// hashedSettings is the hash of a topology's settings.
type hashedSettings struct {
	of   *topology.Topology
	hash uint64
}

func (t *topologies) hashOf(cur *topology.Topology) uint64 {
	if h := t.hashed.Load(); h != nil && h.of == cur {
		return h.hash
	}
	h := &hashedSettings{cur, cur.Settings.Hash()}
	t.hashed.Store(h)
	return h.hash
}

// refreshPause keeps requests from asking again and again for a topology that
// nobody has.
const refreshPause = 300 * time.Millisecond

// maxAsking bounds the requests that ask at once; what one brings helps all.
const maxAsking = 4

// refresh returns when the node has a topology of at least an epoch, asking the
// given addresses first, then orchestrators and peers.
func (t *topologies) refresh(ctx context.Context, epoch uint64, first ...string) error {
	for {
		changed := t.changed()
		if t.current().Epoch >= epoch {
			return nil
		}
		select {
		case t.asking <- struct{}{}:
			defer func() { <-t.asking }()
			return t.askAround(ctx, epoch, first)
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// askAround asks others for a topology of at least an epoch; see refresh.
func (t *topologies) askAround(ctx context.Context, epoch uint64, first []string) error {
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
	next, err := t.ask(ctx, address, t.current())
	if err != nil {
		return err
	}
	return t.adopt(next)
}

// ask returns the topology of one address, or known if that has none that is newer. What
// differs from known is asked for, or the whole if known is empty.
func (t *topologies) ask(ctx context.Context, address string, known *topology.Topology) (*topology.Topology, error) {
	cc, err := t.dial.NewConn(address)
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	resp, err := topologyv1.NewTopologyServiceClient(cc).GetTopology(ctx, &topologyv1.GetTopologyRequest{ClusterId: t.clusterID, KnownEpoch: known.Epoch})
	if err != nil {
		return nil, err
	}
	return t.updated(ctx, address, known, resp)
}

// updated returns the topology that a server's message leads to from known, asking for
// the whole where what differs does not fit.
func (t *topologies) updated(ctx context.Context, address string, known *topology.Topology, m topology.Updating) (*topology.Topology, error) {
	next, err := topology.Updated(known, m)
	if errors.Is(err, topology.ErrOtherBase) {
		t.logger.Warn("a change of the topology does not fit: asking for the whole", "server", address, "err", err)
		next, err = t.ask(ctx, address, &topology.Topology{})
		if err == nil {
			if d := topology.DiffSettings(known.Settings, next.Settings); len(d) > 0 {
				t.logger.Warn("the settings of this node were not those that the change was made for: corrected",
					"epoch", topology.EpochString(next.Epoch), "version", next.Settings.Version, "settings", topology.DescribeChanges(d))
			}
		}
	}
	return next, err
}
