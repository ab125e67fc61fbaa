package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func (a *App) operationCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "operation",
		Short: "Show and steer changes of the ring",
		Long: `Shows and steers operations: changes of the ring that take many moves, which kvctl ring
apply, node drain, node decommission and node replace begin. The orchestrators make them,
one at a time; they go on when an orchestrator, or a node, dies in the middle.`,
		Example: `  kvctl operation ls
  kvctl operation show 3 --wait
  kvctl operation abort 3`,
	}
	var wait bool
	show := &cobra.Command{
		Use:   "show ID",
		Short: "Show how far an operation has come",
		Long: `Shows how far an operation has come: each move that is under way with its phase, what has
been copied, and what it waits for.`,
		Example: `  kvctl operation show 3
  kvctl operation show 3 --wait
  kvctl operation show 3 -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := operationID(args[0])
			if err != nil {
				return err
			}
			if wait {
				return a.followOperation(cmd.Context(), id)
			}
			o, err := a.operation(cmd.Context(), id)
			if err != nil {
				return err
			}
			t, err := a.topology(cmd.Context())
			if err != nil {
				return err
			}
			d := newOperationDoc(t, o)
			return a.print(d, d.write)
		},
	}
	show.Flags().BoolVar(&wait, "wait", false, "show the progress until the end")
	cmd.AddCommand(&cobra.Command{
		Use: "ls", Short: "List the operations", Long: "Lists the operation that is under way, and those that ended last.",
		Example: "  kvctl operation ls -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.operationLs(cmd.Context()) },
	}, show)
	for _, v := range []struct {
		name, short, long string
		state             topology.OperationState
	}{
		{"pause", "Begin no further moves", "Has an operation begin no further moves. Those that are under way go on to their end.", topology.Paused},
		{"resume", "Go on with what was paused", "Goes on with an operation that was paused.", topology.Running},
		{"abort", "Take back the moves that are under way", `Ends an operation: moves that are under way are taken back, without loss, moves that are
done stay done. The ring may be uneven then: kvctl ring plan shows what would even it out.`, topology.Aborting},
	} {
		var wait bool
		c := &cobra.Command{
			Use: v.name + " ID", Short: v.short, Long: v.long, Example: "  kvctl operation " + v.name + " 3",
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.steerOperation(cmd.Context(), args[0], v.state, wait)
			},
		}
		if v.name != "pause" {
			c.Flags().BoolVar(&wait, "wait", false, "show the progress until the end")
		}
		cmd.AddCommand(c)
	}
	return cmd
}

func operationID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil || id == 0 {
		return 0, usagef("bad operation %q: want its number, see kvctl operation ls", s)
	}
	return id, nil
}

func (a *App) operations(ctx context.Context, id uint64) ([]*adminv1.ObservedOperation, error) {
	var resp *adminv1.ListOperationsResponse
	err := a.control(ctx, question{ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).ListOperations(ctx, &adminv1.ListOperationsRequest{Id: id})
		return err
	}})
	return resp.GetOperations(), err
}

func (a *App) operation(ctx context.Context, id uint64) (*adminv1.ObservedOperation, error) {
	all, err := a.operations(ctx, id)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// operationDoc is an operation as a document.
type operationDoc struct {
	ID           uint64  `json:"id"`
	Kind         string  `json:"kind"`
	Title        string  `json:"title"`
	State        string  `json:"state"`
	Moves        int     `json:"moves"`
	MovesDone    int     `json:"moves_done"`
	MovedRecords uint64  `json:"moved_records"`
	MovedBytes   uint64  `json:"moved_bytes"`
	StartedAt    string  `json:"started_at"`
	EndedAt      *string `json:"ended_at"`
	TookMs       int64   `json:"took_ms"`
	// WaitsFor is what the whole of it waits for.
	WaitsFor string        `json:"waits_for,omitempty"`
	Moving   []progressDoc `json:"moving"`
}

type progressDoc struct {
	Vnode    uint32 `json:"vnode"`
	Slot     uint32 `json:"slot"`
	From     string `json:"from"`
	To       string `json:"to"`
	Phase    string `json:"phase"`
	Records  uint64 `json:"records"`
	Bytes    uint64 `json:"bytes"`
	WaitsFor string `json:"waits_for"`
}

func newOperationDoc(t *topology.Topology, o *adminv1.ObservedOperation) *operationDoc {
	op := o.GetOperation()
	d := &operationDoc{
		ID: op.GetId(), Kind: op.GetKind(), Title: op.GetTitle(), State: topology.OperationState(op.GetState()).String(),
		Moves: len(op.GetMoves()), MovesDone: movesDone(op), MovedRecords: op.GetMovedRecords(), MovedBytes: op.GetMovedBytes(),
		StartedAt: time.UnixMilli(int64(op.GetStartedMs())).UTC().Format(time.RFC3339Nano), Moving: []progressDoc{},
	}
	end := time.Now().UnixMilli()
	if op.GetEndedMs() > 0 {
		end = int64(op.GetEndedMs())
		d.EndedAt = ptr(time.UnixMilli(end).UTC().Format(time.RFC3339Nano))
	}
	d.TookMs = max(0, end-int64(op.GetStartedMs()))
	switch op.GetKind() {
	case topology.KindReplicas:
		d.Moves, d.MovesDone = replicaSteps(t, op)
	case topology.KindQuorums:
		d.Moves, d.MovesDone = quorumSteps(t, op)
	}
	for _, p := range o.GetMoving() {
		m := p.GetMove()
		if m.GetTo() == 0 {
			d.WaitsFor = p.GetWaitsFor()
			continue
		}
		d.Moving = append(d.Moving, progressDoc{
			m.GetVnode(), m.GetSlot(), t.NodeName(m.GetFrom()), t.NodeName(m.GetTo()), topology.Phase(p.GetPhase()).String(),
			p.GetRecords(), p.GetBytes(), p.GetWaitsFor(),
		})
	}
	return d
}

// replicaSteps returns by how much N changes in all, and has changed.
func replicaSteps(t *topology.Topology, op *topologyv1.Operation) (all, done int) {
	from, to := int(op.GetFromN()), int(op.GetTargetN())
	all = max(to-from, from-to)
	ns := t.NamespaceByID(op.GetNamespaceId())
	switch {
	case topology.OperationState(op.GetState()) == topology.Done:
		return all, all
	case ns == nil:
		return all, 0
	}
	return all, min(all, max(ns.N-from, from-ns.N))
}

// quorumSteps returns how many steps a change of W and R takes in all, and has taken.
func quorumSteps(t *topology.Topology, op *topologyv1.Operation) (all, done int) {
	all = 3
	ns := t.NamespaceByID(op.GetNamespaceId())
	switch {
	case topology.OperationState(op.GetState()) == topology.Done:
		return all, all
	case ns == nil || ns.AlsoN == 0:
		return all, 0
	case ns.W.String() == op.GetTargetWriteQuorum() && ns.R.String() == op.GetTargetReadQuorum():
		return all, 2
	}
	return all, 1
}

// ofNamespace reports whether operations of a kind change a namespace: what they copied
// is not kept.
func ofNamespace(kind string) bool {
	return kind == topology.KindReplicas || kind == topology.KindQuorums
}

func movesDone(op *topologyv1.Operation) (n int) {
	for _, m := range op.GetMoves() {
		if m.GetDone() {
			n++
		}
	}
	return n
}

// steps names what an operation consists of.
func (d *operationDoc) steps() string {
	switch d.Kind {
	case topology.KindReplicas:
		return "replicas"
	case topology.KindQuorums:
		return "steps"
	}
	return "moves"
}

func (d *operationDoc) write(w io.Writer) {
	pairs := []string{
		"operation", fmt.Sprintf("%d, %s", d.ID, d.Kind),
		"what", d.Title,
		"state", d.State,
		d.steps(), fmt.Sprintf("%d of %d done", d.MovesDone, d.Moves),
	}
	if !ofNamespace(d.Kind) {
		pairs = append(pairs, "copied", fmt.Sprintf("%s, %s", sizeText(d.MovedBytes), plural(d.MovedRecords, "record")))
	}
	pairs = append(pairs, "took", durationText(time.Duration(d.TookMs)*time.Millisecond))
	if d.WaitsFor != "" {
		pairs = append(pairs, "waits for", d.WaitsFor)
	}
	fields(w, pairs...)
	if len(d.Moving) == 0 {
		return
	}
	fmt.Fprintln(w)
	tab := newTable(">VNODE", ">SLOT", "FROM", "TO", "PHASE", ">COPIED", "WAITS FOR")
	for _, p := range d.Moving {
		tab.add(p.Vnode, p.Slot, p.From, p.To, p.Phase, sizeText(p.Bytes), p.WaitsFor)
	}
	tab.write(w)
}

func (a *App) operationLs(ctx context.Context) error {
	all, err := a.operations(ctx, 0)
	if err != nil {
		return err
	}
	t, err := a.topology(ctx)
	if err != nil {
		return err
	}
	docs := []*operationDoc{}
	for _, o := range all {
		docs = append(docs, newOperationDoc(t, o))
	}
	return a.print(docs, func(w io.Writer) {
		if len(docs) == 0 {
			fmt.Fprintln(w, "the ring has not been changed by an operation yet")
			return
		}
		tab := newTable(">ID", "KIND", "STATE", ">MOVES", ">COPIED", ">TOOK", "WHAT")
		for _, d := range docs {
			copied := sizeText(d.MovedBytes)
			if ofNamespace(d.Kind) {
				copied = "-"
			}
			tab.add(d.ID, d.Kind, d.State, fmt.Sprintf("%d/%d", d.MovesDone, d.Moves), copied, durationText(time.Duration(d.TookMs)*time.Millisecond), d.Title)
		}
		tab.write(w)
	})
}

func (a *App) steerOperation(ctx context.Context, arg string, state topology.OperationState, wait bool) error {
	id, err := operationID(arg)
	if err != nil {
		return err
	}
	var resp *adminv1.SteerOperationResponse
	err = a.control(ctx, question{changes: true, ask: func(ctx context.Context, cc *grpc.ClientConn) (err error) {
		resp, err = adminv1.NewControlServiceClient(cc).SteerOperation(ctx, &adminv1.SteerOperationRequest{Id: id, State: topologyv1.Operation_State(state)})
		return err
	}})
	if err != nil {
		return err
	}
	return a.tellOperation(ctx, resp.GetOperation(), wait)
}

// tellOperation says what became of an operation that was begun or steered, or follows it.
func (a *App) tellOperation(ctx context.Context, op *topologyv1.Operation, wait bool) error {
	if wait {
		return a.followOperation(ctx, op.GetId())
	}
	t, err := a.topology(ctx)
	if err != nil {
		return err
	}
	d := newOperationDoc(t, &adminv1.ObservedOperation{Operation: op})
	return a.print(d, func(w io.Writer) {
		fmt.Fprintf(w, "operation %d, %s: %s; %d %s\n", d.ID, d.Title, d.State, d.Moves, d.steps())
		if !topology.OperationState(op.GetState()).Ended() {
			fmt.Fprintf(w, "follow it with: kvctl operation show %d --wait\n", d.ID)
		}
	})
}

const (
	// followEvery is how often an operation is looked at that is waited for, sayEvery how
	// often its progress is told where there is no terminal.
	followEvery = 500 * time.Millisecond
	sayEvery    = 5 * time.Second
)

// followOperation shows how far an operation has come until it ends, or is paused.
// While no orchestrator answers it waits: the operation goes on when one does.
func (a *App) followOperation(ctx context.Context, id uint64) error {
	said, speed := time.Time{}, pace{}
	for {
		o, err := a.operation(ctx, id)
		switch {
		case err != nil && exitCode(err) == exitUnavailable && ctx.Err() == nil:
			a.followed(fmt.Sprintf("waiting for the orchestrators: %s", rpc.AsError(err).Message), &said)
		case err != nil:
			a.unfollow()
			return err
		default:
			state := topology.OperationState(o.GetOperation().GetState())
			if state.Ended() || state == topology.Paused {
				a.unfollow()
				return a.endFollow(ctx, o, state)
			}
			speed.note(copiedBytes(o), movesDone(o.GetOperation()), time.Now())
			a.followed(progressText(o, &speed), &said)
		}
		select {
		case <-ctx.Done():
			a.unfollow()
			return fmt.Errorf("the operation goes on: %w", ctx.Err())
		case <-time.After(followEvery):
		}
	}
}

// endFollow prints an operation that is over, or stands still.
func (a *App) endFollow(ctx context.Context, o *adminv1.ObservedOperation, state topology.OperationState) error {
	t, err := a.topology(ctx)
	if err != nil {
		return err
	}
	d := newOperationDoc(t, o)
	if err := a.print(d, func(w io.Writer) {
		fmt.Fprintf(w, "operation %d, %s: %s after %s; %d of %d %s", d.ID, d.Title, d.State,
			durationText(time.Duration(d.TookMs)*time.Millisecond), d.MovesDone, d.Moves, d.steps())
		if !ofNamespace(d.Kind) {
			fmt.Fprintf(w, ", %s copied", sizeText(d.MovedBytes))
		}
		fmt.Fprintln(w)
	}); err != nil {
		return err
	}
	if state == topology.Aborted {
		return exitCodeError(exitError)
	}
	return nil
}

// followed shows a line of progress: in place on a terminal, else now and then.
func (a *App) followed(line string, said *time.Time) {
	switch {
	case a.ErrTerminal:
		fmt.Fprint(a.Stderr, clearLine, line)
	case time.Since(*said) >= sayEvery:
		*said = time.Now()
		fmt.Fprintln(a.Stderr, line)
	}
}

func (a *App) unfollow() {
	if a.ErrTerminal {
		fmt.Fprint(a.Stderr, clearLine)
	}
}

// pace is how fast an operation goes, by what was seen of it in the last paceWindow.
type pace struct {
	seen []copiedAt
	// moved is when something was last seen to have changed.
	moved time.Time
}

type copiedAt struct {
	bytes uint64
	done  int
	at    time.Time
}

// An operation stands still that has not changed for stillAfter: then it matters what it
// waits for, while between two steps it always waits for something.
const (
	paceWindow = 10 * time.Second
	stillAfter = 3 * time.Second
)

// note takes in how far an operation has come by now.
func (p *pace) note(bytes uint64, done int, now time.Time) {
	last := copiedAt{at: now}
	if n := len(p.seen); n > 0 {
		last = p.seen[n-1]
	}
	if len(p.seen) == 0 || last.bytes != bytes || last.done != done {
		p.moved = now
	}
	if last.bytes > bytes {
		p.seen = nil // what was taken back counts no more
	}
	p.seen = append(p.seen, copiedAt{bytes, done, now})
	for len(p.seen) > 2 && now.Sub(p.seen[1].at) >= paceWindow {
		p.seen = p.seen[1:]
	}
}

// bytesPerSecond is 0 while it is not known.
func (p *pace) bytesPerSecond() float64 {
	first, last := p.seen[0], p.seen[len(p.seen)-1]
	if span := last.at.Sub(first.at); span > 0 {
		return float64(last.bytes-first.bytes) / span.Seconds()
	}
	return 0
}

func (p *pace) still() bool { return p.seen[len(p.seen)-1].at.Sub(p.moved) >= stillAfter }

// copiedBytes is what an operation has copied, with the moves that are under way.
func copiedBytes(o *adminv1.ObservedOperation) uint64 {
	bytes := o.GetOperation().GetMovedBytes()
	for _, p := range o.GetMoving() {
		bytes += p.GetBytes()
	}
	return bytes
}

// progressText is how far an operation has come, in a line.
func progressText(o *adminv1.ObservedOperation, speed *pace) string {
	op := o.GetOperation()
	done, all, bytes := movesDone(op), len(op.GetMoves()), copiedBytes(o)
	waits := ""
	for _, p := range o.GetMoving() {
		if w := p.GetWaitsFor(); w != "" && (waits == "" || waits == "it is being filled") {
			waits = w
		}
	}
	share := 1.0
	if all > 0 {
		share = float64(done) / float64(all)
	}
	text := fmt.Sprintf("operation %d  %s  %d of %d moves  %s", op.GetId(), barOf(share, barWidth), done, all, sizeText(bytes))
	if ofNamespace(op.GetKind()) {
		text = fmt.Sprintf("operation %d  %s  %s", op.GetId(), op.GetTitle(), sizeText(bytes))
	}
	if speed.still() && waits != "" {
		return text + "  waits: " + waits
	}
	if rate := speed.bytesPerSecond(); rate > 0 {
		text += fmt.Sprintf("  %s/s", sizeText(uint64(rate)))
	}
	if elapsed := time.Since(time.UnixMilli(int64(op.GetStartedMs()))); done > 0 && done < all && elapsed > 0 {
		text += fmt.Sprintf("  about %s left", durationText((elapsed * time.Duration(all-done) / time.Duration(done)).Round(time.Second)))
	}
	return text
}
