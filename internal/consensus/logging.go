package consensus

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
)

// raftLogger hands the library's log records to slog. What it does not override is
// hclog's null logger.
type raftLogger struct {
	hclog.Logger
	to *slog.Logger
	// quiet drops everything: a server that is stopping has cut its own connections.
	quiet *atomic.Bool
}

func newRaftLogger(to *slog.Logger) *raftLogger {
	return &raftLogger{hclog.NewNullLogger(), to, new(atomic.Bool)}
}

// unreachable begin the records about single calls that failed. A dead server
// causes several of them each second, beside one that says the same at Warn.
var unreachable = []string{
	"failed to heartbeat to",
	"failed to appendEntries to",
	"failed to pipeline appendEntries",
	"failed to start pipeline replication to",
	"failed to make requestVote RPC",
}

// level maps a record's level. The library calls errors what is the lot of a
// follower or a peer that is down; what someone must act on is returned by this
// package or goes to Config.Fatal.
func level(l hclog.Level, msg string) slog.Level {
	switch l {
	case hclog.Info:
		return slog.LevelInfo
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.Error:
		for _, prefix := range unreachable {
			if strings.HasPrefix(msg, prefix) {
				return slog.LevelDebug
			}
		}
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Log implements hclog.Logger.
func (l *raftLogger) Log(at hclog.Level, msg string, args ...any) {
	to := level(at, msg)
	if l.quiet.Load() || !l.to.Enabled(context.Background(), to) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	l.to.Log(context.Background(), to, msg, args...)
}

// Trace implements hclog.Logger.
func (l *raftLogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }

// Debug implements hclog.Logger.
func (l *raftLogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }

// Info implements hclog.Logger.
func (l *raftLogger) Info(msg string, args ...any) { l.Log(hclog.Info, msg, args...) }

// Warn implements hclog.Logger.
func (l *raftLogger) Warn(msg string, args ...any) { l.Log(hclog.Warn, msg, args...) }

// Error implements hclog.Logger.
func (l *raftLogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

// With implements hclog.Logger.
func (l *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{l.Logger, l.to.With(args...), l.quiet}
}

// Named implements hclog.Logger. The name of a part of the library is not kept.
func (l *raftLogger) Named(string) hclog.Logger { return l }

// ResetNamed implements hclog.Logger.
func (l *raftLogger) ResetNamed(string) hclog.Logger { return l }

// pebbleLogger hands Pebble's messages to slog, and its end of the world to fatal.
type pebbleLogger struct {
	dir   string
	to    *slog.Logger
	fatal func(error)
}

// Infof implements pebble.Logger.
func (l pebbleLogger) Infof(format string, args ...any) {
	if l.to.Enabled(context.Background(), slog.LevelDebug) {
		l.to.Debug(fmt.Sprintf(format, args...), "dir", l.dir)
	}
}

// Errorf implements pebble.Logger.
func (l pebbleLogger) Errorf(format string, args ...any) {
	l.to.Warn(fmt.Sprintf(format, args...), "dir", l.dir)
}

// Fatalf implements pebble.Logger.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	l.fatal(fmt.Errorf(format, args...))
}
