package bench_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/devcluster"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// What floors are measured with.
const (
	floorRounds  = 3
	floorKey     = 20
	floorValue   = 1024
	floorRecords = 20_000
)

// floor is one thing that is measured: operations of so many threads.
type floor struct {
	name    string
	threads int
	do      func(ctx context.Context, rng *rand.Rand) error
	// servers are processes whose CPU is counted, too.
	servers []int

	// by round: µs, server CPU in µs an operation, and flushes of all disks an operation
	p50, perSecond, cpu, flushes []float64
}

// TestFloors measures what Kvasir's operations are made of, alone, and prints how far above
// that they are. KVASIR_FLOORS says for how long each is measured in each round; KVASIR_BIN is
// where the executables are.
func TestFloors(t *testing.T) {
	each, err := time.ParseDuration(os.Getenv("KVASIR_FLOORS"))
	if err != nil {
		t.Skip("KVASIR_FLOORS says for how long to measure, as 2s; it asserts nothing")
	}
	// Three logs are synced in this process: see docs/performance.md.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 3))
	dir, err := os.MkdirTemp("/var/tmp", "kvasir-floors-") // on a disk
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	echoPut, echoGet := unaryEchoes(t, echoProcess(t))
	_, innerGet := unaryEchoes(t, serve(t, registerEchoes))
	stores := openPebbles(t, dir)
	c := startCluster(t, filepath.Join(dir, "cluster"), 3)
	c.fill(t, floorRecords, floorValue)
	cl, pids := c.Client, c.pids()
	floors := []*floor{
		{name: "unary echo of a put", threads: 1, do: echoPut},
		{name: "unary echo of a get", threads: 1, do: echoGet},
		{name: "unary echo of a get within a process", threads: 1, do: innerGet},
		{name: "a batched stream alone", threads: 64, do: bareStream(t)},
		{name: "Kvasir's link", threads: 64, do: linkEcho(t)},
		{name: "Pebble: synced set", threads: 1, do: syncedSet(stores[:1], 1)},
		{name: "Pebble: synced set", threads: 64, do: syncedSet(stores[:1], 1)},
		{name: "Pebble: cached get", threads: 1, do: pebbleGet(t, stores[0])},
		{name: "quorum floor: 2 of 3 synced", threads: 1, do: syncedSet(stores, 2)},
		{name: "quorum floor: 2 of 3 synced", threads: 64, do: syncedSet(stores, 2)},
		{name: "Kvasir: put, W=2", threads: 1, do: clusterPut(cl), servers: pids},
		{name: "Kvasir: put, W=2", threads: 64, do: clusterPut(cl), servers: pids},
		{name: "Kvasir: cached get, R=1", threads: 1, do: clusterGet(cl, client.R("one")), servers: pids},
		{name: "Kvasir: get, R=2", threads: 1, do: clusterGet(cl), servers: pids},
		{name: "Kvasir: get, R=2", threads: 64, do: clusterGet(cl), servers: pids},
	}
	var built []float64
	for range floorRounds {
		for _, f := range floors {
			f.measure(t, each)
		}
		built = append(built, buildTable(t, filepath.Join(dir, "table")))
	}
	report(t, floors, built)
}

// measure adds a round.
func (f *floor) measure(t *testing.T, d time.Duration) {
	t.Helper()
	cfg := bench.Config{Stores: []bench.Store{operation(f.do)}, Threads: f.threads, Duration: d, Records: 2, Workload: bench.Mix(1, bench.Uniform), Timeout: 10 * time.Second}
	before, flushed := cpuOf(t, f.servers), diskFlushes(t)
	res, err := bench.Run(context.Background(), cfg, nil)
	if err != nil || res.Errors > 0 {
		t.Fatalf("%s: %s, %v", f.name, res.FirstError, err)
	}
	used := cpuOf(t, f.servers) - before
	f.flushes = append(f.flushes, float64(diskFlushes(t)-flushed)/float64(res.Operations))
	f.p50 = append(f.p50, float64(res.Kinds[bench.Read].P50))
	f.perSecond = append(f.perSecond, res.PerSecond)
	f.cpu = append(f.cpu, float64(used.Microseconds())/float64(res.Operations))
}

// operation is a store of which only the reads are made.
type operation func(ctx context.Context, rng *rand.Rand) error

var rngs = sync.Pool{New: func() any { return rand.New(rand.NewPCG(rand.Uint64(), 1)) }}

func (o operation) Read(ctx context.Context, _ []byte) error {
	rng := rngs.Get().(*rand.Rand)
	defer rngs.Put(rng)
	return o(ctx, rng)
}
func (operation) Write(context.Context, []byte, []byte) error    { panic("not used") }
func (operation) Scan(context.Context, []byte, int) error        { panic("not used") }
func (operation) Load(context.Context, [][]byte, [][]byte) error { panic("not used") }

