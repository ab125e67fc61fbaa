package sim

import (
	"fmt"
	"io"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/client"
)

// Kind is what an operation does.
type Kind string

// The kinds of operations. A batch is recorded as its puts and deletes.
const (
	OpPut    Kind = "put"
	OpDelete Kind = "delete"
	OpGet    Kind = "get"
	// OpCopy reads one replica's own copy.
	OpCopy Kind = "copy"
	OpScan Kind = "scan"
	// OpReport reads a namespace on the reporting nodes.
	OpReport Kind = "report"
)

// Outcome is what a client was told.
type Outcome string

// The outcomes. A failed operation certainly did nothing; an unknown one may have,
// or may yet.
const (
	Pending  Outcome = "pending"
	OK       Outcome = "ok"
	NotFound Outcome = "not found"
	Failed   Outcome = "failed"
	Unknown  Outcome = "unknown"
)

// Place is a key of a namespace.
type Place struct{ Namespace, Key string }

func (p Place) String() string { return p.Namespace + "/" + p.Key }

// Op is one operation on one key, as its client saw it; a scan's key is its prefix.
type Op struct {
	ID     int
	Client string
	Kind   Kind
	Place
	// Value of a put; unique among all operations.
	Value string
	// TTL that a put has, given or its namespace's.
	TTL time.Duration
	// Quorum and Note are what was asked for, for people.
	Quorum, Note string
	// Retried is set when the client may have written it more than once.
	Retried bool
	// Unmended is set for a read that leaves stale replicas as they are.
	Unmended bool
	// Replica is the incarnation whose copy is read, Least the version that a get
	// must not fall below.
	Replica uint64
	Least   client.Version

	Invoked, Returned time.Time
	Outcome           Outcome
	Error             string
	Receipt           client.Receipt
	Found             string
	ExpiresAt         time.Time

	// seen is the version that readers found it with.
	seen client.Version
	// floors are what the checker knew of the key when the operation was invoked.
	floors   floors
	refusing refusing
	scan     map[Place]floors
}

// Violation is a broken invariant, by its number in the design.
type Violation struct {
	Invariant int
	At        time.Duration
	What      string
}

func (v Violation) String() string {
	return fmt.Sprintf("invariant %d at %s: %s", v.Invariant, v.At.Round(time.Millisecond), v.What)
}

// History is what clients did and what happened to the cluster, in order of
// invocation. It is safe for concurrent use.
type History struct {
	began time.Time
	mu    struct {
		sync.Mutex
		ops        []*Op
		events     []event
		violations []Violation
	}
}

type event struct {
	at   time.Time
	what string
}

// NewHistory returns an empty history that begins now.
func NewHistory() *History { return &History{began: time.Now()} }

// Note records something that happened to the cluster.
func (h *History) Note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.events = append(h.mu.events, event{time.Now(), fmt.Sprintf(format, args...)})
}

// add records the beginning of an operation.
func (h *History) add(op *Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	op.ID = len(h.mu.ops) + 1
	h.mu.ops = append(h.mu.ops, op)
}

// violate records a broken invariant.
func (h *History) violate(invariant int, format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := Violation{invariant, time.Since(h.began), fmt.Sprintf(format, args...)}
	h.mu.violations = append(h.mu.violations, v)
	h.mu.events = append(h.mu.events, event{time.Now(), "VIOLATION of " + v.String()})
}

// Violations returns what was found so far.
func (h *History) Violations() []Violation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Violation(nil), h.mu.violations...)
}

// Outcomes counts the operations under load by kind and outcome, and those of them
// that completed: that did what they were asked to.
func (h *History) Outcomes() (counts map[string]int, completed int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	counts = map[string]int{}
	for _, op := range h.mu.ops {
		if op.Client == finalClient {
			continue
		}
		counts[string(op.Kind)+" "+string(op.Outcome)]++
		if op.Outcome == OK || op.Outcome == NotFound {
			completed++
		}
	}
	return counts, completed
}

func (op *Op) String() string { return op.describe(time.Time{}) }

// describe writes an operation on one line; times are since began when that is set.
func (op *Op) describe(began time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "#%d %s %s %s", op.ID, op.Client, op.Kind, op.Place)
	if op.Value != "" {
		fmt.Fprintf(&b, " = %s", short(op.Value))
	}
	if op.TTL > 0 {
		fmt.Fprintf(&b, " ttl %s", op.TTL)
	}
	if op.Quorum != "" {
		fmt.Fprintf(&b, " %s", op.Quorum)
	}
	if op.Replica != 0 {
		fmt.Fprintf(&b, " of #%d", op.Replica)
	}
	if !op.Least.IsZero() {
		fmt.Fprintf(&b, " at least %s", op.Least)
	}
	if op.Note != "" {
		fmt.Fprintf(&b, " (%s)", op.Note)
	}
	fmt.Fprintf(&b, " -> %s", op.Outcome)
	if op.Found != "" {
		fmt.Fprintf(&b, " %s", short(op.Found))
	}
	if r := op.Receipt; r.N > 0 || !r.Version.IsZero() {
		fmt.Fprintf(&b, " version %s, %d of %d (needed %d), %s, epoch %d by %s", r.Version, r.Acknowledged, r.N, r.Needed, r.Strength, r.Epoch, r.Coordinator)
	}
	if op.Error != "" {
		fmt.Fprintf(&b, " [%s]", op.Error)
	}
	if !began.IsZero() {
		took := "..."
		if !op.Returned.IsZero() {
			took = op.Returned.Sub(op.Invoked).String()
		}
		return fmt.Sprintf("%12s %-10s %s", op.Invoked.Sub(began).Round(100*time.Microsecond), took, b.String())
	}
	return b.String()
}

func short(value string) string {
	if i := strings.IndexByte(value, ' '); i >= 0 {
		return value[:i]
	}
	return value
}

// Write writes the history for people: operations and events by time.
func (h *History) Write(w io.Writer) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	type line struct {
		at   time.Time
		text string
	}
	var lines []line
	for _, op := range h.mu.ops {
		lines = append(lines, line{op.Invoked, op.describe(h.began)})
	}
	for _, e := range h.mu.events {
		lines = append(lines, line{e.at, fmt.Sprintf("%12s *** %s", e.at.Sub(h.began).Round(100*time.Microsecond), e.what)})
	}
	sort.SliceStable(lines, func(i, j int) bool { return lines[i].at.Before(lines[j].at) })
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, l.text); err != nil {
			return err
		}
	}
	return nil
}
