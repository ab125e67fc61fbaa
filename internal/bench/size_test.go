package bench_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
)

const (
	// sizeRate is how many operations a second nodes are asked for: as many as nine that
	// share two cores get done with ease.
	sizeRate  = 800
	fewKeys   = 100_000
	manyKeys  = 10_000_000
	smallSize = 64
	// hotKeys are read, of few records or of many.
	hotKeys = 20_000
)

// TestSize measures what an idle node uses, what an operation costs where there are more
// nodes, and how long cached reads take where there are more keys. KVASIR_SIZE says for how
// long each is measured in each round; KVASIR_BIN is where the executables are.
func TestSize(t *testing.T) {
	each, err := time.ParseDuration(os.Getenv("KVASIR_SIZE"))
	if err != nil {
		t.Skip("KVASIR_SIZE says for how long to measure, as 10s; it asserts nothing")
	}
	dir, err := os.MkdirTemp("/var/tmp", "kvasir-size-") // on a disk
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	t.Run("nodes", func(t *testing.T) { sizeOfNodes(t, w, dir, each) })
	t.Run("keys", func(t *testing.T) { sizeOfKeys(t, w, dir, each) })
	w.Flush()
	t.Log(b.String())
}

func sizeOfNodes(t *testing.T, w *tabwriter.Writer, dir string, each time.Duration) {
	three := startCluster(t, filepath.Join(dir, "three"), 3)
	time.Sleep(30 * time.Second) // what a start brings with it
	before := cpuOf(t, three.pids())
	time.Sleep(3 * each)
	used := (cpuOf(t, three.pids()) - before).Seconds() / (3 * each).Seconds() / 3
	fmt.Fprintf(w, "\nidle, one of three nodes\t%.2f%% of a core\t≤ 0.5%%\t\n", 100*used)
	fmt.Fprintf(w, "\t%.1f MiB\t≤ 40 MB\t\n", residentOf(t, three.nodes[0].PID))

	nine := startCluster(t, filepath.Join(dir, "nine"), 9)
	cpu := map[*processes][]float64{}
	for _, c := range []*processes{three, nine} {
		c.fill(t, floorRecords, floorValue)
	}
	for range floorRounds {
		for _, c := range []*processes{three, nine} {
			before := cpuOf(t, c.pids())
			res, err := bench.Run(context.Background(), bench.Config{
				Stores:  []bench.Store{mixed{c.Client}},
				Threads: 64, Duration: each, Records: floorRecords, ValueBytes: floorValue, Workload: bench.Mix(0.5, bench.Uniform), Target: sizeRate,
			}, nil)
			if err != nil || res.Errors > 0 {
				t.Fatalf("%s, %v", res.FirstError, err)
			}
			cpu[c] = append(cpu[c], float64((cpuOf(t, c.pids())-before).Microseconds())/float64(res.Operations))
		}
	}
	of3, of9 := median(cpu[three]), median(cpu[nine])
	fmt.Fprintf(w, "CPU an operation at %d/s, half puts: three nodes\t%.0f µs\t\t\n", sizeRate, of3)
	fmt.Fprintf(w, "nine nodes\t%.0f µs\t\t\n", of9)
	fmt.Fprintf(w, "nine over three\t%.2f\t≤ 1.1\t\n", of9/of3)
}

// mixed reads and writes keys of what fill has stored.
type mixed struct{ *client.Client }

func (m mixed) Read(ctx context.Context, _ []byte) error {
	return operation(clusterGet(m.Client)).Read(ctx, nil)
}

func (m mixed) Write(ctx context.Context, _, _ []byte) error {
	return operation(clusterPut(m.Client)).Read(ctx, nil)
}
func (mixed) Scan(context.Context, []byte, int) error        { panic("not used") }
func (mixed) Load(context.Context, [][]byte, [][]byte) error { panic("not used") }

func sizeOfKeys(t *testing.T, w *tabwriter.Writer, dir string, each time.Duration) {
	var gets []*floor
	for _, keys := range []int{fewKeys, manyKeys} {
		c := startCluster(t, filepath.Join(dir, fmt.Sprint(keys)), 1)
		c.fill(t, keys, smallSize)
		gets = append(gets, &floor{name: fmt.Sprint(keys), threads: 1, do: func(ctx context.Context, rng *rand.Rand) error {
			_, err := c.Get(ctx, fmt.Appendf(nil, "user%016x", rng.IntN(hotKeys)))
			return err
		}})
	}
	for i := range floorRounds + 1 {
		for _, g := range gets {
			g.measure(t, each)
			if i == 0 { // which fills the caches
				g.p50, g.perSecond, g.cpu, g.flushes = nil, nil, nil, nil
			}
		}
	}
	few, many := median(gets[0].p50), median(gets[1].p50)
	fmt.Fprintf(w, "cached get, one thread, p50: of %d keys\t%.0f µs\t\t\n", fewKeys, few)
	fmt.Fprintf(w, "of %d keys\t%.0f µs\t\t\n", manyKeys, many)
	fmt.Fprintf(w, "many over few\t%.2f\t≤ 1.5\t\n", many/few)
}

// residentOf returns how much memory a process has, in MiB.
func residentOf(t *testing.T, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseFloat(strings.Fields(kb)[0], 64)
			if err != nil {
				t.Fatal(err)
			}
			return n / 1024
		}
	}
	t.Fatalf("process %d has no resident memory", pid)
	return 0
}
