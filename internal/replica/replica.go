// Package replica is what a node does with the records it holds: it joins what it
// is sent, answers reads and scans from its own copy, keeps hints for others, and
// refuses what is not its business in the present epoch. It never talks to other
// replicas; who asks whom is for the protocols that use it.
package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Limits of one page of a scan.
const (
	maxScanRecords = 10_000
	maxScanBytes   = 4 << 20
)

// catchUpTimeout bounds how long a request waits for a newer topology.
const catchUpTimeout = time.Second

// Config holds what a replica is made of. Fields without a remark are required.
type Config struct {
	Self   uint64
	Store  *storage.Store
	Clock  *Clock
	Fence  *Fence
	Hints  *Hints
	Logger *slog.Logger
	// CatchUp fetches a topology of at least an epoch, trying the given address first.
	CatchUp func(ctx context.Context, epoch uint64, address string) error
	// Refuse returns why the node must not serve at all, or nil.
	Refuse func() *rpc.Error
	// Load returns how much of its bounds the node's own work takes, 0 to 1; the
	// credits of those who send hints follow it. Default: always 0.
	Load func() float64
	// HintBytesPerSecond is how many bytes of hints the node takes when it is idle.
	// Default 16 MiB.
	HintBytesPerSecond int
	// Open reports whether a vnode that the node is incoming on since an epoch takes
	// records yet. Default: always.
	Open func(namespace, vnode uint32, since uint64) bool
	// Pool runs what a frame asks for beside each other. May be nil.
	Pool *rpc.Pool
	// Address is where this node's calls to itself come from. They may compare what
	// bit rot has left of a vnode, so that it can be filled again.
	Address string
}

// Replica serves one node's records. It is safe for concurrent use.
//
// Invariant 7: a call is served only in an epoch and phase in which the node is an
// endpoint of the vnode.
type Replica struct {
	cfg Config
	// run tells this run of the process from others.
	run uint64
	// refused counts the calls that were refused for a promise.
	refused atomic.Uint64
	intake  *intake
	// calls is how many are being handled.
	calls atomic.Int64
}

// New returns a replica.
func New(cfg Config) *Replica {
	if cfg.Open == nil {
		cfg.Open = func(uint32, uint32, uint64) bool { return true }
	}
	if cfg.Load == nil {
		cfg.Load = func() float64 { return 0 }
	}
	return &Replica{cfg: cfg, run: rand.Uint64(), intake: newIntake(cfg.HintBytesPerSecond)}
}

// HintIntake returns how many bytes of hints the replica has taken, and the credit
// that it granted last.
func (r *Replica) HintIntake() (taken, granted uint64) { return r.intake.totals() }

// Handle answers a frame of calls from a peer whose gRPC server is at address. All
// its writes become one commit.
func (r *Replica) Handle(ctx context.Context, address string, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
	arrived := time.Now()
	r.calls.Add(int64(len(calls)))
	defer r.calls.Add(-int64(len(calls)))
	lease, err := r.admit(ctx, address, calls)
	if err != nil {
		for _, c := range calls {
			reply(&replicav1.Reply{Id: c.GetId(), Error: err.Proto()})
		}
		return
	}
	defer lease.leave()
	f := frame{Replica: r, topology: lease.topology, sender: address, arrived: arrived, reply: reply}
	// Reads may wait for a commit that is being synced; writes must not wait for
	// reads. So each read of a mixed frame goes its own way.
	var reads sync.WaitGroup
	for _, c := range calls {
		switch op := c.GetOperation().(type) {
		case *replicav1.Call_Ping:
			reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Ping{Ping: &replicav1.PingResult{WallMs: uint64(r.cfg.Clock.Wall())}}})
		case *replicav1.Call_Apply:
			f.applies = append(f.applies, c)
		case *replicav1.Call_Read:
			switch {
			case f.readCached(c, op.Read):
			case len(calls) == 1:
				f.read(c, op.Read)
			default:
				r.cfg.Pool.GoFor(&reads, func() { f.read(c, op.Read) })
			}
		case *replicav1.Call_Scan:
			reads.Go(func() { f.scan(c, op.Scan) })
		case *replicav1.Call_Collect:
			// A promise waits for applies, which those of this frame must not wait for.
			reads.Go(func() { f.collect(ctx, c, op.Collect) })
		case *replicav1.Call_Digest:
			reads.Go(func() { f.digest(ctx, c, op.Digest) })
		case *replicav1.Call_List:
			reads.Go(func() { f.list(c, op.List) })
		default:
			f.fail(c, rpc.Errorf(codes.Unimplemented, "UNKNOWN_OPERATION", "this node does not know the operation: upgrade it"))
		}
	}
	f.apply()
	reads.Wait()
}

