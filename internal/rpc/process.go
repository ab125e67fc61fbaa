package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// Process serves adminv1.ProcessService for the process it is in.
type Process struct {
	adminv1.UnimplementedProcessServiceServer
	// Name and Software are what the process calls itself, RunID was drawn when it
	// started.
	Name, Software, RunID string
	Started               time.Time
	// Ready returns why the process does not serve, or nil.
	Ready func() error
	// Again begins the restart and returns, or says why this process cannot. Nil where
	// none can be restarted.
	Again func(context.Context) error
}

// GetProcess describes the process.
func (p Process) GetProcess(context.Context, *adminv1.GetProcessRequest) (*adminv1.GetProcessResponse, error) {
	resp := &adminv1.GetProcessResponse{
		Name: p.Name, RunId: p.RunID, UptimeMs: uint64(time.Since(p.Started).Milliseconds()), Software: p.Software,
	}
	if err := p.Ready(); err != nil {
		resp.NotReady = err.Error()
	}
	return resp, nil
}

// Restart begins a restart. It is refused where the process does not serve: whatever
// is wrong then, it is nothing to do in passing.
func (p Process) Restart(ctx context.Context, r *adminv1.RestartRequest) (*adminv1.RestartResponse, error) {
	refuse := func(reason, format string, args ...any) error {
		return Errorf(codes.FailedPrecondition, reason, format, args...)
	}
	if p.Again == nil {
		return nil, Errorf(codes.Unimplemented, ReasonCannotRestart, "%s cannot restart by itself", p.Name)
	}
	if r.GetRunId() != p.RunID {
		return nil, refuse(ReasonOtherRun, "%s has been restarted meanwhile", p.Name)
	}
	if err := p.Ready(); err != nil {
		return nil, refuse(ReasonNotReady, "%s does not serve: %s", p.Name, err)
	}
	if err := p.Again(ctx); err != nil {
		return nil, refuse(ReasonCannotRestart, "%s goes on, as it could not start again: %s", p.Name, err)
	}
	return &adminv1.RestartResponse{}, nil
}
