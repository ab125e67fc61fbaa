package rpc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kvasirdb/kvasir/internal/topology"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// errorDomain is the domain of the ErrorInfo in statuses.
const errorDomain = "kvasir"

// Reasons are stable identifiers of failures. Those of refused changes come from
// package topology.
const (
	// ReasonNotSent: the request never left; it may be tried elsewhere.
	ReasonNotSent = "NOT_SENT"
	// ReasonLinkBroken: the request left, and the connection broke before a reply.
	ReasonLinkBroken = "LINK_BROKEN"
	// ReasonStopping: the node is stopping and did not begin the request.
	ReasonStopping = "STOPPING"
	// ReasonNotReady: the node does not serve yet, or must not serve.
	ReasonNotReady = "NOT_READY"
	// ReasonTooLate: the request came after the time by which it had to begin.
	ReasonTooLate = "TOO_LATE"
	// ReasonTooShort: the deadline is before the request would be answered.
	ReasonTooShort = "DEADLINE_TOO_SHORT"
	// ReasonOverloaded: a bound is reached; nothing was done.
	ReasonOverloaded = "OVERLOADED"
	// ReasonNotEnoughReplicas: fewer live slots than needed; nothing was written.
	ReasonNotEnoughReplicas = "NOT_ENOUGH_REPLICAS"
	// ReasonOutcomeUnknown: too few acknowledgements in time; the write may be seen
	// and survive, or not.
	ReasonOutcomeUnknown = "OUTCOME_UNKNOWN"
	// ReasonReadFailed: too few replicas answered a read in time.
	ReasonReadFailed = "READ_FAILED"
	// ReasonRepairFailed: a read found stale replicas and could not mend enough.
	ReasonRepairFailed = "REPAIR_FAILED"
	// ReasonStaleEpoch: the sender's topology is older than matters here.
	ReasonStaleEpoch = "STALE_EPOCH"
	// ReasonEpochAhead: the receiver could not catch up with the sender's topology.
	ReasonEpochAhead = "EPOCH_AHEAD"
	// ReasonNotOwner: the node is no endpoint of the vnode.
	ReasonNotOwner = "NOT_OWNER"
	// ReasonNotInSync: a copy for reports lacks writes, or may.
	ReasonNotInSync = "NOT_IN_SYNC"
	// ReasonReportTooLarge: the groups of a report do not fit into the memory it may take.
	ReasonReportTooLarge = "REPORT_TOO_LARGE"
	// ReasonBelowPromise: the version is at or below what the replica has promised not
	// to take any more; details name the promise. A new version will do.
	ReasonBelowPromise = "BELOW_PROMISE"
	// ReasonClockSkew: a timestamp or clock is too far off.
	ReasonClockSkew = "CLOCK_SKEW"
	// ReasonWrongPeer: the address belongs to another node or cluster.
	ReasonWrongPeer = "WRONG_PEER"
	// ReasonDiskFull: the disk has no room for writes.
	ReasonDiskFull = "DISK_FULL"
	// ReasonCorrupt: stored bytes are damaged.
	ReasonCorrupt = "CORRUPT"
	// ReasonDeadline: the deadline passed.
	ReasonDeadline = "DEADLINE"
	// ReasonNoLeader: the orchestrators have no leader, or none can be reached.
	ReasonNoLeader = "NO_LEADER"
	// ReasonOtherRun: the process is not the run that was meant.
	ReasonOtherRun = "OTHER_RUN"
	// ReasonCannotRestart: the process could not start again, and goes on.
	ReasonCannotRestart = "CANNOT_RESTART"
	// ReasonBadRequest: a field is out of its limits; details name it.
	ReasonBadRequest = "BAD_REQUEST"
	// ReasonInternal: a defect.
	ReasonInternal = "INTERNAL"
)

// DetailTrace is the detail that names the trace of a request that failed.
const DetailTrace = "trace_id"

// Error is a failure as it travels: a gRPC code, a stable reason, a message for
// people and facts for programs.
type Error struct {
	Code    codes.Code
	Reason  string
	Message string
	Details map[string]string
	// RetryAfter, when above zero, says that a retry after it may succeed.
	RetryAfter time.Duration
}

