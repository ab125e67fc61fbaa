package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
	"go.uber.org/goleak"
)

// group is a set of processes on one network. It must be used in a bubble.
type group struct {
	t   *testing.T
	net *network
	all map[string]*Gossip
}

func newGroup(t *testing.T) *group {
	return &group{t: t, net: newNetwork(), all: map[string]*Gossip{}}
}

func at(i int) string { return fmt.Sprintf("10.0.0.%d:7946", i) }

func (g *group) start(name, addr string, change func(*Config), seeds ...string) *Gossip {
	g.t.Helper()
	cfg := Config{Name: name, Cluster: "c1", Transport: g.net.listen(addr), Seeds: func() []string { return seeds }}
	if change != nil {
		change(&cfg)
	}
	p, err := Start(cfg)
	if err != nil {
		g.t.Fatal(err)
	}
	g.all[name] = p
	return p
}

// kill ends a process without a word to the others.
func (g *group) kill(name string) {
	g.t.Helper()
	if err := g.all[name].Close(); err != nil {
		g.t.Error(err)
	}
	delete(g.all, name)
}

// stop ends all processes and lets what is left of them run out.
func (g *group) stop() {
	for name := range g.all {
		g.kill(name)
	}
	time.Sleep(time.Minute)
}

func alive(p *Gossip) []string {
	var out []string
	for _, m := range p.Members() {
		if m.Alive {
			out = append(out, m.Name)
		}
	}
	return out
}

