package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/handoff"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/report"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

const (
	// MaxReports is how many reports are answered at a time.
	MaxReports = 4
	// pageRows and pageBytes bound a page of an answer.
	pageRows  = 1024
	pageBytes = 256 << 10
	// maxGroups bounds the groups that a report holds in memory.
	maxGroups = 100_000
	// pageInterval is how often at least a reader hears how far a report has come.
	pageInterval = 250 * time.Millisecond
	// yieldEvery is the number of records after which writes go first, which wait for this
	// node where their copies are in sync: the reading of so many takes less than 100 µs.
	yieldEvery = 64
)

// reportService answers reports from this node's copies.
type reportService struct {
	kvv1.UnimplementedReportServiceServer
	node    *Node
	admit   *semaphore.Weighted
	reports *prometheus.CounterVec
	scanned prometheus.Counter
}

func newReportService(n *Node) *reportService {
	s := &reportService{
		node: n, admit: semaphore.NewWeighted(MaxReports),
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "report", Name: "requests_total", Help: "Reports that this node answered, by what became of them.",
		}, []string{"result"}),
		scanned: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "kvasir", Subsystem: "report", Name: "records_scanned_total", Help: "Records that reports have read.",
		}),
	}
	n.registry.MustRegister(s.reports, s.scanned)
	return s
}

// Report answers a report. It checks that the copies are in sync, and then takes its
// snapshot: every write that was acknowledged before it was asked for is in it (invariant 13).
func (s *reportService) Report(r *kvv1.ReportRequest, stream grpc.ServerStreamingServer[kvv1.ReportResponse]) error {
	err := s.report(r, stream)
	result := "ok"
	if err != nil {
		result = rpc.AsError(err).Code.String()
	}
	s.reports.WithLabelValues(result).Inc()
	return err
}

func (s *reportService) report(r *kvv1.ReportRequest, stream grpc.ServerStreamingServer[kvv1.ReportResponse]) error {
	n, ctx := s.node, stream.Context()
	if err := n.refuse(); err != nil {
		return err
	}
	q, err := report.Compile(r.GetQuery())
	if err != nil {
		return rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "report: %s", err).With("field", "query")
	}
	if !s.admit.TryAcquire(1) {
		e := rpc.Errorf(codes.ResourceExhausted, rpc.ReasonOverloaded, "node %s is answering as many reports as it can (%d)", n.cfg.Name, MaxReports).With("limit", MaxReports)
		e.RetryAfter = time.Second
		return e
	}
	defer s.admit.Release(1)
	if r.GetEpoch() > n.fence.Topology().Epoch {
		if err := n.topologies.refresh(ctx, r.GetEpoch()); err != nil {
			return err
		}
	}
	if err := n.clock.MayJudge(); err != nil {
		return err
	}
	c, err := s.choose(r)
	if err != nil {
		return err
	}
	reading := n.store.Reading()
	moment, err := n.store.Snapshot()
	if err != nil {
		return storeError(n.cfg.Name, err)
	}
	defer moment.Close()
	if !c.kept(n.fence.Topology(), n.id.Incarnation) {
		return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotInSync, "the copies of namespace %s on %s changed when the report began: try again", r.GetNamespace(), n.cfg.Name)
	}
	if err := stream.Send(&kvv1.ReportResponse{Part: &kvv1.ReportResponse_Snapshot{Snapshot: c.header}}); err != nil {
		return err
	}
	a := &answer{service: s, ctx: ctx, stream: stream, query: q, nowMillis: n.clock.Now(), page: &kvv1.ReportPage{}, sent: time.Now()}
	if q.IsAggregate() {
		a.groups = q.NewAccumulator(maxGroups)
	}
	return a.run(moment, reading, c)
}

// chosen are the copies that a report is answered from.
type chosen struct {
	header    *kvv1.ReportSnapshot
	namespace uint32
	vnodes    []uint32
	since     []uint64 // topology.Copy.Since of each
}

