package placement_test

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/placement"
)

// weighted places by weights of one N.
func weighted(t rapid.TB, current placement.Assignment, nodes []placement.Node, n int, weights []uint64) placement.Assignment {
	t.Helper()
	a, err := placement.Weighted(current, nodes, []int{n}, [][]uint64{weights})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// bytes sums what each node holds.
func bytes(a placement.Assignment, weights []uint64) map[uint64]float64 {
	out := map[uint64]float64{}
	for v, slots := range a {
		for _, n := range slots {
			out[n] += float64(weights[v])
		}
	}
	return out
}

// movedBytes sums what has to be copied to get from one assignment to another.
func movedBytes(from, to placement.Assignment, weights []uint64) (sum float64) {
	for v := range from {
		for s := range from[v] {
			if from[v][s] != to[v][s] {
				sum += float64(weights[v])
			}
		}
	}
	return sum
}

func drawWeights(t *rapid.T, vnodes int) []uint64 {
	r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "weights"), 0))
	skew := rapid.Float64Range(0.05, 2).Draw(t, "skew")
	out := make([]uint64, vnodes)
	for v := range out {
		out[v] = uint64(1e9 * math.Pow(1-r.Float64(), -skew) / 10)
	}
	return out
}

// changed returns weights that differ by some parts of themselves, up or down at random.
func changed(t *rapid.T, weights []uint64, name string, parts float64) []uint64 {
	r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, name), 1))
	out := slices.Clone(weights)
	for v := range out {
		out[v] = uint64(float64(out[v]) * (1 + parts*(2*r.Float64()-1)))
	}
	return out
}

// little is by which part weights may change so that no step is worth a twentieth of the
// mean that was worth a two hundredth: that is of what two nodes and a vnode have.
func little(a placement.Assignment, weights []uint64) float64 {
	have := bytes(a, weights)
	return 0.015 * sum(have) / float64(len(have)) / slices.Max(slices.Collect(maps.Values(have)))
}

// For any weights, and nodes that come, go and change their zones: the rules of Even hold,
// nodes are as near to their share as is promised, and it settles.
func TestWeightedProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		letters := []string{"a", "b", "c", "d", "e"}[:rapid.IntRange(1, 5).Draw(t, "letters")]
		draw := func(least int, name string) []placement.Node {
			return nodes(rapid.SliceOfN(rapid.SampledFrom(letters), least, 12).Draw(t, name)...)
		}
		vnodes := 1 << rapid.IntRange(5, 8).Draw(t, "bits")
		n := rapid.IntRange(1, 5).Draw(t, "N")
		weights := drawWeights(t, vnodes)
		before := draw(n+1, "before")
		was := weighted(t, empty(vnodes, n), before, n, weights)
		checkZones(t, was, before, []int{n})
		checkWeighted(t, was, before, n, weights)
		if again := weighted(t, was, before, n, changed(t, weights, "a little", little(was, weights))); !cmp.Equal(was, again) {
			t.Fatalf("%.0f bytes of %v would move when weights change a little", movedBytes(was, again, weights), bytes(was, weights))
		}

		weights = changed(t, weights, "much", 0.9)
		after := draw(n+1, "after") // by the same numbers: some come, go or change their zone
		now := weighted(t, was, after, n, weights)
		checkZones(t, now, after, []int{n})
		checkWeighted(t, now, after, n, weights)
		for v := range now {
			if left := inTurn(was[v], now[v]); len(left) > 0 {
				t.Fatalf("vnode %d: %v became %v, so a node would be there twice", v, was[v], now[v])
			}
		}
		if again := weighted(t, now, after, n, weights); !cmp.Equal(now, again) {
			t.Fatalf("%.0f bytes would move at once again", movedBytes(now, again, weights))
		}
		if len(letters) == 1 {
			had, below, above, gone := bytes(was, weights), 0.0, 0.0, 0.0
			mean := sum(had) / float64(len(after))
			for _, node := range after {
				below += max(0, mean-had[node.ID])
				above += max(0, had[node.ID]-mean)
				delete(had, node.ID)
			}
			for _, b := range had {
				gone += b
			}
			least := max(below, above+gone)
			// What a node leaves behind cannot always go to where it is missing, and heavy vnodes
			// push light ones about.
			if most := 2*least + gone + 4*float64(slices.Max(weights))*float64(len(after)); movedBytes(was, now, weights) > most {
				t.Fatalf("%.0f bytes moved, %.0f had to at least, %.0f may", movedBytes(was, now, weights), least, most)
			}
		}
		// If a little change brings it over the edge, the next one does not.
		weights = changed(t, weights, "a little more", little(now, weights))
		then := weighted(t, now, after, n, weights)
		if again := weighted(t, then, after, n, changed(t, weights, "and more", little(then, weights))); !cmp.Equal(then, now) && !cmp.Equal(again, then) {
			t.Fatalf("%.0f bytes would move when weights change a little, and again when they change a little more", movedBytes(then, again, weights))
		}
	})
}

