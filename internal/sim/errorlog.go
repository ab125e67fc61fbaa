package sim

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// errorLog writes what the processes log as errors into the history: for people who look
// for the cause of a violation.
type errorLog struct {
	h     *History
	attrs []slog.Attr
}

// Enabled implements slog.Handler.
func (errorLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelError }

// Handle implements slog.Handler.
func (l errorLog) Handle(_ context.Context, r slog.Record) error {
	said := []string{r.Message}
	add := func(a slog.Attr) bool {
		said = append(said, fmt.Sprintf("%s=%v", a.Key, a.Value))
		return true
	}
	for _, a := range l.attrs {
		add(a)
	}
	r.Attrs(add)
	l.h.Note("logged: %s", strings.Join(said, " "))
	return nil
}

// WithAttrs implements slog.Handler.
func (l errorLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	l.attrs = append(l.attrs[:len(l.attrs):len(l.attrs)], attrs...)
	return l
}

// WithGroup implements slog.Handler.
func (l errorLog) WithGroup(string) slog.Handler { return l }
