package quorum_test

import (
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/quorum"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		in   string
		n    int
		need int
	}{
		{"1", 3, 1}, {"2", 5, 2}, {"15", 15, 15},
		{"one", 5, 1}, {"quorum", 3, 2}, {"quorum", 4, 3}, {"quorum", 1, 1}, {"all", 5, 5},
		{"40%", 5, 2}, {"41%", 5, 3}, {"1%", 5, 1}, {"100%", 5, 5}, {"50%", 3, 2}, {"67%", 3, 3}, {"66%", 3, 2}, {"1%", 1, 1},
	} {
		s, err := quorum.Parse(tc.in)
		if err != nil {
			t.Errorf("Parse(%q): %v", tc.in, err)
			continue
		}
		if got := s.Need(tc.n); got != tc.need {
			t.Errorf("%q of %d needs %d, want %d", tc.in, tc.n, got, tc.need)
		}
		if s.String() != tc.in {
			t.Errorf("%q is written %q", tc.in, s)
		}
	}
	for _, bad := range []string{"0", "-1", "+1", "16", "0%", "101%", "-1%", "+5%", "abc", "%", "4.5%", "2 ", " 2", "ALL", "40%%", "99999999999999999999"} {
		if s, err := quorum.Parse(bad); err == nil {
			t.Errorf("Parse(%q) = %v, want an error", bad, s)
		}
	}
	if s, err := quorum.Parse(""); err != nil || !s.IsZero() {
		t.Errorf("Parse of nothing = %v, %v", s, err)
	}
}

func TestCheckAndWarning(t *testing.T) {
	parse := func(s string) quorum.Spec {
		q, err := quorum.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	if parse("4").Check(3) == nil || parse("3").Check(3) != nil || quorum.All.Check(1) != nil {
		t.Error("a count above N, and nothing else, is refused")
	}
	for s, warns := range map[string]bool{"67%": true, "66%": false, "100%": false, "3": false, "all": false} {
		if got := parse(s).Warning(3) != ""; got != warns {
			t.Errorf("warning for %s of 3: %v", s, got)
		}
	}
	if parse("40%").Warning(1) != "" {
		t.Error("with one replica there is nothing to warn of")
	}
}

func TestStrengthOf(t *testing.T) {
	for _, tc := range []struct {
		n, w, r int
		want    quorum.Strength
	}{
		{3, 2, 2, quorum.Strong},
		{3, 3, 1, quorum.StrongWhileNotReplaced},
		{3, 1, 3, quorum.StrongWhileNotReplaced},
		{3, 2, 1, quorum.Eventual},
		{5, 2, 2, quorum.Eventual},
		{5, 3, 3, quorum.Strong},
		{4, 2, 3, quorum.StrongWhileNotReplaced},
		{1, 1, 1, quorum.Strong},
	} {
		if got := quorum.StrengthOf(tc.n, tc.w, tc.r); got != tc.want {
			t.Errorf("N=%d W=%d R=%d is %s, want %s", tc.n, tc.w, tc.r, got, tc.want)
		}
	}
}

// need(p, N) = clamp(ceil(p·N/100), 1, N).
func TestPercentNeed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.IntRange(1, 100).Draw(t, "percent")
		n := rapid.IntRange(1, quorum.MaxN).Draw(t, "n")
		s, err := quorum.Parse(strconv.Itoa(p) + "%")
		if err != nil {
			t.Fatal(err)
		}
		need := s.Need(n)
		if need < 1 || need > n || need*100 < p*n || (need > 1 && (need-1)*100 >= p*n) {
			t.Fatalf("%d%% of %d needs %d", p, n, need)
		}
	})
}

func TestCounter(t *testing.T) {
	slots := []quorum.Slot{
		{Write: [2]uint64{1}, Read: 1},
		{Write: [2]uint64{2, 4}, Read: 2}, // moving from 2 to 4
		{Write: [2]uint64{3}, Read: 3},
	}
	c := quorum.NewCounter(slots, quorum.Goals{{N: len(slots), Need: 2}})
	for _, step := range []struct {
		node    uint64
		reached bool
		acked   int
	}{
		{4, false, 0}, // half of the moving slot
		{9, false, 0}, // a stranger
		{1, false, 1},
		{1, false, 1}, // again
		{2, true, 2},  // completes the moving slot
		{3, false, 3}, // beyond the quorum
	} {
		if got := c.Ack(step.node); got != step.reached || c.Acked() != step.acked {
			t.Fatalf("ack of %d: reached %v with %d slots, want %v with %d", step.node, got, c.Acked(), step.reached, step.acked)
		}
	}
	if !c.Reached() {
		t.Error("the quorum is not reached")
	}
}

func TestLiveSlots(t *testing.T) {
	slots := []quorum.Slot{{Write: [2]uint64{1}}, {Write: [2]uint64{2, 4}}, {Write: [2]uint64{3}}, {}}
	dead := map[uint64]bool{4: true}
	if got := quorum.LiveSlots(slots, func(n uint64) bool { return !dead[n] }); got != 2 {
		t.Errorf("%d live slots, want 2: a moving slot with a dead node cannot acknowledge", got)
	}
}
