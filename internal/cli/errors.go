package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
)

// Exit codes of kvctl.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitUnavailable = 4
	exitConflict    = 5
)

// usageError is an error of the command line itself.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitCodeError carries an exit code for a failure that has been reported already.
type exitCodeError int

func (e exitCodeError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// noClusterError: nobody answers at any endpoint.
type noClusterError struct {
	endpoints []string
	cause     error
}

func (e noClusterError) Error() string {
	return fmt.Sprintf("no cluster at %s: start one with `make run`", strings.Join(e.endpoints, ", "))
}

func (e noClusterError) Unwrap() []error { return []error{client.ErrNoCluster, e.cause} }

// missingError: what a command names does not exist.
type missingError struct {
	what, name string
	details    map[string]string
}

func (e missingError) Error() string { return fmt.Sprintf("there is no %s %q", e.what, e.name) }

// fail reports an error, unless that has been done, and returns its exit code.
func (a *App) fail(err error) int {
	var code exitCodeError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &code):
		return int(code)
	}
	a.report(err)
	return exitCode(err)
}

// report writes an error for people, or for programs with -o json and -o yaml: JSON
// is YAML too.
func (a *App) report(err error) {
	if a.flags.output != outputJSON && a.flags.output != outputYAML {
		fmt.Fprintf(a.Stderr, "kvctl: %s\n", err)
		return
	}
	f := describe(err)
	_ = json.NewEncoder(a.Stderr).Encode(f) // there is nowhere left to complain
}

// failure is an error as programs read it.
type failure struct {
	Code    string            `json:"code"`
	Message string            `json:"message"`
	Details map[string]string `json:"details"`
}

func describe(err error) failure {
	f := failure{Code: codes.Unknown.String(), Message: err.Error(), Details: map[string]string{}}
	var (
		ce *client.Error
		re *rpc.Error
		ue usageError
		nc noClusterError
		me missingError
	)
	switch {
	case errors.As(err, &ue):
		f.Code = codes.InvalidArgument.String()
		var bad *pflag.InvalidValueError
		if errors.As(err, &bad) {
			f.Details["flag"] = "--" + bad.GetFlag().Name
			f.Details["value"] = bad.GetValue()
		}
	case errors.As(err, &nc):
		f.Code = codes.Unavailable.String()
		f.Details["endpoints"] = strings.Join(nc.endpoints, ",")
		if nc.cause != nil {
			f.Details["cause"] = nc.cause.Error()
		}
	case errors.As(err, &me):
		f.Code = codes.NotFound.String()
		maps.Copy(f.Details, me.details)
		f.Details["name"] = me.name
	case errors.As(err, &ce):
		f.Code = ce.Code
		f.Details = withReason(ce.Details, ce.Reason)
	case errors.As(err, &re):
		f.Code = re.Code.String()
		f.Details = withReason(re.Details, re.Reason)
	case errors.Is(err, client.ErrNotFound):
		f.Code = codes.NotFound.String()
	case errors.Is(err, client.ErrInvalidArgument):
		f.Code = codes.InvalidArgument.String()
	case errors.Is(err, context.DeadlineExceeded):
		f.Code = codes.DeadlineExceeded.String()
	case errors.Is(err, context.Canceled):
		f.Code = codes.Canceled.String()
	}
	return f
}

func withReason(details map[string]string, reason string) map[string]string {
	out := map[string]string{"reason": reason}
	maps.Copy(out, details)
	return out
}

// exitCode maps an error to kvctl's exit code.
func exitCode(err error) int {
	if errors.Is(err, client.ErrOutcomeUnknown) {
		return exitUnavailable
	}
	switch describe(err).Code {
	case codes.InvalidArgument.String():
		return exitUsage
	case codes.NotFound.String():
		return exitNotFound
	case codes.Unavailable.String(), codes.DeadlineExceeded.String(), codes.ResourceExhausted.String():
		return exitUnavailable
	case codes.Aborted.String():
		return exitConflict
	}
	return exitError
}
