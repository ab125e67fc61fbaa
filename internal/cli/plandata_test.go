package cli

import (
	"slices"
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// holdsOf says what the nodes of a ring hold: so many bytes in each vnode.
func holdsOf(top *topology.Topology, bytes func(vnode int) uint64) ringUse {
	out := ringUse{}
	for v := range top.Ring {
		for _, s := range top.Ring[v].Slots {
			if out[s.Node] == nil {
				out[s.Node] = &nodeUse{incarnation: s.Node}
			}
			out[s.Node].vnodes = append(out[s.Node].vnodes, &adminv1.VnodeUse{NamespaceId: 1, Vnode: uint32(v), Bytes: bytes(v)})
		}
	}
	return out
}

func TestPlanWeighted(t *testing.T) {
	top := ringOf(t, "z", "z", "z", "z")
	on1 := func(v int) bool {
		return slices.ContainsFunc(top.Ring[v].Slots, func(s topology.Slot) bool { return s.Node == 1 })
	}
	holds := holdsOf(top, func(v int) uint64 {
		if on1(v) {
			return 3<<20 + uint64(v)<<10
		}
		return 1<<20 + uint64(v)<<10
	})
	plan := func(strategy string) *planDoc {
		t.Helper()
		d, err := planRing(top, planRequest{strategy: strategy, steps: true}, holds)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := plan("weighted")
	if d.Data.Before.MaxOverMean < 1.1 || d.Data.After.MaxOverMean > 1.01 || d.Data.After.Deviation > d.Data.Before.Deviation/10 {
		t.Errorf("data %+v", d.Data)
	}
	sum := uint64(0)
	for _, n := range d.Nodes {
		sum += *n.BytesAfter
	}
	if sum != d.Data.Bytes || *d.Bytes == 0 || *d.Bytes > d.Data.Bytes/10 {
		t.Errorf("%d bytes in all, nodes have %d, %d would move", d.Data.Bytes, sum, *d.Bytes)
	}
	last := d.Stages[len(d.Stages)-1]
	if last.MaxOverMean != d.After.MaxOverMean || *last.DataMaxOverMean != d.Data.After.MaxOverMean {
		t.Errorf("the last stage ends with %+v", last)
	}
	if d := plan("even"); len(d.Moves) != 0 {
		t.Errorf("even: %d moves", len(d.Moves))
	}
	// Nobody has to say all: one replica is enough.
	delete(holds, 1)
	if d := plan("weighted"); d.Data.After.MaxOverMean > 1.01 || len(d.Moves) == 0 {
		t.Errorf("without what node1 says: %+v", d.Data)
	}
	delete(holds, 2)
	delete(holds, 3)
	if _, err := planRing(top, planRequest{strategy: "weighted"}, holds); err == nil || !strings.Contains(err.Error(), "so they cannot be weighed: start #1, #2, #3, or use --strategy even") {
		t.Errorf("error %v", err)
	}
}

func TestRingPlanWeighted(t *testing.T) {
	f := newFake(t, 4)
	f.run("ring", "plan", "--strategy", "weighted").want(t, 4, "nobody says what is in 8 vnodes, so they cannot be weighed: start node1, node2, node3, node4, or use --strategy even")
	f.run("ring", "apply", "--strategy", "weighted", "--yes").want(t, 4, "cannot be weighed")
	f.holds()
	golden(t, "ring-plan-weighted", f.run("ring", "plan", "--add", "2", "--strategy", "weighted", "--steps").want(t, 0).stdout)
	f.spare("node5", "z2")
	f.run("ring", "apply", "--add", "node5", "--strategy", "weighted", "--yes").want(t, 0, "operation 1, add node5")
	if op := f.begun(); len(op.GetMoves()) == 0 || op.GetMoves()[0].GetTo() != 9 {
		t.Errorf("operation %v", op)
	}
}

// Stages fit on a screen, and every slot that moves is in one of them once.
func TestPlanStages(t *testing.T) {
	top := ringOf(t, "z", "z", "z")
	for _, r := range []planRequest{{add: "1", strategy: "even", steps: true}, {add: "3", strategy: "even", steps: true}} {
		d, err := planRing(top, r, nil)
		if err != nil {
			t.Fatal(err)
		}
		moves := 0
		for i, s := range d.Stages {
			moves += s.Moves
			if s.Stage != i+1 || s.Bytes != nil || s.MaxOverMean < 1 || s.Moves == 0 {
				t.Errorf("stage %+v", s)
			}
		}
		if most := topology.MovesPerNode; moves != len(d.Moves) || len(d.Stages) < 192/most/2 || d.Stages[0].Moves < most {
			t.Errorf("--add %s: %d moves in %d stages", r.add, moves, len(d.Stages))
		}
		var b strings.Builder
		d.writeStages(&b)
		if lines := strings.Count(b.String(), "\n"); lines > stageLines+5 {
			t.Errorf("%d lines", lines)
		}
		for _, want := range map[string][]string{"1": {"\n6 ", "a vnode has one move\n"}, "3": {"\n5 ", "a vnode has up to 2 moves, one after the other"}}[r.add] {
			if !strings.Contains(b.String(), want) {
				t.Errorf("--add %s: no %q in %s", r.add, want, b.String())
			}
		}
	}
	many := &planDoc{Stages: make([]stageDoc, 41)}
	for i := range many.Stages {
		many.Stages[i].Stage = i + 1
	}
	var b strings.Builder
	many.writeStages(&b)
	if !strings.Contains(b.String(), "\n1-3 ") || !strings.Contains(b.String(), "\n40-41 ") {
		t.Errorf("many stages: %s", b.String())
	}
	d, err := planRing(top, planRequest{add: "1", strategy: "even"}, nil)
	if err != nil || d.Stages != nil {
		t.Errorf("without --steps: %v, %v", d.Stages, err)
	}
}

// What zones force is named for each N in use, and also when nothing would move.
func TestPlanNamesForcedZones(t *testing.T) {
	top := ringOf(t, "a", "b", "c", "a")
	d, err := planRing(top, planRequest{strategy: "even"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	d.write(&b)
	if len(d.Moves) != 0 || !strings.Contains(b.String(), "nothing would move") || !strings.Contains(b.String(), "keeps the nodes of zones b and c from having what all others have") {
		t.Errorf("%s", b.String())
	}
	// Of four zones, three replicas leave a choice; four do not.
	top = ringOf(t, "a", "a", "b", "c", "d")
	if d, err = planRing(top, planRequest{strategy: "even"}, nil); err != nil || len(d.Forced) != 1 || d.Forced[0] != "a" {
		t.Errorf("N=3: forced %v, %v", d.Forced, err)
	}
}

// What a plan breaks, or leaves broken, is said.
func TestPlanViolations(t *testing.T) {
	for _, tc := range []struct {
		name   string
		zones  []string
		remove string
		change func(holds ringUse)
		want   []string
	}{
		{"none", []string{"a", "b", "c", "c"}, "node4", nil, nil},
		{"a zone less", []string{"a", "b", "c", "a"}, "node3", nil,
			[]string{"namespace default, N=3: two replicas would share a zone in 256 of 256 vnodes, now in 0: there would be nodes with slots in 2 zones"}},
		{"as few zones as now", []string{"a", "b", "a", "b"}, "node4", nil,
			[]string{"namespace default, N=3: two replicas would share a zone in 256 of 256 vnodes, now in 256: there would be nodes with slots in 2 zones"}},
		{"nobody cares for zones", []string{"z", "z", "z", "z"}, "node4", nil, nil},
		{"no room", []string{"z", "z", "z", "z"}, "node4", func(holds ringUse) { holds[2].available = 1 << 20 },
			[]string{"node2 would take in about 64.0 MiB, and its disk has 1.0 MiB free"}},
		{"room", []string{"z", "z", "z", "z"}, "node4", func(holds ringUse) { holds[2].available = 1 << 40 }, nil},
		{"silent", []string{"z", "z", "z", "z"}, "node4", func(holds ringUse) { delete(holds, 1) },
			[]string{"node1 does not answer: what moves there waits until it does"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			top := ringOf(t, tc.zones...)
			holds := holdsOf(top, func(int) uint64 { return 1 << 20 })
			if tc.change != nil {
				tc.change(holds)
			}
			d, err := planRing(top, planRequest{remove: []string{tc.remove}, strategy: "even"}, holds)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(d.Violations, tc.want) {
				t.Errorf("%q", d.Violations)
			}
			var b strings.Builder
			d.write(&b)
			for _, v := range tc.want {
				if !strings.Contains(b.String(), "\nwarning: "+v+"\n") {
					t.Errorf("%q is not shown", v)
				}
			}
		})
	}
}