// ReadCached answers this node's own call when it reads a record that is cached, and nothing
// has to be waited for. Otherwise, and where there is anything to refuse, it returns nil.
func (r *Replica) ReadCached(call *replicav1.Call) (reply *replicav1.Reply) {
	op := call.GetRead()
	if op == nil || r.cfg.Refuse() != nil || call.GetEpoch() > r.cfg.Fence.Topology().Epoch {
		return nil
	}
	lease := r.cfg.Fence.enter()
	defer lease.leave()
	f := frame{Replica: r, topology: lease.topology, sender: r.cfg.Address, reply: func(r *replicav1.Reply) { reply = r }}
	if f.readCached(call, op) && reply.GetError() != nil {
		return nil
	}
	return reply
}

// admit begins a frame under the present topology, after catching up with the
// newest epoch that its calls were routed by.
func (r *Replica) admit(ctx context.Context, address string, calls []*replicav1.Call) (*lease, *rpc.Error) {
	onlyPings, newest := true, uint64(0)
	for _, c := range calls {
		newest = max(newest, c.GetEpoch())
		onlyPings = onlyPings && c.GetPing() != nil
	}
	if err := r.cfg.Refuse(); err != nil && !onlyPings {
		return nil, err
	}
	if have := r.cfg.Fence.Topology().Epoch; newest > have {
		ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
		defer cancel()
		if err := r.cfg.CatchUp(ctx, newest, address); err != nil {
			return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonEpochAhead,
				"this node is at epoch %s and cannot catch up with epoch %s: %s", topology.EpochString(have), topology.EpochString(newest), err)
		}
	}
	return r.cfg.Fence.enter(), nil
}

// frame is a frame of calls while it is being served.
type frame struct {
	*Replica
	topology *topology.Topology
	sender   string // its address
	arrived  time.Time
	applies  []*replicav1.Call
	reply    func(*replicav1.Reply)
}

func (f *frame) fail(c *replicav1.Call, err *rpc.Error) {
	f.reply(&replicav1.Reply{Id: c.GetId(), Error: err.Proto()})
}

// access is what a call wants of a vnode.
type access int

const (
	toWrite access = iota
	toRead
	// toCompare is what repair wants of any endpoint, incoming ones included.
	toCompare
)

// check returns why a call must not be served under the frame's topology.
func (f *frame) check(c *replicav1.Call, namespace uint32, vnode uint32, want access) *rpc.Error {
	if t := c.GetTimeoutMs(); t > 0 && time.Since(f.arrived) > time.Duration(t)*time.Millisecond {
		return rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "the deadline passed before the call was begun")
	}
	t := f.topology
	ns := t.NamespaceByID(namespace)
	if ns == nil || int(vnode) >= len(t.Ring) {
		return f.stale("the namespace or vnode is not in the topology of epoch %s", topology.EpochString(t.Epoch))
	}
	changed := max(ns.ChangedEpoch, t.Ring[vnode].ChangedEpoch)
	if mutant.On("not-owner-accepted") {
		changed = ns.ChangedEpoch
	}
	if c.GetEpoch() < changed && !mutant.On("stale-epoch-accepted") {
		return f.stale("namespace %s or vnode %d changed in epoch %s, the call was made for epoch %s",
			ns.Name, vnode, topology.EpochString(changed), topology.EpochString(c.GetEpoch()))
	}
	for i, s := range t.Slots(vnode, ns.Wide()) {
		slot := t.Ring[vnode].Slots[i]
		if want != toWrite && slot.Phase == topology.WriteNewReadNone && slot.Node == f.cfg.Self {
			return nil // it was taken for dead: the newcomer takes over what it has
		}
		writes := s.Write[0] == f.cfg.Self || s.Write[1] == f.cfg.Self
		reads := s.Read == f.cfg.Self && (i < ns.N || want == toCompare)
		if want != toRead && writes || want != toWrite && reads {
			since := uint64(0)
			if slot.Incoming == f.cfg.Self {
				since = slot.Since
			}
			if ns.Change == topology.Widening && i == ns.Wide()-1 {
				since = ns.Since // what the namespace did not use before is filled, too
			}
			if since != 0 && !f.cfg.Open(namespace, vnode, since) {
				return f.notReady(vnode)
			}
			return nil
		}
	}
	if copied, ok := t.Copy(vnode, namespace, f.cfg.Self); ok && want != toRead {
		if copied.State == topology.Filling && !f.cfg.Open(namespace, vnode, copied.Since) {
			return f.notReady(vnode)
		}
		return nil
	}
	if mutant.On("not-owner-accepted") || c.GetApply().GetSource() == replicav1.Source_SOURCE_HINT && mutant.On("hint-to-ex-owner") {
		return nil
	}
	return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotOwner, "%s is no endpoint of vnode %d in epoch %s",
		t.NodeName(f.cfg.Self), vnode, topology.EpochString(t.Epoch)).With("epoch", t.Epoch)
}

