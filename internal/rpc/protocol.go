package rpc

import (
	"context"

	"google.golang.org/grpc"

	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

// ClientStream is the caller's end of a stream of frames.
type ClientStream[C, R any] interface {
	grpc.ClientStream
	SendFrame(calls []C) error
	RecvFrame() ([]R, error)
}

// Protocol tells a link how its calls and replies are framed.
type Protocol[C, R any] struct {
	Open func(ctx context.Context, cc grpc.ClientConnInterface) (ClientStream[C, R], error)
	// Prepare numbers a call and gives it what is left of its deadline, and the peer's
	// uptime by which it must have begun (0: none).
	Prepare   func(call C, id uint64, timeoutMillis uint32, startByMillis uint64)
	Size      func(call C) int
	ReplySize func(reply R) int
	ReplyID   func(reply R) uint64
	// ReplyError returns the failure a reply carries, or nil.
	ReplyError func(reply R) *kvv1.Error
	// Refusal returns a reply that says err instead of what was read, or false when
	// reply tells of more than a read.
	Refusal func(reply R, err *Error) (R, bool)
	// Ping makes a call that asks for nothing but a reply; Pong reads it. An uptime of
	// 0 is not known.
	Ping func(wallMillis int64) C
	Pong func(reply R) (wallMillis int64, uptimeMillis uint64)
}

// KV is the protocol between clients and nodes.
var KV = Protocol[*kvv1.SessionCall, *kvv1.SessionReply]{
	Open: func(ctx context.Context, cc grpc.ClientConnInterface) (ClientStream[*kvv1.SessionCall, *kvv1.SessionReply], error) {
		s, err := kvv1.NewKVServiceClient(cc).Session(ctx)
		return kvClientStream{s}, err
	},
	Prepare: func(c *kvv1.SessionCall, id uint64, timeoutMillis uint32, startByMillis uint64) {
		c.Id, c.TimeoutMs, c.StartByMs = id, timeoutMillis, startByMillis
	},
	Size:       (*kvv1.SessionCall).SizeVT,
	ReplySize:  (*kvv1.SessionReply).SizeVT,
	ReplyID:    (*kvv1.SessionReply).GetId,
	ReplyError: (*kvv1.SessionReply).GetError,
	Refusal: func(r *kvv1.SessionReply, err *Error) (*kvv1.SessionReply, bool) {
		switch r.GetResponse().(type) {
		case *kvv1.SessionReply_Get, *kvv1.SessionReply_Scan, *kvv1.SessionReply_Trace:
			return &kvv1.SessionReply{Id: r.GetId(), Error: err.Proto()}, true
		}
		return nil, false
	},
	Ping: func(wallMillis int64) *kvv1.SessionCall {
		return &kvv1.SessionCall{Request: &kvv1.SessionCall_Ping{Ping: &kvv1.PingRequest{WallMs: uint64(wallMillis)}}}
	},
	Pong: func(r *kvv1.SessionReply) (int64, uint64) {
		return int64(r.GetPing().GetWallMs()), r.GetPing().GetUptimeMs()
	},
}

type kvClientStream struct {
	grpc.BidiStreamingClient[kvv1.SessionRequest, kvv1.SessionResponse]
}

func (s kvClientStream) SendFrame(calls []*kvv1.SessionCall) error {
	return s.Send(&kvv1.SessionRequest{Calls: calls})
}

func (s kvClientStream) RecvFrame() ([]*kvv1.SessionReply, error) {
	f, err := s.Recv()
	return f.GetReplies(), err
}

// Replica is the protocol between nodes.
var Replica = Protocol[*replicav1.Call, *replicav1.Reply]{
	Open: func(ctx context.Context, cc grpc.ClientConnInterface) (ClientStream[*replicav1.Call, *replicav1.Reply], error) {
		s, err := replicav1.NewReplicaServiceClient(cc).Link(ctx)
		return replicaClientStream{s}, err
	},
	// A replica's writes carry their versions, so they may begin at any time.
	Prepare: func(c *replicav1.Call, id uint64, timeoutMillis uint32, _ uint64) {
		c.Id, c.TimeoutMs = id, timeoutMillis
	},
	Size:       (*replicav1.Call).SizeVT,
	ReplySize:  (*replicav1.Reply).SizeVT,
	ReplyID:    (*replicav1.Reply).GetId,
	ReplyError: (*replicav1.Reply).GetError,
	Refusal: func(r *replicav1.Reply, err *Error) (*replicav1.Reply, bool) {
		switch r.GetResult().(type) {
		case *replicav1.Reply_Read, *replicav1.Reply_Scan:
			return &replicav1.Reply{Id: r.GetId(), Error: err.Proto()}, true
		}
		return nil, false
	},
	Ping: func(wallMillis int64) *replicav1.Call {
		return &replicav1.Call{Operation: &replicav1.Call_Ping{Ping: &replicav1.Ping{WallMs: uint64(wallMillis)}}}
	},
	Pong: func(r *replicav1.Reply) (int64, uint64) { return int64(r.GetPing().GetWallMs()), 0 },
}

type replicaClientStream struct {
	grpc.BidiStreamingClient[replicav1.LinkRequest, replicav1.LinkResponse]
}

func (s replicaClientStream) SendFrame(calls []*replicav1.Call) error {
	return s.Send(&replicav1.LinkRequest{Calls: calls})
}

func (s replicaClientStream) RecvFrame() ([]*replicav1.Reply, error) {
	f, err := s.Recv()
	return f.GetReplies(), err
}