// cpuOf returns the CPU that processes have used.
func cpuOf(t *testing.T, pids []int) (total time.Duration) {
	t.Helper()
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
		for _, f := range fields[11:13] { // utime and stime, in hundredths of a second
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			total += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return total
}

// diskFlushes returns how many requests to flush all disks have completed. Those that come
// while one is under way may share the next.
func diskFlushes(t *testing.T) (total int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/diskstats")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if fields := strings.Fields(line); len(fields) > 18 { // since Linux 5.5
			n, err := strconv.ParseInt(fields[18], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			total += n
		}
	}
	return total
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func report(t *testing.T, floors []*floor, built []float64) {
	t.Helper()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nwhat\tthreads\toperations/s\tp50, µs\tserver CPU, µs\tflushes an operation\t\n")
	value := func(name string, threads int, of func(*floor) []float64) float64 {
		i := slices.IndexFunc(floors, func(f *floor) bool { return f.name == name && f.threads == threads })
		return median(of(floors[i]))
	}
	p50 := func(f *floor) []float64 { return f.p50 }
	rate := func(f *floor) []float64 { return f.perSecond }
	cpu := func(f *floor) []float64 { return f.cpu }
	for _, f := range floors {
		used := ""
		if len(f.servers) > 0 {
			used = fmt.Sprintf("%.0f", median(f.cpu))
		}
		fmt.Fprintf(w, "%s\t%d\t%.0f\t%.0f\t%s\t%.2f\t\n", f.name, f.threads, median(f.perSecond), median(f.p50), used, median(f.flushes))
	}
	fmt.Fprintf(w, "\nratio\treached\ttarget\t\n")
	row := func(name string, ratio float64, target string) {
		fmt.Fprintf(w, "%s\t%.2f\t%s\t\n", name, ratio, target)
	}
	row("put, one thread, over unary echo + quorum floor",
		value("Kvasir: put, W=2", 1, p50)/(value("unary echo of a put", 1, p50)+value("quorum floor: 2 of 3 synced", 1, p50)), "≤ 1.5")
	row("cached get R=1, one thread, over unary echo", value("Kvasir: cached get, R=1", 1, p50)/value("unary echo of a get", 1, p50), "≤ 1.15")
	row("link over the batched stream alone", value("Kvasir's link", 64, rate)/value("a batched stream alone", 64, rate), "≥ 0.8")
	row("puts a second over the quorum floor, 64 threads", value("Kvasir: put, W=2", 64, rate)/value("quorum floor: 2 of 3 synced", 64, rate), "")
	fmt.Fprintf(w, "put, server CPU\t%.0f µs\t≤ 50 µs\t\n", value("Kvasir: put, W=2", 64, cpu))
	fmt.Fprintf(w, "get R=2, server CPU\t%.0f µs\t≤ 20 µs\t\n", value("Kvasir: get, R=2", 64, cpu))
	fmt.Fprintf(w, "building a sorted table\t%.0f MiB/s\t\t\n", median(built))
	w.Flush()
	t.Log(b.String())
}

// echoes answer calls with as many bytes as Kvasir would.
type echoes struct {
	kvv1.UnimplementedKVServiceServer
	replicav1.UnimplementedReplicaServiceServer
	value []byte
}

func (e *echoes) Put(context.Context, *kvv1.PutRequest) (*kvv1.PutResponse, error) {
	return &kvv1.PutResponse{}, nil
}

func (e *echoes) Get(context.Context, *kvv1.GetRequest) (*kvv1.GetResponse, error) {
	return &kvv1.GetResponse{Found: true, Value: e.value}, nil
}

func serve(t *testing.T, register func(*grpc.Server)) (address string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := rpc.Transport{}.NewServer()
	register(srv)
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(lis) }) // ends with Stop
	t.Cleanup(func() { srv.Stop(); serving.Wait() })
	return lis.Addr().String()
}

