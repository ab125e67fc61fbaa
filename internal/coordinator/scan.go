package coordinator

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Limits of one page of a scan.
const (
	scanPageRecords = 1000
	scanPageBytes   = 1 << 20
)

// Scan returns one page of a namespace's records in key order. Each key is as one
// quorum read within the scan.
func (c *Coordinator) Scan(ctx context.Context, r *kvv1.ScanRequest) (_ *kvv1.ScanResponse, err error) {
	ctx, end, aerr := c.begin(ctx, opScan, request{r.GetNamespace(), r.GetEpoch(), r.GetToken(), false})
	if aerr != nil {
		return nil, aerr
	}
	defer func() { end(err) }()
	_, ns, nerr := c.namespaceRetry(ctx, r.GetNamespace())
	if nerr != nil {
		return nil, nerr
	}
	spec, qerr := quorumOf("read_quorum", r.GetReadQuorum(), ns)
	if qerr != nil {
		return nil, qerr
	}
	if err := c.cfg.Clock.MayJudge(); err != nil {
		return nil, err
	}
	s, serr := c.newScan(r, ns, spec)
	if serr != nil {
		return nil, serr
	}
	if !c.scans.TryAcquire(1) {
		c.metrics.refused.Inc()
		return nil, overloaded(c.cfg.MaxScans, "it serves %d scans, as many as it takes", c.cfg.MaxScans)
	}
	defer c.scans.Release(1)
	// A page that takes long ends early: there may be little to return in much that was
	// deleted.
	soon := time.Now().Add(c.cfg.RequestTimeout / 2)
	if d, ok := ctx.Deadline(); ok {
		soon = time.Now().Add(time.Until(d) / 2)
	}
	for !s.done {
		if err := c.follow(ctx, func() (uint64, uint64, *rpc.Error) { return s.round(ctx) }); err != nil {
			return nil, err
		}
		if s.advanced && !s.done && time.Now().After(soon) {
			s.cut()
		}
	}
	if err := c.see(s.newest); err != nil {
		return nil, err
	}
	return s.page, nil
}

// scan is one page in the making.
type scan struct {
	c    *Coordinator
	req  *kvv1.ScanRequest
	spec quorum.Spec
	mode topology.ReadRepair
	// start is the first key not dealt with yet, end the key to stop before.
	start, end []byte
	// returned counts the records of earlier pages too.
	returned uint64
	bytes    int
	nowMilli int64
	failed   []uint64 // nodes that did not answer this scan
	newest   hlc.Timestamp
	page     *kvv1.ScanResponse
	// advanced is set once start lies behind a key.
	advanced bool
	done     bool
}

func (c *Coordinator) newScan(r *kvv1.ScanRequest, ns *topology.Namespace, spec quorum.Spec) (*scan, *rpc.Error) {
	s := &scan{c: c, req: r, spec: spec, mode: repairMode(r.GetReadRepair(), ns), page: &kvv1.ScanResponse{}}
	for field, b := range map[string][]byte{"prefix": r.GetPrefix(), "start": r.GetStart()} {
		if len(b) > topology.MaxKeyBytes {
			return nil, badRequest(field, len(b), topology.MaxKeyBytes, "%s has %d bytes: the limit is %d", field, len(b), topology.MaxKeyBytes)
		}
	}
	s.start = r.GetPrefix()
	if bytes.Compare(r.GetStart(), s.start) > 0 {
		s.start = r.GetStart()
	}
	s.end = prefixEnd(r.GetPrefix())
	if len(r.GetResumeToken()) > 0 {
		last, returned, err := decodeResume(r.GetResumeToken())
		if err != nil {
			return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "%s", err).With("field", "resume_token")
		}
		s.returned = returned
		if next := append(last, 0); bytes.Compare(next, s.start) > 0 {
			s.start = next
		}
	}
	s.nowMilli = max(c.cfg.Clock.Now(), hlc.Timestamp(r.GetToken()).Millis())
	s.done = len(s.end) > 0 && bytes.Compare(s.start, s.end) >= 0
	return s, nil
}

// prefixEnd returns the first key after all keys with a prefix; nil when there is
// none.
func prefixEnd(prefix []byte) []byte {
	out := slices.Clone(prefix)
	for i := len(out) - 1; i >= 0; i-- {
		if out[i] < 0xff {
			out[i]++
			return out[:i+1]
		}
	}
	return nil
}

// A resume token, format 1: format(1) records returned(uvarint) last key.
const resumeFormat = 1

func encodeResume(last []byte, returned uint64) []byte {
	return append(binary.AppendUvarint([]byte{resumeFormat}, returned), last...)
}

