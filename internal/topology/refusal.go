package topology

import "fmt"

// RefusalKind says why a change is refused.
type RefusalKind uint8

// The kinds of refusals.
const (
	// Invalid: the request can never be right.
	Invalid RefusalKind = iota + 1
	// NotFound: what it names does not exist.
	NotFound
	// Exists: what it would make exists.
	Exists
	// Precondition: the cluster's state does not allow it.
	Precondition
	// Conflict: the state it was made for is no longer the present one.
	Conflict
)

// Refusal is the error of a change that was not made.
type Refusal struct {
	Kind RefusalKind
	// Reason is a stable upper-case identifier.
	Reason  string
	Message string
	// Details holds facts for programs: the limit, the name, the counts.
	Details map[string]string
}

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

// refuse builds a Refusal; details are pairs of name and value.
func refuse(kind RefusalKind, reason, message string, details ...any) *Refusal {
	r := &Refusal{Kind: kind, Reason: reason, Message: message, Details: map[string]string{}}
	for i := 0; i+1 < len(details); i += 2 {
		r.Details[fmt.Sprint(details[i])] = fmt.Sprint(details[i+1])
	}
	return r
}
