package placement_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/placement"
)

// moved counts the slots that two assignments give different nodes.
func moved(from, to placement.Assignment) (count int) {
	for v := range from {
		for s := range from[v] {
			if from[v][s] != to[v][s] {
				count++
			}
		}
	}
	return count
}

// empty is a ring without nodes.
func empty(vnodes, width int) placement.Assignment {
	a := make(placement.Assignment, vnodes)
	for v := range a {
		a[v] = make([]uint64, width)
	}
	return a
}

func even(t rapid.TB, current placement.Assignment, nodes []placement.Node, uses ...int) placement.Assignment {
	t.Helper()
	a, err := placement.Even(current, nodes, uses)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A fourth node among three takes a quarter of the data, and nothing else moves; it
// gives it back when it leaves.
func TestFourthNodeTakesAQuarter(t *testing.T) {
	three := even(t, empty(256, 3), nodes("a", "a", "a"), 3)
	four := even(t, three, nodes("a", "a", "a", "a"), 3)
	if got, want := counts(four, 3), (map[uint64]int{1: 192, 2: 192, 3: 192, 4: 192}); !cmp.Equal(got, want) {
		t.Errorf("slots are %v", got)
	}
	if m := moved(three, four); m != 192 {
		t.Errorf("%d of 768 slots moved", m)
	}
	back := even(t, four, nodes("a", "a", "a"), 3)
	if m := moved(four, back); m != 192 {
		t.Errorf("%d of 768 slots moved back", m)
	}
}

// A newcomer halves what one node has; three of them bring six nodes to a sixth each.
func TestSplitHalvesANode(t *testing.T) {
	split := func(current placement.Assignment, nodes []placement.Node) placement.Assignment {
		t.Helper()
		a, err := placement.Split(current, nodes, []int{3})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	three := even(t, empty(256, 3), nodes("a", "a", "a"), 3)
	four := split(three, nodes("a", "a", "a", "a"))
	if diff := cmp.Diff(map[uint64]int{1: 256, 2: 128, 3: 256, 4: 128}, counts(four, 3)); diff != "" {
		t.Errorf("three and one (-want +got):\n%s", diff)
	}
	if m := moved(three, four); m != 128 {
		t.Errorf("%d slots moved", m)
	}
	for name, six := range map[string]placement.Assignment{
		"three at once": split(three, nodes("a", "a", "a", "a", "a", "a")),
		"two more":      split(four, nodes("a", "a", "a", "a", "a", "a")),
	} {
		if diff := cmp.Diff(map[uint64]int{1: 128, 2: 128, 3: 128, 4: 128, 5: 128, 6: 128}, counts(six, 3)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	// In a zone with two others every vnode keeps one node of each zone.
	zoned := split(even(t, empty(256, 3), nodes("a", "b", "c"), 3), nodes("a", "b", "c", "a"))
	if diff := cmp.Diff(map[uint64]int{1: 128, 2: 256, 3: 256, 4: 128}, counts(zoned, 3)); diff != "" {
		t.Errorf("a second node of zone a (-want +got):\n%s", diff)
	}
}

func TestSharesFollowZones(t *testing.T) {
	for _, tc := range []struct {
		zones string
		n     int
		want  map[string]placement.Share
	}{
		{"aaaa", 3, map[string]placement.Share{"a": {Bounds: placement.Bounds{Least: 192, Most: 192}}}},
		{"abcd", 3, map[string]placement.Share{
			"a": {Bounds: placement.Bounds{Least: 192, Most: 192}}, "b": {Bounds: placement.Bounds{Least: 192, Most: 192}},
			"c": {Bounds: placement.Bounds{Least: 192, Most: 192}}, "d": {Bounds: placement.Bounds{Least: 192, Most: 192}},
		}},
		// Every vnode needs all three zones, so the second node of a halves its zone's part.
		{"abca", 3, map[string]placement.Share{
			"a": {Bounds: placement.Bounds{Least: 128, Most: 128}}, "b": {Bounds: placement.Bounds{Least: 256, Most: 256}, Forced: true},
			"c": {Bounds: placement.Bounds{Least: 256, Most: 256}, Forced: true},
		}},
		// No vnode may use zone a twice, so its nodes cannot have three fifths of two slots.
		{"aaabc", 2, map[string]placement.Share{
			"a": {Bounds: placement.Bounds{Least: 85, Most: 86}, Forced: true}, "b": {Bounds: placement.Bounds{Least: 128, Most: 128}},
			"c": {Bounds: placement.Bounds{Least: 128, Most: 128}},
		}},
	} {
		got := placement.Shares(nodes(strings.Split(tc.zones, "")...), 256, tc.n)
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("zones %s, N=%d (-want +got):\n%s", tc.zones, tc.n, diff)
		}
	}
}

func TestGoldenPlan(t *testing.T) {
	was := even(t, empty(16, 3), nodes("a", "b", "c"), 3)
	now := even(t, was, nodes("a", "b", "c", "d", "a"), 3)
	var b strings.Builder
	for v := range now {
		fmt.Fprintln(&b, v, was[v], now[v])
	}
	checkGolden(t, "three-to-five-nodes.txt", b.String())
}

// For any nodes that come, go and change their zones: the nodes of a vnode are
// distinct, zones are as distinct as they can be, nodes have what Shares says, for each
// N in use, slots move one after the other with no node in a vnode twice.
func TestEvenProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		letters := []string{"a", "b", "c", "d", "e"}[:rapid.IntRange(1, 5).Draw(t, "letters")]
		draw := func(least int, name string) []placement.Node {
			return nodes(rapid.SliceOfN(rapid.SampledFrom(letters), least, 12).Draw(t, name)...)
		}
		vnodes := 1 << rapid.IntRange(5, 8).Draw(t, "bits")
		width := rapid.IntRange(1, 5).Draw(t, "width")
		uses, spare := []int{width}, 1
		if least := rapid.IntRange(1, width).Draw(t, "least N"); least < width {
			// Slots of one vnode may have to take nodes from each other, by way of others.
			uses, spare = append(uses, least), width
		}
		before := draw(width+spare, "before")
		was := even(t, empty(vnodes, width), before, uses...)
		checkEven(t, was, before, uses)
		after := draw(width+spare, "after") // by the same numbers: some come, go or change their zone
		now := even(t, was, after, uses...)
		checkEven(t, now, after, uses)
		for v := range now {
			if left := inTurn(was[v], now[v]); len(left) > 0 {
				t.Fatalf("vnode %d: %v became %v, so a node would be there twice", v, was[v], now[v])
			}
		}
		if len(letters) == 1 && len(uses) == 1 {
			had, below, above, gone := counts(was, width), 0, 0, 0
			share := placement.Shares(after, vnodes, width)["a"]
			for _, n := range after {
				below += max(0, share.Least-had[n.ID])
				above += max(0, had[n.ID]-share.Most)
				delete(had, n.ID)
			}
			for _, n := range had {
				gone += n
			}
			least := max(below, above+gone)
			// What a node leaves behind cannot always go to where it is missing.
			if m := moved(was, now); m > least+gone/2 {
				t.Fatalf("%d slots moved, %d had to at least", m, least)
			}
		}
		if again := even(t, was, after, uses...); !cmp.Equal(now, again) {
			t.Fatal("the same input gives another result")
		}
	})
}