// kept reports whether a node has the copies in a topology as they were chosen. What it has
// taken in before its snapshot can have had it remove one, or begin anew with it.
func (c *chosen) kept(t *topology.Topology, node uint64) bool {
	for i, v := range c.vnodes {
		if now, ok := t.Copy(v, c.namespace, node); !ok || now.Since != c.since[i] {
			return false
		}
	}
	return true
}

// choose returns the copies to report from, if they may answer.
func (s *reportService) choose(r *kvv1.ReportRequest) (*chosen, error) {
	n := s.node
	t := n.fence.Topology()
	if !t.Formed() {
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "the ring has not formed yet")
	}
	ns := t.Namespace(r.GetNamespace())
	if ns == nil {
		return nil, rpc.AsError(topology.ErrNamespaceNotFound(r.GetNamespace()))
	}
	vnodes := slices.Clone(r.GetVnodes())
	slices.Sort(vnodes)
	if vnodes = slices.Compact(vnodes); len(vnodes) == 0 {
		for v := range t.Vnodes {
			if _, ok := t.Copy(v, ns.ID, n.id.Incarnation); ok {
				vnodes = append(vnodes, v)
			}
		}
	}
	header := &kvv1.ReportSnapshot{Node: n.cfg.Name, Epoch: t.Epoch, TakenAtMs: uint64(n.clock.Wall()), InSync: true, Vnodes: uint32(len(vnodes))}
	out := &chosen{header, ns.ID, vnodes, nil}
	progress := map[uint32]handoff.CopyProgress{}
	for _, p := range n.joiner.Progress() {
		if p.Namespace == ns.ID {
			progress[p.Vnode] = p
		}
	}
	most := time.Duration(r.GetMaxStalenessMs()) * time.Millisecond
	for _, v := range vnodes {
		if v >= t.Vnodes {
			return nil, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "there is no vnode %d: the ring has %d", v, t.Vnodes).With("field", "vnodes")
		}
		c, ok := t.Copy(v, ns.ID, n.id.Incarnation)
		out.since = append(out.since, c.Since)
		switch {
		case !ok:
			return nil, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotOwner, "node %s has no copy of vnode %d of namespace %s", n.cfg.Name, v, ns.Name).With("epoch", t.Epoch)
		case n.reporting.leased(t, c):
			continue
		}
		header.InSync = false
		p := progress[v]
		p.Vnode = v
		if c.State == topology.Filling || !p.Known || p.Behind > most {
			return nil, s.notInSync(t, ns, c, p, most)
		}
		// Rounded up: it must not seem less.
		header.StalenessMs = max(header.StalenessMs, uint64(p.Behind.Milliseconds()+1))
	}
	return out, nil
}

// notInSync says why a copy does not answer.
func (s *reportService) notInSync(t *topology.Topology, ns *topology.Namespace, c topology.Copy, p handoff.CopyProgress, most time.Duration) error {
	n := s.node
	why := fmt.Sprintf("is %s since epoch %s", c.State, topology.EpochString(c.Since))
	if c.State == topology.InSync {
		why = "has no lease: " + n.reporting.problem()
	}
	behind, remedy := "it is not known of any moment that all acknowledged by then is in it", "wait until it is in sync (kvctl reporting status)"
	if p.Known {
		behind = fmt.Sprintf("all is in it that was acknowledged %s ago", p.Behind.Round(time.Millisecond))
		remedy += fmt.Sprintf(", or allow --max-staleness (%s were allowed)", most)
	}
	return rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotInSync, "the copy of vnode %d of namespace %s on %s %s, and %s: %s", p.Vnode, ns.Name, n.cfg.Name, why, behind, remedy).
		With("vnode", p.Vnode).With("node", n.cfg.Name).With("state", c.State).With("epoch", t.Epoch)
}

