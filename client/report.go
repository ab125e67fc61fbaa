package client

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/report"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Report says which records of a namespace a report is about. It reads the copies on
// reporting nodes, never those that requests read and write.
//
// Each node answers from one snapshot, and that holds every write that was acknowledged
// before the report began. Snapshots of several nodes are not of one moment: of writes that
// were under way when the report began, one may be in it and an earlier one not.
type Report struct {
	// Prefix, Start and End bound the keys: End is the first one no longer wanted. Empty
	// ones do not.
	Prefix, Start, End []byte
	// Where are conditions that all hold, as in "balance >= 100" or "exists(address.city)":
	// a field, one of == != < <= > >= ~ (contains) ^= (begins with), and a literal, quoted
	// where it holds spaces. Fields are @key, @value, @size, @written, @expires, or a path
	// into values that are JSON, in gjson's syntax.
	Where []string
	// MaxStaleness lets copies that are not in sync answer, if all is in them that was
	// acknowledged so long before. 0: none. Those that are filled for the first time never do.
	MaxStaleness time.Duration
	// Progress, if not nil, hears how far the report has come, now and then. Calls do not
	// overlap.
	Progress func(ReportStats)
}

// ReportStats says what a report has read.
type ReportStats struct {
	// Nodes is how many answer it.
	Nodes int
	// InSync: every write acknowledged before the report began is in it. If not, every write
	// is that was acknowledged Staleness before.
	InSync    bool
	Staleness time.Duration
	// Records and Bytes were scanned so far.
	Records, Bytes uint64
	// Skipped values were left out of measures, as they were of the wrong type.
	Skipped uint64
}

// RowOptions say which part of the records a report returns.
type RowOptions struct {
	KeysOnly bool
	// Limit is the most records wanted, 0 all.
	Limit int
}

// ReportRows returns the records of a report in key order. It has no time limit but that
// of ctx; a node that says nothing for the client's timeout is given up. Errors match
// ErrNotInSync, ErrNamespaceNotFound, ErrInvalidArgument, ErrUnavailable, ErrOverloaded,
// ErrTimeout, context.Canceled and ErrClosed; after one the rows before it are not the whole.
func (c *Client) ReportRows(ctx context.Context, r Report, rows RowOptions, opts ...CallOption) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		if rows.Limit < 0 {
			yield(Record{}, fmt.Errorf("%w: limit is %d: want 0 (all) or more", ErrInvalidArgument, rows.Limit))
			return
		}
		q, err := r.query()
		if err != nil {
			yield(Record{}, err)
			return
		}
		q.What = &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{KeysOnly: rows.KeysOnly, Limit: uint64(rows.Limit)}}
		run, err := c.startReport(ctx, r, q, opts)
		if err != nil {
			yield(Record{}, err)
			return
		}
		defer run.close()
		for n := 0; rows.Limit == 0 || n < rows.Limit; n++ {
			row, err := run.next()
			if err == io.EOF {
				break
			}
			if err != nil {
				yield(Record{}, err)
				return
			}
			rec := Record{Key: row.GetKey(), Value: row.GetValue(), Version: versionFromProto(row.GetVersion()), ExpiresAt: expiry(row.GetExpiresAtMs())}
			if !yield(rec, nil) {
				return
			}
		}
		run.tell()
	}
}

// Group is a group of records with its measures.
type Group struct {
	Keys     []FieldValue // in the order of groupBy
	Measures []Measure    // in the order of measures
}

// Measure is a measure of a group. Its value is missing for the minimum, maximum or average
// of nothing.
type Measure struct {
	Value FieldValue
	// Count is how many records or values count, and Skipped how many were left out as they
	// were of the wrong type.
	Count, Skipped uint64
}

// ValueKind is the type of a field's value.
type ValueKind uint8

// The kinds, in the order in which values of different kinds sort.
const (
	MissingValue = ValueKind(report.Missing)
	NullValue    = ValueKind(report.Null)
	BooleanValue = ValueKind(report.Boolean)
	NumberValue  = ValueKind(report.Number)
	TextValue    = ValueKind(report.Text)
	// JSONValue is an array or an object.
	JSONValue = ValueKind(report.JSON)
)

