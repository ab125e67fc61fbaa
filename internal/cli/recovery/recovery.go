// Package recovery makes the control plane of a cluster anew whose orchestrators are lost,
// from what its nodes know: it looks at the nodes, says whether and why not a new generation
// can begin, seals them, and makes the first state of the new orchestrators. It starts
// nothing, and decides about nodes only what people tell it.
//
// It is a round of Paxos (Lamport, "The Part-Time Parliament", 1998) with people as the
// proposers: the generation is the ballot, a seal the promise to take in nothing older, and
// a topology that carries the recovery's name what is accepted.
package recovery

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// Options say how a cluster is recovered.
type Options struct {
	Transport rpc.Transport
	// Endpoints are some nodes; the others are found by what these know.
	Endpoints []string
	// Timeout bounds each question.
	Timeout time.Duration
	// Without names nodes that are gone for good, or may be left behind.
	Without []string
	// AcceptLoss goes on where too few replicas are left without them.
	AcceptLoss bool
	// TakeOver begins a new recovery in the place of others that have begun.
	TakeOver bool
	// Orchestrators are where those of the new generation will serve, where that is not
	// where the lost ones did.
	Orchestrators []string
	// By says who recovers, Now is milliseconds since 1970.
	By  string
	Now int64
}

// Answer is what a node said.
type Answer struct {
	State    *adminv1.RecoveryState
	Topology *topology.Topology
	// Address is where it said so.
	Address string
}

// Orchestrator is one of those that the nodes know.
type Orchestrator struct {
	topology.Orchestrator
	// There is set when it answers as one of the cluster's present generation.
	There bool
	// What is how it is, in words.
	What string
}

// View is what was found of a cluster.
type View struct {
	opts Options
	// Newest is the newest topology that a node has.
	Newest *topology.Topology
	// NewestAt is a node that has it.
	NewestAt string
	// Answers has the nodes that answered, by incarnation.
	Answers map[uint64]Answer
	// Missing did not answer, Without are those that are not waited for.
	Missing, Without []*topology.Node
	Orchestrators    []Orchestrator
	// Unsealed are the vnodes that would lack a majority, Lost the nodes that have to be
	// given up with their disks.
	Unsealed []topology.Shortage
	Lost     []uint64
	// Seal is what the nodes are to be sealed with, Resumed tells that some are already.
	Seal    *adminv1.Seal
	Resumed bool
	// refusal is why it cannot go on.
	refusal *rpc.Error
}

// maxAsked bounds the questions at a time.
const maxAsked = 32

// Look finds out what the nodes know. The error is of finding the cluster; why it cannot be
// recovered is told by Refusal.
func Look(ctx context.Context, o Options) (*View, error) {
	v := &View{opts: o, Answers: map[uint64]Answer{}}
	asked := map[string]bool{}
	var last error
	for todo := o.Endpoints; len(todo) > 0; {
		found, err := askAll(ctx, o, todo, func(ctx context.Context, cc *grpc.ClientConn, address string) (Answer, error) {
			resp, err := adminv1.NewRecoveryServiceClient(cc).GetRecoveryState(ctx, &adminv1.GetRecoveryStateRequest{})
			return answerOf(resp.GetState(), address, err)
		})
		last = cmp.Or(last, err)
		for _, a := range todo {
			asked[a] = true
		}
		todo = nil
		for _, a := range found {
			if v.Newest != nil && a.Topology.ClusterID != v.Newest.ClusterID {
				return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "the endpoints are of two clusters, %s and %s: name those of one", v.Newest.ClusterID, a.Topology.ClusterID)
			}
			v.add(a)
			for _, n := range a.Topology.Nodes {
				if !asked[n.Address] && !slices.Contains(todo, n.Address) {
					todo = append(todo, n.Address)
				}
			}
		}
	}
	if v.Newest == nil {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotSent, "no node answers that knows the cluster: name nodes with --endpoints (%v)", last)
	}
	if err := v.weigh(); err != nil {
		return nil, err
	}
	v.askOrchestrators(ctx)
	v.refusal = cmp.Or(v.judge(), v.refusal)
	return v, nil
}

