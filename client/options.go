package client

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/kvasirdb/kvasir/internal/quorum"
	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// Option configures a Client.
type Option func(*config)

type config struct {
	namespace string
	timeout   time.Duration
	patience  time.Duration
	tls       *tls.Config
	dial      rpc.Dialer
	wall      func() int64
}

// WithNamespace sets the namespace of calls that name none. Default "default".
func WithNamespace(name string) Option { return func(c *config) { c.namespace = name } }

// WithTimeout bounds calls whose context has no deadline. Default 5 s.
func WithTimeout(d time.Duration) Option { return func(c *config) { c.timeout = d } }

// WithPatience sets how long a call is tried again while every node that answers says
// that too few replicas are live: a node that restarts is back within a second or
// two. 0 asks each node once. Default 1 s.
func WithPatience(d time.Duration) Option { return func(c *config) { c.patience = d } }

// WithTLS encrypts connections and shows a certificate.
func WithTLS(t *tls.Config) Option { return func(c *config) { c.tls = t } }

// WithDialer replaces how connections are made.
func WithDialer(dial func(ctx context.Context, address string) (net.Conn, error)) Option {
	return func(c *config) { c.dial = dial }
}

// CallOption configures one call.
type CallOption func(*callConfig)

type callConfig struct {
	namespace  string
	w, r       string
	repair     ReadRepair
	ttl        time.Duration
	trace      bool
	minVersion Version
	replica    string
	noRetries  bool
	err        error
}

// Namespace names the namespace of a call.
func Namespace(name string) CallOption { return func(c *callConfig) { c.namespace = name } }

// W sets how many replicas must have a write before it is acknowledged: a count
// ("2"), a percent of the namespace's N ("40%"), "one", "quorum" or "all".
func W(q string) CallOption { return func(c *callConfig) { c.w = c.quorum(q) } }

// R sets how many replicas a read asks; it is written as W's.
func R(q string) CallOption { return func(c *callConfig) { c.r = c.quorum(q) } }

func (c *callConfig) quorum(q string) string {
	if _, err := quorum.Parse(q); err != nil && c.err == nil {
		c.err = &Error{
			Code: "InvalidArgument", Reason: "BAD_QUORUM", Message: err.Error(),
			Details: map[string]string{"value": q}, is: []error{ErrInvalidArgument},
		}
	}
	return q
}

// ReadRepair is what a read does about stale replicas.
type ReadRepair uint8

// The settings of read repair.
const (
	// RepairBlocking mends before the answer: reads never go backwards.
	RepairBlocking = ReadRepair(kvv1.ReadRepair_READ_REPAIR_BLOCKING)
	// RepairAsync answers first.
	RepairAsync = ReadRepair(kvv1.ReadRepair_READ_REPAIR_ASYNC)
	// RepairOff leaves stale replicas as they are.
	RepairOff = ReadRepair(kvv1.ReadRepair_READ_REPAIR_OFF)
)

// Repair sets what a read does about stale replicas, instead of the namespace's
// setting.
func Repair(r ReadRepair) CallOption { return func(c *callConfig) { c.repair = r } }

// TTL sets a put's time to live, in whole milliseconds; at least one.
func TTL(d time.Duration) CallOption { return func(c *callConfig) { c.ttl = d } }

// Traced keeps the timeline of a put, get or delete; see Client.Trace.
func Traced() CallOption { return func(c *callConfig) { c.trace = true } }

// MinVersion makes a get fail rather than return a record older than v: it reads a
// client's own write whatever the quorums.
func MinVersion(v Version) CallOption { return func(c *callConfig) { c.minVersion = v } }

// FromReplica reads one node's own copy, without quorum or repair. The node is given
// by its name, or by its incarnation as "#17".
func FromReplica(node string) CallOption { return func(c *callConfig) { c.replica = node } }

// WithoutRetries gives up a write at the first failure that leaves its outcome open.
func WithoutRetries() CallOption { return func(c *callConfig) { c.noRetries = true } }