// waitAlive waits until the named processes see each other, and nobody else, alive.
// It returns how long that took.
func (g *group) waitAlive(within time.Duration, names ...string) time.Duration {
	g.t.Helper()
	began := time.Now()
	slices.Sort(names)
	for {
		wrong := ""
		for _, name := range names {
			if got := alive(g.all[name]); !slices.Equal(got, names) {
				wrong = fmt.Sprintf("%s sees %v alive, want %v", name, got, names)
			}
		}
		took := time.Since(began)
		if wrong == "" {
			return took
		}
		if took > within {
			g.t.Fatalf("after %v %s", took, wrong)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestMembersComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		for i := 1; i <= 5; i++ {
			g.start(fmt.Sprint("n", i), at(i), func(c *Config) { c.Meta = Meta{Incarnation: uint64(i)} }, at(1), at(2))
		}
		all := []string{"n1", "n2", "n3", "n4", "n5"}
		t.Logf("all met within %v", g.waitAlive(time.Minute, all...))
		for i, m := range g.all["n3"].Members() {
			if m.Name != all[i] || m.Address != at(i+1) || m.Meta != (Meta{Incarnation: uint64(i + 1)}) || !m.Alive {
				t.Errorf("member %+v", m)
			}
		}
		if alive, known := g.all["n3"].Alive("n9"); alive || known {
			t.Error("a stranger is known")
		}

		// What a member says of itself reaches the others; the last word counts.
		for e := range uint64(50) {
			g.all["n2"].SetMeta(Meta{2, e, byte(e)})
		}
		began := time.Now()
		for name, p := range g.all {
			for m := p.Members()[1]; m.Meta != (Meta{2, 49, 49}); m = p.Members()[1] {
				if time.Since(began) > time.Minute {
					t.Fatalf("%s has %+v", name, m)
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		t.Logf("metadata spread within %v", time.Since(began))

		// A death is noticed, and told of.
		changed := g.all["n1"].Changed()
		time.Sleep(time.Second)
		select {
		case <-changed:
		default:
		}
		g.kill("n5")
		died := time.Now()
		<-changed
		if alive, known := g.all["n1"].Alive("n5"); alive || !known {
			t.Errorf("n5 is alive: %v, known: %v", alive, known)
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3", "n4")
		t.Logf("the death was noticed after %v", time.Since(died))
		if m := g.all["n1"].Members()[4]; m.Name != "n5" || m.Alive || time.Since(m.Since) > 30*time.Second {
			t.Errorf("the dead member is %+v", m)
		}

		// It comes back, at the same address and at another.
		g.start("n5", at(5), nil, at(1))
		g.waitAlive(time.Minute, all...)
		g.kill("n5")
		g.waitAlive(time.Minute, "n1", "n2", "n3", "n4")
		g.start("n5", at(6), nil, at(1))
		t.Logf("a member that moved was seen within %v", g.waitAlive(time.Minute, all...))
		if m := g.all["n1"].Members()[4]; m.Address != at(6) {
			t.Errorf("the member that moved is %+v", m)
		}
	})
}

// A member that is started anew before its death was noticed, at another address, is
// taken for an impostor until then.
// Who says again what he has said already sends nothing for it.
func TestUnchangedMetaIsNotSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		for i := 1; i <= 3; i++ {
			g.start(fmt.Sprint("n", i), at(i), func(c *Config) { c.Meta = Meta{Incarnation: uint64(i)} }, at(1))
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3")
		time.Sleep(10 * time.Second) // the news of the beginning are told
		before := g.net.packets()
		const seconds = 30
		for range seconds {
			g.all["n1"].SetMeta(Meta{Incarnation: 1})
			time.Sleep(time.Second)
		}
		// A question and an answer of each member every second are the probes.
		if n := g.net.packets() - before; n > 3*2*(seconds+1) {
			t.Errorf("%d packets were sent in %d s", n, seconds)
		}
	})
}

func TestQuickRestartElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		for i := 1; i <= 3; i++ {
			g.start(fmt.Sprint("n", i), at(i), nil, at(1), at(2))
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3")
		g.kill("n3")
		began := time.Now()
		g.start("n3", at(4), nil, at(1), at(2))
		for g.all["n1"].Members()[2].Address != at(4) {
			if time.Since(began) > time.Minute {
				t.Fatalf("members %v", g.all["n1"].Members())
			}
			time.Sleep(10 * time.Millisecond)
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3")
		t.Logf("seen within %v", time.Since(began))
	})
}

// A process whose address changes while it runs is known under the new one, and knows the
// others, also when somebody else has the old one by then.
func TestAddressChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		for i := 1; i <= 4; i++ {
			g.start(fmt.Sprint("n", i), at(i), nil, at(1), at(2))
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3", "n4")
		g.all["n3"].SetMeta(Meta{3, 7, 0})
		g.net.move(at(3), at(9))
		g.start("n5", at(3), nil, at(1), at(2))
		began := time.Now()
		known := func(by string) bool {
			m, ok := g.all[by].Member("n3")
			return ok && m.Alive && m.Address == at(9) && m.Meta == Meta{3, 7, 0}
		}
		for !known("n1") || !known("n2") || !known("n4") || !known("n5") {
			if time.Since(began) > time.Minute {
				t.Fatalf("members %v", g.all["n1"].Members())
			}
			time.Sleep(10 * time.Millisecond)
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3", "n4", "n5")
		t.Logf("seen within %v", time.Since(began))
		// And it stays so: nothing of before comes up again.
		for range 600 {
			time.Sleep(100 * time.Millisecond)
			g.waitAlive(0, "n1", "n2", "n3", "n4", "n5")
		}
		if err := g.all["n3"].Leave(5 * time.Second); err != nil {
			t.Error(err)
		}
		g.kill("n3")
		g.waitAlive(2*time.Second, "n1", "n2", "n4", "n5")
	})
}

func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		for i := 1; i <= 3; i++ {
			g.start(fmt.Sprint("n", i), at(i), nil, at(1), at(2))
		}
		g.waitAlive(time.Minute, "n1", "n2", "n3")
		p := g.all["n3"]
		if err := errors.Join(p.Leave(5*time.Second), p.Leave(5*time.Second)); err != nil {
			t.Error(err)
		}
		g.waitAlive(2*time.Second, "n1", "n2")
		if alive, known := p.Alive("n3"); alive || !known {
			t.Errorf("who left sees itself alive: %v, known: %v", alive, known)
		}
		g.kill("n3")
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if err := p.Leave(time.Second); err != ErrClosed {
			t.Errorf("Leave after Close: %v", err)
		}
		p.SetMeta(Meta{})
		g.start("n3", at(3), nil, at(1))
		g.waitAlive(time.Minute, "n1", "n2", "n3")
	})
}

