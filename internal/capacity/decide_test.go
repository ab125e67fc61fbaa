package capacity_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/capacity"
)

// group is a cluster whose nodes a test sets, observed every ten seconds.
type group struct {
	t     rapid.TB
	rules capacity.Rules
	state capacity.State
	obs   capacity.Observation
}

// newGroup returns a calm group of nodes in three zones at this CPU.
func newGroup(t rapid.TB, n int, cpu float64) *group {
	g := &group{t: t, rules: capacity.Default(), obs: capacity.Observation{AtMillis: 1e12, Whole: true, LargestN: 3}}
	g.add(n, cpu)
	return g
}

func (g *group) add(n int, cpu float64) {
	for range n {
		id := uint64(len(g.obs.Nodes) + 1)
		g.obs.Nodes = append(g.obs.Nodes, capacity.Node{Incarnation: id, Zone: string(rune('a' + (id-1)%3)), Member: true, Known: true, CPU: cpu, DiskUsed: 10, DiskTotal: 100})
	}
}

func (g *group) cpu(loads ...float64) *group {
	for i, load := range loads {
		g.obs.Nodes[i].CPU = load
	}
	return g
}

// decide returns the decision of the next observation.
func (g *group) decide() (d capacity.Decision) {
	g.obs.AtMillis += 10_000
	g.state, d = capacity.Decide(g.rules, g.state, g.obs)
	return d
}

// until returns the first decision to do something, or the last one, with the time that passed.
func (g *group) until(limit time.Duration) (capacity.Decision, time.Duration) {
	from := g.obs.AtMillis
	for {
		d := g.decide()
		if past := time.Duration(g.obs.AtMillis-from) * time.Millisecond; d.Action != capacity.None || past >= limit {
			return d, past
		}
	}
}

// none fails when something is decided within a time, and returns the last decision.
func (g *group) none(limit time.Duration) capacity.Decision {
	g.t.Helper()
	d, past := g.until(limit)
	if d.Action != capacity.None {
		g.t.Fatalf("%v of %d after %v: %s", d.Action, d.Count, past, d.Why)
	}
	return d
}

func (g *group) expect(action capacity.Action, count int, limit time.Duration) capacity.Decision {
	g.t.Helper()
	d, past := g.until(limit)
	if d.Action != action || d.Count != count {
		g.t.Fatalf("%v of %d after %v, want %v of %d: %s %q", d.Action, d.Count, past, action, count, d.Why, d.Waits)
	}
	return d
}

