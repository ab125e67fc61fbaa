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
	path := filepath.Join("testdata", "five-nodes-three-zones.txt")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("placement changed (-want +got):\n%s", diff)
	}
}

func TestTooFewNodes(t *testing.T) {
	if _, err := placement.Widen(nil, 16, nodes("a", "b"), 3); !errors.Is(err, placement.ErrTooFewNodes) {
		t.Fatalf("error = %v", err)
	}
}

// A plan that ends uneven is made again another way.
func TestWidenTriesAgain(t *testing.T) {
	ns := nodes("a", "b", "c", "d", "a", "b", "d", "d", "b")
	first, err := placement.Widen(nil, 256, ns, 2)
	if err != nil {
		t.Fatal(err)
	}
	wide, err := placement.Widen(first, 256, ns, 8)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 8; n++ {
		for _, z := range []string{"a", "b", "d"} {
			among := slices.DeleteFunc(slices.Clone(ns), func(n placement.Node) bool { return n.Zone != z })
			if s := spread(counts(wide, n), among); s > 1 {
				t.Errorf("first %d slots: nodes of zone %s differ by %d", n, z, s)
			}
		}
	}
}

// For any nodes and zones: the nodes of a vnode are distinct, zones are as
// distinct as they can be, nodes of one zone are within one slot of each other over
// the first N slots for every N, present slots stay, and the result is the same
// each time.
func TestWidenProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zones := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d"}), 1, 9).Draw(t, "zones")
		ns := nodes(zones...)
		narrow := rapid.IntRange(1, len(ns)).Draw(t, "narrow")
		width := rapid.IntRange(narrow, len(ns)).Draw(t, "width")
		vnodes := 1 << rapid.IntRange(7, 8).Draw(t, "bits")
		first, err := placement.Widen(nil, vnodes, ns, narrow)
		if err != nil {
			t.Fatal(err)
		}
		a, err := placement.Widen(first, vnodes, ns, width)
		if err != nil {
			t.Fatal(err)
		}
		if again, _ := placement.Widen(first, vnodes, ns, width); !cmp.Equal(a, again) {
			t.Fatal("the same input gives another result")
		}
		zoneOf, size := map[uint64]string{}, map[string]int{}
		for _, n := range ns {
			zoneOf[n.ID] = n.Zone
			size[n.Zone]++
		}
		for v, slots := range a {
			if len(slots) != width {
				t.Fatalf("vnode %d has %d slots", v, len(slots))
			}
			if !slices.Equal(slots[:narrow], first[v]) {
				t.Fatalf("vnode %d: present slots %v became %v", v, first[v], slots)
			}
			seen, used := map[uint64]bool{}, map[string]int{}
			for i, n := range slots {
				if seen[n] {
					t.Fatalf("vnode %d has node %d twice", v, n)
				}
				seen[n] = true
				used[zoneOf[n]]++
				for z, have := range used {
					for other, cap := range size {
						if have > used[other]+1 && used[other] < cap {
							t.Fatalf("vnode %d, first %d slots: %d in zone %s, %d in %s", v, i+1, have, z, used[other], other)
						}
					}
				}
			}
		}
		for n := 1; n <= width; n++ {
			c := counts(a, n)
			for z := range size {
				among := slices.DeleteFunc(slices.Clone(ns), func(n placement.Node) bool { return n.Zone != z })
				if s := spread(c, among); s > 1 {
					t.Fatalf("first %d slots: nodes of zone %s differ by %d: %v", n, z, s, c)
				}
			}
			if feasible(zones, n) && spread(c, ns) > 1 {
				t.Fatalf("first %d slots: nodes differ by %d: %v", n, spread(c, ns), c)
			}
		}
	})
}