func TestClustersDoNotMerge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		every := []string{at(1), at(2), at(3), at(4)}
		other := func(c *Config) { c.Cluster = "c2" }
		g.start("n1", at(1), nil, every...)
		g.start("n2", at(2), nil, every...)
		g.start("m1", at(3), other, every...)
		g.start("m2", at(4), other, every...)
		time.Sleep(5 * time.Minute)
		g.waitAlive(0, "n1", "n2")
		g.waitAlive(0, "m1", "m2")
		for name, p := range g.all {
			if got := p.Members(); len(got) != 2 {
				t.Errorf("%s knows %v", name, got)
			}
		}
	})
}

func TestSecretKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		key := func(b string) func(*Config) {
			return func(c *Config) { c.SecretKey = bytes.Repeat([]byte(b), 32) }
		}
		g.start("n1", at(1), key("a"), at(2), at(3))
		g.start("n2", at(2), key("a"), at(1))
		g.start("n3", at(3), key("b"), at(1))
		g.start("n4", at(4), nil, at(1))
		time.Sleep(time.Minute)
		g.waitAlive(0, "n1", "n2")
		g.waitAlive(0, "n3")
		g.waitAlive(0, "n4")
	})
}

// lockedBuffer may be read while it is written to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A process that was started before its seeds finds them, without hurry in its log.
func TestLateSeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		var out lockedBuffer
		g.start("n1", at(1), func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&out, nil)) }, at(1), at(2), "nonsense")
		time.Sleep(10 * time.Minute)
		if n := strings.Count(out.String(), "no seed answers"); n != 1 {
			t.Errorf("%d warnings, want 1:\n%s", n, out.String())
		}
		g.start("n2", at(2), nil)
		t.Logf("found within %v", g.waitAlive(time.Minute, "n1", "n2"))
	})
}

// Two sides that were cut off until they forgot each other find each other again.
func TestPartitionHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		all := []string{"n1", "n2", "n3", "n4", "n5"}
		for i := range all {
			g.start(all[i], at(i+1), nil, at(1), at(2), at(3), at(4), at(5))
		}
		g.waitAlive(time.Minute, all...)
		g.net.split(1, at(4), at(5))
		g.waitAlive(time.Minute, "n1", "n2", "n3")
		g.waitAlive(time.Minute, "n4", "n5")
		time.Sleep(30 * time.Minute)
		g.net.split(0, at(4), at(5))
		t.Logf("healed within %v", g.waitAlive(time.Minute, all...))
	})
}

func TestDeadAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		defer g.stop()
		g.start("n1", at(1), nil)
		g.start("n2", at(2), nil, at(1))
		g.waitAlive(time.Minute, "n1", "n2")
		g.kill("n2")
		time.Sleep(50 * time.Minute)
		p := g.all["n1"]
		if alive, known := p.Alive("n2"); alive || !known || len(p.Members()) != 2 {
			t.Errorf("after 50 min n2 is alive: %v, known: %v, in %v", alive, known, p.Members())
		}
		time.Sleep(15 * time.Minute)
		if alive, known := p.Alive("n2"); alive || known || len(p.Members()) != 1 {
			t.Errorf("after 65 min n2 is alive: %v, known: %v, in %v", alive, known, p.Members())
		}
	})
}

func TestDeadAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := newTable(Meta{})
		run := tab.anew()
		for i := range maxDead + 100 {
			run.NotifyLeave(&memberlist.Node{Name: fmt.Sprint(i), Addr: net.IPv4(10, 0, 0, 1)})
			time.Sleep(time.Millisecond)
		}
		if n := len(tab.list()); n != maxDead {
			t.Errorf("%d dead members are kept, want %d", n, maxDead)
		}
		if _, known := tab.get("99"); known {
			t.Error("the oldest were kept")
		}
		if _, known := tab.get("100"); !known {
			t.Error("the newest were dropped")
		}
	})
}

// Metadata of a later release does no harm.
func TestUnreadableMeta(t *testing.T) {
	tab := newTable(Meta{})
	tab.anew().NotifyJoin(&memberlist.Node{Name: "n1", Addr: net.IPv4(10, 0, 0, 1), Port: 7, Meta: []byte{99, 1, 2, 3}})
	if m, known := tab.get("n1"); !known || !m.Alive || m.Meta != (Meta{}) || m.Address != "10.0.0.1:7" {
		t.Errorf("member %+v, %v", m, known)
	}
}