func TestDecideByLoad(t *testing.T) {
	for _, tc := range []struct {
		name   string
		nodes  int
		cpu    float64
		change func(*group)
		action capacity.Action
		count  int
		why    string
	}{
		{name: "at its target", nodes: 3, cpu: 0.7, why: "3 nodes carry the load: cpu 70% (target 70%)"},
		{name: "above", nodes: 3, cpu: 0.88, action: capacity.Up, count: 1,
			why: "cpu 88% of 3 nodes (most loaded 88%) is above the target of 70%: 4 nodes would carry it"},
		{name: "far above", nodes: 6, cpu: 1, action: capacity.Up, count: 3, why: "9 nodes would carry it"},
		{name: "as many again at most", nodes: 3, cpu: 0.9, action: capacity.Up, count: 3, change: func(g *group) { g.rules.TargetCPU = 0.1 }, why: "27 nodes would carry it"},
		{name: "up to the most", nodes: 11, cpu: 1, action: capacity.Up, count: 1},
		{name: "at the most", nodes: 12, cpu: 1, why: "18 nodes would carry it"},
		{name: "one hot node", nodes: 3, cpu: 0.58, action: capacity.Up, count: 1, change: func(g *group) { g.cpu(0.9) },
			why: "cpu 90% of node #1 is above the 85% that one node may have (mean 68.7%, target 70%): 4 nodes might relieve it"},
		{name: "a hot spot", nodes: 6, cpu: 0.2, change: func(g *group) { g.cpu(1) }, why: "that node #1 has 100% is a hot spot, which more nodes would not relieve"},
		{name: "enough with one less", nodes: 6, cpu: 0.45, action: capacity.Down, count: 1, why: "5 nodes would carry it with 15% to spare"},
		{name: "with one less above the margin", nodes: 4, cpu: 0.46, why: "with one node less the cpu could be 61.3%, and would have to stay at 59.5%"},
		{name: "a quarter at a time", nodes: 12, cpu: 0.1, action: capacity.Down, count: 3, why: "3 nodes would carry it with 15% to spare; a quarter leave at a time"},
		{name: "down to the least", nodes: 4, cpu: 0, action: capacity.Down, count: 1},
		{name: "at the least", nodes: 3, cpu: 0},
		{name: "N is the least", nodes: 5, cpu: 0, change: func(g *group) { g.obs.LargestN = 5 }},
		{name: "disk", nodes: 4, cpu: 0.1, action: capacity.Up, count: 1, change: func(g *group) {
			g.rules.TargetDisk = 0.7
			for i := range g.obs.Nodes {
				g.obs.Nodes[i].DiskUsed = 80
			}
		}, why: "disk 80% of 4 nodes (fullest 80%) is above the target of 70%: 5 nodes would carry it"},
		{name: "what remains would not fit the disks", nodes: 4, cpu: 0.1, change: func(g *group) { g.obs.Nodes[2].DiskUsed = 65 }},
		{name: "operations", nodes: 4, cpu: 0.1, action: capacity.Up, count: 2, change: func(g *group) {
			g.rules.TargetOperations = 20000
			for i := range g.obs.Nodes {
				g.obs.Nodes[i].Operations = 26000
			}
		}, why: "operations 26,000/s of 4 nodes (most loaded 26,000/s) is above the target of 20,000/s: 6 nodes would carry it"},
		{name: "cpu without a target", nodes: 4, cpu: 0.7, change: func(g *group) { g.rules.TargetCPU, g.rules.TargetOperations = 0, 1000 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGroup(t, tc.nodes, tc.cpu)
			if tc.change != nil {
				tc.change(g)
			}
			d, _ := g.until(time.Hour)
			if d.Action != tc.action || d.Count != tc.count || !strings.Contains(d.Why, tc.why) {
				t.Errorf("%v of %d: %s; want %v of %d: %s", d.Action, d.Count, d.Why, tc.action, tc.count, tc.why)
			}
		})
	}
}

// A node that is unknown has the mean of the others where that means more nodes, and
// keeps all of them otherwise.
func TestDecideUnknown(t *testing.T) {
	g := newGroup(t, 5, 0.9)
	g.obs.Nodes[0].Known = false
	g.expect(capacity.Up, 2, 3*time.Minute)

	for name, unknown := range map[string]func(*capacity.Node){
		"unhealthy":     func(n *capacity.Node) { n.Known = false },
		"not a number":  func(n *capacity.Node) { n.CPU = math.NaN() },
		"negative":      func(n *capacity.Node) { n.CPU = -1 },
		"without disks": func(n *capacity.Node) { n.DiskTotal = 0 },
	} {
		g := newGroup(t, 6, 0.1)
		unknown(&g.obs.Nodes[5])
		if d := g.none(time.Hour); !slices.Contains(d.Waits, "the load of 1 node is unknown") {
			t.Errorf("%s: %q", name, d.Waits)
		}
		g.obs.Nodes[5] = g.obs.Nodes[4]
		g.obs.Nodes[5].Incarnation = 6
		g.expect(capacity.Down, 1, 16*time.Minute)
	}

	g = newGroup(t, 6, 1)
	for i := range 3 {
		g.obs.Nodes[i].Known = false
	}
	if d := g.none(time.Hour); !slices.Contains(d.Waits, "the load of 3 of 6 nodes is unknown") {
		t.Errorf("%q", d.Waits)
	}
	for i := range 3 {
		g.obs.Nodes[i+3].Known = false
	}
	if d := g.none(time.Hour); d.Why != "6 nodes, whose load is unknown" {
		t.Errorf("%q", d.Why)
	}
}