func sum(of map[uint64]float64) (sum float64) {
	for _, x := range of {
		sum += x
	}
	return sum
}

// checkWeighted checks that no node is off its share by more than the heaviest vnode and a
// twentieth of the mean.
func checkWeighted(t rapid.TB, a placement.Assignment, ns []placement.Node, n int, weights []uint64) {
	t.Helper()
	const fine = 1 << 20
	have, shares := bytes(a, weights), placement.Shares(ns, fine, n)
	total := sum(have)
	most := float64(slices.Max(weights)) + total/float64(len(ns))/20
	for _, node := range ns {
		due := float64(shares[node.Zone].Least) / (fine * float64(n)) * total
		if off := math.Abs(have[node.ID] - due); off > most*1.001 {
			t.Fatalf("node %d of zone %s is off by %.0f, %.0f is allowed; all: %v", node.ID, node.Zone, have[node.ID]-due, most, have)
		}
	}
}

// Weights that are all the same are no weights.
func TestWeightedIsEvenWithoutWeights(t *testing.T) {
	was := even(t, empty(256, 3), nodes("a", "b", "c"), 3)
	next := nodes("a", "b", "c", "a", "d")
	want := even(t, was, next, 3)
	for _, w := range []uint64{0, 1, 1 << 30, math.MaxUint64} {
		if got := weighted(t, was, next, 3, slices.Repeat([]uint64{w}, 256)); !cmp.Equal(want, got) {
			t.Errorf("all %d: %d slots moved, not %d", w, moved(was, got), moved(was, want))
		}
	}
	if got := weighted(t, was, nodes("a", "b", "c"), 3, append(make([]uint64, 255), math.MaxUint64)); !cmp.Equal(was, got) {
		t.Error("one heavy vnode cannot be shared by four nodes, and yet something moved")
	}
	if _, err := placement.Weighted(was, nodes("a", "b"), []int{3}, [][]uint64{append(make([]uint64, 255), 1)}); !errors.Is(err, placement.ErrTooFewNodes) {
		t.Errorf("of two nodes: %v", err)
	}
}

// A fourth node takes a quarter of the bytes, whatever the vnodes weigh; a ring in which
// some vnodes have grown is evened out with about as many bytes as nodes have too many.
func TestWeightedMovesFewBytes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	weights := make([]uint64, 256)
	for v := range weights {
		weights[v] = 1<<20 + r.Uint64N(8<<20)
	}
	three := even(t, empty(256, 3), nodes("a", "a", "a"), 3)
	four := weighted(t, three, nodes("a", "a", "a", "a"), 3, weights)
	total := sum(bytes(four, weights))
	if m := movedBytes(three, four, weights) / total; m < 0.245 || m > 0.255 {
		t.Errorf("%.1f%% moved", 100*m)
	}
	checkLevel(t, bytes(four, weights), 0.005)
	if c := counts(four, 3); c[4] < 185 || c[4] > 200 {
		t.Errorf("a quarter of the bytes is in %d slots, of 768", c[4])
	}
	for v := range weights {
		if four[v][0] == 1 {
			weights[v] *= 2
		}
	}
	had := bytes(four, weights)
	total = sum(had)
	least := 0.0
	for _, b := range had {
		least += max(0, b-total/4)
	}
	again := weighted(t, four, nodes("a", "a", "a", "a"), 3, weights)
	checkLevel(t, bytes(again, weights), 0.005)
	if m := movedBytes(four, again, weights); least < total/100 || m > least*1.1 {
		t.Errorf("%.0f bytes moved, nodes have %.0f too many, of %.0f", m, least, total)
	}
	// What is within a twentieth is let alone.
	for v := range weights {
		if again[v][0] == 1 {
			weights[v] += weights[v] / 16
		}
	}
	if m := moved(again, weighted(t, again, nodes("a", "a", "a", "a"), 3, weights)); m != 0 {
		t.Errorf("%d slots moved for %v", m, bytes(again, weights))
	}
}

