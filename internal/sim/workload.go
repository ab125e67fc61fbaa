package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/kvasirdb/kvasir/client"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Space is a namespace as the workload uses it.
type Space struct {
	Name string
	N    int
	// W and R are the default quorums, as needed slots.
	W, R int
	TTL  time.Duration
	// Hints is whether hints are kept; without them anti-entropy has the work.
	Hints bool
	// Create is set for those that the run has to make.
	Create bool
}

// Spaces returns the namespaces of a cluster of so many nodes.
func Spaces(nodes int) []Space {
	s := []Space{
		{Name: "default", N: 3, W: 2, R: 2, Hints: true},
		{Name: "brief", N: 3, W: 2, R: 2, TTL: 20 * time.Second, Hints: true, Create: true},
		{Name: "unhinted", N: 3, W: 2, R: 2, Create: true},
	}
	if nodes >= 5 {
		s = append(s,
			Space{Name: "wide", N: 5, W: 3, R: 3, Hints: true, Create: true},
			Space{Name: "lopsided", N: 5, W: 4, R: 2, Hints: true, Create: true})
	}
	return s
}

// Workload is a number of clients that each do one operation after the other.
type Workload struct {
	World   *World
	Checker *Checker
	Spaces  []Space
	Seed    uint64
	Clients int
	// Think is the mean pause between two operations of a client.
	Think time.Duration
	// Incarnations returns those of the nodes that hold data now.
	Incarnations func() []uint64
	// Conns are connections to the nodes, by name.
	Conns map[string]*grpc.ClientConn
	// Watched returns the incarnation of the node at which clients look for what they
	// have just written, or 0; Shown is called when it has shown that.
	Watched func() uint64
	Shown   func(incarnation uint64)
	// Through returns a node, and a namespace whose hot keys clients write through it, by
	// single calls that tell no epoch, as those of other languages may; or "".
	Through func() (node string, s Space, quorum string)
	// Reading returns a namespace whose hot keys clients read again and again, if any.
	Reading func() (s Space, ok bool)
	// Parted returns keys without a TTL that clients write and read through some nodes
	// only, if any.
	Parted func() *parted
	// Clearing returns a namespace whose keys a client is to delete, or "".
	Clearing func() (namespace string)

	stop    atomic.Bool
	running sync.WaitGroup
	clients []*client.Client
}

// Keys of a namespace: a few that all clients fight for, and more that they seldom
// share.
const (
	hotKeys  = 5
	wideKeys = 50
)

// finalClient is the client of the final reads.
const finalClient = "final"

// Start starts the clients.
func (l *Workload) Start() {
	for i := range l.Clients {
		name := fmt.Sprint("c", i+1)
		h := fnv.New64a()
		h.Write([]byte(name))
		u := &user{
			Workload: l, name: name, c: l.World.Client(client.WithTimeout(opTimeout)),
			rng: rand.New(rand.NewPCG(l.Seed, h.Sum64())), last: map[Place]client.Version{}, tokens: map[string]uint64{},
		}
		l.clients = append(l.clients, u.c)
		l.running.Go(u.run)
	}
}

// Stop ends the clients and waits for their operations to return.
func (l *Workload) Stop() {
	l.stop.Store(true)
	l.running.Wait()
	for _, c := range l.clients {
		c.Close()
	}
}

// opTimeout bounds one operation.
const opTimeout = 3 * time.Second

// throughTimeout bounds one that is asked of a node which may reach few others.
const throughTimeout = time.Second

// user is one client with what it draws from.
type user struct {
	*Workload
	name   string
	c      *client.Client
	rng    *rand.Rand
	writes int
	last   map[Place]client.Version // what it wrote last
	tokens map[string]uint64        // by node that it writes through
}

func (u *user) run() {
	for !u.stop.Load() {
		time.Sleep(time.Duration(u.rng.ExpFloat64() * float64(u.Think)))
		if namespace := u.Clearing(); namespace != "" {
			u.clear(namespace)
		}
		if s, ok := u.Reading(); ok {
			for p := u.hot(s); ok; _, ok = u.Reading() {
				u.get(s, p)
				time.Sleep(5 * time.Millisecond)
			}
		}
		for p := u.Parted(); p != nil; p = u.Parted() {
			switch place, write, node := p.next(u.rng); {
			case node == "":
			case write:
				u.putThrough(node, Space{}, place, "quorum")
			default:
				u.getThrough(node, place)
			}
			time.Sleep(15 * time.Millisecond)
		}
		s := u.Spaces[u.rng.IntN(len(u.Spaces))]
		switch n := u.rng.IntN(100); {
		case n < 38:
			p := u.place(s)
			u.get(s, p)
			for u.rng.IntN(3) == 0 { // reads of one client do not go back
				u.get(s, p)
			}
		case n < 46:
			u.copy(u.place(s))
		case n < 78:
			if node, s, quorum := u.Through(); node != "" && u.rng.IntN(2) == 0 {
				u.putThrough(node, s, u.hot(s), quorum)
				continue
			}
			p := u.place(s)
			u.look(s, u.put(s, p))
		case n < 86:
			p := u.place(s)
			u.look(s, u.delete(p))
		case n < 92:
			u.batch(s)
		case n < 95:
			u.scan(s)
		case n < 97:
			u.duel(u.Spaces[0])
		default:
			u.refused(s)
		}
	}
}