func connect(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	cc, err := rpc.Transport{Dial: rpc.NetDialer}.NewConn(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

func registerEchoes(s *grpc.Server) {
	kvv1.RegisterKVServiceServer(s, &echoes{value: make([]byte, floorValue)})
}

// TestMain serves echoes instead of running tests in a process that echoProcess starts.
func TestMain(m *testing.M) {
	if os.Getenv("KVASIR_ECHO") == "" {
		os.Exit(m.Run())
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	srv := rpc.Transport{}.NewServer()
	registerEchoes(srv)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // it ends with whoever started this
		srv.Stop()
	}()
	fmt.Println(lis.Addr())
	if err := srv.Serve(lis); err != nil {
		panic(err)
	}
}

// echoProcess starts a process that answers unary calls, as a node is one to its clients.
func echoProcess(t *testing.T) (address string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KVASIR_ECHO=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	if _, err := fmt.Fscanln(out, &address); err != nil {
		t.Fatal(err)
	}
	return address
}

func unaryEchoes(t *testing.T, address string) (put, get func(context.Context, *rand.Rand) error) {
	t.Helper()
	c := kvv1.NewKVServiceClient(connect(t, address))
	key, value := make([]byte, floorKey), make([]byte, floorValue)
	put = func(ctx context.Context, _ *rand.Rand) error {
		_, err := c.Put(ctx, &kvv1.PutRequest{Key: key, Value: value})
		return err
	}
	get = func(ctx context.Context, _ *rand.Rand) error {
		_, err := c.Get(ctx, &kvv1.GetRequest{Key: key})
		return err
	}
	return put, get
}

// Link of echoes answers a frame with a frame, in the goroutine that took it in.
func (e *echoes) Link(s grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]) error {
	for {
		f, err := s.Recv()
		if err != nil {
			return nil
		}
		out := &replicav1.LinkResponse{}
		for _, c := range f.GetCalls() {
			out.Replies = append(out.Replies, &replicav1.Reply{Id: c.GetId()})
		}
		if err := s.Send(out); err != nil {
			return nil
		}
	}
}

func readCall() *replicav1.Call {
	return &replicav1.Call{Operation: &replicav1.Call_Read{Read: &replicav1.Read{Key: make([]byte, 100)}}}
}

// bareStream is the least that batches calls over one stream: no deadlines, no errors, no
// bounds, and no goroutine for a frame.
func bareStream(t *testing.T) func(context.Context, *rand.Rand) error {
	t.Helper()
	address := serve(t, func(s *grpc.Server) { replicav1.RegisterReplicaServiceServer(s, &echoes{}) })
	stream, err := replicav1.NewReplicaServiceClient(connect(t, address)).Link(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var queue []*replicav1.Call
	waiting := map[uint64]chan struct{}{}
	next := uint64(0)
	wake := make(chan struct{}, 1)
	go func() { // both end with the stream, which ends with the test
		for range wake {
			runtime.Gosched()
			mu.Lock()
			frame := queue
			queue = nil
			mu.Unlock()
			if len(frame) > 0 && stream.Send(&replicav1.LinkRequest{Calls: frame}) != nil {
				return
			}
		}
	}()
	go func() {
		for {
			f, err := stream.Recv()
			if err != nil {
				return
			}
			mu.Lock()
			for _, r := range f.GetReplies() {
				close(waiting[r.GetId()])
				delete(waiting, r.GetId())
			}
			mu.Unlock()
		}
	}()
	return func(context.Context, *rand.Rand) error {
		c, done := readCall(), make(chan struct{})
		mu.Lock()
		next++
		c.Id = next
		waiting[c.Id] = done
		queue = append(queue, c)
		mu.Unlock()
		select {
		case wake <- struct{}{}:
		default:
		}
		<-done
		return nil
	}
}

// linked answers as a node does, but for what it does with calls.
type linked struct {
	replicav1.UnimplementedReplicaServiceServer
}

func (linked) Link(s grpc.BidiStreamingServer[replicav1.LinkRequest, replicav1.LinkResponse]) error {
	return rpc.Serve(rpc.ReplicaServerStream(s), nil, rpc.Replica, nil, func(_ context.Context, _ time.Time, calls []*replicav1.Call, reply func(*replicav1.Reply)) {
		for _, c := range calls {
			reply(&replicav1.Reply{Id: c.GetId()})
		}
	})
}

func linkEcho(t *testing.T) func(context.Context, *rand.Rand) error {
	t.Helper()
	address := serve(t, func(s *grpc.Server) { replicav1.RegisterReplicaServiceServer(s, linked{}) })
	l := rpc.NewLink(rpc.LinkConfig{
		Transport: rpc.Transport{Dial: rpc.NetDialer}, Address: address, Peer: "echo", WallClock: func() int64 { return time.Now().UnixMilli() },
	}, rpc.Replica)
	t.Cleanup(l.Close)
	<-l.Ready()
	return func(ctx context.Context, _ *rand.Rand) error {
		_, err := l.Do(ctx, readCall())
		return err
	}
}

func openPebbles(t *testing.T, dir string) (out []*pebble.DB) {
	t.Helper()
	for i := range 3 {
		db, err := pebble.Open(filepath.Join(dir, fmt.Sprint("pebble", i)), &pebble.Options{CacheSize: 64 << 20, MemTableSize: 32 << 20, Logger: silent{}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		out = append(out, db)
	}
	return out
}

type silent struct{}

func (silent) Infof(string, ...any)  {}
func (silent) Errorf(string, ...any) {}
func (silent) Fatalf(format string, args ...any) {
	panic(fmt.Sprintf(format, args...))
}

func floorKeyOf(rng *rand.Rand) []byte { return fmt.Appendf(nil, "user%016x", rng.IntN(floorRecords)) }

func randomValue(rng *rand.Rand) []byte {
	v := make([]byte, floorValue)
	for i := 0; i < len(v); i += 8 {
		binary.LittleEndian.PutUint64(v[i:], rng.Uint64())
	}
	return v
}

// syncedSet writes to all stores and returns when need have it on disk.
func syncedSet(stores []*pebble.DB, need int) func(context.Context, *rand.Rand) error {
	return func(_ context.Context, rng *rand.Rand) error {
		key, value := floorKeyOf(rng), randomValue(rng)
		if len(stores) == 1 {
			return stores[0].Set(key, value, pebble.Sync)
		}
		done := make(chan error, len(stores))
		for _, db := range stores {
			go func() { done <- db.Set(key, value, pebble.Sync) }() // the last ends with the store at the latest
		}
		for range need {
			if err := <-done; err != nil {
				return err
			}
		}
		return nil
	}
}

func pebbleGet(t *testing.T, db *pebble.DB) func(context.Context, *rand.Rand) error {
	t.Helper()
	b := db.NewBatch()
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range floorRecords {
		if err := b.Set(fmt.Appendf(nil, "user%016x", i), randomValue(rng), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Commit(pebble.Sync); err != nil {
		t.Fatal(err)
	}
	return func(_ context.Context, rng *rand.Rand) error {
		_, closer, err := db.Get(floorKeyOf(rng))
		if err != nil {
			return err
		}
		return closer.Close()
	}
}

// buildTable builds a sorted table of 64 MiB and returns how many MiB a second that was.
func buildTable(t *testing.T, path string) float64 {
	t.Helper()
	const size = 64 << 20
	f, err := vfs.Default.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	value := randomValue(rand.New(rand.NewPCG(1, 1)))
	began := time.Now()
	w := sstable.NewWriter(objstorageprovider.NewFileWritable(f), sstable.WriterOptions{TableFormat: sstable.TableFormatPebblev4})
	for i := range size / floorValue {
		value[i%floorValue]++
		if err := w.Set(fmt.Appendf(nil, "user%016x", i), value); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return float64(size>>20) / time.Since(began).Seconds()
}

// processes are an orchestrator and nodes as processes, with a client.
type processes struct {
	*client.Client
	nodes []devcluster.Status
}

// pids returns the nodes' processes.
func (c *processes) pids() (out []int) {
	for _, n := range c.nodes {
		out = append(out, n.PID)
	}
	return out
}

// startCluster starts so many nodes and an orchestrator as processes.
func startCluster(t *testing.T, dir string, nodes int) *processes {
	t.Helper()
	bin := os.Getenv("KVASIR_BIN")
	if bin == "" {
		t.Fatal("KVASIR_BIN says where kvnode and kvorch are: use the target of the Makefile")
	}
	ctx := context.Background()
	settings := devcluster.Settings{Nodes: nodes, Orchestrators: 1, Zones: devcluster.DefaultZones(nodes), Port: loopback.Base(t, 10*(nodes+1)) + 10}
	c, err := devcluster.Create(ctx, dir, settings, devcluster.Options{BinDir: bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := c.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	if _, err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	all, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	out := &processes{}
	var endpoints []string
	for _, p := range all {
		if p.Role == "data" {
			endpoints, out.nodes = append(endpoints, p.ClientAddr), append(out.nodes, p)
		}
	}
	if out.Client, err = client.New(ctx, endpoints); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return out
}

// fill stores so many records with values of so many bytes.
func (c *processes) fill(t *testing.T, records, size int) {
	t.Helper()
	var next atomic.Int64
	var g errgroup.Group
	for range 16 {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
			for {
				from := int(next.Add(200)) - 200
				if from >= records {
					return nil
				}
				var ops []client.Operation
				for k := from; k < min(from+200, records); k++ {
					ops = append(ops, client.Operation{Key: fmt.Appendf(nil, "user%016x", k), Value: randomValue(rng)[:size]})
				}
				results, err := c.Batch(context.Background(), ops)
				for _, r := range results {
					err = errors.Join(err, r.Err)
				}
				if err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func clusterPut(c *client.Client) func(context.Context, *rand.Rand) error {
	return func(ctx context.Context, rng *rand.Rand) error {
		_, err := c.Put(ctx, floorKeyOf(rng), randomValue(rng))
		return err
	}
}

func clusterGet(c *client.Client, opts ...client.CallOption) func(context.Context, *rand.Rand) error {
	return func(ctx context.Context, rng *rand.Rand) error {
		_, err := c.Get(ctx, floorKeyOf(rng), opts...)
		return err
	}
}
