package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/placement"
	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// weights returns what each vnode holds of each namespace. It is an error when no node
// with a slot of a vnode says.
func (u ringUse) weights(t *topology.Topology) (out [][]uint64, _ error) {
	unknown := 0
	for v := range t.Ring {
		if !slices.ContainsFunc(t.Ring[v].Slots, func(s topology.Slot) bool { return u[s.Node] != nil }) {
			unknown++
		}
	}
	if unknown > 0 {
		var silent []string
		for n := range t.SlotCounts(quorum.MaxN) {
			if u[n] == nil {
				silent = append(silent, t.NodeName(n))
			}
		}
		slices.SortFunc(silent, compareNames)
		return nil, rpc.Errorf(codes.Unavailable, "USE_UNKNOWN", "nobody says what is in %s, so they cannot be weighed: start %s, or use --strategy even",
			plural(unknown, "vnode"), strings.Join(silent, ", "))
	}
	places := u.places()
	for i := range t.Namespaces {
		var of []uint64
		for v := range t.Ring {
			of = append(of, places[placeOf{t.Namespaces[i].ID, uint32(v)}])
		}
		out = append(out, of)
	}
	return out, nil
}

// dataDoc says how evenly bytes are spread.
type dataDoc struct {
	Bytes  uint64      `json:"bytes"`
	Before evennessDoc `json:"before"`
	After  evennessDoc `json:"after"`
}

// dataShares sums what nodes hold before and after a plan, as far as nodes say.
type dataShares struct {
	known         bool
	size          func(vnode, slot int) uint64
	before, after map[uint64]uint64
	sum           uint64
}

func newDataShares(t *topology.Topology, holds ringUse) *dataShares {
	return &dataShares{known: len(holds) > 0, size: holds.sizes(t, uses), before: map[uint64]uint64{}, after: map[uint64]uint64{}}
}

func (s *dataShares) add(vnode, slot int, from, to uint64) {
	size := s.size(vnode, slot)
	s.before[from] += size
	s.after[to] += size
	s.sum += size
}

func (s *dataShares) of(node uint64) (before, after *uint64) {
	if !s.known {
		return nil, nil
	}
	return ptr(s.before[node]), ptr(s.after[node])
}

func (s *dataShares) doc() *dataDoc {
	if s.sum == 0 {
		return nil
	}
	return &dataDoc{s.sum, evenness(s.before), evenness(s.after)}
}

// stageDoc is a stage of a plan: moves that run side by side.
type stageDoc struct {
	Stage int     `json:"stage"`
	Moves int     `json:"moves"`
	Bytes *uint64 `json:"bytes"`
	// MaxOverMean is that of the slots after it, DataMaxOverMean that of the bytes.
	MaxOverMean     float64  `json:"max_over_mean"`
	DataMaxOverMean *float64 `json:"data_max_over_mean"`
}

// stagesOf returns the stages in which moves are made, and what each leaves the nodes with
// that have slots then or are to have some.
func stagesOf(moves []topology.Move, members []placement.Node, before map[uint64]int, data *dataShares) []stageDoc {
	slots, bytes := map[uint64]int{}, map[uint64]uint64{}
	for _, n := range members {
		slots[n.ID], bytes[n.ID] = 0, 0
	}
	for n, count := range before {
		slots[n], bytes[n] = count, data.before[n]
	}
	out := []stageDoc{}
	for i, stage := range topology.Stages(moves) {
		d := stageDoc{Stage: i + 1, Moves: len(stage)}
		sum := uint64(0)
		for _, m := range stage {
			size := data.size(int(m.Vnode), m.Slot)
			sum += size
			slots[m.From]--
			slots[m.To]++
			bytes[m.From] -= size
			bytes[m.To] += size
			if slots[m.From] == 0 && !slices.ContainsFunc(members, func(n placement.Node) bool { return n.ID == m.From }) {
				delete(slots, m.From)
				delete(bytes, m.From)
			}
		}
		d.MaxOverMean = evenness(slots).MaxOverMean
		if data.known {
			d.Bytes = &sum
		}
		if data.sum > 0 {
			d.DataMaxOverMean = ptr(evenness(bytes).MaxOverMean)
		}
		out = append(out, d)
	}
	return out
}

// stageLines is how many lines stages take at most.
const stageLines = 20

// writeStages writes the stages, several on a line where there are many.
func (d *planDoc) writeStages(w io.Writer) {
	if len(d.Stages) == 0 {
		return
	}
	fmt.Fprintln(w)
	tab := newTable("STAGE", ">MOVES", ">BYTES", ">MAX/MEAN", ">OF DATA")
	for lines := range slices.Chunk(d.Stages, (len(d.Stages)+stageLines-1)/stageLines) {
		first, last := lines[0], lines[len(lines)-1]
		name, moves, bytes := fmt.Sprint(first.Stage), 0, uint64(0)
		if len(lines) > 1 {
			name += fmt.Sprint("-", last.Stage)
		}
		for _, s := range lines {
			moves += s.Moves
			bytes += deref(s.Bytes)
		}
		size, ofData := "-", "-"
		if first.Bytes != nil {
			size = sizeText(bytes)
		}
		if last.DataMaxOverMean != nil {
			ofData = fmt.Sprintf("%.2f", *last.DataMaxOverMean)
		}
		tab.add(name, moves, size, fmt.Sprintf("%.2f", last.MaxOverMean), ofData)
	}
	tab.write(w)
	ofVnode := map[int]int{}
	most := 0
	for _, m := range d.Moves {
		ofVnode[m.Vnode]++
		most = max(most, ofVnode[m.Vnode])
	}
	fmt.Fprintf(w, "a stage's moves run side by side, at most %d into or out of a node; no slot moves twice;\na vnode has %s\n\n",
		topology.MovesPerNode, map[bool]string{true: "one move", false: fmt.Sprintf("up to %d moves, one after the other", most)}[most == 1])
}