// What is waited for, and that nothing is decided while it lasts.
func TestDecideWaits(t *testing.T) {
	for _, tc := range []struct {
		name     string
		change   func(*group)
		up, down string
	}{
		{"frozen", func(g *group) { g.obs.Frozen = true }, "frozen: too many nodes", "frozen: too many nodes"},
		{"moving", func(g *group) { g.obs.Moving = true }, "slots are moving", "slots are moving"},
		{"launching", func(g *group) { g.obs.Launching = []string{"a", "b"} }, "2 nodes are being launched", "2 nodes are being launched"},
		{"a spare", func(g *group) { g.obs.Nodes[1].Member = false }, "1 node has not joined the ring yet", "1 node has not joined the ring yet"},
		{"leaving", func(g *group) { g.obs.Nodes[1].Leaving = true }, "1 node is leaving", "1 node is leaving"},
		{"not whole", func(g *group) { g.obs.Whole = false }, "", "a vnode is not whole"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, load := range []struct {
				cpu    float64
				wait   string
				action capacity.Action
			}{{0.95, tc.up, capacity.Up}, {0.1, tc.down, capacity.Down}} {
				g := newGroup(t, 6, load.cpu)
				if load.wait != "" {
					tc.change(g)
					d := g.none(2 * time.Hour)
					if !slices.ContainsFunc(d.Waits, func(w string) bool { return strings.HasPrefix(w, load.wait) }) {
						t.Errorf("waits for %q, want %q", d.Waits, load.wait)
					}
				}
				calm := newGroup(t, 6, load.cpu)
				calm.state, calm.obs.AtMillis = g.state, g.obs.AtMillis
				if d, past := calm.until(time.Hour); d.Action != load.action || past <= time.Minute {
					t.Errorf("after that %v after %v, want %v: %q", d.Action, past, load.action, d.Waits)
				}
			}
		})
	}
}

func TestDecideTakesTime(t *testing.T) {
	g := newGroup(t, 3, 0.5)
	g.none(time.Hour)
	g.cpu(1, 1, 1)
	g.none(50 * time.Second)
	g.cpu(0.5, 0.5, 0.5) // a peak
	g.none(10 * time.Second)
	g.cpu(1, 1, 1)
	g.none(60 * time.Second)
	g.expect(capacity.Up, 2, 10*time.Second)
	// They have joined. Load is measured anew, has to stay so, and the cooldown to pass.
	g.add(2, 1)
	if d := g.none(50 * time.Second); !slices.Contains(d.Waits, "load is measured for another 20 s, for something has changed") || !slices.Contains(d.Waits, "scale_up_cooldown: 250 s left") {
		t.Errorf("%q", d.Waits)
	}
	g.none(240 * time.Second)
	g.expect(capacity.Up, 3, 10*time.Second)
	// Load falls: the margin has to last for 15 minutes, and what was enough lately stays.
	g.add(3, 0)
	g.cpu(0, 0, 0, 0, 0)
	g.none(9 * time.Minute)
	g.cpu(0.9, 0.9, 0.9, 0.9, 0.9) // 6 are enough, or 8 of these
	g.none(10 * time.Second)
	g.cpu(0, 0, 0, 0, 0)
	g.none(15*time.Minute - 10*time.Second)
	g.expect(capacity.Down, 2, 20*time.Second)
	g.obs.Nodes = g.obs.Nodes[:6]
	// What comes back does not wait for the cooldown of that.
	g.cpu(1, 1, 1, 1, 1, 1)
	g.expect(capacity.Up, 3, 130*time.Second)
}

