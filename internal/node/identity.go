package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// identity is what a data directory is to the cluster.
type identity struct {
	// DataID is drawn once when the directory is made.
	DataID string `json:"data_id"`
	// ClusterID and Incarnation are empty until the first registration.
	ClusterID   string `json:"cluster_id,omitempty"`
	Incarnation uint64 `json:"incarnation,omitempty"`
}

const metaIdentity = "identity"

// loadIdentity reads the directory's identity, drawing one for a new directory.
func loadIdentity(s *storage.Store) (identity, error) {
	var id identity
	b, err := s.Meta(metaIdentity)
	if errors.Is(err, storage.ErrNotFound) {
		id.DataID = rand.Text()
		return id, id.save(s)
	}
	if err != nil {
		return id, err
	}
	if err := json.Unmarshal(b, &id); err != nil || id.DataID == "" {
		return id, fmt.Errorf("%w: identity %q of the data directory", storage.ErrCorrupt, b)
	}
	return id, nil
}

func (id identity) save(s *storage.Store) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return s.SetMeta(metaIdentity, b)
}

// registrar makes the node known to the orchestrators.
type registrar struct {
	cfg    *Config
	store  *storage.Store
	orchs  func() []string
	dial   rpc.Transport
	bootID string
	// admits returns why the orchestrators that agreed on a topology are not followed.
	admits func(*topology.Topology) *rpc.Error
}

// register registers once, at the first orchestrator that takes it.
func (r *registrar) register(ctx context.Context, id identity) (identity, *topology.Topology, error) {
	boots, err := r.store.Boots()
	if err != nil {
		return id, nil, err
	}
	req := &adminv1.RegisterNodeRequest{
		ClusterId: id.ClusterID, Name: r.cfg.Name, Zone: r.cfg.Zone, Role: topologyv1.Role(r.cfg.role()),
		Address: r.cfg.Advertise, AdminAddress: r.cfg.AdminAdvertise, GossipAddress: r.cfg.GossipAdvertise,
		DataId: id.DataID, Incarnation: id.Incarnation, Boot: boots, BootId: r.bootID,
	}
	type admission struct {
		incarnation uint64
		topology    *topology.Topology
	}
	got, err := anyOrchestrator(ctx, r.dial, r.orchs(), idempotent, func(ctx context.Context, c adminv1.ControlServiceClient, opts ...grpc.CallOption) (a admission, _ error) {
		resp, err := c.RegisterNode(ctx, req, opts...)
		if err != nil {
			return a, err
		}
		a.incarnation = resp.GetIncarnation()
		if a.topology, err = topology.FromProto(resp.GetTopology()); err != nil {
			return a, err
		}
		if err := r.admits(a.topology); err != nil {
			return a, err
		}
		return a, nil
	})
	if err != nil {
		return id, nil, err
	}
	if id.Incarnation == 0 || id.ClusterID == "" {
		id.Incarnation, id.ClusterID = got.incarnation, got.topology.ClusterID
		if err := id.save(r.store); err != nil {
			return id, nil, err
		}
	}
	return id, got.topology, nil
}

// refused reports whether an orchestrator turned the node away for good, rather
// than being out of reach or not ready.
func refused(err error) bool {
	e := rpc.AsError(err)
	switch e.Code {
	case codes.InvalidArgument, codes.AlreadyExists, codes.NotFound:
		return true
	case codes.FailedPrecondition:
		return e.Reason != "NOT_FOUNDED"
	}
	return false
}

// expelled reports whether the data directory may serve no more. Other refusals, as
// of another cluster's orchestrator that answers by mistake, say nothing of that.
func expelled(err error) bool {
	r := rpc.AsError(err).Reason
	return r == "NODE_REMOVED" || r == "BOOT_REGRESSION"
}

// orchestrators returns the addresses of all orchestrators that are known, each once.
func orchestrators(seeds []string, t *topology.Topology) []string {
	var out []string
	add := func(address string) {
		if !slices.Contains(out, address) {
			out = append(out, address)
		}
	}
	for _, a := range seeds {
		add(a)
	}
	for _, o := range t.Orchestrators {
		add(o.Address)
	}
	return out
}

const (
	// orchestratorTimeout bounds one call to one orchestrator.
	orchestratorTimeout = 3 * time.Second
	// orchestratorPatience is how long one may take before the next is asked too.
	orchestratorPatience = 200 * time.Millisecond
)

// repeat says whether a request that was sent and not answered may be sent again.
type repeat bool

const (
	idempotent repeat = true
	change     repeat = false
)

// anyOrchestrator makes a call at one address after the other until one answers,
// whether well or with a refusal; with one that can be repeated it does not wait long
// before it asks the next as well. A change that was sent and not answered ends in
// OUTCOME_UNKNOWN: the next orchestrator might find it made.
func anyOrchestrator[T any](ctx context.Context, dial rpc.Transport, addresses []string, again repeat, call func(context.Context, adminv1.ControlServiceClient, ...grpc.CallOption) (T, error)) (T, error) {
	var zero T
	type answer struct {
		from string
		resp T
		err  error
		sent bool
	}
	ctx, cancel := context.WithCancel(ctx)
	answers, waiting := make(chan answer), 0
	defer func() {
		cancel()
		for ; waiting > 0; waiting-- {
			<-answers
		}
	}()
	ask := func(a string) {
		var sentTo peer.Peer // stays empty when the request never left
		resp, err := func() (T, error) {
			cc, err := dial.NewConn(a)
			if err != nil {
				return zero, err
			}
			defer cc.Close()
			ctx, cancel := context.WithTimeout(ctx, orchestratorTimeout)
			defer cancel()
			return call(ctx, adminv1.NewControlServiceClient(cc), grpc.Peer(&sentTo))
		}()
		answers <- answer{a, resp, err, sentTo.Addr != nil}
	}
	last := rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "no orchestrator is known")
	for waiting > 0 || len(addresses) > 0 {
		if len(addresses) > 0 {
			go ask(addresses[0])
			addresses, waiting = addresses[1:], waiting+1
		}
		var impatient <-chan time.Time
		if again == idempotent && len(addresses) > 0 {
			impatient = time.After(orchestratorPatience)
		}
		select {
		case <-impatient:
		case got := <-answers:
			waiting--
			if got.err == nil {
				return got.resp, nil
			}
			e := rpc.AsError(got.err)
			unanswered := e.Code == codes.Unavailable || e.Code == codes.DeadlineExceeded || e.Code == codes.Canceled
			if again == change && unanswered && got.sent && !e.NothingDone() {
				return zero, rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown, "the change may have been made or not; orchestrator %s: %s", got.from, e.Message)
			}
			if !unanswered || ctx.Err() != nil {
				return zero, e
			}
			last = rpc.Errorf(codes.Unavailable, rpc.ReasonNoLeader, "no orchestrator answers for its leader; %s: %s", got.from, e.Message)
		}
	}
	return zero, last
}
