package replica

import (
	"bytes"
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/storage"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// Limits of one answer to a comparison.
const (
	maxDigestNodes = 4096
	maxListRecords = 4096
	maxListBytes   = 1 << 20
)

// digest answers with nodes of a vnode's hash tree.
func (f *frame) digest(ctx context.Context, c *replicav1.Call, op *replicav1.Digest) {
	if err := f.check(c, op.GetNamespace(), op.GetVnode(), toCompare); err != nil {
		f.fail(c, err)
		return
	}
	if op.GetLevel() > storage.Root {
		f.fail(c, rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "hash trees have no level %d", op.GetLevel()))
		return
	}
	certificate := max(hlc.Timestamp(op.GetCertificate()), f.cfg.Store.Collection(op.GetNamespace(), op.GetVnode()).Certificate)
	reading := f.cfg.Store.Reading()
	nodes, next, by, err := f.cfg.Store.Tree(ctx, op.GetNamespace(), op.GetVnode(), certificate,
		int(op.GetLevel()), op.GetStart(), op.GetEnd(), maxDigestNodes)
	if err != nil {
		f.fail(c, storeError(err))
		return
	}
	if err := f.trustCompared(reading, op.GetNamespace(), op.GetVnode()); err != nil {
		f.fail(c, err)
		return
	}
	res := &replicav1.DigestResult{Next: next, Certificate: uint64(by), Nodes: make([]*replicav1.DigestNode, len(nodes))}
	for i, n := range nodes {
		res.Nodes[i] = &replicav1.DigestNode{Start: n.Start, Hash: n.Hash[:], Records: n.Records}
	}
	f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_Digest{Digest: res}})
}

// list answers with records of this replica's own copy.
func (f *frame) list(c *replicav1.Call, op *replicav1.List) {
	if err := f.check(c, op.GetNamespace(), op.GetVnode(), toCompare); err != nil {
		f.fail(c, err)
		return
	}
	l := lister{op: op, limit: maxListRecords, limitBytes: maxListBytes}
	if n := int(op.GetLimit()); n > 0 {
		l.limit = min(n, l.limit)
	}
	if n := int(op.GetLimitBytes()); n > 0 {
		l.limitBytes = min(n, l.limitBytes)
	}
	var err error
	reading := f.cfg.Store.Reading()
	if len(op.GetKeys()) > 0 {
		err = l.named(f.cfg.Store)
	} else {
		err = f.cfg.Store.Scan(op.GetNamespace(), []uint32{op.GetVnode()}, op.GetStart(), op.GetEnd(), func(_ uint32, key, rec []byte) bool {
			return l.add(key, rec)
		})
	}
	if err = errors.Join(err, l.err); err != nil {
		f.fail(c, storeError(err))
		return
	}
	if err := f.trustCompared(reading, op.GetNamespace(), op.GetVnode()); err != nil {
		f.fail(c, err)
		return
	}
	f.reply(&replicav1.Reply{Id: c.GetId(), Result: &replicav1.Reply_List{List: &l.res}})
}

// lister gathers the answer to a List.
type lister struct {
	op                      *replicav1.List
	res                     replicav1.ListResult
	limit, limitBytes, size int
	err                     error
}

// named looks the named keys up, until the answer is full.
func (l *lister) named(store *storage.Store) error {
	for _, key := range l.op.GetKeys() {
		rec, err := store.Get(l.op.GetNamespace(), l.op.GetVnode(), key)
		if errors.Is(err, storage.ErrNotFound) {
			continue
		}
		if err != nil || !l.add(key, rec) {
			return err
		}
	}
	return nil
}

// add reports whether there is room for more.
func (l *lister) add(key, rec []byte) bool {
	if len(l.res.Entries) >= l.limit || l.size >= l.limitBytes {
		l.res.Truncated = true
		return false
	}
	if l.op.GetHeaderOnly() {
		if rec, l.err = header(rec); l.err != nil {
			return false
		}
	}
	l.res.Entries = append(l.res.Entries, &replicav1.Entry{Key: bytes.Clone(key), Record: bytes.Clone(rec)})
	l.size += len(key) + len(rec)
	return true
}