func (f *frame) notReady(vnode uint32) *rpc.Error {
	t := f.topology
	return rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "%s takes no records of vnode %d yet: its other replicas must take in epoch %s first",
		t.NodeName(f.cfg.Self), vnode, topology.EpochString(t.Ring[vnode].ChangedEpoch))
}

func (f *frame) stale(format string, args ...any) *rpc.Error {
	return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonStaleEpoch, format, args...).With("epoch", f.topology.Epoch)
}

// apply joins the records of all writes of the frame as one commit, and replies
// when it is on disk.
func (f *frame) apply() {
	if len(f.applies) == 0 {
		return
	}
	var writes []storage.Write
	var hints []storage.Hint
	var lost []storage.Place
	var newest hlc.Timestamp
	// From here until the records are visible no promise takes effect unseen.
	applying := f.cfg.Store.BeginApply()
	accepted := f.applies[:0]
	for _, c := range f.applies {
		op := c.GetApply()
		ws, greatest, err := f.accept(c, op)
		if err != nil {
			f.fail(c, err)
			continue
		}
		newest = max(newest, greatest)
		writes = append(writes, ws...)
		for _, target := range op.GetHintTargets() {
			kept, dirty := f.cfg.Hints.Reserve(target, ws)
			hints, lost = append(hints, kept...), append(lost, dirty...)
		}
		accepted = append(accepted, c)
	}
	if len(accepted) == 0 {
		applying.End()
		return
	}
	err := f.commit(applying, writes, hints, lost, newest)
	f.cfg.Hints.Settle(hints, err == nil)
	credit := uint64(0)
	if err == nil {
		credit = f.credit(accepted)
	}
	for _, c := range accepted {
		if err != nil {
			e := storeError(err)
			e.Message = f.topology.NodeName(f.cfg.Self) + ": " + e.Message
			f.fail(c, e)
			continue
		}
		f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Apply{Apply: &replicav1.ApplyResult{CreditBytes: credit}}})
	}
}

// credit returns how many bytes of hints the sender of calls may send in the next
// second; 0 also where it sent none.
func (f *frame) credit(calls []*replicav1.Call) uint64 {
	size := 0
	for _, c := range calls {
		if op := c.GetApply(); op.GetSource() == replicav1.Source_SOURCE_HINT {
			for _, e := range op.GetEntries() {
				size += len(e.GetKey()) + len(e.GetRecord())
			}
		}
	}
	if size == 0 {
		return 0
	}
	load := max(f.cfg.Load(), float64(f.calls.Load())/fullCalls)
	if f.cfg.Store.RefusesRecords() != "" {
		load = 1
	}
	return f.intake.took(f.sender, int64(size), load, time.Now())
}