// FieldValue is the value of a field, or a measure.
type FieldValue struct {
	Kind ValueKind
	// Text is true or false, a number without an exponent, the text itself, or JSON without
	// spaces; empty where it is missing or null.
	Text string
}

// groups converts an answer.
func groups(in []report.Group) []Group {
	of := func(v report.Value) FieldValue { return FieldValue{ValueKind(v.Type), v.Text} }
	out := make([]Group, len(in))
	for i, g := range in {
		for _, k := range g.Keys {
			out[i].Keys = append(out[i].Keys, of(k))
		}
		for _, m := range g.Measures {
			out[i].Measures = append(out[i].Measures, Measure{of(m.Value), m.Count, m.Skipped})
		}
	}
	return out
}

// ReportGroups returns measures of groups of records, in order of the groups' values: of
// those that have the same values in the fields of groupBy, or without such of all. Measures
// are count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD) or avg(FIELD). Sums are exact.
// Time limits and errors are those of ReportRows.
func (c *Client) ReportGroups(ctx context.Context, r Report, groupBy, measures []string, opts ...CallOption) ([]Group, ReportStats, error) {
	q, err := r.query()
	if err != nil {
		return nil, ReportStats{}, err
	}
	a := &kvv1.ReportAggregate{GroupBy: groupBy}
	for _, text := range measures {
		m, err := report.ParseMeasure(text)
		if err != nil {
			return nil, ReportStats{}, fmt.Errorf("%w: %w", ErrInvalidArgument, err)
		}
		a.Measures = append(a.Measures, m)
	}
	q.What = &kvv1.ReportQuery_Aggregate{Aggregate: a}
	compiled, err := report.Compile(q)
	if err != nil {
		return nil, ReportStats{}, fmt.Errorf("%w: %w", ErrInvalidArgument, err)
	}
	run, err := c.startReport(ctx, r, q, opts)
	if err != nil {
		return nil, ReportStats{}, err
	}
	defer run.close()
	acc := compiled.NewAccumulator(maxReportGroups)
	for _, p := range run.parts {
		for !p.last {
			page, err := run.receive(p)
			if err == nil {
				err = acc.Merge(page.GetGroups())
			}
			if err != nil {
				return nil, run.stats, err
			}
		}
	}
	run.tell()
	return groups(acc.Result()), run.stats, nil
}

// maxReportGroups bounds the groups of an answer.
const maxReportGroups = 1_000_000

// query converts what all reports have.
func (r *Report) query() (*kvv1.ReportQuery, error) {
	q := &kvv1.ReportQuery{Prefix: r.Prefix, Start: r.Start, End: r.End}
	for _, text := range r.Where {
		w, err := report.ParseCondition(text)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInvalidArgument, err)
		}
		q.Where = append(q.Where, w)
	}
	return q, nil
}

// reportRun is a report under way.
type reportRun struct {
	client  *Client
	asked   context.Context // of the caller
	ctx     context.Context // it ends with asked, with the client, and when a node is silent
	cancel  context.CancelFunc
	silence time.Duration
	report  Report
	parts   []*reportPart
	stats   ReportStats
}

// reportPart is what one node answers.
type reportPart struct {
	node   *topology.Node
	vnodes []uint32
	conn   *grpc.ClientConn
	stream grpc.ServerStreamingClient[kvv1.ReportResponse]
	rows   []*kvv1.ReportRow
	last   bool
}

// startReport asks the nodes, and returns once each has taken its snapshot. What is refused
// because copies are elsewhere by now, or wait for a lease, is asked again for as long as the
// client is patient.
func (c *Client) startReport(ctx context.Context, r Report, q *kvv1.ReportQuery, opts []CallOption) (*reportRun, error) {
	cc, err := c.config(opts)
	if err != nil {
		return nil, err
	}
	began, pause := time.Now(), minPause
	for {
		run, at, err := c.tryReport(ctx, r, q, cc.namespace)
		if err == nil {
			return run, nil
		}
		e := rpc.AsError(err)
		if ctx.Err() != nil {
			return nil, c.timedOut(ctx, e, at, false)
		}
		if c.run.Err() != nil {
			return nil, ErrClosed
		}
		if !again(e) || time.Since(began) >= c.cfg.patience {
			return nil, publicError(e, at, false)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause/2 + rand.N(pause)):
		}
		pause = min(2*pause, maxPause)
		if at != "" {
			c.refresh(at)
		}
	}
}

