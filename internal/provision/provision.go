// Package provision launches and ends nodes for the orchestrators: as containers of
// a Docker engine, or through an executable that the operator wrote. It remembers
// nothing: what exists is asked for at every call. It never decides that a node is
// needed, and never touches what does not carry the cluster's and the node's name.
//
// Every provisioner keeps these laws:
//
//   - Launch is idempotent by name: while an instance of a name exists, another call
//     leaves it as it is. Of calls that overlap, also from several processes, one
//     launches. A call that was cut off is completed by the next.
//   - End returns nil only when the node's process is gone, hung or not, and its disk
//     deleted. That there is no such instance is success.
//   - A call returns when its context ends or the configured timeout is over,
//     whichever is first. What it had begun may take effect nonetheless.
//
// A Launch that was sent before an End can take effect after it: a name is to be
// used for one node in a cluster's life, and what List shows beyond the nodes that
// are wanted is to be ended again.
package provision

import (
	"context"
	"errors"
	"time"
)

// Node is what is to be launched, or ended.
type Node struct {
	// Name is unique in the cluster's life.
	Name string
	Zone string
	// Incarnation is that of a node that is ended; 0 when it never registered.
	Incarnation uint64
}

// Instance is a node as its provisioner sees it.
type Instance struct {
	// Name is the node's, ID what the provisioner knows it by.
	Name, ID string
	// Running says that it has a process, be it a hung one.
	Running bool
}

// ErrTryAgain matches errors of calls that failed for a reason that will likely pass.
var ErrTryAgain = errors.New("try again later")

// pollEvery is the time between two looks at something that is about to change.
const pollEvery = 100 * time.Millisecond

// pause waits for the next look, or returns why ctx has ended.
func pause(ctx context.Context) error {
	select {
	case <-time.After(pollEvery):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
