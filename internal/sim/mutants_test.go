//go:build mutants

package sim_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// mutants are the planted bugs, with what they do wrong.
var mutants = [][2]string{
	{"ack-before-sync", "a write is acknowledged before it is synced"},
	{"reply-before-sync", "a read answers with what is not synced yet"},
	{"one-ack-too-few", "a write waits for W−1 acknowledgements"},
	{"unknown-called-failed", "a write whose outcome is unknown is said to have failed"},
	{"hint-lost-at-restart", "hints on disk are forgotten at a restart"},
	{"reversed-tie", "of two versions with one time the lower incarnation wins"},
	{"repair-writes-older", "read repair sends the older record"},
	{"repair-only-stale", "read repair mends only the stale among the R"},
	{"stale-epoch-accepted", "a replica serves requests of epochs before a change"},
	{"clock-not-durable", "the clock's high-water mark is not written"},
	{"lost-tail-unnoticed", "a log that lost its tail is served from"},
	{"duplicate-incarnation", "a new data directory gets the incarnation of the old one"},
	{"token-ignored", "a client's token does not advance the coordinator's clock"},
	{"expired-served", "expired values are served"},
	{"expired-revived-by-repair", "anti-entropy forgets when values expire"},
	{"repair-skips-tombstones", "anti-entropy leaves tombstones out"},
	{"gc-without-certificate", "every node removes what is dead by itself"},
	{"certificate-without-promises", "a certificate does not wait for the promises of replicas that are down"},
	{"least-version-ignored", "a read does not look for the version that its client has seen"},
	{"scan-believes-one", "a scan emits what one of several replicas that differ has"},
	{"one-version-for-a-batch", "the operations of a batch share a version"},
	{"wrong-phase-read", "the incoming node is read before it is filled"},
	{"early-sender-drop", "the old node deletes its records before the move is committed"},
	{"not-owner-accepted", "a node serves requests of epochs before a move, and vnodes of which it is no endpoint"},
	{"flat-pending-counts", "a write counts nodes, not slots with both of theirs"},
	{"advance-on-live-nodes", "a phase ends when all live nodes have taken it in, however few slots they are"},
	{"hint-to-ex-owner", "hints go to nodes that have handed the vnode over, and are taken"},
	{"no-wipe", "what is left of an earlier assignment is neither swept nor wiped"},
	{"advance-unfilled", "a slot is read at the incoming node before that is filled"},
	{"ingested-sets", "files that vnodes move in hold Sets, not Merges"},
	{"two-transitions", "two slots of a vnode are in transition at once"},
}

// loopMutants are those of the control loops: they are looked for with the faults of autonomy.
var loopMutants = [][2]string{
	{"freeze-ignored", "nodes are given up however many are suspect"},
	{"end-before-whole", "a dead node's process and disk are ended as its recovery begins"},
	{"followers-provision", "every orchestrator calls the provisioner, not the leader alone"},
}

// reportMutants are those of reporting nodes: they are looked for with their faults.
var reportMutants = [][2]string{
	{"ack-before-eviction", "a write leaves a copy out once its eviction has begun"},
	{"lease-ignored", "a reporting node answers for its copies in sync without a lease"},
	{"lease-not-awaited", "the leader does not wait for the end of a lease"},
	{"stale-as-in-sync", "copies that are behind answer as if they were in sync"},
	{"join-unchecked", "a copy joins without being compared with what was written before"},
	{"cached-record-kept", "a cached record outlives a write to its key"},
}

// hintMutants take several hints of one key, after newer writes and a restart: they are looked
// for with those alone, for among all faults that is rare.
var hintMutants = [][2]string{
	{"cache-from-blind-merge", "a blind merge makes an entry of the version cache exact"},
}

const envMutant = "KVASIR_MUTANT"

// TestMutants checks the checker: every planted bug is found by the seeds of make sim,
// which pass without it.
func TestMutants(t *testing.T) {
	minutes := number(t, envMinutes, 4)
	maxSeeds := uint64(number(t, "KVASIR_MUTANT_SEEDS", 20)) // within which a mutant must be caught
	type row struct {
		name, what, caught string
		seeds              int
	}
	type runOf struct {
		faults string
		seed   uint64
	}
	all := slices.Concat(mutants, hintMutants, loopMutants, reportMutants)
	rows := make([]row, len(all))
	var mu sync.Mutex
	needed := map[runOf]bool{}
	began := time.Now()
	only := os.Getenv("KVASIR_MUTANTS") // names, separated by commas
	forEach(len(all), func(i int) {
		m, faults := all[i], ""
		switch {
		case i >= len(mutants)+len(hintMutants)+len(loopMutants):
			faults = reporting
		case i >= len(mutants)+len(hintMutants):
			faults = autonomy
		case i >= len(mutants):
			faults = "late-hints"
		}
		rows[i] = row{name: m[0], what: m[1]}
		if only != "" && !slices.Contains(strings.Split(only, ","), m[0]) {
			return
		}
		for seed := uint64(1); seed <= maxSeeds; seed++ {
			o := runSeed(seed, minutes, faults, []string{envMutant + "=" + m[0]})
			mu.Lock()
			needed[runOf{faults, seed}] = true
			mu.Unlock()
			if o.late {
				t.Errorf("%s: %s", m[0], o.explain())
			} else if o.failed() {
				rows[i].seeds = int(seed)
				rows[i].caught = "process ends"
				if o.Report != nil && len(o.Violations) > 0 {
					rows[i].caught = "control loops" // their rules have no number
					if n := o.Violations[0].Invariant; n > 0 {
						rows[i].caught = fmt.Sprint(n)
					}
					t.Logf("%s: seed %d: %s", m[0], seed, o.Violations[0])
				} else {
					t.Logf("%s: seed %d: %s", m[0], seed, o.explain())
				}
				return
			}
		}
		t.Errorf("%s is not caught within %d seeds", m[0], maxSeeds)
	})
	seeds := slices.Collect(maps.Keys(needed))
	forEach(len(seeds), func(i int) {
		if o := runSeed(seeds[i].seed, minutes, seeds[i].faults, nil); o.failed() {
			t.Errorf("without a mutant: %s", o.explain())
		}
	})
	var b strings.Builder
	fmt.Fprintf(&b, "| mutant | what it does | invariant | seeds |\n|---|---|---|---|\n")
	for _, r := range rows {
		if r.seeds == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d |\n", r.name, r.what, r.caught, r.seeds)
	}
	t.Logf("%d seeds pass without mutants; in %s\n%s", len(seeds), time.Since(began).Round(time.Second), b.String())
}
