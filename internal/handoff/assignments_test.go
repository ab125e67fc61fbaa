package handoff

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// assignedIn returns a topology in which node 4 takes the place of node 3 on both
// vnodes, assigned in an epoch; 0: it is a spare.
func assignedIn(t *testing.T, epoch, since uint64) *topology.Topology {
	t.Helper()
	pb := ring(t).Proto()
	pb.Epoch = epoch
	for _, v := range pb.Ring {
		if v.ChangedEpoch = since; since != 0 {
			v.Slots[2] = &topologyv1.Slot{Node: 3, Incoming: 4, Phase: topologyv1.Phase_PHASE_WRITE_NEW_READ_NONE, Since: since}
		}
	}
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// A vnode is wiped once for each assignment, before anything is taken into it, also
// when the node starts again in between with whatever topology it has on disk.
func TestAssignmentsAreWipedOnce(t *testing.T) {
	fs := vfs.NewMem()
	open := func() *storage.Store {
		s, err := storage.Open(storage.Config{FS: fs, Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	defer func() { s.Close() }()
	records := func() (n int) {
		if err := s.Scan(1, []uint32{0, 1}, nil, nil, func(uint32, []byte, []byte) bool { n++; return true }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	write := func() {
		for v := range uint32(2) {
			c, err := s.Apply([]storage.Write{storage.Write{Namespace: 1, Vnode: v, Key: []byte("k"), Record: value(10)}}, nil)
			if err == nil {
				err = c.Wait()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	load := func() *Assignments {
		a, err := LoadAssignments(s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	prepare := func(a *Assignments, top *topology.Topology, want int, when string) {
		t.Helper()
		if err := a.Prepare(4, top); err != nil {
			t.Fatal(err)
		}
		if got := records(); got != want {
			t.Fatalf("%s: %d records are left, want %d", when, got, want)
		}
	}
	a := load()
	write() // of an earlier assignment
	prepare(a, assignedIn(t, 9, 0), 2, "as a spare")
	prepare(a, assignedIn(t, 10, 10), 0, "newly assigned")
	write()
	prepare(a, assignedIn(t, 12, 10), 2, "a later topology with the same assignment")
	later := assignedIn(t, 13, 10).Proto()
	for _, v := range later.GetRing() {
		v.ChangedEpoch, v.Slots[2].Phase = 13, topologyv1.Phase_PHASE_WRITE_BOTH_READ_NEW
	}
	phase, err := topology.FromProto(later)
	if err != nil {
		t.Fatal(err)
	}
	prepare(a, phase, 2, "another phase of the same assignment")
	if swept, err := a.Sweep(func(storage.Place) bool { return false }); err != nil || len(swept) != 0 {
		t.Fatalf("what is being filled was swept: %v, %v", swept, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	a = load()
	prepare(a, assignedIn(t, 11, 10), 2, "the same assignment after a restart")
	if got := a.Fillings(); len(got) != 2 || got[0].Epoch != 10 || got[0].Complete {
		t.Fatalf("fillings %+v", got)
	}
	if a.Open(1, 0, 10) {
		t.Error("a vnode is open before the barrier")
	}
	// The assignment's end is noted once a topology without it is in use.
	if err := a.Settle(4, assignedIn(t, 11, 10)); err != nil || len(a.Fillings()) != 2 {
		t.Fatalf("%v, fillings %+v", err, a.Fillings())
	}
	if err := a.Settle(4, assignedIn(t, 13, 0)); err != nil || len(a.Fillings()) != 0 {
		t.Fatalf("%v, fillings %+v", err, a.Fillings())
	}
	a = load()
	swept, err := a.Sweep(func(p storage.Place) bool { return p.Vnode == 1 })
	if want := []storage.Place{{Namespace: 1, Vnode: 0}}; err != nil || !slices.Equal(swept, want) || records() != 1 {
		t.Fatalf("swept %v, %v, %d records are left", swept, err, records())
	}
	prepare(a, assignedIn(t, 20, 20), 0, "assigned anew")
	if err := a.complete(assignment{Vnode: 0, Epoch: 20}); err != nil || !a.Open(1, 0, 20) || !load().Open(1, 0, 20) {
		t.Errorf("what is complete is open, also after a restart: %v", err)
	}
	if a.Open(1, 0, 21) {
		t.Error("what a newer topology assigns is open before it was wiped")
	}
	// The topology comes to disk after the assignment.
	write()
	a = load()
	prepare(a, assignedIn(t, 19, 10), 2, "after a crash, under an older topology that assigned it too")
	if err := a.Settle(4, assignedIn(t, 19, 0)); err != nil || a.Open(1, 0, 10) {
		t.Errorf("%v, open %v", err, a.Open(1, 0, 10))
	}
	prepare(a, assignedIn(t, 20, 20), 2, "under the topology that assigned it again")
}

// What has come is noted with what was taken in, for the one assignment, and known
// after a restart; what comes for another assignment is dropped.
func TestPulledIsNoted(t *testing.T) {
	fs := vfs.NewMem()
	s, err := storage.Open(storage.Config{FS: fs, Dir: "d", Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	load := func() *Assignments {
		a, err := LoadAssignments(s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := load()
	if err := a.Prepare(4, assignedIn(t, 10, 10)); err != nil {
		t.Fatal(err)
	}
	as := assignment{Vnode: 1, Epoch: 10}
	taken, dropped := 0, 0
	take := func(as assignment, from string, done bool) error {
		return a.take(as, 1, 2, []byte(from), done, func() error { taken++; return nil }, func() { dropped++ })
	}
	if err := take(as, "k5", false); err != nil || taken != 1 {
		t.Fatal(err)
	}
	a = load()
	if from, done := a.pulled(as, 1, 2); string(from) != "k5" || done {
		t.Errorf("after a restart %q, %v", from, done)
	}
	if from, _ := a.pulled(as, 1, 3); from != nil {
		t.Errorf("of another source %q", from)
	}
	if err := take(as, "z", true); err != nil {
		t.Fatal(err)
	}
	if _, done := a.pulled(as, 1, 2); !done {
		t.Error("the end is not noted")
	}
	if err := a.Prepare(4, assignedIn(t, 20, 20)); err != nil {
		t.Fatal(err)
	}
	if err := take(as, "k9", false); !errors.Is(err, errAssignedAnew) || dropped != 1 || taken != 2 {
		t.Errorf("for an assignment that is over: %v, %d dropped", err, dropped)
	}
	as.Epoch = 20
	if from, done := a.pulled(as, 1, 2); from != nil || done {
		t.Errorf("for the next assignment %q, %v", from, done)
	}
}
