package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

func (c *Client) config(opts []CallOption) (callConfig, error) {
	cc := callConfig{namespace: c.cfg.namespace}
	for _, o := range opts {
		o(&cc)
	}
	if cc.namespace == "" {
		cc.namespace = topology.DefaultNamespace
	}
	if e := checkTTL(cc.ttl); e != nil {
		cc.err = e
	}
	return cc, cc.err
}

// checkTTL refuses what whole milliseconds cannot say; 0 stands for none given.
func checkTTL(ttl time.Duration) *Error {
	if ttl == 0 || ttl >= time.Millisecond {
		return nil
	}
	return &Error{
		Code: "InvalidArgument", Reason: rpc.ReasonBadRequest, Message: fmt.Sprintf("TTL of %s is below 1ms", ttl),
		Details: map[string]string{"field": "ttl_ms"}, is: []error{ErrInvalidArgument},
	}
}

// Put stores a value under a key. The options W, TTL, Namespace, Traced and
// WithoutRetries apply.
func (c *Client) Put(ctx context.Context, key, value []byte, opts ...CallOption) (Receipt, error) {
	cc, err := c.config(opts)
	if err != nil {
		return Receipt{}, err
	}
	a, err := c.do(ctx, request{
		key: key, namespace: cc.namespace, retry: !cc.noRetries, writes: true, class: aWrite,
		make: func(epoch, token uint64) *kvv1.SessionCall {
			return &kvv1.SessionCall{Request: &kvv1.SessionCall_Put{Put: &kvv1.PutRequest{
				Namespace: cc.namespace, Key: key, Value: value, WriteQuorum: cc.w, TtlMs: uint64(cc.ttl.Milliseconds()),
				Token: token, Epoch: epoch, Trace: cc.trace,
			}}}
		},
	})
	return receiptFromProto(a.reply.GetPut().GetReceipt(), a.address), err
}

// Delete removes a key; removing one that does not exist succeeds. The options W,
// Namespace, Traced and WithoutRetries apply.
func (c *Client) Delete(ctx context.Context, key []byte, opts ...CallOption) (Receipt, error) {
	cc, err := c.config(opts)
	if err != nil {
		return Receipt{}, err
	}
	a, err := c.do(ctx, request{
		key: key, namespace: cc.namespace, retry: !cc.noRetries, writes: true, class: aWrite,
		make: func(epoch, token uint64) *kvv1.SessionCall {
			return &kvv1.SessionCall{Request: &kvv1.SessionCall_Delete{Delete: &kvv1.DeleteRequest{
				Namespace: cc.namespace, Key: key, WriteQuorum: cc.w, Token: token, Epoch: epoch, Trace: cc.trace,
			}}}
		},
	})
	return receiptFromProto(a.reply.GetDelete().GetReceipt(), a.address), err
}

// Get returns the value of a key. The error is ErrNotFound when it has none; the
// receipt in the value is then filled in too. The options R, Repair, MinVersion,
// FromReplica, Namespace and Traced apply.
func (c *Client) Get(ctx context.Context, key []byte, opts ...CallOption) (Value, error) {
	cc, err := c.config(opts)
	if err != nil {
		return Value{}, err
	}
	var least *kvv1.Version
	if !cc.minVersion.IsZero() {
		least = &kvv1.Version{Timestamp: cc.minVersion.Timestamp, Incarnation: cc.minVersion.Incarnation}
	}
	a, err := c.do(ctx, request{
		key: key, namespace: cc.namespace, retry: true, class: aGet, hedge: cc.replica == "" && !cc.trace, replica: cc.replica,
		make: func(epoch, token uint64) *kvv1.SessionCall {
			return &kvv1.SessionCall{Request: &kvv1.SessionCall_Get{Get: &kvv1.GetRequest{
				Namespace: cc.namespace, Key: key, ReadQuorum: cc.r, ReadRepair: kvv1.ReadRepair(cc.repair),
				MinVersion: least, Token: token, Epoch: epoch, Trace: cc.trace, Replica: cc.replica,
			}}}
		},
	})
	if err != nil {
		return Value{}, err
	}
	g := a.reply.GetGet()
	v := Value{Value: g.GetValue(), ExpiresAt: expiry(g.GetExpiresAtMs()), Receipt: receiptFromProto(g.GetReceipt(), a.address)}
	if !g.GetFound() {
		return v, ErrNotFound
	}
	if v.Value == nil {
		v.Value = []byte{}
	}
	return v, nil
}