// again reports whether a report that could not begin may at another try.
func again(e *rpc.Error) bool {
	switch e.Reason {
	case rpc.ReasonNotInSync, rpc.ReasonNotOwner, rpc.ReasonOverloaded:
		return true
	}
	return e.Code == codes.Unavailable
}

// tryReport asks the nodes once. at is the address that an error came from.
func (c *Client) tryReport(ctx context.Context, r Report, q *kvv1.ReportQuery, namespace string) (_ *reportRun, at string, _ error) {
	parts, epoch, err := c.reportParts(namespace, r.MaxStaleness > 0)
	if err != nil {
		return nil, "", err
	}
	run := &reportRun{client: c, asked: ctx, silence: c.cfg.timeout, report: r, parts: parts, stats: ReportStats{Nodes: len(parts), InSync: true}}
	var cancel context.CancelFunc
	run.ctx, cancel = context.WithCancel(ctx)
	forget := context.AfterFunc(c.run, cancel) // a client that is closed ends what it has begun
	run.cancel = func() {
		forget()
		cancel()
	}
	for _, p := range parts {
		if p.conn, err = c.transport.NewConn(p.node.Address); err != nil {
			run.close()
			return nil, p.node.Address, err
		}
		p.stream, err = kvv1.NewReportServiceClient(p.conn).Report(run.ctx, &kvv1.ReportRequest{
			Namespace: namespace, Query: q, Vnodes: p.vnodes, Epoch: epoch, MaxStalenessMs: uint64(r.MaxStaleness.Milliseconds()),
		})
		if err != nil {
			run.close()
			return nil, p.node.Address, err
		}
	}
	for _, p := range parts {
		resp, err := run.recv(p)
		if err != nil {
			run.close()
			return nil, p.node.Address, err
		}
		s := resp.GetSnapshot()
		run.stats.InSync = run.stats.InSync && s.GetInSync()
		run.stats.Staleness = max(run.stats.Staleness, time.Duration(s.GetStalenessMs())*time.Millisecond)
	}
	return run, "", nil
}

// reportParts chooses a copy of every vnode: one in sync, or if others are allowed the one
// that comes next, on a node that is healthy if there is one.
func (c *Client) reportParts(namespace string, stale bool) (parts []*reportPart, epoch uint64, _ error) {
	v := c.view.Load()
	t := v.topology
	ns := t.Namespace(namespace)
	switch {
	case !t.Formed():
		return nil, 0, rpc.Errorf(codes.Unavailable, rpc.ReasonNotReady, "the ring has not formed yet")
	case ns == nil:
		return nil, 0, rpc.AsError(topology.ErrNamespaceNotFound(namespace))
	}
	byNode := map[uint64]*reportPart{}
	for vnode := range t.Vnodes {
		copies := slices.Clone(t.Copies(vnode, ns.ID))
		if len(copies) == 0 {
			return nil, 0, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotInSync, "%s", noCopies(t, ns, vnode))
		}
		rank := func(c topology.Copy) int {
			rank := 2 * int(topology.InSync-min(c.State, topology.InSync))
			if c.State == topology.Evicting {
				rank = 1
			}
			if v.unhealthy[c.Node] {
				rank += 100
			}
			return rank
		}
		turn := int(vnode) % len(copies) // equals take turns
		copies = append(copies[turn:len(copies):len(copies)], copies[:turn]...)
		best := slices.MinFunc(copies, func(a, b topology.Copy) int { return cmp.Compare(rank(a), rank(b)) })
		if best.State != topology.InSync && !stale {
			return nil, 0, rpc.Errorf(codes.FailedPrecondition, rpc.ReasonNotInSync,
				"the copy of vnode %d of namespace %s on %s is %s since epoch %s: wait until it is in sync (kvctl reporting status), or allow a staleness (--max-staleness)",
				vnode, ns.Name, t.NodeName(best.Node), best.State, topology.EpochString(best.Since)).With("vnode", vnode).With("state", best.State)
		}
		p := byNode[best.Node]
		if p == nil {
			p = &reportPart{node: t.Node(best.Node)}
			byNode[best.Node] = p
			parts = append(parts, p)
		}
		p.vnodes = append(p.vnodes, vnode)
	}
	return parts, t.Epoch, nil
}