// Of what was enough, the most of the last half of the time count, not those of its beginning.
func TestDecideForgetsTheBeginning(t *testing.T) {
	g := newGroup(t, 8, 0.7)
	g.none(time.Hour)
	for _, load := range []float64{0.5, 0.2} { // on the way down
		g.cpu(load, load, load, load, load, load, load, load)
		g.none(20 * time.Second)
	}
	g.expect(capacity.Down, 2, 15*time.Minute)

	g = newGroup(t, 8, 0.2)
	g.none(10 * time.Minute)
	g.cpu(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
	g.none(20 * time.Second)
	g.cpu(0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2)
	if d := g.expect(capacity.Down, 1, 10*time.Minute); !strings.Contains(d.Why, "3 nodes would carry it with 15% to spare, and 7 nodes what there was lately") {
		t.Error(d.Why)
	}
}

// What is below the least is launched at once and whatever is going on, once.
func TestDecideReplacesWhatIsLost(t *testing.T) {
	g := newGroup(t, 3, 0.9)
	g.rules.MinCapacity = 3
	g.state = capacity.State{LastUpMillis: g.obs.AtMillis, LastDownMillis: g.obs.AtMillis}
	g.obs.Frozen, g.obs.Moving, g.obs.Whole = true, true, false
	g.obs.Nodes[1].Leaving, g.obs.Nodes[1].Known = true, false
	d := g.expect(capacity.Up, 1, 10*time.Second)
	if !cmp.Equal(d.Zones, []string{"b"}) || d.Why != "2 nodes are there, fewer than min_capacity, which is 3" {
		t.Errorf("%q: %s", d.Zones, d.Why)
	}
	g.obs.Launching = d.Zones
	g.none(time.Hour)

	g = newGroup(t, 0, 0) // none at all
	if d := g.expect(capacity.Up, 3, 10*time.Second); len(d.Zones) != 3 {
		t.Errorf("%q", d.Zones)
	}
}

// Above the most, nodes leave although load is high, unless their data would not fit; spares go
// first and zones stay even.
func TestDecideAboveTheMost(t *testing.T) {
	g := newGroup(t, 15, 0.9)
	g.obs.Nodes[13].Member = false
	g.state.LastUpMillis = g.obs.AtMillis
	if d := g.none(290 * time.Second); !slices.Contains(d.Waits, "scale_down_cooldown: 10 s left") {
		t.Errorf("%q", d.Waits)
	}
	d := g.expect(capacity.Down, 3, 10*time.Second)
	zones := map[uint64]int{}
	for _, id := range d.Leave {
		zones[id%3]++
	}
	if len(zones) != 3 || !slices.Contains(d.Leave, 14) || !slices.Contains(d.Leave, 15) || !slices.Contains(d.Leave, 13) {
		t.Errorf("%v leave", d.Leave)
	}

	g = newGroup(t, 16, 0.9)
	g.obs.Nodes[4].DiskUsed = 70
	if d := g.none(time.Hour); !slices.Contains(d.Waits, "the disk of node #5 is 70% full and could be 93.3% full then") {
		t.Errorf("%q", d.Waits)
	}
	g.obs.Nodes[4].DiskUsed = 10
	g.expect(capacity.Down, 4, 10*time.Second)
	g.obs.Nodes[4].Known = false
	g.obs.AtMillis += 3_600_000
	g.none(time.Hour)
}

// A hot spot that stays, however many nodes there are, takes a quarter more nodes than the mean
// does, and not the most.
func TestDecideHotSpot(t *testing.T) {
	g := newGroup(t, 4, 0.62)
	for range 20 {
		n := float64(len(g.obs.Nodes))
		for i := range g.obs.Nodes {
			g.obs.Nodes[i].CPU = (4*0.62 - 0.95) / (n - 1)
		}
		g.obs.Nodes[0].CPU = 0.95
		d, _ := g.until(time.Hour)
		if d.Action == capacity.Down {
			t.Fatal(d.Why)
		}
		g.add(d.Count, 0)
	}
	if n := len(g.obs.Nodes); n != 5 {
		t.Errorf("%d nodes, want 5", n)
	}
}

// Clocks of leaders differ: what is waited for lasts no longer than it would have.
func TestDecideClockGoesBack(t *testing.T) {
	g := newGroup(t, 3, 0.9)
	g.expect(capacity.Up, 1, 3*time.Minute)
	g.add(1, 0.9)
	g.obs.AtMillis -= 10 * 24 * 3600 * 1000
	g.expect(capacity.Up, 2, 310*time.Second)
}

// Nobody looked for an hour: what was wanted before is not taken to have been since.
func TestDecideAfterAGap(t *testing.T) {
	g := newGroup(t, 3, 0.9)
	g.none(2 * time.Minute)
	g.obs.AtMillis += 3_600_000
	g.none(2 * time.Minute)
	g.expect(capacity.Up, 1, 20*time.Second)
}

func TestDecideTimeToFull(t *testing.T) {
	const gib = 1 << 30
	for _, tc := range []struct {
		name     string
		used     uint64 // GiB of 1000 at the start
		growth   uint64 // MiB/s of a node
		fill     float64
		action   capacity.Action
		contains string
	}{
		// Filling a new node takes 375 GiB at 100 MiB/s, an hour.
		{"in time", 500, 1, 100 << 20, capacity.None, "disks full in"},
		{"too late", 500, 90, 100 << 20, capacity.Up, "and to have new nodes take their share in good time needs 2."},
		{"too late as it is slow", 500, 1, 1 << 20, capacity.Up, "and to have new nodes take their share in good time needs 8"},
		{"it shrinks", 500, 0, 1 << 20, capacity.None, "disk 50% (target 90%)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGroup(t, 3, 0.5)
			g.rules.TargetDisk, g.obs.FillBytesPerSecond = 0.9, tc.fill
			for i := range g.obs.Nodes {
				g.obs.Nodes[i].DiskUsed, g.obs.Nodes[i].DiskTotal = tc.used*gib, 1000*gib
			}
			var d capacity.Decision
			for range 6 * 60 {
				for i := range g.obs.Nodes {
					g.obs.Nodes[i].DiskUsed += tc.growth * 10 << 20
				}
				if d = g.decide(); d.Action != capacity.None {
					break
				}
			}
			if d.Action != tc.action || !strings.Contains(d.Why, tc.contains) {
				t.Errorf("%v: %s, want %v: %s", d.Action, d.Why, tc.action, tc.contains)
			}
		})
	}
}

