package ring_test

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/ring"
)

// The hash is frozen; these tokens are XXH64's published values and must never
// change.
func TestGoldenTokens(t *testing.T) {
	for key, want := range map[string]ring.Token{
		"":    0xef46db3751d8e999,
		"a":   0xd24ec4f1a98c6e5b,
		"abc": 0x44bc2cf5ad770999,
		"Nobody inspects the spammish repetition": 0xfbcea83c8a378bf1,
	} {
		if got := ring.TokenOf([]byte(key)); got != want {
			t.Errorf("TokenOf(%q) = %#x, want %#x", key, got, want)
		}
	}
}

func TestGoldenVnodes(t *testing.T) {
	for _, tc := range []struct {
		key  string
		q    uint32
		want uint32
	}{
		{"a", 1, 0},
		{"a", 2, 1},
		{"a", 256, 0xd2},
		{"abc", 256, 0x44},
		{"abc", 65536, 0x44bc},
	} {
		if got := ring.VnodeOf(ring.TokenOf([]byte(tc.key)), tc.q); got != tc.want {
			t.Errorf("vnode of %q of %d = %#x, want %#x", tc.key, tc.q, got, tc.want)
		}
	}
}

// The vnodes' ranges tile the ring, and VnodeOf agrees with them.
func TestRangesTileTheRing(t *testing.T) {
	for q := uint32(1); q <= ring.MaxVnodes; q *= 2 {
		next := ring.Token(0)
		for v := range q {
			first, last := ring.Range(v, q)
			if first != next || last < first {
				t.Fatalf("vnode %d of %d: range %#x to %#x, want it to begin at %#x", v, q, first, last, next)
			}
			if ring.VnodeOf(first, q) != v || ring.VnodeOf(last, q) != v {
				t.Fatalf("vnode %d of %d does not hold its own ends", v, q)
			}
			next = last + 1
		}
		if next != 0 {
			t.Fatalf("%d vnodes end at %#x", q, next)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		q := uint32(1) << rapid.IntRange(0, 16).Draw(t, "bits")
		token := ring.Token(rapid.Uint64().Draw(t, "token"))
		first, last := ring.Range(ring.VnodeOf(token, q), q)
		if token < first || token > last {
			t.Fatalf("token %#x is outside its vnode's range", token)
		}
	})
}

func TestCheckVnodes(t *testing.T) {
	for q, ok := range map[uint32]bool{0: false, 1: true, 3: false, 256: true, 65536: true, 131072: false} {
		if err := ring.CheckVnodes(q); (err == nil) != ok {
			t.Errorf("CheckVnodes(%d) = %v", q, err)
		}
	}
}
