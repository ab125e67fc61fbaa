package cli

import (
	"fmt"
	"strconv"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// namespaceDoc is a namespace in a document.
type namespaceDoc struct {
	Name         string  `json:"name"`
	ID           uint32  `json:"id"`
	N            int     `json:"n"`
	W            string  `json:"w"`
	R            string  `json:"r"`
	WNeeds       int     `json:"w_needs"`
	RNeeds       int     `json:"r_needs"`
	Strength     string  `json:"strength"`
	ReadRepair   string  `json:"read_repair"`
	RepairChance float64 `json:"repair_chance"`
	Hints        bool    `json:"hints"`
	TTLMs        int64   `json:"ttl_ms"`
	ChangedEpoch uint64  `json:"changed_epoch"`
	// AlsoN, AlsoW and AlsoR are there while N, or W and R change: writes need these too.
	AlsoN int    `json:"also_n,omitempty"`
	AlsoW string `json:"also_w,omitempty"`
	AlsoR string `json:"also_r,omitempty"`
	// Reporting is off, block, degrade or best_effort; the others are 0 where it is off.
	Reporting          string `json:"reporting"`
	ReportingCopies    int    `json:"reporting_copies"`
	ReportingTimeoutMs int64  `json:"reporting_timeout_ms"`
}

func namespaceDocOf(ns *topology.Namespace) namespaceDoc {
	return namespaceDoc{
		Name: ns.Name, ID: ns.ID, N: ns.N, W: ns.W.String(), R: ns.R.String(), WNeeds: ns.W.Need(ns.N), RNeeds: ns.R.Need(ns.N),
		Strength: ns.Strength().String(), ReadRepair: ns.ReadRepair.String(), RepairChance: ns.RepairChance,
		Hints: ns.Hints, TTLMs: ns.TTL.Milliseconds(), ChangedEpoch: ns.ChangedEpoch,
		AlsoN: ns.AlsoN, AlsoW: ns.AlsoW.String(), AlsoR: ns.AlsoR.String(),
		Reporting: ns.Reporting.Policy.String(), ReportingCopies: ns.Reporting.Copies, ReportingTimeoutMs: ns.Reporting.Timeout.Milliseconds(),
	}
}

type changeDoc struct {
	Epoch uint64 `json:"epoch"`
	At    string `json:"at"`
	What  string `json:"what"`
}

func namespaceFields(ns *topology.Namespace) []string {
	return []string{
		"name", ns.Name,
		"N", replicasText(ns),
		"W", writesText(ns),
		"R", quorumText(ns.R, ns.N) + " must answer a read",
		"reads are", ns.Strength().String(),
		"read repair", fmt.Sprintf("%s, chance %s", ns.ReadRepair, chanceText(ns.RepairChance)),
		"hints", onOff(ns.Hints),
		"TTL", ttlText(ns.TTL),
		"reporting", ns.Reporting.String(),
		"changed in epoch", topology.EpochString(ns.ChangedEpoch),
	}
}

// quorumText writes a quorum with what it comes to: 2 (quorum), 2 (40%), 3.
func quorumText(q quorum.Spec, n int) string {
	need := strconv.Itoa(q.Need(n))
	if q.String() == need {
		return need
	}
	return fmt.Sprintf("%s (%s)", need, q)
}

func chanceText(p float64) string { return strconv.FormatFloat(p*100, 'g', 4, 64) + "%" }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func ttlText(d time.Duration) string {
	if d == 0 {
		return "none"
	}
	return durationText(d)
}

// topologyRefusal gives a refusal that was made here the form of one that travelled.
func topologyRefusal(r *topology.Refusal) error { return rpc.AsError(r) }

// replicasText is N, and what it is becoming.
func replicasText(ns *topology.Namespace) string {
	text := fmt.Sprintf("%s of each key", plural(ns.N, "replica"))
	if ns.AlsoN > 0 && ns.AlsoN != ns.N {
		text += fmt.Sprintf("; N is changing, and writes need quorums of N=%d too", ns.AlsoN)
	}
	return text
}

// writesText is W, and what else writes need while W and R change.
func writesText(ns *topology.Namespace) string {
	text := quorumText(ns.W, ns.N) + " must have a write before it is acknowledged"
	if !ns.AlsoW.IsZero() {
		text += fmt.Sprintf("; W and R are changing, and writes need W=%s too", quorumText(ns.AlsoW, ns.N))
	}
	return text
}
