package coordinator

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// maxBatchOperations bounds the operations of a batch.
const maxBatchOperations = 10_000

// Batch writes several keys: one commit per replica and vnode, and a result for
// each operation.
func (c *Coordinator) Batch(ctx context.Context, r *kvv1.BatchRequest) (_ *kvv1.BatchResponse, err error) {
	ctx, end, aerr := c.begin(ctx, opPut, request{r.GetNamespace(), r.GetEpoch(), r.GetToken(), false})
	if aerr != nil {
		return nil, aerr
	}
	defer func() { end(err) }()
	t, ns, nerr := c.namespaceRetry(ctx, r.GetNamespace())
	if nerr != nil {
		return nil, nerr
	}
	if err := checkBatch(r, t); err != nil {
		return nil, err
	}
	spec, qerr := quorumOf("write_quorum", r.GetWriteQuorum(), ns)
	if qerr != nil {
		return nil, qerr
	}
	groups := map[uint32]*group{}
	var first record.Version
	for i, op := range r.GetOperations() {
		c.hot.note(ns.ID, op.GetKey(), true)
		entry, version, err := c.entry(op, ns)
		if err != nil {
			return nil, err
		}
		if i > 0 && mutant.On("one-version-for-a-batch") {
			rec, _ := record.Decode(entry.GetRecord())
			rec.Version = first
			entry.Record, version = record.Encode(rec), first
		}
		first = version
		v := t.VnodeOf(op.GetKey())
		g := groups[v]
		if g == nil {
			g = &group{vnode: v, quorum: spec}
			groups[v] = g
		}
		g.indexes = append(g.indexes, i)
		g.operations = append(g.operations, op)
		g.entries = append(g.entries, entry)
		g.versions = append(g.versions, version)
	}
	resp := &kvv1.BatchResponse{Results: make([]*kvv1.BatchResult, len(r.GetOperations())), Epoch: t.Epoch}
	// All groups are on their way before the first is waited for.
	for _, g := range groups {
		g.first, g.firstErr = g.begin(c, t, ns)
	}
	for _, g := range groups {
		gerr := g.finish(ctx, c, ns)
		if gerr != nil && gerr.Reason == rpc.ReasonOutcomeUnknown {
			c.metrics.unknown.Inc()
		}
		for i, index := range g.indexes {
			resp.Results[index] = &kvv1.BatchResult{Error: gerr.Proto()}
			if gerr == nil {
				resp.Results[index].Version = versionProto(g.versions[i])
			}
		}
	}
	return resp, nil
}

func checkBatch(r *kvv1.BatchRequest, t *topology.Topology) *rpc.Error {
	ops := r.GetOperations()
	if n := len(ops); n == 0 || n > maxBatchOperations {
		return badRequest("operations", n, maxBatchOperations, "batch has %d operations: want 1 to %d", n, maxBatchOperations)
	}
	size, limit := 0, t.Settings.MaxBatchBytes
	seen := make(map[string]int, len(ops))
	for i, op := range ops {
		if err := checkOperation(op, t); err != nil {
			return err.With("operation", i)
		}
		size += len(op.GetKey()) + len(op.GetValue())
		if first, ok := seen[string(op.GetKey())]; ok {
			return rpc.Errorf(codes.InvalidArgument, "DUPLICATE_KEY", "operations %d and %d of the batch have the same key", first, i).
				With("field", "operations").With("operation", i)
		}
		seen[string(op.GetKey())] = i
	}
	if size > limit {
		return badRequest("operations", size, limit, "batch has %d bytes: the limit is %d", size, limit)
	}
	return nil
}

// group is what a batch writes to one vnode.
type group struct {
	vnode      uint32
	quorum     quorum.Spec
	indexes    []int
	operations []*kvv1.BatchOperation
	entries    []*replicav1.Entry
	versions   []record.Version
	// first and firstErr are the outcome of begin.
	first    *write
	firstErr *rpc.Error
}

// renew gives all operations of the group new versions.
func (g *group) renew(c *Coordinator, ns *topology.Namespace) *rpc.Error {
	// Earlier attempts may still be reading the old ones.
	g.entries, g.versions = make([]*replicav1.Entry, len(g.operations)), make([]record.Version, len(g.operations))
	for i, op := range g.operations {
		var err *rpc.Error
		if g.entries[i], g.versions[i], err = c.entry(op, ns); err != nil {
			return err
		}
	}
	return nil
}

func (g *group) begin(c *Coordinator, t *topology.Topology, ns *topology.Namespace) (*write, *rpc.Error) {
	return c.start(writeJob{
		topology: t, namespace: ns, vnode: g.vnode, goals: ns.Writes(g.quorum),
		entries: g.entries, source: replicav1.Source_SOURCE_FIRST_HAND, hints: ns.Hints,
	})
}

// finish waits for the group, and follows a changing topology.
func (g *group) finish(ctx context.Context, c *Coordinator, ns *topology.Namespace) *rpc.Error {
	var tries attempts
	renew := func() *rpc.Error { return g.renew(c, ns) }
	return tries.follow(ctx, c, renew, func() (*write, *rpc.Error) {
		if len(tries) == 0 {
			return g.first, g.firstErr
		}
		t, ns, err := c.namespace(ns.Name)
		if err != nil {
			return nil, err
		}
		return g.begin(c, t, ns)
	})
}
