package cli

import (
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"
)

// progress shows on stderr how far a long command has come. Its goroutine alone
// writes there while it runs, so that lines and the bar do not get mixed up.
type progress struct {
	verb string
	// total is the size of the whole in bytes, 0 if it is not known.
	total int64
	rows  atomic.Int64
	bytes atomic.Int64

	out   io.Writer
	bar   bool
	start time.Time
	// lines holds up to a few lines; beyond that, who has one waits.
	lines chan string
	stop  chan struct{}
	ended chan struct{}
}

const (
	barWidth = 24
	barEvery = 100 * time.Millisecond
	// clearLine returns to the start of a terminal's line and empties it.
	clearLine = "\r\x1b[K"
)

// startProgress starts the goroutine. end must be called.
func startProgress(out io.Writer, bar bool, verb string, total int64) *progress {
	p := &progress{
		verb: verb, total: total, out: out, bar: bar, start: time.Now(),
		lines: make(chan string, 16), stop: make(chan struct{}), ended: make(chan struct{}),
	}
	go p.run()
	return p
}

func (p *progress) run() {
	defer close(p.ended)
	var tick <-chan time.Time
	if p.bar {
		t := time.NewTicker(barEvery)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case line := <-p.lines:
			p.write(line)
		case <-tick:
			fmt.Fprint(p.out, clearLine, p.status(time.Since(p.start)))
		case <-p.stop:
			for {
				select {
				case line := <-p.lines:
					p.write(line)
				default:
					p.write("")
					return
				}
			}
		}
	}
}

// write writes a line in place of the bar.
func (p *progress) write(line string) {
	if p.bar {
		fmt.Fprint(p.out, clearLine)
	}
	if line != "" {
		fmt.Fprintln(p.out, line)
	}
}

// say writes a line to stderr. After end it does nothing.
func (p *progress) say(line string) {
	select {
	case p.lines <- line:
	case <-p.ended:
	}
}

// end removes the bar and waits until all lines are written.
func (p *progress) end() {
	close(p.stop)
	<-p.ended
}

// status is the bar.
func (p *progress) status(elapsed time.Duration) string {
	rows := p.rows.Load()
	text := fmt.Sprintf("%s rows  %s rows/s", countText(rows), rateText(perSecond(rows, elapsed)))
	if p.total <= 0 {
		return p.verb + "  " + text
	}
	share := min(float64(p.bytes.Load())/float64(p.total), 1)
	return fmt.Sprintf("%s  %s %3.0f%%  %s", p.verb, barOf(share, barWidth), share*100, text)
}

// barOf draws a share, 0 to 1, of a bar.
func barOf(share float64, width int) string {
	full := int(share*float64(width) + 0.5)
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}

func perSecond(n int64, elapsed time.Duration) float64 {
	if elapsed <= 0 {
		return 0
	}
	return float64(n) / elapsed.Seconds()
}
