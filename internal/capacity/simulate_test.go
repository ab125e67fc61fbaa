package capacity

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden files anew")

func named(t rapid.TB, name string) Curve {
	t.Helper()
	c, err := Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func simulate(t rapid.TB, r Rules, c Curve, o Options) *Run {
	t.Helper()
	run, err := Simulate(r, c, o)
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func drawRules(t *rapid.T, most int) Rules {
	r := Rules{MinCapacity: rapid.IntRange(1, 6).Draw(t, "min")}
	r.MaxCapacity = r.MinCapacity + rapid.IntRange(0, most).Draw(t, "more")
	r.TargetCPU = rapid.Float64Range(0.2, 0.95).Draw(t, "cpu")
	if rapid.Bool().Draw(t, "also operations") {
		r.TargetOperations = rapid.Float64Range(20, 95).Draw(t, "operations")
	}
	r.ScaleUpCooldown = time.Duration(rapid.IntRange(1, 1200).Draw(t, "up cooldown")) * time.Second
	r.ScaleDownCooldown = time.Duration(rapid.IntRange(1, 1200).Draw(t, "down cooldown")) * time.Second
	return r
}

func drawOptions(t *rapid.T) Options {
	o := DefaultOptions(100)
	o.Skew = rapid.Float64Range(1, 2).Draw(t, "skew")
	o.HotSpot = rapid.SampledFrom([]float64{0, 0, 30, 90, 200}).Draw(t, "hot spot")
	o.LaunchTime = time.Duration(rapid.IntRange(0, 300).Draw(t, "launch")) * time.Second
	o.MoveTime = time.Duration(rapid.IntRange(0, 1200).Draw(t, "move")) * time.Second
	o.MoveCPU = rapid.Float64Range(0, 0.5).Draw(t, "move cpu")
	o.Step = time.Duration(rapid.IntRange(5, 30).Draw(t, "step")) * time.Second
	return o
}

// For any load: never out of bounds, what is in flight included; one thing at a time; cooldowns
// pass in between, so directions change no more often than those allow; and a State that
// is handed over to another leader decides the same.
func TestSimulateAnyLoad(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, o := drawRules(t, 30), drawOptions(t)
		var c Curve
		at := time.Duration(0)
		for range rapid.IntRange(2, 25).Draw(t, "points") {
			c = append(c, Point{at, rapid.Float64Range(0, 3000).Draw(t, "load")})
			at += time.Duration(rapid.IntRange(1, 1800).Draw(t, "seconds")) * time.Second
		}
		m := newModel(r, c, o)
		for m.now <= c[len(c)-1].At {
			m.step()
			staying, joining, leaving := 0, len(m.obs.Launching), 0
			for _, n := range m.obs.Nodes {
				switch {
				case n.Leaving:
					leaving++
				case !n.Member:
					joining++
					staying++
				default:
					staying++
				}
			}
			if staying < r.MinCapacity || staying+leaving+len(m.obs.Launching) > r.MaxCapacity {
				t.Fatalf("%v: %d nodes stay, %d leave, %d are launched", m.now, staying, leaving, len(m.obs.Launching))
			}
			if joining > 0 && leaving > 0 {
				t.Fatalf("%v: %d come while %d go", m.now, joining, leaving)
			}
			m.state = handOver(t, m.state)
		}
		checkEvents(t, r, m.run.Events)
		if again := simulate(t, r, c, o); !cmp.Equal(again.Events, m.run.Events) {
			t.Fatal("leaders that stay decide otherwise")
		}
	})
}

func handOver(t rapid.TB, s State) (out State) {
	b, err := json.Marshal(s)
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func checkEvents(t rapid.TB, r Rules, events []Event) {
	lastUp := time.Duration(math.MinInt64 / 2)
	for i, e := range events {
		up := e.Decision.Action == Up
		if up && e.At-lastUp < r.ScaleUpCooldown || !up && i > 0 && e.At-events[i-1].At < r.ScaleDownCooldown {
			t.Fatalf("%v at %v, before the cooldown is over", e.Decision.Action, e.At)
		}
		if up {
			lastUp = e.At
		}
		if d := e.Decision.Desired; d < r.MinCapacity || d > r.MaxCapacity {
			t.Fatalf("%d nodes are out of bounds", d)
		}
	}
}

// For any steady load, from any number of nodes: they become more or fewer, never both, then
// nothing happens any more, and load is at its target or all nodes are there.
func TestSimulateSteadyLoad(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, o := drawRules(t, 30), drawOptions(t)
		o.Nodes, o.Step = rapid.IntRange(r.MinCapacity, r.MaxCapacity).Draw(t, "nodes"), 30*time.Second
		// Where a node is at its end, its load can not be told from its CPU.
		even := rapid.Bool().Draw(t, "even")
		if even {
			o.Skew, o.HotSpot = 1, 0
		}
		load := rapid.Float64Range(0, 3000).Draw(t, "load")
		run := simulate(t, r, Curve{{0, load}, {24 * time.Hour, load}}, o)
		for _, e := range run.Events {
			if e.Decision.Action != run.Events[0].Decision.Action {
				t.Fatalf("%v at %v, after %v: %s", e.Decision.Action, e.At, run.Events[0].Decision.Action, e.Decision.Why)
			}
			if e.At > 20*time.Hour {
				t.Fatalf("%v at %v", e.Decision.Action, e.At)
			}
		}
		if last := run.Steps[len(run.Steps)-1]; even && last.Above && last.Nodes < r.MaxCapacity {
			t.Fatalf("%d of %d nodes, and above the target", last.Nodes, r.MaxCapacity)
		}
	})
}

