package antientropy

import (
	"fmt"
	"strings"
	"testing"
)

// The collection of dead records, modelled for one key on three endpoints and
// explored in full: 0 leads. Versions are 1 (a value), 2 (a tombstone) and 3 (a
// value above the certificate's timestamp, 2).
const (
	none      = 0
	oldValue  = 1
	tombstone = 2
	newValue  = 3
	stamp     = 2
)

// round is how far the leader has come.
const (
	idle = iota
	promising
	comparing
	confirming
	certified
)

type modelState struct {
	held [3]uint8
	// accepted has a bit for each endpoint that took the tombstone, or what was newer,
	// first-hand; that is who acknowledged it.
	accepted [4]uint8
	issued   uint8
	promised [3]bool
	// joined is set when a record at or below the stamp came in after the promise.
	joined [3]bool
	// confirmed endpoints have said that nothing did.
	confirmed, compared [3]bool
	round               uint8
	learned             [3]bool // endpoints that know of the certificate
	// flight is one repair on its way: its version, 0 for none, where to, and whether
	// it left before the certificate.
	flight, to uint8
	old        bool
}

// modelRules can be broken one at a time, but that grace and dates guard against the
// same.
type modelRules struct{ promise, confirm, grace, dates bool }

func (s modelState) join(i int, v uint8) modelState {
	if v == none || v <= s.held[i] || s.held[i] == none && v == tombstone && s.learned[i] {
		return s
	}
	if v <= stamp && s.promised[i] {
		s.joined[i] = true
	}
	s.held[i] = v
	return s
}

// settled joins all copies, as anti-entropy does in the end.
func (s modelState) settled() uint8 {
	s.flight = none
	for range 3 {
		for from := range 3 {
			for to := range 3 {
				s = s.join(to, s.held[from])
			}
		}
	}
	live := [3]uint8{}
	for i, v := range s.held {
		if v != tombstone {
			live[i] = v
		}
	}
	if live[0] != live[1] || live[1] != live[2] {
		return 99
	}
	return live[0]
}

// broken says what is wrong with a state, the loss of one disk included, or of the one
// record on it to bit rot.
func (s modelState) broken() string {
	for lost := -1; lost < 6; lost++ {
		c := s
		if lost >= 0 {
			c.held[lost%3], c.learned[lost%3] = none, lost >= 3 && s.learned[lost%3]
		}
		switch live := c.settled(); {
		case live == 99:
			return "replicas stay different"
		case live == oldValue && acknowledged(s.accepted[tombstone]|s.accepted[newValue]):
			return fmt.Sprintf("the deleted value is back (lost disk: %d)", lost)
		case live != newValue && acknowledged(s.accepted[newValue]):
			return fmt.Sprintf("an acknowledged value is gone (lost disk: %d)", lost)
		}
	}
	return ""
}

// acknowledged counts a write that two of three took. Only one version counts on
// its own; two halves of two writes are none, so callers pass what was acknowledged.
func acknowledged(bits uint8) bool { return bits == 3 || bits == 5 || bits == 6 || bits == 7 }

type modelStep struct {
	name string
	next modelState
}

