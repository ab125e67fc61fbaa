package antientropy

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/mutant"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

const (
	// callTimeout bounds one call to a replica. The first comparison after a start
	// reads a whole vnode.
	callTimeout = 30 * time.Second
	// lotKeys and lotBytes bound what is fetched and joined at once.
	lotKeys  = 1024
	lotBytes = 512 << 10
)

// Outcome says what the comparison of two replicas found and did.
type Outcome struct {
	// Equal: they held the same records when they were asked, but for those that a
	// certificate lets go.
	Equal bool
	// Sent and Received count the records that the peer and this node lacked, or had
	// older ones of, and now have.
	Sent, Received int
	// Records is how many this node holds.
	Records uint64
}

// comparison is one comparison of this node's copy of a place with a peer's.
type comparison struct {
	r           *Repairer
	topology    *topology.Topology
	place       storage.Place
	peer        uint64
	certificate hlc.Timestamp
	readAt      hlc.Timestamp
	out         Outcome
}

// Sync compares this node's copy of a place with a peer's, and returns once both
// hold the join of the two, on disk, for all records that were there when it began.
// Errors are those of the replicas; what was mended before one stays so.
func (r *Repairer) Sync(ctx context.Context, t *topology.Topology, place storage.Place, peer uint64) (Outcome, error) {
	c := comparison{r: r, topology: t, place: place, peer: peer, readAt: r.cfg.Clock()}
	spans, err := c.narrow(ctx)
	if err != nil {
		return c.out, err
	}
	if len(spans) == 0 {
		c.out.Equal = true
		return c.out, nil
	}
	for _, s := range spans {
		if err := c.mend(ctx, s); err != nil {
			return c.out, err
		}
	}
	return c.out, nil
}

// narrow descends both trees to the leaves that differ.
func (c *comparison) narrow(ctx context.Context) ([]span, error) {
	spans := []span{{}}
	for level := storage.Root; level >= storage.Leaves; level-- {
		var next []span
		for _, s := range spans {
			differ, err := c.differ(ctx, level, s)
			if err != nil {
				return nil, err
			}
			next = append(next, differ...)
		}
		if spans = next; len(spans) == 0 {
			return nil, nil
		}
	}
	return spans, nil
}

// differ returns the parts of a stretch in which the nodes of a level differ.
func (c *comparison) differ(ctx context.Context, level int, s span) ([]span, error) {
	// The peer may know of a later certificate; then this node counts by it as well.
	theirs, err := c.nodes(ctx, c.peer, level, s)
	if err != nil {
		return nil, err
	}
	mine, err := c.nodes(ctx, c.r.cfg.Self, level, s)
	if err != nil {
		return nil, err
	}
	if level == storage.Root && len(mine) > 0 {
		c.out.Records = mine[0].GetRecords()
	}
	return differing(mine, theirs, s), nil
}

// nodes returns a replica's nodes of a level in a stretch.
func (c *comparison) nodes(ctx context.Context, node uint64, level int, s span) (nodes []*replicav1.DigestNode, err error) {
	for start := s.start; ; {
		reply, err := c.r.call(ctx, c.topology, node, &replicav1.Call{Operation: &replicav1.Call_Digest{Digest: &replicav1.Digest{
			Namespace: c.place.Namespace, Vnode: c.place.Vnode, Certificate: uint64(c.certificate), Level: uint32(level), Start: start, End: s.end,
		}}})
		if err != nil {
			return nil, err
		}
		d := reply.GetDigest()
		c.certificate = max(c.certificate, hlc.Timestamp(d.GetCertificate()))
		nodes = append(nodes, d.GetNodes()...)
		if len(d.GetNext()) == 0 {
			return nodes, nil
		}
		start = d.GetNext()
	}
}