// With hot spots as with any load that more nodes do not relieve, most nodes stay away.
func TestSimulateHotSpotIsBounded(t *testing.T) {
	o := DefaultOptions(100)
	o.HotSpot = 100
	r := Default()
	r.MaxCapacity = 1000
	run := simulate(t, r, Curve{{0, 800}, {24 * time.Hour, 800}}, o)
	// 800 take 12 nodes at 70%, and there are up to three more for the hot one.
	if n := run.Summary.MostNodes; n <= 12 || n > 15 {
		t.Errorf("%d nodes, want 13 to 15", n)
	}
}

// Load that swings faster than nodes can follow is given what its peaks take.
func TestSimulateFlapping(t *testing.T) {
	run := simulate(t, Default(), named(t, "sawtooth").Scale(600), DefaultOptions(100))
	if run.Summary.Downs != 0 || run.Summary.Ups > 4 {
		t.Errorf("%+v", run.Summary)
	}
	// With short cooldowns it follows, but no faster than those allow.
	r := Default()
	r.ScaleUpCooldown, r.ScaleDownCooldown = 10*time.Second, 10*time.Second
	o := DefaultOptions(100)
	o.LaunchTime, o.MoveTime, o.Step = 0, 0, time.Second
	run = simulate(t, r, named(t, "sawtooth").Scale(600), o)
	checkEvents(t, r, run.Events)
	if run.Summary.Downs == 0 {
		t.Errorf("%+v", run.Summary)
	}
}

func TestSimulateSpike(t *testing.T) {
	o := DefaultOptions(100)
	c := Curve{{0, 180}, {time.Hour, 180}, {time.Hour + time.Second, 300}, {time.Hour + 30*time.Second, 300}, {time.Hour + 31*time.Second, 180}, {2 * time.Hour, 180}}
	if run := simulate(t, Default(), c, o); len(run.Events) != 0 {
		t.Errorf("half a minute of more load: %+v", run.Events[0])
	}
}

// Moves cost CPU, which is no reason for more nodes.
func TestSimulateMovesAreNoLoad(t *testing.T) {
	o := DefaultOptions(100)
	o.MoveCPU, o.MoveTime = 0.5, time.Hour
	run := simulate(t, Default(), Curve{{0, 270}, {12 * time.Hour, 270}}, o)
	if run.Summary.Ups != 0 || run.Summary.MostNodes != 4 {
		t.Errorf("%+v", run.Summary)
	}
	o.Nodes = 3
	run = simulate(t, Default(), Curve{{0, 270}, {12 * time.Hour, 270}}, o)
	if run.Summary.Ups != 1 || run.Summary.MostNodes != 4 {
		t.Errorf("%+v", run.Summary)
	}
}

func TestSimulateDisksFill(t *testing.T) {
	r, o := Default(), DefaultOptions(100)
	r.TargetDisk = 0.7
	o.DiskBytes, o.DataBytes, o.GrowthBytesPerSecond, o.FillBytesPerSecond = 1<<40, 1<<40, 32<<20, 64<<20
	run := simulate(t, r, Curve{{0, 50}, {2 * 24 * time.Hour, 50}}, o)
	if run.Summary.Downs != 0 || run.Summary.Ups < 3 || run.Summary.MaxDisk > 0.8 {
		t.Errorf("%+v", run.Summary)
	}
}

