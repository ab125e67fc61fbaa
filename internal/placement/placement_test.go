package placement_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/placement"
)

var update = flag.Bool("update", false, "write the golden files anew")

// nodes makes one node for each zone given, numbered from 1.
func nodes(zones ...string) []placement.Node {
	var out []placement.Node
	for i, z := range zones {
		out = append(out, placement.Node{ID: uint64(i + 1), Zone: z})
	}
	return out
}

// counts returns the slots of each node among the first n of every vnode.
func counts(a placement.Assignment, n int) map[uint64]int {
	out := map[uint64]int{}
	for _, slots := range a {
		for _, node := range slots[:n] {
			out[node]++
		}
	}
	return out
}

func spread(c map[uint64]int, among []placement.Node) int {
	lo, hi := 1<<30, 0
	for _, n := range among {
		lo, hi = min(lo, c[n.ID]), max(hi, c[n.ID])
	}
	return hi - lo
}

func TestFoundingIsEven(t *testing.T) {
	for _, tc := range []struct {
		zones []string
		width int
	}{
		{[]string{"a", "a", "a"}, 3},
		{[]string{"a", "b", "c"}, 3},
		{[]string{"a", "b", "c", "a", "b"}, 5},
		{[]string{"a", "a", "a", "a", "a"}, 3},
		{[]string{"a", "b", "a", "b", "a", "b", "a"}, 3},
	} {
		t.Run(strings.Join(tc.zones, ""), func(t *testing.T) {
			ns := nodes(tc.zones...)
			a, err := placement.Widen(nil, 256, ns, tc.width)
			if err != nil {
				t.Fatal(err)
			}
			for n := 1; n <= tc.width; n++ {
				if s := spread(counts(a, n), ns); s > 1 && feasible(tc.zones, n) {
					t.Errorf("first %d slots differ by %d between nodes: %v", n, s, counts(a, n))
				}
			}
		})
	}
}

// feasible reports whether n slots in distinct zones can be spread evenly: no
// zone's fair share is above one slot a vnode.
func feasible(zones []string, n int) bool {
	size := map[string]int{}
	for _, z := range zones {
		size[z]++
	}
	if n > len(size) {
		return n == len(zones)
	}
	for _, s := range size {
		if s*n > len(zones) {
			return false
		}
	}
	return true
}

func TestGoldenRing(t *testing.T) {
	a, err := placement.Widen(nil, 16, nodes("a", "b", "c", "a", "b"), 3)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for v, slots := range a {
		fmt.Fprintln(&b, v, slots)
	}
	checkGolden(t, "five-nodes-three-zones.txt", b.String())
}

// checkGolden compares a plan with the one that is kept, or keeps it with -update.
func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
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
		t.Errorf("the plan changed (-want +got):\n%s", diff)
	}
}

func TestTooFewNodes(t *testing.T) {
	if _, err := placement.Widen(nil, 16, nodes("a", "b"), 3); !errors.Is(err, placement.ErrTooFewNodes) {
		t.Fatalf("error = %v", err)
	}
}

// Present slots for two replicas leave a way to be even for eight.
func TestWidenFarAhead(t *testing.T) {
	ns := nodes("a", "b", "c", "d", "a", "b", "d", "d", "b")
	wide := widen(t, widen(t, nil, 256, ns, 2), 256, ns, 8)
	for n := 1; n <= 8; n++ {
		checkShares(t, wide, ns, n, 0)
	}
}

// For any nodes and zones: the nodes of a vnode are distinct, zones are as distinct as
// they can be, nodes have their shares of the first N slots for every N, present slots
// stay, and the result is the same each time. Present slots that were not planned for so
// many can be in the way of their shares.
func TestWidenProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zones := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}), 1, 12).Draw(t, "zones")
		ns := nodes(zones...)
		narrow := rapid.IntRange(1, len(ns)).Draw(t, "narrow")
		width := rapid.IntRange(narrow, len(ns)).Draw(t, "width")
		vnodes := 1 << rapid.IntRange(4, 8).Draw(t, "bits")
		founders := rapid.IntRange(narrow, len(ns)).Draw(t, "founders")
		first := widen(t, nil, vnodes, ns[:founders], narrow)
		for n := 1; n <= narrow; n++ {
			checkShares(t, first, ns[:founders], n, 0)
		}
		if founders < len(ns) {
			first = even(t, first, ns, narrow)
		}
		a := widen(t, first, vnodes, ns, width)
		if again := widen(t, first, vnodes, ns, width); !cmp.Equal(a, again) {
			t.Fatal("the same input gives another result")
		}
		for v, slots := range a {
			if len(slots) != width || !slices.Equal(slots[:narrow], first[v]) {
				t.Fatalf("vnode %d: present slots %v became %v", v, first[v], slots)
			}
		}
		var uses []int
		for n := narrow; n <= width; n++ {
			uses = append(uses, n)
			switch {
			case founders < len(ns): // it depends on what moved
			case width <= 5:
				checkShares(t, a, ns, n, 0)
			default:
				checkShares(t, a, ns, n, 1)
			}
		}
		checkZones(t, a, ns, uses)
	})
}

func widen(t rapid.TB, current placement.Assignment, vnodes int, nodes []placement.Node, width int) placement.Assignment {
	t.Helper()
	a, err := placement.Widen(current, vnodes, nodes, width)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A ring of a thousand nodes with 65,536 vnodes is formed, and N of a namespace grows
// there, within seconds; also where present slots are far from even.
func TestWidenScales(t *testing.T) {
	if testing.Short() {
		t.Skip("plans 327,680 slots twice")
	}
	ns := manyNodes()
	for _, uneven := range []bool{false, true} {
		founders := ns
		if uneven {
			founders = ns[:750]
		}
		began := time.Now()
		narrow := widen(t, nil, 1<<16, founders, 3)
		formed := time.Since(began)
		if uneven { // other nodes take half of what a third of them have
			for v, slots := range narrow {
				for s, n := range slots {
					if n <= 250 && v%2 == 0 {
						slots[s] = n + 750
					}
				}
			}
		}
		began = time.Now()
		wide := widen(t, narrow, 1<<16, ns, 5)
		t.Logf("formed in %s, widened in %s", formed, time.Since(began))
		checkZones(t, wide, ns, []int{3, 4, 5})
		for n := 1; n <= 5 && !uneven; n++ {
			checkShares(t, wide, ns, n, 0)
		}
		// Many nodes share the work of a lost one.
		peers := map[uint64]bool{}
		for _, slots := range narrow {
			if slices.Contains(slots, 17) {
				for _, n := range slots {
					peers[n] = true
				}
			}
		}
		if len(peers) < 100 {
			t.Errorf("node 17 shares vnodes with %d nodes", len(peers)-1)
		}
	}
}

// manyNodes returns a thousand nodes in five zones.
func manyNodes() []placement.Node {
	var zones []string
	for i := range 1000 {
		zones = append(zones, string(rune('a'+i%5)))
	}
	return nodes(zones...)
}