func (s modelState) steps(rules modelRules) (out []modelStep) {
	add := func(next modelState, format string, args ...any) {
		if next != s {
			out = append(out, modelStep{fmt.Sprintf(format, args...), next})
		}
	}
	if s.issued < newValue {
		n := s
		n.issued++
		add(n, "version %d is issued", n.issued)
	}
	for v := uint8(1); v <= s.issued; v++ {
		for i := range 3 {
			if v <= stamp && s.promised[i] && rules.promise {
				continue // refused
			}
			n := s.join(i, v)
			n.accepted[v] |= 1 << i
			add(n, "first-hand %d reaches %d", v, i)
		}
	}
	if s.flight == none {
		for from := range 3 {
			for to := range 3 {
				if v := s.held[from]; v != none && from != to && v > s.held[to] {
					n := s
					n.flight, n.to, n.old = v, uint8(to), false
					add(n, "a repair of %d leaves %d for %d", v, from, to)
				}
			}
		}
	} else {
		n := s
		if stale := rules.dates && s.old && s.learned[s.to] && s.held[s.to] == none && s.flight <= stamp; !stale {
			n = s.join(int(s.to), s.flight)
		}
		n.flight, n.to, n.old = none, 0, false
		add(n, "the repair of %d reaches %d", s.flight, s.to)
	}
	switch s.round {
	case idle:
		if s.issued >= tombstone {
			n := s
			n.round = promising
			add(n, "a round begins")
		}
	case promising:
		all := true
		for i := range 3 {
			n := s
			n.promised[i] = true
			add(n, "%d promises", i)
			all = all && s.promised[i]
		}
		if all {
			n := s
			n.round = comparing
			n.compared[0] = true
			add(n, "all have promised")
		}
	case comparing:
		for i := 1; i < 3; i++ {
			if s.compared[i] {
				continue
			}
			n := s.join(0, s.held[i])
			n = n.join(i, n.held[0])
			n.compared[i] = true
			add(n, "0 and %d are compared and mended", i)
		}
		if s.compared[1] && s.compared[2] {
			n := s
			n.round = confirming
			add(n, "all have been compared")
		}
	case confirming:
		all := true
		for i := range 3 {
			if !s.joined[i] || !rules.confirm {
				n := s
				n.confirmed[i] = true
				add(n, "%d confirms", i)
			}
			all = all && s.confirmed[i]
		}
		// The leader gives up and begins anew.
		n := s
		n.round, n.compared, n.confirmed, n.joined = comparing, [3]bool{true}, [3]bool{}, [3]bool{}
		add(n, "the round is void, the next begins")
		if all {
			n := s
			n.round = certified
			n.old = s.flight != none
			add(n, "certified")
		}
	case certified:
		for i := range 3 {
			n := s
			n.learned[i] = true
			add(n, "%d learns of the certificate", i)
			if s.learned[i] && s.held[i] == tombstone && !(rules.grace && s.old) {
				n := s
				n.held[i] = none
				add(n, "%d removes its tombstone", i)
			}
		}
	}
	return out
}

// explore returns the shortest schedule that breaks an invariant, or nil.
func explore(rules modelRules) (schedule []string, states int) {
	type link struct {
		from modelState
		name string
	}
	start := modelState{}
	seen := map[modelState]link{start: {}}
	queue := []modelState{start}
	for len(queue) > 0 {
		s := queue[0]
		queue = queue[1:]
		if why := s.broken(); why != "" {
			schedule = []string{why}
			for s != start {
				schedule = append([]string{seen[s].name}, schedule...)
				s = seen[s].from
			}
			return schedule, len(seen)
		}
		for _, step := range s.steps(rules) {
			if _, ok := seen[step.next]; !ok {
				seen[step.next] = link{s, step.name}
				queue = append(queue, step.next)
			}
		}
	}
	return nil, len(seen)
}

// Invariants 1 and 5: with promises, confirmation and a guard against repairs that left
// before the certificate no schedule brings a deleted value back; without any one of
// them some schedule does.
func TestCollectionModel(t *testing.T) {
	for _, c := range []struct {
		name  string
		rules modelRules
		sound bool
	}{
		// As built there are both, which is no weaker.
		{"without dates", modelRules{promise: true, confirm: true, grace: true}, true},
		{"without grace", modelRules{promise: true, confirm: true, dates: true}, true},
		{"without promises", modelRules{confirm: true, grace: true, dates: true}, false},
		{"without confirmation", modelRules{promise: true, grace: true, dates: true}, false},
		{"with neither grace nor dates", modelRules{promise: true, confirm: true}, false},
	} {
		schedule, states := explore(c.rules)
		if sound := schedule == nil; sound != c.sound {
			t.Errorf("%s: sound is %v, want %v, in %d states\n  %s", c.name, sound, c.sound, states, strings.Join(schedule, "\n  "))
			continue
		}
		t.Logf("%s: %d states\n  %s", c.name, states, strings.Join(schedule, "\n  "))
	}
}