func decodeResume(b []byte) (last []byte, returned uint64, err error) {
	if len(b) < 2 || b[0] != resumeFormat {
		return nil, 0, fmt.Errorf("the resume token is not one of this cluster's")
	}
	returned, n := binary.Uvarint(b[1:])
	if n <= 0 || len(b) > topology.MaxKeyBytes+1+binary.MaxVarintLen64 {
		return nil, 0, fmt.Errorf("the resume token is damaged")
	}
	return slices.Clone(b[1+n:]), returned, nil
}

// part is what one node is asked for in a round, and what it answered.
type part struct {
	node         uint64
	full, header []uint32
	entries      []*replicav1.Entry
	truncated    bool
	err          error
}

// asked are the nodes that are asked for a vnode, and whether any of their slots
// moves.
type asked struct {
	nodes  []uint64
	moving bool
}

// minScanRecords is how many records a part is asked for at least: of a few, all
// may be deleted.
const minScanRecords = 256

// round asks every vnode's replicas for the next stretch of keys and emits what
// they agree on, up to the smallest last key of any reply that was cut short.
func (s *scan) round(ctx context.Context) (stale, by uint64, _ *rpc.Error) {
	t, ns, err := s.c.namespace(s.req.GetNamespace())
	if err != nil {
		return 0, 0, err
	}
	s.page.Epoch = t.Epoch
	parts, asked, err := s.assign(t, ns)
	if err != nil {
		return 0, 0, err
	}
	if epoch, by, err := s.ask(ctx, t, ns, parts); err != nil {
		return epoch, by, err
	}
	retry := false
	for _, p := range parts {
		if p.err != nil {
			s.failed = append(s.failed, p.node)
			retry = true
		}
	}
	if retry {
		return 0, 0, nil // the next round goes round them, or finds too few replicas
	}
	return s.merge(ctx, t, ns, parts, asked)
}

// assign chooses for every vnode the nodes to ask: one for whole records, the
// others for headers.
func (s *scan) assign(t *topology.Topology, ns *topology.Namespace) (map[uint64]*part, []asked, *rpc.Error) {
	alive := func(n uint64) bool { return s.c.cfg.Peers.Alive(n) && !slices.Contains(s.failed, n) }
	ask := (&result{namespace: ns, job: readJob{quorum: s.spec, need: min(s.spec.Or(ns.R).Need(ns.N), ns.N), repair: s.mode}}).slotsToAsk()
	parts := map[uint64]*part{}
	vnodes := make([]asked, t.Vnodes)
	for v := range t.Vnodes {
		slots := t.Slots(v, ns.N)
		order := slices.DeleteFunc(s.c.readOrder(slots), func(i int) bool { return !alive(slots[i].Read) })
		if len(order) < ask {
			return nil, nil, notEnough(len(order), ask, slots, t, alive)
		}
		for i, slot := range order[:ask] {
			n := slots[slot].Read
			p := parts[n]
			if p == nil {
				p = &part{node: n}
				parts[n] = p
			}
			if i == 0 {
				p.full = append(p.full, v)
			} else {
				p.header = append(p.header, v)
			}
			vnodes[v].nodes = append(vnodes[v].nodes, n)
			vnodes[v].moving = vnodes[v].moving || slots[slot].Write[1] != 0
		}
	}
	return parts, vnodes, nil
}

// wanted is how many records are still wanted on this page.
func (s *scan) wanted() int {
	n := scanPageRecords - len(s.page.Records)
	if limit := s.req.GetLimit(); limit > 0 {
		n = min(n, int(min(limit-min(limit, s.returned), scanPageRecords)))
	}
	return n
}

// ask sends the parts out and collects their answers.
func (s *scan) ask(ctx context.Context, t *topology.Topology, ns *topology.Namespace, parts map[uint64]*part) (stale, by uint64, _ *rpc.Error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.c.cfg.RequestTimeout)
	}
	done := make(chan struct{}, len(parts))
	for _, p := range parts {
		call := &replicav1.Call{Epoch: t.Epoch, Operation: &replicav1.Call_Scan{Scan: &replicav1.Scan{
			Namespace: ns.ID, Start: s.start, End: s.end, FullVnodes: p.full, HeaderVnodes: p.header,
			Limit: uint32(max(s.wanted()+1, minScanRecords)), LimitBytes: scanPageBytes, KeysOnly: s.req.GetKeysOnly(),
		}}}
		err := s.c.cfg.Peers.Go(p.node, call, deadline, func(reply *replicav1.Reply, err error) {
			p.entries, p.truncated, p.err = reply.GetScan().GetEntries(), reply.GetScan().GetTruncated(), err
			done <- struct{}{}
		})
		if err != nil {
			p.err = err
			done <- struct{}{}
		}
	}
	for range parts {
		select {
		case <-done:
		case <-ctx.Done():
			return 0, 0, readFailed(0, len(parts), ns.N, ctx.Err())
		}
	}
	for _, p := range parts {
		if epoch := refusedEpoch(p.err); epoch > 0 {
			return epoch, p.node, rpc.AsError(p.err)
		}
	}
	return 0, 0, nil
}

