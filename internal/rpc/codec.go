package rpc

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// codec encodes the messages of the request path without reflection, and all
// others as usual. It is set for each connection and server of our own; the
// process-wide registry stays as it is.
type codec struct{}

var _ encoding.CodecV2 = codec{}

// fast is what the generated messages of the request path have.
type fast interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
	UnmarshalVTUnsafe([]byte) error
}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	pool := mem.DefaultBufferPool()
	switch m := v.(type) {
	case fast:
		buf := pool.Get(m.SizeVT())
		if _, err := m.MarshalToSizedBufferVT(*buf); err != nil {
			pool.Put(buf)
			return nil, err
		}
		return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
	case proto.Message:
		buf := pool.Get(proto.Size(m))
		out, err := (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend((*buf)[:0], m)
		if err != nil {
			pool.Put(buf)
			return nil, err
		}
		*buf = out
		return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
	}
	return nil, fmt.Errorf("rpc: cannot encode %T", v)
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case fast:
		// The message's byte fields alias these bytes, so they are its own.
		return m.UnmarshalVTUnsafe(data.Materialize())
	case proto.Message:
		buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
		defer buf.Free()
		return proto.Unmarshal(buf.ReadOnlyData(), m)
	}
	return fmt.Errorf("rpc: cannot decode into %T", v)
}
