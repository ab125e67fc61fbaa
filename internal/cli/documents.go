package cli

import (
	"fmt"
	"time"

	"github.com/kvasirdb/kvasir/client"
)

// The documents of data commands. Field names are a contract with scripts: snake
// case, durations in _ms, sizes in _bytes, times as RFC 3339.

// receiptDoc is what an answer rests on.
type receiptDoc struct {
	Version      string `json:"version"`
	Epoch        uint64 `json:"epoch"`
	N            int    `json:"n"`
	Needed       int    `json:"needed"`
	Acknowledged int    `json:"acknowledged"`
	Strength     string `json:"strength"`
	Vnode        int    `json:"vnode"`
	Coordinator  string `json:"coordinator"`
	Repaired     int    `json:"repaired"`
}

func receiptDocOf(r client.Receipt) receiptDoc {
	return receiptDoc{
		Version: r.Version.String(), Epoch: r.Epoch, N: r.N, Needed: r.Needed, Acknowledged: r.Acknowledged,
		Strength: r.Strength.String(), Vnode: r.Vnode, Coordinator: r.Coordinator, Repaired: r.Repaired,
	}
}

// receiptLine is a receipt for people.
func receiptLine(r client.Receipt) string {
	return fmt.Sprintf("version %s  %d of %s acknowledged, %d needed  coordinator %s",
		r.Version, r.Acknowledged, plural(r.N, "slot"), r.Needed, r.Coordinator)
}

// keyDoc and halfDoc are a key and a value: as text, or in base64 when they are not
// UTF-8.
type keyDoc struct {
	Key       *string `json:"key,omitempty"`
	KeyBase64 *string `json:"key_base64,omitempty"`
}

func keyDocOf(key []byte) keyDoc { return keyDoc{blob(key).text(), blob(key).base64()} }

type halfDoc struct {
	Value       *string `json:"value,omitempty"`
	ValueBase64 *string `json:"value_base64,omitempty"`
}

func halfDocOf(value []byte) halfDoc { return halfDoc{blob(value).text(), blob(value).base64()} }

// valueDoc is the answer to a get.
type valueDoc struct {
	keyDoc
	halfDoc
	Version   string     `json:"version"`
	ExpiresAt *string    `json:"expires_at,omitempty"`
	Receipt   receiptDoc `json:"receipt"`
	traceDoc
}

// recordDoc is one record of a scan. The value is left out with --keys-only.
type recordDoc struct {
	keyDoc
	*halfDoc
	Version   string  `json:"version"`
	ExpiresAt *string `json:"expires_at,omitempty"`
}

// timeDoc is a time, or nothing for the zero one.
func timeDoc(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := t.UTC().Format(time.RFC3339Nano)
	return &s
}

// msDoc is a duration in milliseconds, to the microsecond.
func msDoc(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// traceDoc is a request's timeline.
type traceDoc struct {
	Trace []eventDoc `json:"trace,omitempty"`
	// Complete tells whether every replica has answered or been given up.
	Complete *bool `json:"trace_complete,omitempty"`
}

type eventDoc struct {
	AtMs   float64 `json:"at_ms"`
	Node   string  `json:"node"`
	Kind   string  `json:"kind"`
	Detail string  `json:"detail"`
}