// Two nodes of a vnode cannot change slots. Where zones want that, another one helps.
func TestEvenKeepsToZonesByDetours(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 0))
		draw := func() []placement.Node {
			var zones []string
			for range 10 {
				zones = append(zones, string("abc"[r.IntN(3)]))
			}
			return nodes(zones...)
		}
		before, after, uses := draw(), draw(), []int{1 + r.IntN(4), 5}
		was := even(t, empty(32, 5), before, uses...)
		now := even(t, was, after, uses...)
		checkZones(t, now, after, uses)
		for v := range now {
			if left := inTurn(was[v], now[v]); len(left) > 0 {
				t.Errorf("seed %d: %v became %v, so a node would be there twice", seed, was[v], now[v])
			}
		}
	}
}

// inTurn moves slot after slot where that leaves no node in a vnode twice, and returns
// those that cannot move.
func inTurn(from, to []uint64) (left []int) {
	at := slices.Clone(from)
	for moved := true; moved; {
		moved, left = false, nil
		for s, n := range to {
			switch {
			case at[s] == n:
			case slices.Contains(at, n):
				left = append(left, s)
			default:
				at[s], moved = n, true
			}
		}
	}
	return left
}

func checkEven(t rapid.TB, a placement.Assignment, ns []placement.Node, uses []int) {
	t.Helper()
	checkZones(t, a, ns, uses)
	// With several N in use a vnode's slots can be in each other's way.
	checkShares(t, a, ns, slices.Max(uses), len(uses)-1)
}

// checkZones fails where a vnode has a node twice, or its first slots are in fewer zones
// than they could be.
func checkZones(t rapid.TB, a placement.Assignment, ns []placement.Node, uses []int) {
	t.Helper()
	zoneOf, size := map[uint64]string{}, map[string]int{}
	for _, n := range ns {
		zoneOf[n.ID] = n.Zone
		size[n.Zone]++
	}
	for v, slots := range a {
		if sorted := slices.Sorted(slices.Values(slots)); len(slices.Compact(sorted)) < len(slots) {
			t.Fatalf("vnode %d: %v", v, slots)
		}
		for _, n := range uses {
			used := map[string]int{}
			for _, id := range slots[:n] {
				used[zoneOf[id]]++
			}
			for z, have := range used {
				for other, cap := range size {
					if have > used[other]+1 && used[other] < cap {
						t.Fatalf("vnode %d %v, first %d slots: %d in zone %s, %d in %s", v, slots, n, have, z, used[other], other)
					}
				}
			}
		}
	}
}

// checkShares fails where a node's number of first n slots is further from its share than
// a slack.
func checkShares(t rapid.TB, a placement.Assignment, ns []placement.Node, n, slack int) {
	t.Helper()
	share, have := placement.Shares(ns, len(a), n), counts(a, n)
	for _, node := range ns {
		if s := share[node.Zone]; have[node.ID] < s.Least-slack || have[node.ID] > s.Most+slack {
			t.Fatalf("first %d slots: node %d of zone %s has %d, its share is %+v; all: %v, %+v", n, node.ID, node.Zone, have[node.ID], s, have, share)
		}
	}
}

// A thousand nodes with 65,536 vnodes are planned within seconds.
func TestEvenScales(t *testing.T) {
	if testing.Short() {
		t.Skip("plans 196,608 slots twice")
	}
	all := manyNodes()
	began := time.Now()
	was := even(t, empty(1<<16, 3), all[:900], 3)
	founded := time.Since(began)
	began = time.Now()
	now := even(t, was, all[50:], 3) // 50 go, 100 come
	t.Logf("founded in %s, changed in %s, %d slots moved", founded, time.Since(began), moved(was, now))
	checkEven(t, was, all[:900], []int{3})
	checkEven(t, now, all[50:], []int{3})
}