// checkLevel checks that no node is off the mean by more than a part of it.
func checkLevel(t rapid.TB, have map[uint64]float64, part float64) {
	t.Helper()
	mean := sum(have) / float64(len(have))
	for n, b := range have {
		if math.Abs(b-mean) > part*mean {
			t.Errorf("node %d has %.0f, the mean is %.0f", n, b, mean)
		}
	}
}

// With several N in use, slots hold what all of those hold that use them. Nothing that a
// plan does makes it worse.
func TestWeightedOfSeveralN(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		letters := []string{"a", "b", "c", "d"}[:rapid.IntRange(1, 4).Draw(t, "letters")]
		draw := func(name string) []placement.Node {
			return nodes(rapid.SliceOfN(rapid.SampledFrom(letters), 10, 12).Draw(t, name)...)
		}
		vnodes := 1 << rapid.IntRange(5, 8).Draw(t, "bits")
		uses := []int{rapid.IntRange(1, 4).Draw(t, "N"), 5}
		weights := [][]uint64{drawWeights(t, vnodes), drawWeights(t, vnodes)}
		place := func(current placement.Assignment, ns []placement.Node) placement.Assignment {
			a, err := placement.Weighted(current, ns, uses, weights)
			if err != nil {
				t.Fatal(err)
			}
			checkZones(t, a, ns, uses)
			return a
		}
		squares := func(a placement.Assignment) (out float64) {
			have := map[uint64]float64{}
			for v, slots := range a {
				for s, n := range slots {
					for i, use := range uses {
						if s < use {
							have[n] += float64(weights[i][v])
						}
					}
				}
			}
			for _, b := range have {
				out += b * b
			}
			return out
		}
		ns := draw("nodes")
		was := place(empty(vnodes, 5), ns)
		after := draw("after")
		now := place(was, after)
		for v := range now {
			if left := inTurn(was[v], now[v]); len(left) > 0 {
				t.Fatalf("vnode %d: %v became %v, so a node would be there twice", v, was[v], now[v])
			}
		}
		if len(letters) > 1 {
			return // zones give nodes unequal shares
		}
		founded := even(t, empty(vnodes, 5), ns, uses...)
		if level := place(founded, ns); squares(level) > squares(founded)*(1+1e-9) {
			t.Fatal("it became worse")
		}
	})
}

func TestGoldenWeightedPlan(t *testing.T) {
	weights := make([]uint64, 16)
	for v := range weights {
		weights[v] = uint64(1000 * (1 + v%5))
	}
	was := even(t, empty(16, 3), nodes("a", "b", "c"), 3)
	now := weighted(t, was, nodes("a", "b", "c", "d", "a"), 3, weights)
	var b strings.Builder
	for v := range now {
		fmt.Fprintln(&b, v, weights[v], was[v], now[v])
	}
	fmt.Fprintln(&b, bytes(was, weights), bytes(now, weights))
	checkGolden(t, "three-to-five-nodes-weighted.txt", b.String())
}

// A thousand nodes with 65,536 vnodes are planned within seconds.
func TestWeightedScales(t *testing.T) {
	if testing.Short() {
		t.Skip("plans 196,608 slots twice")
	}
	var zones []string
	for i := range 1000 {
		zones = append(zones, string(rune('a'+i%5)))
	}
	all := nodes(zones...)
	r := rand.New(rand.NewPCG(1, 3))
	weights := make([]uint64, 1<<16)
	for v := range weights {
		weights[v] = r.Uint64N(64 << 20)
	}
	began := time.Now()
	was := weighted(t, empty(1<<16, 3), all[:900], 3, weights)
	founded := time.Since(began)
	began = time.Now()
	now := weighted(t, was, all[50:], 3, weights) // 50 go, 100 come
	t.Logf("founded in %s, changed in %s, %d slots moved", founded, time.Since(began), moved(was, now))
	for _, p := range []struct {
		placement.Assignment
		nodes []placement.Node
	}{{was, all[:900]}, {now, all[50:]}} {
		checkZones(t, p.Assignment, p.nodes, []int{3})
		checkWeighted(t, p.Assignment, p.nodes, 3, weights)
	}
}