func (u *user) hot(s Space) Place {
	return hot(s, u.rng.IntN(hotKeys))
}

func hot(s Space, i int) Place { return Place{s.Name, fmt.Sprintf("hot/%d", i)} }

func (u *user) place(s Space) Place {
	if u.rng.IntN(2) == 0 {
		return u.hot(s)
	}
	return wide(s.Name, u.rng.IntN(wideKeys))
}

func wide(namespace string, i int) Place { return Place{namespace, fmt.Sprintf("wide/%02d", i)} }

// value returns a value that no other write has.
func (u *user) value() string {
	u.writes++
	v := fmt.Sprintf("%s.%d", u.name, u.writes)
	return v + " " + strings.Repeat("v", u.rng.IntN(200))
}

// quorum draws a quorum: mostly the namespace's default.
func (u *user) quorum(op *Op, name string, option func(string) client.CallOption) []client.CallOption {
	q := ""
	switch n := u.rng.IntN(20); {
	case n < 11:
		return nil
	case n < 13:
		q = "one"
	case n < 15:
		q = "quorum"
	case n < 16:
		q = "all"
	default:
		q = []string{"10%", "40%", "60%", "67%"}[n-16]
	}
	op.Quorum = name + "=" + q
	return []client.CallOption{option(q)}
}

func (u *user) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), opTimeout)
}

// write fills in what all writes share: mostly a write is tried once, so that it has
// one version.
func (u *user) write(op *Op) []client.CallOption {
	opts := append(u.quorum(op, "W", client.W), client.Namespace(op.Namespace))
	if op.Retried = u.rng.IntN(8) == 0; !op.Retried {
		return append(opts, client.WithoutRetries())
	}
	op.Note = "retried"
	return opts
}

// look reads what was just written: it may be somewhere only, or not on disk yet.
func (u *user) look(s Space, wrote *Op) {
	p := wrote.Place
	if n := u.Watched(); n != 0 && wrote.Outcome == OK {
		if op := u.copyAt(p, n); (op.Outcome == OK || op.Outcome == NotFound) && op.Receipt.Version.Compare(u.last[p]) >= 0 {
			u.Shown(n)
		}
	}
	if u.rng.IntN(5) == 0 {
		u.copy(p)
	}
	for range u.rng.IntN(4) {
		if wrote.Outcome == Unknown {
			u.get(s, p)
		}
	}
}

func (u *user) put(s Space, p Place) *Op {
	op := &Op{Client: u.name, Kind: OpPut, Place: p, Value: u.value(), TTL: s.TTL}
	opts := u.write(op)
	if u.rng.IntN(6) == 0 {
		op.TTL = time.Duration(500+u.rng.IntN(20_000)) * time.Millisecond
		opts = append(opts, client.TTL(op.TTL))
	}
	u.Checker.Invoke(op)
	ctx, cancel := u.context()
	defer cancel()
	r, err := u.c.Put(ctx, []byte(p.Key), []byte(op.Value), opts...)
	u.wrote(op, r, err)
	return op
}

// putThrough writes a key through a node, as a client of its own. What it is told of a
// failure is taken for nothing.
func (u *user) putThrough(node string, s Space, p Place, quorum string) {
	op := &Op{Client: u.name + "-" + node, Kind: OpPut, Place: p, Value: u.value(), TTL: s.TTL, Quorum: "W=" + quorum, Note: "through " + node}
	u.Checker.Invoke(op)
	ctx, cancel := context.WithTimeout(context.Background(), throughTimeout)
	defer cancel()
	resp, err := kvv1.NewKVServiceClient(u.Conns[node]).Put(ctx, &kvv1.PutRequest{
		Namespace: p.Namespace, Key: []byte(p.Key), Value: []byte(op.Value), WriteQuorum: quorum, Token: u.tokens[node],
	})
	u.Checker.Return(op, func() {
		if op.Outcome = OK; err != nil {
			op.Outcome, op.Error = Unknown, err.Error()
			return
		}
		op.Receipt = u.through(node, resp.GetReceipt())
	})
}

