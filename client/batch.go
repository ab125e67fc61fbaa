package client

import (
	"errors"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// batch is a batch on its way through rounds; todo are the indexes of the operations
// that the next one sends.
type batch struct {
	wire      []*kvv1.BatchOperation
	results   []Result
	maybeDone []bool // an attempt may have written it
	todo      []int
}

func newBatch(ops []Operation) *batch {
	b := &batch{results: make([]Result, len(ops)), maybeDone: make([]bool, len(ops))}
	for i, op := range ops {
		b.wire = append(b.wire, &kvv1.BatchOperation{Key: op.Key, Value: op.Value, Delete: op.Delete, TtlMs: uint64(op.TTL.Milliseconds())})
		b.todo = append(b.todo, i)
	}
	return b
}

func (b *batch) firstKey() []byte {
	if len(b.todo) == 0 {
		return nil
	}
	return b.wire[b.todo[0]].Key
}

// answered notes what became of a round's operations and leaves those to do that may
// be tried again: with patience also those for which too few replicas are live.
func (b *batch) answered(a answered, retry, patience bool) {
	var again []int
	for j, r := range a.reply.GetBatch().GetResults() {
		i := b.todo[j]
		b.results[i] = Result{Version: versionFromProto(r.GetVersion())}
		e := rpc.ErrorFromProto(r.GetError())
		if e == nil {
			continue
		}
		b.maybeDone[i] = b.maybeDone[i] || a.maybeDone || mayHaveWritten(e)
		b.results[i].Err = publicError(e, "", b.maybeDone[i])
		if retriable(e, retry) && (patience || e.Reason != rpc.ReasonNotEnoughReplicas) {
			again = append(again, i)
		}
	}
	b.todo = again
}

// failed notes that a later round failed as a whole. What was said of its operations
// before stands, unless it may have written them.
func (b *batch) failed(err error) {
	if errors.Is(err, ErrOutcomeUnknown) {
		for _, i := range b.todo {
			b.results[i].Err = err
		}
	}
}