// mend makes both copies of a stretch the join of the two.
func (c *comparison) mend(ctx context.Context, s span) error {
	if _, err := c.mendHeaders(ctx, s); err != nil {
		return err
	}
	// Mostly they are equal now. If not, somebody writes, or records with equal headers
	// differ in their bytes.
	differ, err := c.differ(ctx, storage.Leaves, s)
	if err != nil {
		return err
	}
	for _, d := range differ {
		found, err := c.mendHeaders(ctx, d)
		if err == nil && found == 0 {
			err = c.exchangeAll(ctx, d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mendHeaders finds out by headers who has the newer record of which key of a stretch,
// and brings it to the other. It returns how many keys that were.
func (c *comparison) mendHeaders(ctx context.Context, s span) (found int, err error) {
	for start := s.start; ; {
		mine, next, err := c.headers(ctx, c.r.cfg.Self, start, s.end)
		if err != nil {
			return found, err
		}
		upto := s.end
		if next != nil {
			upto = next
		}
		var theirs []*replicav1.Entry
		for from := start; ; {
			page, more, err := c.headers(ctx, c.peer, from, upto)
			if err != nil {
				return found, err
			}
			theirs, from = append(theirs, page...), more
			if more == nil {
				break
			}
			// A peer that has much more than this node: what follows is for the next lot.
			if len(theirs) >= 16*lotKeys {
				upto, next = more, more
				break
			}
		}
		for len(mine) > 0 && len(upto) > 0 && string(mine[len(mine)-1].GetKey()) >= string(upto) {
			mine = mine[:len(mine)-1]
		}
		d, err := compare(mine, theirs, c.certificate)
		if err != nil {
			return found, rpc.Errorf(codes.DataLoss, rpc.ReasonCorrupt, "record header of vnode %d: %s", c.place.Vnode, err)
		}
		found += len(d.pull) + len(d.push)
		if err := c.exchange(ctx, d); err != nil {
			return found, err
		}
		if next == nil {
			return found, nil
		}
		start = next
	}
}

// exchangeAll joins all records of a stretch both ways: those whose bytes differ have
// equal headers.
func (c *comparison) exchangeAll(ctx context.Context, s span) error {
	for _, way := range [][2]uint64{{c.peer, c.r.cfg.Self}, {c.r.cfg.Self, c.peer}} {
		for start := s.start; ; {
			entries, next, err := c.list(ctx, way[0], &replicav1.List{Start: start, End: s.end, Limit: lotKeys, LimitBytes: lotBytes})
			if err != nil {
				return err
			}
			if err := c.join(ctx, way[1], entries); err != nil {
				return err
			}
			if next == nil {
				break
			}
			start = next
		}
	}
	return nil
}

// headers returns one page of a replica's record headers, and where the next begins.
func (c *comparison) headers(ctx context.Context, node uint64, start, end []byte) ([]*replicav1.Entry, []byte, error) {
	return c.list(ctx, node, &replicav1.List{Start: start, End: end, HeaderOnly: true, Limit: lotKeys})
}

// list asks a replica for records; next is where the rest of the stretch begins.
func (c *comparison) list(ctx context.Context, node uint64, op *replicav1.List) (entries []*replicav1.Entry, next []byte, err error) {
	op.Namespace, op.Vnode = c.place.Namespace, c.place.Vnode
	reply, err := c.r.call(ctx, c.topology, node, &replicav1.Call{Operation: &replicav1.Call_List{List: op}})
	if err != nil {
		return nil, nil, err
	}
	entries = reply.GetList().GetEntries()
	size := 0
	for _, e := range entries {
		size += len(e.GetKey()) + len(e.GetRecord())
	}
	if reply.GetList().GetTruncated() && len(entries) > 0 {
		next = append(append([]byte(nil), entries[len(entries)-1].GetKey()...), 0)
	}
	return entries, next, c.r.pace(ctx, size)
}

// exchange fetches what the peer has newer and brings it what this node has newer.
func (c *comparison) exchange(ctx context.Context, d keyDiff) error {
	received, err := c.move(ctx, c.peer, c.r.cfg.Self, d.pull)
	c.out.Received += received
	c.r.mended(0, received)
	if err != nil {
		return err
	}
	sent, err := c.move(ctx, c.r.cfg.Self, c.peer, d.push)
	c.out.Sent += sent
	c.r.mended(sent, 0)
	return err
}

// move joins one replica's records of some keys into another's.
func (c *comparison) move(ctx context.Context, from, to uint64, keys [][]byte) (moved int, err error) {
	for len(keys) > 0 {
		entries, next, err := c.list(ctx, from, &replicav1.List{Keys: keys[:min(lotKeys, len(keys))], LimitBytes: lotBytes})
		if err != nil {
			return moved, err
		}
		if err := c.join(ctx, to, entries); err != nil {
			return moved, err
		}
		moved += len(entries)
		taken := min(lotKeys, len(keys))
		if next != nil { // keys that were skipped are those that are gone
			last := string(entries[len(entries)-1].GetKey())
			for taken = 0; string(keys[taken]) != last; taken++ {
			}
			taken++
		}
		keys = keys[taken:]
	}
	return moved, nil
}

// join has a replica join records, and returns when they are on its disk.
func (c *comparison) join(ctx context.Context, node uint64, entries []*replicav1.Entry) error {
	if mutant.On("expired-revived-by-repair") || mutant.On("repair-skips-tombstones") {
		entries = mutated(entries)
	}
	if len(entries) == 0 {
		return nil
	}
	_, err := c.r.call(ctx, c.topology, node, &replicav1.Call{Operation: &replicav1.Call_Apply{Apply: &replicav1.Apply{
		Namespace: c.place.Namespace, Vnode: c.place.Vnode, Source: replicav1.Source_SOURCE_REPAIR, Entries: entries,
		ReadAt: uint64(c.readAt), Certificate: uint64(c.certificate),
	}}})
	return err
}

// call makes a call to a replica, this node's own included, and waits for the reply.
func (r *Repairer) call(ctx context.Context, t *topology.Topology, node uint64, call *replicav1.Call) (*replicav1.Reply, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	type answer struct {
		reply *replicav1.Reply
		err   error
	}
	answers := make(chan answer, 1)
	call.Epoch = t.Epoch
	if err := r.cfg.Peers.Go(node, call, deadline, func(reply *replicav1.Reply, err error) { answers <- answer{reply, err} }); err != nil {
		return nil, fmt.Errorf("%s: %w", t.NodeName(node), err)
	}
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, fmt.Errorf("%s: %w", t.NodeName(node), a.err)
		}
		return a.reply, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", t.NodeName(node), ctx.Err())
	}
}

// mutated is what a planted bug makes of records.
func mutated(entries []*replicav1.Entry) (out []*replicav1.Entry) {
	for _, e := range entries {
		rec, err := record.Decode(e.GetRecord())
		if err == nil && rec.Kind == record.Tombstone && mutant.On("repair-skips-tombstones") {
			continue
		}
		if err == nil && rec.ExpiresAt != 0 && mutant.On("expired-revived-by-repair") {
			rec.ExpiresAt = 0
			e = &replicav1.Entry{Key: e.GetKey(), Record: record.Encode(rec)}
		}
		out = append(out, e)
	}
	return out
}
