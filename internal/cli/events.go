package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// subjects are what events are about.
var subjects = []string{"capacity", "cluster", "health", "move", "namespace", "node", "operation", "provision", "rebalance", "recovery", "ring", "settings"}

// clusterEventDoc is an event as a document.
type clusterEventDoc struct {
	Number  uint64 `json:"number"`
	At      string `json:"at"`
	Epoch   uint64 `json:"epoch"`
	Subject string `json:"subject"`
	Name    string `json:"name"`
	What    string `json:"what"`
}

func (a *App) eventsCommand() *cobra.Command {
	var f eventFlags
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what the orchestrators saw and did, and why",
		Long: `Shows what the orchestrators agreed on, oldest first: nodes that registered, fell ill or got
well, nodes that were launched, replaced and ended, decisions on capacity, operations, and
changes of namespaces and settings. The single steps of moves are left out but with --moves.

About 1,000 events are kept. With --follow it waits for more, until Ctrl-C; with -o json each
is then a line of its own.`,
		Example: `  kvctl events
  kvctl events --follow
  kvctl events --subject health --name node3
  kvctl events --limit 0 -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.events(cmd.Context(), f) },
	}
	cmd.Flags().BoolVarP(&f.follow, "follow", "f", false, "wait for more")
	cmd.Flags().BoolVar(&f.moves, "moves", false, "show the steps of moves, too")
	cmd.Flags().StringVar(&f.subject, "subject", "", "only events about this: "+strings.Join(subjects, ", "))
	cmd.Flags().StringVar(&f.name, "name", "", "only events of this node, namespace or operation")
	cmd.Flags().IntVar(&f.limit, "limit", 50, "the newest so many; 0 for all that are kept")
	return cmd
}

type eventFlags struct {
	follow, moves bool
	subject, name string
	limit         int
}

// retryEvents is how long --follow waits when nobody answers.
const retryEvents = time.Second

func (a *App) events(ctx context.Context, f eventFlags) error {
	if f.subject != "" && !slices.Contains(subjects, f.subject) {
		return usagef("there are no events about %q: use one of %s", f.subject, strings.Join(subjects, ", "))
	}
	if f.limit < 0 {
		return usagef("--limit %d: want 0 (all) or more", f.limit)
	}
	ask := &adminv1.ListChangesRequest{Subject: f.subject, Name: f.name}
	all, err := a.changes(ctx, ask)
	if err != nil {
		return err
	}
	ask.After = lastNumber(all, 0)
	all = newest(f.shown(all), f.limit)
	if !f.follow {
		return a.printEvents(all, 0)
	}
	ask.WaitMs = uint32(a.flags.timeout.Milliseconds() / 2)
	quiet := false // nobody answers, as was said
	for {
		for _, c := range all {
			if err := a.printEvent(newClusterEventDoc(c)); err != nil {
				return err
			}
		}
		all, err = a.changes(ctx, ask)
		switch {
		case ctx.Err() != nil:
			return nil // it was told to stop
		case err == nil:
			ask.After, quiet = lastNumber(all, ask.After), false
			all = f.shown(all)
			continue
		case !quiet:
			a.warn("%v; trying again", err)
			quiet = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryEvents):
		}
	}
}

// newest returns the newest so many events, all with a limit of 0.
func newest(all []*topologyv1.Change, limit int) []*topologyv1.Change {
	if limit > 0 && len(all) > limit {
		return all[len(all)-limit:]
	}
	return all
}

// printEvents prints the newest so many events.
func (a *App) printEvents(all []*topologyv1.Change, limit int) error {
	docs := []clusterEventDoc{}
	for _, c := range newest(all, limit) {
		docs = append(docs, newClusterEventDoc(c))
	}
	return a.print(docs, func(w io.Writer) {
		for _, d := range docs {
			d.write(w)
		}
	})
}

func lastNumber(all []*topologyv1.Change, otherwise uint64) uint64 {
	if len(all) == 0 {
		return otherwise
	}
	return all[len(all)-1].GetNumber()
}

// shown returns the events that are asked for.
func (f eventFlags) shown(all []*topologyv1.Change) []*topologyv1.Change {
	return slices.DeleteFunc(all, func(c *topologyv1.Change) bool {
		return c.GetSubject() == topology.SubjectMove && !f.moves && f.subject != topology.SubjectMove
	})
}

func newClusterEventDoc(c *topologyv1.Change) clusterEventDoc {
	return clusterEventDoc{
		Number: c.GetNumber(), At: time.UnixMilli(int64(c.GetAtMs())).UTC().Format(time.RFC3339Nano), Epoch: c.GetEpoch(),
		Subject: c.GetSubject(), Name: c.GetName(), What: c.GetWhat(),
	}
}

// write writes an event as a line. The time is that of the place, as people compare it
// with their clocks.
func (d clusterEventDoc) write(w io.Writer) {
	at, _ := time.Parse(time.RFC3339Nano, d.At)
	of := d.Subject
	if d.Name != "" {
		of += " " + d.Name
	}
	fmt.Fprintf(w, "%s  %-18s  %s\n", at.Local().Format("2006-01-02 15:04:05"), of, d.What)
}

// printEvent prints one event of many to come.
func (a *App) printEvent(d clusterEventDoc) error {
	if a.flags.output != outputJSON {
		return a.print(d, d.write)
	}
	b, err := json.Marshal(d)
	if err == nil {
		_, err = fmt.Fprintf(a.Stdout, "%s\n", b)
	}
	if err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}