// Days of 10 to 1,000 nodes, with thousands that come and go.
func TestSimulateDays(t *testing.T) {
	r := Default()
	r.MinCapacity, r.MaxCapacity = 10, 1000
	if err := r.ValidateFor(2048, 3); err != nil {
		t.Fatal(err)
	}
	var c Curve
	for i := range 2*24*12 + 1 {
		c = append(c, Point{time.Duration(i) * 5 * time.Minute, 350 - 326*math.Cos(2*math.Pi*float64(i)/(24*12))})
	}
	run := simulate(t, r, c, DefaultOptions(1))
	checkEvents(t, r, run.Events)
	sum := run.Summary
	t.Logf("%+v", sum)
	if sum.Launched+sum.Drained < 2000 || sum.MostNodes < 900 || sum.LeastNodes > 100 {
		t.Errorf("%d launched, %d drained, %d to %d nodes", sum.Launched, sum.Drained, sum.LeastNodes, sum.MostNodes)
	}
	if sum.MaxCPU > 0.95 {
		t.Errorf("cpu at %v", sum.MaxCPU)
	}
	turns := 0
	for i := 1; i < len(run.Events); i++ {
		if run.Events[i-1].Decision.Action != run.Events[i].Decision.Action {
			turns++
		}
	}
	if turns > 4 {
		t.Errorf("%d turns in two days", turns)
	}
}

func TestSimulateRefuses(t *testing.T) {
	c := Curve{{0, 1}, {time.Hour, 1}}
	for name, refused := range map[string]func(*Rules, *Curve, *Options){
		"min_capacity": func(r *Rules, _ *Curve, _ *Options) { r.MinCapacity = 0 },
		"point 2":      func(_ *Rules, c *Curve, _ *Options) { *c = Curve{{time.Hour, 1}, {0, 1}} },
		"two at least": func(_ *Rules, c *Curve, _ *Options) { *c = nil },
		"capacity of a node is NaN": func(_ *Rules, _ *Curve, o *Options) {
			o.NodeCapacity = math.NaN()
		},
		"capacity of a node is 0": func(_ *Rules, _ *Curve, o *Options) { o.NodeCapacity = 0 },
		"1001 nodes":              func(_ *Rules, _ *Curve, o *Options) { o.Nodes = 1001 },
		"skew is 0.5":             func(_ *Rules, _ *Curve, o *Options) { o.Skew = 0.5 },
		"can not be negative":     func(_ *Rules, _ *Curve, o *Options) { o.HotSpot = -1 },
		"CPU of moves is 2":       func(_ *Rules, _ *Curve, o *Options) { o.MoveCPU = 2 },
		"launches take -1s":       func(_ *Rules, _ *Curve, o *Options) { o.LaunchTime = -time.Second },
		"is filled with 0":        func(_ *Rules, _ *Curve, o *Options) { o.FillBytesPerSecond = 0 },
		"a step is 1m0s":          func(_ *Rules, _ *Curve, o *Options) { o.Step = time.Minute },
	} {
		r, c, o := Default(), c, DefaultOptions(1)
		refused(&r, &c, &o)
		if _, err := Simulate(r, c, o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v, want %q", err, name)
		}
	}
}

func TestDraw(t *testing.T) {
	run := simulate(t, Default(), named(t, "step").Scale(600), DefaultOptions(100))
	got := run.Draw(80)
	path := filepath.Join("testdata", "step.txt")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Error(diff)
	}
}

// Every line fits, whatever the width, and every decision is marked and explained or counted.
func TestDrawFits(t *testing.T) {
	for _, name := range Names() {
		o := DefaultOptions(100)
		o.Step = 30 * time.Second
		run := simulate(t, Default(), named(t, name).Scale(600), o)
		for _, width := range []int{0, 40, 60, 80, 200, 5000} {
			got := run.Draw(width)
			for line := range strings.Lines(got) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > max(width, 40) {
					t.Errorf("%s: a line of %d columns in %d: %s", name, n, width, line)
				}
			}
			if n := strings.Count(got, " → "); n != min(len(run.Events), mostEvents) {
				t.Errorf("%s: %d of %d decisions explained", name, n, len(run.Events))
			}
			if strings.Contains(got, "further decision") != (len(run.Events) > mostEvents) {
				t.Errorf("%s: %d decisions, and\n%s", name, len(run.Events), got)
			}
		}
	}
	// With fewer steps than columns there are no holes.
	run := simulate(t, Default(), Curve{{0, 100}, {3 * time.Minute, 100}}, DefaultOptions(100))
	if line, _, _ := strings.Cut(run.Draw(80), "\n"); !strings.HasSuffix(line, strings.Repeat("█", 70)) {
		t.Errorf("%q", line)
	}
	if run = simulate(t, Default(), Curve{{0, 0}, {time.Second, 0}}, DefaultOptions(1)); !strings.Contains(run.Draw(80), "nothing was decided") {
		t.Error(run.Draw(80))
	}
}