// noCopies says why there is nothing to report from.
func noCopies(t *topology.Topology, ns *topology.Namespace, vnode uint32) string {
	switch {
	case ns.Reporting.Copies == 0:
		return fmt.Sprintf("namespace %s has no reporting replicas: give it some (kvctl namespace set %s --reporting degrade)", ns.Name, ns.Name)
	case !slices.ContainsFunc(t.Nodes, func(n topology.Node) bool { return n.Role == topology.Reporting }):
		return fmt.Sprintf("namespace %s is to have reporting replicas, and there is no reporting node: start one (kvnode --role reporting)", ns.Name)
	}
	return fmt.Sprintf("no reporting node has a copy of vnode %d of namespace %s yet: wait until it is in sync (kvctl reporting status)", vnode, ns.Name)
}

// recv waits for a node's next message, for as long as a node may be silent.
func (run *reportRun) recv(p *reportPart) (*kvv1.ReportResponse, error) {
	silent := time.AfterFunc(run.silence, run.cancel)
	resp, err := p.stream.Recv()
	switch e := rpc.AsError(err); {
	case !silent.Stop() && err != nil:
		return nil, rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "reporting node %s has said nothing for %s", p.node.Name, run.silence)
	case err != nil && e.Code == codes.Canceled && run.timed():
		return nil, rpc.Errorf(codes.DeadlineExceeded, rpc.ReasonDeadline, "reporting node %s was not done when the time was over", p.node.Name)
	case err != nil && err != io.EOF && e.Reason == rpc.ReasonLinkBroken:
		return nil, rpc.Errorf(codes.Unavailable, rpc.ReasonLinkBroken, "reporting node %s does not answer: %s", p.node.Name, e.Message)
	}
	return resp, err
}

// timed reports whether the report has a deadline and has not been cancelled here: a node that
// cancels it has seen the end a moment earlier.
func (run *reportRun) timed() bool {
	_, timed := run.asked.Deadline()
	return timed && run.ctx.Err() == nil
}

// receive returns a node's next page.
func (run *reportRun) receive(p *reportPart) (*kvv1.ReportPage, error) {
	resp, err := run.recv(p)
	if err == io.EOF {
		err = rpc.Errorf(codes.Unavailable, rpc.ReasonLinkBroken, "the answer of reporting node %s ends in the middle", p.node.Name)
	}
	if err != nil {
		switch {
		case run.asked.Err() != nil:
			err = run.client.timedOut(run.asked, rpc.AsError(err), p.node.Address, false)
		case run.client.run.Err() != nil:
			err = ErrClosed
		default:
			err = publicError(rpc.AsError(err), p.node.Address, false)
		}
		return nil, err
	}
	page := resp.GetPage()
	p.last = page.GetLast()
	run.stats.Records += page.GetRecordsScanned()
	run.stats.Bytes += page.GetBytesScanned()
	run.stats.Skipped += page.GetValuesSkipped()
	run.tell()
	return page, nil
}

// tell tells how far the report has come.
func (run *reportRun) tell() {
	if run.report.Progress != nil {
		run.report.Progress(run.stats)
	}
}

// next returns the next row in the order of keys, or io.EOF.
func (run *reportRun) next() (*kvv1.ReportRow, error) {
	var first *reportPart
	for _, p := range run.parts {
		for len(p.rows) == 0 && !p.last {
			page, err := run.receive(p)
			if err != nil {
				return nil, err
			}
			p.rows = page.GetRows()
		}
		if len(p.rows) > 0 && (first == nil || bytes.Compare(p.rows[0].GetKey(), first.rows[0].GetKey()) < 0) {
			first = p
		}
	}
	if first == nil {
		return nil, io.EOF
	}
	row := first.rows[0]
	first.rows = first.rows[1:]
	return row, nil
}

// close ends the report at all nodes.
func (run *reportRun) close() {
	run.cancel()
	for _, p := range run.parts {
		if p.conn != nil {
			p.conn.Close()
		}
	}
}
