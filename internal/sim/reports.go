package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reporting stands for the tracks of faults that run beside reporting nodes.
const reporting = "reporting"

var reportingTracks = []string{
	"reporting-nodes", "lease-clocks", "reporting-rules",
	"crashes", "cuts", "partitions", "pauses", "slow-disks", "clocks", "orchestrators", "leaders", "no-orchestrators", "lost-disks", ringChanges,
}

const (
	reportingNodes = 2
	// reportTimeout bounds a report, and is how long a node may be silent.
	reportTimeout = 3 * time.Second
)

// reported are the namespaces that reports are made of: their N and quorums do not change,
// and a majority is what default writes need.
var reported = []string{"brief", "unhinted"}

func isReporting(name string) bool { return strings.HasPrefix(name, "report") }

// reports are clients that make reports, one after the other.
type reports struct {
	r       *run
	ended   chan struct{}
	clients sync.WaitGroup
}

// startReports has clients make reports until they are stopped, where there are reporting
// nodes.
func (r *run) startReports() *reports {
	p := &reports{r: r, ended: make(chan struct{})}
	if !r.cfg.reports() {
		return p
	}
	for i, policy := range []topologyv1.ReportingPolicy{topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE, topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK} {
		if err := r.setReporting(reported[i], policy, 1, 500*time.Millisecond); err != nil {
			r.t.Fatal(err)
		}
	}
	for i := range 3 {
		name := fmt.Sprint("reader", i+1)
		rng := r.w.stream(name)
		c := r.w.Client(client.WithTimeout(reportTimeout), client.WithPatience(0))
		p.clients.Go(func() {
			defer c.Close()
			for {
				select {
				case <-p.ended:
					return
				case <-time.After(time.Duration(rng.ExpFloat64() * float64(150*time.Millisecond))):
				}
				namespace := reported[rng.IntN(len(reported))]
				if rng.IntN(2) == 0 {
					r.readReport(c, name, namespace, []string{"", "hot/", "wide/1"}[rng.IntN(3)])
				} else {
					r.readVnode(fmt.Sprint("report", 1+rng.IntN(reportingNodes)), name, namespace, uint32(rng.IntN(int(r.topologies.latest().Vnodes))))
				}
			}
		})
	}
	return p
}

func (p *reports) stop() {
	close(p.ended)
	p.clients.Wait()
}

// readReport makes one report, and tells whether it was answered.
func (r *run) readReport(c *client.Client, name, namespace, prefix string) bool {
	op := &Op{Client: name, Kind: OpReport, Place: Place{namespace, prefix}}
	r.checker.Invoke(op)
	ctx, cancel := context.WithTimeout(context.Background(), reportTimeout)
	defer cancel()
	var records []client.Record
	inSync := true
	q := client.Report{Prefix: []byte(prefix), Progress: func(s client.ReportStats) { inSync = s.InSync }}
	for rec, err := range c.ReportRows(ctx, q, client.RowOptions{}, client.Namespace(namespace)) {
		if err != nil {
			r.checker.Return(op, func() {
				op.Outcome, op.Error = Failed, err.Error()
				if errors.Is(err, client.ErrNotInSync) {
					op.Note = "not in sync"
				}
			})
			return false
		}
		records = append(records, rec)
	}
	if !inSync {
		r.history.violate(13, "%s was answered by copies that are not in sync", op)
	}
	r.checker.Reported(op, records, func(key string) bool { return strings.HasPrefix(key, prefix) })
	return true
}

