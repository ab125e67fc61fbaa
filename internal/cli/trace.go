package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/client"
)

// traceWait is how long late replicas are waited for, traceSlack what an answer may
// take beyond that.
const (
	traceWait  = 5 * time.Second
	traceSlack = 2 * time.Second
)

// operation is what was traced.
type operation uint8

const (
	opWrite operation = iota
	opRead
)

// timeline is the course of one traced request.
type timeline struct {
	op       operation
	receipt  client.Receipt
	events   []client.Event
	complete bool
}

// timeline fetches the course of a request. One that is lost is not worth failing
// for: the answer is there.
func (a *App) timeline(ctx context.Context, c *client.Client, r client.Receipt, op operation) timeline {
	ctx, cancel := context.WithTimeout(ctx, traceWait+traceSlack)
	defer cancel()
	t := timeline{op: op, receipt: r}
	var err error
	t.events, t.complete, err = c.Trace(ctx, r, traceWait)
	if err != nil {
		a.warn("the timeline could not be had from %s: %s", r.Coordinator, err)
	}
	return t
}

// explain shows the course of a traced request that failed.
func (a *App) explain(ctx context.Context, c *client.Client, err error) {
	var e *client.Error
	if a.flags.output != outputTable || !errors.As(err, &e) || e.Receipt.TraceID == 0 {
		return
	}
	if t := a.timeline(ctx, c, e.Receipt, opWrite); len(t.events) > 0 {
		t.writeEvents(a.Stderr, "the coordinator")
		fmt.Fprintln(a.Stderr)
	}
}

func (t timeline) doc() traceDoc {
	d := traceDoc{Trace: []eventDoc{}, Complete: &t.complete}
	for _, e := range t.events {
		node := e.Node
		if node == "" {
			node = t.receipt.Coordinator
		}
		d.Trace = append(d.Trace, eventDoc{msDoc(e.At), node, strings.ReplaceAll(e.Kind, " ", "_"), e.Detail})
	}
	return d
}

// write writes the timeline for people, so that they see how a quorum works.
func (t timeline) write(w io.Writer) {
	r := t.receipt
	if len(t.events) > 0 {
		t.writeEvents(w, r.Coordinator)
	}
	letter, verb, others, fate := "W", "had the write", "other replicas", t.otherReplicas()
	if t.op == opRead {
		letter, verb, others, fate = "R", "had answered", "stale replicas", t.staleReplicas()
	}
	fmt.Fprintln(w)
	fields(w,
		"quorum", fmt.Sprintf("%s=%d of N=%d: the answer left once %s %s", letter, r.Needed, r.N, plural(r.Needed, "replica"), verb),
		others, fate,
		"strength", strengthLine(t.op, r.Strength),
		"version", fmt.Sprintf("%s, in vnode %d, epoch %d", orNone(r.Version, r.Version.IsZero()), r.Vnode, r.Epoch),
	)
	if !t.complete && len(t.events) > 0 {
		fmt.Fprintf(w, "\nsome replicas had not been heard of after %s\n", durationText(traceWait))
	}
}

// writeEvents writes what happened, a line each.
func (t timeline) writeEvents(w io.Writer, coordinator string) {
	fmt.Fprintf(w, "\ntimeline, from when %s received the request:\n\n", coordinator)
	tab := newTable(">TIME", "NODE", "WHAT", "DETAIL")
	for _, e := range t.events {
		node := e.Node
		if node == "" {
			node = "(coordinator)"
		}
		tab.add(fmt.Sprintf("%.2f ms", msDoc(e.At)), node, e.Kind, e.Detail)
	}
	tab.write(w)
}

// nodesWith counts the nodes that a kind of event happened to.
func (t timeline) nodesWith(kind string) int {
	nodes := map[string]bool{}
	for _, e := range t.events {
		if e.Kind == kind {
			nodes[e.Node] = true
		}
	}
	return len(nodes)
}

// otherReplicas tells what became of the replicas that a write did not wait for.
func (t timeline) otherReplicas() string {
	var parts []string
	for _, p := range []struct{ kind, text string }{
		{"late", "acknowledged after the answer"},
		{"failed", "did not acknowledge"},
		{"hint", "to get the write later, from a hint"},
	} {
		if n := t.nodesWith(p.kind); n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, p.text))
		}
	}
	if len(parts) == 0 {
		return "none was left to wait for"
	}
	return strings.Join(parts, "; ")
}

// staleReplicas tells what a read found stale and did about it.
func (t timeline) staleReplicas() string {
	stale, sent := t.nodesWith("stale"), t.nodesWith("repair")
	switch {
	case stale+sent == 0:
		return "none was found"
	case sent == 0:
		return fmt.Sprintf("%d found, and left as they are", stale)
	}
	return fmt.Sprintf("%d found; %d sent the newer record; %d had it before the answer left", stale, sent, t.receipt.Repaired)
}

// strengthLine says what a strength means for the one who reads or writes.
func strengthLine(op operation, s client.Strength) string {
	switch {
	case s == client.Strong && op == opWrite:
		return "strong: reads by the namespace's R from now on see this write or a newer one"
	case s == client.Strong:
		return "strong: no write that was acknowledged before the read began was missed"
	case s == client.Eventual && op == opWrite:
		return "eventual: until all replicas have it, reads by the namespace's R may miss this write"
	case s == client.Eventual:
		return "eventual: writes that these replicas do not have yet may be missing"
	}
	return s.String() + ": R+W is above N, but not both are majorities"
}

// orNone is what v reads, or none.
func orNone(v fmt.Stringer, none bool) string {
	if none {
		return "none"
	}
	return v.String()
}