// accept checks one write call and returns its records and their greatest
// timestamp.
func (f *frame) accept(c *replicav1.Call, op *replicav1.Apply) ([]storage.Write, hlc.Timestamp, *rpc.Error) {
	if err := f.check(c, op.GetNamespace(), op.GetVnode(), toWrite); err != nil {
		return nil, 0, err
	}
	newest, oldest := hlc.Timestamp(0), hlc.Max
	repair := op.GetSource() == replicav1.Source_SOURCE_REPAIR
	writes := make([]storage.Write, 0, len(op.GetEntries()))
	for _, e := range op.GetEntries() {
		rec, err := record.Decode(e.GetRecord())
		if err != nil {
			return nil, 0, rpc.Errorf(codes.InvalidArgument, rpc.ReasonCorrupt, "record of key %q: %s", e.GetKey(), err)
		}
		if f.topology.VnodeOf(e.GetKey()) != op.GetVnode() {
			return nil, 0, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "key %q is not in vnode %d", e.GetKey(), op.GetVnode())
		}
		newest, oldest = max(newest, rec.Version.Time), min(oldest, rec.Version.Time)
		writes = append(writes, storage.Write{Namespace: op.GetNamespace(), Vnode: op.GetVnode(), Key: e.GetKey(), Record: e.GetRecord(), Repair: repair,
			ReadAt: hlc.Timestamp(op.GetReadAt()), Certificate: hlc.Timestamp(op.GetCertificate())})
	}
	if !repair {
		if err := f.promised(op, oldest); err != nil {
			return nil, 0, err
		}
	}
	// Only what comes straight from a client is judged by the clock. A record that
	// another replica holds has been accepted there and must join everywhere.
	if op.GetSource() == replicav1.Source_SOURCE_FIRST_HAND {
		if err := f.cfg.Clock.CheckAhead(newest); err != nil {
			return nil, 0, err
		}
	}
	return writes, newest, nil
}

// commit joins records and keeps hints, and returns when they, and marks for the
// places whose hints are lost, are on disk.
func (r *Replica) commit(applying storage.Applying, writes []storage.Write, hints []storage.Hint, lost []storage.Place, newest hlc.Timestamp) error {
	// A coordinator that restarts must not issue a version below one that it stores.
	err := r.cfg.Clock.Join(newest)
	if err == nil && len(lost) > 0 {
		err = r.cfg.Store.MarkDirty(r.cfg.Clock.Wall(), lost...)
	}
	if err != nil {
		applying.End()
		return err
	}
	c, err := r.cfg.Store.Apply(writes, hints)
	applying.End()
	if err != nil {
		return err
	}
	return c.Wait()
}

// storeError tells a caller what the store's failure means for it.
func storeError(err error) *rpc.Error {
	switch {
	case errors.Is(err, storage.ErrDiskFull):
		return &rpc.Error{Code: codes.ResourceExhausted, Reason: rpc.ReasonDiskFull, Message: err.Error(), RetryAfter: 5 * time.Second}
	case errors.Is(err, storage.ErrCorrupt):
		return rpc.Errorf(codes.DataLoss, rpc.ReasonCorrupt, "%s", err)
	}
	return rpc.Errorf(codes.Internal, rpc.ReasonInternal, "storage: %s", err)
}

// readCached serves a read that has to wait for nothing, and reports whether it did.
func (f *frame) readCached(c *replicav1.Call, op *replicav1.Read) bool {
	reading := f.cfg.Store.Reading()
	rec := f.cfg.Store.Cached(op.GetNamespace(), op.GetVnode(), op.GetKey())
	if rec == nil {
		return false
	}
	err := f.check(c, op.GetNamespace(), op.GetVnode(), toRead)
	var res *replicav1.ReadResult
	if err == nil {
		res, err = found(rec, op.GetHeaderOnly())
	}
	f.answerRead(c, op, reading, res, err)
	return true
}

func (f *frame) read(c *replicav1.Call, op *replicav1.Read) {
	if err := f.check(c, op.GetNamespace(), op.GetVnode(), toRead); err != nil {
		f.fail(c, err)
		return
	}
	reading := f.cfg.Store.Reading()
	res, err := f.Get(op.GetNamespace(), op.GetVnode(), op.GetKey(), op.GetHeaderOnly())
	f.answerRead(c, op, reading, res, err)
}