// answer is a report that is being answered.
type answer struct {
	service   *reportService
	ctx       context.Context
	stream    grpc.ServerStreamingServer[kvv1.ReportResponse]
	query     *report.Query
	nowMillis int64
	groups    *report.Accumulator // nil where rows are asked for
	page      *kvv1.ReportPage
	pageBytes int
	rows      uint64
	sent      time.Time
	seen      int
	skipped   uint64 // values, of those that were sent
	err       error
}

// run reads the records of a snapshot, and sends what is asked for of them. reading is from
// before it was taken.
func (a *answer) run(moment *storage.Snapshot, reading uint64, c *chosen) error {
	if lower, upper, possible := a.query.Bounds(); possible {
		scan := moment.Scan // rows come in the order of their keys
		if a.groups != nil {
			scan = moment.ScanVnodes
		}
		n := a.service.node
		err := errors.Join(scan(c.namespace, c.vnodes, lower, upper, a.visit), a.err)
		if err == nil {
			err = n.store.Read(reading, c.namespace, c.vnodes...)
		}
		switch {
		case err != nil && a.ctx.Err() != nil:
			return a.ctx.Err()
		case err != nil:
			return storeError(n.cfg.Name, err)
		}
	}
	if a.groups != nil {
		for page := range slices.Chunk(a.groups.Partial(), pageRows) {
			a.page.Groups = page
			if err := a.send(false); err != nil {
				return err
			}
		}
	}
	return a.send(true)
}

// storeError converts the error of a report that was read from a node's store.
func storeError(node string, err error) error {
	switch {
	case errors.Is(err, report.ErrTooLarge):
		return rpc.Errorf(codes.ResourceExhausted, rpc.ReasonReportTooLarge, "%s", err)
	case errors.Is(err, storage.ErrCorrupt):
		return rpc.Errorf(codes.DataLoss, rpc.ReasonCorrupt, "node %s: %s", node, err)
	}
	return err
}

// visit takes in a record, and reports whether more are wanted.
func (a *answer) visit(_ uint32, key, raw []byte) bool {
	if a.seen++; a.seen%yieldEvery == 0 {
		yield()
		if a.err = a.ctx.Err(); a.err != nil {
			return false
		}
		if time.Since(a.sent) >= pageInterval {
			if a.err = a.send(false); a.err != nil {
				return false
			}
		}
	}
	rec, err := record.Decode(raw)
	if err != nil {
		a.err = fmt.Errorf("%w: record of key %q: %w", storage.ErrCorrupt, key, err)
		return false
	}
	a.page.RecordsScanned++
	a.page.BytesScanned += uint64(len(key) + len(raw))
	if a.groups != nil {
		_, a.err = a.groups.Add(key, rec, a.nowMillis)
		return a.err == nil
	}
	if !a.query.Match(key, rec, a.nowMillis) {
		return true
	}
	row := a.query.Row(bytes.Clone(key), rec)
	row.Value = bytes.Clone(row.GetValue())
	a.page.Rows = append(a.page.Rows, row)
	a.pageBytes += len(row.GetKey()) + len(row.GetValue())
	a.rows++
	if len(a.page.Rows) >= pageRows || a.pageBytes >= pageBytes {
		a.err = a.send(false)
	}
	return a.err == nil && (a.query.Limit() == 0 || a.rows < a.query.Limit())
}

// send sends the page. A reader that is slow holds the report up, not the node.
func (a *answer) send(last bool) error {
	p := a.page
	if a.groups != nil {
		skipped := a.groups.Skipped()
		p.ValuesSkipped, a.skipped = skipped-a.skipped, skipped
	}
	p.Last = last
	a.service.scanned.Add(float64(p.RecordsScanned))
	a.page, a.pageBytes, a.sent = &kvv1.ReportPage{}, 0, time.Now()
	return a.stream.Send(&kvv1.ReportResponse{Part: &kvv1.ReportResponse_Page{Page: p}})
}
