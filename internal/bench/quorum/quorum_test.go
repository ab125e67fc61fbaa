// Package quorum measures what a caller waits for: with how many of five replicas an
// operation asks for, two of them far, and with how gets mend replicas that are stale. It is
// a test and nothing else; no other package imports it.
package quorum

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
)

// Environment variables that steer the test.
const (
	// durationEnv is for how long each load is made in each round; without it the test is
	// skipped.
	durationEnv = "KVASIR_QUORUM"
	// binEnv is where the executables are.
	binEnv = "KVASIR_BIN"
	// roundsEnv is how often everything is measured. Default 3.
	roundsEnv = "KVASIR_QUORUM_ROUNDS"
	// delayEnv is how long a byte is under way from or to a node that is far. Default 20ms.
	delayEnv = "KVASIR_QUORUM_DELAY"
	// picturesEnv is a directory for pictures, jsonEnv a file for all results.
	picturesEnv = "KVASIR_QUORUM_PICTURES"
	jsonEnv     = "KVASIR_QUORUM_JSON"
)

// What is measured with.
const (
	replicas   = 5
	records    = 2000
	valueBytes = 1024
)

// far are the last of the nodes.
var far = []string{"node4", "node5"}

// The rate is one that all settings reach, so that latencies are those of the same work.
var loads = []load{{"1 caller", 1, 0}, {"32 callers, 200/s", 32, 200}}

// setting is a namespace's quorums.
type setting struct{ name, namespace, w, r string }

var (
	percent    = setting{"40%: W=R=2", "percent", "40%", "40%"}
	majority   = setting{"majority: W=R=3", "majority", "quorum", "quorum"}
	every      = setting{"all: W=R=5", "every", "all", "all"}
	readHeavy  = setting{"read-heavy: W=5, R=1", "read-heavy", "all", "one"}
	writeHeavy = setting{"write-heavy: W=1, R=5", "write-heavy", "one", "all"}
	settings   = []setting{percent, majority, every, readHeavy, writeHeavy}
)

// part is a table of what was measured.
type part struct {
	title  string
	series []string
}

var (
	operations = []string{"get", "put"} // gets first: in the next round nothing is on its way any more
	farNear    = &part{"Two replicas are far, coordinators are not", operations}
	farAny     = &part{"Two replicas are far, the client chooses among all", operations}
	noneFar    = &part{"No replica is far", operations}
	staleGets  = &part{"Gets with R=3, so many replicas being stale, by read repair", []string{"off", "asynchronous", "blocking"}}
	repairs    = map[string]client.ReadRepair{"off": client.RepairOff, "asynchronous": client.RepairAsync, "blocking": client.RepairBlocking}
)

// plan is how it is measured.
type plan struct {
	Duration time.Duration `json:"duration_ns"` // of a load
	Delay    time.Duration `json:"delay_ns"`
	Rounds   int           `json:"rounds"`
	bin      string
}

func readPlan() (p plan, err error) {
	value := func(name, def string) string {
		if v := os.Getenv(name); v != "" {
			return v
		}
		return def
	}
	var errs [3]error
	p.Duration, errs[0] = time.ParseDuration(os.Getenv(durationEnv))
	p.Delay, errs[1] = time.ParseDuration(value(delayEnv, "20ms"))
	p.Rounds, errs[2] = strconv.Atoi(value(roundsEnv, "3"))
	if p.bin = os.Getenv(binEnv); p.bin == "" {
		return p, fmt.Errorf("%s says where kvnode and kvorch are: run `make bench-quorum`", binEnv)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return p, err
	}
	if p.Duration <= 0 || p.Delay <= 0 || p.Rounds < 1 {
		return p, errors.New("durations must be above 0, and rounds at least 1")
	}
	return p, nil
}

// TestQuorum measures, prints tables and draws pictures. It asserts nothing.
func TestQuorum(t *testing.T) {
	if os.Getenv(durationEnv) == "" {
		t.Skipf("%s says for how long to measure, as 4s; it asserts nothing", durationEnv)
	}
	p, err := readPlan()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := &results{On: host(), plan: p}
	ok := t.Run("far", func(t *testing.T) {
		c := startCluster(ctx, t, p.bin, p.Delay)
		compare(ctx, t, c, p, out, caller{farNear, c.client(ctx, t, true)}, caller{farAny, c.client(ctx, t, false)})
	}) && t.Run("near", func(t *testing.T) {
		c := startCluster(ctx, t, p.bin, 0)
		compare(ctx, t, c, p, out, caller{noneFar, c.client(ctx, t, false)})
		stale(ctx, t, c, p, out)
	})
	if !ok {
		return
	}
	out.report(os.Stdout)
	if dir := os.Getenv(picturesEnv); dir != "" {
		if err := out.draw(dir); err != nil {
			t.Error(err)
		}
	}
	if file := os.Getenv(jsonEnv); file != "" {
		if err := out.save(file); err != nil {
			t.Error(err)
		}
	}
}

// caller is a client whose operations make up a part.
type caller struct {
	part   *part
	client *client.Client
}

// compare measures puts and gets with each setting, by each caller in turn.
func compare(ctx context.Context, t *testing.T, c *cluster, p plan, out *results, callers ...caller) {
	t.Helper()
	for _, s := range settings {
		c.namespace(ctx, t, s.namespace, s.w, s.r)
		fill := bench.Config{
			Stores: []bench.Store{bench.Kvasir(callers[0].client, client.Namespace(s.namespace))}, Threads: 4, Operations: 1,
			Workload: bench.Mix(1, bench.Uniform), Records: records, ValueBytes: valueBytes,
		}
		if err := bench.Fill(ctx, fill); err != nil {
			t.Fatal(err)
		}
	}
	for round := range p.Rounds {
		for _, s := range settings {
			for _, operation := range operations {
				reads := 0.0
				if operation == "get" {
					reads = 1
				}
				for _, l := range loads {
					for _, from := range callers {
						progress("round %d of %d: %s, %s, %s, %s", round+1, p.Rounds, from.part.title, s.name, operation, l.name)
						took := measure(ctx, t, l, bench.Config{
							Stores: []bench.Store{bench.Kvasir(from.client, client.Namespace(s.namespace))}, Duration: p.Duration,
							Workload: bench.Mix(reads, bench.Uniform), Seed: uint64(round),
						})
						out.add(from.part, s.name, operation, l, took)
					}
				}
			}
		}
	}
}

// progress says what is being done.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