func answerOf(s *adminv1.RecoveryState, address string, err error) (Answer, error) {
	if err != nil {
		return Answer{}, err
	}
	if s.GetTopology() == nil {
		return Answer{}, fmt.Errorf("node %s has no topology", s.GetName())
	}
	t, err := topology.FromProto(s.GetTopology())
	return Answer{s, t, address}, err
}

// add takes in what a node said.
func (v *View) add(a Answer) {
	v.Answers[a.State.GetIncarnation()] = a
	if v.Newest == nil || a.Topology.Epoch > v.Newest.Epoch {
		v.Newest, v.NewestAt = a.Topology, a.State.GetName()
	}
}

// weigh finds who is missing, and what follows.
func (v *View) weigh() error {
	for _, name := range v.opts.Without {
		n := v.Newest.Resolve(name)
		if n == nil {
			return rpc.Errorf(codes.NotFound, "NODE_NOT_FOUND", "--without %s: the newest topology, of %s, has no node of that name", name, v.NewestAt).With("name", name)
		}
		if !slices.Contains(v.Without, n) {
			v.Without = append(v.Without, n)
		}
	}
	for i := range v.Newest.Nodes {
		n := &v.Newest.Nodes[i]
		if _, ok := v.Answers[n.Incarnation]; !ok && n.LostEpoch == 0 && !slices.Contains(v.Without, n) {
			v.Missing = append(v.Missing, n)
		}
	}
	here := func(inc uint64) bool { _, ok := v.Answers[inc]; return ok && !v.Newest.Lost(inc) }
	v.Unsealed = v.Newest.Unsealed(here)
	v.Lost = nil
	if len(v.Newest.Short(here)) > 0 {
		for _, n := range v.Without {
			if n.Role == topology.Data && n.LostEpoch == 0 {
				v.Lost = append(v.Lost, n.Incarnation)
			}
		}
	}
	v.chooseSeal()
	return nil
}

// chooseSeal goes on with the recovery that has begun, or begins one.
func (v *View) chooseSeal() {
	var without []string
	for _, n := range v.Without {
		without = append(without, n.Name)
	}
	slices.Sort(without)
	greatest := topology.Generation(v.Newest.Epoch)
	var begun []*adminv1.Seal
	for _, a := range v.Answers {
		greatest = max(greatest, a.State.GetSealedGeneration(), topology.Generation(a.Topology.Epoch))
		s := a.State.GetSeal()
		if s != nil && s.GetGeneration() > topology.Generation(v.Newest.Epoch) && !slices.ContainsFunc(begun, func(o *adminv1.Seal) bool { return o.GetRecovery() == s.GetRecovery() }) {
			begun = append(begun, s)
		}
	}
	switch {
	case len(begun) == 0 || v.opts.TakeOver:
		v.Seal = &adminv1.Seal{Recovery: rand.Text(), Generation: greatest + 1, Without: without, By: v.opts.By, AtMs: uint64(v.opts.Now), Orchestrators: v.opts.Orchestrators}
	case len(begun) == 1 && slices.Equal(begun[0].GetWithout(), without) && begun[0].GetGeneration() == greatest:
		v.Seal, v.Resumed = begun[0], true
		if len(v.opts.Orchestrators) > 0 {
			v.Seal.Orchestrators = v.opts.Orchestrators
		}
	default:
		v.Seal, v.refusal = begun[0], conflict(begun)
	}
}

func conflict(begun []*adminv1.Seal) *rpc.Error {
	var what []string
	for _, s := range begun {
		without := ""
		if len(s.GetWithout()) > 0 {
			without = ", without " + strings.Join(s.GetWithout(), ", ")
		}
		what = append(what, fmt.Sprintf("%s by %s at %s%s", s.GetRecovery(), s.GetBy(), time.UnixMilli(int64(s.GetAtMs())).UTC().Format(time.RFC3339), without))
	}
	slices.Sort(what)
	return rpc.Errorf(codes.Aborted, "RECOVERY_BEGUN", "another recovery has begun: %s; go on with it (with its --without), or make its file useless and begin anew with --take-over", strings.Join(what, "; ")).
		With("recoveries", strings.Join(what, "; "))
}

