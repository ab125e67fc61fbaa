package chaos

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvasirdb/kvasir/client"
)

// journal writes the report, line by line, and keeps the figures.
type journal struct {
	began   time.Time
	current atomic.Pointer[window]
	mu      struct {
		sync.Mutex
		out     io.Writer
		wrongs  int
		windows []*window
	}
}

// maxWrongLines bounds what is printed of what is wrong; all is counted.
const maxWrongLines = 60

func newJournal(out io.Writer) *journal {
	j := &journal{began: time.Now()}
	j.mu.out = out
	j.enter("start")
	return j
}

// clock returns the time since the beginning, as the report has it.
func (j *journal) clock() string { return fmt.Sprintf("%6.1fs", time.Since(j.began).Seconds()) }

func (j *journal) say(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	fmt.Fprintf(j.mu.out, "%s %s\n", j.clock(), fmt.Sprintf(format, args...))
}

// wrong says what must not be. The run goes on, and fails.
func (j *journal) wrong(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.mu.wrongs++
	if j.mu.wrongs <= maxWrongLines {
		fmt.Fprintf(j.mu.out, "%s WRONG (in %s): %s\n", j.clock(), j.current.Load().name, fmt.Sprintf(format, args...))
	}
}

// count returns how many things were wrong.
func (j *journal) count() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.mu.wrongs
}

// window counts the operations that began while one state of affairs lasted.
type window struct {
	name  string
	began time.Time
	mu    struct {
		sync.Mutex
		took     time.Duration
		ok       int
		failed   map[string]int
		slowest  time.Duration
		lastOK   time.Time
		silence  time.Duration // the longest time without a success
		examples map[string]string
	}
}

// enter begins a window and ends the one before.
func (j *journal) enter(name string) *window {
	now := time.Now()
	w := &window{name: name, began: now}
	w.mu.failed, w.mu.examples, w.mu.lastOK = map[string]int{}, map[string]string{}, now
	if old := j.current.Swap(w); old != nil {
		old.mu.Lock()
		old.mu.took = now.Sub(old.began)
		old.mu.silence = max(old.mu.silence, now.Sub(old.mu.lastOK))
		old.mu.Unlock()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.mu.windows = append(j.mu.windows, w)
	return w
}

func (j *journal) window() *window { return j.current.Load() }

// note counts an operation.
func (w *window) note(took time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.slowest = max(w.mu.slowest, took)
	if err == nil {
		now := time.Now()
		w.mu.silence = max(w.mu.silence, now.Sub(w.mu.lastOK))
		w.mu.lastOK = now
		w.mu.ok++
		return
	}
	c := class(err)
	w.mu.failed[c]++
	if w.mu.examples[c] == "" {
		w.mu.examples[c] = err.Error()
	}
}

// class names the kind of a failure.
func class(err error) string {
	name := "other"
	var e *client.Error
	switch {
	case errors.Is(err, client.ErrTimeout):
		name = "timeout"
	case errors.Is(err, client.ErrUnavailable):
		name = "unavailable"
	case errors.Is(err, client.ErrOverloaded):
		name = "overloaded"
	case errors.As(err, &e):
		name = e.Code + "/" + e.Reason
	}
	if errors.Is(err, client.ErrOutcomeUnknown) {
		name += "?" // the outcome is unknown
	}
	return name
}

// line writes a window's figures.
func (w *window) line() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	failures := 0
	for _, n := range w.mu.failed {
		failures += n
	}
	s := fmt.Sprintf("%6d ok, %5d failed, %6.2f%% ok, slowest %4d ms, longest without success %4d ms",
		w.mu.ok, failures, percent(w.mu.ok, failures), w.mu.slowest.Milliseconds(), w.mu.silence.Milliseconds())
	for _, c := range slices.Sorted(maps.Keys(w.mu.failed)) {
		s += fmt.Sprintf(", %d %s", w.mu.failed[c], c)
	}
	return s
}

// sample returns an error text of each class of failures.
func (w *window) sample() (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range slices.Sorted(maps.Keys(w.mu.examples)) {
		out = append(out, c+": "+w.mu.examples[c])
	}
	return out
}

func percent(ok, failed int) float64 {
	if ok+failed == 0 {
		return 100
	}
	return 100 * float64(ok) / float64(ok+failed)
}

// sums adds up the windows of each name.
func (j *journal) sums() (names []string, sums map[string]*window, times map[string]int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	sums, times = map[string]*window{}, map[string]int{}
	for _, w := range j.mu.windows {
		sum := sums[w.name]
		if sum == nil {
			sum = &window{name: w.name}
			sum.mu.failed = map[string]int{}
			sums[w.name], names = sum, append(names, w.name)
		}
		times[w.name]++
		w.mu.Lock()
		sum.mu.took += w.mu.took
		sum.mu.ok += w.mu.ok
		sum.mu.slowest, sum.mu.silence = max(sum.mu.slowest, w.mu.slowest), max(sum.mu.silence, w.mu.silence)
		for c, n := range w.mu.failed {
			sum.mu.failed[c] += n
		}
		w.mu.Unlock()
	}
	return names, sums, times
}

// table prints the faults with their effects.
func (j *journal) table() {
	names, sums, times := j.sums()
	j.say("faults, with the operations that began during them and until one second after:")
	slices.Sort(names)
	for _, name := range names {
		j.say("  %-10s %3d times %6.1f s: %s", name, times[name], sums[name].mu.took.Seconds(), sums[name].line())
	}
}