func TestConfigIsChecked(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	port := busy.Addr().(*net.TCPAddr).Port
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   []string
	}{
		{"no name", func(c *Config) { c.Name = "" }, []string{"name"}},
		{"long name", func(c *Config) { c.Name = strings.Repeat("x", 129) }, []string{"129 bytes"}},
		{"no cluster", func(c *Config) { c.Cluster = "" }, []string{"cluster"}},
		{"long cluster", func(c *Config) { c.Cluster = strings.Repeat("x", 256) }, []string{"256 bytes"}},
		{"short key", func(c *Config) { c.SecretKey = []byte("x") }, []string{"secret key has 1 bytes"}},
		{"slow probe", func(c *Config) { c.ProbeTimeout = time.Second }, []string{"probe timeout 1s must be less"}},
		{"negative", func(c *Config) { c.GossipInterval = -1 }, []string{"negative"}},
		{"no port", func(c *Config) { c.Bind = "127.0.0.1" }, []string{"bad address to listen on", "missing port"}},
		{"everywhere", func(c *Config) { c.Bind = ":0" }, []string{"give an address to advertise"}},
		{"bad advertise", func(c *Config) { c.Advertise = "x" }, []string{"bad address to advertise"}},
		{"unreachable advertise", func(c *Config) { c.Advertise = "0.0.0.0:1" }, []string{"others cannot reach 0.0.0.0:1"}},
		{"busy port", func(c *Config) { c.Bind = busy.Addr().String() }, []string{fmt.Sprintf("port %d of 127.0.0.1 is in use", port), "choose another"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			cfg := Config{Name: "n1", Cluster: "c1", Bind: "127.0.0.1:0"}
			tc.change(&cfg)
			_, err := Start(cfg)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("Start: %v, want an error with %q", err, want)
				}
			}
		})
	}
}

func TestFailedStartShutsTransportDown(t *testing.T) {
	h := newNetwork().listen(at(1))
	if _, err := Start(Config{Cluster: "c1", Transport: h}); err == nil {
		t.Fatal("a process without a name was started")
	}
	<-h.down
}

func TestLogging(t *testing.T) {
	var out bytes.Buffer
	to := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	l := log.New(logWriter{to}, "", 0)
	l.Printf("[DEBUG] memberlist: Stream connection from=%s", "x")
	l.Printf("[INFO] memberlist: Marking n1 as failed")
	l.Printf("[WARN] memberlist: Refuting")
	l.Printf("[ERR] memberlist: Failed to send ping")
	l.Printf("[ERROR] memberlist: Failed to compress")
	l.Printf("odd one")
	want := `level=DEBUG msg="Stream connection from=x"
level=INFO msg="Marking n1 as failed"
level=WARN msg=Refuting
level=WARN msg="Failed to send ping"
level=WARN msg="Failed to compress"
level=INFO msg="odd one"
`
	if out.String() != want {
		t.Errorf("logged\n%swant\n%s", out.String(), want)
	}
}

// Two processes on loopback; one finds the other by name. Nothing is left of them
// afterwards.
func TestLoopback(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	a, err := Start(Config{Name: "a", Cluster: "c1", Bind: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(a.Members()[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Start(Config{Name: "b", Cluster: "c1", Bind: "0.0.0.0:0", Advertise: "127.0.0.1:0", Seeds: func() []string { return []string{"localhost:" + port} }})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(30 * time.Second)
	for _, p := range []*Gossip{a, b} {
		for len(alive(p)) < 2 {
			select {
			case <-p.Changed():
			case <-deadline:
				t.Fatalf("members %v and %v", a.Members(), b.Members())
			}
		}
	}
	if err := b.Leave(10 * time.Second); err != nil {
		t.Error(err)
	}
	for len(alive(a)) > 1 {
		select {
		case <-a.Changed():
		case <-deadline:
			t.Fatalf("members %v", a.Members())
		}
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Error(err)
	}
}
