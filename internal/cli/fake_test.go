package cli

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// fake is a cluster that answers over real connections and keeps its records in one
// map. It knows what kvctl needs to be told, not how a cluster works.
type fake struct {
	t     *testing.T
	nodes []*fakeNode
	mu    struct {
		sync.Mutex
		topology *topologyv1.Topology
		records  map[string]map[string]*kvv1.ScanRecord // by namespace and key
		last     uint64                                 // timestamp
		capacity *adminv1.GetCapacityResponse
		history  []*topologyv1.Change
		health   map[uint64]*topologyv1.NodeHealth
		status   map[uint64]*adminv1.NodeStatus
		ages     map[uint64]uint64
		// foundMs is since when the unhealthy were found to be, by what was agreed on.
		foundMs    uint64
		conditions []*topologyv1.Condition
		// repairPaused are the nodes whose repair is.
		repairPaused map[uint64]bool
		hints        map[uint64]*adminv1.ListHintsResponse
		operations   []*adminv1.ObservedOperation
		// controlled: an orchestrator leads.
		controlled bool
		// settings are the versions of the settings; deaf nodes take no new one in.
		settings []*topologyv1.SettingsVersion
		deaf     map[uint64]bool
		// overtaken is how many times the epoch changes before an operation can start.
		overtaken int
		// holds: nodes say what they hold.
		holds      bool
		heldBack   []uint64
		puts       []*kvv1.PutRequest
		batches    int
		batching   int
		mostAtOnce int
		trace      []*kvv1.TraceEvent
		// refuse, if set, may refuse a batch.
		refuse func(*kvv1.BatchRequest) error
		// slow delays batches.
		slow time.Duration
		// starting: nodes have no topology yet.
		starting bool
		rolling  fakeRoll
	}
}

type fakeNode struct {
	kvv1.UnimplementedKVServiceServer
	topologyv1.UnimplementedTopologyServiceServer
	adminv1.UnimplementedControlServiceServer
	adminv1.UnimplementedStatusServiceServer
	adminv1.UnimplementedRepairServiceServer
	adminv1.UnimplementedProcessServiceServer
	f           *fake
	name        string
	incarnation uint64
	address     string
	server      *grpc.Server
}

// fakeVnodes is the number of vnodes, fakePage the records of a page of a scan.
const (
	fakeVnodes = 8
	fakePage   = 3
)

// newFake starts a cluster of n nodes in zones z1 to z3, whose ring has formed.
func newFake(t *testing.T, n int) *fake {
	t.Helper()
	return newFakeWith(t, n, rpc.TLSFiles{})
}

func newFakeWith(t *testing.T, n int, files rpc.TLSFiles) *fake {
	t.Helper()
	tls, err := files.Load()
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t}
	f.mu.records = map[string]map[string]*kvv1.ScanRecord{}
	f.mu.last = uint64(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC).UnixMilli()) << 16
	f.mu.health = map[uint64]*topologyv1.NodeHealth{}
	f.mu.status = map[uint64]*adminv1.NodeStatus{}
	f.mu.ages = map[uint64]uint64{}
	f.mu.repairPaused = map[uint64]bool{}
	f.mu.hints = map[uint64]*adminv1.ListHintsResponse{}
	f.mu.deaf = map[uint64]bool{}
	f.mu.controlled = true
	top := &topologyv1.Topology{
		ClusterId: "fake", Epoch: 7, Vnodes: fakeVnodes, FoundingNodes: uint32(n), Settings: topology.DefaultSettings().Proto(),
		Orchestrators: []*topologyv1.Orchestrator{{Name: "orch1", Address: "127.0.0.1:1"}},
		Namespaces: []*topologyv1.Namespace{{
			Id: 1, Name: "default", N: uint32(min(n, 3)), WriteQuorum: "quorum", ReadQuorum: "quorum",
			ReadRepair: topologyv1.ReadRepairMode_READ_REPAIR_MODE_BLOCKING, Hints: true, LeastWriteAcks: 2, ChangedEpoch: 3,
		}},
	}
	for i := range n {
		node := &fakeNode{f: f, name: fmt.Sprintf("node%d", i+1), incarnation: uint64(i + 1)}
		node.start(rpc.Transport{TLS: tls})
		f.nodes = append(f.nodes, node)
		top.Nodes = append(top.Nodes, &topologyv1.Node{
			Incarnation: node.incarnation, Name: fmt.Sprintf("node%d", i+1), Zone: fmt.Sprintf("z%d", i%3+1), Role: topologyv1.Role_ROLE_DATA,
			Address: node.address, AdminAddress: fmt.Sprintf("127.0.0.1:%d", i+2), DataId: fmt.Sprint(i),
		})
		f.mu.health[node.incarnation] = &topologyv1.NodeHealth{Incarnation: node.incarnation, State: topologyv1.NodeHealth_STATE_HEALTHY}
		f.mu.status[node.incarnation] = &adminv1.NodeStatus{Incarnation: node.incarnation, Name: fmt.Sprintf("node%d", i+1), State: adminv1.NodeStatus_STATE_SERVING, Epoch: 7, SettingsHash: topology.DefaultSettings().Hash(), ProcessSettingsHash: 0xabc}
	}
	for v := range fakeVnodes {
		vnode := &topologyv1.Vnode{ChangedEpoch: 2}
		for s := range min(n, 5) {
			vnode.Slots = append(vnode.Slots, &topologyv1.Slot{Node: uint64((v+s)%n + 1), Phase: topologyv1.Phase_PHASE_STABLE})
		}
		top.Ring = append(top.Ring, vnode)
	}
	f.mu.topology = top
	f.mu.settings = []*topologyv1.SettingsVersion{{Settings: proto.CloneOf(top.GetSettings()), Epoch: 1, AtMs: 1772366400000, What: "as the cluster was founded"}}
	return f
}

