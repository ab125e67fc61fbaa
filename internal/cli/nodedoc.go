package cli

import (
	"encoding/json"
	"math"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// nodeDoc is a node in a document.
type nodeDoc struct {
	Name         string `json:"name"`
	Incarnation  uint64 `json:"incarnation"`
	Role         string `json:"role"`
	Zone         string `json:"zone"`
	Address      string `json:"address"`
	AdminAddress string `json:"admin_address"`
	Slots        int    `json:"slots"`
	// Drained: the node is given nothing until people ask; known to the orchestrators only.
	Drained      bool   `json:"drained"`
	State        string `json:"state"`
	StateReason  string `json:"state_reason"`
	Health       string `json:"health"`
	HealthReason string `json:"health_reason"`
	// HealthSince is empty where it is not known, Gossip too.
	HealthSince   string     `json:"health_since"`
	Gossip        string     `json:"gossip"`
	UnreachableBy []string   `json:"unreachable_by"`
	Checks        []checkDoc `json:"checks"`
	// Status is null for a node that never said anything of itself.
	Status *statusDoc `json:"status"`
}

// statusDoc is what a node says of itself.
type statusDoc struct {
	AgeMs              int64         `json:"age_ms"`
	SampledAt          string        `json:"sampled_at"`
	Epoch              uint64        `json:"epoch"`
	Software           string        `json:"software"`
	UptimeMs           uint64        `json:"uptime_ms"`
	CPUUtilization     number        `json:"cpu_utilization"`
	MemoryBytes        uint64        `json:"memory_bytes"`
	DiskUsedBytes      uint64        `json:"disk_used_bytes"`
	DiskAvailableBytes uint64        `json:"disk_available_bytes"`
	OpsPerSecond       number        `json:"operations_per_second"`
	Get                operationsDoc `json:"get"`
	Put                operationsDoc `json:"put"`
	Scan               operationsDoc `json:"scan"`
	RequestsInFlight   uint32        `json:"requests_in_flight"`
	WriteBacklog       uint32        `json:"write_backlog"`
	Queues             []queueDoc    `json:"queues"`
	Clock              clockDoc      `json:"clock"`
	Hints              []hintsDoc    `json:"hints"`
	Unreachable        []string      `json:"unreachable"`
	OldestSyncMs       uint64        `json:"oldest_sync_ms"`
}

type operationsDoc struct {
	PerSecond number  `json:"per_second"`
	P50Ms     float64 `json:"p50_ms"`
	P99Ms     float64 `json:"p99_ms"`
	Total     uint64  `json:"total"`
	Errors    uint64  `json:"errors"`
}

// number is a figure that a node gave; JSON has nothing for NaN and infinity but null.
type number float64

func (n number) MarshalJSON() ([]byte, error) {
	if f := float64(n); math.IsNaN(f) || math.IsInf(f, 0) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(n))
}

type queueDoc struct {
	Name  string `json:"name"`
	Depth uint64 `json:"depth"`
	// Capacity is 0 for a queue that is bounded elsewhere.
	Capacity uint64 `json:"capacity"`
}

type clockDoc struct {
	OK       bool   `json:"ok"`
	OffsetMs int64  `json:"offset_ms"`
	Opinions uint32 `json:"opinions"`
	LeadMs   int64  `json:"lead_ms"`
	Problem  string `json:"problem"`
}

type hintsDoc struct {
	For       string `json:"for"`
	Records   uint64 `json:"records"`
	SizeBytes uint64 `json:"size_bytes"`
	OldestAt  string `json:"oldest_at"`
}

// nodeDocs describes all nodes.
func (s *clusterStatus) nodeDocs() []nodeDoc {
	docs := []nodeDoc{}
	slots := s.topology.SlotCounts(quorum.MaxN)
	for i := range s.nodes {
		n := &s.nodes[i]
		by, since := []string{}, ""
		for _, u := range s.unreachableBy(n.Incarnation) {
			by = append(by, s.topology.NodeName(u))
		}
		if n.sinceMs > 0 {
			since = millisDoc(n.sinceMs)
		}
		docs = append(docs, nodeDoc{
			Name: n.Name, Incarnation: n.Incarnation, Role: n.Role.String(), Zone: n.Zone, Address: n.Address, AdminAddress: n.AdminAddress,
			Slots: slots[n.Incarnation], Drained: s.drained(n.Incarnation), State: stateText(n.status.GetState()), StateReason: n.status.GetReason(),
			Health: n.healthText(), HealthReason: n.reason, Status: s.statusDoc(n),
			HealthSince: since, Gossip: n.gossip, UnreachableBy: by, Checks: checkDocs(n.checks),
		})
	}
	return docs
}

func (s *clusterStatus) statusDoc(n *observedNode) *statusDoc {
	st := n.status
	if st == nil {
		return nil
	}
	d := &statusDoc{
		AgeMs: n.age.Milliseconds(), SampledAt: millisDoc(st.GetSampledAtMs()), Epoch: st.GetEpoch(), Software: st.GetSoftware(), UptimeMs: st.GetUptimeMs(),
		CPUUtilization: number(st.GetCpuUtilization()), MemoryBytes: st.GetMemoryBytes(), DiskUsedBytes: st.GetDiskUsedBytes(), DiskAvailableBytes: st.GetDiskAvailableBytes(),
		OpsPerSecond: number(operations(st)), Get: operationsDocOf(st.GetGet()), Put: operationsDocOf(st.GetPut()), Scan: operationsDocOf(st.GetScan()),
		RequestsInFlight: st.GetRequestsInFlight(), WriteBacklog: st.GetWriteBacklog(),
		Clock:  clockDoc{st.GetClockOk(), st.GetClockOffsetMs(), st.GetClockOpinions(), st.GetClockLeadMs(), st.GetClockProblem()},
		Queues: []queueDoc{}, Hints: []hintsDoc{}, Unreachable: []string{}, OldestSyncMs: st.GetOldestSyncMs(),
	}
	for _, q := range st.GetQueues() {
		d.Queues = append(d.Queues, queueDoc{q.GetName(), q.GetDepth(), q.GetCapacity()})
	}
	for _, h := range st.GetHints() {
		d.Hints = append(d.Hints, hintsDoc{s.topology.NodeName(h.GetTarget()), h.GetCount(), h.GetBytes(), millisDoc(h.GetOldestMs())})
	}
	for _, u := range st.GetUnreachable() {
		d.Unreachable = append(d.Unreachable, s.topology.NodeName(u))
	}
	return d
}

func operationsDocOf(o *adminv1.OperationStats) operationsDoc {
	return operationsDoc{number(o.GetPerSecond()), float64(o.GetP50Us()) / 1000, float64(o.GetP99Us()) / 1000, o.GetTotal(), o.GetErrors()}
}

// millisDoc is a time given in milliseconds since 1970.
func millisDoc(ms uint64) string { return time.UnixMilli(int64(ms)).UTC().Format(time.RFC3339Nano) }