// getThrough reads a key through a node, as a client of its own.
func (u *user) getThrough(node string, p Place) {
	op := &Op{Client: u.name + "-" + node, Kind: OpGet, Place: p, Note: "through " + node}
	req := &kvv1.GetRequest{Namespace: p.Namespace, Key: []byte(p.Key), ReadQuorum: "quorum", Token: u.tokens[node]}
	if u.rng.IntN(2) == 0 { // else stale replicas may be what keeps it from an answer
		req.ReadRepair, op.Unmended = kvv1.ReadRepair_READ_REPAIR_OFF, true
		op.Note += ", no repair"
	}
	u.Checker.Invoke(op)
	ctx, cancel := context.WithTimeout(context.Background(), throughTimeout)
	defer cancel()
	resp, err := kvv1.NewKVServiceClient(u.Conns[node]).Get(ctx, req)
	u.Checker.Return(op, func() {
		if op.Outcome = Failed; err != nil {
			op.Error = err.Error()
			return
		}
		if op.Outcome = NotFound; resp.GetFound() {
			op.Outcome, op.Found = OK, string(resp.GetValue())
		}
		if ms := resp.GetExpiresAtMs(); ms != 0 {
			op.ExpiresAt = time.UnixMilli(int64(ms))
		}
		op.Receipt = u.through(node, resp.GetReceipt())
	})
}

// through converts the receipt of a node's answer, and notes what it knows of time.
func (u *user) through(node string, r *kvv1.Receipt) client.Receipt {
	u.tokens[node] = max(u.tokens[node], r.GetVersion().GetTimestamp())
	return client.Receipt{
		Epoch: r.GetEpoch(), N: int(r.GetN()), Needed: int(r.GetNeeded()), Acknowledged: int(r.GetAcknowledged()), Strength: client.Strength(r.GetStrength()),
		Version: client.Version{Timestamp: r.GetVersion().GetTimestamp(), Incarnation: r.GetVersion().GetIncarnation()}, Coordinator: r.GetCoordinator(),
	}
}

// duel writes a key that others write in the same millisecond: those of the next full
// five seconds.
func (u *user) duel(s Space) {
	now := time.Now()
	at := now.Truncate(5 * time.Second).Add(5 * time.Second)
	time.Sleep(at.Sub(now))
	u.put(s, hot(s, int(at.Unix()/5%hotKeys)))
}

func (u *user) delete(p Place) *Op {
	op := &Op{Client: u.name, Kind: OpDelete, Place: p}
	opts := u.write(op)
	u.Checker.Invoke(op)
	ctx, cancel := u.context()
	defer cancel()
	r, err := u.c.Delete(ctx, []byte(p.Key), opts...)
	u.wrote(op, r, err)
	return op
}

// clear deletes the keys of a namespace that clients seldom share.
func (u *user) clear(namespace string) {
	for i := range wideKeys {
		u.delete(wide(namespace, i))
	}
}

func (u *user) wrote(op *Op, r client.Receipt, err error) {
	u.Checker.Return(op, func() {
		op.Receipt = r
		op.Outcome, op.Error = writeOutcome(err)
	})
	if err == nil {
		u.last[op.Place] = r.Version
	}
}

func writeOutcome(err error) (Outcome, string) {
	switch {
	case err == nil:
		return OK, ""
	case errors.Is(err, client.ErrOutcomeUnknown):
		return Unknown, err.Error()
	}
	return Failed, err.Error()
}

func readOutcome(err error) (Outcome, string) {
	switch {
	case err == nil:
		return OK, ""
	case errors.Is(err, client.ErrNotFound):
		return NotFound, ""
	}
	return Failed, err.Error()
}

func (u *user) get(s Space, p Place) {
	op := &Op{Client: u.name, Kind: OpGet, Place: p}
	opts := append(u.quorum(op, "R", client.R), client.Namespace(p.Namespace))
	if v, ok := u.last[p]; ok && u.rng.IntN(4) == 0 {
		op.Least = v
		opts = append(opts, client.MinVersion(v))
	}
	if u.rng.IntN(10) == 0 {
		op.Unmended, op.Note = true, "no repair"
		opts = append(opts, client.Repair([]client.ReadRepair{client.RepairAsync, client.RepairOff}[u.rng.IntN(2)]))
	}
	u.read(op, opts)
}

// copy reads the own copy of one replica.
func (u *user) copy(p Place) {
	if all := u.Incarnations(); len(all) > 0 {
		u.copyAt(p, all[u.rng.IntN(len(all))])
	}
}

func (u *user) copyAt(p Place, replica uint64) *Op {
	op := &Op{Client: u.name, Kind: OpCopy, Place: p, Replica: replica}
	u.read(op, []client.CallOption{client.Namespace(p.Namespace), client.FromReplica(fmt.Sprint("#", replica))})
	return op
}

func (u *user) read(op *Op, opts []client.CallOption) { read(u.Checker, u.c, op, opts) }