// Errorf builds an Error without details.
func Errorf(code codes.Code, reason, format string, args ...any) *Error {
	return &Error{Code: code, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// With returns a copy of e with one more detail.
func (e *Error) With(name string, value any) *Error {
	c := *e
	c.Details = maps.Clone(e.Details)
	if c.Details == nil {
		c.Details = map[string]string{}
	}
	c.Details[name] = fmt.Sprint(value)
	return &c
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// NothingDone reports whether the request certainly had no effect, so that it may
// be tried again, whatever it was.
func (e *Error) NothingDone() bool {
	switch e.Reason {
	case ReasonNotSent, ReasonStopping, ReasonNotReady, ReasonTooLate, ReasonTooShort, ReasonOverloaded, ReasonNotEnoughReplicas,
		ReasonStaleEpoch, ReasonEpochAhead, ReasonNotOwner, ReasonWrongPeer, ReasonBelowPromise, ReasonClockSkew, ReasonDiskFull, ReasonNoLeader:
		return true
	}
	return false
}

// GRPCStatus makes an Error what gRPC sends: the reason and details in an
// ErrorInfo, a RetryInfo, and for invalid arguments a BadRequest.
func (e *Error) GRPCStatus() *status.Status {
	st := status.New(e.Code, e.Message)
	info := &errdetails.ErrorInfo{Reason: e.Reason, Domain: errorDomain, Metadata: e.Details}
	with, err := st.WithDetails(info)
	if err == nil && e.RetryAfter > 0 {
		with, err = with.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	if field := e.Details["field"]; err == nil && e.Code == codes.InvalidArgument && field != "" {
		with, err = with.WithDetails(&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: field, Description: e.Message},
		}})
	}
	if err != nil {
		return st // only an OK status refuses details
	}
	return with
}

// Proto converts an error to its form inside streams and batches. Nil stays nil.
func (e *Error) Proto() *kvv1.Error {
	if e == nil {
		return nil
	}
	return &kvv1.Error{
		Code: uint32(e.Code), Message: e.Message, Reason: e.Reason, Details: e.Details,
		RetryAfterMs: uint32(e.RetryAfter / time.Millisecond),
	}
}

// ErrorFromProto is the inverse of Error.Proto.
func ErrorFromProto(pb *kvv1.Error) *Error {
	if pb == nil {
		return nil
	}
	return &Error{
		Code: codes.Code(pb.GetCode()), Message: pb.GetMessage(), Reason: pb.GetReason(), Details: pb.GetDetails(),
		RetryAfter: time.Duration(pb.GetRetryAfterMs()) * time.Millisecond,
	}
}

// AsError converts any error, and keeps what it knows: an Error, a refused change,
// a gRPC status or an expired context. Nil stays nil. It is the one place where
// errors become codes.
func AsError(err error) *Error {
	var e *Error
	var refusal *topology.Refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e):
		return e
	case errors.As(err, &refusal):
		return &Error{Code: refusalCode(refusal.Kind), Reason: refusal.Reason, Message: refusal.Message, Details: refusal.Details}
	case errors.Is(err, context.DeadlineExceeded):
		return Errorf(codes.DeadlineExceeded, ReasonDeadline, "the deadline passed")
	case errors.Is(err, context.Canceled):
		return Errorf(codes.Canceled, "CANCELED", "the request was cancelled")
	}
	if st, ok := status.FromError(err); ok {
		return fromStatus(st)
	}
	return Errorf(codes.Internal, ReasonInternal, "%s", err.Error())
}

func fromStatus(st *status.Status) *Error {
	e := &Error{Code: st.Code(), Message: st.Message(), Reason: ReasonInternal}
	switch st.Code() {
	case codes.Unavailable:
		e.Reason = ReasonLinkBroken
	case codes.DeadlineExceeded:
		e.Reason = ReasonDeadline
	}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == errorDomain {
				e.Reason, e.Details = d.GetReason(), d.GetMetadata()
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	return e
}

func refusalCode(k topology.RefusalKind) codes.Code {
	switch k {
	case topology.Invalid:
		return codes.InvalidArgument
	case topology.NotFound:
		return codes.NotFound
	case topology.Exists:
		return codes.AlreadyExists
	case topology.Precondition:
		return codes.FailedPrecondition
	case topology.Conflict:
		return codes.Aborted
	}
	return codes.Internal
}