// merge emits the records of a round in key order.
func (s *scan) merge(ctx context.Context, t *topology.Topology, ns *topology.Namespace, parts map[uint64]*part, vnodes []asked) (stale, by uint64, _ *rpc.Error) {
	bound, cut := []byte(nil), false
	for _, p := range parts {
		if p.truncated {
			last := p.entries[len(p.entries)-1].GetKey()
			if !cut || bytes.Compare(last, bound) < 0 {
				bound, cut = last, true
			}
		}
	}
	for {
		key := smallest(parts)
		if key == nil || cut && bytes.Compare(key, bound) > 0 {
			break
		}
		if s.full() {
			return 0, 0, nil
		}
		v := vnodes[t.VnodeOf(key)]
		agreed, rec, err := take(parts, key, v.nodes)
		if err != nil {
			return 0, 0, rpc.AsError(err)
		}
		if !agreed || v.moving && s.mode == topology.RepairBlocking {
			// Its replicas differ, or only one end of a move was asked: a quorum read of its
			// own decides, and mends.
			res, err := s.c.read(ctx, s.req.GetNamespace(), readJob{key: key, quorum: s.spec, repair: s.mode})
			if err != nil {
				return 0, 0, err
			}
			if !mutant.On("scan-believes-one") {
				rec = res.winner
			}
		}
		s.emit(key, rec)
	}
	if !cut {
		s.done = true
		return 0, 0, nil
	}
	s.advance(bound)
	s.full()
	return 0, 0, nil
}

// full ends the page when it has all that it may have, and leaves a token where
// more may follow.
func (s *scan) full() bool {
	limit := s.req.GetLimit()
	if limit > 0 && s.returned >= limit {
		s.done = true
		return true
	}
	if len(s.page.Records) >= scanPageRecords || s.bytes >= scanPageBytes {
		s.cut()
		return true
	}
	return false
}

// cut ends the page with a token to go on by.
// REQUIRES: s.advanced.
func (s *scan) cut() {
	last := s.start[:len(s.start)-1] // advance appended a zero byte
	s.page.ResumeToken = encodeResume(last, s.returned)
	s.done = true
}

// advance moves the start behind a key.
func (s *scan) advance(key []byte) {
	s.start, s.advanced = append(slices.Clone(key), 0), true
}

// smallest returns the smallest key that a part has left, or nil.
func smallest(parts map[uint64]*part) []byte {
	var key []byte
	for _, p := range parts {
		if len(p.entries) > 0 && (key == nil || bytes.Compare(p.entries[0].GetKey(), key) < 0) {
			key = p.entries[0].GetKey()
		}
	}
	return key
}

// take removes a key from the parts. It reports whether all endpoints asked about
// it gave the same record, and returns that record, whole if one gave it whole.
func take(parts map[uint64]*part, key []byte, endpoints []uint64) (agreed bool, rec record.Record, err error) {
	agreed = true
	seen := 0
	for _, n := range endpoints {
		p := parts[n]
		if len(p.entries) == 0 || !bytes.Equal(p.entries[0].GetKey(), key) {
			agreed = false
			continue
		}
		r, err := record.Decode(p.entries[0].GetRecord())
		p.entries = p.entries[1:]
		if err != nil {
			return false, rec, err
		}
		if seen > 0 && record.CompareHeaders(rec, r) != 0 {
			agreed = false
		}
		if seen == 0 || len(r.Payload) > 0 {
			rec = r
		}
		seen++
	}
	if seen == 0 {
		return false, rec, fmt.Errorf("key %q came from a node that was not asked for its vnode", key)
	}
	return agreed, rec, nil
}

// emit adds a record to the page if readers are served it, and moves the start
// behind its key.
func (s *scan) emit(key []byte, rec record.Record) {
	s.advance(key)
	s.newest = max(s.newest, rec.Version.Time)
	if !rec.IsLive(s.nowMilli) {
		return
	}
	out := &kvv1.ScanRecord{Key: key, Version: versionProto(rec.Version), ExpiresAtMs: uint64(rec.ExpiresAt)}
	if !s.req.GetKeysOnly() {
		out.Value = rec.Payload
	}
	s.page.Records = append(s.page.Records, out)
	s.returned++
	s.bytes += len(key) + len(rec.Payload) + 32
}
