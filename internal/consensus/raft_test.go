package consensus

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func TestConfigIsChecked(t *testing.T) {
	valid := func() Config {
		return Config{Name: "b", Servers: clusterServers, FS: vfs.NewMem(), Dir: "raft", Streams: newNetwork().listen("b:1")}
	}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no file system", func(c *Config) { c.FS = nil }, "no file system"},
		{"no directory", func(c *Config) { c.Dir = "" }, "no file system or directory"},
		{"no streams", func(c *Config) { c.Streams = nil }, "no stream layer"},
		{"unknown name", func(c *Config) { c.Name = "x" }, `this server, "x", is not among`},
		{"no servers", func(c *Config) { c.Servers = nil }, "is not among"},
		{"nameless", func(c *Config) { c.Servers = []Server{{"", "b:1"}} }, "needs a name"},
		{"name twice", func(c *Config) { c.Servers = []Server{{"b", "b:1"}, {"b", "c:1"}} }, "b at c:1 is listed twice"},
		{"address twice", func(c *Config) { c.Servers = []Server{{"b", "b:1"}, {"c", "b:1"}} }, "c at b:1 is listed twice"},
		{"other address", func(c *Config) { c.Streams = newNetwork().listen("z:1") }, "server b is listed at b:1, but its stream layer is at z:1"},
		{"election shorter than heartbeat", func(c *Config) { c.HeartbeatTimeout, c.ElectionTimeout = time.Second, 100*time.Millisecond }, "ElectionTimeout"},
		{"lease longer than heartbeat", func(c *Config) { c.LeaderLease = time.Minute }, "LeaderLeaseTimeout"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			cfg := valid()
			tc.change(&cfg)
			_, err := Open(cfg, &ledger{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Open: %v, want an error with %q", err, tc.want)
			}
			if l, ok := cfg.Streams.(*memListener); ok {
				<-l.closed
			}
		})
	}
}

func TestServersAreFixed(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	fsys := vfs.NewMem()
	open := func(servers ...Server) error {
		r, err := Open(Config{Name: "a", Servers: servers, FS: fsys, Dir: "raft", Streams: newNetwork().listen(servers[0].Address)}, &ledger{})
		if err != nil {
			return err
		}
		return r.Close()
	}
	a, b, c := clusterServers[0], clusterServers[1], clusterServers[2]
	if err := open(a, b, c); err != nil {
		t.Fatal(err)
	}
	if err := open(a, c, b); err != nil {
		t.Errorf("another order: %v", err)
	}
	for _, tc := range []struct {
		servers []Server
		want    string
	}{
		{[]Server{a, b, {"d", "d:1"}}, "server d at d:1 is not one of those"},
		{[]Server{a, b}, "server c at c:1 belongs to those"},
		{[]Server{a, {"b", "b:2"}, c}, "server b is configured at b:2, but this store was made with it at b:1"},
		{[]Server{{"a", "a:2"}, b, c}, "server a is configured at a:2, but this store was made with it at a:1"},
	} {
		if err := open(tc.servers...); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "store in raft") {
			t.Errorf("open with %v: %v, want an error with %q", tc.servers, err, tc.want)
		}
	}
}