// askOrchestrators finds out whether the control plane is lost at all.
func (v *View) askOrchestrators(ctx context.Context) {
	for _, o := range v.Newest.Orchestrators {
		v.Orchestrators = append(v.Orchestrators, Orchestrator{Orchestrator: o})
	}
	var wg sync.WaitGroup
	for i := range v.Orchestrators {
		wg.Go(func() {
			o := &v.Orchestrators[i]
			o.There, o.What = v.askOrchestrator(ctx, o.Address)
		})
	}
	wg.Wait()
}

func (v *View) askOrchestrator(ctx context.Context, address string) (there bool, what string) {
	_, err := ask(ctx, v.opts, address, func(ctx context.Context, cc *grpc.ClientConn, _ string) (struct{}, error) {
		resp, err := adminv1.NewStatusServiceClient(cc).GetOrchestratorStatus(ctx, &adminv1.GetOrchestratorStatusRequest{})
		if err != nil {
			return struct{}{}, err
		}
		s := resp.GetStatus()
		if now := topology.Generation(v.Newest.Epoch); s.GetEpoch() != 0 && topology.Generation(s.GetEpoch()) < now {
			what = fmt.Sprintf("answers, of generation %d, which is over", topology.Generation(s.GetEpoch()))
			return struct{}{}, nil
		}
		_, err = topologyv1.NewTopologyServiceClient(cc).GetTopology(ctx, &topologyv1.GetTopologyRequest{ClusterId: v.Newest.ClusterID})
		if e := rpc.AsError(err); e != nil && e.Reason == rpc.ReasonWrongPeer {
			what = "answers, of another cluster: stop it, it was started with an empty directory and no recovery file"
			return struct{}{}, nil
		}
		there, what = true, "answers, "+s.GetRaftState()
		return struct{}{}, nil
	})
	if err != nil {
		return false, "does not answer: " + rpc.AsError(err).Message
	}
	return there, what
}

// judge returns why a new generation must not begin, or nil.
func (v *View) judge() *rpc.Error {
	var there []string
	for _, o := range v.Orchestrators {
		if o.There {
			there = append(there, o.Name)
		}
	}
	if n := len(v.Orchestrators); n > 0 && len(there) >= quorum.Majority.Need(n) {
		return rpc.Errorf(codes.FailedPrecondition, "ORCHESTRATORS_ANSWER",
			"%s of %d orchestrators answer, which is a majority: nothing needs to be recovered; where they cannot agree, look at their logs, and only if they are lost for good stop them and run this again",
			strings.Join(there, ", "), n).With("orchestrators", strings.Join(there, ","))
	}
	for _, n := range v.Without {
		if _, ok := v.Answers[n.Incarnation]; ok {
			return rpc.Errorf(codes.FailedPrecondition, "NODE_ANSWERS", "--without %s: it answers; leave it in, or stop it first", n.Name).With("name", n.Name)
		}
	}
	if len(v.Missing) > 0 {
		return rpc.Errorf(codes.FailedPrecondition, "NODES_MISSING",
			"%s do not answer, and may know of a later change than the others: start them, or go on without those that are gone for good (--without %s)",
			nodeNames(v.Missing, ", "), nodeNames(v.Missing, ",")).With("missing", nodeNames(v.Missing, ","))
	}
	if len(v.Unsealed) > 0 && !v.opts.AcceptLoss {
		vnodes, namespaces := topology.SortedVnodes(v.Unsealed)
		return rpc.Errorf(codes.FailedPrecondition, "TOO_FEW_NODES",
			"without %s, %d vnodes have less than a majority of the replicas of %s: those nodes may have acknowledged writes, and may go on doing so where they still run; start them, or, if they and their disks are gone for good, add --accept-loss",
			nodeNames(v.Without, ", "), len(vnodes), strings.Join(namespaces, ", ")).With("vnodes", len(vnodes))
	}
	return nil
}

// Refusal returns why a new generation must not begin, and what to do, or nil.
func (v *View) Refusal() *rpc.Error { return v.refusal }

// Loss returns what the recovery would have to give up. It names no vnodes where that is
// nothing.
func (v *View) Loss() topology.Loss {
	if len(v.Lost) == 0 {
		return topology.Loss{}
	}
	return v.Newest.LossOf(v.Lost)
}