// Batch applies puts and deletes of distinct keys. It is atomic within one vnode on
// one replica at most: each operation has a result of its own, and readers may see
// some before others. The error is not nil when the batch as a whole was refused.
// The options W, Namespace and WithoutRetries apply.
func (c *Client) Batch(ctx context.Context, ops []Operation, opts ...CallOption) ([]Result, error) {
	cc, err := c.config(opts)
	if err != nil {
		return nil, err
	}
	for i, op := range ops {
		if e := checkTTL(op.TTL); e != nil {
			e.Details["operation"] = strconv.Itoa(i)
			return nil, e
		}
	}
	b := newBatch(ops)
	ctx, cancel := c.withDeadline(ctx)
	defer cancel()
	began := time.Now()
	// Operations that failed for want of replicas are tried again with the rest of the
	// time, as single puts would be.
	for round := 1; ; round++ {
		a, err := c.do(ctx, request{
			key: b.firstKey(), namespace: cc.namespace, retry: !cc.noRetries, writes: true,
			make: func(epoch, token uint64) *kvv1.SessionCall {
				r := &kvv1.BatchRequest{Namespace: cc.namespace, WriteQuorum: cc.w, Token: token, Epoch: epoch}
				for _, i := range b.todo {
					r.Operations = append(r.Operations, b.wire[i])
				}
				return &kvv1.SessionCall{Request: &kvv1.SessionCall_Batch{Batch: r}}
			},
		})
		if err != nil && round == 1 {
			return nil, err
		}
		if err != nil {
			b.failed(err)
			return b.results, nil
		}
		b.answered(a, !cc.noRetries, time.Since(began) < c.cfg.patience)
		if len(b.todo) == 0 || !c.budget.spend() {
			return b.results, nil
		}
		select {
		case <-ctx.Done():
			return b.results, nil
		case <-time.After(maxPause / 4):
		}
	}
}

// Scan returns the records of a range in key order. Each key is as one quorum read
// within the scan; there is no snapshot over keys. The options R, Repair and
// Namespace apply. A deadline of ctx is for the whole scan.
//
//	for rec, err := range c.Scan(ctx, client.Range{Prefix: []byte("user/")}) {
//		if err != nil {
//			return err
//		}
//		fmt.Printf("%s = %s\n", rec.Key, rec.Value)
//	}
func (c *Client) Scan(ctx context.Context, r Range, opts ...CallOption) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		var token []byte
		for {
			records, next, err := c.ScanPage(ctx, r, token, opts...)
			if err != nil {
				yield(Record{}, err)
				return
			}
			for _, rec := range records {
				if !yield(rec, nil) {
					return
				}
			}
			if len(next) == 0 {
				return
			}
			token = next
		}
	}
}

// ScanPage returns one page of a range. A token that is not empty, given with the
// same range and options, continues after the page; it may be kept and used later.
func (c *Client) ScanPage(ctx context.Context, r Range, resume []byte, opts ...CallOption) (records []Record, token []byte, err error) {
	cc, err := c.config(opts)
	if err != nil {
		return nil, nil, err
	}
	if r.Limit < 0 {
		return nil, nil, fmt.Errorf("%w: limit is %d: want 0 (all) or more", ErrInvalidArgument, r.Limit)
	}
	a, err := c.do(ctx, request{
		namespace: cc.namespace, retry: true,
		make: func(epoch, clientToken uint64) *kvv1.SessionCall {
			return &kvv1.SessionCall{Request: &kvv1.SessionCall_Scan{Scan: &kvv1.ScanRequest{
				Namespace: cc.namespace, Prefix: r.Prefix, Start: r.Start, Limit: uint64(r.Limit), ResumeToken: resume,
				KeysOnly: r.KeysOnly, ReadQuorum: cc.r, ReadRepair: kvv1.ReadRepair(cc.repair), Token: clientToken, Epoch: epoch,
			}}}
		},
	})
	if err != nil {
		return nil, nil, err
	}
	s := a.reply.GetScan()
	records = make([]Record, 0, len(s.GetRecords()))
	for _, rec := range s.GetRecords() {
		records = append(records, Record{
			Key: rec.GetKey(), Value: rec.GetValue(), Version: versionFromProto(rec.GetVersion()), ExpiresAt: expiry(rec.GetExpiresAtMs()),
		})
	}
	return records, s.GetResumeToken(), nil
}

// Trace returns the timeline of a traced call, after waiting, at most 5 s, for
// replicas that had not answered yet. complete tells whether all have, or have been
// given up.
func (c *Client) Trace(ctx context.Context, r Receipt, wait time.Duration) (events []Event, complete bool, err error) {
	if r.TraceID == 0 {
		return nil, false, errors.New("the call was not traced")
	}
	a, err := c.do(ctx, request{only: r.address, retry: true, make: func(uint64, uint64) *kvv1.SessionCall {
		return &kvv1.SessionCall{Request: &kvv1.SessionCall_Trace{Trace: &kvv1.TraceRequest{
			TraceId: r.TraceID, WaitMs: uint32(min(wait, 5*time.Second).Milliseconds()),
		}}}
	}})
	if err != nil {
		return nil, false, err
	}
	t := a.reply.GetTrace()
	for _, e := range t.GetEvents() {
		events = append(events, Event{
			At:   time.Duration(e.GetAtUs()) * time.Microsecond,
			Kind: strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(e.GetKind().String(), "KIND_"), "_", " ")),
			Node: e.GetNode(), Detail: e.GetDetail(),
		})
	}
	slices.SortStableFunc(events, func(a, b Event) int { return int(a.At - b.At) })
	return events, t.GetComplete(), nil
}