func (n *fakeNode) start(transport rpc.Transport) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.f.t.Fatal(err)
	}
	n.address = l.Addr().String()
	n.server = transport.NewServer()
	kvv1.RegisterKVServiceServer(n.server, n)
	topologyv1.RegisterTopologyServiceServer(n.server, n)
	adminv1.RegisterControlServiceServer(n.server, n)
	adminv1.RegisterStatusServiceServer(n.server, n)
	adminv1.RegisterRepairServiceServer(n.server, n)
	adminv1.RegisterProcessServiceServer(n.server, n)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = n.server.Serve(l)
	}()
	n.f.t.Cleanup(func() {
		n.server.Stop()
		<-done
	})
}

func (f *fake) endpoints() string {
	var out []string
	for _, n := range f.nodes {
		out = append(out, n.address)
	}
	return strings.Join(out, ",")
}

// ran is what came of a run of kvctl.
type ran struct {
	stdout, stderr string
	code           int
}

// run runs kvctl against the cluster.
func (f *fake) run(args ...string) ran {
	f.t.Helper()
	return f.runWith(func(*App) {}, args...)
}

func (f *fake) runWith(change func(*App), args ...string) ran {
	f.t.Helper()
	return f.runIn(context.Background(), change, args...)
}

func (f *fake) runIn(ctx context.Context, change func(*App), args ...string) ran {
	f.t.Helper()
	return runKvctlIn(ctx, f.t, func(a *App) {
		a.Getenv = func(name string) string {
			if name == "KVCTL_ENDPOINTS" {
				return f.endpoints()
			}
			return ""
		}
		change(a)
	}, args...)
}

// runKvctl runs kvctl without any surroundings but those that change gives.
func runKvctl(t *testing.T, change func(*App), args ...string) ran {
	t.Helper()
	return runKvctlIn(context.Background(), t, change, args...)
}

// runKvctlIn is runKvctl under a context.
func runKvctlIn(ctx context.Context, t *testing.T, change func(*App), args ...string) ran {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	a := &App{
		Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr, Getenv: func(string) string { return "" },
		ConfigDir: filepath.Join(t.TempDir(), "kvasir"), Software: "v0-test",
	}
	change(a)
	code := a.Run(ctx, args)
	return ran{stdout.String(), stderr.String(), code}
}

// want fails the test unless a run ended with a code, and its output has all texts.
func (r ran) want(t *testing.T, code int, texts ...string) ran {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\nstdout: %s\nstderr: %s", r.code, code, r.stdout, r.stderr)
	}
	for _, text := range texts {
		if !strings.Contains(r.stdout+r.stderr, text) {
			t.Errorf("%q is missing in\nstdout: %s\nstderr: %s", text, r.stdout, r.stderr)
		}
	}
	return r
}

func (n *fakeNode) Session(stream grpc.BidiStreamingServer[kvv1.SessionRequest, kvv1.SessionResponse]) error {
	return rpc.Serve(rpc.KVServerStream(stream), metadata.MD{}, rpc.KV, nil,
		func(_ context.Context, _ time.Time, calls []*kvv1.SessionCall, reply func(*kvv1.SessionReply)) {
			var wg sync.WaitGroup
			for _, c := range calls {
				wg.Go(func() {
					r, err := n.serve(c)
					if err != nil {
						r = &kvv1.SessionReply{Error: rpc.AsError(err).Proto()}
					}
					r.Id = c.GetId()
					reply(r)
				})
			}
			wg.Wait()
		})
}

