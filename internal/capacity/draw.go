package capacity

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// narrowest bounds the width of a drawing.
	narrowest = 40
	// gutter is left of the charts, for their scale.
	gutter = 10
	// mostEvents is how many decisions a drawing explains.
	mostEvents = 20
)

// eighths are blocks by how full they are.
var eighths = []rune(" ▁▂▃▄▅▆▇█")

// Draw draws load, nodes and CPU over time, with a mark where something was decided, and explains that
// below. It is that many columns wide, 40 at least.
func (r *Run) Draw(width int) string {
	width = max(width, narrowest)
	columns := width - gutter
	load, nodes, cpu, marks := r.columns(columns)
	var b strings.Builder
	b.WriteString(chart("load", load, 4, number))
	b.WriteString(chart("nodes", nodes, 4, number))
	b.WriteString(chart("cpu", cpu, 3, percent))
	row := func(label string, cells []rune) { b.WriteString(scaled(label, cells)) }
	if slices.Contains(marks.above, '!') {
		row("> target", marks.above)
	}
	row("", marks.actions)
	last := r.Steps[len(r.Steps)-1].At
	from, to := clock(r.Steps[0].At), clock(last)
	fmt.Fprintf(&b, "%*s%s%*s\n\n", gutter, "", from, columns-len(from), to)
	r.explain(&b, width)
	return b.String()
}

// markRows are the rows below the charts.
type markRows struct{ above, actions []rune }

// columns sums up the steps of each column: the most load, CPU and nodes.
func (r *Run) columns(n int) (load, nodes, cpu []float64, marks markRows) {
	load, nodes, cpu = make([]float64, n), make([]float64, n), make([]float64, n)
	marks = markRows{[]rune(strings.Repeat(" ", n)), []rune(strings.Repeat(" ", n))}
	column := func(t time.Duration) int { return min(int(r.stretch(t)*float64(n)), n-1) }
	filled := -1
	for _, s := range r.Steps {
		c := column(s.At)
		load[c], nodes[c], cpu[c] = max(load[c], s.Load), max(nodes[c], float64(s.Nodes)), max(cpu[c], s.CPU)
		if s.Above {
			marks.above[c] = '!'
		}
		for filled++; filled < c; filled++ { // fewer steps than columns
			load[filled], nodes[filled], cpu[filled] = s.Load, float64(s.Nodes), s.CPU
		}
		filled = c
	}
	for _, e := range r.Events {
		mark := '▲'
		if e.Decision.Action == Down {
			mark = '▼'
		}
		if at := &marks.actions[column(e.At)]; *at != ' ' && *at != mark {
			*at = '◆'
		} else {
			*at = mark
		}
	}
	return load, nodes, cpu, marks
}

// chart draws values as columns of blocks, as many rows high, from 0 to the most.
func chart(name string, values []float64, rows int, text func(float64) string) string {
	most := slices.Max(values)
	var b strings.Builder
	for row := rows - 1; row >= 0; row-- {
		cells := make([]rune, len(values))
		for i, v := range values {
			full := 0.0
			if most > 0 {
				full = v/most*float64(rows) - float64(row)
			}
			cells[i] = eighths[int(min(max(full, 0), 1)*8+0.5)]
		}
		label := ""
		switch row {
		case rows - 1:
			label = text(most)
		case 0:
			label = name
		}
		b.WriteString(scaled(label, cells))
	}
	return b.String()
}

// scaled writes a row with its label.
func scaled(label string, cells []rune) string {
	if len(label) > gutter-1 {
		label = label[:gutter-1]
	}
	return strings.TrimRight(fmt.Sprintf("%*s %s", gutter-1, label, string(cells)), " ") + "\n"
}

// explain lists the decisions and what the run comes to.
func (r *Run) explain(b *strings.Builder, width int) {
	for i, e := range r.Events {
		if i == mostEvents {
			fmt.Fprintf(b, "… and %s\n", count(len(r.Events)-i, "further decision", "", ""))
			break
		}
		mark := "▲"
		if e.Decision.Action == Down {
			mark = "▼"
		}
		head := fmt.Sprintf("%s %s %d → %d  ", clock(e.At), mark, e.Nodes, e.Decision.Desired)
		wrap(b, head, e.Decision.Why, width)
	}
	s := r.Summary
	if len(r.Events) == 0 {
		b.WriteString("nothing was decided\n")
	}
	b.WriteString("\n")
	wrap(b, "", fmt.Sprintf("%s (%s), %s (%s); %d to %s", count(s.Ups, "scale-up", "", ""), nodes(s.Launched),
		count(s.Downs, "scale-down", "", ""), nodes(s.Drained), s.LeastNodes, nodes(s.MostNodes)), width)
	total := r.Steps[len(r.Steps)-1].At - r.Steps[0].At
	wrap(b, "", fmt.Sprintf("above target for %s of %s; most CPU %s, fullest disk %s; %s node hours", span(s.AboveTarget), span(total),
		percent(s.MaxCPU), percent(s.MaxDisk), number(s.NodeHours)), width)
	wrap(b, "", "rules: "+r.Rules.String(), width)
}

// wrap writes text behind a head, and further lines below its beginning.
func wrap(b *strings.Builder, head, text string, width int) {
	indent := len([]rune(head))
	line, at := head, indent
	for i, word := range strings.Fields(text) {
		n := len([]rune(word))
		if i > 0 {
			if at+1+n > width {
				b.WriteString(line + "\n")
				line, at = strings.Repeat(" ", indent), indent
			} else {
				line, at = line+" ", at+1
			}
		}
		line, at = line+word, at+n
	}
	b.WriteString(line + "\n")
}

// clock writes a time since the start as hours, minutes and seconds.
func clock(d time.Duration) string {
	return fmt.Sprintf("%02d:%02d:%02d", int(d.Hours()), int(d.Minutes())%60, int(d.Seconds())%60)
}
