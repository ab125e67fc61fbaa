package quorum

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
)

// panel is a diagram of bars: one for each series in each group.
type panel struct {
	title          string
	groups, series []string
	// value returns a bar's p50 and p99 in ms.
	value func(group, series string) (p50, p99 float64)
}

// The pictures.
const (
	farPicture      = "quorum-far.svg"
	settingsPicture = "quorum-settings.svg"
	stalePicture    = "quorum-stale.svg"
)

// draw writes the pictures, of what one caller waits for and, where it is about stale
// replicas, many.
func (rs *results) draw(dir string) error {
	of := func(in *part, l load, title string, groups ...string) panel {
		return panel{title, groups, in.series, func(group, series string) (float64, float64) {
			r := rs.find(in, group, series, l)
			return median(r.P50), median(r.P99)
		}}
	}
	sizes, weights := []string{percent.name, majority.name, every.name}, []string{readHeavy.name, majority.name, writeHeavy.name}
	pictures := map[string][]panel{
		farPicture:      {of(farNear, loads[0], farNear.title, sizes...), of(farAny, loads[0], farAny.title, sizes...)},
		settingsPicture: {of(noneFar, loads[0], noneFar.title, weights...), of(farNear, loads[0], farNear.title, weights...)},
	}
	for _, l := range loads {
		pictures[stalePicture] = append(pictures[stalePicture], of(staleGets, l, staleGets.title+"; "+l.name, rs.rows(staleGets)...))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, panels := range pictures {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(picture(panels)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Measures of pictures, and the colors of series.
const (
	width, height         = 760, 280 // of a panel
	left, right, top, low = 56, 16, 60, 36
	ticks                 = 4
)

var colors = []string{"#1f6fb4", "#d9730d", "#3b8f3e"}

// picture returns panels as SVG, one below the other. A bar is pale up to p99.
func picture(panels []panel) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#222">`+"\n", width, height*len(panels))
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	text := func(x, y float64, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, s)
	}
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(0 %d)">`+"\n", i*height)
		most := 0.0
		for _, g := range p.groups {
			for _, s := range p.series {
				_, p99 := p.value(g, s)
				most = max(most, p99)
			}
		}
		step := niceStep(most / ticks)
		scale := float64(height-top-low) / (step * ticks)
		floor := float64(height - low)
		text(left, 20, "start", p.title)
		for k := range ticks + 1 {
			y := floor - float64(k)*step*scale
			fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#ccc"/>`+"\n", left, y, width-right)
			text(left-6, y+4, "end", fmt.Sprintf("%g", float64(k)*step))
		}
		for k, s := range p.series {
			x := float64(left + 130*k)
			fmt.Fprintf(&b, `<rect x="%.1f" y="30" width="10" height="10" fill="%s"/>`+"\n", x, colors[k])
			text(x+15, 40, "start", s)
		}
		text(width-right, 40, "end", "ms: p50, pale up to p99")
		group := float64(width-left-right) / float64(len(p.groups))
		bar := group * 0.8 / float64(len(p.series))
		for j, g := range p.groups {
			x := float64(left) + group*(float64(j)+0.1)
			text(x+0.4*group, floor+20, "middle", g)
			for k, s := range p.series {
				p50, p99 := p.value(g, s)
				for _, v := range []struct{ ms, opacity float64 }{{p99, 0.35}, {p50, 1}} {
					fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s" opacity="%g"/>`+"\n", x, floor-v.ms*scale, bar*0.9, v.ms*scale, colors[k], v.opacity)
				}
				text(x+0.45*bar, floor-p99*scale-4, "middle", milliseconds(p50)+", "+milliseconds(p99))
				x += bar
			}
		}
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// niceStep returns the least of 1, 2 and 5 times a power of ten that is not below a number.
func niceStep(least float64) float64 {
	if least <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(least)))
	for _, times := range []float64{1, 2, 5} {
		if times*power >= least {
			return times * power
		}
	}
	return 10 * power
}
