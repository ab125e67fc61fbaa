package client

import (
	"errors"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// An operation that any round may have written has an unknown outcome until one
// succeeds.
func TestBatchRounds(t *testing.T) {
	refused := rpc.Errorf(codes.Unavailable, rpc.ReasonNotEnoughReplicas, "refused")
	unknown := rpc.Errorf(codes.Unavailable, rpc.ReasonOutcomeUnknown, "unknown")
	round := func(maybeDone bool, e *rpc.Error) func(*batch) {
		reply := &kvv1.BatchResponse{Results: []*kvv1.BatchResult{{Error: e.Proto()}}}
		return func(b *batch) {
			b.answered(answered{reply: &kvv1.SessionReply{Response: &kvv1.SessionReply_Batch{Batch: reply}}, maybeDone: maybeDone}, true, true)
		}
	}
	failed := func(e *rpc.Error, maybeDone bool) func(*batch) {
		return func(b *batch) { b.failed(publicError(e, "", maybeDone)) }
	}
	for name, tc := range map[string]struct {
		rounds []func(*batch)
		want   bool
	}{
		"refused":                        {[]func(*batch){round(false, refused)}, false},
		"refused twice":                  {[]func(*batch){round(false, refused), failed(refused, false)}, false},
		"unknown, refused":               {[]func(*batch){round(false, unknown), round(false, refused)}, true},
		"unknown, refused as a whole":    {[]func(*batch){round(false, unknown), failed(refused, false)}, true},
		"a lost attempt before refusal":  {[]func(*batch){round(true, refused)}, true},
		"refused, a lost second round":   {[]func(*batch){round(false, refused), failed(refused, true)}, true},
		"refused, a lost attempt, again": {[]func(*batch){round(false, refused), round(true, refused), round(false, refused)}, true},
	} {
		b := newBatch([]Operation{{Key: []byte("k")}})
		for _, r := range tc.rounds {
			r(b)
		}
		if err := b.results[0].Err; err == nil || errors.Is(err, ErrOutcomeUnknown) != tc.want {
			t.Errorf("%s: %v is unknown: %v", name, err, !tc.want)
		}
		if round(false, nil)(b); b.results[0].Err != nil || len(b.todo) != 0 {
			t.Errorf("%s: after success: %v", name, b.results[0].Err)
		}
	}
}