// For any observations in a row: what holds of every decision, that it is the same again, and that
// a State survives being written down.
func TestDecideProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := &group{t: t, rules: drawRules(t), obs: capacity.Observation{AtMillis: 1e12, LargestN: rapid.IntRange(1, 5).Draw(t, "N")}}
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "nodes"), 0))
		var lastUp, lastAny int64
		loads := []float64{0, 0.1, 0.5, 0.8, 1, 1.2}
		rarely := func() bool { return r.IntN(20) == 0 }
		for range rapid.IntRange(1, 12).Draw(t, "stretches") {
			g.obs.Nodes = nil
			g.add(r.IntN(g.rules.MaxCapacity+4), loads[r.IntN(len(loads))])
			g.obs.Frozen, g.obs.Moving, g.obs.Whole = rarely(), rarely(), !rarely()
			g.obs.Launching = make([]string, max(0, r.IntN(10)-7))
			for j := range g.obs.Nodes {
				n := &g.obs.Nodes[j]
				switch r.IntN(100) {
				case 0:
					n.Known = false
				case 1:
					n.Member = false
				case 2:
					n.Leaving = true
				case 3:
					n.CPU = loads[r.IntN(len(loads))]
				}
			}
			pause := int64(1000 * rapid.SampledFrom([]int{5, 10, 45}).Draw(t, "pause"))
			for range rapid.IntRange(1, 100).Draw(t, "times") {
				g.obs.AtMillis += pause
				before := g.state
				next, d := capacity.Decide(g.rules, before, g.obs)
				if again, d2 := capacity.Decide(g.rules, before, g.obs); next != again || !cmp.Equal(d, d2) {
					t.Fatalf("decided %v, and then %v", d, d2)
				}
				g.state = next
				checkDecision(t, g, d)
				if d.Action == capacity.None {
					continue
				}
				replaced := d.Desired == g.rules.MinCapacity && d.Action == capacity.Up
				if d.Action == capacity.Up && !replaced && lastUp != 0 && g.obs.AtMillis-lastUp < g.rules.ScaleUpCooldown.Milliseconds() ||
					d.Action == capacity.Down && lastAny != 0 && g.obs.AtMillis-lastAny < g.rules.ScaleDownCooldown.Milliseconds() {
					t.Fatalf("%v before the cooldown is over", d.Action)
				}
				lastAny = g.obs.AtMillis
				if d.Action == capacity.Up {
					lastUp = lastAny
				}
			}
		}
	})
}

