package process

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// Log says what a process logs and how.
type Log struct {
	Level  string `yaml:"level" help:"debug, info, warn or error"`
	Format string `yaml:"format" help:"text or json"`
}

// DefaultLog is Info as text.
var DefaultLog = Log{Level: "info", Format: "text"}

// logger returns a logger that writes to w, or an error that names the bad key.
func (l Log) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(strings.ToUpper(l.Level))); err != nil || strings.ContainsAny(l.Level, "+-") {
		return nil, fmt.Errorf("log.level: %q: want debug, info, warn or error", l.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch l.Format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("log.format: %q: want text or json", l.Format)
}