func read(checker *Checker, c *client.Client, op *Op, opts []client.CallOption) {
	checker.Invoke(op)
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	v, err := c.Get(ctx, []byte(op.Key), opts...)
	checker.Return(op, func() {
		op.Receipt, op.Found, op.ExpiresAt = v.Receipt, string(v.Value), v.ExpiresAt
		op.Outcome, op.Error = readOutcome(err)
	})
}

// batch writes several keys at once. Each is recorded as a write of its own.
func (u *user) batch(s Space) {
	var ops []*Op
	var batch []client.Operation
	first := &Op{}
	opts := append(u.quorum(first, "W", client.W), client.Namespace(s.Name), client.WithoutRetries())
	used := map[Place]bool{}
	for range 2 + u.rng.IntN(5) {
		p := u.place(s)
		if used[p] {
			continue
		}
		used[p] = true
		op := &Op{Client: u.name, Kind: OpPut, Place: p, Quorum: first.Quorum, Note: batchNote}
		b := client.Operation{Key: []byte(p.Key)}
		if u.rng.IntN(4) == 0 {
			op.Kind, b.Delete = OpDelete, true
		} else {
			op.Value, op.TTL = u.value(), s.TTL
			b.Value = []byte(op.Value)
		}
		ops, batch = append(ops, op), append(batch, b)
	}
	for _, op := range ops {
		u.Checker.Invoke(op)
	}
	ctx, cancel := u.context()
	defer cancel()
	results, err := u.c.Batch(ctx, batch, opts...)
	need := u.need(first.Quorum, s)
	for i, op := range ops {
		r, err := client.Receipt{N: s.N, Needed: need}, err
		if err == nil {
			r.Version, err = results[i].Version, results[i].Err
		}
		u.wrote(op, r, err)
	}
}

// need is how many slots a quorum asks for, as the workload writes them.
func (u *user) need(q string, s Space) int {
	_, q, _ = strings.Cut(q, "=")
	var percent int
	switch {
	case q == "":
		return s.W
	case q == "one":
		return 1
	case q == "quorum":
		return s.N/2 + 1
	case q == "all":
		return s.N
	}
	if s.Name == changingN(u.Seed) {
		return 1 // of however many
	}
	fmt.Sscanf(q, "%d%%", &percent)
	return (percent*s.N + 99) / 100
}

// scan reads some keys of a namespace in order.
func (u *user) scan(s Space) {
	prefix := []string{"hot/", "wide/0", "wide/1", "wide/3", "wide/"}[u.rng.IntN(5)]
	op := &Op{Client: u.name, Kind: OpScan, Place: Place{s.Name, prefix}}
	u.Checker.Invoke(op)
	ctx, cancel := u.context()
	defer cancel()
	var records []client.Record
	for rec, err := range u.c.Scan(ctx, client.Range{Prefix: []byte(prefix)}, client.Namespace(s.Name)) {
		if err != nil {
			u.Checker.Return(op, func() { op.Outcome, op.Error = Failed, err.Error() })
			return
		}
		records = append(records, rec)
	}
	u.Checker.Scanned(op, records, u.scanStrength(s), func(key string) bool { return strings.HasPrefix(key, prefix) })
}

// scanStrength is what a scan is worth at least, as a default read, against the least that
// default writes need.
func (u *user) scanStrength(s Space) client.Strength {
	switch {
	case s.R+s.W <= s.N:
		return client.Eventual
	case s.R > s.N/2 && s.W > s.N/2 && s.Name != changingQuorums(u.Seed):
		return client.Strong
	}
	return client.StrongWhileNotReplaced
}

// refused asks for something that must be refused and change nothing.
func (u *user) refused(s Space) {
	p := u.place(s)
	op := &Op{Client: u.name, Kind: OpPut, Place: p, Value: u.value(), Note: "to be refused"}
	opts := []client.CallOption{client.Namespace(s.Name)}
	ctx, cancel := u.context()
	defer cancel()
	u.Checker.Invoke(op)
	var err error
	switch u.rng.IntN(3) {
	case 0:
		op.Quorum = "W=9"
		_, err = u.c.Put(ctx, []byte(p.Key), []byte(op.Value), append(opts, client.W("9"))...)
	case 1:
		again := client.Operation{Key: []byte(p.Key), Value: []byte(op.Value)}
		_, err = u.c.Batch(ctx, []client.Operation{again, again}, opts...)
	default:
		_, err = u.c.Put(ctx, []byte(p.Key), []byte(op.Value), append(opts, client.TTL(200*365*24*time.Hour))...)
	}
	u.Checker.Return(op, func() { op.Outcome, op.Error = writeOutcome(err) })
	if err == nil {
		u.Checker.h.violate(14, "an impossible request was taken: %s", op)
	}
}