func drawRules(t *rapid.T) capacity.Rules {
	r := capacity.Rules{MinCapacity: rapid.IntRange(1, 8).Draw(t, "min")}
	r.MaxCapacity = r.MinCapacity + rapid.IntRange(0, 20).Draw(t, "more")
	r.TargetCPU = rapid.Float64Range(0.1, 0.95).Draw(t, "target")
	r.ScaleUpCooldown = time.Duration(rapid.IntRange(1, 900).Draw(t, "up")) * time.Second
	r.ScaleDownCooldown = time.Duration(rapid.IntRange(1, 900).Draw(t, "down")) * time.Second
	return r
}

func checkDecision(t rapid.TB, g *group, d capacity.Decision) {
	stay, busy, unknown := len(g.obs.Launching), g.obs.Moving || len(g.obs.Launching) > 0, false
	leaves := map[uint64]bool{}
	for _, n := range g.obs.Nodes {
		if !n.Leaving {
			stay++
			leaves[n.Incarnation] = true
		}
		busy = busy || n.Leaving
		unknown = unknown || !n.Known
	}
	switch {
	case d.Why == "" || d.Action != capacity.None && len(d.Waits) > 0:
		t.Fatalf("%v because %q, waiting for %q", d.Action, d.Why, d.Waits)
	case d.Action == capacity.None && (d.Count != 0 || d.Desired != stay):
		t.Fatalf("nothing, and %d of %d", d.Count, d.Desired)
	case d.Action == capacity.None && stay < g.rules.MinCapacity:
		t.Fatalf("%d nodes, and nothing is done", stay)
	case d.Action == capacity.Up:
		if d.Desired != stay+d.Count || d.Count < 1 || len(d.Zones) != d.Count || d.Desired > g.rules.MaxCapacity {
			t.Fatalf("%d more than %d to have %d in %q", d.Count, stay, d.Desired, d.Zones)
		}
		if stay >= g.rules.MinCapacity && (busy || g.obs.Frozen) {
			t.Fatalf("up while something is under way: %s", d.Why)
		}
	case d.Action == capacity.Down:
		if d.Desired != stay-d.Count || d.Count < 1 || d.Desired < max(g.rules.MinCapacity, g.obs.LargestN) {
			t.Fatalf("%d of %d to have %d", d.Count, stay, d.Desired)
		}
		if busy || unknown || g.obs.Frozen || !g.obs.Whole {
			t.Fatalf("down while %+v", g.obs)
		}
		for _, id := range d.Leave {
			if !leaves[id] {
				t.Fatalf("#%d of %v can not leave", id, d.Leave)
			}
			delete(leaves, id)
		}
	}
}