func (n *fakeNode) serve(c *kvv1.SessionCall) (*kvv1.SessionReply, error) {
	f := n.f
	f.mu.Lock()
	defer f.mu.Unlock()
	switch r := c.GetRequest().(type) {
	case *kvv1.SessionCall_Put:
		f.mu.puts = append(f.mu.puts, r.Put)
		receipt, err := f.store(r.Put.GetNamespace(), &kvv1.BatchOperation{Key: r.Put.GetKey(), Value: r.Put.GetValue(), TtlMs: r.Put.GetTtlMs()}, r.Put.GetWriteQuorum(), r.Put.GetTrace())
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Put{Put: &kvv1.PutResponse{Receipt: receipt}}}, err
	case *kvv1.SessionCall_Delete:
		receipt, err := f.store(r.Delete.GetNamespace(), &kvv1.BatchOperation{Key: r.Delete.GetKey(), Delete: true}, r.Delete.GetWriteQuorum(), r.Delete.GetTrace())
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Delete{Delete: &kvv1.DeleteResponse{Receipt: receipt}}}, err
	case *kvv1.SessionCall_Get:
		resp, err := f.get(r.Get)
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Get{Get: resp}}, err
	case *kvv1.SessionCall_Batch:
		resp, err := f.batch(r.Batch)
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Batch{Batch: resp}}, err
	case *kvv1.SessionCall_Scan:
		resp, err := f.scan(r.Scan)
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Scan{Scan: resp}}, err
	case *kvv1.SessionCall_Trace:
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Trace{Trace: &kvv1.TraceResponse{Events: f.mu.trace, Complete: true}}}, nil
	case *kvv1.SessionCall_Ping:
		return &kvv1.SessionReply{Response: &kvv1.SessionReply_Ping{Ping: &kvv1.PingResponse{Epoch: f.mu.topology.GetEpoch()}}}, nil
	}
	return nil, rpc.Errorf(codes.Unimplemented, "UNKNOWN_OPERATION", "what?")
}

func (f *fake) namespace(name string) (*topologyv1.Namespace, error) {
	for _, ns := range f.mu.topology.GetNamespaces() {
		if ns.GetName() == name {
			return ns, nil
		}
	}
	return nil, rpc.AsError(topology.ErrNamespaceNotFound(name))
}

// up counts the nodes that are healthy.
func (f *fake) up() int {
	up := 0
	for _, h := range f.mu.health {
		if h.GetState() == topologyv1.NodeHealth_STATE_HEALTHY {
			up++
		}
	}
	return up
}

func (f *fake) store(namespace string, op *kvv1.BatchOperation, w string, trace bool) (*kvv1.Receipt, error) {
	ns, err := f.namespace(namespace)
	if err != nil {
		return nil, err
	}
	spec, err := quorum.Parse(w)
	if err != nil {
		return nil, rpc.Errorf(codes.InvalidArgument, "BAD_QUORUM", "%s", err)
	}
	own, _ := quorum.Parse(ns.GetWriteQuorum())
	need := spec.Or(own).Need(int(ns.GetN()))
	if up := f.up(); up < need {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas, "%d of %d slots are live, %d are needed", up, ns.GetN(), need).With("needed", need)
	}
	if limit := int(f.mu.topology.GetSettings().GetMaxValueBytes()); len(op.GetValue()) > limit {
		return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "value has %d bytes: the limit is %d", len(op.GetValue()), limit).With("field", "value").With("limit", limit)
	}
	f.mu.last++
	if f.mu.records[namespace] == nil {
		f.mu.records[namespace] = map[string]*kvv1.ScanRecord{}
	}
	version := &kvv1.Version{Timestamp: f.mu.last, Incarnation: 1}
	f.mu.records[namespace][string(op.GetKey())] = &kvv1.ScanRecord{Key: op.GetKey(), Value: op.GetValue(), Version: version}
	if op.GetDelete() {
		delete(f.mu.records[namespace], string(op.GetKey()))
	}
	return f.receipt(ns, need, version, trace), nil
}

// receipt names node1 whoever coordinates, so that outputs are the same each time.
func (f *fake) receipt(ns *topologyv1.Namespace, need int, version *kvv1.Version, trace bool) *kvv1.Receipt {
	r := &kvv1.Receipt{
		Epoch: f.mu.topology.GetEpoch(), N: ns.GetN(), Needed: uint32(need), Acknowledged: uint32(need), Vnode: 5,
		Strength: kvv1.Strength_STRENGTH_STRONG, Version: version, Coordinator: "node1",
	}
	if need <= int(ns.GetN())/2 {
		r.Strength = kvv1.Strength_STRENGTH_EVENTUAL
	}
	if trace {
		r.TraceId = 99
	}
	return r
}

