package client

import (
	"cmp"
	"fmt"
	"time"

	"github.com/kvasirdb/kvasir/internal/hlc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Version orders the writes of a key.
type Version struct {
	// Timestamp is a hybrid logical clock's: 48 bits of milliseconds since 1970, 16
	// bits of counter.
	Timestamp uint64
	// Incarnation identifies the node that coordinated the write.
	Incarnation uint64
}

// Compare returns -1, 0 or +1 as v is lower than, equal to or greater than o.
func (v Version) Compare(o Version) int {
	return cmp.Or(cmp.Compare(v.Timestamp, o.Timestamp), cmp.Compare(v.Incarnation, o.Incarnation))
}

// IsZero reports whether v is the version of no write.
func (v Version) IsZero() bool { return v == Version{} }

// Time returns about when the version was issued.
func (v Version) Time() time.Time { return hlc.Timestamp(v.Timestamp).Time() }

// String writes a version as milliseconds.counter@incarnation.
func (v Version) String() string {
	return fmt.Sprintf("%s@%d", hlc.Timestamp(v.Timestamp), v.Incarnation)
}

func versionFromProto(v *kvv1.Version) Version {
	return Version{v.GetTimestamp(), v.GetIncarnation()}
}

// Strength is what an answer promises about reads after writes.
type Strength uint8

// From weakest to strongest.
const (
	// Eventual: a read may miss acknowledged writes.
	Eventual = Strength(kvv1.Strength_STRENGTH_EVENTUAL)
	// StrongWhileNotReplaced: reads and writes overlap, but not both are majorities.
	StrongWhileNotReplaced = Strength(kvv1.Strength_STRENGTH_STRONG_WHILE_NOT_REPLACED)
	// Strong: a read that starts after an acknowledged write sees it or a newer one.
	Strong = Strength(kvv1.Strength_STRENGTH_STRONG)
)

// String writes a strength in words.
func (s Strength) String() string {
	switch s {
	case Eventual:
		return "eventual"
	case StrongWhileNotReplaced:
		return "strong while no replica is replaced"
	case Strong:
		return "strong"
	}
	return "unknown"
}

// Receipt says what an answer rests on.
type Receipt struct {
	// Epoch of the topology the request was served in.
	Epoch uint64
	// N replicas, of which Needed had to answer and Acknowledged had when the answer
	// left.
	N, Needed, Acknowledged int
	Strength                Strength
	Version                 Version
	Vnode                   int
	// Coordinator is the name of the node that served the request.
	Coordinator string
	// Repaired is how many stale replicas a read had mended before its answer.
	Repaired int
	// TraceID is not 0 when the request was traced; see Client.Trace.
	TraceID uint64

	address string // of the coordinator
}

func receiptFromProto(r *kvv1.Receipt, address string) Receipt {
	return Receipt{
		Epoch: r.GetEpoch(), N: int(r.GetN()), Needed: int(r.GetNeeded()), Acknowledged: int(r.GetAcknowledged()),
		Strength: Strength(r.GetStrength()), Version: versionFromProto(r.GetVersion()), Vnode: int(r.GetVnode()),
		Coordinator: r.GetCoordinator(), Repaired: int(r.GetRepaired()), TraceID: r.GetTraceId(), address: address,
	}
}

// Value is the answer to a get.
type Value struct {
	Value []byte
	// ExpiresAt is zero for a value that does not expire.
	ExpiresAt time.Time
	Receipt   Receipt
}

// Record is one record of a scan.
type Record struct {
	Key, Value []byte
	Version    Version
	// ExpiresAt is zero for a value that does not expire.
	ExpiresAt time.Time
}

// Operation is one put or delete of a batch.
type Operation struct {
	Key, Value []byte
	// Delete removes the key; Value and TTL must then be empty.
	Delete bool
	// TTL is the time to live, in whole milliseconds, at least one; 0 takes the
	// namespace's default.
	TTL time.Duration
}

// Result is what became of one operation of a batch.
type Result struct {
	// Err is nil when the operation succeeded.
	Err     error
	Version Version
}

// Range says what to scan.
type Range struct {
	// Prefix and Start bound the keys: those with the prefix, from start on.
	Prefix, Start []byte
	// Limit is the most records wanted; 0 means all.
	Limit int
	// KeysOnly leaves the values out.
	KeysOnly bool
}

// Event is one entry of a request's timeline.
type Event struct {
	// At is the time since the coordinator received the request.
	At time.Duration
	// Kind is for example "sent", "acknowledged", "quorum reached", "answered", "late",
	// "failed", "hint", "stale" or "repair".
	Kind string
	// Node is the replica concerned; empty for the coordinator itself.
	Node   string
	Detail string
}

func expiry(ms uint64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(ms))
}
