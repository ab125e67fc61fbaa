package client

import (
	"errors"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// Errors to match with errors.Is.
var (
	// ErrNotFound: the key does not exist, was deleted or has expired.
	ErrNotFound = errors.New("key not found")
	// ErrNamespaceNotFound: there is no such namespace.
	ErrNamespaceNotFound = errors.New("namespace not found")
	// ErrInvalidArgument: the request can never succeed; details name the field and
	// its limit. Nothing was written.
	ErrInvalidArgument = errors.New("invalid argument")
	// ErrUnavailable: too few replicas are live or answered. Unless ErrOutcomeUnknown
	// matches too, nothing was written.
	ErrUnavailable = errors.New("unavailable")
	// ErrOutcomeUnknown: a write may have happened or not.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrTimeout: the deadline passed.
	ErrTimeout = errors.New("timed out")
	// ErrOverloaded: a bound of the node or the client is reached. Nothing was done.
	ErrOverloaded = errors.New("overloaded")
	// ErrNotInSync: the copies for reports lack writes that were acknowledged, or may, and no
	// staleness was allowed, or less.
	ErrNotInSync = errors.New("not in sync")
	// ErrNoCluster: no endpoint answers.
	ErrNoCluster = errors.New("no cluster")
	// ErrClosed: the client has been closed.
	ErrClosed = errors.New("client is closed")
)

// Error is the error of a request.
type Error struct {
	// Code is the name of the gRPC status code, for example "Unavailable".
	Code string
	// Reason is a stable upper-case identifier, for example "NOT_ENOUGH_REPLICAS".
	Reason  string
	Message string
	// Details holds facts for programs: limits, names, counts.
	Details map[string]string
	// RetryAfter, when above zero, says that a retry after it may succeed.
	RetryAfter time.Duration
	// Receipt leads to the timeline of a traced call that failed: see Client.Trace. Its
	// TraceID is 0 when there is none.
	Receipt Receipt

	is []error
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// Is makes errors.Is match the package's variables.
func (e *Error) Is(target error) bool {
	for _, err := range e.is {
		if err == target {
			return true
		}
	}
	return false
}

// publicError converts an error that was given at an address. sent tells whether a
// write may have reached a replica; too are variables that it matches besides.
func publicError(e *rpc.Error, address string, sent bool, too ...error) error {
	if e == nil {
		return nil
	}
	out := &Error{Code: e.Code.String(), Reason: e.Reason, Message: e.Message, Details: e.Details, RetryAfter: e.RetryAfter, is: too}
	if id, err := strconv.ParseUint(e.Details[rpc.DetailTrace], 10, 64); err == nil {
		out.Receipt = Receipt{TraceID: id, address: address}
	}
	switch e.Code {
	case codes.NotFound:
		if e.Reason == "NAMESPACE_NOT_FOUND" {
			out.is = append(out.is, ErrNamespaceNotFound)
		}
	case codes.FailedPrecondition:
		if e.Reason == rpc.ReasonNotInSync {
			out.is = append(out.is, ErrNotInSync)
		}
	case codes.InvalidArgument:
		out.is = append(out.is, ErrInvalidArgument)
	case codes.Unavailable:
		out.is = append(out.is, ErrUnavailable)
	case codes.DeadlineExceeded:
		out.is = append(out.is, ErrTimeout)
	case codes.ResourceExhausted:
		out.is = append(out.is, ErrOverloaded)
	}
	if sent {
		out.is = append(out.is, ErrOutcomeUnknown)
	}
	return out
}