// answerRead replies with what was read since reading, if it is to be trusted.
func (f *frame) answerRead(c *replicav1.Call, op *replicav1.Read, reading uint64, res *replicav1.ReadResult, err *rpc.Error) {
	if err == nil {
		err = f.trust(reading, op.GetNamespace(), op.GetVnode())
	}
	if err != nil {
		f.fail(c, err)
		return
	}
	f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Read{Read: res}})
}

// trust returns why what was read since reading is not to be answered with.
func (f *frame) trust(reading uint64, namespace uint32, vnodes ...uint32) *rpc.Error {
	if err := f.cfg.Store.Read(reading, namespace, vnodes...); err != nil {
		return storeError(err)
	}
	return nil
}

// trustCompared is trust for what repair has read.
func (f *frame) trustCompared(reading uint64, namespace, vnode uint32) *rpc.Error {
	if f.sender == f.cfg.Address {
		return nil
	}
	return f.trust(reading, namespace, vnode)
}

// Get returns this node's own copy of a record, whoever owns the vnode.
func (r *Replica) Get(namespace, vnode uint32, key []byte, headerOnly bool) (*replicav1.ReadResult, *rpc.Error) {
	b, err := r.cfg.Store.Get(namespace, vnode, key)
	if errors.Is(err, storage.ErrNotFound) {
		return &replicav1.ReadResult{}, nil
	}
	if err != nil {
		return nil, storeError(err)
	}
	return found(b, headerOnly)
}

// found is the result of a read that found an encoded record.
func found(b []byte, headerOnly bool) (*replicav1.ReadResult, *rpc.Error) {
	if headerOnly {
		var err error
		if b, err = header(b); err != nil {
			return nil, storeError(err)
		}
	}
	return &replicav1.ReadResult{Found: true, Record: b}, nil
}

// header returns an encoded record without its payload.
func header(b []byte) ([]byte, error) {
	rec, err := record.Decode(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", storage.ErrCorrupt, err)
	}
	n := len(b) - len(rec.Payload)
	return b[:n:n], nil // what follows may be of a record that others read
}

func (f *frame) scan(c *replicav1.Call, op *replicav1.Scan) {
	full := make(map[uint32]bool, len(op.GetFullVnodes()))
	vnodes := append(append([]uint32(nil), op.GetFullVnodes()...), op.GetHeaderVnodes()...)
	for _, v := range vnodes {
		if err := f.check(c, op.GetNamespace(), v, toRead); err != nil {
			f.fail(c, err)
			return
		}
	}
	for _, v := range op.GetFullVnodes() {
		full[v] = !op.GetKeysOnly()
	}
	limit := min(int(op.GetLimit()), maxScanRecords)
	if limit == 0 {
		limit = maxScanRecords
	}
	limitBytes := min(int(op.GetLimitBytes()), maxScanBytes)
	if limitBytes == 0 {
		limitBytes = maxScanBytes
	}
	res := &replicav1.ScanResult{}
	size := 0
	var bad error
	reading := f.cfg.Store.Reading()
	err := f.cfg.Store.Scan(op.GetNamespace(), vnodes, op.GetStart(), op.GetEnd(), func(vnode uint32, key, rec []byte) bool {
		if len(res.Entries) >= limit || size >= limitBytes {
			res.Truncated = true
			return false
		}
		if !full[vnode] {
			if rec, bad = header(rec); bad != nil {
				return false
			}
		}
		res.Entries = append(res.Entries, &replicav1.Entry{Key: bytes.Clone(key), Record: bytes.Clone(rec)})
		size += len(key) + len(rec)
		return true
	})
	if err = errors.Join(err, bad, f.cfg.Store.Read(reading, op.GetNamespace(), vnodes...)); err != nil {
		f.fail(c, storeError(err))
		return
	}
	if op.GetChecksum() {
		res.Checksum = Checksum(res.GetEntries())
	}
	f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Scan{Scan: res}})
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C of all keys and records of a page, in order.
func Checksum(entries []*replicav1.Entry) (sum uint32) {
	for _, e := range entries {
		sum = crc32.Update(crc32.Update(sum, castagnoli, e.GetKey()), castagnoli, e.GetRecord())
	}
	return sum
}
