package gossip

import (
	"context"
	"log/slog"
	"strings"
)

// logWriter hands the lines of the library's log to slog.
type logWriter struct{ to *slog.Logger }

// prefixes are how the library begins its lines. What it calls an error is a peer
// that does not answer or talks nonsense.
var prefixes = []struct {
	text  string
	level slog.Level
}{
	{"[DEBUG] ", slog.LevelDebug},
	{"[INFO] ", slog.LevelInfo},
	{"[WARN] ", slog.LevelWarn},
	{"[ERR] ", slog.LevelWarn},
	{"[ERROR] ", slog.LevelWarn},
}

// Write implements io.Writer. A call is one line.
func (w logWriter) Write(line []byte) (int, error) {
	msg, level := strings.TrimSpace(string(line)), slog.LevelInfo
	for _, p := range prefixes {
		if rest, ok := strings.CutPrefix(msg, p.text); ok {
			msg, level = rest, p.level
			break
		}
	}
	w.to.Log(context.Background(), level, strings.TrimPrefix(msg, "memberlist: "))
	return len(line), nil
}
