package chaos

import (
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/client"
)

func at(t uint64) client.Version { return client.Version{Timestamp: t, Incarnation: 1} }

// What the ledger lets pass and what it does not.
func TestLedgerJudges(t *testing.T) {
	l := newLedger(2, 3)
	put := func(key int, o outcome, v client.Version) mark {
		m := l.begin(0, key, false)
		l.end(m, o, v)
		return m
	}
	first := put(0, acked, at(10))
	second := put(0, acked, at(20))
	open := put(0, maybe, client.Version{})
	no := put(0, refused, client.Version{})
	other := put(1, acked, at(30))
	put(2, acked, at(40))
	l.end(l.begin(1, 2, true), acked, at(50))
	found := func(m mark, v client.Version) seen { return seen{true, m.value(50), v} }
	for _, c := range []struct {
		name  string
		key   int
		seen  seen
		wrong string
	}{
		{"the last", 0, found(second, at(20)), ""},
		{"one that may have been written", 0, found(open, at(25)), ""},
		{"one written twice", 0, found(first, at(26)), ""},
		{"an earlier one", 0, found(first, at(10)), "at least"},
		{"another value of the same version", 0, found(first, at(20)), "version of write"},
		{"one that was refused", 0, found(no, at(27)), "refused"},
		{"another key's", 0, found(other, at(30)), "no put of this key"},
		{"nobody's", 0, seen{true, []byte("5.1 x"), at(30)}, "nobody wrote"},
		{"no mark", 0, seen{true, []byte("x"), at(30)}, "nobody wrote"},
		{"nothing", 0, seen{}, "never deleted"},
		{"a tombstone of nobody's", 0, seen{version: at(30)}, "nobody deleted"},
		{"a delete", 2, seen{version: at(50)}, ""},
		{"a delete whose tombstone is gone", 2, seen{}, ""},
		{"a tombstone too old", 2, seen{version: at(45)}, "at least"},
	} {
		got := l.judge(c.key, l.floor(c.key), c.seen)
		if c.wrong == "" && got != "" || !strings.Contains(got, c.wrong) {
			t.Errorf("%s: %q, want %q", c.name, got, c.wrong)
		}
	}
}

// A read raises what later reads must reach.
func TestLedgerReadsAreMonotonic(t *testing.T) {
	l := newLedger(1, 1)
	a, b := l.begin(0, 0, false), l.begin(0, 0, false)
	l.end(a, acked, at(1))
	l.end(b, maybe, client.Version{})
	if wrong := l.read(0, l.floor(0), seen{true, b.value(9), at(2)}); wrong != "" {
		t.Fatal(wrong)
	}
	if wrong := l.read(0, l.floor(0), seen{true, a.value(9), at(1)}); wrong == "" {
		t.Error("a read went backwards and was not noticed")
	}
}