func (f *fake) get(r *kvv1.GetRequest) (*kvv1.GetResponse, error) {
	ns, err := f.namespace(r.GetNamespace())
	if err != nil {
		return nil, err
	}
	if r.GetReplica() == "nobody" {
		return nil, rpc.Errorf(codes.NotFound, "NODE_NOT_FOUND", "there is no node %q", r.GetReplica())
	}
	rec := f.mu.records[r.GetNamespace()][string(r.GetKey())]
	resp := &kvv1.GetResponse{Found: rec != nil, Value: rec.GetValue(), ExpiresAtMs: rec.GetExpiresAtMs(), Receipt: f.receipt(ns, 2, rec.GetVersion(), r.GetTrace())}
	if r.GetReplica() != "" {
		resp.Value = append([]byte(r.GetReplica()+" has "), resp.Value...)
	}
	return resp, nil
}

func (f *fake) batch(r *kvv1.BatchRequest) (*kvv1.BatchResponse, error) {
	f.mu.batches++
	f.mu.batching++
	f.mu.mostAtOnce = max(f.mu.mostAtOnce, f.mu.batching)
	defer func() { f.mu.batching-- }()
	if slow := f.mu.slow; slow > 0 {
		f.mu.Unlock()
		time.Sleep(slow)
		f.mu.Lock()
	}
	if f.mu.refuse != nil {
		if err := f.mu.refuse(r); err != nil {
			return nil, err
		}
	}
	seen := map[string]bool{}
	size := 0
	for i, op := range r.GetOperations() {
		if seen[string(op.GetKey())] {
			return nil, rpc.Errorf(codes.InvalidArgument, "DUPLICATE_KEY", "operation %d has the key of an earlier one", i).With("operation", i)
		}
		seen[string(op.GetKey())] = true
		size += len(op.GetKey()) + len(op.GetValue())
	}
	if limit := int(f.mu.topology.GetSettings().GetMaxBatchBytes()); size > limit {
		return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "batch has %d bytes: the limit is %d", size, limit).With("field", "operations")
	}
	resp := &kvv1.BatchResponse{Epoch: f.mu.topology.GetEpoch()}
	for i, op := range r.GetOperations() {
		receipt, err := f.store(r.GetNamespace(), op, r.GetWriteQuorum(), false)
		if e := rpc.AsError(err); e != nil && e.Code == codes.InvalidArgument {
			return nil, e.With("operation", i)
		}
		if err != nil && i == 0 {
			return nil, err
		}
		resp.Results = append(resp.Results, &kvv1.BatchResult{Error: rpc.AsError(err).Proto(), Version: receipt.GetVersion()})
	}
	return resp, nil
}

func (f *fake) scan(r *kvv1.ScanRequest) (*kvv1.ScanResponse, error) {
	if _, err := f.namespace(r.GetNamespace()); err != nil {
		return nil, err
	}
	var keys []string
	for key := range f.mu.records[r.GetNamespace()] {
		if strings.HasPrefix(key, string(r.GetPrefix())) && key >= string(r.GetStart()) && key > string(r.GetResumeToken()) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	resp := &kvv1.ScanResponse{}
	for i, key := range keys {
		if i == fakePage && len(keys) > fakePage {
			resp.ResumeToken = []byte(keys[i-1])
			break
		}
		if r.GetLimit() > 0 && uint64(i) == r.GetLimit() {
			break
		}
		rec := proto.CloneOf(f.mu.records[r.GetNamespace()][key])
		if r.GetKeysOnly() {
			rec.Value = nil
		}
		resp.Records = append(resp.Records, rec)
	}
	return resp, nil
}

func (n *fakeNode) GetTopology(context.Context, *topologyv1.GetTopologyRequest) (*topologyv1.GetTopologyResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	if n.f.mu.starting {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "this node has no topology yet: it waits for an orchestrator")
	}
	return &topologyv1.GetTopologyResponse{Topology: proto.CloneOf(n.f.mu.topology)}, nil
}

func (n *fakeNode) WatchTopology(_ *topologyv1.WatchTopologyRequest, s grpc.ServerStreamingServer[topologyv1.WatchTopologyResponse]) error {
	<-s.Context().Done()
	return s.Context().Err()
}

func (n *fakeNode) GetNodeStatus(context.Context, *adminv1.GetNodeStatusRequest) (*adminv1.GetNodeStatusResponse, error) {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	status := proto.CloneOf(n.f.mu.status[n.incarnation])
	n.f.deliver(n.incarnation)
	return &adminv1.GetNodeStatusResponse{Status: status}, nil
}
