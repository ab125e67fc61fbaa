package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// share writes how much of all slots some are.
func (d *planDoc) share(n int) string { return fmt.Sprintf("%.1f%%", 100*float64(n)/float64(d.Slots)) }

func (d *planDoc) write(w io.Writer) {
	// Of the data, where that is what is placed by.
	weighs := d.Strategy == "weighted" && d.Data != nil
	before := func(n plannedDoc) float64 { return float64(n.Before) / float64(d.Slots) }
	after := func(n plannedDoc) float64 { return float64(n.After) / float64(d.Slots) }
	headers := []string{"NODE", "ZONE", ">BEFORE", "", ">AFTER", ""}
	if weighs {
		before = func(n plannedDoc) float64 { return float64(*n.BytesBefore) / float64(d.Data.Bytes) }
		after = func(n plannedDoc) float64 { return float64(*n.BytesAfter) / float64(d.Data.Bytes) }
		headers = []string{"NODE", "ZONE", ">DATA BEFORE", "", ">AFTER", ""}
	}
	width := 24.0
	if d.Data != nil {
		headers = append(headers, ">DATA", ">THEN")
		width = 16
	}
	most := 0.0
	for _, n := range d.Nodes {
		most = max(most, before(n), after(n))
	}
	bar := func(part float64) string { return strings.Repeat("█", int(part/most*width+0.5)) }
	percent := func(part float64) string { return fmt.Sprintf("%.1f%%", 100*part) }
	tab := newTable(headers...)
	for _, n := range d.Nodes {
		name := n.Node
		if !n.Exists {
			name += " (to be started)"
		}
		row := []any{name, n.Zone, percent(before(n)), bar(before(n)), percent(after(n)), bar(after(n))}
		if d.Data != nil {
			row = append(row, sizeText(*n.BytesBefore), sizeText(*n.BytesAfter))
		}
		tab.add(row...)
	}
	tab.write(w)
	d.writeZones(w)
	fmt.Fprintf(w, "\nof slots max/mean %.2f, then %.2f; standard deviation %.1f, then %.1f\n", d.Before.MaxOverMean, d.After.MaxOverMean, d.Before.Deviation, d.After.Deviation)
	if d.Data != nil {
		fmt.Fprintf(w, "of data max/mean %.2f, then %.2f; standard deviation %s, then %s\n", d.Data.Before.MaxOverMean, d.Data.After.MaxOverMean,
			sizeText(uint64(d.Data.Before.Deviation)), sizeText(uint64(d.Data.After.Deviation)))
	}
	if len(d.Moves) == 0 {
		fmt.Fprintf(w, "nothing would move: strategy %s, epoch %s\n", d.Strategy, topology.EpochString(d.Epoch))
	} else {
		share := d.share(len(d.Moves))
		if d.Data != nil {
			share = percent(float64(*d.Bytes) / float64(d.Data.Bytes))
		}
		fmt.Fprintf(w, "%d of %s would move, %s of the data, in %s: strategy %s, epoch %s\n", len(d.Moves), plural(d.Slots, "slot"), share,
			plural(d.Vnodes, "vnode"), d.Strategy, topology.EpochString(d.Epoch))
		d.writeCost(w)
	}
	d.writeStages(w)
	d.writeLeave(w)
	d.writeViolations(w)
	if len(d.Forced) > 0 {
		fmt.Fprintf(w, "every vnode's replicas lie in as many zones as they can: that keeps the nodes of %s from having what all others have\n", zonesText(d.Forced))
	}
}

func (d *planDoc) writeViolations(w io.Writer) {
	for _, v := range d.Violations {
		fmt.Fprintln(w, "warning:", v)
	}
	for _, v := range d.Mended {
		fmt.Fprintln(w, "better than now:", v)
	}
}

func zonesText(zones []string) string {
	if len(zones) == 1 {
		return "zone " + zones[0]
	}
	return "zones " + strings.Join(zones[:len(zones)-1], ", ") + " and " + zones[len(zones)-1]
}