// readVnode asks a reporting node for a vnode, whatever the topology says of it: what the
// node answers has to be right.
func (r *run) readVnode(node, name, namespace string, vnode uint32) {
	op := &Op{Client: name, Kind: OpReport, Place: Place{namespace, ""}, Note: fmt.Sprintf("of vnode %d by %s", vnode, node)}
	r.checker.Invoke(op)
	ctx, cancel := context.WithTimeout(context.Background(), reportTimeout)
	defer cancel()
	var records []client.Record
	stream, err := kvv1.NewReportServiceClient(r.conns[node]).Report(ctx, &kvv1.ReportRequest{
		Namespace: namespace, Vnodes: []uint32{vnode}, Query: &kvv1.ReportQuery{What: &kvv1.ReportQuery_Rows{Rows: &kvv1.ReportRows{}}},
	})
	for last := false; err == nil && !last; {
		var resp *kvv1.ReportResponse
		if resp, err = stream.Recv(); err != nil {
			break
		}
		last = resp.GetPage().GetLast()
		for _, row := range resp.GetPage().GetRows() {
			rec := client.Record{Key: row.GetKey(), Value: row.GetValue(), Version: client.Version{Timestamp: row.GetVersion().GetTimestamp(), Incarnation: row.GetVersion().GetIncarnation()}}
			if ms := row.GetExpiresAtMs(); ms != 0 {
				rec.ExpiresAt = time.UnixMilli(int64(ms))
			}
			records = append(records, rec)
		}
	}
	if err != nil {
		r.checker.Return(op, func() { op.Outcome, op.Error = Failed, err.Error() })
		return
	}
	r.checker.Reported(op, records, func(key string) bool { return r.topologies.latest().VnodeOf([]byte(key)) == vnode })
}

// readHotVnodes asks a reporting node, for three seconds, for vnodes of keys that are written
// often.
func (r *run) readHotVnodes(node string, rng *rand.Rand) {
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		p := hot(Space{Name: reported[rng.IntN(len(reported))]}, rng.IntN(hotKeys))
		r.readVnode(node, "reader of "+node, p.Namespace, r.topologies.latest().VnodeOf([]byte(p.Key)))
	}
}

// setReporting sets the rules of a namespace.
func (r *run) setReporting(namespace string, policy topologyv1.ReportingPolicy, copies uint32, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	ms := uint64(timeout.Milliseconds())
	_, err := r.control().UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: namespace, Settings: &adminv1.NamespaceSettings{
		ReportingPolicy: &policy, ReportingCopies: &copies, ReportingTimeoutMs: &ms,
	}})
	return err
}

// drain has a reporting node give its copies away, or be given some again.
func (r *run) drain(name string, held bool) error {
	t := r.topologies.latest()
	n := t.Resolve(name)
	if n == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	_, err := r.control().HoldBack(ctx, &adminv1.HoldBackRequest{ClusterId: t.ClusterID, Incarnation: n.Incarnation, Held: held})
	return err
}

// reportInTheEnd has the copies come into sync by themselves, and a report hold everything.
func (r *run) reportInTheEnd() bool {
	if !r.cfg.reports() {
		return true
	}
	for i := range reportingNodes {
		if err := r.drain(fmt.Sprint("report", i+1), false); err != nil {
			r.history.violate(0, "a reporting node stays drained: %v", err)
			return false
		}
	}
	for _, namespace := range reported {
		if err := r.setReporting(namespace, topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK, 2, time.Second); err != nil {
			r.history.violate(0, "reporting of %s cannot be set: %v", namespace, err)
			return false
		}
	}
	c := r.w.Client(client.WithTimeout(reportTimeout))
	defer c.Close()
	for waited := time.Duration(0); ; waited += time.Second {
		time.Sleep(time.Second)
		why := r.notInSync()
		if why == "" && r.readReport(c, finalClient, reported[0], "") && r.readReport(c, finalClient, reported[1], "") {
			r.history.Note("all copies are in sync")
			return true
		}
		if waited >= settleFor {
			r.history.violate(13, "%s after the last fault: %s", settleFor, why)
			return false
		}
	}
}

// notInSync describes a copy that is not, or returns "".
func (r *run) notInSync() string {
	s, err := clusterStatus(context.Background(), r.control())
	if err != nil {
		return "no topology: " + err.Error()
	}
	r.topologies.see("node1", s.GetTopology())
	t := r.topologies.latest()
	for _, name := range reported {
		for v := range t.Vnodes {
			copies := t.Copies(v, t.Namespace(name).ID)
			if len(copies) != reportingNodes {
				return fmt.Sprintf("vnode %d of %s has %d copies", v, name, len(copies))
			}
			for _, c := range copies {
				if c.State != topology.InSync {
					return fmt.Sprintf("the copy of vnode %d of %s on %s is %s", v, name, t.NodeName(c.Node), c.State)
				}
			}
		}
	}
	return ""
}