// Recover seals the nodes and returns the first state of the new generation. Where it fails
// it can be run again.
func (v *View) Recover(ctx context.Context) (*topology.State, error) {
	if v.refusal != nil {
		return nil, v.refusal
	}
	nodes := make([]string, 0, len(v.Answers))
	for inc, a := range v.Answers {
		if v.Newest.Node(inc) != nil { // else it is no part of the cluster any more
			nodes = append(nodes, a.Address)
		}
	}
	req := &adminv1.SealRequest{ClusterId: v.Newest.ClusterID, Seal: v.Seal}
	sealed, err := askAll(ctx, v.opts, nodes, func(ctx context.Context, cc *grpc.ClientConn, address string) (Answer, error) {
		resp, err := adminv1.NewRecoveryServiceClient(cc).Seal(ctx, req)
		return answerOf(resp.GetState(), address, err)
	})
	if err != nil {
		e := rpc.AsError(err)
		if e.Code == codes.Aborted {
			return nil, rpc.Errorf(codes.Aborted, "RECOVERY_BEGUN", "another recovery came in between: %s; run this again to see it", e.Message)
		}
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "%d of %d nodes are sealed: %s; run this again, it goes on", len(sealed), len(nodes), e.Message)
	}
	// What they say now is what will be: nothing else comes into use there.
	now := &View{opts: v.opts, Answers: map[uint64]Answer{}, Seal: v.Seal}
	for _, a := range sealed {
		now.add(a)
	}
	seal := v.Seal
	if err := now.weigh(); err != nil {
		return nil, err
	}
	now.Seal, now.refusal = seal, nil
	if now.refusal = now.judge(); now.refusal != nil {
		return nil, now.refusal
	}
	return now.state()
}

// state makes the first state of the new generation.
func (v *View) state() (*topology.State, error) {
	r := topology.Recovery{ID: v.Seal.GetRecovery(), Generation: v.Seal.GetGeneration(), Newest: v.Newest, Lost: v.Lost, AtMillis: int64(v.Seal.GetAtMs())}
	for inc, a := range v.Answers {
		if v.Newest.Node(inc) != nil {
			r.Starts = append(r.Starts, topology.Start{Incarnation: inc, Boot: a.State.GetBoot(), BootID: a.State.GetBootId()})
		}
	}
	r.What = fmt.Sprintf("recovered by %s as generation %d from epoch %s, the newest that %d nodes had", v.Seal.GetBy(), r.Generation, topology.EpochString(v.Newest.Epoch), len(v.Answers))
	if len(v.Without) > 0 {
		r.What += ", without " + nodeNames(v.Without, ", ")
	}
	return r.State()
}

func nodeNames(nodes []*topology.Node, sep string) string {
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	return strings.Join(names, sep)
}

// askAll asks some addresses, a few at a time, and returns the answers with the first error;
// one that says that something else has begun comes before others.
func askAll[T any](ctx context.Context, o Options, addresses []string, call func(context.Context, *grpc.ClientConn, string) (T, error)) (out []T, _ error) {
	type outcome struct {
		answer T
		err    error
	}
	all := make([]outcome, len(addresses))
	tokens := make(chan struct{}, maxAsked)
	var wg sync.WaitGroup
	for i, a := range addresses {
		tokens <- struct{}{}
		wg.Go(func() {
			defer func() { <-tokens }()
			all[i].answer, all[i].err = ask(ctx, o, a, call)
		})
	}
	wg.Wait()
	var errs []error
	for i, got := range all {
		if got.err == nil {
			out = append(out, got.answer)
			continue
		}
		e := rpc.AsError(got.err)
		e = rpc.Errorf(e.Code, e.Reason, "%s: %s", addresses[i], e.Message)
		if e.Code == codes.Aborted {
			return out, e
		}
		errs = append(errs, e)
	}
	if len(errs) > 0 {
		return out, errs[0]
	}
	return out, nil
}

// ask asks one address.
func ask[T any](ctx context.Context, o Options, address string, call func(context.Context, *grpc.ClientConn, string) (T, error)) (T, error) {
	var zero T
	cc, err := o.Transport.NewConn(address)
	if err != nil {
		return zero, err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	answer, err := call(ctx, cc, address)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return zero, rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "no answer within %s", o.Timeout)
	}
	return answer, err
}