// A store whose founding was cut short, after the term and before the log entry, is
// founded again.
func TestFoundingCutShort(t *testing.T) {
	fsys := vfs.NewMem()
	s, err := openStore(fsys, "raft", slog.New(slog.DiscardHandler), func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 1); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	r, err := Open(Config{Name: "a", Servers: clusterServers[:1], FS: fsys, Dir: "raft", Streams: newNetwork().listen("a:1")}, &ledger{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got := r.raft.GetConfiguration().Configuration(); len(got.Servers) != 1 {
		t.Errorf("servers %v", got)
	}
}

func TestStateMachineRefusesSnapshot(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	fsys := vfs.NewMem()
	s, err := openStore(fsys, "raft", slog.New(slog.DiscardHandler), func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	k, _ := s.Create(raft.SnapshotVersionMax, 5, 1, Config{Servers: clusterServers}.servers(), 1, nil)
	if _, err := k.Write([]byte("no ledger")); err != nil {
		t.Fatal(err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	_, err = Open(Config{Name: "a", Servers: clusterServers, FS: fsys, Dir: "raft", Streams: newNetwork().listen("a:1")}, &ledger{})
	if err == nil || !strings.Contains(err.Error(), "restoring the newest snapshot: bad snapshot") {
		t.Errorf("Open: %v", err)
	}
}

// A disk that cannot be written is reported where the process can be ended, with
// what to do.
func TestFatal(t *testing.T) {
	const sync, write, create = "sync", "write", "create"
	kinds := map[string][]errorfs.OpKind{
		sync:   {errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo},
		write:  {errorfs.OpFileWrite, errorfs.OpFileWriteAt},
		create: {errorfs.OpCreate, errorfs.OpReuseForWrite},
	}
	for _, tc := range []struct {
		op, suffix string
		err        error
		want       string
	}{
		{sync, ".log", syscall.EIO, "check the disk, then start"},
		{write, ".log", syscall.ENOSPC, "the disk is full: free space, then start"},
		{create, ".log", syscall.ENOSPC, "the disk is full: free space, then start"},
		{sync, markName, syscall.EIO, "check the disk, then start"},
		{write, markName, syscall.ENOSPC, "the disk is full: free space, then start"},
	} {
		t.Run(tc.op+" "+tc.suffix, func(t *testing.T) {
			var broken atomic.Bool
			fsys := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
				if broken.Load() && strings.HasSuffix(op.Path, tc.suffix) && slices.Contains(kinds[tc.op], op.Kind) {
					return &os.PathError{Op: tc.op, Path: op.Path, Err: tc.err}
				}
				return nil
			}))
			failed := make(chan error)
			s, err := openStore(fsys, "raft", slog.New(slog.DiscardHandler), func(err error) {
				failed <- err
				select {} // It must not return.
			})
			if err != nil {
				t.Fatal(err)
			}
			broken.Store(true)
			size := 1
			if tc.op == create {
				size = 1 << 20 // Another log is begun after a few entries.
			}
			go func() {
				for i := uint64(1); ; i++ {
					s.StoreLog(entry(i, 1, strings.Repeat("x", size)))
				}
			}()
			if err := <-failed; !strings.Contains(err.Error(), tc.err.Error()) || !strings.Contains(err.Error(), "store in raft") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("fatal error: %v", err)
			}
		})
	}
}

func TestLogging(t *testing.T) {
	var out bytes.Buffer
	to := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	l := newRaftLogger(to)
	l.Trace("unseen")
	l.Debug("unseen")
	l.Named("part").With("id", 7).Info("entering state", "servers", hclog.Fmt("%+v of %d", []string{"a"}, 3))
	l.Warn("careful")
	l.Error("failed to take snapshot", "error", errors.New("full"))
	l.Error("failed to heartbeat to", "peer", "b")
	l.quiet.Store(true)
	l.Error("unseen")
	pebbleLogger{"raft", to, nil}.Infof("unseen")
	pebbleLogger{"raft", to, nil}.Errorf("background error: %v", "x")
	want := `level=INFO msg="entering state" id=7 servers="[a] of 3"
level=WARN msg=careful
level=WARN msg="failed to take snapshot" error=full
level=WARN msg="background error: x" dir=raft
`
	if out.String() != want {
		t.Errorf("logged\n%swant\n%s", out.String(), want)
	}
}

func TestTCPStreamLayer(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	l, err := NewTCPStreamLayer("127.0.0.1:0", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := NewTCPStreamLayer(l.Addr().String(), "", nil); err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("a busy port: %v", err)
	}
	if _, err := NewTCPStreamLayer("0.0.0.0:0", "", nil); err == nil || !strings.Contains(err.Error(), "give an address to advertise") {
		t.Errorf("an address that is none: %v", err)
	}
	if _, err := NewTCPStreamLayer("127.0.0.1:0", "host", nil); err == nil || !strings.Contains(err.Error(), "bad advertised address") {
		t.Errorf("an address without a port: %v", err)
	}
	named, err := NewTCPStreamLayer("127.0.0.1:0", "orch1.example:7000", nil)
	if err != nil || named.Addr().String() != "orch1.example:7000" || named.Addr().Network() != "tcp" {
		t.Fatalf("advertised %v, %v", named, err)
	}
	named.Close()
}

// Three servers on loopback and a real disk. Nothing is left of them afterwards.
func TestLoopback(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	var servers []Server
	layers := map[string]raft.StreamLayer{}
	for _, name := range []string{"a", "b", "c"} {
		l, err := NewTCPStreamLayer("127.0.0.1:0", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		layers[name] = l
		servers = append(servers, Server{name, l.Addr().String()})
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	led := make(chan *Raft, 1)
	rafts, machines := map[string]*Raft{}, map[string]*ledger{}
	for _, s := range servers {
		sm := &ledger{}
		r, err := Open(Config{Name: s.Name, Servers: servers, FS: vfs.Default, Dir: t.TempDir() + "/raft", Streams: layers[s.Name]}, sm)
		if err != nil {
			t.Fatal(err)
		}
		rafts[s.Name], machines[s.Name] = r, sm
		go func() {
			select {
			case <-r.LeaderChanges():
				led <- r
			case <-r.closed:
			}
		}()
	}
	lead := <-led
	for i := range 10 {
		if _, err := lead.Propose(ctx, []byte{'0' + byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(lead.Barrier(ctx), lead.VerifyLeader(ctx)); err != nil {
		t.Fatal(err)
	}
	name, _ := lead.Leader()
	if got := machines[name].all(); !slices.Equal(got, numbers(0, 9)) {
		t.Errorf("commands %v", got)
	}
	for _, r := range rafts {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}