// reportingNode has a reporting node end, stop, lose its network or its disk, get slow, or be
// drained.
func (f *faults) reportingNode(rng *rand.Rand) {
	name := fmt.Sprint("report", 1+rng.IntN(reportingNodes))
	w := f.r.w
	switch rng.IntN(12) {
	case 0, 1:
		how := Crash(rng.IntN(2))
		f.note("reporting node "+[]string{"kill -9", "power cut"}[how], "%s", name)
		f.end(name, how)
		pause(rng, 12)
		f.start(name)
	case 2, 3:
		f.note("reporting node stopped", "%s", name)
		w.Pause(name)
		pause(rng, 10)
		w.Resume(name)
	case 4, 10, 11: // it hears of no eviction, and gets nothing: for as long as its lease lasts it may answer
		f.note("reporting node cut off", "%s", name)
		w.Isolate(name)
		f.r.readHotVnodes(name, rng)
		pause(rng, 9)
		w.Reconnect(name)
	case 5: // it goes on answering, and hears of no eviction
		f.note("reporting node cut off from the orchestrators", "%s", name)
		f.bothWays([]string{name}, f.r.orchestrators(), w.Net.Cut)
		pause(rng, 12)
		f.bothWays([]string{name}, f.r.orchestrators(), w.Net.Heal)
	case 6: // and the other way round: what it is to hold does not come
		f.note("reporting node cut off from the nodes", "%s", name)
		f.bothWays([]string{name}, f.r.nodeNames(), w.Net.Cut)
		pause(rng, 12)
		f.bothWays([]string{name}, f.r.nodeNames(), w.Net.Heal)
	case 7:
		f.note("reporting node slow", "%s", name)
		f.mu.Lock()
		f.mu.slow[name] = time.Duration(200+rng.IntN(1500)) * time.Millisecond
		f.mu.Unlock()
		pause(rng, 8)
		f.mu.Lock()
		delete(f.mu.slow, name)
		f.mu.Unlock()
	case 8:
		f.note("reporting node drained", "%s", name)
		for _, held := range []bool{true, false} {
			if err := f.r.drain(name, held); err != nil {
				f.r.history.Note("%s not drained, or not any more: %v", name, err)
			}
			pause(rng, 12)
		}
	default:
		f.note("reporting node loses its disk", "%s", name)
		f.end(name, Kill)
		w.Wipe(name)
		f.start(name)
	}
}

// leaseClock has the boot-time clocks that leases are counted by go as differently as they
// may, and a wall clock jump, which is not to matter.
func (f *faults) leaseClock(rng *rand.Rand) {
	fast, slow := 1+rng.Float64()*0.04, 1-rng.Float64()*0.04
	if rng.IntN(2) == 0 {
		fast, slow = slow, fast
	}
	f.note("lease clocks", "orchestrators at %.3f, reporting nodes at %.3f", fast, slow)
	for _, o := range f.r.orchestrators() {
		f.r.w.SetRate(o, fast)
	}
	for i := range reportingNodes {
		f.r.w.SetRate(fmt.Sprint("report", i+1), slow)
	}
	pause(rng, 20)
}

// reportingRules has people change the rules of a namespace.
func (f *faults) reportingRules(rng *rand.Rand) {
	namespace := reported[rng.IntN(len(reported))]
	policy := topologyv1.ReportingPolicy(1 + rng.IntN(3))
	if rng.IntN(2) == 0 { // the one with most to go wrong
		policy = topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE
	}
	copies, timeout := uint32(1+rng.IntN(2)), time.Duration(100+rng.IntN(900))*time.Millisecond
	if err := f.r.setReporting(namespace, policy, copies, timeout); err != nil {
		f.r.history.Note("reporting of %s not set: %v", namespace, err)
		return
	}
	f.note("reporting rules", "%s: %s, %d copies, %s", namespace, policy, copies, timeout)
}
